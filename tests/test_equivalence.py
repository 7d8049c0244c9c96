"""The fused CPU kernels against the reference in float64, value and gradient.

A result passes when |ours - truth| <= |eager - truth| + tolerance, eager being the reference in
the inputs' own types; `cases.py` says what the tolerance is made of. The grids rotate through
types, kinds of logits and reductions instead of multiplying them: each test's index picks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    IGNORED,
    ISAS,
    LAYOUTS,
    MAIN_CASES,
    SCALAR_CASES,
    Case,
    assert_same,
    assert_within,
    evaluate,
    gradient_tolerance,
    loss_dtype,
    make_inputs,
    needs_cpu,
    value_tolerance,
)
from torch import Tensor

pytestmark = needs_cpu

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPE_PAIRS = [
    *((dtype, dtype) for dtype in DTYPES),
    (F32, BF16), (BF16, F32), (F16, F32), (F32, F64), (F64, F16), (F16, BF16),
]  # fmt: skip
KINDS = ("normal", "masked", "offset", "huge", "one_hot", "constant", "normal")
# Vectors have 2 to 16 lanes, fewer classes than fill two lie across them; batches of whole rows go
# up to a tile of 1024 classes, longer rows are walked in tiles. Also those of real data.
CLASSES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 100, 255, 256, 257, 1000, 1003, 1023,
           1024, 1025, 2049, 4099)  # fmt: skip
# A row alone, rows that do not fill the lanes, one more than fill them once or twice.
ROWS = (1, 7, 17, 33)


Variants = Callable[[], Iterator[str]]  # sets a variant up, yields its name, for all of them


def check_rows(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    generator: torch.Generator,
    dim: int = -1,
    backend: str = "cpu",
    variants: Variants | None = None,
) -> Tensor:
    """Reduction none under a random upstream gradient and row weights, on every variant of a
    backend: instruction sets of the CPU kernels unless others are given."""
    dtype = loss_dtype(student, teacher if case.teacher else None)
    shape = target.shape if case.outputs == 1 else (case.outputs, *target.shape)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    common: dict = {"dim": dim}
    weight = torch.ones(target.shape)
    if case.outputs == 1:
        weight = common["row_weight"] = 2 * torch.rand(target.shape, generator=generator)
    inputs = (student, teacher, target)
    exact = (student.double(), teacher.double(), target)
    truth, truth_gradient = evaluate(case.rows, *exact, upstream, backend="reference", **common)
    eager, eager_gradient = evaluate(case.rows, *inputs, upstream, backend="reference", **common)

    class_last = [x.movedim(dim, -1) for x in (student, teacher)]
    tolerance = weight * value_tolerance(case, truth / weight, *class_last, dtype)
    gradient_allowed = gradient_tolerance(
        case, truth_gradient.movedim(dim, -1), *class_last, target, weight * upstream, dtype
    ).movedim(-1, dim)
    gradient_allowed += interpreted(backend, truth_gradient, student)
    for variant in (variants or each_isa)():
        ours, gradient = evaluate(case.rows, *inputs, upstream, backend=backend, **common)
        assert ours.dtype == dtype and gradient.dtype == student.dtype
        assert_within(ours, truth, eager, tolerance, f"value, {variant}")
        allowed = (truth_gradient, eager_gradient, gradient_allowed)
        assert_within(gradient, *allowed, f"gradient, {variant}")
    return gradient


def interpreted(backend: str, gradient: Tensor, student: Tensor) -> Tensor | float:
    """Some of Triton's interpreters truncate to bfloat16: twice the error of rounding."""
    if backend != "triton" or student.dtype != BF16 or student.device.type != "cpu":
        return 0.0
    return 0.51 * torch.finfo(BF16).eps * gradient.abs()


