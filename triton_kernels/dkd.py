"""DKD: T^2 (alpha TCKD + beta NCKD). Zhao et al. 2022, arXiv 2203.08679, eq. 7.

The twin of csrc/losses/dkd.h. Parameters: temperature, kd_weight, ce_weight, label_smoothing,
t_squared, alpha, beta.
"""

import triton
import triton.language as tl

from .kd import pair_variant as variant
from .split import add_cross_entropy, binary_kl, both_splits, difference, gain, pair_coef
from .stats import divergence_merge as merge
from .stats import divergence_stats as stats
from .stats import pair_grad as grad
from .stats import weighted

__all__ = ["finish", "grad", "merge", "stats", "variant"]


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    temperature, kd_weight = params[0], params[1]
    alpha, beta = params[5] * gain(params), params[6] * gain(params)
    p, q, nckd, inverse_s, inverse_t, relative = both_splits(
        sums, ps, pt, s_y, t_y, temperature, temperature
    )
    tckd = temperature * (temperature * binary_kl(q, p))
    loss = weighted(alpha, tckd) + weighted(beta, nckd)
    h = weighted(alpha, difference(p, q))
    c0, c1, y = pair_coef(temperature, inverse_s, inverse_t, h, beta, g[0] * kd_weight)
    return add_cross_entropy(params, 0.0, sums, relative, g[0], loss, c0, c1, y, VARIANT)
