"""Skew KL: T^2 KL(q || alpha q + (1 - alpha) p). Ko et al. 2024, arXiv 2402.03898, equation 2.

The twin of SkewKl in csrc/losses/score.h.
Parameters: temperature, kd_weight, ce_weight, label_smoothing, t_squared, alpha.
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
    """At alpha = 0 KL(q || p)."""
    *common, alpha = params
    return alpha == 0.0, mixed_kl, [*common, 1.0]


def numbers(params: list[Any]) -> list[Any]:
    """Both shares, of which float32 may hold either."""
    return [*params, 1.0 - params[5]]


@triton.jit
def at(p, q, d, params):
    alpha, rest = params[5], params[6]
    r, z, d = mixture(p, q, d, alpha, rest)
    z = -rest * z  # q / m - 1
    # With m - q, which sums to 0 over a row, every class is positive and of second order.
    return q * log_near(q * r, z) + rest * d, -rest * z


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
