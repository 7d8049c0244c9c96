"""Cross-entropy of the student with the target, -log c at temperature 1: the row term of tf-NKD
(arXiv 2208.10139).

The twin of csrc/losses/cross_entropy.h. Parameter: label_smoothing.
"""

import triton
import triton.language as tl

from .split import split
from .stats import inverse, usable
from .stats import student_grad as grad
from .stats import student_merge as merge
from .stats import student_stats as stats

__all__ = ["finish", "grad", "merge", "stats", "two_temperatures"]


def two_temperatures(*_: float) -> bool:
    return False


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, TWO: tl.constexpr):
    p = split(s_y - usable(ps), 1.0, sums[0])
    return (-p[0],), (g[0] * p[3] * inverse(sums[0]),), -g[0] * p[3]
