"""NKD: -b log c at temperature 1 plus gamma T^2 times the cross-entropy of the non-target softmaxes
at temperature T; b and c are teacher's and student's probability of the target. Yang et al.,
arXiv 2208.10139 and 2303.13005 (eq. 7).

The twin of csrc/losses/nkd.h. Parameters: temperature, kd_weight, ce_weight, label_smoothing,
gamma.
"""

import triton
import triton.language as tl

from .split import add_cross_entropy, non_target, pair_coef, split
from .stats import cross_merge as merge
from .stats import cross_stats as stats
from .stats import inverse, usable, weighted
from .stats import pair_grad as grad

__all__ = ["finish", "grad", "merge", "stats", "two_temperatures"]


def two_temperatures(temperature: float, *_: float) -> bool:
    return temperature != 1.0


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, TWO: tl.constexpr):
    temperature, kd_weight, ce_weight, gamma = params[0], params[1], params[2], params[4]
    if TWO:
        teacher_sum = sums[4]
    else:
        teacher_sum = sums[1]
    inverse_t = inverse(sums[1])
    q = split(t_y - usable(pt), 1.0, teacher_sum)
    rest = weighted(gamma, non_target(temperature, sums[0], sums[1], sums[2] * inverse_t, 0.0))
    loss = weighted(kd_weight, rest)
    c0, c1, y = pair_coef(temperature, inverse(sums[0]), inverse_t, 0.0, gamma, g[0] * kd_weight)
    # The target term is cross-entropy weighted by the teacher's confidence.
    weight = kd_weight * q[2] + ce_weight
    return add_cross_entropy(weight, sums, s_y - usable(ps), g[0], loss, c0, c1, y, TWO)
