"""AEKT: T^2 (alpha phi + beta NCKD), phi a term on the target's probability. Park and Lee 2024,
arXiv 2409.01679: the preprint is public, but its full text was not available when this was built.
The forms of phi are ours, derived from a published summary of it.

The twin of csrc/losses/aekt.h. Parameters: temperature, kd_weight, ce_weight, label_smoothing,
t_squared, alpha, beta, variant (its position in kdkernels.reference.AEKT_VARIANTS), log_ratio_max.
"""

import triton
import triton.language as tl

from .kd import pair_variant as variant
from .split import add_cross_entropy, binary_kl, both_splits, difference, gain, pair_coef
from .stats import INF, exp, weighted
from .stats import divergence_merge as merge
from .stats import divergence_stats as stats
from .stats import pair_grad as grad

__all__ = ["finish", "grad", "merge", "stats", "variant"]


@triton.jit
def target_term(p, q, variant, bound):
    """phi and H = (1 - c) d phi / d log c."""
    # A target masked in both, probability 0 against 0, counts as equal.
    masked = (q[0] == -INF) & (p[0] == -INF)
    log_ratio = tl.where(masked, 0.0, q[0] - p[0])
    clamped = tl.where(log_ratio > bound, bound, log_ratio)
    ratio = exp(clamped)
    tckd = binary_kl(q, p)
    phi = weighted(ratio, tckd)
    h = ratio * difference(p, q)
    # The variant is a number, so that it causes no recompilation: one branch for all rows. Among
    # numbers of each row it is the same one; rows that are not read have 1 in its place.
    if len(variant.shape) > 0:
        variant = tl.where(tl.max(variant) > 1.0, tl.max(variant), tl.min(variant))
    if variant == 1.0:  # ratio_weighted_ce
        ratio = tl.where(masked, 0.0, ratio)
        phi = weighted(ratio, -p[0])
        h = -ratio * p[3]
    elif variant == 2.0:  # confidence_weighted_ce
        phi = weighted(q[2], -p[0])
        h = -q[2] * p[3]
    elif variant == 3.0:  # ratio_divergence
        # Beyond the bound the ratio stands still and phi goes on linearly in log r.
        beyond = tl.where(log_ratio > bound, (ratio - 1.0) * (log_ratio - bound), 0.0)
        phi = ratio - clamped - 1.0 + beyond
        h = (1.0 - ratio) * p[3]
    elif variant == 4.0:  # ratio_coupled_tckd
        h = h - tl.where(log_ratio < bound, ratio * weighted(p[3], tckd), 0.0)
    return phi, h


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    temperature, kd_weight = params[0], params[1]
    alpha, beta = params[5] * gain(params), params[6] * gain(params)
    p, q, nckd, inverse_s, inverse_t, relative = both_splits(
        sums, ps, pt, s_y, t_y, temperature, temperature
    )
    phi, h = target_term(p, q, params[7], params[8])
    loss = weighted(alpha, temperature * (temperature * phi)) + weighted(beta, nckd)
    h = weighted(alpha, h)
    c0, c1, y = pair_coef(temperature, inverse_s, inverse_t, h, beta, g[0] * kd_weight)
    return add_cross_entropy(params, 0.0, sums, relative, g[0], loss, c0, c1, y, VARIANT)
