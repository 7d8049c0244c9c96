"""The losses as their authors publish them, in eager PyTorch: what the kernels are compared with.

Written anew from the published formulations, operation for operation, so that time and memory are
those of the code people run today: megvii-research/mdistiller (KD, DKD), yzd-v/cls_KD (NKD in its
final form, tf-NKD), huggingface/trl (generalised JSD), pytorch/torchtune (reverse and symmetric KL)
and jongwooko/distillm (skew KL, skew reverse KL, total variation). No code of AEKT was found;
`aekt` is what kdkernels' derived default costs when it is built on mdistiller's DKD.

These are baselines, not a reference. They keep on purpose what the originals do badly: logarithms
of probabilities that may be 0, a mask of -1000, one full tensor per step.

Every function takes raw logits (rows, classes) and a target (rows,) and returns the mean over the
rows. 16-bit logits are upcast to float32 first, which is the correct use of the originals: they
were written for float32 logits, and softmaxes rounded to 16 bits are too coarse for a loss. Under
torch.compile the upcast is part of the compiled region and is fused into it.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _upcast(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def cross_entropy(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Ordinary cross-entropy; the teacher is not looked at."""
    return F.cross_entropy(_upcast(student), target)


def kd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    teacher_temperature: float | None = None,
) -> Tensor:
    """mdistiller's KD: T^2 KL(softmax(teacher / T) || softmax(student / T)); the teacher's
    temperature may be one of its own."""
    log_p = F.log_softmax(_upcast(student) / temperature, dim=1)
    q = F.softmax(_upcast(teacher) / (teacher_temperature or temperature), dim=1)
    return F.kl_div(log_p, q, reduction="none").sum(1).mean() * temperature**2


