"""What Nsight Compute counts in the headline kernels.

    python -m bench.counters                     KD in bfloat16, 4096 rows, three vocabularies
    KDKERNELS_PLAN="parts=4" python -m bench.counters --shapes 4096x32000

For each shape one launch is profiled, the second: sections SpeedOfLight, MemoryWorkloadAnalysis,
Occupancy and WarpStateStats. They go to --out (default: out/bench), counters-<shape>.txt and .csv,
beside the report itself, which ncu-ui opens. Without ncu on PATH nothing is done, which is said.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench import children, providers, report
from bench.__main__ import positive, shape_of
from bench.cases import Case
from bench.measure import Inputs, LossCall

SHAPES = [(4096, 128256), (4096, 10007), (4096, 262144)]
SECTIONS = ("SpeedOfLight", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
LIMIT = 100.0  # seconds for a shape: every section takes the kernel some passes
LEFT_OUT = "left out, the budget is spent"
STOPPED = "left out, the run was stopped"
OF_LONG_ROWS = "regex:^(cluster|staged|sweeps|split_stats)$"


def call(case: Case, device: str) -> None:
    """What is profiled: the loss and its gradient, twice."""
    inputs = Inputs.draw(case, 1, 0, device)
    loss = LossCall(providers.build(device, case), inputs, case.direction)
    for _ in range(2):
        loss.run(loss.prepare(0))
    if device == "cuda":
        torch.cuda.synchronize()


def count(program: str, case: Case, device: str, out: Path, until: float) -> str | None:
    """Writes the files of a shape; or why there are none: LEFT_OUT, STOPPED, or what failed."""
    stem = out / f"counters-{case.shape}"
    target = [sys.executable, "-m", "bench.counters", "--device", device, "--call", case.shape]
    sections = [x for name in SECTIONS for x in ("--section", name)]
    steps = {
        stem.with_suffix(".log"): [
            *("--kernel-name", OF_LONG_ROWS, "--launch-skip", "1", "--launch-count", "1"),
            *("--clock-control", "none"),  # the device's settings stay as they are
            *sections,
            *("--force-overwrite", "--export", str(stem), *target),
        ],
        stem.with_suffix(".txt"): ["--import", f"{stem}.ncu-rep", "--page", "details"],
        stem.with_suffix(".csv"): ["--import", f"{stem}.ncu-rep", "--page", "details", "--csv"],
    }
    for path, arguments in steps.items():
        now = time.monotonic()
        if children.STOP.is_set():
            return STOPPED
        if now >= until:
            return LEFT_OUT
        path.unlink(missing_ok=True)
        latest = min(until, now + LIMIT)
        *_, end = children.watch([program, *arguments], limit=LIMIT, until=latest, output=path)
        if "late" in end and children.STOP.is_set():
            return STOPPED
        if "late" in end and latest == until:
            return LEFT_OUT
        if end != {"status": 0}:
            how = f"ended with status {end['status']}" if "status" in end else "ran out of time"
            return f"{Path(program).name} {how}, see {path.name}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    parser = argparse.ArgumentParser(
        prog="python -m bench.counters",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape_of, default=SHAPES, help="ROWSxCLASSES")
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--out", type=Path, default=report.ROOT / "out" / "bench", metavar="DIR")
    add("--budget", type=positive, default=300.0, help="seconds in all")
    add("--call", type=shape_of, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.call:
        call(Case("kd", *options.call[:2], "bfloat16"), options.device)
        return 0
    program = shutil.which("ncu")
    if program is None:
        print("ncu is not on PATH: nothing was counted")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    bad = False
    for rows, classes, *_ in options.shapes:
        case = Case("kd", rows, classes, "bfloat16")
        why = count(program, case, options.device, options.out, began + options.budget)
        where = options.out / f"counters-{case.shape}"
        print(f"{case}: {why or where.with_suffix('.txt')}", flush=True)
        if why not in (None, LEFT_OUT, STOPPED):
            bad = True
            print(where.with_suffix(".log").read_text(errors="replace")[-2000:], flush=True)
    return int(bad)


if __name__ == "__main__":
    sys.exit(children.stoppable(main))
