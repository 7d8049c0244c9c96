"""Inputs at the edges: infinite, huge, equal, saturated, NaN, ignored, none.

Each test states what must come out; most run on the reference as well as on the kernels.
"""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from cases import (
    BF16,
    CASES,
    DIVERGENCES,
    F16,
    F32,
    F64,
    IGNORED,
    INF,
    KINDS,
    PRECISE_CASES,
    SCALAR_CASES,
    USUAL,
    Case,
    assert_same,
    assert_within,
    evaluate,
    make_inputs,
    needs_cpu,
    powers_of,
    value_tolerance,
)
from contracts import (
    END_SHARES,
    EXTREME_TEMPERATURES,
    FAR,
    LARGE_TEMPERATURES,
    PATTERNS,
    SHARE_OF,
    SIDES,
    agree_with_reference,
    check_a_target_far_above,
    check_a_weight_of_0,
    check_digits_near_the_teacher,
    check_infinite_logits,
    check_large_temperatures,
    check_saturated_target_of_dkd,
    check_saturated_target_of_nkd,
    check_shares_near_the_ends,
    check_that_extreme_temperatures_give_numbers,
    check_that_nan_wins,
)
from torch import Tensor, tensor

from kdkernels import aekt_loss, dkd_loss, kd_loss, nkd_loss, target_split, tf_nkd_loss

NAN = math.nan
EPS = torch.finfo(F32).eps
# A row per lane, batches of rows (40 with AVX-512, 200 with all), two tiles: test_planner.py.
CLASSES = (5, 40, 200, 1100)


