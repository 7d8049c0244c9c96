"""CPU benchmark: forward and backward of every loss, fused against eager and torch.compile.

    python -m bench.cpu            the full table (about 10 minutes on two cores)
    python -m bench.cpu --quick    two shapes, float32, three losses (below 2 minutes)

What is timed is the loss with reduction "mean" and `torch.autograd.grad(loss, student)`, with the
inputs ready and every provider warm. All providers of all losses at one shape are interleaved in
the same rounds, together with a copy stream of the same size: `torch.add(a, b, out=c)`, 2 reads
and 1 write in memory allocated beforehand, which is the least a loss with its gradient could cost.
`copy, new` is the same with a newly allocated result, as every loss must allocate its gradient.

Time depends on what the C library does with freed memory, so all is timed twice. "default" is
glibc as it comes: a large freed block goes back to the kernel and the next one costs its page
faults, for the one gradient of a fused loss and for every temporary of an eager one. "keep" holds
on to freed memory as jemalloc, tcmalloc or a caching allocator do, which leaves the arithmetic.

Errors are against kdkernels' reference in float64. Memory is what one call takes beyond its inputs
at its peak, the gradient included. Both are taken before any timing. Targets are printed beside
the figures as information; nothing fails when one is missed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
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

LOSSES = ("kd", "dkd", "nkd", "aekt", "tf_nkd")
PROVIDERS = ("fused", "eager", "compile")
COPY, COPY_NEW = "copy", "copy, new"
POLICIES = ("default", "keep")  # in this order: memory once kept is not given back
SHAPES = ((512, 32000), (128, 128256), (1024, 1000), (4096, 100))
QUICK_SHAPES = ((512, 32000), (1024, 1000))

# Ratios to reach, by shape: eager / fused and torch.compile / fused.
_LARGE = {("kd", "eager"): 30, ("kd", "compile"): 6, ("dkd", "eager"): 70, ("dkd", "compile"): 20}
TARGETS: dict[tuple[int, int], dict[tuple[str, str], int]] = {
    (512, 32000): _LARGE,
    (128, 128256): _LARGE,
    (1024, 1000): {
        ("kd", "eager"): 10,
        ("kd", "compile"): 6,
        ("dkd", "eager"): 35,
        ("dkd", "compile"): 18,
    },
    (4096, 100): {
        ("kd", "eager"): 9,
        ("kd", "compile"): 6,
        ("dkd", "eager"): 25,
        ("dkd", "compile"): 12,
    },
}
KD_OVER_COPY = 2.5  # at the two large float32 shapes
OTHERS_OVER_KD = 1.3  # NKD, DKD and AEKT


@dataclass
class Group:
    """One shape and dtype: everything in it is timed together."""

    rows: int
    classes: int
    dtype_name: str
    seed: int
    cache: int
    sets: int | None = None  # input sets to rotate through; None: as many as exceed the cache
    students: list[Tensor] = field(default_factory=list)
    teachers: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.dtype_name]

    def __str__(self) -> str:
        return f"{self.rows}x{self.classes} {self.dtype_name}"

    def fill(self, sets: int | None = None) -> None:
        """Draw the inputs; `sets` overrides the group's own number."""
        read = measure.modelled_bytes(self.rows, self.classes, self.dtype, passes=2)
        generator = torch.Generator().manual_seed(self.seed)
        shape = (self.rows, self.classes)
        for _ in range(sets or self.sets or measure.sets_beyond_cache(read, self.cache)):
            student = torch.randn(shape, generator=generator).mul_(2.0).to(self.dtype)
            self.students.append(student.requires_grad_())
            self.teachers.append(torch.randn(shape, generator=generator).mul_(2.0).to(self.dtype))
            self.targets.append(torch.randint(self.classes, (self.rows,), generator=generator))

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


def build(group: Group, loss: str, provider: str, backend: str | None) -> measure.Call:
    if provider == "fused":
        return group.call(fused_loss(loss, backend))
    function = eager.LOSSES[loss]
    if provider == "compile":
        function = torch.compile(function, dynamic=False)
    return group.call(function)


