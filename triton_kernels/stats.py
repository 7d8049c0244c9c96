"""The mergeable pieces that losses are made of: what is summed over the classes of a row, target
class left out. The twin of csrc/stats.h, in units of blocks.

A loss hands four of these (or its own) to the kernels:

    STATS(ds, dt, k, VARIANT)            what a class adds to the sums, and its features
    MERGE(sums, moved_s, moved_t, k, VARIANT)   sums whose pivots moved; added up, they are merged
    FINISH(sums, ...)                losses and coefficients of a row
    GRAD(exps, coef)                 d loss / d logit of a class: no new exponential

and, where the probabilities of a class themselves are needed, for a second round over the classes

    OPEN(sums, ..., params)          what turns the features of a class into its probabilities
    REFINE(exps, opening, params, VARIANT)   what it adds to the sums of the second round, which
                                     no pivot moves, and the features that its gradient is made of

VARIANT says what is summed beside what every call of a loss needs, each compiled on its own: PLAIN
nothing, AT_ONE the sums at temperature 1, SMOOTH these, at any temperature, and those of the
logits, for label smoothing; it also gives the parts. There every class that is not at -inf counts,
and adds a constant to its gradient: the sign of one of its exponentials tells, -0.0 of a class at
-inf, which no sum sees. APART comes on top of PLAIN and SMOOTH where the teacher's temperature is
another one: calls with one temperature keep their code, and its registers. `variant` gets NaN for a
number that the host does not know, because it is one of each row or lies on a device: NaN is equal
to none, so that what it returns serves them all.

ds and dt are logits minus pivots (the running maxima), in units of logits: the temperature enters
with k = log2(e) / T, so differences are exact and one pivot serves every temperature. With APART k
is the tuple of it, the teacher's and the ratio of student's to teacher's temperature. Losses of one
tensor take ds for both.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
INF = tl.constexpr(float("inf"))
# What counts is summed times it, so that classes masked by the lowest number of float32 do not
# overflow the sum of logits. A power of 2: nothing is rounded.
SHARE = tl.constexpr(2.0**-24)
PLAIN, AT_ONE, SMOOTH = 0, 1, 2
APART = 4  # added to PLAIN or SMOOTH


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


# ---- what counts, with label smoothing -------------------------------------------------------


@triton.jit
def marked(e, ds):
    """The exponential of a class that tells whether it counts."""
    # Not `-e`, which Triton takes for 0 - e; nor the constant -0.0, which it takes for 0.
    return tl.where(ds == -INF, e * -1.0, e)


@triton.jit
def counted(ds):
    """What a class adds to the sums of logits and of classes."""
    masked = ds == -INF
    return tl.where(masked, 0.0, ds * SHARE), tl.where(masked, 0.0, SHARE).to(ds.dtype)


@triton.jit
def constant(e, c):
    """c where a class counts. e: its exponential that tells."""
    if e.dtype == tl.float64:
        return tl.where(e.to(tl.int64, bitcast=True) < 0, 0.0, c)
    else:
        return tl.where(e.to(tl.int32, bitcast=True) < 0, 0.0, c)


# ---- student and teacher --------------------------------------------------------------------
# Sums: exp(ds / T), exp(dt / T), a mean under the teacher, and at two temperatures exp(ds) and, for
# a cross-entropy, exp(dt). The mean is of t - s for a divergence, of -s for a cross-entropy.


@triton.jit
def k_student(k, VARIANT: tl.constexpr):
    if VARIANT >= 4:
        return k[0]
    else:
        return k


@triton.jit
def k_teacher(k, VARIANT: tl.constexpr):
    if VARIANT >= 4:
        return k[1]
    else:
        return k


@triton.jit
def apart(ds, dt, k, VARIANT: tl.constexpr):
    """t - s, in units of the student's logits."""
    if VARIANT >= 4:
        return dt * k[2] - ds
    else:
        return dt - ds


