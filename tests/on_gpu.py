"""What the tests on a CUDA device share: the backends, inputs that lie on the device, shapes that
reach each of the kernels, and the comparison with the reference.

The truth is the reference in float64, computed on the CPU from the same inputs, and the tolerances
are those of the CPU kernels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from cases import (
    BF16,
    F32,
    F64,
    IGNORED,
    LAYOUTS,
    USUAL,
    Case,
    assert_same,
    assert_within,
    evaluate,
    gradient_tolerance,
    loss_dtype,
    make_inputs,
    value_tolerance,
)
from contracts import divisor
from torch import Tensor

import kdkernels
from kdkernels.backend import _DEVICE

MARKS = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),  # torch's own
]

DEVICE = "cuda"
BACKENDS = ("cuda", "triton")
KD, DKD = USUAL["kd"], USUAL["dkd"]
SPLIT = (2, 20011)  # fewer rows than multiprocessors, longer than a program can hold


def why_not(backend: str) -> str | None:
    """Why a backend cannot be tested here, or None."""
    state = kdkernels.backends()[backend]
    if not state.available:
        return f"{backend}: {state.reason}"
    return None if _DEVICE[backend] == DEVICE else f"{backend} runs on {_DEVICE[backend]} tensors"


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, record_property: Callable[..., None]) -> str:
    record_property("backend", request.param)  # gpu_check.py groups by it
    if reason := why_not(request.param):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def cuda_backend(record_property: Callable[..., None]) -> str:
    """For what holds of the CUDA backend alone."""
    record_property("backend", "cuda")
    if reason := why_not("cuda"):
        pytest.skip(reason)
    return "cuda"


def on_device(x: Tensor | None, device: str | torch.device | None = None) -> Tensor | None:
    """The tensor on the device with its very strides, and as far from an aligned address.

    Its memory ends with a whole granule (of the narrower logits: 8 elements), as all that an
    allocator hands out does: the Triton kernels read granules whole, and a memory checker goes by
    the size that was asked for. What is behind the end is written, for initcheck goes by that,
    and NaN, for it must not count. The CUDA kernels read nothing there.
    """
    if x is None:
        return None
    whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    beyond = math.nan if x.is_floating_point() else IGNORED
    padded = whole.new_full((-(-whole.numel() // 8) * 8,), beyond, device=device or DEVICE)
    whole = padded[: whole.numel()].copy_(whole)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def inputs_on_device(*arguments, **options) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(on_device(x) for x in make_inputs(*arguments, **options))


def calls_of(case: Case) -> list[Callable[..., Tensor]]:
    """Forward and backward, and both in one sweep."""
    return [case.rows] if case.outputs > 1 else [case.rows, case]


def assert_same_results(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], what="") -> None:
    for x, y, name in zip(ours, theirs, ("value", "gradient"), strict=True):
        assert_same(x.cpu(), y.cpu(), f"{name} {what}")


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


def cached_rows(classes: int, itemsize: int) -> int:
    """Rows of student and teacher that fill 0.45 of the L2 cache: a wave, where they are long."""
    cache = torch.cuda.get_device_properties(DEVICE).L2_cache_size
    return max(1, cache * 45 // 100 // (2 * classes * itemsize))


def has_clusters() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(DEVICE)[0] >= 9


@dataclass(frozen=True)
class Shape:
    """Logits that one kernel of the CUDA backend takes on any GPU: see csrc/cuda/plan.h.

    With clusters that is theirs where it would otherwise be one for long rows, unless in double.
    """

    kernel: str  # of the pass forward, with or without gradient
    classes: int
    dtypes: torch.dtype | tuple[torch.dtype, torch.dtype]
    rows: int
    rows_per_multiprocessor: int = 0  # on top, that a block takes more than one
    layout: str = "contiguous"  # of the student; a teacher follows where classes are apart

    def __post_init__(self) -> None:
        long = self.kernel == "staged" or self.classes > 4096
        if long and self.kernel in ("staged", "sweeps", "split_stats") and self.dtypes != F64:
            object.__setattr__(self, "kernel", "cluster" if has_clusters() else self.kernel)

    def inputs(
        self, kind: str, generator: torch.Generator, ignored: float = 0.0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Student, teacher and target on the CPU, class-last views."""
        rows = self.rows + self.rows_per_multiprocessor * multiprocessors()
        shape = (rows,) if self.layout == "contiguous" else (3, -(-rows // 3))
        *logits, target = make_inputs(kind, shape, self.classes, self.dtypes, generator, ignored)
        other = self.layout if self.layout == "classes_second" else "contiguous"
        views = [LAYOUTS[x](y) for x, y in zip((self.layout, other), logits, strict=True)]
        student, teacher = (view.movedim(dim, -1) for view, dim in views)
        return student, teacher, target

    @property
    def backward(self) -> str:
        return self.kernel if self.kernel in ("lanes", "block", "strided") else "split_gradient"

    def mean(self, rows: int) -> list[str]:
        """The kernels of a mean over so many rows: more than 32 per thread are counted first."""
        parts = self.kernel == "split_stats"
        counted = parts or (self.kernel == "lanes" and rows > 32 * 256)
        own = [self.kernel, "split_gradient"] if parts else [self.kernel]
        return ["count", *own] if counted else own


# Together every kernel of both backends. Triton walks rows of float64 in chunks from 2049 classes
# on, and splits those of few rows. No float16: there the gradient of a reduction is two passes,
# too, see test_backward_in_float16.
REGIMES = {
    "8 lanes": Shape("lanes", 10, BF16, 300),
    "16 lanes": Shape("lanes", 100, BF16, 33),
    "32 lanes": Shape("lanes", 200, F32, 9),
    "8 lanes, many rows": Shape("lanes", 100, BF16, 1, 128),
    "16 lanes, many rows": Shape("lanes", 200, BF16, 1, 128),
    "block of a warp": Shape("block", 1000, BF16, 5),
    "block": Shape("block", 4001, BF16, 5),
    "staged": Shape("staged", 8003, BF16, 3, 2),
    "sweeps of two types": Shape("sweeps", 3000, (BF16, F32), 3, 1),
    "sweeps in double": Shape("sweeps", 2053, F64, 3, 1),
    "sweeps, unaligned": Shape("sweeps", 3001, BF16, 6, layout="unaligned"),
    "split": Shape("split_stats", 16391, BF16, 2),
    "split in double": Shape("split_stats", 8201, F64, 2),
    "strided": Shape("strided", 37, F32, 12, layout="classes_second"),
    "1003 classes": Shape("block", 1003, F32, 300),
    "staged twice": Shape("staged", 10007, BF16, 3, 2),
    "staged twice in float32": Shape("staged", 10007, F32, 3, 2),
    "staged, large": Shape("staged", 20011, BF16, 3, 1),
    "staged, large, float32": Shape("staged", 20011, F32, 3, 1),  # 160 kB: not on all GPUs
    "unlike rows, many": Shape("sweeps", 8001, BF16, 3, 1, layout="unaligned"),
    "unlike rows, few": Shape("split_stats", 50257, BF16, 3, layout="next_token"),
    "split in float32": Shape("split_stats", 50257, F32, 2),
    "split, two types": Shape("split_stats", 50257, (BF16, F32), 2),
    "cluster of 8": Shape("split_stats", 151936, BF16, 40),
    "cluster of 8, unaligned": Shape("split_stats", 151669, BF16, 40),
    "cluster of 16": Shape("split_stats", 262144, BF16, 20),
    "images": Shape("strided", 150, BF16, 3, 1, layout="classes_second"),
}


def check(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    generator: torch.Generator,
    backend: str,
    reduction: str = "none",
    normalizer: float | None = None,
) -> None:
    """Inputs are on the CPU and go to the device as they lie; random upstream and row weights."""
    dtype = loss_dtype(student, teacher if case.teacher else None)
    shape = student.shape[:-1]
    scalar = reduction != "none"
    outputs = () if case.outputs == 1 else (case.outputs,)
    upstream = torch.randn(() if scalar else outputs + shape, generator=generator).to(dtype)
    weight, common = torch.ones(shape), {}
    if case.outputs == 1:
        weight = common["row_weight"] = 0.1 + 2 * torch.rand(shape, generator=generator)
    call = case if scalar else case.rows
    per_row = weight.double()
    if scalar:
        common |= {"reduction": reduction, "normalizer": normalizer}
        counted = torch.zeros(shape, dtype=torch.long) if target is None else target
        per_row = per_row / divisor(reduction, counted, normalizer)

    exact = (student.double(), teacher.double(), target)
    rows, truth_gradient = evaluate(case.rows, *exact, upstream * per_row, backend="reference")
    inputs = (student, teacher, target)
    eager, eager_gradient = evaluate(call, *inputs, upstream, backend="reference", **common)
    truth = rows * per_row
    tolerance = per_row * value_tolerance(case, rows, student, teacher, dtype)
    allowed = gradient_tolerance(
        case, truth_gradient, student, teacher, target, upstream * per_row, dtype
    )
    if scalar:
        truth, tolerance = truth.sum(), tolerance.sum()
        # Rounded once in the sweep, and again when the upstream gradient has multiplied it.
        allowed += 0.51 * torch.finfo(student.dtype).eps * truth_gradient.abs()

    placed = [on_device(x) for x in inputs]
    if "row_weight" in common:
        common["row_weight"] = on_device(weight)
    ours, gradient = evaluate(call, *placed, on_device(upstream), backend=backend, **common)
    assert ours.device == gradient.device == placed[0].device
    assert ours.dtype == dtype and gradient.dtype == student.dtype
    assert gradient.stride() == torch.empty_like(placed[0]).stride()
    assert_within(ours.cpu(), truth, eager, tolerance, "value")
    assert_within(gradient.cpu(), truth_gradient, eager_gradient, allowed, "gradient")


def check_sampled_rows(case: Case, backend: str, rows: int, classes: int) -> None:
    across = min(2**31 // classes, rows - 1)
    picked = sorted({0, across - 1, across, min(across + 1, rows - 1), rows - 2, rows - 1})
    generator = torch.Generator(DEVICE).manual_seed(0)
    student, teacher = (
        torch.empty((rows, classes), dtype=BF16, device=DEVICE).normal_(0, 3, generator=generator)
        for _ in range(2)
    )
    target = torch.randint(classes, (rows,), device=DEVICE, generator=generator)
    upstream = torch.randn(rows, device=DEVICE, generator=generator)
    few = [x[picked].cpu() for x in (student, teacher, target)]
    rows_sum = rows_size = 0.0
    for call in calls_of(case):  # rows come first
        scalar = call is case
        common = {"reduction": "sum"} if scalar else {}
        given = upstream.new_ones(()) if scalar else upstream
        value, gradient = evaluate(call, student, teacher, target, given, backend=backend, **common)
        chosen = torch.ones(len(picked)) if scalar else upstream[picked].cpu()
        exact = (few[0].double(), few[1].double(), few[2])
        truth, truth_gradient = evaluate(case.rows, *exact, chosen, backend="reference")
        eager, eager_gradient = evaluate(case.rows, *few, chosen, backend="reference")
        if not scalar:
            allowed = value_tolerance(case, truth, *few[:2], F32)
            assert_within(value[picked].cpu(), truth, eager, allowed, "value")
            rows_sum, rows_size = value.double().sum().item(), value.double().abs().sum().item()
        else:
            assert abs(value.item() - rows_sum) <= 1e-5 * rows_size
        assert value.isfinite().all()
        allowed = gradient_tolerance(case, truth_gradient, *few, chosen, F32)
        allowed += 0.51 * torch.finfo(BF16).eps * truth_gradient.abs()
        ours = gradient[picked].cpu()
        assert_within(ours, truth_gradient, eager_gradient, allowed, "gradient")
        del gradient


def kernels_in(trace: dict[str, Any]) -> list[str]:
    """The names of a profiler's trace, in the order of time: no copies, no ranges that it draws."""
    kernels = [x for x in trace["traceEvents"] if x.get("cat") == "kernel"]
    return [x["name"] for x in sorted(kernels, key=lambda x: x["ts"])]


def our_kernels(names: list[str]) -> list[str]:
    """`lanes` of `void kd::..::cuda::lanes<..>(..)`; what is not ours stays as it is."""
    found = [re.search(r"\bkd::\w+::cuda::(?:\(anonymous namespace\)::)?(\w+)", x) for x in names]
    return [x if match is None else match[1] for x, match in zip(names, found, strict=True)]
