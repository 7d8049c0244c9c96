"""Skew reverse KL: T^2 KL(p || m), m = alpha p + (1 - alpha) q; with detach_mixture m is held
constant. Ko et al. 2024, arXiv 2402.03898, and DistiLLM-2, arXiv 2503.07067, which detaches.

The twin of SkewReverseKl in csrc/losses/score.h. Parameters: temperature, kd_weight, ce_weight,
label_smoothing, t_squared, alpha, detach_mixture.
"""

from types import ModuleType
from typing import Any

import triton
import triton.language as tl

from . import mixed_kl
from .score import (
    grad,
    log_near,
    merge,
    mixture,
    opening,
    probabilities,
    refined,
    score_finish,
    stats,
    target_splits,
    variant,
)
from .stats import usable

__all__ = [
    "finish",
    "grad",
    "instead",
    "merge",
    "numbers",
    "opening",
    "refine",
    "stats",
    "variant",
]


def instead(params: list[Any]) -> tuple[Any, ModuleType, list[Any]]:
    """At alpha = 0 KL(p || q)."""
    *common, alpha, _ = params
    return alpha == 0.0, mixed_kl, [*common, 0.0]


def numbers(params: list[Any]) -> list[Any]:
    """Both shares, of which float32 may hold either."""
    return [*params, 1.0 - params[5]]


@triton.jit
def at(p, q, d, params):
    alpha, a = params[5], params[7]
    r, z, d = mixture(p, q, d, a, alpha)
    log_p = log_near(p * r, a * z)
    # -alpha p / m, which is a q / m - 1, or without the constant a (q / m - 1).
    of_mixture = tl.where(params[6] != 0.0, 0.0, a) * (-alpha * z)
    # With m - p, which sums to 0 over a row, every class is positive and of second order.
    return p * log_p - a * d, log_p + of_mixture


@triton.jit
def refine(exps, opening, params, VARIANT: tl.constexpr):
    p, q, d = probabilities(exps, opening)
    value, h = at(p, q, d, params)
    return refined(exps, p, value, h, VARIANT)


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    p, q, d, of_target = target_splits(sums, ps, pt, s_y, t_y, params)
    value, h = at(p, q, d, params)
    return score_finish(sums, of_target, value, h, s_y - usable(ps), g, params, VARIANT)
