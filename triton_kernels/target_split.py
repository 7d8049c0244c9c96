"""The target/non-target decomposition of one set of logits at temperature T: log p_y, log(1 - p_y)
and the logsumexp of the other classes.

The twin of csrc/losses/target_split.h. Parameter: temperature.
"""

import triton
import triton.language as tl

from .split import split
from .stats import PLAIN, inverse, usable
from .stats import student_grad as grad
from .stats import student_merge as merge
from .stats import student_stats as stats

__all__ = ["finish", "grad", "merge", "stats", "variant"]


def variant(*_: float) -> int:
    return PLAIN


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    temperature = params[0]
    p = split(s_y - usable(ps), temperature, sums[0])
    rest = usable(ps) / temperature + tl.log(sums[0])
    # d/d u_i of the three: -(1 - p) ph_i, p ph_i, ph_i; of the target: 1 - p, -p, 0.
    h = g[0] * p[3] - g[1] * p[2]
    coef = ((g[2] - h) / temperature * inverse(sums[0]),)
    return (p[0], p[1], rest), coef, h / temperature
