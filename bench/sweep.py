"""The plans that the CUDA planner could make for long rows, measured one by one.

    python -m bench.sweep                        KD in bfloat16, 4096 rows, five vocabularies
    python -m bench.sweep --budget 240           seconds; a later call goes on where this one ended
    python -m bench.sweep --shapes 512x32000 --plans "" "regime=split" "parts=4 stages=2"

Every plan is asked for by KDKERNELS_PLAN; "" is the planner's own. Its gradient is compared with
that of the planner's own plan, loss and gradient with float64, and it is timed in turns with a copy
of as many bytes as the loss must move (shares are of the median of a shape's copies so far). A line
for each shape and plan goes to sweep.csv in --out (default: out/bench) as it comes: also for one
that a kernel or the device cannot have, that gives wrong numbers, hangs or crashes. It runs in a
child process, so that the next one has a device. Shapes and plans that the file has from this
device and commit are not measured again; the exit status is 1 when one of them is wrong or failed,
whichever call has measured it.
"""

from __future__ import annotations

import argparse
import csv
import os
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import measure, providers, report
from bench.__main__ import positive, shape_of
from bench.cases import DTYPES, Case, truth
from bench.children import STOP, say, stoppable, work_through
from bench.providers import PLAN, planned
from bench.run import COPY, WARM

# The headline first: a visit may end early.
CLASSES = (128256, 32000, 262144, 10007, 151936)
PLANS = ("", "regime=staged", "regime=split", "regime=sweeps") + tuple(
    f"regime=cluster parts={parts} stages={stages} threads={threads} per_multiprocessor={blocks}"
    for parts, stages, threads, blocks in product((1, 2, 4, 8, 16), (1, 2, 3), (384, 192), (1, 2))
)
FIELDS = ["device", "commit"]  # what a line is of, with the next three
FIELDS += ["shape", "dtype", "plan", "outcome", "ms", "ms_p20", "ms_p80", "calls", "bytes"]
FIELDS += ["gb_per_s", "share_of_copy", "loss_error", "grad_error", "difference", "launched", "why"]
BAD = ("wrong", "failed")  # outcomes
ALLOWED = 1e-2  # of the largest entry of a gradient: two roundings to bfloat16
LIMIT = 60.0  # seconds for a plan; the first of a shape draws the inputs and computes the truth


class Sweep:
    """The plans of one case after another, on a machine, by a backend of kdkernels."""

    def __init__(self, machine: measure.Machine, backend: str, seconds: float) -> None:
        self.machine, self.backend, self.seconds = machine, backend, seconds
        self._case: Case | None = None

    def _open(self, case: Case) -> None:
        """Inputs, the truth, and what the planner's own plan makes of them."""
        self._case = None
        self._calls: dict[str, measure.Call] = {}
        self._copies: list[float] = []  # bytes per second
        self.machine.release()
        self._sets = measure.sets_beyond_cache(case, self.machine.cache, limit=8)
        inputs = measure.Inputs.draw(case, self._sets, 0, self.machine.type)
        student, teacher, target = inputs.students[0], inputs.teachers[0], inputs.targets[0]
        self._truth = truth(case.loss, student.detach(), teacher, target)
        loss = measure.LossCall(providers.build(self.backend, case), inputs, case.direction)
        self._calls = {COPY: measure.CopyCall(case, inputs), self.backend: loss}
        with planned(""):
            gradient = loss.run(loss.prepare(0))[1]
        assert gradient is not None
        self._own: Tensor = gradient
        self._case = case

    def measure(self, case: Case, plan: str) -> dict[str, Any]:
        """The fields of a line: "outcome" is ok, wrong, or why there is no time."""
        if case != self._case:
            self._open(case)
        loss, copy = self._calls[self.backend], self._calls[COPY]
        assert isinstance(copy, measure.CopyCall)
        with planned(plan):
            try:
                result = loss.run(loss.prepare(0))
            except (RuntimeError, ValueError) as error:
                if PLAN not in str(error):
                    raise
                why = str(error).partition("; allowed:")[0]
                return {"outcome": "not possible", "why": why.splitlines()[0]}
            out: dict[str, Any] = measure.gradient_errors(result, self._truth)
            difference = (result[1] - self._own).abs().max() / self._own.abs().max()
            del result
            out["difference"] = float(difference)
            for call in self._calls.values():
                began = time.perf_counter()
                while time.perf_counter() - began < WARM:
                    call.run(call.prepare(0))
                    self.machine.synchronize()
            clock, _ = self.machine.clock(self._calls)
            timings = measure.time_interleaved(
                self._calls, clock=clock, sets=self._sets, seconds=self.seconds
            )
            made = providers.cuda_plan(case, self.machine) if self.backend == "cuda" else None
        seconds = timings[self.backend].median
        self._copies.append(copy.bytes / timings[COPY].median)
        good = out["difference"] <= ALLOWED and out["grad_error"] <= ALLOWED  # NaN is not
        good = good and out["loss_error"] <= ALLOWED * abs(float(self._truth[0]))
        shown = ("regime", "parts", "stages", "threads", "blocks", "per_multiprocessor")
        return out | {
            "outcome": "ok" if good else "wrong",
            **timings[self.backend].summary(),
            "bytes": case.bytes,
            "gb_per_s": case.bytes / seconds / 1e9,
            "share_of_copy": (case.bytes / seconds) / median(self._copies),
            "launched": " ".join(f"{x}={made[x]}" for x in shown) if made else "",
        }


