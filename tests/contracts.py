"""What the kernels of every backend keep to, in all their variants, such as a planner's regimes.

Each check takes a variant after the other from `variants()`, and the backend by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from cases import (
    BF16,
    F32,
    IGNORED,
    INF,
    ISAS,
    OPERATORS,
    Case,
    assert_same,
    assert_within,
    evaluate,
    gradient_tolerance,
    loss_dtype,
    make_inputs,
    value_tolerance,
)
from torch import Tensor

from kdkernels import ops

# ---- values and gradients -------------------------------------------------------------------

KINDS = ("normal", "masked", "offset", "huge", "one_hot", "constant")
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


Reduction = tuple[str, float | None]  # and a normalizer
REDUCTIONS: list[Reduction] = [
    ("mean", None), ("sum", None), ("batchmean", None), ("mean", 7.5), ("sum", 0.5),
]  # fmt: skip


def divisor(reduction: str, target: Tensor, normalizer: float | None) -> float:
    if normalizer is not None:
        return normalizer
    counted = int((target != IGNORED).sum())
    return {"mean": max(counted, 1), "sum": 1, "batchmean": target.shape[0]}[reduction]


def check_reduction(
    case: Case,
    how: Reduction,
    inputs: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
    weighted: bool = True,
    backend: str = "cpu",
    variants: Variants | None = None,
) -> None:
    """The truth is summed here, from the reference's rows and one random upstream scalar.

    weighted: with row weights, a few of them 0.
    """
    student, teacher, target = inputs
    reduction, normalizer = how
    dtype = loss_dtype(student, teacher if case.teacher else None)
    weight = torch.ones(target.shape)
    common: dict = {}
    if weighted:
        weight = 2 * torch.rand(target.shape, generator=generator)
        weight = common["row_weight"] = torch.where(weight < 0.3, 0.0, weight)
    upstream = torch.randn((), generator=generator).to(dtype)
    per_row = (weight / divisor(reduction, target, normalizer)).double()

    exact = (student.double(), teacher.double(), target)
    rows, _ = evaluate(case.rows, *exact, backend="reference", **common)
    of_rows = upstream * per_row / weight.clamp(min=1e-9)
    _, truth_gradient = evaluate(case.rows, *exact, of_rows, backend="reference", **common)
    rows = rows / weight.clamp(min=1e-9)
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


# ---- rows that do not count, numbers that are none ------------------------------------------


def check_that_rows_that_do_not_count_are_not_read(
    case: Case, generator: torch.Generator, backend: str, variants: Variants
) -> None:
    """Ignored rows, and rows of weight 0, full of NaN."""
    student, teacher, target = make_inputs("normal", 4, 70, F32, generator)
    dead = torch.tensor([0, 1, 0, 1]).bool()
    target[3] = IGNORED
    student[dead] = teacher[dead] = math.nan
    common: dict = {"backend": backend}
    if case.outputs == 1:
        common["row_weight"] = torch.tensor([1.0, 0.0, 2.0, 1.0])
    else:
        target[1] = IGNORED
    for _ in variants():
        for call in (case.rows, case)[: 2 if case.outputs == 1 else 1]:
            value, gradient = evaluate(call, student, teacher, target, **common)
            assert value.isfinite().all()
            assert value.dim() == 0 or not value[..., dead].any()
            assert not gradient[dead].any()
            assert gradient.isfinite().all() and gradient[~dead].any(-1).all()


def check_that_nan_stays_in_its_row(
    case: Case, generator: torch.Generator, backend: str, variants: Variants, at: int = 50
) -> None:
    case = case.apart
    clean = make_inputs("normal", 3, 70, F32, generator)
    dirty = [x.clone() for x in clean]
    dirty[0][2, at] = math.nan
    others = torch.arange(3) != 2
    for _ in variants():
        value, gradient = evaluate(case.rows, *dirty, backend=backend)
        good = evaluate(case.rows, *clean, backend=backend)
        assert value[..., 2].isnan().any() and gradient[2].isnan().any()
        assert_same(value[..., others], good[0][..., others])
        assert_same(gradient[others], good[1][others])


def check_that_a_bad_target_makes_its_row_nan(
    case: Case, generator: torch.Generator, backend: str, variants: Variants, bad: int
) -> None:
    """What happens on a GPU, where nobody looks at targets before the kernel does."""
    case = case.apart
    student, teacher, target = make_inputs("normal", 3, 70, F32, generator)
    others = torch.arange(3) != 2
    wrong = torch.where(others, target, bad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdkernels.losses.checks_targets", lambda _: False)
        for _ in variants():
            value, gradient = evaluate(case.rows, student, teacher, wrong, backend=backend)
            good = evaluate(case.rows, student, teacher, target, backend=backend)
            assert value[..., 2].isnan().all() and gradient[2].isnan().all()
            assert_same(value[..., others], good[0][..., others])
            assert_same(gradient[others], good[1][others])


EXTREME_TEMPERATURES = (1e-60, 1e-30, 1e30, 1e150)


def check_that_extreme_temperatures_give_numbers(
    case: Case, temperature: float, classes: int, backend: str, variants: Variants
) -> None:
    if "temperature" not in case.options:
        return
    case = case.having(temperature=temperature)
    inputs = make_inputs("normal", 3, classes)
    for _ in variants():
        value, gradient = evaluate(case.rows, *inputs, backend=backend)
        assert not value.isnan().any() and gradient.isfinite().all()


def check_a_weight_of_0(loss, classes: int, backend: str) -> None:
    student, teacher, target = make_inputs("normal", 4, classes)
    student[1] = teacher[1] = -INF
    options = {"alpha": 0.0, "reduction": "none", "backend": backend}
    value, gradient = evaluate(loss, student, teacher, target, **options)
    assert value[1] == 0 and not gradient[1].any()
    assert value.isfinite().all() and gradient.isfinite().all() and gradient[2].any()


# ---- the operators, called with what the functions never give them --------------------------

STUDENT, TEACHER, TARGET = make_inputs("normal", (2, 4), 5)
GOOD = {
    "loss": "dkd",
    "student": STUDENT,
    "teacher": TEACHER,
    "target": TARGET,
    "row_weight": torch.ones(2, 4),
    "params": [4.0, 0.0, 1.0, 8.0],
    "ignore_index": IGNORED,
}
REDUCTION = {"scale": 1.0, "normalizer": torch.tensor(2.0), "mean": True, "with_grad": True}
STATS = {"grad_rows": torch.ones(2, 4), "stats": torch.ones(8, ops.STATS_WIDTH).double()}
MALFORMED = [
    (ops.FUSED.forward, "loss", "kld"),
    (ops.FUSED.forward, "loss", "cross_entropy"),  # takes no teacher
    (ops.FUSED.forward, "student", STUDENT[0]),
    (ops.FUSED.forward, "student", STUDENT[None]),
    (ops.FUSED.forward, "student", STUDENT[0, 0, 0]),
    (ops.FUSED.forward, "student", STUDENT.long()),
    (ops.FUSED.forward, "student", STUDENT[..., :0]),
    (ops.FUSED.forward, "teacher", None),
    (ops.FUSED.forward, "teacher", TEACHER[:, :3]),
    (ops.FUSED.forward, "teacher", TEACHER[..., :4]),
    (ops.FUSED.forward, "teacher", TEACHER[:1].expand(2, 4, 5)[..., None]),
    (ops.FUSED.forward, "target", None),
    (ops.FUSED.forward, "target", TARGET[:, :3].contiguous()),
    (ops.FUSED.forward, "target", TARGET.int()),
    (ops.FUSED.forward, "target", TARGET.t().contiguous().t()),
    (ops.FUSED.forward, "target", TARGET[:1].expand(2, 4)),
    (ops.FUSED.forward, "row_weight", torch.ones(7)),
    (ops.FUSED.forward, "row_weight", torch.ones(2, 4).double()),
    (ops.FUSED.forward, "row_weight", torch.ones(1).expand(2, 4)),
    (ops.FUSED.forward, "params", [1.0] * 9),
    (ops.FUSED.backward, "grad_rows", torch.ones(2, 3)),
    (ops.FUSED.backward, "grad_rows", torch.ones(2, 4).double()),
    (ops.FUSED.backward, "stats", torch.ones(8, ops.STATS_WIDTH - 1).double()),
    (ops.FUSED.backward, "stats", torch.ones(8, ops.STATS_WIDTH)),
    (ops.FUSED.backward, "stats", torch.ones(1, 1).double().expand(8, ops.STATS_WIDTH)),
    (ops.FUSED.reduced, "normalizer", torch.ones(2)),
    (ops.FUSED.reduced, "normalizer", torch.tensor(1)),
    (ops.FUSED.reduced, "student", STUDENT.double()),  # row_weight is still float32
]


def check_refusal(op, like, argument: str, value: object, stats: torch.dtype) -> None:
    """like: the operator of FUSED that it is the twin of; stats: the dtype of row statistics."""
    kept = {**STATS, "stats": STATS["stats"].to(stats)}
    more = {ops.FUSED.reduced: REDUCTION, ops.FUSED.backward: kept}.get(like, {})
    arguments = {**GOOD, **more}
    op(**arguments)
    shown = {"loss": "(loss|teacher)", "student": "(student|teacher|row_weight)"}
    with pytest.raises(RuntimeError, match=rf"{shown.get(argument, argument)}: "):
        op(**{**arguments, argument: value})


def check_operators(operators: ops.Operators, name: str, passes: Sequence[str]) -> None:
    """torch.library.opcheck of the operators of a loss, on strided logits with ignored rows."""
    facts, params = ops.LOSSES[name], list(OPERATORS[name])
    student, teacher, target = make_inputs("normal", (2, 4), 9, ignored=0.2)
    plain = (
        student[:, :-1],
        teacher[:, :-1] if facts.teacher else None,
        target[:, :-1].contiguous(),
        torch.rand(2, 3),
    )
    leaves = (plain[0].clone().requires_grad_(), *plain[1:])
    rows, stats = operators.forward(name, *plain, params, IGNORED)
    normalizer = torch.tensor(4.0)
    arguments: dict[str, list[tuple]] = {
        "forward": [(name, *leaves, params, IGNORED)],
        "backward": [(name, torch.randn_like(rows), *plain, stats, params, IGNORED)],
        "reduced": [
            (name, *leaves, 0.25, None, True, params, IGNORED, True),
            (name, *leaves, 0.25, normalizer, False, params, IGNORED, True),
            (name, *plain, 0.25, None, True, params, IGNORED, False),
        ],
        "scale_": [(torch.randn(2, 3), torch.tensor(factor)) for factor in (1.0, 3.0)],
    }
    for operator in passes:
        if operator == "reduced" and facts.outputs > 1:
            continue
        for call in arguments[operator]:
            torch.library.opcheck(getattr(operators, operator), call)
