"""The GPU backends on a CUDA device: the equivalence grid, rows that must not reach other rows, and
the same bits every time.

As in test_equivalence.py the grids are pairwise. Types are picked so that cases which differ in
numbers alone share a kernel: compiling is what takes time here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import on_gpu
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
    evaluate,
    make_inputs,
)
from contracts import (
    KINDS,
    REDUCTIONS,
    check_numbers_of_rows,
    check_temperatures_that_are_none,
    numbers_of,
)
from grid import pairwise
from on_gpu import (
    DEVICE,
    DKD,
    KD,
    REGIMES,
    SPLIT,
    assert_same_results,
    cached_rows,
    calls_of,
    check,
    check_sampled_rows,
    inputs_on_device,
    multiprocessors,
    on_device,
    why_not,
)

import kdkernels
from kdkernels import backend as backends

# gpu_check.py looks for "mark.gpu" in each file.
pytestmark = [pytest.mark.gpu, *on_gpu.MARKS]
backend = on_gpu.backend  # a fixture, in place of conftest.py's

SMALL = (1, 2, 3, 31, 32, 33, 100, 1000, 1003, 4099)
# The end of resident rows of 16-bit logits and one beyond it, and real vocabularies.
LARGE = (16384, 16385, 32000, 50257)
LARGEST = (128256, 151669)


# ---- equivalence ----------------------------------------------------------------------------


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


# ---- numbers that lie on the device -----------------------------------------------------------


@pytest.fixture(params=[None, "triton"])
def fused(
    request: pytest.FixtureRequest,
    record_property: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> str | None:
    """What takes numbers on the device: the default, and Triton by its name; without a warning."""
    record_property("backend", "triton")
    if reason := why_not("triton"):
        pytest.skip(reason)
    monkeypatch.setattr(backends, "_warned", {"backend"})
    return request.param


OF_ROWS = [case for case in MAIN_CASES if case.loss in kdkernels.ops.LOSSES]


@pytest.mark.filterwarnings("error:kdkernels")
@pairwise(case=OF_ROWS, shape=[(7, 1), (33, 100), (5, 8003), SPLIT], dtype=[F32, BF16, F64])
def test_numbers_of_each_row(
    case: Case, shape: tuple[int, int], dtype: torch.dtype, fused: str | None,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Short rows, longer ones, and slices: losses, gradients and a mean."""
    inputs = make_inputs("normal", *shape, dtype, generator, ignored=0.1)
    own = numbers_of(case, shape[:1], generator)
    check_numbers_of_rows(case, inputs, own, generator, fused, lambda: iter([""]), on_device)


@pytest.mark.filterwarnings("error:kdkernels")
def test_more_long_rows_than_multiprocessors_with_numbers(
    fused: str | None, generator: torch.Generator
) -> None:
    case, rows = USUAL["jsd"], multiprocessors() + 3
    inputs = make_inputs("normal", rows, 16411, F32, generator, ignored=0.1)
    own = numbers_of(case, (rows,), generator)
    check_numbers_of_rows(case, inputs, own, generator, fused, lambda: iter([""]), on_device)


def test_temperatures_that_are_none(fused: str | None) -> None:
    check_temperatures_that_are_none(kdkernels.ops.TRITON, lambda: iter([""]), on_device)


@pytest.mark.filterwarnings("error:kdkernels")
def test_schedules_on_the_device(fused: str | None, generator: torch.Generator) -> None:
    """0-d tensors there, of which the host waits for none; learned ones get their gradient."""
    s, t, y = make_inputs("normal", 33, 1003, F32, generator)
    placed = [on_device(x) for x in (s, t, y)]
    for number in (3.0, 50.0):
        temperature = torch.tensor(number, device=DEVICE)
        call = partial(kdkernels.jsd_loss, beta=torch.tensor(0.3, device=DEVICE), ce_weight=0.5)
        evaluate(call, *placed, backend=fused)  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            ours = evaluate(call, *placed, backend=fused, temperature=temperature)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        plain = partial(kdkernels.jsd_loss, beta=0.3, ce_weight=0.5, temperature=number)
        truth = evaluate(plain, s.double(), t.double(), y, backend="reference")
        for x, exact in zip(ours, truth, strict=True):
            torch.testing.assert_close(x.double().cpu(), exact, rtol=1e-4, atol=1e-6)
        learned = temperature.clone().requires_grad_()
        exact = torch.tensor(number, dtype=F64, requires_grad=True)
        kdkernels.jsd_loss(*placed, temperature=learned, backend=fused).backward()
        logits = (s.double(), t.double(), y)
        kdkernels.jsd_loss(*logits, temperature=exact, backend="reference").backward()
        torch.testing.assert_close(learned.grad.double().cpu(), exact.grad, rtol=1e-4, atol=1e-6)


def test_the_cuda_kernels_do_not_take_them(cuda_backend: str) -> None:
    x = torch.randn(4, 9, device=DEVICE)
    for temperature in (torch.ones(4, device=DEVICE), torch.ones((), device=DEVICE)):
        with pytest.raises(RuntimeError, match="leave it None or take 'triton'"):
            kdkernels.kd_loss(x, x, temperature=temperature, backend=cuda_backend)


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
