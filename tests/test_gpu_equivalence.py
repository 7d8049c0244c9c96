"""The GPU backends on a CUDA device: the equivalence grid, and what only a device can show.

The truth is the reference in float64, computed on the CPU from the same inputs, and the tolerances
are those of the CPU kernels. As in test_equivalence.py the grids are pairwise. Types are picked so
that cases which differ in numbers alone share a kernel: compiling is what takes time here.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import (
    BF16,
    CASES,
    DTYPE_PAIRS,
    DTYPES,
    F16,
    F32,
    F64,
    IGNORED,
    LAYOUTS,
    LOSSES,
    MAIN_CASES,
    MAIN_SCALARS,
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
from contracts import KINDS, REDUCTIONS, divisor
from grid import pairwise
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kdkernels
from kdkernels.backend import _DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),  # torch's own
]

DEVICE = "cuda"
BACKENDS = ("cuda", "triton")
KD, DKD = USUAL["kd"], USUAL["dkd"]
SMALL = (1, 2, 3, 31, 32, 33, 100, 1000, 1003, 4099)
# The end of resident rows of 16-bit logits and one beyond it, and real vocabularies.
LARGE = (16384, 16385, 32000, 50257)
LARGEST = (128256, 151669)
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
        if long and self.kernel in ("staged", "sweeps", "part_stats") and self.dtypes != F64:
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
        return self.kernel if self.kernel in ("few", "block", "strided") else "part_gradient"

    def mean(self, rows: int) -> list[str]:
        """The kernels of a mean over so many rows: more than 32 per thread are counted first."""
        parts = self.kernel == "part_stats"
        counted = parts or (self.kernel == "few" and rows > 32 * 256)
        own = [self.kernel, "part_gradient"] if parts else [self.kernel]
        return ["count", *own] if counted else own


# Together every kernel of both backends. Triton walks rows of float64 in chunks from 2049 classes
# on, and splits those of few rows. No float16: there the gradient of a reduction is two passes,
# too, see test_backward_in_float16.
REGIMES = {
    "8 lanes": Shape("few", 10, BF16, 300),
    "16 lanes": Shape("few", 100, BF16, 33),
    "32 lanes": Shape("few", 200, F32, 9),
    "8 lanes, many rows": Shape("few", 100, BF16, 1, 128),
    "16 lanes, many rows": Shape("few", 200, BF16, 1, 128),
    "block of a warp": Shape("block", 1000, BF16, 5),
    "block": Shape("block", 4001, BF16, 5),
    "staged": Shape("staged", 8003, BF16, 3, 2),
    "sweeps of two types": Shape("sweeps", 3000, (BF16, F32), 3, 1),
    "sweeps in double": Shape("sweeps", 2053, F64, 3, 1),
    "sweeps, unaligned": Shape("sweeps", 3001, BF16, 6, layout="unaligned"),
    "split": Shape("part_stats", 16391, BF16, 2),
    "split in double": Shape("part_stats", 8201, F64, 2),
    "strided": Shape("strided", 37, F32, 12, layout="classes_second"),
    "1003 classes": Shape("block", 1003, F32, 300),
    "staged twice": Shape("staged", 10007, BF16, 3, 2),
    "staged twice in float32": Shape("staged", 10007, F32, 3, 2),
    "staged, large": Shape("staged", 20011, BF16, 3, 1),
    "staged, large, float32": Shape("staged", 20011, F32, 3, 1),  # 160 kB: not on all GPUs
    "unlike rows, many": Shape("sweeps", 8001, BF16, 3, 1, layout="unaligned"),
    "unlike rows, few": Shape("part_stats", 50257, BF16, 3, layout="next_token"),
    "split in float32": Shape("part_stats", 50257, F32, 2),
    "split, two types": Shape("part_stats", 50257, (BF16, F32), 2),
    "cluster of 8": Shape("part_stats", 151936, BF16, 40),
    "cluster of 8, unaligned": Shape("part_stats", 151669, BF16, 40),
    "cluster of 16": Shape("part_stats", 262144, BF16, 20),
    "images": Shape("strided", 150, BF16, 3, 1, layout="classes_second"),
}


# ---- equivalence ----------------------------------------------------------------------------


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


def dtypes_of(case: Case, classes: int) -> tuple[torch.dtype, torch.dtype]:
    """By the loss and not its options, which share what Triton has to compile."""
    sizes = (*SMALL, *LARGE, *LARGEST)
    return DTYPE_PAIRS[(3 * [*LOSSES].index(case.loss) + sizes.index(classes)) % len(DTYPE_PAIRS)]


@pairwise(case=CASES, classes=SMALL, kind=KINDS, rows=[1, 7, 33], ignored=[0.0, 0.1])
def test_shapes(
    case: Case, classes: int, kind: str, rows: int, ignored: float, backend: str,
    generator: torch.Generator,
) -> None:  # fmt: skip
    dtypes = dtypes_of(case, classes)
    inputs = make_inputs(kind, rows, classes, dtypes, generator, ignored=ignored)
    check(case, *inputs, generator, backend)


@pairwise(case=CASES, classes=[*LARGE, *LARGEST], kind=KINDS)
def test_large_vocabularies(
    case: Case, classes: int, kind: str, backend: str, generator: torch.Generator
) -> None:
    dtypes = dtypes_of(case, classes)
    if classes in LARGEST and F64 in dtypes:
        kind = (
            "normal"  # so many equal terms the truth, in float64 too, adds up no better than ours
        )
    check(case, *make_inputs(kind, 2, classes, dtypes, generator), generator, backend)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_dtypes(
    case: Case,
    dtypes: tuple[torch.dtype, torch.dtype],
    backend: str,
    generator: torch.Generator,
) -> None:
    for rows, classes in ((7, 100), SPLIT):
        inputs = make_inputs("masked", rows, classes, dtypes, generator, ignored=0.1)
        check(case, *inputs, generator, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_more_long_rows_than_multiprocessors(
    case: Case, dtype: torch.dtype, backend: str, generator: torch.Generator
) -> None:
    """Persistent programs: some take two rows."""
    inputs = make_inputs("normal", multiprocessors() + 3, 16411, dtype, generator, ignored=0.1)
    check(case, *inputs, generator, backend)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_kinds_of_logits(case: Case, kind: str, backend: str, generator: torch.Generator) -> None:
    for rows, classes in ((7, 100), SPLIT):
        inputs = make_inputs(kind, rows, classes, F32, generator, ignored=0.1)
        check(case, *inputs, generator, backend)


@pairwise(
    student_layout=[*LAYOUTS], teacher_layout=["the same", "contiguous"], case=MAIN_CASES,
    classes=[37, 1003, 16391, 50257],
)  # fmt: skip
def test_layouts(
    student_layout: str, teacher_layout: str, case: Case, classes: int, backend: str,
    generator: torch.Generator,
) -> None:  # fmt: skip
    if teacher_layout == "the same":
        teacher_layout = student_layout
    dtypes = (BF16, F32) if teacher_layout != student_layout else (BF16, BF16)
    dense = make_inputs("normal", (3, 6), classes, dtypes, generator, ignored=0.1)
    views = []
    for layout, x in zip((student_layout, teacher_layout), dense[:2], strict=True):
        view, dim = LAYOUTS[layout](x)
        views.append(view.movedim(dim, -1))
    check(case, *views, dense[2], generator, backend)


@pytest.mark.parametrize(
    ("reduction", "normalizer"),
    REDUCTIONS,
)
@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_reductions(
    case: Case,
    reduction: str,
    normalizer: float | None,
    backend: str,
    generator: torch.Generator,
) -> None:
    for dtype in (F32, BF16, F16):
        for rows, classes in ((33, 100), SPLIT):
            inputs = make_inputs("normal", rows, classes, dtype, generator, ignored=0.2)
            check(case, *inputs, generator, backend, reduction, normalizer)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_target(reduction: str, backend: str, generator: torch.Generator) -> None:
    for rows, classes in ((33, 100), SPLIT):
        student, teacher, _ = make_inputs("normal", rows, classes, BF16, generator)
        check(KD, student, teacher, None, generator, backend, reduction)


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_a_normalizer_on_the_device(case: Case, backend: str) -> None:
    inputs = inputs_on_device("normal", 33, 100)
    number, tensor = (
        evaluate(case, *inputs, backend=backend, normalizer=x)
        for x in (4.0, torch.tensor(4.0, device=inputs[0].device))
    )
    assert_same_results(number, tensor)


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_no_rows(case: Case, backend: str) -> None:
    for call in calls_of(case):
        value, gradient = evaluate(call, *inputs_on_device("normal", 0, 100), backend=backend)
        assert not value.any() and gradient.shape == (0, 100)


@pytest.mark.parametrize("classes", [33, 1003, 16391])
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_accesses_stay_inside_the_tensors(
    case: Case, classes: int, backend: str, generator: torch.Generator
) -> None:
    """Odd shapes, rows at odd addresses. It takes compute-sanitizer to see every stray access, in
    gpu_smoke.py."""
    student, teacher, target = make_inputs("normal", 5, classes, BF16, generator, ignored=0.2)
    check(case, student, teacher, target, generator, backend)
    for layout in ("unaligned", "every_other_class"):
        views = [LAYOUTS[layout](x[None])[0] for x in (student, teacher)]
        check(case, *views, target[None], generator, backend)
    if case.outputs == 1:
        check(case, student, teacher, target, generator, backend, "mean")
    # Elements of two sizes have granules of two lengths; 16 bytes from where the larger ones begin.
    for wide, narrow in ((F32, BF16), (BF16, F32), (F64, F16)):
        inputs = make_inputs("normal", 5, classes, (wide, narrow), generator)
        moved = [torch.cat([x.new_zeros(16 // x.itemsize), x.flatten()]) for x in inputs[:2]]
        student, teacher = (
            x[16 // x.itemsize :].view_as(y) for x, y in zip(moved, inputs[:2], strict=True)
        )
        check(case, student, teacher, inputs[2], generator, backend)


@pairwise(case=MAIN_CASES, regime=[*REGIMES], kind=KINDS, reduction=["mean", "sum"])
def test_regimes(
    case: Case, regime: str, kind: str, reduction: str, backend: str, generator: torch.Generator
) -> None:
    """Forward and backward under a random upstream gradient, and both at once."""
    inputs = REGIMES[regime].inputs(kind, generator, ignored=0.1)
    check(case, *inputs, generator, backend)
    if case.outputs == 1:
        check(case, *inputs, generator, backend, reduction)


@pytest.mark.parametrize("shape", [(300, 10), (33, 1003), (7, 8003), (2, 20011)], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_backward_in_float16(
    case: Case, shape: tuple[int, int], backend: str, generator: torch.Generator
) -> None:
    check(case, *make_inputs("normal", *shape, F16, generator, ignored=0.1), generator, backend)


@pytest.mark.parametrize(
    "shape",
    [(33, 100), (5, 3001), (2, 50257), pytest.param((2, 151669), marks=pytest.mark.full)],
    ids=str,
)
@pytest.mark.parametrize("case", [case for case in MAIN_CASES if case.teacher], ids=str)
def test_a_teacher_with_a_padded_vocabulary(
    case: Case, shape: tuple[int, int], backend: str, generator: torch.Generator
) -> None:
    """`wide[:, :classes]`, whose padding is NaN: rows of another stride than the student's."""
    rows, classes = shape
    student, teacher, target = make_inputs("normal", rows, classes, BF16, generator, ignored=0.1)
    wide = torch.full((rows, -(-classes // 64) * 64 + 64), math.nan, dtype=BF16)
    teacher = wide[:, :classes].copy_(teacher)
    check(case, student, teacher, target, generator, backend)
    if case.outputs == 1:
        check(case, student, teacher, target, generator, backend, "mean")


@pytest.mark.parametrize("classes", [50257, 151669])
@pytest.mark.parametrize("case", [KD, DKD], ids=str)
def test_long_rows_in_several_waves(case: Case, classes: int, backend: str) -> None:
    """More rows than the L2 cache keeps between two reads."""
    check_sampled_rows(case, backend, 2 * cached_rows(classes, BF16.itemsize) + 3, classes)


@pytest.mark.parametrize("shape", [(8193, 10), (20_011, 100), (8200, 1003), (600_001, 3)], ids=str)
@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_mean_over_more_rows_than_a_block_counts(
    case: Case, shape: tuple[int, int], backend: str, generator: torch.Generator
) -> None:
    inputs = make_inputs("normal", *shape, F32, generator, ignored=0.2)
    check(case, *inputs, generator, backend, "mean")


def test_more_rows_than_some_dimensions_of_a_grid_take(backend: str) -> None:
    rows, classes = 65_537, 513
    student, teacher = (torch.randn(rows, classes, device=DEVICE, dtype=BF16) for _ in range(2))
    picked = [0, 1, rows - 2, rows - 1]
    few = [x[picked].cpu() for x in (student, teacher)]
    _, gradient = evaluate(KD.rows, student, teacher, None, backend=backend)
    _, truth = evaluate(KD.rows, few[0].double(), few[1].double(), None, backend="reference")
    torch.testing.assert_close(gradient[picked].double().cpu(), truth, rtol=1e-2, atol=1e-4)


# ---- what must not reach other rows -----------------------------------------------------------


# Where rows share a mean over those that are not NaN, a row that becomes NaN changes the others.
INDEPENDENT = [case.apart for case in MAIN_CASES]


@pytest.mark.parametrize("shape", [(33, 100), (5, 20011)], ids=str)
@pytest.mark.parametrize("case", INDEPENDENT, ids=str)
def test_a_target_out_of_range_makes_its_row_nan_and_changes_no_other(
    case: Case, shape: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KDKERNELS_CHECK", raising=False)
    student, teacher, target = inputs_on_device("normal", *shape)
    value, gradient = evaluate(case.rows, student, teacher, target, backend=backend)
    others = torch.arange(shape[0], device=target.device) != 2
    for wrong in (shape[1], -1, 2**40, -(2**40)):
        bad = target.clone()
        bad[2] = wrong
        bad_value, bad_gradient = evaluate(case.rows, student, teacher, bad, backend=backend)
        assert bad_value[..., 2].isnan().all()
        assert_same_results(
            (bad_value[..., others], bad_gradient[others]), (value[..., others], gradient[others])
        )


def test_a_target_out_of_range_is_refused_when_asked_for(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDKERNELS_CHECK", "1")
    student, teacher, target = inputs_on_device("normal", 5, 33)
    kdkernels.dkd_loss(student, teacher, target, backend=backend)
    target[2] = 33
    with pytest.raises(ValueError, match="target: got class 33; must be from 0 to 32"):
        kdkernels.dkd_loss(student, teacher, target, backend=backend)


@pytest.mark.parametrize("shape", [(33, 100), (5, 20011)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_ignored_rows_are_not_read(case: Case, shape: tuple[int, int], backend: str) -> None:
    student, teacher, target = inputs_on_device("normal", *shape, BF16, ignored=0.2)
    ignored = target == IGNORED
    assert ignored.any()
    for call in calls_of(case):
        clean = evaluate(call, student, teacher, target, backend=backend)
        assert clean[1].isfinite().all() and not clean[1][ignored].any()
        dirty = [x.masked_fill(ignored[:, None], math.nan) for x in (student, teacher)]
        assert_same_results(evaluate(call, *dirty, target, backend=backend), clean)


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_all_rows_ignored(case: Case, backend: str) -> None:
    student, teacher, target = inputs_on_device("normal", 7, 100)
    value, gradient = evaluate(case, student, teacher, torch.full_like(target, IGNORED),
                               backend=backend)  # fmt: skip
    assert value == 0 and not gradient.any()


# ---- the same bits ----------------------------------------------------------------------------


@contextmanager
def busy_device() -> Iterator[None]:
    """Matrices are multiplied on another stream meanwhile, for some 50 ms or more."""
    x = torch.randn(2048, 2048, device=DEVICE)
    out = torch.empty_like(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(300):
            torch.mm(x, x, out=out)
    yield
    stream.synchronize()  # x and out may go


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_same_bits_every_time(
    case: Case, busy: bool, backend: str, generator: torch.Generator
) -> None:
    many = multiprocessors() + 3
    for rows, classes in ((3000, 33), (300, 1003), SPLIT, (many, 10007), (many, 16411)):
        inputs = inputs_on_device("normal", rows, classes, F32, generator, ignored=0.1)
        for call in calls_of(case):
            first = evaluate(call, *inputs, backend=backend)
            with busy_device() if busy else nullcontext():
                later = [evaluate(call, *inputs, backend=backend) for _ in range(20)]
            for value, gradient in later:  # compared on the device
                assert_same(value, first[0])
                assert_same(gradient, first[1])


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_loss_without_gradient_is_the_same(case: Case, backend: str) -> None:
    for rows, classes in ((33, 100), SPLIT):
        inputs = inputs_on_device("normal", rows, classes)
        with_gradient, _ = evaluate(case, *inputs, backend=backend)
        assert_same(case(*inputs, backend=backend).cpu(), with_gradient.cpu())


# ---- streams, graphs, devices -----------------------------------------------------------------


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_work_goes_to_the_current_stream(case: Case, backend: str) -> None:
    """The inputs arrive late on that stream: work on another one would read what was there."""
    inputs = inputs_on_device("normal", 33, 1003, ignored=0.2)
    for call in calls_of(case):
        expected = evaluate(call, *inputs, backend=backend)  # compiles, too
        late = [torch.zeros_like(x) for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)
            ours = evaluate(call, *late, backend=backend)
        stream.synchronize()
        assert_same_results(ours, expected)


def captured(
    call: Callable[..., Tensor], static: tuple[Tensor, ...], backend: str
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
    """A graph of value and gradient, and where it leaves them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        evaluate(call, *static, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = evaluate(call, *static, backend=backend)
    return graph, results


@pytest.mark.parametrize("shape", [(300, 100), (33, 1003), "staged", SPLIT, (9000, 10)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_a_captured_graph_replays_with_new_inputs(
    case: Case, shape: tuple[int, int] | str, backend: str, generator: torch.Generator
) -> None:
    shape = (multiprocessors() + 3, 10007) if isinstance(shape, str) else shape
    for call in calls_of(case):
        static = inputs_on_device("normal", *shape, BF16, generator)
        graph, results = captured(call, static, backend)
        # The number of rows that count in the mean changes.
        for kind, ignored in (("offset", 0.0), ("normal", 0.3), ("one_hot", 0.1), ("normal", 0.0)):
            new = inputs_on_device(kind, *shape, BF16, generator, ignored=ignored)
            for x, y in zip(static, new, strict=True):
                x.copy_(y)
            for x in results:
                x.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_results(results, evaluate(call, *new, backend=backend), f"{kind} {ignored}")


@pytest.mark.parametrize("together", [False, True], ids=["alternately", "at once"])
@pytest.mark.parametrize("shape", [(3000, 100), (300, 1003), SPLIT], ids=str)
@pytest.mark.parametrize("case", [KD, DKD], ids=str)
def test_two_graphs(
    case: Case, shape: tuple[int, int], together: bool, backend: str, generator: torch.Generator
) -> None:
    """Replayed in turn, then on two streams at once; eager calls in between take no counter of
    theirs."""
    work = []
    for ignored in (0.0, 0.3):
        static = inputs_on_device("normal", *shape, BF16, generator, ignored=ignored)
        expected = evaluate(case, *static, backend=backend)
        stream = torch.cuda.Stream() if together else torch.cuda.current_stream()
        work.append((*captured(case, static, backend), static, expected, stream))
    wrong = [torch.zeros((), dtype=torch.bool, device=DEVICE) for _ in work]
    torch.cuda.synchronize()
    for _ in range(50):
        if together:  # held up until both are queued
            for *_, stream in work:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(1_000_000)
        for (graph, results, static, expected, stream), bad in zip(work, wrong, strict=True):
            with torch.cuda.stream(stream):
                for x in results:
                    x.fill_(math.nan)
                graph.replay()
                for x, y in zip(results, expected, strict=True):
                    bad.logical_or_((x != y).any())
                if not together:
                    value = case(*static, backend=backend)
                    bad.logical_or_(value != expected[0])
    torch.cuda.synchronize()
    assert not any(x.item() for x in wrong)


FIRST_CALL = """
import torch
import kdkernels

rows = torch.cuda.get_device_properties("cuda").multi_processor_count
student, teacher = (torch.randn(rows, 20011, device="cuda").bfloat16() for _ in range(2))
target = torch.randint(20011, (rows,), device="cuda")
student.requires_grad_()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = kdkernels.dkd_loss(student, teacher, target, backend="cuda").detach()
for _ in range(2):
    graph.replay()
eager = kdkernels.dkd_loss(student, teacher, target, backend="cuda")
assert captured.isfinite() and torch.equal(captured, eager), (captured, eager)
"""


def test_the_first_call_of_a_process_may_be_captured(cuda_backend: str) -> None:
    """The module, the kernel and its share of shared memory are then set up during the capture."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_calls_on_several_streams_at_once(backend: str, generator: torch.Generator) -> None:
    """Blocks of a call find out which of them is the last one: not those of another call."""
    shapes = ((3000, 100), (300, 1003), (multiprocessors() + 3, 8003), SPLIT)
    work = []
    for shape, case in zip(shapes, MAIN_SCALARS, strict=False):
        inputs = inputs_on_device("normal", *shape, BF16, generator, ignored=0.1)
        expected = evaluate(case, *inputs, backend=backend)
        wrong = torch.zeros((), dtype=torch.bool, device=DEVICE)
        work.append((torch.cuda.Stream(), case, inputs, expected, wrong))
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, *_ in work:  # held up until there is something to interleave
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
        for _ in range(40):
            for stream, case, inputs, expected, wrong in work:
                with torch.cuda.stream(stream):
                    ours = evaluate(case, *inputs, backend=backend)
                    for x, y in zip(ours, expected, strict=True):
                        wrong.logical_or_((x != y).any())
                    wrong.logical_or_(case(*inputs, backend=backend) != expected[0])
        torch.cuda.synchronize()
    for _, case, _, _, wrong in work:
        assert not wrong.item(), str(case)


@pytest.mark.full
@pytest.mark.parametrize("shape", [(300, 100), (33, 1003)], ids=str)
def test_more_calls_than_there_are_counters(
    shape: tuple[int, int], backend: str, generator: torch.Generator
) -> None:
    """Each call finds at 0 what the one 65,536 calls ago has left."""
    inputs = inputs_on_device("normal", *shape, BF16, generator)
    expected = KD(*inputs, backend=backend)
    wrong = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(2 * 65_536 + 100):
        wrong.logical_or_(KD(*inputs, backend=backend) != expected)
    assert not wrong.item()


# ---- launches -----------------------------------------------------------------------------------


def kernels_in(trace: dict[str, Any]) -> list[str]:
    """The names of a profiler's trace, in the order of time: no copies, no ranges that it draws."""
    kernels = [x for x in trace["traceEvents"] if x.get("cat") == "kernel"]
    return [x["name"] for x in sorted(kernels, key=lambda x: x["ts"])]


def kernels_of(call: Callable[[], object], folder: Path) -> list[str]:
    """The names of the kernels that a warm call launches."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        result = call()
        torch.cuda.synchronize()
    del result
    recorded.export_chrome_trace(str(folder / "trace.json"))
    names = kernels_in(json.loads((folder / "trace.json").read_text(errors="replace")))
    if not names:
        pytest.skip("the profiler sees no kernels here")
    return names


def our_kernels(names: list[str]) -> list[str]:
    """`few` of `void kd::..::cuda::few<..>(..)`; what is not ours stays as it is."""
    found = [re.search(r"\bkd::\w+::cuda::(?:\(anonymous namespace\)::)?(\w+)", x) for x in names]
    return [x if match is None else match[1] for x, match in zip(names, found, strict=True)]


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((4096, 100), ["few"]),
        ((1024, 1000), ["block"]),
        ((8193, 100), ["count", "few"]),
        (SPLIT, ["cluster"] if has_clusters() else ["count", "part_stats", "part_gradient"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_gradient", [True, False], ids=["gradient", "value"])
@pytest.mark.parametrize("case", [case for case in MAIN_SCALARS if case.teacher], ids=str)
def test_launches_of_a_mean(
    case: Case,
    with_gradient: bool,
    shape: tuple[int, int],
    kernels: list[str],
    cuda_backend: str,
    tmp_path: Path,
) -> None:
    """tf-NKD looks at all rows once more."""
    student, teacher, target = inputs_on_device("normal", *shape, BF16)
    student.requires_grad_(with_gradient)
    names = kernels_of(lambda: case(student, teacher, target, backend=cuda_backend), tmp_path)
    first = kernels.index("part_stats") + 1 if "part_stats" in kernels else 0
    refined = ["part_refined"] if first and case.rounds == 2 else []
    assert our_kernels(names) == [*kernels[:first], *refined, *kernels[first:]], names


@pytest.mark.parametrize("shape", REGIMES.values(), ids=REGIMES)
def test_shapes_reach_the_kernels_they_are_for(
    shape: Shape, cuda_backend: str, generator: torch.Generator, tmp_path: Path
) -> None:
    student, teacher, target = (on_device(x) for x in shape.inputs("normal", generator))
    pair = student.itemsize + teacher.itemsize
    if shape.kernel == "staged":
        device = torch.cuda.get_device_properties(DEVICE)
        if shape.classes * pair + (4 << 10) > getattr(device, "shared_memory_per_block_optin", 0):
            pytest.skip("rows do not fit into the shared memory of this GPU")
    mean = shape.mean(target.numel())
    forward = [x for x in mean if x != "count"]
    names = kernels_of(lambda: KD.rows(student, teacher, target, backend=cuda_backend), tmp_path)
    assert our_kernels(names) == forward, names
    student.requires_grad_()
    names = kernels_of(lambda: KD(student, teacher, target, backend=cuda_backend), tmp_path)
    assert our_kernels(names) == mean, names
    value = KD.rows(student, teacher, target, backend=cuda_backend)
    upstream = torch.ones_like(value)
    names = kernels_of(
        lambda: torch.autograd.grad(value, student, upstream, retain_graph=True), tmp_path
    )
    assert our_kernels(names) == [shape.backward], names


@pytest.mark.parametrize(
    ("plan", "kernels"),
    [
        ("regime=staged", ["staged"]),
        ("regime=staged threads=256 per_multiprocessor=2", ["staged"]),
        ("regime=sweeps", ["sweeps"]),
        ("regime=split", ["part_stats", "part_gradient"]),
        ("regime=split parts=3 threads=64", ["part_stats", "part_gradient"]),
        ("regime=cluster parts=4 stages=2", ["cluster"]),
        ("regime=cluster parts=16 stages=1 threads=192 per_multiprocessor=2", ["cluster"]),
    ],
)
@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_regimes_that_are_asked_for(
    case: Case,
    plan: str,
    kernels: list[str],
    cuda_backend: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """On Hopper clusters take the long rows of all of them."""
    if kernels == ["cluster"] and not has_clusters():
        pytest.skip("this GPU has no clusters")
    monkeypatch.setenv("KDKERNELS_PLAN", plan)
    rows = multiprocessors() + 3
    student, teacher, target = make_inputs("normal", rows, 8003, BF16, generator, ignored=0.1)
    check(case, student, teacher, target, generator, cuda_backend)
    check(case, student, teacher, target, generator, cuda_backend, "mean")
    placed = [on_device(x) for x in (student, teacher, target)]
    names = kernels_of(lambda: case.rows(*placed, backend=cuda_backend), tmp_path)
    ours = [x for x in our_kernels(names) if x in ("cluster", "staged", "sweeps", "part_stats")]
    assert ours and set(ours) == set(kernels) - {"part_gradient"}, names


def test_a_plan_that_is_not_possible_is_refused(
    cuda_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_on_device("normal", 7, 8003, BF16)
    for plan in ("regime=staged threads=1024", "regime=cluster parts=3", "threads=many"):
        monkeypatch.setenv("KDKERNELS_PLAN", plan)
        with pytest.raises((RuntimeError, ValueError), match=r"KDKERNELS_PLAN.*allowed"):
            KD(*inputs, backend=cuda_backend)


# ---- what must not be waited for ----------------------------------------------------------------


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_synchronisation_would_be_seen() -> None:
    x = torch.ones((), device=DEVICE)
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_no_call_waits_for_the_device(
    case: Case, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KDKERNELS_CHECK", raising=False)
    student, teacher, target = inputs_on_device("normal", 33, 100, dtype, ignored=0.2)
    targets = [target, None] if case is KD else [target]
    reductions = [{"reduction": x} for x in ("mean", "sum")] if case.outputs == 1 else []
    for y in targets:
        for call, common in [(case.rows, {}), *((case, x) for x in reductions)]:
            evaluate(call, student, teacher, y, backend=backend, **common)  # compiles
            with no_sync():
                evaluate(call, student, teacher, y, backend=backend, **common)


@pytest.mark.parametrize("pinned", [False, True])
def test_numbers_on_the_host_do_not_wait_for_the_device(backend: str, pinned: bool) -> None:
    student, teacher, target = inputs_on_device("normal", 33, 100)
    number = torch.tensor(7.0)
    number = number.pin_memory() if pinned else number

    def loss(student: Tensor, teacher: Tensor, target: Tensor, **common) -> Tensor:
        return kdkernels.kd_loss(student, teacher, target, normalizer=number, **common)

    expected = evaluate(loss, student, teacher, target, backend=backend)
    with no_sync():
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        ours = evaluate(loss, student, teacher, target, backend=backend)
        number.fill_(1.0)  # too late to change anything
    assert_same_results(ours, expected)


def test_numbers_on_the_device_of_logits_on_the_host_arrive_first() -> None:
    student, teacher, target = make_inputs("normal", 33, 100)
    expected = kdkernels.kd_loss(student, teacher, target, normalizer=7.0)
    torch.cuda._sleep(100_000_000)
    number = torch.full((), 7.0, device=DEVICE)
    torch.testing.assert_close(
        kdkernels.kd_loss(student, teacher, target, normalizer=number), expected
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_tensors_of_a_device_that_is_not_the_current_one(case: Case, backend: str) -> None:
    inputs = make_inputs("normal", 33, 100, ignored=0.2)
    for call in [*calls_of(case)] * 3:  # in turn
        first, second = (
            evaluate(call, *(on_device(x, device) for x in inputs), backend=backend)
            for device in ("cuda:0", "cuda:1")
        )
        assert second[0].device == second[1].device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        for x, y in zip(first, second, strict=True):  # the two may be of different kinds
            torch.testing.assert_close(x.cpu(), y.cpu(), rtol=1e-5, atol=1e-6)


# ---- torch.compile ----------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_compiled_calls_agree_with_eager_ones(
    case: Case, backend: str, fresh_compiler: None, generator: torch.Generator
) -> None:
    """Between operations of inductor's own, on strided logits, as language models have them."""
    student, teacher, target = inputs_on_device("normal", (2, 6), 65, F32, generator, ignored=0.2)
    inputs = (student[:, :-1], teacher[:, :-1], target[:, 1:])
    for call in calls_of(case):

        def step(student: Tensor, *rest: Tensor, call=call) -> Tensor:
            return 3 * call(2 * student, *rest, backend=backend)

        function = torch.compile(step, fullgraph=True)
        upstream = torch.rand(step(*inputs).shape, generator=generator).to(student.device)
        eager = evaluate(step, *inputs, upstream)
        for _ in range(2):
            ours = evaluate(function, *inputs, upstream)
            for x, y in zip(ours, eager, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


# ---- memory -----------------------------------------------------------------------------------


def peak_of(call: Callable[[], object]) -> int:
    """Largest number of bytes asked for at once beyond those held before.

    Not `max_memory_allocated`: the allocator may hand out a block that is up to 1 MiB larger.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(4000, 1003), (400, 20011), (8, 151669)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_peak_memory_is_the_gradient(
    case: Case, shape: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    rows, classes = shape
    inputs = (
        *(torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)),
        torch.randint(classes, (rows,), device=DEVICE),
    )
    gradient, slack = inputs[0].nbytes, 256 * rows + (64 << 10)
    assert slack < gradient / 4, "the bound would notice a copy of the logits"
    for call in calls_of(case):
        evaluate(call, *inputs, backend=backend)  # what is loaded once
        peak = peak_of(lambda call=call: evaluate(call, *inputs, backend=backend))
        assert gradient <= peak <= gradient + slack
        loss = peak_of(lambda call=call: call(*inputs, backend=backend))
        assert loss <= slack, "the loss alone holds no gradient"


@pytest.mark.alone  # most of the memory of many GPUs, where others would take part of it
@pytest.mark.parametrize("case", [KD, DKD], ids=str)
def test_more_elements_than_32_bits_can_count(
    case: Case, backend: str, rows: int = 70_000, classes: int = 32_000
) -> None:
    """Rows before, across and after the 2^31st element, and the last one, against the reference:
    forward and backward, and both in one sweep."""
    needed = 3 * 2 * rows * classes + (1 << 30)  # student, teacher, gradient in bfloat16
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    check_sampled_rows(case, backend, rows, classes)


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
