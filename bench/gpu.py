"""GPU benchmark: forward and backward of the losses, fused against eager and torch.compile.

    python -m bench.gpu                        KD and NKD in bfloat16 (below 3 minutes)
    python -m bench.gpu --losses dkd aekt --dtypes float32 --shapes 4096x32000
    python -m bench.gpu --shapes regimes --baselines    every kernel of the CUDA backend

What is timed is the loss with reduction "mean" and `torch.autograd.grad(loss, student)`, with the
inputs ready and every provider warm, by CUDA events around each call. Providers are the backends
cuda and triton, those of them that there are, and the baselines. The device is held up until
the call is queued, so the time is the device's alone; `launch ms` is what the call takes on the
host, and where that is more, a program with nothing else to do waits for it. Eager NKD waits for
the device in the middle of the call (a boolean mask), which its time shows.

All providers of all losses at one shape are interleaved in the same rounds, together with a copy
stream of the same size: `torch.add(a, b, out=c)`, 2 reads and 1 write, which is the least that a
loss with its gradient could cost. Every call takes the next of so many inputs that they exceed the
L2 cache; results go to memory used before, those of the copy, too.

Errors are against kdkernels' reference in float64: the loss against the one of all rows, the
gradient in a few rows. Memory is what one call takes beyond its inputs at its peak, the gradient
included. Targets are printed as information; nothing fails when one is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

if not __package__:  # run as a script; an installed kdkernels comes first, hence at the end
    sys.path.append(str(Path(__file__).resolve().parents[1]))

import kdkernels
from bench import eager, measure
from bench.measure import (
    BYTES_PER_CALL,
    BYTES_PER_ROW,
    DTYPES,
    NAMES,
    TEMPERATURE,
    Loss,
    errors,
    fused_loss,
    number,
    results,
    shape_of,
    spread,
    write,
)

BACKENDS = ("cuda", "triton")
BASELINES = ("eager", "compile")
COPY = ("copy", "")
LOSSES = ("kd", "nkd", "dkd", "aekt")
# Rows, classes, and how logits lie in memory: see LAYOUTS.
SHAPES = (
    (4096, 100, "dense"),
    (1024, 1000, "dense"),
    (4096, 32000, "dense"),
    (4096, 128256, "dense"),
)
# What each kernel of the CUDA backend is for, in bfloat16 on an H200: csrc/cuda/plan.h.
REGIMES = (
    (65536, 10, "dense"),  # lanes: 8
    (4096, 100, "dense"),  # 16
    (16384, 200, "dense"),  # 32
    (1024, 1000, "dense"),  # block
    (4096, 4000, "dense"),
    (4096, 4000, "sliced"),  # sweeps
    (4096, 10007, "dense"),  # cluster of 1, two per multiprocessor
    (4096, 32000, "dense"),  # of 2
    (4096, 50257, "dense"),  # of 2, parts longer than registers hold
    (4096, 50257, "sliced"),
    (4096, 128256, "dense"),  # of 8
    (4096, 151936, "dense"),
    (4096, 151669, "dense"),
    (4096, 262144, "dense"),  # of 16
    (8, 128256, "dense"),  # of 16, few rows
    (65536, 150, "classes-first"),  # strided
)
# From dense tensors to views (rows, classes) of them, by their shape.
LAYOUTS: dict[str, Callable[[Callable[..., Tensor], int, int], Tensor]] = {
    "dense": lambda make, rows, classes: make(rows, classes),
    # The gradient, which is dense, does not lie as the logits do.
    "sliced": lambda make, rows, classes: make(rows, classes + 1)[:, :-1],
    "classes-first": lambda make, rows, classes: make(classes, rows).t(),  # as in images
}
CHECKED_ROWS = 8
CHUNK = 1 << 24  # logits of the reference in float64 at a time

# Shares of the copy's bandwidth to reach, up to that many classes and beyond; and ratios.
SHORT_ROW, OF_COPY, OF_COPY_LONG = 16384, 0.8, 0.6
RATIOS = {(4096, 128256): {"eager": 10, "compile": 3}}

Key = tuple[str, str]  # loss and provider
Shape = tuple[int, int, str]


def case_name(rows: int, classes: int, layout: str, dtype: str) -> str:
    return f"{rows}x{classes}{'' if layout == 'dense' else ':' + layout} {dtype}"


def case_of(record: dict[str, Any]) -> str:
    return case_name(record["rows"], record["classes"], record["layout"], record["dtype"])


@dataclass
class Group:
    """One shape and dtype: everything in it is timed together."""

    rows: int
    classes: int
    layout: str
    dtype_name: str
    device: str = "cuda"
    students: list[Tensor] = field(default_factory=list)
    teachers: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    @property
    def size(self) -> int:
        return measure.modelled_bytes(self.rows, self.classes, self.dtype)

    def __str__(self) -> str:
        return case_name(self.rows, self.classes, self.layout, self.dtype_name)

    def fill(self, sets: int, seed: int) -> None:
        generator = torch.Generator(self.device).manual_seed(seed)

        def dense(*shape: int) -> Tensor:
            made = torch.empty(shape, dtype=self.dtype, device=self.device)
            return made.normal_(0, 2, generator=generator)

        def logits() -> Tensor:
            return LAYOUTS[self.layout](dense, self.rows, self.classes)

        for _ in range(sets):
            self.students.append(logits().requires_grad_())
            self.teachers.append(logits())
            self.targets.append(
                torch.randint(self.classes, (self.rows,), device=self.device, generator=generator)
            )

    def clear(self) -> None:
        self.students, self.teachers, self.targets = [], [], []

    def call(self, loss: Loss) -> measure.Call:
        """Loss and gradient on an input set."""

        def run(index: int) -> tuple[Tensor, Tensor]:
            student = self.students[index]
            value = loss(student, self.teachers[index], self.targets[index])
            (grad,) = torch.autograd.grad(value, student)
            return value.detach(), grad

        return run

    def truth(self, loss: str) -> tuple[Tensor, Tensor]:
        """The loss of all rows of the first input set, the gradient of a few spread over them."""
        reference = fused_loss(loss, "reference")
        inputs = (self.students[0].detach(), self.teachers[0], self.targets[0])
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        step = max(1, CHUNK // self.classes)
        for start in range(0, self.rows, step):
            student, teacher, target = (x[start : start + step] for x in inputs)
            part = reference(student.double(), teacher.double(), target)
            total += part * len(target)
        student, teacher, target = (x[self.checked] for x in inputs)
        wide = student.double().requires_grad_()
        value = reference(wide, teacher.double(), target)
        (grad,) = torch.autograd.grad(value, wide)
        return total / self.rows, grad * (len(target) / self.rows)

    @property
    def checked(self) -> list[int]:
        count = min(self.rows, CHECKED_ROWS)
        return [i * (self.rows - 1) // max(1, count - 1) for i in range(count)]


def build(group: Group, loss: str, provider: str) -> measure.Call:
    if provider not in BASELINES:
        return group.call(fused_loss(loss, provider))
    function = eager.LOSSES[loss]
    if provider == "compile":
        function = torch.compile(function, dynamic=False)
    return group.call(function)


def check(
    group: Group, losses: Sequence[str], providers: Sequence[str], failed: dict[str, str], bar: tqdm
) -> tuple[dict[Key, measure.Call], dict[Key, dict[str, Any]]]:
    """Warm calls with their errors, memory and launch time; into `failed`: what cannot run."""
    calls: dict[Key, measure.Call] = {}
    found: dict[Key, dict[str, Any]] = {}
    for loss in losses:
        truth = group.truth(loss)
        for provider in providers:
            bar.set_postfix_str(f"{group} {NAMES[loss]} {provider}")
            call = build(group, loss, provider)
            try:
                value, grad = call(0)
                loss_error, grad_error = errors((value, grad[group.checked]), truth)
                del grad
                found[loss, provider] = {
                    "loss_error": loss_error,
                    "grad_error": grad_error,
                    "peak_bytes": measure.gpu_peak_memory(lambda call=call: call(0)),
                    "gradient_bytes": group.students[0].nbytes,
                    "launch_ms": 1e3 * measure.launch_seconds(call),
                }
                calls[loss, provider] = call
            except Exception as error:  # out of memory, or a compiler that is not there
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                failed[f"{group}, {NAMES[loss]}, {provider}"] = reason
            if (loss, provider) not in calls:
                torch.cuda.empty_cache()  # what it got before it failed
            bar.update()
    return calls, found


def clock(
    group: Group, calls: dict[Key, measure.Call], found: dict[Key, dict[str, Any]], seconds: float
) -> dict[Key, measure.Timing]:
    """Interleaved timings of all calls and of the copy stream."""
    out = torch.empty_like(group.teachers[0])  # always the same, as the allocator's gradients are
    plain = [student.detach() for student in group.students]

    def copy(index: int) -> None:
        torch.add(plain[index], group.teachers[index], out=out)

    calls = {**calls, COPY: copy}
    for call in calls.values():
        call(0)  # the allocator then holds memory for all of them
    torch.cuda.synchronize()
    launches = max((x["launch_ms"] for x in found.values()), default=0.0)
    return measure.time_interleaved(
        calls,
        clock=measure.EventClock(hold_up=min(1e-2, 2e-3 * launches + 2e-4)),
        sets=len(group.students),
        seconds=seconds,
        min_rounds=5,
        max_rounds=200,
    )


def records(
    group: Group,
    timings: dict[Key, measure.Timing],
    found: dict[Key, dict[str, Any]],
) -> list[dict[str, Any]]:
    """One record per timed thing of a group, with its ratios."""
    copy = timings[COPY].median
    out = []
    for (loss, provider), timing in timings.items():
        record = {
            "rows": group.rows,
            "classes": group.classes,
            "layout": group.layout,
            "dtype": group.dtype_name,
            "loss": loss,
            "provider": provider,
            "input_sets": len(group.students),
            **timing.summary(),
            "modelled_bytes": group.size,
            "modelled_gb_per_s": group.size / timing.median / 1e9,
            "share_of_copy_bandwidth": copy / timing.median,
            **found.get((loss, provider), {}),
        }
        if provider and provider not in BASELINES:
            for other in BASELINES:
                if (loss, other) in timings:
                    record[f"{other}_over"] = timings[loss, other].median / timing.median
        out.append(record)
    return out


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target that this run has figures for: what it asks, what was measured, met or not."""
    out = []
    for row in rows:
        if row["provider"] in ("", *BASELINES):
            continue
        share = OF_COPY if row["classes"] <= SHORT_ROW else OF_COPY_LONG
        checks = [("share of copy bandwidth", row["share_of_copy_bandwidth"], share, True)]
        dense = row["layout"] == "dense"
        ratios = RATIOS.get((row["rows"], row["classes"]), {}) if dense else {}
        for other, ratio in ratios.items():
            if f"{other}_over" in row:
                checks.append((f"{other} / fused", row[f"{other}_over"], ratio, True))
        extra = (row["peak_bytes"] - row["gradient_bytes"] - BYTES_PER_CALL) / row["rows"]
        checks.append(("bytes/row over gradient", max(0.0, extra), BYTES_PER_ROW, False))
        for what, measured, wanted, at_least in checks:
            out.append(
                {
                    "case": case_of(row),
                    "what": f"{NAMES[row['loss']]} {row['provider']}: {what}",
                    "measured": measured,
                    "target": f"{'>=' if at_least else '<='} {wanted:g}",
                    "met": measured >= wanted if at_least else measured <= wanted,
                }
            )
    return out


