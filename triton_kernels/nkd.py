"""NKD: -b log c at temperature 1 plus gamma T^2 times the cross-entropy of the non-target softmaxes
at temperature T; b and c are teacher's and student's probability of the target. Yang et al.,
arXiv 2208.10139 and 2303.13005 (eq. 7).

The twin of csrc/losses/nkd.h. Parameters: temperature, kd_weight, ce_weight, label_smoothing,
t_squared, gamma.
"""

import triton
import triton.language as tl

from . import kd
from .split import add_cross_entropy, gain, non_target, pair_coef, split
from .stats import AT_ONE, PLAIN, inverse, usable, weighted
from .stats import cross_merge as merge
from .stats import cross_stats as stats
from .stats import pair_grad as grad

__all__ = ["finish", "grad", "merge", "stats", "variant"]


def variant(parts: bool, temperature: float, *params: float) -> int:
    chosen = kd.pair_variant(parts, temperature, *params)
    return AT_ONE if chosen == PLAIN and temperature != 1.0 else chosen


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    temperature, kd_weight = params[0], params[1]
    gamma = params[5] * gain(params)
    if VARIANT > 0:
        teacher_sum = sums[4]
    else:
        teacher_sum = sums[1]
    inverse_t = inverse(sums[1])
    q = split(t_y - usable(pt), 1.0, teacher_sum)
    rest = weighted(gamma, non_target(temperature, sums[0], sums[1], sums[2] * inverse_t, 0.0))
    c0, c1, y = pair_coef(temperature, inverse(sums[0]), inverse_t, 0.0, gamma, g[0] * kd_weight)
    # The target term is cross-entropy weighted by the teacher's confidence.
    relative = s_y - usable(ps)
    return add_cross_entropy(params, q[2], sums, relative, g[0], rest, c0, c1, y, VARIANT)
