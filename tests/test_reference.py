"""The reference against numbers worked out by hand, the authors' formulas, and its own gradients.

Everything else is tested against the reference, so nothing here uses a kernel.
"""

from __future__ import annotations

import inspect
import math

import pytest
import torch
from cases import CASES, IGNORED, INF, SCALAR_CASES, Case, evaluate, make_inputs
from formulas import (
    binary,
    divergence,
    of_target,
    one_hot,
    probabilities,
    sharp_cross_entropy,
)
from torch import Tensor, tensor

from kdkernels import aekt_loss, dkd_loss, kd_loss, nkd_loss, target_split, tf_nkd_loss
from kdkernels.reference import AEKT_VARIANTS

F64 = torch.float64
LN_10 = math.log(10)
TARGET = tensor([0])
# Student (1/3, 1/3, 1/3), teacher (1/2, 3/8, 1/8): c = 1/3, b = 1/2, r = 3/2, and among the other
# classes ph = (1/2, 1/2), qh = (3/4, 1/4).
STUDENT = tensor([[0.0, 0.0, 0.0]], dtype=F64)
TEACHER = tensor([[1 / 2, 3 / 8, 1 / 8]], dtype=F64).log()
KL = 1 / 2 * math.log(3 / 2) + 3 / 8 * math.log(9 / 8) + 1 / 8 * math.log(3 / 8)
TCKD = 1 / 2 * math.log(3 / 2) + 1 / 2 * math.log(3 / 4)
NCKD = 3 / 4 * math.log(3 / 2) + 1 / 4 * math.log(1 / 2)


def close(ours: Tensor, expected: Tensor | float | list, rel: float = 1e-12) -> None:
    expected = torch.as_tensor(expected, dtype=F64)
    torch.testing.assert_close(ours, expected.expand_as(ours), rtol=rel, atol=rel)


# ---- by hand --------------------------------------------------------------------------------


def test_kd_by_hand() -> None:
    close(kd_loss(STUDENT, TEACHER, temperature=1.0, backend="reference"), KL)
    # Logits times T at temperature T are the same probabilities, the loss is T^2 times as large.
    close(kd_loss(3 * STUDENT, 3 * TEACHER, temperature=3.0, backend="reference"), 9 * KL)
    with_ce = kd_loss(STUDENT, TEACHER, TARGET, temperature=1, ce_weight=0.1, backend="reference")
    close(with_ce, KL + 0.1 * math.log(3))


def test_kd_gradient_by_hand() -> None:
    student = (3 * STUDENT).requires_grad_()
    kd_loss(student, 3 * TEACHER, temperature=3.0, backend="reference").backward()
    close(student.grad, [[3 * (1 / 3 - 1 / 2), 3 * (1 / 3 - 3 / 8), 3 * (1 / 3 - 1 / 8)]])


def test_dkd_by_hand() -> None:
    assert math.isclose(KL, TCKD + 1 / 2 * NCKD)
    loss = dkd_loss(
        STUDENT, TEACHER, TARGET, temperature=1, alpha=2, beta=3, backend="reference"
    )  # fmt: skip
    close(loss, 2 * TCKD + 3 * NCKD)


def test_dkd_gradient_by_hand() -> None:
    student = STUDENT.clone().requires_grad_()
    dkd_loss(
        student, TEACHER, TARGET, temperature=1, alpha=2, beta=3, backend="reference"
    ).backward()
    d = 1 / 3 - 1 / 2
    rest = [(3 - 2 * d) / 2 - 3 * 3 / 4, (3 - 2 * d) / 2 - 3 * 1 / 4]
    close(student.grad, [[2 * d, *rest]])


def test_nkd_by_hand() -> None:
    loss = nkd_loss(STUDENT, TEACHER, TARGET, gamma=1.5, backend="reference")
    close(loss, 1 / 2 * math.log(3) + 1.5 * math.log(2))
    # At another temperature only the second term changes: qh is (9/10, 1/10) at T = 1/2.
    student = tensor([[0.0, math.log(2), 0.0]], dtype=F64)  # c = 1/4, ph = (4/5, 1/5)
    loss = nkd_loss(student, TEACHER, TARGET, temperature=0.5, gamma=2.0, backend="reference")
    non_target = -(9 / 10 * math.log(4 / 5) + 1 / 10 * math.log(1 / 5))
    close(loss, 1 / 2 * math.log(4) + 2 * 0.25 * non_target)