def name_of(case: Case, plan: str) -> str:
    return f"{case.shape} {case.dtype} {plan}".strip()


def work(names: Sequence[str], device: str, seconds: float) -> None:
    """In the child: a line for each name."""
    machine: measure.Machine = measure.Cuda() if device == "cuda" else measure.Cpu()
    sweep = Sweep(machine, device, seconds)
    say(ready=True)
    for name in names:
        shape, dtype, plan = [*name.split(" ", 2), ""][:3]
        line: dict[str, Any] = {}
        try:
            line = sweep.measure(Case("kd", *shape_of(shape)[:2], dtype), plan)
        except Exception as error:
            line = {"failed": f"{type(error).__name__}: {error}".strip().splitlines()[0]}
            try:
                machine.synchronize()
            except Exception:  # an illegal access stays with the process
                line["lost"] = True
        say(name=name, **line)
        if "lost" in line:
            os._exit(0)  # what would be cleaned up is on the device


def drop_half_line(path: Path) -> None:
    """What a run that was killed while it wrote has left at the end of its file.

    A file with another header is refused, as it is.
    """
    if path.exists():
        text = path.read_bytes()
        header, ended, _ = text.partition(b"\n")
        there, ours = header.decode(errors="replace").rstrip("\r"), ",".join(FIELDS)
        if there != ours and (ended or not ours.startswith(there)):
            sys.exit(
                f"{path} has other columns: nothing was measured. Move it, or choose another --out."
                f"\nthere: {there[:400]}\n here: {ours}"
            )
        os.truncate(path, text.rfind(b"\n") + 1)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--shapes", nargs="+", type=shape_of, help="ROWSxCLASSES")
    add("--dtype", choices=DTYPES, default="bfloat16")
    add("--plans", nargs="+", default=list(PLANS), metavar="PLAN")
    add("--device", choices=("cuda", "cpu"), help="default: cuda where there is one")
    add("--out", type=Path, default=report.ROOT / "out" / "bench", metavar="DIR")
    add("--seconds", type=positive, default=0.25, help="timing of each plan")
    add("--budget", type=positive, default=3600.0, help="seconds in all")
    add("--work", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    options.shapes = options.shapes or [(4096, classes, "dense") for classes in CLASSES]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    began = time.monotonic()
    options = parse(arguments)
    if options.work:
        work(options.work, options.device, options.seconds)
        return 0
    cases = [Case("kd", rows, classes, options.dtype) for rows, classes, _ in options.shapes]
    if options.device == "cuda" and not torch.cuda.is_available():
        sys.exit("bench.sweep: there is no CUDA device here; nothing was measured")
    device = torch.cuda.get_device_name() if options.device == "cuda" else measure.cpu_name()
    here = {"device": device, "commit": measure.commit()}
    asked = {name_of(*pair): pair for pair in product(cases, options.plans)}
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "sweep.csv"
    command = [sys.executable, "-m", "bench.sweep", "--device", options.device]
    command += ["--seconds", str(options.seconds), "--work"]
    drop_half_line(path)
    with path.open("a+", newline="", encoding="utf-8") as file:
        file.seek(0)
        rows = [x for x in csv.DictReader(file) if here.items() <= x.items()]
        done = {f"{x['shape']} {x['dtype']} {x['plan']}".strip(): x["outcome"] for x in rows}
        bad = sum(done.get(name) in BAD for name in asked)
        lines = csv.DictWriter(file, FIELDS, restval="", extrasaction="ignore")
        if file.tell() == 0:
            lines.writeheader()
        left = [name for name in asked if name not in done]
        print(
            f"{path}: {len(asked) - len(left)} of {len(asked)} lines are there, {bad} bad",
            flush=True,
        )
        for line in work_through(left, command, limit=LIMIT, until=began + options.budget):
            if "failed" in line:
                line |= {"outcome": "failed", "why": line["failed"]}
            if "name" not in line:
                print(f"the child: {line['why']}", flush=True)
                bad += 1
                continue
            case, plan = asked[line["name"]]
            line |= here | {"shape": case.shape, "dtype": case.dtype, "plan": plan}
            lines.writerow(line)
            file.flush()
            left.remove(line["name"])
            bad += line["outcome"] in BAD
            shown = (report.number(line.get("ms")), report.percent(line.get("share_of_copy")))
            words = ", ".join(x for x in shown if x) or line.get("why", "")
            print(f"{line['name']}: {line['outcome']}, {words}", flush=True)
    stopped = "stopped: " if STOP.is_set() else ""
    print(f"{stopped}{len(left)} are left" if left else "all are there", flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(stoppable(main))
