"""KL in either direction: the sums of reverse KL, KL(p || q) of student p and teacher q, alone or,
with FORWARD, beside forward KL. The twin of csrc/losses/reverse.h.

Reverse KL is averaged over the student, so its features are e_s and e_s x, where x = t - s, times
SHARE: classes that the teacher alone masks by the lowest number of float32 do not overflow the sum.
A class that the teacher has at -inf and the student has not is lost: it makes the loss infinite,
and counts as log(p / q) = 0 in the gradient. It is told by the sign of its first feature, -e_s, and
summed apart.

Sums: e_s of the classes that are not lost, e_t, e_s of those that are, e_s x, with FORWARD e_t x,
and of SMOOTH e^s and what counts.
"""

import triton
import triton.language as tl

from .split import binary_kl, difference, gain, non_target, smooth_cross_entropy, split
from .stats import (
    INF,
    PLAIN,
    SHARE,
    SMOOTH,
    constant,
    counted,
    exp,
    inverse,
    marked,
    usable,
    weighted,
)

# More than no class has: a lost class stays lost when its mass underflows.
LEAST = tl.constexpr(1e-37)


def variant(parts: bool, temperature: float, kd_weight: float, ce_weight: float, *_: float) -> int:
    return SMOOTH if parts or ce_weight != 0.0 else PLAIN


@triton.jit
def reverse_stats(ds, dt, k, VARIANT: tl.constexpr, FORWARD: tl.constexpr):
    es = tl.exp2(ds * k)
    et = tl.exp2(dt * k)
    lacking = dt == -INF
    x = dt - ds
    # The sign is that of a class at -inf in both, too, where there is nothing to tell.
    first = tl.where(lacking, es * -1.0, es)
    moment = es * tl.where(lacking | (ds == -INF), 0.0, x * SHARE)
    alive = tl.where(lacking, 0.0, es)
    lost = tl.where(lacking & (ds != -INF), es + LEAST, 0.0)
    sums = (alive, et, lost, moment)
    exps = (first, moment)
    if FORWARD:
        sums = sums + (et * tl.where(et > 0.0, x, 0.0),)
        exps = exps + (et,)
    if VARIANT == 2:
        e1 = marked(exp(ds), ds)
        own, one = counted(ds)
        sums = sums + (e1, own, one)
        exps = exps + (e1,)
    return sums, exps


@triton.jit
def reverse_merge(sums, ds, dt, k, VARIANT: tl.constexpr, FORWARD: tl.constexpr):
    fs = tl.exp2(ds * k)
    ft = tl.exp2(dt * k)
    lost = sums[2] * fs + tl.where(sums[2] > 0.0, LEAST, 0.0)
    moment = weighted(fs, sums[3] + weighted(sums[0], (dt - ds) * SHARE))
    out = (sums[0] * fs, sums[1] * ft, lost, moment)
    if FORWARD:
        out = out + (weighted(ft, sums[4] + weighted(sums[1], dt - ds)),)
    if VARIANT == 2:
        # Of e^s, of the logits and of the classes that count.
        AT: tl.constexpr = 5 if FORWARD else 4
        out = out + (sums[AT] * exp(ds), sums[AT + 2] * ds + sums[AT + 1], sums[AT + 2])
    return out


@triton.jit
def reverse_grad(exps, coef, VARIANT: tl.constexpr, FORWARD: tl.constexpr):
    """The coefficients are those of the features, of a class that counts, and of a lost one."""
    g = tl.where(exps[0] < 0.0, coef[len(coef) - 1], coef[0]) * exps[0] + coef[1] * exps[1]
    if FORWARD:
        g += coef[2] * exps[2]
    if VARIANT == 2:
        AT: tl.constexpr = 3 if FORWARD else 2
        g += coef[AT] * exps[AT] + constant(exps[AT], coef[AT + 1])
    return g


@triton.jit
def reverse_finish(
    sums, ps, pt, s_y, t_y, g, params, forward, VARIANT: tl.constexpr, FORWARD: tl.constexpr
):
    """T^2 (forward KL(q || p) + (1 - forward) KL(p || q)); without FORWARD that is 0."""
    t, kd_weight = params[0], params[1]
    relative = s_y - usable(ps)
    alive, sum_t, lost = sums[0], sums[1], sums[2]
    sum_s = alive + lost
    inverse_s = inverse(sum_s)
    share = alive * inverse_s
    p = split(relative, t, sum_s)
    q = split(t_y - usable(pt), t, sum_t)

    # log(p / q): of the other classes alive log((1 - c) / (1 - b)) plus that of the softmaxes among
    # them, whose mean is `mean`; of the target `at_y`, 0 where it is lost. `base` is what the sums
    # have in it.
    some = alive > 0.0
    lost_y = (t_y == -INF) & (s_y > -INF)
    rest = tl.where(some, p[1] - q[1], 0.0)
    base = tl.where(some, tl.log(sum_t) - tl.log(sum_s), 0.0)
    mean = tl.where(some, base - sums[3] * inverse(alive) * (1.0 / SHARE / t), 0.0)
    at_y = tl.where(lost_y | (p[2] == 0.0), 0.0, p[0] - q[0])
    whole = weighted(p[2], at_y) + weighted(p[3], share * (rest + mean))
    value = tl.where((lost > 0.0) | lost_y, INF, t * (t * whole))

    # Of another class T p (log(p / q) - whole), the constants in it put together so that nothing
    # cancels near the target; of the target T c (1 - c) (at_y - share (rest + mean)).
    others = p[2] * (rest - at_y) + p[3] * (lost * inverse_s * rest - share * mean)
    g0 = g[0] * kd_weight * gain(params)
    slope = g0
    if FORWARD:
        slope = g0 * (1.0 - forward)
    per = slope * p[3] * inverse_s
    # Where they count for nothing they may be infinite.
    c_student = weighted(t * per, base + others)
    c_lost = weighted(t * per, whole)  # of -e_s
    y = weighted(slope * t * p[2] * p[3], at_y - share * (rest + mean))
    c_moment = -per / SHARE
    coef = (c_student, c_moment)
    if FORWARD:
        inverse_t = inverse(sum_t)
        nckd = non_target(t, sum_s, sum_t, sums[4] * inverse_t, tl.log(sum_t))
        kl = t * (t * binary_kl(q, p)) + weighted(q[3], nckd)
        value = weighted(forward, kl) + weighted(1.0 - forward, value)
        h = difference(p, q)
        towards = forward * g0 * t
        beta = tl.where(sum_t == 0.0, 0.0, q[3])
        c_forward = towards * (beta - h) * inverse_s
        c_lost -= c_forward
        y += towards * h
        coef = (c_student + c_forward, c_moment, -towards * beta * inverse_t)
    # A NaN of a lost class is in no other sum.
    value = value * gain(params) + tl.where(lost == lost, 0.0, lost)
    if VARIANT == 2:
        AT: tl.constexpr = 5 if FORWARD else 4
        values, c1, each, y = smooth_cross_entropy(
            params, 0.0, sums[AT], sums[AT + 1], sums[AT + 2], relative, g[0], value, y
        )
        return values, coef + (c1, each, c_lost), y
    else:
        # A weight of 0 does not hide a NaN.
        value = weighted(kd_weight, value) + tl.where(lost == lost, 0.0, lost)
        return (value,), coef + (c_lost,), y