def test_tf_nkd_by_hand() -> None:
    student = tensor([[1 / 2, 1 / 2], [1 / 4, 3 / 4], [math.nan] * 2], dtype=F64).log()
    target = tensor([0, 0, IGNORED])
    # mean(c) = 3/8, so w = 9/8 and 7/8.
    rows = tf_nkd_loss(student, target, reduction="none", backend="reference")
    close(rows, [9 / 8 * math.log(2), 7 / 8 * math.log(4), 0])
    rows = tf_nkd_loss(
        student, target, mean_confidence=0.5, ce_weight=1, reduction="none", backend="reference"
    )
    close(rows, [2 * math.log(2), 7 / 4 * math.log(4), 0])


@pytest.mark.parametrize(
    ("variant", "phi"),
    [
        ("ratio_weighted_tckd", 1.5 * TCKD),
        ("ratio_weighted_ce", 1.5 * math.log(3)),
        ("confidence_weighted_ce", 0.5 * math.log(3)),
        ("ratio_divergence", 1.5 - math.log(1.5) - 1),
        ("ratio_coupled_tckd", 1.5 * TCKD),
    ],
)
def test_aekt_by_hand(variant: str, phi: float) -> None:
    options = dict(variant=variant, temperature=2.0, alpha=3.0, beta=5.0, backend="reference")
    close(aekt_loss(2 * STUDENT, 2 * TEACHER, TARGET, **options), 4 * (3 * phi + 5 * NCKD))


@pytest.mark.parametrize(
    ("variant", "phi"),
    [
        ("ratio_weighted_tckd", 1.25 * TCKD),
        ("ratio_weighted_ce", 1.25 * math.log(3)),
        ("confidence_weighted_ce", 0.5 * math.log(3)),  # holds no ratio
        ("ratio_divergence", 0.25 - math.log(1.25) + 0.25 * math.log(1.5 / 1.25)),
        ("ratio_coupled_tckd", 1.25 * TCKD),
    ],
)
def test_aekt_with_clamped_ratio_by_hand(variant: str, phi: float) -> None:
    options = dict(variant=variant, temperature=1.0, beta=0.0, log_ratio_max=math.log(1.25))
    close(aekt_loss(STUDENT, TEACHER, TARGET, backend="reference", **options), phi)


def test_target_split_by_hand() -> None:
    split = target_split(2 * TEACHER, TARGET, temperature=2.0, backend="reference")
    for ours, expected in zip(split, (1 / 2, 1 / 2, 1 / 2), strict=True):
        close(ours, math.log(expected))


