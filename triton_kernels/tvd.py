"""Total variation distance, 1/2 sum |p - q|. Wen et al. 2023, arXiv 2307.15190.

The twin of Tvd in csrc/losses/score.h.
Parameters: temperature, kd_weight, ce_weight, label_smoothing, t_squared.
"""

import triton
import triton.language as tl

from .score import (
    grad,
    merge,
    opening,
    probabilities,
    refined,
    score_finish,
    stats,
    target_splits,
    variant,
)
from .stats import usable

__all__ = ["finish", "grad", "merge", "opening", "refine", "stats", "variant"]


@triton.jit
def at(p, q, d, params):
    # NaN stays.
    return 0.5 * tl.abs(d), tl.where(d > 0.0, 0.5, tl.where(d < 0.0, -0.5, 0.0 * d)).to(d.dtype)


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