def check(
    group: Group, losses: Sequence[str], providers: Sequence[str], backend: str | None, bar: tqdm
) -> tuple[dict[tuple[str, str], dict[str, Any]], dict[str, str]]:
    """Errors and memory of every loss and provider; which providers cannot run, and why."""
    torch.compiler.reset()
    group.fill(sets=1)
    student, teacher, target = group.students[0], group.teachers[0], group.targets[0]
    found: dict[tuple[str, str], dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for loss in losses:
        wide = student.detach().double().requires_grad_()
        value = fused_loss(loss, "reference")(wide, teacher.double(), target)
        truth = (value.detach(), torch.autograd.grad(value, wide)[0])
        del wide, value
        for provider in providers:
            bar.set_postfix_str(f"{group} {NAMES[loss]} {provider}")
            if provider not in failed:
                run = build(group, loss, provider, backend)
                try:
                    loss_error, grad_error = errors(run(0), truth)
                except Exception as error:  # torch.compile without a compiler, for one
                    failed[provider] = f"{type(error).__name__}: {error}".splitlines()[0]
                else:
                    memory = measure.peak_memory(lambda run=run: run(0))
                    found[loss, provider] = {
                        "loss_error": loss_error,
                        "grad_error": grad_error,
                        "peak_bytes": memory.allocated,
                        "peak_resident_bytes": memory.resident,
                        "gradient_bytes": student.nbytes,
                    }
            bar.update()
    group.clear()
    return found, failed


def timing_bar(seconds: float) -> tqdm:
    style = f"{{l_bar}}{{bar}}| {{n:.0f}} of {seconds:.0f} s [{{elapsed}}{{postfix}}]"
    # A little more than the sum of the steps: tqdm drops a total that rounding exceeds.
    return tqdm(total=1.001 * seconds, desc="timing", file=sys.stderr, bar_format=style)


def clock(
    group: Group,
    losses: Sequence[str],
    providers: Sequence[str],
    backend: str | None,
    seconds: float,
    bar: tqdm,
) -> tuple[dict[tuple[str, str], measure.Timing], int]:
    """Interleaved timings of every loss, provider and copy stream, and the number of input sets."""
    torch.compiler.reset()
    group.fill()
    sums = [torch.empty_like(teacher) for teacher in group.teachers]
    plain = [student.detach() for student in group.students]
    keys = [(loss, provider) for loss in losses for provider in providers]
    calls: dict[tuple[str, str], measure.Call] = {key: build(group, *key, backend) for key in keys}
    calls[COPY, ""] = lambda i: torch.add(plain[i], group.teachers[i], out=sums[i])
    calls[COPY_NEW, ""] = lambda i: torch.add(plain[i], group.teachers[i])
    for name, call in calls.items():
        bar.set_postfix_str(f"{group}, warming up {' '.join(name)}")
        call(0)  # the compiled ones load here
        warm = time.perf_counter()
        while time.perf_counter() - warm < 0.02:
            call(0)
    began, shown = time.perf_counter(), 0.0
    bar.set_postfix_str(str(group))

    def on_round() -> None:
        nonlocal shown
        now = min(seconds, time.perf_counter() - began)
        bar.update(now - shown)
        shown = now

    count = len(group.students)
    timings = measure.time_interleaved(
        calls, sets=count, seconds=seconds, min_rounds=3, max_rounds=200, on_round=on_round
    )
    bar.update(max(0.0, seconds - shown))
    group.clear()
    return timings, count


def records(
    group: Group,
    checks: dict[tuple[str, str], dict[str, Any]],
    timings: dict[tuple[str, str], measure.Timing],
    sets: int,
    malloc: str,
) -> list[dict[str, Any]]:
    """One record per timed thing of a group, with its ratios."""
    copy, copy_new = timings[COPY, ""].median, timings[COPY_NEW, ""].median
    out = []
    for (loss, provider), timing in timings.items():
        record: dict[str, Any] = {
            "rows": group.rows,
            "classes": group.classes,
            "dtype": group.dtype_name,
            "malloc": malloc,
            "loss": loss,
            "provider": provider,
            "input_sets": sets,
            **timing.summary(),
            "over_copy": timing.median / copy,
            "over_copy_new": timing.median / copy_new,
        }
        if provider:
            passes = 2 if loss == "tf_nkd" else 3  # no teacher to read
            size = measure.modelled_bytes(group.rows, group.classes, group.dtype, passes)
            whole = measure.modelled_bytes(group.rows, group.classes, group.dtype)
            record["modelled_bytes"] = size
            record["modelled_gb_per_s"] = size / timing.median / 1e9
            record["share_of_copy_bandwidth"] = (size / timing.median) / (whole / copy)
            fused = timings.get((loss, "fused"))
            if fused is not None:
                record["over_fused"] = timing.median / fused.median
            kd = timings.get(("kd", provider))
            if kd is not None:
                record["over_kd"] = timing.median / kd.median
            record |= checks[loss, provider]
        out.append(record)
    return out


def judge(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Every target that this run has figures for: what it asks, what was measured, met or not."""
    out: list[dict[str, Any]] = []

    def add(what: str, measured: float, wanted: float, at_least: bool, malloc: str) -> None:
        out.append(
            {
                "case": where,
                "malloc": malloc,
                "what": what,
                "measured": measured,
                "target": f"{'>=' if at_least else '<='} {wanted:g}",
                "met": measured >= wanted if at_least else measured <= wanted,
            }
        )

    first = rows[0]["malloc"] if rows else ""
    for row in rows:
        shape = (row["rows"], row["classes"])
        where = f"{shape[0]}x{shape[1]} {row['dtype']}"
        name = NAMES.get(row["loss"], "")
        wanted = TARGETS.get(shape, {}).get((row["loss"], row["provider"]))
        if wanted is not None and row["dtype"] in ("float32", "bfloat16") and "over_fused" in row:
            what = f"{name}: {row['provider']} / fused"
            add(what, row["over_fused"], wanted, True, row["malloc"])
        if row["provider"] != "fused":
            continue
        if row["loss"] == "kd" and row["dtype"] == "float32" and TARGETS.get(shape) is _LARGE:
            add(f"{name}: fused / copy", row["over_copy"], KD_OVER_COPY, False, row["malloc"])
        if row["loss"] in ("dkd", "nkd", "aekt") and "over_kd" in row:
            add(f"{name} / KD, fused", row["over_kd"], OTHERS_OVER_KD, False, row["malloc"])
        if row["malloc"] == first:  # memory was measured once
            extra = (row["peak_bytes"] - row["gradient_bytes"] - BYTES_PER_CALL) / row["rows"]
            add(f"{name}: bytes/row over gradient", max(0.0, extra), BYTES_PER_ROW, False, "-")
    return out


def times_table(rows: Sequence[dict[str, Any]]) -> str:
    by_key = {(r["rows"], r["classes"], r["dtype"], r["loss"], r["provider"]): r for r in rows}
    lines: list[list[object]] = []
    line: list[object]
    for row in rows:
        place = (row["rows"], row["classes"], row["dtype"])
        case = f"{place[0]}x{place[1]} {place[2]}"
        if row["loss"] in (COPY, COPY_NEW):
            line = [case, row["loss"], spread(row)] + [None] * 4
            lines.append(
                [*line, number(row["over_copy"]), number(row["over_copy_new"]), None, None]
            )
        if row["provider"] != "fused":
            continue
        others = [by_key.get((*place, row["loss"], name)) for name in ("eager", "compile")]
        line = [case, NAMES[row["loss"]], spread(row)]
        line += [other and spread(other) for other in others]
        line += [other and number(other["over_fused"]) for other in others]
        line += [
            number(row["over_copy"]),
            number(row["over_copy_new"]),
            f"{100 * row['share_of_copy_bandwidth']:.0f} %",
        ]
        line += [number(row.get("over_kd"))]
        lines.append(line)
    header = ["case", "loss", "fused ms", "eager ms", "compile ms", "vs eager", "vs compile"]
    return measure.table([*header, "/ copy", "/ copy, new", "of copy bw", "/ KD"], lines)


def checks_table(rows: Sequence[dict[str, Any]]) -> str:
    lines = []
    for row in rows:
        if row["provider"]:
            resident = row["peak_resident_bytes"]
            lines.append(
                [
                    f"{row['rows']}x{row['classes']} {row['dtype']}",
                    NAMES[row["loss"]],
                    row["provider"],
                    number(row["peak_bytes"] / measure.MIB),
                    None if resident is None else number(resident / measure.MIB),
                    number(row["peak_bytes"] / row["gradient_bytes"]),
                    f"{row['loss_error']:.1e}",
                    f"{row['grad_error']:.1e}",
                ]
            )
    header = ["case", "loss", "provider", "peak MiB", "resident MiB", "/ gradient"]
    return measure.table([*header, "loss error", "grad error"], lines)


def targets_table(judged: Sequence[dict[str, Any]]) -> str:
    lines = [
        [
            target["case"],
            target["malloc"],
            target["what"],
            number(target["measured"]),
            target["target"],
            "pass" if target["met"] else "FAIL",
        ]
        for target in judged
    ]
    return measure.table(["case", "malloc", "what", "measured", "target", ""], lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="fewer cases, less time")
    parser.add_argument("--shapes", nargs="+", type=shape_of, help="such as 512x32000")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES)
    parser.add_argument("--losses", nargs="+", choices=LOSSES)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=list(PROVIDERS))
    parser.add_argument("--backend", default="cpu", help="kdkernels backend of 'fused'")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, help="timing per shape, dtype and malloc")
    parser.add_argument(
        "--malloc",
        nargs="+",
        choices=POLICIES,
        default=list(POLICIES),
        help="what the C library does with freed memory while timing",
    )
    parser.add_argument(
        "--sets",
        type=int,
        help="input sets to rotate through; 1 leaves small inputs in the cache, as after a matmul "
        "(default: as many as are 4 times the last-level cache)",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="default: bench/results/<CPU>")
    options = parser.parse_args(arguments)
    options.shapes = options.shapes or (QUICK_SHAPES if options.quick else SHAPES)
    options.losses = options.losses or (LOSSES[:3] if options.quick else LOSSES)
    options.dtypes = options.dtypes or (["float32"] if options.quick else ["float32", "bfloat16"])
    options.seconds = options.seconds or (4.0 if options.quick else 10.0)
    if options.out is None:
        options.out = results(measure.cpu_name())
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    glibc = measure.set_malloc_policy("return")
    groups = [
        Group(rows, classes, dtype, options.seed, measure.last_level_cache(), options.sets)
        for rows, classes in options.shapes
        for dtype in options.dtypes
    ]
    began = time.perf_counter()

    steps = len(groups) * len(options.losses) * len(options.providers)
    checked, failed = [], {}
    with tqdm(total=steps, desc="errors and memory", file=sys.stderr) as bar:
        for group in groups:
            found, lost = check(group, options.losses, options.providers, options.backend, bar)
            checked.append(found)
            failed |= lost
    if "fused" in failed:
        sys.exit(f"the {options.backend} backend cannot run: {failed['fused']}")
    providers = [name for name in options.providers if name not in failed]

    policies = [name for name in POLICIES if name in options.malloc] if glibc else ["system"]
    rows: list[dict[str, Any]] = []
    with timing_bar(len(policies) * len(groups) * options.seconds) as bar:
        for policy in policies:
            if glibc:
                measure.set_malloc_policy(policy)
            for group, found in zip(groups, checked, strict=True):
                timings, sets = clock(
                    group, options.losses, providers, options.backend, options.seconds, bar
                )
                rows += records(group, found, timings, sets, policy)

    judged = judge(rows)
    facts = measure.machine_facts() | {
        "kdkernels_backends": {name: str(state) for name, state in kdkernels.backends().items()},
        "temperature": TEMPERATURE,
        "wall_seconds": round(time.perf_counter() - began, 1),
        "providers_without_result": failed,
    }
    words = sys.argv[1:] if arguments is None else list(arguments)
    report = {
        "command": " ".join(["python -m bench.cpu", *words]),
        "facts": facts,
        "records": rows,
        "targets": judged,
    }
    print(
        f"{facts['cpu']} ({facts['torch_isa']}), {facts['threads']} threads, "
        f"torch {facts['torch']}, commit {facts['commit']}\n"
        "forward + backward; median [20th-80th percentile] of interleaved calls"
    )
    for policy in policies:
        print(f"\nmalloc: {policy}\n")
        print(times_table([row for row in rows if row["malloc"] == policy]))
    print("\nPeak memory of a call beyond its inputs, and errors against float64:\n")
    print(checks_table([row for row in rows if row["malloc"] == policies[0]]))
    met = sum(j["met"] for j in judged)
    print(f"\nTargets, for information: {met} of {len(judged)} met\n")
    print(targets_table(judged))
    for name, reason in failed.items():
        print(f"\nno result for {name}: {reason}")
    paths = write(options.out, "cpu", report)
    print("\nwritten: " + ", ".join(os.path.relpath(path) for path in paths))


if __name__ == "__main__":
    main()