# ---- infinite logits ------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", ["first", "last", "scattered", "tile"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_class_missing_in_both_is_as_if_not_there(
    case: Case, hidden: str, backend: str, generator: torch.Generator
) -> None:
    """At another place in lanes and tiles the sums round differently, but only that."""
    for classes in CLASSES:
        student, teacher, target = make_inputs("normal", 9, classes, F64, generator)
        more = 1024 if hidden == "tile" else 7
        order = torch.arange(classes + more)
        if hidden == "scattered":
            order = torch.randperm(classes + more, generator=generator)
        elif hidden == "first":
            order = order.roll(-more)
        place = order[:classes]  # of the classes that are there

        def spread_out(x: Tensor, place: Tensor = place, total: int = classes + more) -> Tensor:
            return x.new_full((len(x), total), -INF).index_copy_(1, place, x)

        value, gradient = evaluate(case.rows, student, teacher, target, backend=backend)
        wide = (spread_out(student), spread_out(teacher), place[target])
        wide_value, wide_gradient = evaluate(case.rows, *wide, backend=backend)
        torch.testing.assert_close(wide_value, value, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(wide_gradient[:, place], gradient, rtol=1e-11, atol=1e-12)
        assert wide_gradient.count_nonzero() <= gradient.numel()


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_infinite_logits(
    case: Case, pattern: str, backend: str, generator: torch.Generator
) -> None:
    for classes in CLASSES:
        check_infinite_logits(case, pattern, classes, backend, generator)


def test_infinite_losses_by_hand(backend: str) -> None:
    """Which losses a missing class makes infinite, and what gradient they still have."""
    teacher = tensor([[1 / 2, 3 / 8, 1 / 8]]).log()
    common = dict(temperature=1.0, backend=backend)
    student = tensor([[0.0, 0.0, -INF]], requires_grad=True)
    loss = kd_loss(student, teacher, **common)
    loss.backward()
    assert loss == INF
    torch.testing.assert_close(student.grad, tensor([[0.0, 1 / 8, -1 / 8]]))  # p - q

    y = tensor([0])
    assert dkd_loss(student, teacher, y, alpha=1, beta=1, **common) == INF  # NCKD
    assert dkd_loss(student, teacher, y, alpha=1, beta=0, **common) < EPS  # TCKD: b = c = 1/2
    assert nkd_loss(student, teacher, y, **common) == INF
    torch.testing.assert_close(
        nkd_loss(student, teacher, y, gamma=0, **common), tensor(math.log(2) / 2)
    )
    y = tensor([2])
    assert dkd_loss(student, teacher, y, alpha=1, beta=0, **common) == INF  # c = 0
    assert nkd_loss(student, teacher, y, gamma=0, **common) == INF
    assert tf_nkd_loss(student, y, backend=backend) == INF
    split = target_split(student, y, backend=backend)
    assert split.log_target == -INF and split.log_rest == 0
    torch.testing.assert_close(split.logsumexp_rest, tensor([math.log(2)]))


@pytest.mark.parametrize("at_target", [True, False])
def test_one_hot_teacher(at_target: bool, backend: str, generator: torch.Generator) -> None:
    """KD is then T^2 cross-entropy at T; without other teacher mass NKD is its target term."""
    for classes in CLASSES:
        student, _, target = make_inputs("normal", 6, classes, F32, generator)
        hot = target if at_target else (target + 1) % classes
        teacher = torch.full_like(student, -INF).scatter_(1, hot.unsqueeze(1), 3.0)
        common = dict(reduction="none", backend=backend)
        expected = 16 * torch.nn.functional.cross_entropy(student / 4, hot, reduction="none")
        torch.testing.assert_close(kd_loss(student, teacher, **common), expected)
        nkd = nkd_loss(student, teacher, target, gamma=1.0, **common)
        rest = student.scatter(1, target.unsqueeze(1), -INF)
        logits = student if at_target else rest  # b = 1, or qh is one-hot
        torch.testing.assert_close(
            nkd, torch.nn.functional.cross_entropy(logits, hot, reduction="none")
        )


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_class(case: Case, backend: str) -> None:
    """Nothing to learn: no loss, no gradient; but log(1 - c) = -inf keeps its own, -c / T."""
    case = case.having(**case.facts.unmoved)
    student, teacher = tensor([[3.0], [-2.0]]), tensor([[1.0], [5.0]])
    value, gradient = evaluate(case.rows, student, teacher, tensor([0, 0]), backend=backend)
    expected = tensor([0.0]) if case.outputs == 1 else tensor([[0.0], [-INF], [-INF]])
    assert torch.equal(value, expected.expand_as(value))
    expected = 0.0 if case.outputs == 1 else -1 / case.temperature
    torch.testing.assert_close(gradient, torch.full((2, 1), expected))


# ---- huge logits ----------------------------------------------------------------------------


# Under label smoothing the lowest number is a class like any other, of a huge share in the loss;
# and a class like any other where all weigh alike, however improbable.
PLAIN = [case for case in CASES if not case.options.get("label_smoothing") and case.power > 0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, F32], ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_lowest_number_masks_like_infinity(
    case: Case, dtype: torch.dtype, backend: str, generator: torch.Generator
) -> None:
    """As in logits.masked_fill(mask, torch.finfo(dtype).min)."""
    for classes in CLASSES:
        student, teacher, target = make_inputs("masked", 8, classes, dtype, generator)
        mask = student.isneginf()
        if case.lacking:  # what the teacher lacks alone makes the loss infinite
            teacher = teacher.clamp(min=-5.0)
        teacher = teacher.masked_fill(mask, -INF)
        inputs = [x.clamp(min=torch.finfo(dtype).min) for x in (student, teacher)]
        value, gradient = evaluate(case.rows, *inputs, target, backend=backend)
        truth, truth_gradient = evaluate(case.rows, student, teacher, target, backend=backend)
        assert gradient[mask].count_nonzero() == 0
        torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(gradient, truth_gradient)


@needs_cpu
@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_common_offset_changes_no_bit(case: Case, isa: str, generator: torch.Generator) -> None:
    """Of logits that hold it exactly; student and teacher have different ones."""
    case = case.having(**case.facts.unmoved)
    for classes in CLASSES:
        student, teacher, target = make_inputs("normal", 9, classes, F32, generator)
        student, teacher = ((64 * x).round() / 64 for x in (student, teacher))
        value, gradient = evaluate(case.rows, student, teacher, target, backend="cpu")
        moved = evaluate(case.rows, student + 1e4, teacher - 3e3, target, backend="cpu")
        assert_same(moved[0], value)
        assert_same(moved[1], gradient)


@pytest.mark.parametrize("kind", sorted(KINDS.keys() - {"masked"}))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_finite_logits_give_finite_results(
    case: Case, kind: str, backend: str, generator: torch.Generator
) -> None:
    for classes in CLASSES:
        student, teacher, target = make_inputs(kind, 9, classes, F32, generator)
        if kind == "masked_lowest":  # in both: what one alone masks costs 3e38 T
            teacher = torch.where(student < -1e30, student, teacher.clamp(min=-10.0))
            target = student.argmax(-1)
        value, gradient = evaluate(case.rows, student, teacher, target, backend=backend)
        assert value.isfinite().all() and gradient.isfinite().all()


@needs_cpu
@pytest.mark.parametrize("gap", FAR)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_target_far_above(case: Case, gap: float, isa: str, generator: torch.Generator) -> None:
    for side in SIDES:
        check_a_target_far_above(case, gap, side, "cpu", generator)


# ---- temperature ----------------------------------------------------------------------------


WITH_TEMPERATURE = [case for case in CASES if "temperature" in case.options]


@needs_cpu
@pytest.mark.parametrize("temperature", [0.05, 0.3, 7.0, 100.0])
@pytest.mark.parametrize("case", WITH_TEMPERATURE, ids=str)
def test_temperatures(case: Case, temperature: float, isa: str, generator: torch.Generator) -> None:
    case = case.having(temperature=temperature)
    for classes in CLASSES:
        agree_with_reference(case, *make_inputs("normal", 9, classes, F32, generator), "cpu")


@pytest.mark.parametrize("temperature", LARGE_TEMPERATURES)
@pytest.mark.parametrize("case", [x for x in WITH_TEMPERATURE if x.teacher], ids=str)
def test_large_temperatures(
    case: Case, temperature: float, backend: str, generator: torch.Generator
) -> None:
    for classes, dtype in zip(CLASSES, (F32, BF16, F32, F16), strict=True):
        variants = partial(iter, [backend])
        check_large_temperatures(case, temperature, classes, dtype, backend, variants, generator)


@needs_cpu
@pytest.mark.parametrize("temperature", EXTREME_TEMPERATURES)
@pytest.mark.parametrize("case", WITH_TEMPERATURE, ids=str)
def test_extreme_temperatures_give_numbers(case: Case, temperature: float, isa: str) -> None:
    for classes in CLASSES:
        variants = partial(iter, [isa])
        check_that_extreme_temperatures_give_numbers(case, temperature, classes, "cpu", variants)


# ---- divergences ----------------------------------------------------------------------------


@needs_cpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, F32], ids=str)
@pytest.mark.parametrize("kind", ["normal", "masked", "huge", "constant", "one_hot"])
@pytest.mark.parametrize("case", DIVERGENCES, ids=str)
def test_student_equal_to_teacher(
    case: Case, kind: str, dtype: torch.dtype, isa: str, generator: torch.Generator
) -> None:
    """Exactly 0, because the same sums are made of both; also of a copy in another dtype.

    The gradient T beta (ph - qh) may keep the rounding of one product.
    """
    for classes in CLASSES:
        student, _, target = make_inputs(kind, 9, classes, dtype, generator)
        for teacher in (student, student.float()):
            value, gradient = evaluate(case.rows, student, teacher, target, backend="cpu")
            assert value.count_nonzero() == 0
            assert gradient.abs().max() <= EPS * case.temperature * case.weight


