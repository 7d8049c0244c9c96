"""Losses that need the softmaxes p and q of student and teacher class by class: two rounds over the
classes of a row. The twin of csrc/losses/score.h.

first round    e_s, e_t and their sums, as ever
opening        what turns them into p and q, from the sums
refine         p, q -> the class's part of the loss and its score h = d loss / d p; sums of value
               and of p h; kept for the gradient: p, p h
finish         gradient = p h - p sum(p h); of the target p_y ((1 - p_y) h_y - sum of the others'
               p h)

A loss brings `at`: value and score of a class; h counts up to a constant. The target is left out of
both rounds and enters by its split: its gradient does not cancel when p_y is near 1.
"""

import triton
import triton.language as tl

from .reverse import variant
from .split import difference, gain, smooth_cross_entropy, split
from .stats import constant, counted, exp, inverse, marked, usable, weighted

__all__ = [
    "finish_by",
    "grad",
    "merge",
    "mixture",
    "opening",
    "refined",
    "score_finish",
    "splits",
    "stats",
    "upstream",
    "variant",
]


@triton.jit
def stats(ds, dt, k, VARIANT: tl.constexpr):
    es = tl.exp2(ds * k)
    et = tl.exp2(dt * k)
    if VARIANT == 2:
        e1 = marked(exp(ds), ds)
        own, one = counted(ds)
        return (es, et, e1, own, one), (es, et, e1)
    else:
        return (es, et), (es, et)


@triton.jit
def merge(sums, ds, dt, k, VARIANT: tl.constexpr):
    fs = tl.exp2(ds * k)
    ft = tl.exp2(dt * k)
    if VARIANT == 2:
        own = sums[4] * ds + sums[3]
        return sums[0] * fs, sums[1] * ft, sums[2] * exp(ds), own, sums[4]
    else:
        return sums[0] * fs, sums[1] * ft


@triton.jit
def grad(exps, coef, VARIANT: tl.constexpr):
    g = coef[0] * exps[0] + coef[1] * exps[1]
    if VARIANT == 2:
        return g + coef[2] * exps[2] + constant(exps[2], coef[3])
    else:
        return g


@triton.jit
def splits(sums, ps, pt, s_y, t_y, temperature):
    p = split(s_y - usable(ps), temperature, sums[0])
    q = split(t_y - usable(pt), temperature, sums[1])
    return p, q


@triton.jit
def opening(sums, ps, pt, s_y, t_y, params):
    p, q = splits(sums, ps, pt, s_y, t_y, params[0])
    return p[3] * inverse(sums[0]), q[3] * inverse(sums[1])


@triton.jit
def probabilities(exps, opening):
    """p, q and p - q of a class."""
    # Equal logits have equal probabilities, and p - q is 0: only of rounded products, which without
    # tl.abs would be contracted with the difference.
    p = tl.abs(exps[0] * opening[0])
    q = tl.abs(exps[1] * opening[1])
    return p, q, p - q


@triton.jit
def refined(exps, p, value, h, VARIANT: tl.constexpr):
    """What REFINE returns."""
    score = p * h
    if VARIANT == 2:
        return (value, score), (p, score, exps[2])
    else:
        return (value, score), (p, score)


@triton.jit
def target_splits(sums, ps, pt, s_y, t_y, params):
    """Of the target: p, q, p - q, and the student's split."""
    p, q = splits(sums, ps, pt, s_y, t_y, params[0])
    return p[2], q[2], difference(p, q), p


@triton.jit
def score_finish(sums, p, value, h, relative, g, params, VARIANT: tl.constexpr):
    """p: the target's split; value and h: the target's."""
    score = sums[len(sums) - 1]
    c = upstream(g, params)
    y = c * p[2] * (p[3] * h - score)
    return finish_by(sums, value, p[2] * h, c, y, relative, g, params, VARIANT)


@triton.jit
def upstream(g, params):
    """What p h is multiplied with."""
    return g[0] * params[1] * gain(params) * params[0]


@triton.jit
def finish_by(sums, value, score, c, y, relative, g, params, VARIANT: tl.constexpr):
    """value, score: f and p h of the target; y: its gradient."""
    t, kd_weight = params[0], params[1]
    AT: tl.constexpr = len(sums) - 2
    loss = t * (t * (sums[AT] + value)) * gain(params)
    c0 = -c * (sums[AT + 1] + score)
    if VARIANT == 2:
        values, c1, each, y = smooth_cross_entropy(
            params, 0.0, sums[2], sums[3], sums[4], relative, g[0], loss, y
        )
        return values, (c0, c, c1, each), y
    else:
        return (weighted(kd_weight, loss),), (c0, c), y


# ---- divergences to a mixture ---------------------------------------------------------------


@triton.jit
def log_near(u, z):
    """log u, where z is u - 1, to more digits than u has near 1."""
    # There by its series: a logarithm of 1 + z would need a second one, and a division.
    TERMS: tl.constexpr = 13 if z.dtype == tl.float64 else 6
    near = tl.full(z.shape, 1.0 / TERMS, z.dtype)
    for i in tl.static_range(1, TERMS):
        near = near * -z + 1.0 / (TERMS - i)
    # Not by tl.maximum, which would lose NaN.
    return tl.where(tl.abs(z) < 0.0625, z * near, tl.log(tl.where(u < _least(u), _least(u), u)))


@triton.jit
def _least(x):
    """What counts as nothing: its inverse is a number, and so is its logarithm."""
    if x.dtype == tl.float64:
        return 1e-300
    else:
        return 1e-37


@triton.jit
def mixture(p, q, d, a, b):
    """1 / m, d / m and d of m = a q + b p, b = 1 - a. Where m is next to nothing they are 0."""
    none = a * q + b * p <= _least(d)
    r = tl.where(none, 0.0, 1.0 / tl.where(none, 1.0, a * q + b * p))
    d = tl.where(none, 0.0, d)
    return r, d * r, d
