"""Every loss against the hardware's limit and against what people use today, on this machine.

    python -m bench                  the default cases of the device, all providers
    python -m bench --quick          a few cases, below 2 minutes on two CPU cores
    python -m bench --losses kd nkd --shapes 512x32000 4096x4000:sliced --dtypes bfloat16
    python -m bench --pass forward backward both --losses kd --ignored 0 50 90
    python -m bench --list           what would be measured, and what it must move and compute
    python -m bench --pages          the pages and plots again, from bench/results

A case is a loss on logits (rows, classes) in one direction: the mean over the rows and its gradient
(`both`), the mean alone without a graph (`forward`), or the gradient from a finished forward
(`backward`). Its providers are kdkernels' backends, the published formulation in eager PyTorch
(`eager`), the fastest formula in plain PyTorch that we know (`plain`), torch.compile of either, and
other libraries where they are installed; each gets raw logits, and all the softmaxes that it needs
are in its time. They are timed in turns, within the same rounds, together with a copy of as many
bytes as the loss must move. Every call takes the next of so many inputs that they exceed the cache.
On a GPU the time is the device's, between two events. On a CPU the C library keeps freed memory, as
jemalloc, tcmalloc or a caching allocator do; with --malloc default every large tensor is fresh.

"of copy" is the bandwidth that the bytes of the case make of the time, over the bandwidth of that
copy, the median of all copies of as many bytes in the run. Errors are against float64: of the loss,
absolute; of the gradient in some rows, over its largest entry. Memory is what one call takes beyond
its inputs at its peak, gradient included.

Results go to bench/results/<machine> when the default cases are measured as they are, or with
--keep; else to out/bench, or to --out: a table on the screen, results.json, results.csv, and plots.
When they go to a folder in bench/results, README.md and docs/performance.md are written anew from
all of these.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import kdkernels
from bench import measure, providers, report
from bench.cases import DIRECTIONS, DTYPES, LAYOUTS, LOSSES, TEMPERATURE, choose
from bench.children import say
from bench.peers import PEERS
from bench.run import Runner, case_of, pool_copies, run

SECONDS = {"cuda": 1.0, "cpu": 3.0}  # of timing for each case
QUICK_SECONDS, QUICK_BUDGET = 1.5, 75.0


def shape_of(text: str) -> tuple[int, int, str]:
    """ROWSxCLASSES, or ROWSxCLASSES:LAYOUT."""
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(?::(.+))?", text)
    if found is None or found[3] not in (None, *LAYOUTS):
        raise argparse.ArgumentTypeError(
            f"{text!r} is not ROWSxCLASSES, such as 512x32000, with :LAYOUT after it or not "
            f"({', '.join(LAYOUTS)})"
        )
    return int(found[1]), int(found[2]), found[3] or "dense"


def positive(text: str) -> float:
    value = float(text)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def percent(text: str) -> int:
    if not text.isdecimal() or int(text) > 99:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 0 to 99")
    return int(text)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="few cases, little time")
    add("--losses", nargs="+", choices=LOSSES, default=[])
    add(
        "--shapes",
        nargs="+",
        type=shape_of,
        default=[],
        help=f"ROWSxCLASSES, or ROWSxCLASSES:LAYOUT ({', '.join(LAYOUTS)})",
    )
    add("--dtypes", nargs="+", choices=DTYPES, default=[])
    add("--pass", nargs="+", choices=DIRECTIONS, default=[], dest="directions")
    add("--ignored", nargs="+", type=percent, default=[], help="percent of rows that are ignored")
    add("--providers", nargs="+", choices=providers.NAMES, default=list(providers.NAMES))
    add("--device", choices=SECONDS, help="default: cuda where there is one")
    add("--out", type=Path, metavar="DIR", help="where results go, see above")
    add("--keep", action="store_true", help="in bench/results/<machine>, whatever was measured")
    add("--seconds", type=positive, help="timing of each case (default: 1 on a GPU, 3 on a CPU)")
    add("--budget", type=positive, help="seconds after which no further case is begun")
    add("--threads", type=int, help="of torch on the CPU (default: torch's own choice)")
    add("--sets", type=int, help="input sets to rotate through (default: as exceed the cache)")
    add(
        "--malloc",
        choices=measure.MALLOC_POLICIES,
        help="what the C library does with freed memory on the CPU (default: keep it)",
    )
    add("--seed", type=int, default=0)
    add("--list", action="store_true", help="show the cases and measure nothing")
    add("--pages", action="store_true", help="write the pages and measure nothing")
    options = parser.parse_args(arguments)
    for name in ("threads", "sets"):
        value = getattr(options, name)
        if value is not None and value < 1:
            parser.error(f"--{name} {value}: at least 1")
    if options.keep and options.out:
        parser.error("--keep and --out: one of them")
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if options.malloc and options.device == "cuda":
        parser.error("--malloc: is about the CPU")
    options.default = is_default(options)
    options.seconds = options.seconds or (
        QUICK_SECONDS if options.quick else SECONDS[options.device]
    )
    options.budget = options.budget or (QUICK_BUDGET if options.quick else None)
    return options


def is_default(options: argparse.Namespace) -> bool:
    """Whether the default cases are measured as they are."""
    where = {"device", "out", "keep", "list", "pages"}
    given = {name for name, value in vars(options).items() if value} - where
    return given <= {"providers"} and options.providers == list(providers.NAMES)


def listing(options: argparse.Namespace, cases: Sequence[Any]) -> str:
    rows = [
        [
            str(case),
            f"{case.bytes / 1e6:.1f}",
            f"{case.exponentials / 1e6:.1f}",
            ", ".join(x for x in providers.of(case, options.device) if x in options.providers),
        ]
        for case in cases
    ]
    return report.table(["case", "MB to move", "10^6 exponentials", "providers"], rows)


def draw(made: report.Report, out: Path) -> list[Path]:
    try:
        from bench import plots

        return plots.draw(made, out)
    except ImportError as error:
        print(f"no plots: {error}")
        return []


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.pages:
        written = report.rewrite_pages()
        for folder, made in report.kept().items():
            written += draw(made, report.RESULTS / folder)
        print("written: " + (", ".join(map(os.path.relpath, written)) or "nothing"))
        return
    cases = choose(
        options.device,
        quick=options.quick,
        losses=options.losses,
        shapes=options.shapes,
        dtypes=options.dtypes,
        directions=options.directions,
        ignored=options.ignored,
    )
    if options.list:
        print(listing(options, cases))
        return
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench: there is no CUDA device here; nothing was measured")
    machine: measure.Machine = (
        measure.Cuda()
        if options.device == "cuda"
        else measure.Cpu(options.threads, options.malloc or "keep")
    )
    out = options.out or (
        report.RESULTS / report.folder_of(machine.name)
        if options.default or options.keep
        else report.ROOT / "out" / "bench"
    )
    words = sys.argv[1:] if arguments is None else list(arguments)
    began = time.perf_counter()
    made: report.Report = {
        "command": shlex.join(["python", "-m", "bench", *words]),
        "settings": {
            "sets": options.sets,
            "malloc": machine.malloc,
            "seconds": options.seconds,
            "budget": options.budget,
            "seed": options.seed,
            "temperature": TEMPERATURE,
        },
        "facts": machine.facts()
        | {
            "backends": {
                name: {"available": x.available, "reason": x.reason, "build": dict(x.build)}
                for name, x in kdkernels.backends().items()
            },
            "peers": {name: peer.version for name, peer in PEERS.items()}
            | {"nvidia-cutlass-dsl": measure.version("nvidia-cutlass-dsl")},
        },
        "records": [],
    }
    with tqdm(total=len(cases), file=sys.stderr, unit="case") as bar:
        runner = Runner(
            machine,
            options.providers,
            seconds=options.seconds,
            sets=options.sets,
            seed=options.seed,
            show=bar.set_postfix_str,
        )
        say(ready=True)
        for records in run(runner, cases, options.budget):
            made["records"] += records
            pool_copies(made["records"])
            made["facts"]["wall_seconds"] = round(time.perf_counter() - began, 1)
            # After every case, so that a run that is cut short leaves what it has.
            paths = report.write(out, made)
            for record in records:
                say(name=f"{case_of(record)}, {record['provider']}")
            bar.update()

    print(f"{report.machine_line(made)}, {made['facts']['wall_seconds']} s")
    if setting := report.setting_line(made):
        print(setting)
    print(f"\n{report.summary(made['records'])}\n\n{report.goals_text(made)}")
    paths += draw(made, out)
    if out.resolve().is_relative_to(report.RESULTS):
        paths += report.rewrite_pages()
    print("\nwritten: " + ", ".join(os.path.relpath(path) for path in paths))


if __name__ == "__main__":
    main()
