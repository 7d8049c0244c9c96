"""Generalised Jensen-Shannon divergence, with m = beta q + (1 - beta) p

    T^2 (beta KL(q || m) + (1 - beta) KL(p || m));

beta = 0 is KL(q || p) and beta = 1 is KL(p || q), which are not its limits. Agarwal et al. 2023,
arXiv 2306.13649, equation 1.

The twin of Jsd in csrc/losses/score.h.
Parameters: temperature, kd_weight, ce_weight, label_smoothing, t_squared, beta.
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
    """At the ends of beta KL in one direction."""
    *common, beta = params
    return (beta == 0.0) | (beta == 1.0), mixed_kl, [*common, 1.0 - beta]


def numbers(params: list[Any]) -> list[Any]:
    """Both shares, of which float32 may hold either."""
    return [*params, 1.0 - params[5]]


@triton.jit
def at(p, q, d, params):
    beta, rest = params[5], params[6]
    r, z, _ = mixture(p, q, d, beta, rest)
    log_q = log_near(q * r, -rest * z)
    log_p = log_near(p * r, beta * z)
    h = rest * log_p
    # Near p = q the first order of the two cancels, class by class.
    return beta * q * log_q + p * h, h


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