@pytest.mark.parametrize("distance", [1e-5, 1e-4, 1e-3, 1e-2])
@pytest.mark.parametrize("case", DIVERGENCES, ids=str)
def test_divergence_is_not_negative(
    case: Case, distance: float, backend: str, generator: torch.Generator
) -> None:
    """Beyond the rounding of T^2 log-probabilities, which a divergence of neighbours drowns in."""
    for classes in CLASSES:
        student, _, target = make_inputs("normal", 30, classes, F32, generator)
        teacher = student + distance * torch.randn(student.shape, generator=generator)
        value = case.rows(student, teacher, target, backend=backend)
        bound = value_tolerance(case, torch.zeros(30), student, teacher, F32)
        assert (value >= -bound).all()
        size = powers_of(case, student, teacher)
        size = 1.0 if size is None else 1 + size.sum(-1)
        assert (bound < 1e-3 * size * case.weight * case.temperature**2).all()


@needs_cpu
@pytest.mark.parametrize("with_target", [True, False])
@pytest.mark.parametrize("case", PRECISE_CASES, ids=str)
def test_digits_near_the_teacher(
    case: Case, with_target: bool, isa: str, generator: torch.Generator
) -> None:
    for classes in (10, 1000, 5000):
        variants = partial(iter, [isa])
        check_digits_near_the_teacher(case, classes, "cpu", variants, with_target, generator)


