"""Alpha-beta divergence, T^2 times

    -1 / (a b) sum (q^a p^b - a / (a + b) q^(a + b) - b / (a + b) p^(a + b)),

and its limits where a or b is 0. Wang et al. 2025, arXiv 2505.04560.

The twin of csrc/losses/ab.h, where the form is derived that it is summed in: what is kept of a
class are its logits ds and dt, and what opens the second round is added,

    log2 p = k ds + opening[0]                  log2 q = k dt + opening[2]
    log2(p / q) = k (ds - dt) + opening[1].

Parameters: temperature, kd_weight, ce_weight, label_smoothing, t_squared, alpha, beta.
"""

from typing import Any

import triton
import triton.language as tl

from kdkernels.reference import AB_LIMIT

from .score import finish_by, grad, merge, splits, upstream, variant
from .score import stats as score_stats
from .split import log_total
from .stats import INF, LOG2E, usable

__all__ = ["finish", "grad", "merge", "numbers", "opening", "refine", "stats", "variant"]

HEAVY = True  # for the planner: powers and series of the second round need registers
LN2 = tl.constexpr(0.6931471805599453)


def numbers(params: list[Any]) -> list[Any]:
    """The exponents, or 0 near the limits, and what float32 would round twice: the share of a in
    a + b (a half where both are 0), and log2(e) / T.
    """
    temperature, *common, alpha, beta = params
    a, b = (x * (x >= AB_LIMIT) for x in (alpha, beta))
    none = a + b == 0.0
    share = (a + 0.5 * none) / (a + b + none)
    return [temperature, *common, a, b, share, LOG2E.value / temperature]


@triton.jit
def stats(ds, dt, k, VARIANT: tl.constexpr):
    sums, exps = score_stats(ds, dt, k, VARIANT)
    if VARIANT == 2:
        return sums, (ds, dt, exps[2])
    else:
        return sums, (ds, dt)


@triton.jit
def apart(sums, ps, pt, s_y, t_y, params):
    """The splits of student and teacher, the logs of their sums over all classes, relative to their
    pivots, the difference of these, and log(p / q) of the target: without cancellation where they
    are alike, and exactly 0 where they are equal."""
    p, q = splits(sums, ps, pt, s_y, t_y, params[0])
    relative = (s_y - usable(ps)) / params[0]
    relative_t = (t_y - usable(pt)) / params[0]
    total = log_total(p, relative, sums[0])
    total_t = log_total(q, relative_t, sums[1])
    # Of an empty sum nothing is taken.
    empty = (sums[0] == 0.0) | (sums[1] == 0.0)
    ratio = tl.log(tl.where(empty, 1.0, sums[0]) / tl.where(empty, 1.0, sums[1]))
    by_rest = ratio - (p[1] - q[1])
    by_rest = tl.where(empty, total - total_t, by_rest)
    logits = relative - relative_t
    targets = p[0] - q[0]
    large = (p[2] > 0.5) & (q[2] > 0.5)
    totals = tl.where(large, logits - targets, by_rest)
    # Of target's logarithms that are not alike nothing cancels, however far the other classes lie
    # below.
    unlike = tl.abs(targets) > -0.25 * tl.minimum(p[0], q[0])
    target = tl.where(large | unlike, targets, logits - by_rest)
    return p, q, total, total_t, totals, target


@triton.jit
def opening(sums, ps, pt, s_y, t_y, params):
    _, _, total, total_t, totals, _ = apart(sums, ps, pt, s_y, t_y, params)
    return -total * LOG2E, -totals * LOG2E, -total_t * LOG2E


@triton.jit
def far(x):
    """|log2(p / q)| is taken to be at most this."""
    if x.dtype == tl.float64:
        return 1e300
    else:
        return 1e37


