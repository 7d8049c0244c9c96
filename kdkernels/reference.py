"""The losses in plain differentiable PyTorch: the truth that every kernel is tested against.

Each function takes class-last logits `(..., classes)`, an integer target `(...)`, and returns one
loss per row `(...)`; with `parts=True`, stacked in front of the distillation and the cross-entropy
of which it is the weighted sum, `(3, ...)`. Everything is the published formula on top of
`log_softmax`; gradients are autograd's. No closed-form gradient and no algebra of the kernels is
used here, so that a mistake there cannot repeat itself here.

float16 and bfloat16 logits are computed in float32; float64 in float64, and all of them where the
temperature of student and teacher is large, or is a tensor. Rows whose target is
`ignore_index`, or whose `row_weight` is 0, give 0 and a zero gradient whatever they hold. Rows
whose target is out of range give NaN, and so does every other row with a NaN among the logits of
student or teacher, whatever is infinite beside it and whichever terms are switched off. Logits of
-inf are exact: 0 * log 0 = 0, and neither a value nor a first or second derivative turns NaN
because of them, as long as a row has one finite logit.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

# The position of a variant in this tuple is its number in the parameters of the `aekt` op.
AEKT_VARIANTS = (
    "ratio_weighted_tckd",
    "ratio_weighted_ce",
    "confidence_weighted_ce",
    "ratio_divergence",
    "ratio_coupled_tckd",
)

# Above it, losses of student and teacher are computed in float64 whatever the dtype of the logits:
# T^2 times a difference of logarithms would leave of float32 no more than 1e-7 T^2.
LARGE_TEMPERATURE = 32.0

# Of the alpha-beta divergence: a parameter below it is taken to be 0.
AB_LIMIT = 1e-4

_NEG_INF = -math.inf
_LOG_10 = math.log(10.0)
Number = float | Tensor  # a parameter; a tensor is 0-d


def kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: Number = 4.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    teacher_temperature: Number | None = None,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Knowledge distillation, T^2 KL(q || p) with p, q the softmax at T of student and teacher.

    The teacher's may have a temperature of its own. Without t_squared the factor T^2 is left out,
    here and in all the others. Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural
    Network", arXiv 1503.02531, section 2.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    if teacher_temperature is None:
        teacher_temperature = temperature
    log_p = torch.log_softmax(_at(rows.student, temperature), dim=-1)
    log_q = torch.log_softmax(_at(rows.teacher, teacher_temperature), dim=-1)
    distillation = _gain(temperature, t_squared) * _divergence(log_q, log_p)
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def reverse_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: Number = 1.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Reverse KL, T^2 KL(p || q): infinite where the student has a class that the teacher has not.

    Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    log_p, log_q = _log_softmaxes(rows, temperature)
    distillation = _gain(temperature, t_squared) * _reverse_divergence(log_p, log_q)
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def mixed_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: Number = 1.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    ratio: Number = 0.5,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Forward and reverse KL, T^2 (ratio KL(q || p) + (1 - ratio) KL(p || q)).

    As NeMo-RL and torchtune have it, which calls it symmetric KL.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    log_p, log_q = _log_softmaxes(rows, temperature)
    distillation = rows.nothing()
    if not _is_zero(ratio):
        distillation = distillation + _weighted(ratio, _divergence(log_q, log_p))
    if not _is_zero(1 - ratio):
        distillation = distillation + _weighted(1 - ratio, _reverse_divergence(log_p, log_q))
    distillation = _gain(temperature, t_squared) * distillation
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def jsd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: Number = 1.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    beta: Number = 0.5,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Generalised Jensen-Shannon divergence, with m = beta q + (1 - beta) p

        T^2 (beta KL(q || m) + (1 - beta) KL(p || m));

    beta = 0 is KL(q || p) and beta = 1 is KL(p || q), as TRL switches the formula there; they are
    not its limits. Agarwal et al., "On-Policy Distillation of Language Models" (GKD), arXiv
    2306.13649, equation 1.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    log_p, log_q = _log_softmaxes(rows, temperature)
    if isinstance(beta, Tensor):  # which of the three it is, is not looked at
        forward, reverse = beta <= 0, beta >= 1
        value = _jensen_shannon(log_p, log_q, torch.where(forward | reverse, 0.5, beta))
        # One that is not taken is of equal distributions: its derivatives are 0 then, not NaN.
        same = log_q.detach()
        to, of = (torch.where(forward, x, same) for x in (log_p, log_q))
        value = torch.where(forward, _divergence(of, to), value)
        of, to = (torch.where(reverse, x, same) for x in (log_p, log_q))
        value = torch.where(reverse, _reverse_divergence(of, to), value)
    elif beta <= 0:
        value = _divergence(log_q, log_p)
    elif beta >= 1:
        value = _reverse_divergence(log_p, log_q)
    else:
        value = _jensen_shannon(log_p, log_q, beta)
    distillation = _gain(temperature, t_squared) * value
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def skew_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: Number = 1.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    alpha: Number = 0.1,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Skew KL, T^2 KL(q || alpha q + (1 - alpha) p): alpha = 0 is KL(q || p), alpha = 1 is 0.

    Ko et al., "DistiLLM: Towards Streamlined Distillation for Large Language Models", arXiv
    2402.03898, equation 2.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    log_p, log_q = _log_softmaxes(rows, temperature)
    value = _divergence(log_q, _log_mixture(log_q, log_p, *_shares(alpha)))
    distillation = _gain(temperature, t_squared) * value
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def skew_reverse_kl(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: Number = 1.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    alpha: Number = 0.1,
    detach_mixture: bool | Tensor = False,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Skew reverse KL, T^2 KL(p || m) with m = alpha p + (1 - alpha) q.

    With detach_mixture m is not differentiated by the student. Ko et al., DistiLLM, arXiv
    2402.03898, and DistiLLM-2, arXiv 2503.07067, which detaches.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    log_p, log_q = _log_softmaxes(rows, temperature)
    if isinstance(detach_mixture, Tensor):  # not read: it may lie on a device
        in_mixture = torch.where(detach_mixture != 0, log_p.detach(), log_p)
    else:
        in_mixture = log_p.detach() if detach_mixture else log_p
    value = _reverse_divergence(log_p, _log_mixture(in_mixture, log_q, *_shares(alpha)))
    distillation = _gain(temperature, t_squared) * value
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def tvd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: Number = 1.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = False,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Total variation distance, 1/2 sum |p - q|; where p_i = q_i its gradient is 0.

    Wen et al., "f-Divergence Minimization for Sequence-Level Knowledge Distillation", arXiv
    2307.15190.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    log_p, log_q = _log_softmaxes(rows, temperature)
    value = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(dim=-1)
    distillation = _gain(temperature, t_squared) * value
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def ab(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    temperature: Number = 1.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    alpha: Number = 0.5,
    beta: Number = 0.5,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Alpha-beta divergence, T^2 times

        -1 / (a b) sum (q^a p^b - a / (a + b) q^(a + b) - b / (a + b) p^(a + b))

    with a = alpha, b = beta, each from 0 to 1; below AB_LIMIT it is taken to be 0, and the formula
    to be its limit. Computed in float64 whatever the logits are, because its terms cancel. Wang et
    al., "ABKD: Pursuing a Proper Allocation of the Probability Mass in Knowledge Distillation via
    alpha-beta-Divergence", arXiv 2505.04560. Its code divides by b, and by a, what the limits have
    divided by their squares.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    log_p, log_q = (
        torch.log_softmax(_at(x.double(), temperature), dim=-1)
        for x in (rows.student, rows.teacher)
    )
    numbers = [torch.as_tensor(x, dtype=torch.float64) for x in (alpha, beta)]
    distillation = _gain(temperature, t_squared) * _alpha_beta(log_p, log_q, *numbers)
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: Number = 4.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    alpha: Number = 1.0,
    beta: Number = 8.0,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Decoupled distillation, T^2 (alpha TCKD + beta NCKD).

    TCKD is the divergence of the binary distributions (target, not target), NCKD that of the
    distributions over the non-target classes. Zhao et al., "Decoupled Knowledge Distillation",
    arXiv 2203.08679, equations 5 to 7.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    distillation = rows.nothing()
    if not _is_zero(alpha):
        binary = _binary_divergence(rows, temperature)
        distillation = distillation + _weighted(_gain(temperature, t_squared) * alpha, binary)
    if not _is_zero(beta):
        rest = _non_target_divergence(rows, temperature)
        distillation = distillation + _weighted(_gain(temperature, t_squared) * beta, rest)
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def nkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: Number = 1.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    gamma: Number = 1.5,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Normalised distillation, -b log c - gamma T^2 sum over i != y of qh_i log ph_i.

    b and c are the target probabilities of teacher and student at temperature 1, qh and ph the
    distributions over the non-target classes at temperature T. Both terms are cross-entropies,
    so the minimum is not 0. Yang et al., "From Knowledge Distillation to Self-Knowledge
    Distillation: A Unified Approach with Normalized Loss and Customized Soft Labels", arXiv
    2303.13005 (first as 2208.10139), the NKD loss.
    """
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    log_c, _ = _log_target(rows.student, rows.hot)
    log_b, _ = _log_target(rows.teacher, rows.hot)
    distillation = _times(log_b.exp(), -log_c)
    if not _is_zero(gamma):
        _, log_ph = _non_target(_at(rows.student, temperature), rows.hot)
        qh, _ = _non_target(_at(rows.teacher, temperature), rows.hot)
        rest = _times(qh, -log_ph).sum(dim=-1)
        distillation = distillation + _weighted(gamma * _gain(temperature, t_squared), rest)
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def tf_nkd(
    student: Tensor,
    target: Tensor,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    mean_confidence: float | Tensor | None = None,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Teacher-free NKD, -w log c with w = c + 1 - mean(c), not differentiated.

    c is the target probability at temperature 1 and its mean runs over the rows that are read
    and are not NaN, unless `mean_confidence` gives it. Yang et al., "Rethinking Knowledge
    Distillation via Cross-Entropy", arXiv 2208.10139, the tf-NKD loss.
    """
    rows = _open(student, None, target, ignore_index, row_weight)
    log_c, _ = _log_target(rows.student, rows.hot)
    confidence = log_c.detach().exp()
    if mean_confidence is None:
        counted = rows.alive & rows.valid & ~confidence.isnan()
        total = torch.where(counted, confidence, 0.0).sum()
        mean_confidence = total / counted.sum().clamp(min=1)
    elif isinstance(mean_confidence, Tensor):
        mean_confidence = mean_confidence.detach()
    distillation = _times(confidence + 1 - mean_confidence, -log_c)
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def aekt(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: Number = 4.0,
    kd_weight: Number = 1.0,
    ce_weight: Number = 0.0,
    label_smoothing: Number = 0.0,
    t_squared: bool = True,
    alpha: Number = 1.0,
    beta: Number = 8.0,
    variant: str | Number = "ratio_weighted_tckd",
    log_ratio_max: Number = _LOG_10,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    parts: bool = False,
) -> Tensor:
    """Adaptive explicit knowledge transfer, T^2 (alpha phi(c; b) + beta NCKD).

    Park and Lee, "Adaptive Explicit Knowledge Transfer for Knowledge Distillation", arXiv
    2409.01679. The preprint is public, but its full text was not available when this was built.
    The five forms of phi are ours, derived from a published summary of it (the student learns the
    teacher's target confidence b, adaptively, by its ratio to its own confidence c), and none is
    claimed to be the paper's loss. With r = exp(min(log b - log c, log_ratio_max)):

    ratio_weighted_tckd      r TCKD, r not differentiated
    ratio_weighted_ce        -r log c, r not differentiated
    confidence_weighted_ce   -b log c
    ratio_divergence         r - log r - 1, continued linearly in log r beyond log_ratio_max
    ratio_coupled_tckd       r TCKD, r differentiated where it is not clamped
    """
    name = variant if isinstance(variant, str) else AEKT_VARIANTS[int(variant)]
    rows = _open(student, teacher, target, ignore_index, row_weight, temperature)
    distillation = rows.nothing()
    if not _is_zero(alpha):
        phi = _explicit_knowledge(rows, temperature, name, log_ratio_max)
        distillation = distillation + _weighted(_gain(temperature, t_squared) * alpha, phi)
    if not _is_zero(beta):
        rest = _non_target_divergence(rows, temperature)
        distillation = distillation + _weighted(_gain(temperature, t_squared) * beta, rest)
    return rows.weigh(distillation, kd_weight, ce_weight, label_smoothing, parts)


def cross_entropy(
    student: Tensor,
    target: Tensor,
    label_smoothing: Number = 0.0,
    z_weight: Number = 0.0,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Ordinary cross-entropy at temperature 1, -log c, with label smoothing as torch's.

    It spreads over the classes that are not at -inf: (1 - e) (-log c) + e mean(-log p_i). Szegedy
    et al., "Rethinking the Inception Architecture for Computer Vision", arXiv 1512.00567. With
    z_weight, z_weight * logsumexp(z)^2 on top: Chowdhery et al., "PaLM", arXiv 2204.02311.
    """
    rows = _open(student, None, target, ignore_index, row_weight)
    loss = rows.cross_entropy(label_smoothing)
    if not _is_zero(z_weight):
        loss = loss + _weighted(z_weight, rows.student.logsumexp(dim=-1).square())
    return rows.close(loss)


def target_split(
    logits: Tensor,
    target: Tensor,
    temperature: Number = 1.0,
    *,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
) -> Tensor:
    """Target and rest of softmax(z/T): log c, log(1 - c) and the logsumexp of z_i/T over i != y.

    Returns the three stacked in front, `(3, ...)`. The split is that of DKD, arXiv 2203.08679,
    section 3.1.
    """
    rows = _open(logits, None, target, ignore_index, row_weight)
    scaled = _at(rows.student, temperature)
    log_c, log_rest = _log_target(scaled, rows.hot)
    return rows.close(torch.stack((log_c, log_rest, _logsumexp_rest(scaled, rows.hot))))


class _Rows(NamedTuple):
    """Logits in the compute dtype; rows that must not be read are zeros."""

    student: Tensor
    teacher: Tensor
    hot: Tensor  # (..., classes), true at the target
    alive: Tensor  # (...), false where the row is ignored or has weight 0
    valid: Tensor  # (...), false where the target is out of range or a logit is NaN
    weight: Tensor | None
    target: bool  # whether there is one
    dtype: torch.dtype  # of the loss

    def nothing(self) -> Tensor:
        """Zeros that are differentiable, for losses whose weights are all 0."""
        return self.student[..., :0].sum(dim=-1)

    def cross_entropy(self, label_smoothing: Number) -> Tensor:
        if not self.target:
            return self.nothing()
        log_c, _ = _log_target(self.student, self.hot)
        if _is_zero(label_smoothing):
            return -log_c
        counted = self.student != _NEG_INF
        log_p = torch.log_softmax(self.student, dim=-1)
        share = counted.sum(dim=-1, keepdim=True).to(log_p.dtype).reciprocal()
        mean = -(torch.where(counted, log_p, 0.0) * share).sum(dim=-1)  # sums of finfo.min overflow
        return _weighted(1 - label_smoothing, -log_c) + _weighted(label_smoothing, mean)

    def weigh(
        self,
        distillation: Tensor,
        kd_weight: Number,
        ce_weight: Number,
        label_smoothing: Number,
        parts: bool,
    ) -> Tensor:
        """The loss from its distillation; with parts stacked in front of it and the cross-entropy.

        The parts carry no gradient: where they are infinite it would make the loss's NaN.
        """
        terms = [(kd_weight, distillation)]
        if parts or not _is_zero(ce_weight):
            terms.append((ce_weight, self.cross_entropy(label_smoothing)))
        loss = self.nothing()
        for weight, term in terms:
            if not _is_zero(weight):
                loss = loss + _weighted(weight, term)
        if not parts:
            return self.close(loss)
        return self.close(torch.stack((loss, *(term.detach() for _, term in terms))))

    def close(self, loss: Tensor) -> Tensor:
        loss = torch.where(self.valid, loss, math.nan)
        loss = torch.where(self.alive, loss, 0.0)
        return (loss if self.weight is None else loss * self.weight).to(self.dtype)


def _open(
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    ignore_index: int,
    row_weight: Tensor | None,
    temperature: Number = 1.0,
) -> _Rows:
    double = torch.float64 in (student.dtype, student.dtype if teacher is None else teacher.dtype)
    loss_dtype = torch.float64 if double else torch.float32
    large = isinstance(temperature, Tensor) or temperature > LARGE_TEMPERATURE
    dtype = torch.float64 if large else loss_dtype
    shape, classes = student.shape[:-1], student.shape[-1]
    alive = torch.ones(shape, dtype=torch.bool, device=student.device)
    valid = alive
    # Class -1 exists in no row: without a target nothing is hot.
    index = torch.full(shape, -1, device=student.device)
    if target is not None:
        index = target.long()
        alive = index != ignore_index
        valid = ((index >= 0) & (index < classes)) | ~alive
    if row_weight is not None:
        row_weight = row_weight.to(dtype)
        alive = alive & (row_weight != 0)
    hot = torch.arange(classes, device=student.device) == index.unsqueeze(-1)

    def read(logits: Tensor) -> Tensor:
        return torch.where(alive.unsqueeze(-1), logits.to(dtype), 0.0)

    student = read(student)
    teacher = student if teacher is None else read(teacher)
    valid = valid & ~(student.isnan() | teacher.isnan()).any(dim=-1)
    # Such a row is NaN, and by this product its gradient too.
    poison = torch.where(valid, 1.0, math.nan).to(dtype).unsqueeze(-1)
    logits = (student * poison, teacher * poison)
    return _Rows(*logits, hot, alive, valid, row_weight, target is not None, loss_dtype)


def _gain(temperature: Number, t_squared: bool | Tensor) -> Number:
    """What makes up for gradients that shrink with T."""
    if isinstance(t_squared, Tensor):
        return torch.where(t_squared != 0, temperature**2, 1.0)
    return temperature**2 if t_squared else 1.0


def _at(logits: Tensor, temperature: Number) -> Tensor:
    """Logits at a temperature; what is -inf has no derivative by it, and not NaN."""
    if not isinstance(temperature, Tensor):
        return logits / temperature
    none = logits == _NEG_INF
    return torch.where(none, _NEG_INF, torch.where(none, 0.0, logits) / temperature)


def _log_softmaxes(rows: _Rows, temperature: Number) -> tuple[Tensor, Tensor]:
    """log p and log q, of student and teacher."""
    log_p = torch.log_softmax(_at(rows.student, temperature), dim=-1)
    return log_p, torch.log_softmax(_at(rows.teacher, temperature), dim=-1)


def _divergence(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q || p); what depends on q is data."""
    return _times(log_q.exp(), log_q - log_p).sum(dim=-1)


def _reverse_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) as a function of p.

    Infinite where p has a class that q has not. Its gradient then is p (h - sum p h) with
    h = log(p / q) and 0 for such classes: without them sum p is no constant, and its derivative is
    taken away.
    """
    lacking = (log_q == _NEG_INF) & (log_p != _NEG_INF)
    p = log_p.exp()
    kept = torch.where(lacking, 0.0, p)
    value = _times(kept, torch.where(lacking, 0.0, log_p - log_q)).sum(dim=-1)
    value = value - (kept - kept.detach()).sum(dim=-1)
    return value + torch.where(lacking.any(dim=-1), math.inf, 0.0)


def _shares(alpha: Number) -> tuple[Tensor, Tensor]:
    """alpha and 1 - alpha, of which float32 may hold either and not their sum."""
    if not isinstance(alpha, Tensor):
        alpha = torch.tensor(alpha, dtype=torch.float64)
    return alpha.double(), 1 - alpha.double()


def _log_mixture(log_a: Tensor, log_b: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """log(a exp(log_a) + b exp(log_b)) of shares a and b."""
    a, b = (x.to(log_a.device, log_a.dtype) for x in (a, b))
    # Not by their logarithms, whose derivative at 0 is infinite.
    neither = (log_a == _NEG_INF) & (log_b == _NEG_INF)
    largest = torch.where(neither, 0.0, torch.maximum(log_a, log_b)).detach()
    sum_ = a * (log_a - largest).exp() + b * (log_b - largest).exp()
    # Then it has the gradient of what it is made of. 1 / sum_ must not overflow.
    nothing = sum_ < torch.finfo(sum_.dtype).tiny
    none = torch.where(a == 0, log_b, log_a)
    return torch.where(nothing, none, largest + torch.where(nothing, 1.0, sum_).log())


def _jensen_shannon(log_p: Tensor, log_q: Tensor, beta: Number) -> Tensor:
    of_teacher, of_student = _shares(beta)
    log_m = _log_mixture(log_q, log_p, of_teacher, of_student)
    to_teacher, to_student = _divergence(log_q, log_m), _divergence(log_p, log_m)
    return of_teacher.to(log_p.device) * to_teacher + of_student.to(log_p.device) * to_student


def _power(log_x: Tensor, exponent: Tensor) -> Tensor:
    """x^exponent, 0 of x = 0, where no derivative is taken either."""
    nothing = log_x == _NEG_INF
    return torch.where(nothing, 0.0, (exponent * torch.where(nothing, 0.0, log_x)).exp())


def _alpha_beta(log_p: Tensor, log_q: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The divergence, or the limit of it that a and b, which are not looked at, lie at."""
    a, b = a.to(log_p.device), b.to(log_p.device)
    no_a, no_b = a < AB_LIMIT, b < AB_LIMIT
    forms = [
        (~no_a & ~no_b, _alpha_beta_inside),
        (no_a & ~no_b, lambda p, q, _, b: _alpha_beta_limit(p, q, b)),
        (~no_a & no_b, lambda p, q, a, _: _alpha_beta_limit(q, p, a)),
        (no_a & no_b, lambda p, q, *_: _squared_log_ratio(p, q)),
    ]
    # Those that are not taken are of equal distributions and ordinary numbers, where all
    # derivatives are 0: they would be NaN elsewhere.
    same = log_q.detach()
    value = torch.zeros_like(log_p[..., 0])
    for taken, form in forms:
        p, q = (torch.where(taken, x, same) for x in (log_p, log_q))
        numbers = (torch.where(taken & ~no, x, 0.5) for x, no in ((a, no_a), (b, no_b)))
        value = torch.where(taken, form(p, q, *numbers), value)
    return value


def _alpha_beta_inside(log_p: Tensor, log_q: Tensor, a: Tensor, b: Tensor) -> Tensor:
    joint = _power(log_q, a) * _power(log_p, b)
    rest = a / (a + b) * _power(log_q, a + b) + b / (a + b) * _power(log_p, a + b)
    return -(joint - rest).sum(dim=-1) / (a * b)


def _alpha_beta_limit(log_x: Tensor, log_y: Tensor, c: Tensor) -> Tensor:
    """Of x = p, y = q, c = b where a = 0, and of x = q, y = p, c = a where b = 0:
    sum (x^c log(x^c / y^c) - x^c + y^c) / c^2.

    Infinite where x has a class that y has not. Such classes have no part in its gradient.
    """
    lacking = (log_y == _NEG_INF) & (log_x != _NEG_INF)
    x = torch.where(lacking, 0.0, _power(log_x, c))
    ratio = torch.where(x == 0, 0.0, log_x - log_y)
    value = (x * (c * ratio) - x + _power(log_y, c)).sum(dim=-1) / c**2
    return value + torch.where(lacking.any(dim=-1), math.inf, 0.0)


def _squared_log_ratio(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum (log p - log q)^2 / 2; infinite where one has a class that the other has not."""
    lacking = (log_p == _NEG_INF) != (log_q == _NEG_INF)
    apart = torch.where((log_p == _NEG_INF) | (log_q == _NEG_INF), 0.0, log_p - log_q)
    return apart.square().sum(dim=-1) / 2 + torch.where(lacking.any(dim=-1), math.inf, 0.0)


def _is_zero(weight: Number) -> bool:
    """Whether a term is left out. A tensor's value is never looked at."""
    return not isinstance(weight, Tensor) and weight == 0


def _weighted(weight: Number, term: Tensor) -> Tensor:
    """weight * term where a weight of 0 wins over an infinite term."""
    if isinstance(weight, Tensor) or weight == 0:
        term = torch.where(term.isinf() & (weight == 0), 0.0, term)
    return weight * term


def _times(probability: Tensor, value: Tensor) -> Tensor:
    """probability * value with 0 * inf = 0, in the derivatives as well."""
    return probability * torch.where(probability == 0, 0.0, value)


def _without_target(logits: Tensor, hot: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with the target at -inf, and whether a row has any other class left (..., 1)."""
    rest = torch.where(hot, _NEG_INF, logits)
    return rest, (rest != _NEG_INF).any(dim=-1, keepdim=True)


def _logsumexp_rest(logits: Tensor, hot: Tensor) -> Tensor:
    rest, some = _without_target(logits, hot)
    logsumexp = torch.where(some, rest, 0.0).logsumexp(dim=-1)
    return torch.where(some.squeeze(-1), logsumexp, _NEG_INF)


def _non_target(logits: Tensor, hot: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities and their logarithms over the classes other than the target.

    With no other class left the probabilities are 0, and the logarithms, -inf, still carry
    gradients: those of ph_i = 0, as where the student lacks a single class of the teacher.
    """
    rest, some = _without_target(logits, hot)
    log_probability = torch.log_softmax(torch.where(some, rest, 0.0), dim=-1)
    probability = torch.where(some, log_probability.exp(), 0.0)
    return probability, torch.where(some, log_probability, rest)


def _log_target(logits: Tensor, hot: Tensor) -> tuple[Tensor, Tensor]:
    """log c and log(1 - c), c being the probability of the target.

    Of the two, the logarithm of what is near 1 is taken as log1p of the other probability, so
    both keep their relative accuracy.
    """
    log_p = torch.log_softmax(logits, dim=-1)
    log_c = torch.where(hot, log_p, 0.0).sum(dim=-1)
    rest, some = _without_target(log_p, hot)
    log_rest = torch.where(some, rest, 0.0).logsumexp(dim=-1)
    # With no other class left, log(1 - c) = -inf keeps its gradient by the target, -c.
    log_none = _NEG_INF - logits.logsumexp(dim=-1)
    log_rest = torch.where(some.squeeze(-1), log_rest, log_none)
    return _accurate_near_one(log_c, log_rest), _accurate_near_one(log_rest, log_c)


def _accurate_near_one(log_a: Tensor, log_b: Tensor) -> Tensor:
    """log a for a + b = 1."""
    b = log_b.exp()
    small = b < 0.5
    return torch.where(small, torch.log1p(-torch.where(small, b, 0.0)), log_a)


def _binary_divergence(rows: _Rows, temperature: Number) -> Tensor:
    """TCKD: b log(b/c) + (1-b) log((1-b)/(1-c))."""
    log_c, log_c_rest = _log_target(_at(rows.student, temperature), rows.hot)
    log_b, log_b_rest = _log_target(_at(rows.teacher, temperature), rows.hot)
    target = _times(log_b.exp(), log_b - log_c)
    return target + _times(log_b_rest.exp(), log_b_rest - log_c_rest)


def _non_target_divergence(rows: _Rows, temperature: Number) -> Tensor:
    """NCKD: the sum over i != y of qh_i log(qh_i / ph_i)."""
    _, log_ph = _non_target(_at(rows.student, temperature), rows.hot)
    qh, log_qh = _non_target(_at(rows.teacher, temperature), rows.hot)
    return _times(qh, log_qh - log_ph).sum(dim=-1)


def _explicit_knowledge(
    rows: _Rows, temperature: Number, variant: str, log_ratio_max: Number
) -> Tensor:
    """phi(c; b) of AEKT."""
    log_c, _ = _log_target(_at(rows.student, temperature), rows.hot)
    log_b, _ = _log_target(_at(rows.teacher, temperature), rows.hot)
    neither = (log_b == _NEG_INF) & (log_c == _NEG_INF)
    log_ratio = torch.where(neither, 0.0, log_b - log_c)
    # Not clamp(), whose gradient at NaN is 0.
    clamped = torch.where(log_ratio > log_ratio_max, log_ratio_max, log_ratio)
    ratio = clamped.exp()

    def ratio_divergence() -> Tensor:
        beyond = (log_ratio - log_ratio_max).clamp(min=0)
        bound = log_ratio_max
        slope = bound.expm1() if isinstance(bound, Tensor) else math.expm1(bound)
        return clamped.expm1() - clamped + slope * beyond

    def ratio_coupled_tckd() -> Tensor:
        divergence = _binary_divergence(rows, temperature)
        # (1 - c) TCKD vanishes as c goes to 1, although TCKD is infinite there.
        return _times(torch.where(divergence.isinf(), ratio.detach(), ratio), divergence)

    # _times: a teacher with b = 0 has no say in the weighted forms, even where log c is -inf.
    forms: dict[str, Callable[[], Tensor]] = {
        "ratio_weighted_tckd": lambda: _times(
            ratio.detach(), _binary_divergence(rows, temperature)
        ),
        "ratio_weighted_ce": lambda: _times(torch.where(neither, 0.0, ratio.detach()), -log_c),
        "confidence_weighted_ce": lambda: _times(log_b.exp(), -log_c),
        "ratio_divergence": ratio_divergence,
        "ratio_coupled_tckd": ratio_coupled_tckd,
    }
    return forms[variant]()


# ---- the list ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loss:
    """What is known of a loss. Its parameters are the formula's, in order."""

    reference: Callable[..., Tensor]
    teacher: bool = True
    target: bool = True  # whether one is required
    outputs: int = 1
    means: Mapping[str, str] = field(default_factory=dict)  # of parameters, by a kind of number
    choices: tuple[str, ...] = ()  # parameters that the formula branches on, not a number
    soft_target: bool = False  # whether one of probabilities is taken, of which the largest counts

    params: tuple[str, ...] = field(init=False)  # their names, in the operators' order
    temperature: bool = field(init=False)  # whether the first one is one
    parts: bool = field(init=False)  # whether it is weighed against a cross-entropy, and gives both

    def __post_init__(self) -> None:
        signature = inspect.signature(self.reference).parameters.values()
        positional = [x.name for x in signature if x.kind is x.POSITIONAL_OR_KEYWORD]
        params = tuple(positional[3 if self.teacher else 2 :])  # behind the tensors
        # While a graph is traced nothing could be worked out.
        object.__setattr__(self, "params", params)
        object.__setattr__(self, "temperature", params[:1] == ("temperature",))
        object.__setattr__(self, "parts", "kd_weight" in params)


# The list of losses: one line each.
LOSSES = {
    "kd": Loss(kd, target=False),
    "dkd": Loss(dkd),
    "nkd": Loss(nkd, soft_target=True),
    "aekt": Loss(aekt, choices=("variant",)),
    "reverse_kl": Loss(reverse_kl, target=False),
    "mixed_kl": Loss(mixed_kl, target=False),
    "jsd": Loss(jsd, target=False, means={"beta": "mixed share"}),
    "skew_kl": Loss(skew_kl, target=False, means={"alpha": "mixed share"}),
    "skew_reverse_kl": Loss(skew_reverse_kl, target=False, means={"alpha": "mixed share"}),
    "tvd": Loss(tvd, target=False),
    "ab": Loss(ab, target=False, means={"alpha": "share", "beta": "share"}),
    "cross_entropy": Loss(cross_entropy, teacher=False),
    "target_split": Loss(target_split, teacher=False, outputs=3),
}
