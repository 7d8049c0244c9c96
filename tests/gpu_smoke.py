"""A small call for every way in which a kernel can be launched, compared with float64.

    python tests/gpu_smoke.py                    all of them on the CUDA backend
    python tests/gpu_smoke.py --backend triton   or cpu, which rehearses it without a GPU
    python tests/gpu_smoke.py "cluster of 2"     those that are named

gpu_check.py runs this file in child processes that may hang, crash or lose the device, and under
compute-sanitizer. A case is made of calls one after the other: what the first of them leaves
behind, such as attributes of a kernel, is part of what is tried. Of every call both reductions are
taken, with KD and with DKD: the mean with its gradient in one sweep, and rows with a backward.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # an installed kdkernels comes first

import torch
from torch import Tensor

if not torch.cuda.is_available():  # before kdkernels is imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

import kdkernels
from bench.children import LINES, say
from bench.providers import PLAN, planned

# Of value or gradient: the largest error over the largest entry.
ALLOWED = {"bfloat16": 1e-2, "float16": 2e-3, "float32": 1e-4, "float64": 1e-9}


@dataclass(frozen=True)
class Call:
    regime: str  # of the CUDA backend on an H200
    rows: int
    classes: int
    student: str = "bfloat16"
    teacher: str = ""  # as the student
    layout: str = "dense"  # of those in `logits`
    plan: str = ""  # the planner's override
    shared: int = 0  # bytes of shared memory that a block of it needs, where not every GPU has them
    captured: bool = False  # in a CUDA graph


_SHORT = Call("cluster", 267, 8003)
CASES: dict[str, tuple[Call, ...]] = {
    "8 lanes": (Call("lanes", 300, 10),),
    "16 lanes": (Call("lanes", 33, 100),),
    "32 lanes": (Call("lanes", 9, 200, "float32"),),
    "8 lanes, many rows": (Call("lanes", 17_000, 100),),
    "rows counted first": (Call("lanes", 9000, 10, "float32"),),
    "block": (Call("block", 5, 1000),),
    "block in float32": (Call("block", 5, 4001, "float32"),),
    "strided": (Call("strided", 12, 37, "float32", layout="classes first"),),
    "sweeps of two types": (Call("sweeps", 135, 3000, "bfloat16", "float32"),),
    "sweeps in double": (Call("sweeps", 135, 2053, "float64"),),
    "sweeps, skewed": (Call("sweeps", 9, 3001, layout="skewed"),),
    "double and half, skewed": (Call("sweeps", 5, 1003, "float64", "float16", layout="skewed"),),
    "two types, skewed": (Call("cluster", 5, 16_391, "float32", "bfloat16", layout="skewed"),),
    "every other class": (Call("strided", 5, 1003, layout="every other class"),),
    "split in double": (Call("split", 2, 8201, "float64"),),
    "cluster of 1": (_SHORT,),
    "cluster of 1, two types": (Call("cluster", 267, 5003, "bfloat16", "float32"),),
    "cluster of 1 in float16": (Call("cluster", 267, 8003, "float16"),),
    "cluster of 2": (Call("cluster", 300, 32_000),),
    "cluster of 8": (Call("cluster", 40, 151_936),),
    "cluster of 8, skewed": (Call("cluster", 40, 151_669, layout="skewed"),),
    "cluster of 8 in float32": (Call("cluster", 40, 60_000, "float32"),),
    "cluster of 16 after cluster of 1": (_SHORT, Call("cluster", 20, 262_144)),
    "cluster of 16, few rows": (Call("cluster", 2, 128_256),),
    # A sanitizer's registers may leave no room for all the threads.
    "cluster of 16, half the threads": (Call("cluster", 20, 262_144, plan="threads=192"),),
    "split": (Call("split", 3, 5_000_003),),
    # What an H200 has clusters for.
    "staged, asked for": (Call("staged", 267, 8003, plan="regime=staged"),),
    "staged, long, asked for": (
        Call("staged", 135, 32_000, plan="regime=staged", shared=32_000 * 4 + (4 << 10)),
    ),
    "split, asked for": (Call("split", 40, 128_256, plan="regime=split"),),
    "sweeps, asked for": (Call("sweeps", 267, 8003, plan="regime=sweeps"),),
}
# In a process of its own: the module, the kernel and its share of shared memory are set up while a
# graph is captured.
FIRST = {"first call of a process, captured": (Call("cluster", 132, 20_011, captured=True),)}


def names(backend: str) -> list[str]:
    """What can be run in one process, in this order."""
    return [x for x, calls in CASES.items() if backend == "cuda" or not any(y.plan for y in calls)]


def first(backend: str) -> list[str]:
    """What takes a fresh one. Triton compiles in it, which no capture allows."""
    return [] if backend == "triton" else [*FIRST]


def logits(call: Call, dtype: str, device: str, generator: torch.Generator) -> Tensor:
    """Their memory ends with a whole granule, as all that an allocator hands out does.

    Kernels read granules whole where that cannot fault; a memory checker goes by what was asked.
    """
    rows, classes = call.rows, call.classes

    def dense(*shape: int) -> Tensor:
        count = math.prod(shape)
        store = torch.zeros(-(-count // 8) * 8, dtype=getattr(torch, dtype), device=device)
        return store[:count].normal_(0, 3, generator=generator).view(shape)

    if call.layout == "classes first":
        return dense(classes, rows).t()
    if call.layout == "every other class":
        return dense(rows, 2 * classes)[:, ::2]
    if call.layout == "skewed":  # rows begin between two granules
        return dense(rows, classes + 3)[:, 1:-2]
    return dense(rows, classes)


def results(student: Tensor, teacher: Tensor, target: Tensor, backend: str) -> list[Tensor]:
    out: list[Tensor] = []
    for loss in (kdkernels.kd_loss, kdkernels.dkd_loss, kdkernels.jsd_loss):
        for reduction in ("mean", "none"):
            leaf = student.detach().requires_grad_()
            value = loss(leaf, teacher, target, backend=backend, reduction=reduction)
            out += [value.detach(), *torch.autograd.grad(value.sum(), leaf)]
    return out


def error_of(call: Call, backend: str, device: str) -> float:
    generator = torch.Generator(device).manual_seed(0)
    student = logits(call, call.student, device, generator)
    teacher = logits(call, call.teacher or call.student, device, generator)
    target = torch.randint(call.classes, (call.rows,), device=device, generator=generator)
    target[1::7] = -100
    with planned(call.plan):
        if call.captured and device == "cuda":
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                ours = results(student, teacher, target, backend)
            for _ in range(2):
                graph.replay()
        else:
            ours = results(student, teacher, target, backend)
    truth = results(student.double(), teacher.double(), target, "reference")
    errors = [(x - y).abs().max() / y.abs().max() for x, y in zip(ours, truth, strict=True)]
    return torch.stack(errors).max().item()  # NaN if any of them is


def has_room(call: Call) -> bool:
    if not call.shared:
        return True
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return call.shared <= getattr(device, "shared_memory_per_block_optin", 0)


def attempt(name: str, backend: str, device: str, sanitized: bool = False) -> dict[str, Any]:
    begin = time.monotonic()
    out: dict[str, Any] = {}
    try:
        for call in (CASES | FIRST)[name]:
            error = error_of(call, backend, device)
            out["error"] = max(error, out.get("error", 0.0))
            if not error <= ALLOWED[call.student]:
                out["failed"] = f"wrong: {call.rows} x {call.classes}, error {error:.1e}"
        if device == "cuda":
            torch.cuda.synchronize()
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0][:300]
        # A plan that the device has room for is possible; a sanitizer takes registers for itself.
        known = PLAN in reason and not has_room(call)
        known |= sanitized and "too many resources requested" in reason
        out["skipped" if known else "failed"] = reason
        try:
            if device == "cuda":
                torch.cuda.synchronize()
        except Exception:  # an illegal access stays with the process
            out["lost"] = True
    return out | {"seconds": round(time.monotonic() - begin, 2)}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--backend", default="cuda", choices=["cuda", "triton", "cpu"])
    parser.add_argument("--sanitized", action="store_true", help="under compute-sanitizer")
    options = parser.parse_args()
    if unknown := [x for x in options.names if x not in CASES | FIRST]:
        parser.error(f"{', '.join(unknown)}; there are {', '.join(CASES | FIRST)}")
    device = "cuda" if options.backend != "cpu" and torch.cuda.is_available() else "cpu"
    torch.zeros(1, device=device)
    say(ready=True)
    failed = 0 if LINES in os.environ else 1  # a child has said what failed; its end is no news
    status = 0
    for name in options.names or names(options.backend):
        line = attempt(name, options.backend, device, options.sanitized)
        print(name, line, flush=True)
        say(name=name, **line)
        if "failed" in line:
            status = failed
        if line.get("lost"):
            os._exit(status)  # what would be cleaned up is on the device
    return status


if __name__ == "__main__":
    sys.exit(main())
