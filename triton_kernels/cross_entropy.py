"""Cross-entropy of the student with the target, -log c at temperature 1, with label smoothing as
torch's: the row term of tf-NKD (arXiv 2208.10139). On top z_weight * logsumexp^2 over all classes
(arXiv 2204.02311).

The twin of csrc/losses/cross_entropy.h. Parameters: label_smoothing, z_weight;
the kernels' temperature, 1, comes before them.
"""

import triton
import triton.language as tl

from .split import smoothed, split
from .stats import PLAIN, SMOOTH, inverse, usable, weighted
from .stats import student_grad as grad
from .stats import student_merge as merge
from .stats import student_stats as stats

__all__ = ["finish", "grad", "merge", "stats", "variant"]


def variant(parts: bool, temperature: float, label_smoothing: float, *_: float) -> int:
    return SMOOTH if label_smoothing != 0.0 else PLAIN


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    relative = s_y - usable(ps)
    p = split(relative, 1.0, sums[0])
    coef, y = g[0] * p[3] * inverse(sums[0]), -g[0] * p[3]
    z_weight = params[2]
    # By the target itself where its probability is not small: the pivot of the others may be far
    # below.
    total = tl.where(p[2] > 0.5, s_y - p[0], tl.log(sums[0]) - p[1] + usable(ps))
    z = weighted(z_weight, total * total)
    slope = weighted(-2.0 * z_weight, total)  # minus it, so that a weight of 0 changes no bit
    if VARIANT == 2:
        mean, each, at_target = smoothed(p, relative, sums[0], sums[1], sums[2])
        smoothing = params[1]
        sharp = 1.0 - smoothing
        spread = g[0] * smoothing
        loss = weighted(sharp, -p[0]) + weighted(smoothing, mean) + z
        y = sharp * y + spread * at_target - g[0] * slope * p[2]
        return (loss,), (coef * (1.0 - slope), -spread * each), y
    else:
        return (-p[0] + z,), (coef * (1.0 - slope),), y - g[0] * slope * p[2]
