"""Whether two builds compute the same bits: what a change of the kernels that should change nothing
is held to.

    python tests/same_bits.py dump FILE          in each checkout, its extension built in place
    python tests/same_bits.py compare A B        what both know; ends with 1 where they differ

Every loss with all its tested options, of one row and many, in every regime and instruction set of
the CPU; with --emulated also of the CUDA kernels, and with --triton of Triton's in the interpreter.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
from cases import BF16, CASES, F16, F32, F64, ISAS, LAYOUTS, Case, make_inputs  # noqa: E402

PAIRS = [(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16), (F16, F64)]
SHAPES = [((5, 1), 1), ((40, 1), 7), ((35, 1), 33), ((70, 1), 100), ((9, 1), 1000), ((3, 1), 5003)]
APART = [((3, 7), 33), ((2, 3), 5003)]  # with the classes in the middle
# CUDA's regimes, as tests force them.
FORCED: list[dict[str, Any]] = [
    {"regime": "block"},
    {"regime": "sweeps"},
    {"regime": "split", "parts": 3},
    {"regime": "staged"},
    {"regime": "cluster", "parts": 2, "threads": 64, "clusters": 2, "stages": 2},
]


def calls(backend: str) -> Iterator[tuple[str, Case, str, tuple[Any, ...], str]]:
    """Name, case, layout, inputs and their dimension of classes."""
    shapes = [(x, "contiguous") for x in SHAPES] + [(x, "classes_second") for x in APART]
    if backend != "cpu":
        shapes = [x for x in shapes if x[0][1] in (1, 33, 1000)]
    for case, pair, (shape, layout), kind in itertools.product(
        CASES, PAIRS, shapes, ("normal", "masked")
    ):
        if backend != "cpu" and (pair[0] != pair[1] or kind != "normal"):
            continue
        rows, classes = shape
        inputs = make_inputs(kind, rows, classes, pair, ignored=0.2)
        name = f"{backend} {case} {pair} {rows} {classes} {layout} {kind}"
        yield name, case, layout, inputs, kind


def digest(*tensors: torch.Tensor) -> str:
    found = hashlib.sha1()
    for x in tensors:
        found.update(x.detach().flatten().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def attempt(compute: Callable[[], list[torch.Tensor]]) -> list[torch.Tensor]:
    """Nothing where a regime does not take this pass, as from statistics to the gradient."""
    try:
        return compute()
    except RuntimeError:
        return []


def results(case: Case, layout: str, inputs: tuple[Any, ...], backend: str) -> str:
    student, teacher, target = inputs
    s, dim = LAYOUTS[layout](student)
    t, _ = LAYOUTS[layout](teacher)
    s = s.detach().requires_grad_()
    options = {"dim": dim, "backend": backend}
    found = [digest(*attempt(lambda: [case.rows(s, t, target, **options)]))]

    def of_rows() -> list[torch.Tensor]:
        rows = case.rows(s, t, target, **options)
        upstream = torch.linspace(-2, 3, rows.numel(), dtype=rows.dtype).view(rows.shape)
        return list(torch.autograd.grad(rows, s, upstream))

    def reduced() -> list[torch.Tensor]:
        mean = case(s, t, target, **options)
        return [mean, *torch.autograd.grad(mean, s)]

    found.append(digest(*attempt(of_rows)))
    if case.outputs == 1:
        found.append(digest(*attempt(reduced)))
    return " ".join(found)


def dump(backends: list[str]) -> dict[str, str]:
    found = {}
    for backend in backends:
        real = {"emulated": "cuda"}.get(backend, backend)
        for isa in ISAS if backend == "cpu" else [""]:
            os.environ["KDKERNELS_CPU_ISA"] = isa
            for name, case, layout, inputs, _ in calls(backend):
                for forced in [{}, *FORCED] if backend == "emulated" else [{}]:
                    with ExitStack() as stack:
                        if backend == "emulated":
                            from emulated import emulate

                            stack.enter_context(emulate(**forced))
                        else:
                            stack.enter_context(nullcontext())
                        value = results(case, layout, inputs, real)
                    found[f"{name} {isa} {forced}"] = value
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    of_dump = commands.add_parser("dump")
    of_dump.add_argument("file", type=Path)
    of_dump.add_argument("--emulated", action="store_true")
    of_dump.add_argument("--triton", action="store_true")
    of_compare = commands.add_parser("compare")
    of_compare.add_argument("files", type=Path, nargs=2)
    chosen = parser.parse_args()
    if chosen.command == "dump":
        backends = ["cpu"] + ["emulated"] * chosen.emulated + ["triton"] * chosen.triton
        found = dump(backends)
        chosen.file.write_text(json.dumps(found))
        empty = sum(digest() in x.split() for x in found.values())
        print(f"{len(found)} results, {empty} with a pass that was refused")
        return 0
    a, b = (json.loads(x.read_text()) for x in chosen.files)
    both = a.keys() & b.keys()
    different = sorted(x for x in both if a[x] != b[x])
    print(f"{len(both)} in both, {len(different)} differ")
    print(*different[:20], sep="\n")
    return int(bool(different) or not both)


if __name__ == "__main__":
    raise SystemExit(main())
