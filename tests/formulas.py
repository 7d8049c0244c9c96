"""The losses as their papers and authors have them: with masks, with sums of probabilities, without
log_softmax. What the reference is held against.

Each takes student, teacher, target, and of the options those that it names.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def probabilities(logits: Tensor, temperature: float) -> Tensor:
    e = (logits / temperature).exp()
    return e / e.sum(1, keepdim=True)


def one_hot(target: Tensor, classes: int) -> Tensor:
    zeros = torch.zeros(len(target), classes, dtype=torch.float64)
    return zeros.scatter_(1, target.unsqueeze(1), 1)


def of_target(p: Tensor, target: Tensor) -> Tensor:
    return (p * one_hot(target, p.shape[1])).sum(1)


def sharp_cross_entropy(student: Tensor, target: Tensor) -> Tensor:
    return -of_target(probabilities(student, 1.0), target).log()


def binary(p: Tensor, target: Tensor) -> Tensor:
    c = of_target(p, target)
    return torch.stack((c, 1 - c), 1)


def divergence(q: Tensor, p: Tensor) -> Tensor:
    return (q * (q / p).log()).sum(1)


def gain(temperature, t_squared):
    return temperature**2 if t_squared else 1.0


def kd(s, t, y, temperature, t_squared, teacher_temperature):
    q = probabilities(t, teacher_temperature or temperature)
    return gain(temperature, t_squared) * divergence(q, probabilities(s, temperature))


def reverse_kl(s, t, y, temperature, t_squared):
    return gain(temperature, t_squared) * divergence(
        probabilities(s, temperature), probabilities(t, temperature)
    )


def mixed_kl(s, t, y, temperature, t_squared, ratio):
    p, q = probabilities(s, temperature), probabilities(t, temperature)
    return gain(temperature, t_squared) * (
        ratio * divergence(q, p) + (1 - ratio) * divergence(p, q)
    )


def jsd(s, t, y, temperature, t_squared, beta):
    """TRL: the formula is switched at the ends."""
    p, q = probabilities(s, temperature), probabilities(t, temperature)
    if beta in (0, 1):
        return gain(temperature, t_squared) * (divergence(p, q) if beta else divergence(q, p))
    m = beta * q + (1 - beta) * p
    return gain(temperature, t_squared) * (beta * divergence(q, m) + (1 - beta) * divergence(p, m))


def skew_kl(s, t, y, temperature, t_squared, alpha):
    p, q = probabilities(s, temperature), probabilities(t, temperature)
    return gain(temperature, t_squared) * divergence(q, alpha * q + (1 - alpha) * p)


def skew_reverse_kl(s, t, y, temperature, t_squared, alpha, detach_mixture):
    p, q = probabilities(s, temperature), probabilities(t, temperature)
    m = alpha * (p.detach() if detach_mixture else p) + (1 - alpha) * q
    return gain(temperature, t_squared) * divergence(p, m)


def tvd(s, t, y, temperature, t_squared):
    p, q = probabilities(s, temperature), probabilities(t, temperature)
    return gain(temperature, t_squared) * (p - q).abs().sum(1) / 2


def ab(s, t, y, temperature, t_squared, alpha, beta):
    """ABKD, whose code has 1 / alpha and 1 / beta at the limits, where their squares belong."""
    p, q = probabilities(s, temperature), probabilities(t, temperature)
    a, b = (x if x >= 1e-4 else 0.0 for x in (alpha, beta))
    if a == b == 0:
        value = (p / q).log() ** 2 / 2
    elif a == 0:
        value = (p**b * (p**b / q**b).log() - p**b + q**b) / b**2
    elif b == 0:
        value = (q**a * (q**a / p**a).log() - q**a + p**a) / a**2
    else:
        c = a + b
        value = -(q**a * p**b - a / c * q**c - b / c * p**c) / (a * b)
    return gain(temperature, t_squared) * value.sum(1)


def cross_entropy(s, t, y, label_smoothing, z_weight):
    ce = torch.nn.functional.cross_entropy(s, y, reduction="none", label_smoothing=label_smoothing)
    return ce + z_weight * s.exp().sum(1).log() ** 2


def masked_kl(s, t, y, temperature):
    """mdistiller: the target's logit lowered by 1000 in place of leaving it out."""
    mask = 1000 * one_hot(y, s.shape[1])
    log_ph = torch.log_softmax(s / temperature - mask, 1)
    qh = torch.softmax(t / temperature - mask, 1)
    return torch.nn.functional.kl_div(log_ph, qh, reduction="none").sum(1)


def dkd(s, t, y, temperature, t_squared, alpha, beta):
    p, q = probabilities(s, temperature), probabilities(t, temperature)
    tckd, nckd = divergence(binary(q, y), binary(p, y)), masked_kl(s, t, y, temperature)
    return gain(temperature, t_squared) * (alpha * tckd + beta * nckd)


def nkd(s, t, y, temperature, t_squared, gamma):
    """cls_KD: the target removed by a boolean mask, what is left renormalised."""
    rest = one_hot(y, s.shape[1]) == 0
    rows = (len(y), s.shape[1] - 1)
    ph = probabilities(s[rest].view(rows), temperature)
    qh = probabilities(t[rest].view(rows), temperature)
    soft = of_target(probabilities(t, 1.0), y) * sharp_cross_entropy(s, y)
    distributed = -(qh * ph.log()).sum(1)
    return soft + gamma * gain(temperature, t_squared) * distributed


def tf_nkd(s, t, y, mean_confidence=None):
    c = of_target(probabilities(s, 1.0), y).detach()
    mean = c.mean() if mean_confidence is None else mean_confidence
    return (c + 1 - mean) * sharp_cross_entropy(s, y)


def explicit(b, c, variant, log_ratio_max):
    """phi(c; b) of AEKT."""
    tckd = b * (b / c).log() + (1 - b) * ((1 - b) / (1 - c)).log()
    r, bound = b / c, math.exp(log_ratio_max)
    clamped = r.clamp(max=bound)
    tangent = bound - log_ratio_max - 1 + (bound - 1) * (r.log() - log_ratio_max)
    return {
        "ratio_weighted_tckd": clamped.detach() * tckd,
        "ratio_weighted_ce": -clamped.detach() * c.log(),
        "confidence_weighted_ce": -b * c.log(),
        "ratio_divergence": torch.where(r > bound, tangent, r - r.log() - 1),
        "ratio_coupled_tckd": clamped * tckd,
    }[variant]


def aekt(s, t, y, temperature, t_squared, variant, beta, alpha, log_ratio_max):
    b, c = (of_target(probabilities(x, temperature), y) for x in (t, s))
    phi = explicit(b, c, variant, log_ratio_max)
    value = alpha * phi + beta * masked_kl(s, t, y, temperature)
    return gain(temperature, t_squared) * value


def target_split(s, t, y, temperature):
    c = of_target(probabilities(s, temperature), y)
    rest = ((s / temperature).exp() * (1 - one_hot(y, s.shape[1]))).sum(1)
    return torch.stack((c.log(), (1 - c).log(), rest.log()))
