"""The fused CPU kernels against the reference in float64, value and gradient.

A result passes when |ours - truth| <= |eager - truth| + tolerance, eager being the reference in
the inputs' own types; `cases.py` says what the tolerance is made of. The grids are pairwise: every
two values of a test's parameters meet, not all of them at once.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cases import (
    BF16,
    CASES,
    DTYPE_PAIRS,
    DTYPES,
    F32,
    LAYOUTS,
    MAIN_CASES,
    SCALAR_CASES,
    Case,
    assert_same,
    evaluate,
    make_inputs,
    needs_cpu,
)
from contracts import KINDS, REDUCTIONS, Reduction, check_reduction, check_rows
from grid import pairwise

pytestmark = needs_cpu

Dtypes = tuple[torch.dtype, torch.dtype]
# Vectors have 2 to 16 lanes, fewer classes than fill two lie across them; batches of whole rows go
# up to a tile of 1024 classes, longer rows are walked in tiles. Also those of real data.
CLASSES = (1, 2, 3, 4, 7, 8, 15, 16, 17, 31, 32, 33, 63, 65, 100, 255, 256, 257, 1000, 1003, 1023,
           1024, 1025, 2049, 4099)  # fmt: skip
# A row alone, rows that do not fill the lanes, one more than fill them once or twice.
ROWS = (1, 7, 17, 33)


# ---- shapes ---------------------------------------------------------------------------------


@pairwise(
    case=CASES, classes=CLASSES, dtypes=DTYPE_PAIRS, kind=KINDS, rows=ROWS, ignored=(0.1, 0.0)
)
def test_shapes(
    case: Case, classes: int, dtypes: Dtypes, kind: str, rows: int, ignored: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    inputs = make_inputs(kind, rows, classes, dtypes, generator, ignored=ignored)
    check_rows(case, *inputs, generator)


@pytest.mark.full
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_large_vocabulary(case: Case, dtypes: Dtypes, generator: torch.Generator) -> None:
    check_rows(case, *make_inputs("masked", 2, 50257, dtypes, generator), generator)


@pytest.mark.full
@pairwise(case=CASES, classes=[128256, 151669], dtype=DTYPES)
def test_largest_vocabularies(
    case: Case, classes: int, dtype: torch.dtype, generator: torch.Generator
) -> None:
    check_rows(case, *make_inputs("normal", 2, classes, dtype, generator), generator)


@pytest.mark.parametrize("classes", [5, 200])
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
@pairwise(
    student_layout=[*LAYOUTS], teacher_layout=[*LAYOUTS], case=CASES, classes=[5, 37, 200, 1100],
    dtypes=DTYPE_PAIRS,
)  # fmt: skip
def test_layouts(
    student_layout: str, teacher_layout: str, case: Case, classes: int, dtypes: Dtypes,
    generator: torch.Generator,
) -> None:  # fmt: skip
    dense = make_inputs("normal", (3, 6), classes, dtypes, generator, ignored=0.1)
    views = []
    for layout, x in zip((student_layout, teacher_layout), dense[:2], strict=True):
        view, dim = LAYOUTS[layout](x)
        views.append(view.movedim(dim, -1))
    gradient = check_rows(case, *views, dense[2], generator)
    assert gradient.stride() == torch.empty_like(views[0]).stride()


# Rows that are apart in memory: one class more than are kept whole, and many tiles.
@pairwise(
    student_layout=["classes_first", "contiguous", "every_other_class"],
    teacher_layout=["classes_first", "contiguous"], case=MAIN_CASES, classes=[4097, 70_001],
    dtype=[F32, BF16], rising=[True, False],
)  # fmt: skip
def test_strided_rows_of_many_classes(
    student_layout: str, teacher_layout: str, case: Case, classes: int, dtype: torch.dtype,
    rising: bool, generator: torch.Generator,
) -> None:  # fmt: skip
    """rising: every tile has a larger maximum than the one before."""
    case = case.apart
    student, teacher, target = make_inputs("masked", (1, 3), classes, dtype, generator)
    if rising:
        student, teacher = student.sort(-1).values, teacher.sort(-1).values
    target[0] = torch.tensor([0, classes // 2, classes - 1])
    student[0, range(3), target[0]] = teacher[0, range(3), target[0]] = 1.0
    layouts = (student_layout, teacher_layout)
    views = []
    for layout, x in zip(layouts, (student, teacher), strict=True):
        view, dim = LAYOUTS[layout](x)
        views.append(view.movedim(dim, -1))
    check_rows(case, *views, target, generator)
    if case.outputs == 1:
        check_reduction(case, ("mean", None), (*views, target), generator, weighted=False)


@pairwise(case=CASES, shape=[(4, 5), (2, 3, 4), (2, 5, 3, 4)], dim=[0, 1, -1])
def test_dim(case: Case, shape: tuple[int, ...], dim: int, generator: torch.Generator) -> None:
    """Classes first, second (images) or last, in 2 to 4 dimensions."""
    *rows, classes = shape
    student, teacher, target = make_inputs("normal", tuple(rows), classes, F32, generator)
    student, teacher = (x.movedim(-1, dim).contiguous() for x in (student, teacher))
    check_rows(case, student, teacher, target, generator, dim=dim)


@pytest.mark.parametrize("classes", [10, 200])
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_expanded_inputs(case: Case, classes: int, generator: torch.Generator) -> None:
    """One teacher row for all rows, and dimensions that no two strides can describe."""
    student, teacher, target = make_inputs("normal", (2, 3, 4), classes, F32, generator)
    check_rows(case, student, teacher[:1, :1, :1].expand_as(teacher), target, generator)
    swapped = student.transpose(0, 2).contiguous().transpose(0, 2)
    check_rows(case, swapped, teacher, target, generator)


@pytest.mark.parametrize("classes", [1, 5, 200])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_row_without_dimensions(case: Case, classes: int, generator: torch.Generator) -> None:
    check_rows(case, *make_inputs("normal", (), classes, F32, generator), generator)


# ---- reductions -----------------------------------------------------------------------------


@pairwise(
    case=SCALAR_CASES, how=REDUCTIONS, classes=[10, 100, 200, 2500], dtypes=DTYPE_PAIRS,
    kind=["normal", "masked"], ignored=[0.0, 0.2], weighted=[True, False],
)  # fmt: skip
def test_reductions(
    case: Case, how: Reduction, classes: int, dtypes: Dtypes, kind: str, ignored: float,
    weighted: bool, generator: torch.Generator,
) -> None:  # fmt: skip
    inputs = make_inputs(kind, (3, 11), classes, dtypes, generator, ignored=ignored)
    check_reduction(case, how, inputs, generator, weighted)


@pytest.mark.parametrize("classes", [10, 200, 1300])
@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_loss_without_gradient_is_the_same(
    case: Case, classes: int, isa: str, generator: torch.Generator
) -> None:
    inputs = make_inputs("normal", 9, classes, F32, generator)
    with_gradient, _ = evaluate(case, *inputs, backend="cpu")
    assert_same(case(*inputs, backend="cpu"), with_gradient)


# ---- determinism ----------------------------------------------------------------------------


@pytest.fixture
def restore_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("isa", "restore_threads")
@pytest.mark.parametrize("shape", [(901, 100), (70, 3000)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_same_bits_with_any_number_of_threads(
    case: Case, shape: tuple[int, int], generator: torch.Generator
) -> None:
    """Rows are split among threads at other places, in both regimes and both passes."""
    inputs = make_inputs("normal", *shape, F32, generator, ignored=0.1)
    calls = (case.rows,) if case.outputs > 1 else (case.rows, case)
    for call in calls:
        results = []
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            results.append(evaluate(call, *inputs, backend="cpu"))
        for value, gradient in results[1:]:
            assert_same(value, results[0][0])
            assert_same(gradient, results[0][1])