def times_table(rows: Sequence[dict[str, Any]]) -> str:
    lines: list[list[object]] = []
    for row in rows:
        line = [case_of(row), NAMES.get(row["loss"], "copy")]
        line += [row["provider"] or None, spread(row), number(row.get("launch_ms"))]
        line += [f"{row['modelled_gb_per_s']:.0f}", f"{100 * row['share_of_copy_bandwidth']:.0f} %"]
        line += [number(row.get(f"{other}_over")) for other in BASELINES]
        if row["provider"]:
            line += [number(row["peak_bytes"] / measure.MIB)]
            line += [number(row["peak_bytes"] / row["gradient_bytes"])]
            line += [f"{row['loss_error']:.1e}", f"{row['grad_error']:.1e}"]
        else:
            line += [None] * 4
        lines.append(line)
    header = ["case", "loss", "provider", "ms", "launch ms", "GB/s at 3 NV", "of copy"]
    header += ["vs eager", "vs compile", "peak MiB", "/ gradient", "loss error", "grad error"]
    return measure.table(header, lines)


def targets_table(judged: Sequence[dict[str, Any]]) -> str:
    lines = [
        [x["case"], x["what"], number(x["measured"]), x["target"], "pass" if x["met"] else "FAIL"]
        for x in judged
    ]
    return measure.table(["case", "what", "measured", "target", ""], lines)