# ---- the authors' formulas ------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_authors_formula(case: Case, generator: torch.Generator) -> None:
    student, teacher, target = make_inputs("normal", 40, 7, F64, generator)
    formula = case.facts.authors

    options = {"kd_weight": 1.0, "ce_weight": 0.0, "label_smoothing": 0.0} | case.all_options
    kd_weight, ce_weight = options["kd_weight"], options["ce_weight"]
    smoothing = options["label_smoothing"]
    own = {x: options[x] for x in inspect.signature(formula).parameters if x in options}

    def authors(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        uniform = -probabilities(student, 1.0).log().mean(1)
        ce = (1 - smoothing) * sharp_cross_entropy(student, target) + smoothing * uniform
        return kd_weight * formula(student, teacher, target, **own) + ce_weight * ce

    truth = authors(student, teacher, target)
    upstream = torch.randn(truth.shape, generator=generator, dtype=F64)
    value, gradient = evaluate(authors, student, teacher, target, upstream)
    ours, our_gradient = evaluate(
        case.rows, student, teacher, target, upstream, backend="reference"
    )
    close(ours, value, 1e-11)
    close(our_gradient, gradient, 1e-11)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_tckd_plus_weighted_nckd(temperature: float, generator: torch.Generator) -> None:
    student, teacher, target = make_inputs("normal", 20, 9, F64, generator)
    b = target_split(teacher, target, temperature=temperature, backend="reference").log_target
    common = dict(temperature=temperature, reduction="none", backend="reference")
    tckd = dkd_loss(student, teacher, target, alpha=1, beta=0, **common)
    nckd = dkd_loss(student, teacher, target, alpha=0, beta=1, **common)
    close(kd_loss(student, teacher, **common), tckd + (1 - b.exp()) * nckd)


@pytest.mark.parametrize("variant", AEKT_VARIANTS)
@pytest.mark.parametrize("log_ratio_max", [math.log(10), 0.3])
def test_aekt_gradient_is_one_scalar_per_row(
    variant: str, log_ratio_max: float, generator: torch.Generator
) -> None:
    """target: alpha T H; others: T ((beta - alpha H) ph - beta qh), with H named by variant."""
    temperature, alpha, beta = 2.0, 0.7, 3.0
    student, teacher, target = make_inputs("normal", 30, 6, F64, generator)
    p, q = probabilities(student, temperature), probabilities(teacher, temperature)
    b, c = of_target(q, target), of_target(p, target)
    r = (b / c).clamp(max=math.exp(log_ratio_max))
    inside = b / c < math.exp(log_ratio_max)
    assert inside.any() and not inside.all()
    tckd = divergence(binary(q, target), binary(p, target))
    h = {
        "ratio_weighted_tckd": r * (c - b),
        "ratio_weighted_ce": -r * (1 - c),
        "confidence_weighted_ce": -b * (1 - c),
        "ratio_divergence": (1 - r) * (1 - c),
        "ratio_coupled_tckd": r * (c - b) - inside * r * (1 - c) * tckd,
    }[variant].unsqueeze(1)
    ph, qh = p / (1 - c).unsqueeze(1), q / (1 - b).unsqueeze(1)
    others = temperature * ((beta - alpha * h) * ph - beta * qh)
    expected = torch.where(one_hot(target, 6) == 1, alpha * temperature * h, others)

    options = dict(variant=variant, temperature=temperature, alpha=alpha, beta=beta)
    student.requires_grad_()
    loss = aekt_loss(
        student, teacher, target, log_ratio_max=log_ratio_max, reduction="sum",
        backend="reference", **options,
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(loss, student)
    close(gradient, expected, 1e-11)
    close(gradient.sum(1), 0.0, 1e-11)


# ---- derivatives ----------------------------------------------------------------------------

# Factors held constant make the gradient another than that of the value.
DIFFERENTIATED = [case for case in CASES if not case.facts.held(case.all_options)]


def masked_inputs(case: Case, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows that hold everything: plain; -inf in both, in the teacher alone; ignored."""
    student, teacher, target = make_inputs("normal", 4, 5, F64, generator)
    student, teacher = student / 2, teacher / 2
    target[:] = tensor([0, 1, 2, IGNORED])
    student[1, 3] = teacher[1, 3] = -INF
    if not case.lacking:
        teacher[2, 4] = -INF
    return student, teacher, target


@pytest.mark.parametrize("case", DIFFERENTIATED, ids=str)
def test_gradients_of_reference(case: Case, generator: torch.Generator) -> None:
    student, teacher, target = masked_inputs(case, generator)
    logits = (student.requires_grad_(), teacher.requires_grad_())
    logits = logits if case.teacher else logits[:1]

    def rows(student: Tensor, teacher: Tensor | None = None) -> Tensor:
        return case.rows(student, teacher, target, backend="reference")

    assert torch.autograd.gradcheck(rows, logits)
    assert torch.autograd.gradgradcheck(rows, logits)


@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_gradients_of_weights(case: Case, generator: torch.Generator) -> None:
    student, teacher, target = masked_inputs(case, generator)
    weight = tensor([0.5, 2.0, 1.5, 1.0], dtype=F64, requires_grad=True)
    normalizer = tensor(3.0, dtype=F64, requires_grad=True)

    def loss(row_weight: Tensor, normalizer: Tensor) -> Tensor:
        return case(
            student, teacher, target, backend="reference", row_weight=row_weight,
            normalizer=normalizer,
        )  # fmt: skip

    assert torch.autograd.gradcheck(loss, (weight, normalizer))
    assert torch.autograd.gradgradcheck(loss, (weight, normalizer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_16_bit_logits_are_computed_in_float32(
    dtype: torch.dtype, generator: torch.Generator
) -> None:
    student, teacher, target = make_inputs("normal", 8, 11, dtype, generator)
    loss = kd_loss(student, teacher, target, backend="reference")
    assert loss.dtype == torch.float32
    assert loss == kd_loss(student.float(), teacher.float(), target, backend="reference")