def each_isa() -> Iterator[str]:
    """What the `isa` fixture does, within a test: the truth is computed once for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        for isa in ISAS:
            patch.setenv("KDKERNELS_CPU_ISA", isa)
            yield isa


# ---- shapes ---------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(case: Case, classes: int, generator: torch.Generator) -> None:
    step = 3 * CASES.index(case) + CLASSES.index(classes)
    for i, rows in enumerate(ROWS):
        dtypes = DTYPE_PAIRS[(step + i) % len(DTYPE_PAIRS)]
        kind = KINDS[(step + 3 * i) % len(KINDS)]
        inputs = make_inputs(kind, rows, classes, dtypes, generator, ignored=0.1 * (i % 2))
        check_rows(case, *inputs, generator)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_large_vocabulary(
    case: Case, dtypes: tuple[torch.dtype, torch.dtype], generator: torch.Generator
) -> None:
    check_rows(case, *make_inputs("masked", 2, 50257, dtypes, generator), generator)


@pytest.mark.slow
@pytest.mark.parametrize("classes", [128256, 151669])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_largest_vocabularies(case: Case, classes: int, generator: torch.Generator) -> None:
    dtype = DTYPES[(CASES.index(case) + classes) % len(DTYPES)]
    check_rows(case, *make_inputs("normal", 2, classes, dtype, generator), generator)


@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_rows(case: Case, classes: int, isa: str, generator: torch.Generator) -> None:
    inputs = make_inputs("normal", 0, classes, F32, generator)
    value, gradient = evaluate(case.rows, *inputs, backend="cpu")
    assert value.numel() == 0 and gradient.shape == (0, classes)
    if case.outputs == 1:
        value, gradient = evaluate(case, *inputs, backend="cpu")
        assert value == 0 and gradient.shape == (0, classes)


# ---- layouts --------------------------------------------------------------------------------


# Rows across the lanes, batches, and tiles; rows across the lanes wherever classes are strided.
@pytest.mark.parametrize("classes", [5, 37, 300, 1100])
@pytest.mark.parametrize("teacher_layout", LAYOUTS)
@pytest.mark.parametrize("student_layout", LAYOUTS)
def test_layouts(
    student_layout: str, teacher_layout: str, classes: int, generator: torch.Generator
) -> None:
    names = list(LAYOUTS)
    step = names.index(student_layout) + 3 * names.index(teacher_layout) + classes
    dtypes = DTYPE_PAIRS[step % len(DTYPE_PAIRS)]
    dense = make_inputs("normal", (3, 6), classes, dtypes, generator, ignored=0.1)
    views = []
    for layout, x in zip((student_layout, teacher_layout), dense[:2], strict=True):
        view, dim = LAYOUTS[layout](x)
        views.append(view.movedim(dim, -1))
    gradient = check_rows(CASES[step % len(CASES)], *views, dense[2], generator)
    assert gradient.stride() == torch.empty_like(views[0]).stride()


@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("shape", [(4, 5), (2, 3, 4), (2, 5, 3, 4)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_dim(case: Case, shape: tuple[int, ...], dim: int, generator: torch.Generator) -> None:
    """Classes first, second (images) or last, in 2 to 4 dimensions."""
    *rows, classes = shape
    student, teacher, target = make_inputs("normal", tuple(rows), classes, F32, generator)
    student, teacher = (x.movedim(-1, dim).contiguous() for x in (student, teacher))
    check_rows(case, student, teacher, target, generator, dim=dim)


@pytest.mark.parametrize("classes", [10, 300])
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_expanded_inputs(case: Case, classes: int, generator: torch.Generator) -> None:
    """One teacher row for all rows, and dimensions that no two strides can describe."""
    student, teacher, target = make_inputs("normal", (2, 3, 4), classes, F32, generator)
    check_rows(case, student, teacher[:1, :1, :1].expand_as(teacher), target, generator)
    check_rows(case, student.transpose(0, 2).contiguous().transpose(0, 2), teacher, target,
               generator)  # fmt: skip


def test_one_row_without_dimensions(generator: torch.Generator) -> None:
    for case, classes in product(CASES, (1, 5, 300)):
        student, teacher, target = make_inputs("normal", (), classes, F32, generator)
        check_rows(case, student, teacher, target, generator)


# ---- reductions -----------------------------------------------------------------------------


def divisor(reduction: str, target: Tensor, normalizer: float | None) -> float:
    if normalizer is not None:
        return normalizer
    counted = int((target != IGNORED).sum())
    return {"mean": max(counted, 1), "sum": 1, "batchmean": target.shape[0]}[reduction]


REDUCTIONS = [("mean", None), ("sum", None), ("batchmean", None), ("mean", 7.5), ("sum", 0.5)]


@pytest.mark.parametrize(("reduction", "normalizer"), REDUCTIONS)
@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_reductions(
    case: Case, reduction: str, normalizer: float | None, generator: torch.Generator
) -> None:
    check_reductions(case, reduction, normalizer, generator, (10, 100, 300, 2500))


def check_reductions(
    case: Case,
    reduction: str,
    normalizer: float | None,
    generator: torch.Generator,
    class_counts: Sequence[int],
    backend: str = "cpu",
    variants: Variants | None = None,
    shape: tuple[int, int] = (3, 11),
) -> None:
    """The truth is summed here, from the reference's rows and one random upstream scalar."""
    step = SCALAR_CASES.index(case)
    for i, classes in enumerate(class_counts):
        dtypes = DTYPE_PAIRS[(step + 3 * i) % len(DTYPE_PAIRS)]
        inputs = student, teacher, target = make_inputs(
            KINDS[(step + i) % 2], shape, classes, dtypes, generator, ignored=0.2 * (i % 2)
        )
        dtype = loss_dtype(student, teacher if case.teacher else None)
        weight = 2 * torch.rand(target.shape, generator=generator)
        weight = torch.where(weight < 0.3, 0.0, weight)
        common = {} if step % 3 == 0 else {"row_weight": weight}
        used = torch.ones_like(weight) if step % 3 == 0 else weight
        upstream = torch.randn((), generator=generator).to(dtype)
        per_row = (used / divisor(reduction, target, normalizer)).double()

        exact = (student.double(), teacher.double(), target)
        rows, _ = evaluate(case.rows, *exact, backend="reference", **common)
        _, truth_gradient = evaluate(
            case.rows, *exact, upstream * per_row / used.clamp(min=1e-9),
            backend="reference", **common,
        )  # fmt: skip
        rows = rows / used.clamp(min=1e-9)
        truth = (rows * per_row).sum()
        common |= {"reduction": reduction, "normalizer": normalizer}
        eager, eager_gradient = evaluate(case, *inputs, upstream, backend="reference", **common)
        tolerance = (value_tolerance(case, rows, student, teacher, dtype) * per_row).sum()
        allowed = gradient_tolerance(
            case, truth_gradient, student, teacher, target, upstream * per_row, dtype
        )
        # Rounded once in the sweep, and again when the upstream gradient has multiplied it.
        allowed += 0.51 * torch.finfo(student.dtype).eps * truth_gradient.abs()
        allowed += 2 * interpreted(backend, truth_gradient, student)
        for variant in (variants or each_isa)():
            ours, gradient = evaluate(case, *inputs, upstream, backend=backend, **common)
            assert ours.dtype == dtype and ours.shape == ()
            assert_within(ours, truth, eager, tolerance, f"value, {variant}")
            within = (truth_gradient, eager_gradient, allowed)
            assert_within(gradient, *within, f"gradient, {variant}")


@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_loss_without_gradient_is_the_same(
    case: Case, isa: str, generator: torch.Generator
) -> None:
    for classes in (10, 300, 1300):
        inputs = make_inputs("normal", 9, classes, F32, generator)
        with_gradient, _ = evaluate(case, *inputs, backend="cpu")
        assert_same(case(*inputs, backend="cpu"), with_gradient)


# ---- determinism ----------------------------------------------------------------------------


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", [(3000, 33), (40, 5000)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_same_bits_with_any_number_of_threads(
    case: Case, shape: tuple[int, int], generator: torch.Generator, restore_threads: None
) -> None:
    """Rows are split among threads at other places, in both regimes and both passes."""
    rows, classes = shape
    inputs = make_inputs("normal", rows, classes, F32, generator, ignored=0.1)
    calls = (case.rows,) if case.outputs > 1 else (case.rows, case)
    for call in calls:
        results = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(call, *inputs, backend="cpu"))
        for value, gradient in results[1:]:
            assert_same(value, results[0][0])
            assert_same(gradient, results[0][1])