@needs_cpu
@pytest.mark.parametrize("share", END_SHARES)
@pytest.mark.parametrize("loss", SHARE_OF)
def test_shares_near_the_ends(
    loss: str, share: float, isa: str, generator: torch.Generator
) -> None:
    check_shares_near_the_ends(loss, share, "cpu", partial(iter, [isa]), generator)


@pytest.mark.parametrize("loss", SHARE_OF)
def test_shares_as_tensors(loss: str, generator: torch.Generator) -> None:
    """Whatever their dtype, the other share is what remains; and where a class is lacking too their
    own gradient and the teacher's are numbers."""
    student, teacher, _ = make_inputs("normal", 6, 40, F64, generator)
    student[1:, 3] = student[2, 5] = -INF
    name = SHARE_OF[loss]
    for dtype in (BF16, F16, F32, F64):
        for number in (0.125, 0.3, 1.0):
            share = tensor(number, dtype=dtype, requires_grad=True)
            logits = [x.clone().requires_grad_() for x in (student, teacher)]
            case = USUAL[loss].having(**{name: share})
            value = case.rows(*logits, None, backend="reference")
            known = USUAL[loss].having(**{name: share.item()})
            truth = known.rows(*logits, None, backend="reference")
            torch.testing.assert_close(value, truth, rtol=1e-6, atol=1e-9)
            fine = value.isfinite()
            gradients = torch.autograd.grad(value[fine].sum(), [*logits, share])
            assert fine.any() and all(x.isfinite().all() for x in gradients)
            same = case.rows(student[:1], student[:1], None, backend="reference")
            if loss != "jsd" or number < 1:
                torch.testing.assert_close(same, torch.zeros(1).double(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("loss", ["skew_kl", "skew_reverse_kl"])
def test_a_mixture_that_is_the_distribution_itself(loss: str, backend: str) -> None:
    """The loss is 0 then."""
    case = USUAL[loss].having(alpha=1.0)
    value, gradient = evaluate(case.rows, *make_inputs("normal", 5, 9), backend=backend)
    torch.testing.assert_close(value, torch.zeros(5), rtol=0, atol=1e-6)
    torch.testing.assert_close(gradient, torch.zeros(5, 9), rtol=0, atol=1e-6)


# ---- limits of the alpha-beta divergence ------------------------------------------------------


def ab(alpha: float | Tensor, beta: float | Tensor) -> Case:
    return USUAL["ab"].having(alpha=alpha, beta=beta)


NEAR_LIMITS = [(1.01e-4, 0.5), (0.5, 1.01e-4), (1.01e-4, 1.01e-4), (1e-3, 1.0), (1.0, 1e-3)]


@needs_cpu
@pytest.mark.parametrize("exponents", NEAR_LIMITS, ids=str)
def test_exponents_near_their_limits(
    exponents: tuple[float, float], isa: str, generator: torch.Generator
) -> None:
    """Nothing cancels there, wherever teacher and student are; and there is no jump."""
    case = ab(*exponents)
    # Of 1 / (alpha beta) = 1e8 the reference itself has few digits left nearer to the teacher.
    distances = (1.0, 0.3) if max(exponents) < 1e-3 else (1.0, 0.01, 1e-3)
    for classes in CLASSES:
        student, teacher, target = make_inputs("normal", 9, classes, F32, generator)
        for distance in distances:
            other = student + distance * teacher
            exact = (student.double(), other.double(), target)
            truth, truth_gradient = evaluate(case.rows, *exact, backend="reference")
            value, gradient = evaluate(case.rows, student, other, target, backend="cpu")
            largest = truth_gradient.abs().amax(-1, keepdim=True).expand_as(truth_gradient)
            assert_within(value, truth, truth, 1e-3 * truth, "value")
            assert_within(gradient, truth_gradient, truth_gradient, 1e-3 * largest, "gradient")
        limit = ab(*(0.0 if x < 2e-3 else x for x in exponents))
        values = (x.rows(student, teacher, target, backend="cpu") for x in (case, limit))
        torch.testing.assert_close(*values, rtol=40 * min(exponents), atol=0)


def test_alpha_beta_divergence_at_1_and_0_is_kl(backend: str, generator: torch.Generator) -> None:
    student, teacher, target = make_inputs("normal", 9, 40, F64, generator)
    for exponents, other in (((1.0, 0.0), "kd"), ((0.0, 1.0), "reverse_kl")):
        ours = evaluate(ab(*exponents).rows, student, teacher, target, backend=backend)
        kl = USUAL[other].having(temperature=1.0).rows
        for x, y in zip(ours, evaluate(kl, student, teacher, target, backend=backend), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("exponents", [(0.5, 0.25), (0.0, 0.5), (0.5, 0.0), (0.0, 0.0)], ids=str)
def test_exponents_as_tensors(
    exponents: tuple[float, float], backend: str, generator: torch.Generator
) -> None:
    """The same loss; and derivatives that are numbers, by the exponents and the teacher as well,
    also where a class is lacking."""
    student, teacher, _ = make_inputs("normal", 6, 40, F64, generator)
    student[1:, 3] = student[2, 5] = teacher[1:, 3] = teacher[3, 7] = -INF
    alpha, beta = (tensor(x, requires_grad=True) for x in exponents)
    logits = [x.clone().requires_grad_() for x in (student, teacher)]
    value = ab(alpha, beta).rows(*logits, None, backend=backend)
    torch.testing.assert_close(value, ab(*exponents).rows(student, teacher, None, backend=backend))
    inputs = [*logits, alpha, beta]
    gradients = torch.autograd.grad(value[value.isfinite()].sum(), inputs)
    assert value.isfinite().sum() >= 4 and all(x.isfinite().all() for x in gradients)


# ---- saturated target -----------------------------------------------------------------------


@pytest.mark.parametrize("gap", [20.0, 60.0, 120.0, 200.0])
@pytest.mark.parametrize("classes", CLASSES)
def test_saturated_target_of_dkd(
    gap: float, classes: int, backend: str, generator: torch.Generator
) -> None:
    check_saturated_target_of_dkd(gap, classes, backend, generator)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("gap", [20.0, 200.0])
@pytest.mark.parametrize("classes", CLASSES)
def test_saturated_target_of_nkd(
    gap: float, classes: int, temperature: float, backend: str, generator: torch.Generator
) -> None:
    check_saturated_target_of_nkd(gap, temperature, classes, backend, generator)


# ---- NaN, ignored rows and weights ----------------------------------------------------------


@pytest.mark.parametrize("where", ["target", "other", "last", "all"])
@pytest.mark.parametrize(
    ("case", "name"),
    [(case, name) for case in CASES for name in ("student", "teacher")[: 1 + case.teacher]],
    ids=str,
)
def test_nan_stays_in_its_row(
    case: Case, name: str, where: str, backend: str, generator: torch.Generator
) -> None:
    """The other rows are, bit by bit, what they are when that row is ignored."""
    for classes in CLASSES:
        student, teacher, target = make_inputs("normal", 7, classes, F32, generator)
        target[3] = 1
        columns = {"target": 1, "other": 2, "last": -1, "all": slice(None)}[where]
        (student if name == "student" else teacher)[3, columns] = NAN
        value, gradient = evaluate(case.rows, student, teacher, target, backend=backend)
        ignored = torch.where(torch.arange(7) == 3, IGNORED, target)
        expected, expected_gradient = evaluate(
            case.rows, student, teacher, ignored, backend=backend
        )
        others = torch.arange(7) != 3
        assert_same(value[..., others], expected[..., others])
        assert_same(gradient[others], expected_gradient[others])
        assert value[..., 3].isnan().all()
        if where != "target" or not case.facts.blind(case.all_options):
            assert gradient[3].isnan().any()
        if case.outputs == 1:
            assert case(student, teacher, target, backend=backend).isnan()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_wins_over_infinities_and_weights_of_0(case: Case, backend: str) -> None:
    for classes in CLASSES:
        check_that_nan_wins(case, classes, backend, lambda: iter([backend]))


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean"])
@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_ignored_rows(case: Case, reduction: str, backend: str, generator: torch.Generator) -> None:
    """Full of NaN, they are as if not there, except in the batch size."""
    for classes in CLASSES:
        student, teacher, target = make_inputs("normal", 12, classes, F32, generator, ignored=0.3)
        there = target != IGNORED
        student[~there] = NAN
        teacher[~there] = NAN
        inputs = (student, teacher, target)
        value, gradient = evaluate(case, *inputs, backend=backend, reduction=reduction)
        normalizer = 12 if reduction == "batchmean" else None
        expected, expected_gradient = evaluate(
            case, *(x[there] for x in inputs), backend=backend, reduction=reduction,
            normalizer=normalizer,
        )  # fmt: skip
        torch.testing.assert_close(value, expected)
        torch.testing.assert_close(gradient[there], expected_gradient)
        assert gradient[~there].count_nonzero() == 0
        rows, gradient = evaluate(case.rows, *inputs, backend=backend)
        assert rows[~there].count_nonzero() == 0 and gradient[~there].count_nonzero() == 0


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ignore_index_may_be_a_class(case: Case, backend: str, generator: torch.Generator) -> None:
    student, teacher, target = make_inputs("normal", 12, 4, F32, generator)
    assert (target == 2).any()
    out = target == 2
    student[out] = NAN
    common = {"backend": backend, "ignore_index": 2}
    value, gradient = evaluate(case.rows, student, teacher, target, **common)
    assert value[..., out].count_nonzero() == 0 and gradient[out].count_nonzero() == 0
    assert (value[..., ~out] != 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "batchmean", "none"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_all_rows_ignored(case: Case, reduction: str, backend: str) -> None:
    for classes in CLASSES:
        student = torch.full((5, classes), NAN)
        target = torch.full((5,), IGNORED)
        common = {"reduction": reduction} if case.outputs == 1 else {}
        value, gradient = evaluate(case, student, student, target, backend=backend, **common)
        assert value.count_nonzero() == 0 and gradient.count_nonzero() == 0


@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_rows_of_weight_zero(case: Case, backend: str, generator: torch.Generator) -> None:
    """Not read either, but counted in the mean."""
    for classes in CLASSES:
        student, teacher, target = make_inputs("normal", 8, classes, F32, generator)
        weight = tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0, 3.0, 1.5])
        there = weight != 0
        student[~there] = NAN
        teacher[~there] = NAN
        inputs = (student, teacher, target)
        common = {"backend": backend, "row_weight": weight}
        rows, gradient = evaluate(case.rows, *inputs, **common)
        assert rows[~there].count_nonzero() == 0 and gradient[~there].count_nonzero() == 0
        plain, plain_gradient = evaluate(case.rows, *(x[there] for x in inputs), backend=backend)
        torch.testing.assert_close(rows[there], plain * weight[there])
        torch.testing.assert_close(gradient[there], plain_gradient * weight[there].unsqueeze(1))
        value, gradient = evaluate(case, *inputs, **common)
        torch.testing.assert_close(value, rows.sum() / 8)
        assert gradient[~there].count_nonzero() == 0


@pytest.mark.parametrize("loss", [dkd_loss, aekt_loss])
@pytest.mark.parametrize("classes", [5, 300])
def test_a_weight_of_0_wins_over_a_row_without_logits(loss, classes, backend):
    check_a_weight_of_0(loss, classes, backend)