def shapes_of(text: str) -> tuple[Shape, ...]:
    """`regimes`, or ROWSxCLASSES or ROWSxCLASSES:LAYOUT."""
    if text == "regimes":
        return REGIMES
    shape, _, layout = text.partition(":")
    if layout and layout not in LAYOUTS:
        raise argparse.ArgumentTypeError(f"{layout!r} is none of {', '.join(LAYOUTS)}")
    return ((*shape_of(shape), layout or "dense"),)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        type=shapes_of,
        default=[SHAPES],
        metavar="SHAPE",
        help=f"ROWSxCLASSES, with :LAYOUT ({', '.join(LAYOUTS)}), or regimes: one or more for each",
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bfloat16"])
    parser.add_argument("--losses", nargs="+", choices=LOSSES, default=LOSSES[:2])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, help="default: all there are")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=BASELINES)
    parser.add_argument("--seconds", type=float, default=5.0, help="timing per shape and dtype")
    parser.add_argument("--sets", type=int, help="input sets (default: 4 times the L2 cache)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: bench/results/<GPU>")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if not torch.cuda.is_available():
        sys.exit("bench.gpu: no CUDA device; nothing was measured")
    states = kdkernels.backends()
    backends = options.backends or [name for name in BACKENDS if states[name].available]
    missing = {name: states[name].reason for name in BACKENDS if not states[name].available}
    if not backends or set(backends) & set(missing):
        sys.exit(f"bench.gpu: a GPU backend is not available: {missing}")
    began = time.perf_counter()
    gpu = measure.gpu_facts()
    words = sys.argv[1:] if arguments is None else list(arguments)
    report: dict[str, Any] = {"command": " ".join(["python -m bench.gpu", *words])}
    providers = [*backends, *options.baselines]
    rows: list[dict[str, Any]] = []
    failed: dict[str, str] = {}
    shapes = [shape for some in options.shapes for shape in some]
    groups = [Group(*shape, dtype) for shape in shapes for dtype in options.dtypes]
    with tqdm(total=len(groups) * len(options.losses) * len(providers), file=sys.stderr) as bar:
        for group in groups:
            torch.compiler.reset()
            cache = int(gpu["l2_mib"] * measure.MIB)
            sets = options.sets or measure.sets_beyond_cache(group.size * 2 // 3, cache)
            group.fill(sets, options.seed)
            calls, found = check(group, options.losses, providers, failed, bar)
            bar.set_postfix_str(f"{group}, timing")
            rows += records(group, clock(group, calls, found, options.seconds), found)
            group.clear()
            torch.cuda.empty_cache()
            # After every group, so that a run that is cut short leaves what it has.
            report |= {
                "facts": measure.machine_facts()
                | gpu
                | {
                    "kdkernels_backends": {name: str(state) for name, state in states.items()},
                    "temperature": TEMPERATURE,
                    "wall_seconds": round(time.perf_counter() - began, 1),
                    "without_result": failed,
                },
                "records": rows,
                "targets": judge(rows),
            }
            paths = write(options.out or results(gpu["gpu"]), "gpu", report)

    facts, judged = report["facts"], report["targets"]
    print(
        f"{gpu['gpu']}, CUDA {gpu['cuda']}, torch {facts['torch']}, triton {gpu['triton']}, "
        f"commit {facts['commit']}, {facts['wall_seconds']} s\n"
        "forward + backward; median [20th-80th percentile] of interleaved calls\n"
    )
    print(times_table(rows))
    print(f"\nTargets, for information: {sum(x['met'] for x in judged)} of {len(judged)} met\n")
    print(targets_table(judged))
    for name, reason in {**missing, **failed}.items():
        print(f"\nno result for {name}: {reason}")
    print("\nwritten: " + ", ".join(os.path.relpath(path) for path in paths))


if __name__ == "__main__":
    main()