@triton.jit
def phi(x):
    """(e^x - 1 - x) / x^2 for -1/2 < x <= 0, by its series."""
    TERMS: tl.constexpr = 15 if x.dtype == tl.float64 else 8
    total = tl.full(x.shape, 1.0, x.dtype)
    for i in tl.static_range(TERMS - 2):
        total = total * x * (1.0 / (TERMS - i)) + 1.0
    return total * 0.5


@triton.jit
def share(near, exponent):
    """(2^(exponent near) - 1) / exponent in natural logarithms, near <= 0; what of its series is
    beyond the first term; and the power itself."""
    m = near * LN2
    x = exponent * m
    power = tl.exp2(exponent * near)
    beyond = phi(x)
    inverse = tl.where(exponent > 0.0, 1.0 / tl.where(exponent > 0.0, exponent, 1.0), 0.0)
    return tl.where(x > -0.5, m * x * beyond + m, (power - 1.0) * inverse), beyond, power


@triton.jit
def at(log_p, log_q, ratio, ds, dt, params):
    """f and p h of a class, from log2 of p, q and p / q; ds, dt: logits, which tell what is at
    -inf."""
    none = (ds == -INF) & (dt == -INF)
    a, b, share_a = params[5], params[6], params[7]
    less = ratio <= 0.0  # p <= q
    # Finite: 0 times it is 0. Not by tl.maximum, which would lose NaN.
    base = tl.where(less, log_q, log_p)
    base = tl.where(base < -1e30, -1e30, base)
    power = tl.where(none, 0.0, tl.exp2((a + b) * base))
    distance = -tl.abs(ratio)
    near = tl.where(distance < -far(ratio), -far(ratio), distance)
    near = tl.where(none, 0.0, near)
    of_a, beyond_a, power_a = share(near, a)
    of_b, beyond_b, power_b = share(near, b)
    first = tl.where(less, of_a, of_b)
    second = tl.where(less, of_b, of_a)
    e = tl.where(less, power_b, power_a)
    # (first e - second) / (a + b); near 0, where first and second are both m to first order, by
    # what is beyond it.
    m = near * LN2
    beyond = share_a * beyond_a - (1.0 - share_a) * beyond_b
    own = tl.where(less, 1.0 - share_a, share_a)
    small = m * (m * tl.where(less, beyond, -beyond)) + own * (of_a * of_b)
    inverse = tl.where(a + b > 0.0, 1.0 / tl.where(a + b > 0.0, a + b, 1.0), 0.0)
    large = (first * e - second) * inverse
    close = (a * m > -0.5) & (b * m > -0.5)
    value = power * tl.where(close, small, large)
    score = power * tl.where(less, e * first, -second)
    # Where the other one's power is the 0th, a class that only one of them has, or nearly so, has
    # an infinite value; and the former counts as h = 0.
    beyond_all = (distance == -INF) & (tl.where(less, b, a) == 0.0)
    lacking = tl.where(ds == -INF, ds, dt) == -INF
    score = tl.where(beyond_all, tl.where(lacking, 0.0, score), score)
    return tl.where(beyond_all, INF, value), score


@triton.jit
def refine(exps, opening, params, VARIANT: tl.constexpr):
    ds, dt = exps[0], exps[1]
    k = params[8]
    log_p = ds * k + opening[0]
    log_q = dt * k + opening[2]
    value, score = at(log_p, log_q, (ds - dt) * k + opening[1], ds, dt, params)
    p = tl.exp2(log_p)
    if VARIANT == 2:
        return (value, score), (p, score, exps[2])
    else:
        return (value, score), (p, score)


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    p, q, _, _, _, ratio = apart(sums, ps, pt, s_y, t_y, params)
    value, score = at(p[0] * LOG2E, q[0] * LOG2E, ratio * LOG2E, s_y, t_y, params)
    c = upstream(g, params)
    # By p h itself: h may be no number.
    y = c * (p[3] * score - p[2] * sums[len(sums) - 1])
    return finish_by(sums, value, score, c, y, s_y - usable(ps), g, params, VARIANT)