@triton.jit
def divergence_stats(ds, dt, k, VARIANT: tl.constexpr):
    es = tl.exp2(ds * k_student(k, VARIANT))
    et = tl.exp2(dt * k_teacher(k, VARIANT))
    # Without teacher mass the class is out, also where it is -inf - -inf.
    x = et * tl.where(et > 0.0, apart(ds, dt, k, VARIANT), 0.0)
    if VARIANT % 4 == 2:
        e1 = exp(ds)
        es = marked(es, ds)
        own, one = counted(ds)
        return (es, et, x, e1, own, one), (es, et, e1)
    elif VARIANT % 4 == 1:
        e1 = exp(ds)
        return (es, et, x, e1), (es, et, e1)
    else:
        return (es, et, x), (es, et)


@triton.jit
def cross_stats(ds, dt, k, VARIANT: tl.constexpr):
    es = tl.exp2(ds * k)
    et = tl.exp2(dt * k)
    x = et * tl.where(et > 0.0, -ds, 0.0)
    if VARIANT == 2:
        e1 = exp(ds)
        es = marked(es, ds)
        own, one = counted(ds)
        return (es, et, x, e1, exp(dt), own, one), (es, et, e1)
    elif VARIANT == 1:
        e1 = exp(ds)
        return (es, et, x, e1, exp(dt)), (es, et, e1)
    else:
        return (es, et, x), (es, et)


@triton.jit
def divergence_merge(sums, ds, dt, k, VARIANT: tl.constexpr):
    fs = tl.exp2(ds * k_student(k, VARIANT))
    ft = tl.exp2(dt * k_teacher(k, VARIANT))
    x = weighted(ft, sums[2] + weighted(sums[1], apart(ds, dt, k, VARIANT)))
    if VARIANT % 4 == 2:
        own = sums[5] * ds + sums[4]
        return sums[0] * fs, sums[1] * ft, x, sums[3] * exp(ds), own, sums[5]
    elif VARIANT % 4 == 1:
        return sums[0] * fs, sums[1] * ft, x, sums[3] * exp(ds)
    else:
        return sums[0] * fs, sums[1] * ft, x


@triton.jit
def cross_merge(sums, ds, dt, k, VARIANT: tl.constexpr):
    fs = tl.exp2(ds * k)
    ft = tl.exp2(dt * k)
    x = weighted(ft, sums[2] + weighted(sums[1], -ds))
    if VARIANT == 2:
        own = sums[6] * ds + sums[5]
        e1, t1 = sums[3] * exp(ds), sums[4] * exp(dt)
        return sums[0] * fs, sums[1] * ft, x, e1, t1, own, sums[6]
    elif VARIANT == 1:
        return sums[0] * fs, sums[1] * ft, x, sums[3] * exp(ds), sums[4] * exp(dt)
    else:
        return sums[0] * fs, sums[1] * ft, x


@triton.jit
def pair_grad(exps, coef, VARIANT: tl.constexpr):
    if VARIANT % 4 == 2:
        g = coef[0] * exps[0] + coef[1] * exps[1] + coef[2] * exps[2]
        return g + constant(exps[0], coef[3])
    elif VARIANT % 4 == 1:
        return coef[0] * exps[0] + coef[1] * exps[1] + coef[2] * exps[2]
    else:
        return coef[0] * exps[0] + coef[1] * exps[1]


# ---- one tensor alone -----------------------------------------------------------------------


@triton.jit
def student_stats(ds, dt, k, VARIANT: tl.constexpr):
    es = tl.exp2(ds * k)
    if VARIANT == 2:
        es = marked(es, ds)
        own, one = counted(ds)
        return (es, own, one), (es,)
    else:
        return (es,), (es,)


@triton.jit
def student_merge(sums, ds, dt, k, VARIANT: tl.constexpr):
    if VARIANT == 2:
        return sums[0] * tl.exp2(ds * k), sums[2] * ds + sums[1], sums[2]
    else:
        return (sums[0] * tl.exp2(ds * k),)


@triton.jit
def student_grad(exps, coef, VARIANT: tl.constexpr):
    if VARIANT == 2:
        return coef[0] * exps[0] + constant(exps[0], coef[1])
    else:
        return coef[0] * exps[0]
