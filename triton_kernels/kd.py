"""KD: T^2 KL(teacher || student) at temperature T. Hinton et al. 2015, arXiv 1503.02531.

The twin of csrc/losses/kd.h. Parameters: temperature, kd_weight, ce_weight, label_smoothing,
t_squared, teacher_temperature.
"""

import triton
import triton.language as tl

from .split import add_cross_entropy, binary_kl, both_splits, difference, gain, pair_coef
from .stats import APART, AT_ONE, PLAIN, SMOOTH, weighted
from .stats import divergence_merge as merge
from .stats import divergence_stats as stats
from .stats import pair_grad as grad

__all__ = ["finish", "grad", "merge", "pair_variant", "stats", "variant"]


def pair_variant(
    parts: bool,
    temperature: float,
    kd_weight: float,
    ce_weight: float,
    label_smoothing: float,
    *_: float,
) -> int:
    if parts or (ce_weight != 0.0 and label_smoothing != 0.0):
        return SMOOTH
    return AT_ONE if ce_weight != 0.0 and temperature != 1.0 else PLAIN


def variant(parts: bool, temperature: float, *params: float) -> int:
    of_teacher = params[4]
    if of_teacher == temperature:
        return pair_variant(parts, temperature, *params)
    return APART + (SMOOTH if parts or params[1] != 0.0 else PLAIN)  # params[1]: ce_weight


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    temperature = params[0]
    of_teacher = temperature
    if VARIANT >= 4:
        of_teacher = params[5]
    p, q, nckd, inverse_s, inverse_t, relative = both_splits(
        sums, ps, pt, s_y, t_y, temperature, of_teacher
    )
    # The chain rule of KL over (target, not target): binary KL + (1 - b) * non-target KL.
    loss = temperature * (temperature * binary_kl(q, p)) + weighted(q[3], nckd)
    loss = loss * gain(params)
    weight = g[0] * params[1] * gain(params)
    h = difference(p, q)
    c0, c1, y = pair_coef(temperature, inverse_s, inverse_t, h, q[3], weight)
    return add_cross_entropy(params, 0.0, sums, relative, g[0], loss, c0, c1, y, VARIANT)
