"""The fastest formulas of the losses in plain PyTorch that we know: what one could write today.

The same values as those of `eager`, by fewer and cheaper tensors: one log-softmax of each tensor
where the published code takes several softmaxes and masks, and the divergence of the non-target
classes from that of all classes by the chain rule, NCKD = (KL - TCKD) / (1 - b). They were the
fastest of several on one CPU; elsewhere another may be. Accuracy pays for it: 1 - b and 1 - c
cancel where the teacher or the student is sure of the target, which costs digits and in the end
gives NaN.

Every function takes and returns what those of `eager` do; 16-bit logits are upcast as there. tf-NKD
and cross-entropy have none: what is published is the fastest already.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.eager import _upcast, cross_entropy


def _log_softmaxes(student: Tensor, teacher: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    log_p = F.log_softmax(_upcast(student) / temperature, dim=1)
    return log_p, F.log_softmax(_upcast(teacher) / temperature, dim=1)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(q || p) of each row."""
    return torch.linalg.vecdot(log_q.exp(), log_q - log_p)


def kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    teacher_temperature: float | None = None,
) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), the teacher's T perhaps its own."""
    log_p = F.log_softmax(_upcast(student) / temperature, dim=1)
    log_q = F.log_softmax(_upcast(teacher) / (teacher_temperature or temperature), dim=1)
    return F.kl_div(log_p, log_q, log_target=True, reduction="batchmean") * temperature**2


def kd_ce(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """KD plus F.cross_entropy."""
    return kd(student, teacher, target, temperature) + cross_entropy(student, teacher, target)


def _decoupled(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, without T^2: TCKD, NCKD, log b - log c."""
    log_p, log_q = _log_softmaxes(student, teacher, temperature)
    log_c, log_b = (x.gather(1, target[:, None])[:, 0] for x in (log_p, log_q))
    b, log_ratio = log_b.exp(), log_b - log_c
    tckd = b * log_ratio + (1.0 - b) * (torch.log1p(-b) - torch.log1p(-log_c.exp()))
    return tckd, (_divergence(log_p, log_q) - tckd) / (1.0 - b), log_ratio


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """T^2 (alpha TCKD + beta NCKD)."""
    tckd, nckd, _ = _decoupled(student, teacher, target, temperature)
    return (alpha * tckd + beta * nckd).mean() * temperature**2


def aekt(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    log_ratio_max: float = math.log(10.0),
) -> Tensor:
    """kdkernels' default variant: DKD with each row's TCKD times the detached ratio, at most 10."""
    tckd, nckd, log_ratio = _decoupled(student, teacher, target, temperature)
    ratio = log_ratio.detach().clamp(max=log_ratio_max).exp()
    return (alpha * ratio * tckd + beta * nckd).mean() * temperature**2


def nkd(student: Tensor, teacher: Tensor, target: Tensor, gamma: float = 1.5) -> Tensor:
    """NKD at T = 1: -b log c + gamma times the cross-entropy of the non-target softmaxes."""
    log_p, q = F.log_softmax(_upcast(student), dim=1), F.softmax(_upcast(teacher), dim=1)
    log_c, b = (x.gather(1, target[:, None])[:, 0] for x in (log_p, q))
    explicit = -b * log_c
    rest = (-torch.linalg.vecdot(q, log_p) - explicit) / (1.0 - b) + torch.log1p(-log_c.exp())
    return (explicit + gamma * rest).mean()


def reverse_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """KL(p || q) at T = 1."""
    log_p, log_q = _log_softmaxes(student, teacher, 1.0)
    return _divergence(log_q, log_p).mean()


def mixed_kl(student: Tensor, teacher: Tensor, target: Tensor, ratio: float = 0.5) -> Tensor:
    """Both directions in one product: sum of (ratio q - (1 - ratio) p) log(q / p)."""
    log_p, log_q = _log_softmaxes(student, teacher, 1.0)
    weights = torch.lerp(-log_p.exp(), log_q.exp(), ratio)
    return torch.linalg.vecdot(weights, log_q - log_p).mean()


def _mixed(student: Tensor, teacher: Tensor, of_teacher: float) -> tuple[Tensor, ...]:
    """log p, log q, log m with m = of_teacher q + (1 - of_teacher) p, at T = 1."""
    log_p, log_q = _log_softmaxes(student, teacher, 1.0)
    return log_p, log_q, torch.lerp(log_p.exp(), log_q.exp(), of_teacher).log()


def jsd(student: Tensor, teacher: Tensor, target: Tensor, beta: float = 0.5) -> Tensor:
    """beta KL(q || m) + (1 - beta) KL(p || m), the mixture m taken of probabilities."""
    log_p, log_q, log_m = _mixed(student, teacher, beta)
    to_teacher, to_student = _divergence(log_m, log_q), _divergence(log_m, log_p)
    return (beta * to_teacher + (1.0 - beta) * to_student).mean()


def skew_kl(student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(q || m) with m = alpha q + (1 - alpha) p."""
    _, log_q, log_m = _mixed(student, teacher, alpha)
    return _divergence(log_m, log_q).mean()


def skew_reverse_kl(student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 0.1) -> Tensor:
    """KL(p || m) with m = alpha p + (1 - alpha) q."""
    log_p, _, log_m = _mixed(student, teacher, 1.0 - alpha)
    return _divergence(log_m, log_p).mean()


def ab(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 0.5, beta: float = 0.5
) -> Tensor:
    """The alpha-beta divergence by three exponentials: of q^a p^b, q^(a + b) and p^(a + b)."""
    log_p, log_q = _log_softmaxes(student, teacher, 1.0)
    both = alpha + beta
    joint = torch.add(alpha * log_q, log_p, alpha=beta).exp().sum(1)
    rest = alpha * (both * log_q).exp().sum(1) + beta * (both * log_p).exp().sum(1)
    return (rest / both - joint).mean() / (alpha * beta)
