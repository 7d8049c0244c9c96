"""The mergeable pieces that losses are made of: what is summed over the classes of a row, target
class left out. The twin of csrc/stats.h, in units of blocks.

A loss hands four of these (or its own) to the kernels of row.py:

    STATS(ds, dt, k, TWO)            what a class adds to the sums, and its exponentials
    MERGE(sums, moved_s, moved_t, k, TWO)   sums whose pivots moved; added up, they are merged
    FINISH(sums, ...)                losses and coefficients of a row
    GRAD(exps, coef)                 d loss / d logit of a class: no new exponential

ds and dt are logits minus pivots (the running maxima), in units of logits: the temperature enters
with k = log2(e) / T, so differences are exact and one pivot serves every temperature. Losses of one
tensor take ds for both.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))


# ---- arithmetic -----------------------------------------------------------------------------


@triton.jit
def exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def log1p(x):
    """Accurate for 0 <= x <= 1: the rounding error of 1 + x is divided out again."""
    u = 1.0 + x
    d = u - 1.0
    return tl.where(d == 0.0, x, tl.log(u) * (x / tl.where(d == 0.0, 1.0, d)))


@triton.jit
def usable(pivot):
    """The pivot to subtract: 0 without a finite logit, so that -inf - pivot stays -inf."""
    return tl.where(pivot == -INF, 0.0, pivot)


@triton.jit
def moved(old, new):
    """How far logits relative to `old` move when they are taken relative to `new`."""
    return usable(old) - tl.where(old == -INF, 0.0, usable(new))


@triton.jit
def weighted(weight, x):
    """weight * x where a weight of 0 wins over an infinite x: 0 * log 0 = 0."""
    return tl.where(weight == 0.0, 0.0, weight * x)


@triton.jit
def inverse(total):
    """1 / total, or 0 where there is nothing to share out."""
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))


# ---- student and teacher --------------------------------------------------------------------
# Sums: exp(ds / T), exp(dt / T), a mean under the teacher, and at two temperatures exp(ds) and, for
# a cross-entropy, exp(dt). The mean is of t - s for a divergence, of -s for a cross-entropy.


@triton.jit
def divergence_stats(ds, dt, k, TWO: tl.constexpr):
    es = tl.exp2(ds * k)
    et = tl.exp2(dt * k)
    # Without teacher mass the class is out, also where it is -inf - -inf.
    x = et * tl.where(et > 0.0, dt - ds, 0.0)
    if TWO:
        e1 = exp(ds)
        return (es, et, x, e1), (es, et, e1)
    else:
        return (es, et, x), (es, et)


@triton.jit
def cross_stats(ds, dt, k, TWO: tl.constexpr):
    es = tl.exp2(ds * k)
    et = tl.exp2(dt * k)
    x = et * tl.where(et > 0.0, -ds, 0.0)
    if TWO:
        e1 = exp(ds)
        return (es, et, x, e1, exp(dt)), (es, et, e1)
    else:
        return (es, et, x), (es, et)


@triton.jit
def divergence_merge(sums, ds, dt, k, TWO: tl.constexpr):
    fs = tl.exp2(ds * k)
    ft = tl.exp2(dt * k)
    x = weighted(ft, sums[2] + weighted(sums[1], dt - ds))
    if TWO:
        return sums[0] * fs, sums[1] * ft, x, sums[3] * exp(ds)
    else:
        return sums[0] * fs, sums[1] * ft, x


@triton.jit
def cross_merge(sums, ds, dt, k, TWO: tl.constexpr):
    fs = tl.exp2(ds * k)
    ft = tl.exp2(dt * k)
    x = weighted(ft, sums[2] + weighted(sums[1], -ds))
    if TWO:
        return sums[0] * fs, sums[1] * ft, x, sums[3] * exp(ds), sums[4] * exp(dt)
    else:
        return sums[0] * fs, sums[1] * ft, x


@triton.jit
def pair_grad(exps, coef, TWO: tl.constexpr):
    if TWO:
        return coef[0] * exps[0] + coef[1] * exps[1] + coef[2] * exps[2]
    else:
        return coef[0] * exps[0] + coef[1] * exps[1]


# ---- one tensor alone -----------------------------------------------------------------------


@triton.jit
def student_stats(ds, dt, k, TWO: tl.constexpr):
    es = tl.exp2(ds * k)
    return (es,), (es,)


@triton.jit
def student_merge(sums, ds, dt, k, TWO: tl.constexpr):
    return (sums[0] * tl.exp2(ds * k),)


@triton.jit
def student_grad(exps, coef, TWO: tl.constexpr):
    return coef[0] * exps[0]