def kd_ce(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """KD plus cross-entropy with the target, as training loops add them."""
    return kd(student, teacher, target, temperature) + cross_entropy(student, teacher, target)


def jsd(student: Tensor, teacher: Tensor, target: Tensor, beta: float = 0.5) -> Tensor:
    """TRL's generalised JSD at T = 1: beta KL(q || m) + (1 - beta) KL(p || m), p the student's.

    The mixture m = beta q + (1 - beta) p is taken of logarithms, by logsumexp of both tensors
    stacked.
    """
    log_p = F.log_softmax(_upcast(student), dim=1)
    log_q = F.log_softmax(_upcast(teacher), dim=1)
    parts = [log_p + math.log(1.0 - beta), log_q + math.log(beta)]
    log_m = torch.logsumexp(torch.stack(parts), dim=0)
    from_teacher = F.kl_div(log_m, log_q, reduction="none", log_target=True)
    from_student = F.kl_div(log_m, log_p, reduction="none", log_target=True)
    return (beta * from_teacher + (1.0 - beta) * from_student).sum() / student.shape[0]


def reverse_kl(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """torchtune's reverse KL at T = 1, KL(p || q)."""
    p = F.softmax(_upcast(student), dim=1)
    log_p, log_q = F.log_softmax(_upcast(student), dim=1), F.log_softmax(_upcast(teacher), dim=1)
    return -(p * log_q - p * log_p).sum(1).mean()


def mixed_kl(student: Tensor, teacher: Tensor, target: Tensor, ratio: float = 0.5) -> Tensor:
    """torchtune's symmetric KL at T = 1, each direction from softmaxes of its own."""
    forward = kd(student, teacher, target, temperature=1.0)
    return ratio * forward + (1.0 - ratio) * reverse_kl(student, teacher, target)


def skew_kl(student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 0.1) -> Tensor:
    """DistiLLM's skew KL at T = 1, with the teacher's entropy, which it leaves out."""
    p, q = F.softmax(_upcast(student), dim=1), F.softmax(_upcast(teacher), dim=1)
    log_m = (alpha * q + (1.0 - alpha) * p).log()
    return (q * F.log_softmax(_upcast(teacher), dim=1) - q * log_m).sum(1).mean()


def skew_reverse_kl(student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 0.1) -> Tensor:
    """DistiLLM's skew reverse KL at T = 1."""
    p, q = F.softmax(_upcast(student), dim=1), F.softmax(_upcast(teacher), dim=1)
    log_m = ((1.0 - alpha) * q + alpha * p).log()
    return -(p * log_m - p * F.log_softmax(_upcast(student), dim=1)).sum(1).mean()


def tvd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """DistiLLM's total variation distance at T = 1."""
    p, q = F.softmax(_upcast(student), dim=1), F.softmax(_upcast(teacher), dim=1)
    return 0.5 * (p - q).abs().sum(1).mean()


def ab(
    student: Tensor, teacher: Tensor, target: Tensor, alpha: float = 0.5, beta: float = 0.5
) -> Tensor:
    """ABKD's alpha-beta divergence at T = 1, by powers of both softmaxes."""
    p, q = F.softmax(_upcast(student), dim=1), F.softmax(_upcast(teacher), dim=1)
    both = alpha + beta
    joint = torch.pow(q, alpha) * torch.pow(p, beta)
    rest = alpha / both * torch.pow(q, both) + beta / both * torch.pow(p, both)
    return (-(joint - rest).sum(1) / (alpha * beta)).mean()


def _mask(logits: Tensor, target: Tensor, at_target: bool) -> Tensor:
    # Built the original's way: a float tensor, a scatter, then a cast to bool.
    fill = torch.zeros_like(logits) if at_target else torch.ones_like(logits)
    return fill.scatter_(1, target[:, None], float(at_target)).bool()


def _pool(probability: Tensor, hit: Tensor, rest: Tensor) -> Tensor:
    """(rows, 2): the probability of the target and that of all other classes together."""
    pooled = [(probability * part).sum(dim=1, keepdim=True) for part in (hit, rest)]
    return torch.cat(pooled, dim=1)


def _decoupled(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor]:
    """mdistiller's halves without T^2: (target, rest) of student and teacher, and NCKD's sum."""
    student, teacher = _upcast(student), _upcast(teacher)
    hit, rest = _mask(student, target, True), _mask(student, target, False)
    pair_p = _pool(F.softmax(student / temperature, dim=1), hit, rest)
    pair_q = _pool(F.softmax(teacher / temperature, dim=1), hit, rest)
    rest_q = F.softmax(teacher / temperature - 1000.0 * hit, dim=1)
    log_rest_p = F.log_softmax(student / temperature - 1000.0 * hit, dim=1)
    return torch.log(pair_p), pair_q, F.kl_div(log_rest_p, rest_q, reduction="sum")


def dkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """mdistiller's DKD: T^2 (alpha TCKD + beta NCKD) from two masks, four softmaxes, two kl_div."""
    log_pair_p, pair_q, nckd = _decoupled(student, teacher, target, temperature)
    tckd = F.kl_div(log_pair_p, pair_q, reduction="sum")
    return (alpha * tckd + beta * nckd) * (temperature**2 / target.shape[0])


def aekt(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    log_ratio_max: float = math.log(10.0),
) -> Tensor:
    """AEKT-style on mdistiller's DKD: each row's TCKD times the detached ratio b / c, at most 10.

    Not the paper's formula, whose text was not available: kdkernels' default variant in eager.
    """
    log_pair_p, pair_q, nckd = _decoupled(student, teacher, target, temperature)
    tckd = F.kl_div(log_pair_p, pair_q, reduction="none").sum(1)
    log_ratio = torch.log(pair_q[:, 0]) - log_pair_p[:, 0].detach()
    ratio = log_ratio.clamp(max=log_ratio_max).exp()
    return (alpha * (ratio * tckd).sum() + beta * nckd) * (temperature**2 / target.shape[0])


def nkd(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    temperature: float = 1.0,
    gamma: float = 1.5,
) -> Tensor:
    """cls_KD's NKD, final form: -b log c at T = 1, and cross-entropy of the rest at T.

    The non-targets are picked with a boolean mask, which copies both tensors, and which
    torch.compile cannot trace through: it breaks the graph there.
    """
    student, teacher = _upcast(student), _upcast(teacher)
    rows, label = student.shape[0], target[:, None]
    log_c = F.log_softmax(student, dim=1).gather(1, label)
    b = F.softmax(teacher, dim=1).gather(1, label).detach()
    rest = _mask(student, target, False)
    log_rest_p = F.log_softmax(student[rest].reshape(rows, -1) / temperature, dim=1)
    rest_q = F.softmax(teacher[rest].reshape(rows, -1) / temperature, dim=1)
    non_target = (rest_q * log_rest_p).sum(dim=1).mean()
    return -(b * log_c).mean() - gamma * temperature**2 * non_target


def tf_nkd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """cls_KD's tf-NKD: cross-entropy weighted by sg(c + 1 - mean(c)); no teacher."""
    c = F.softmax(_upcast(student), dim=1).gather(1, target[:, None])
    weight = (c + 1.0 - c.mean()).detach()
    return -(weight * torch.log(c)).mean()
