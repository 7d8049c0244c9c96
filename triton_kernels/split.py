"""The target against all other classes, and the gradient that the pair losses share: the twins of
Split in csrc/stats.h and of csrc/losses/pair.h. On one number per row.
"""

import triton
import triton.language as tl

from .stats import INF, SHARE, exp, inverse, log1p, usable, weighted

# A split is the tuple (log p, log(1 - p), p, 1 - p) of a target's probability p.


@triton.jit
def gain(params):
    """What a distillation, which has a factor T^2, is multiplied with: 1 / T^2 takes it out."""
    return tl.where(params[4] != 0.0, 1.0, 1.0 / (params[0] * params[0]))


@triton.jit
def split(relative, temperature, total):
    """relative: the target's logit minus the pivot; total: the others' sum of exp(. / T)."""
    odds = relative / temperature - tl.log(total)
    e = exp(tl.where(odds < 0.0, odds, -odds))
    log = log1p(e)
    large = 1.0 / (1.0 + e)
    small = e * large
    return (
        tl.where(odds < 0.0, odds, 0.0) - log,
        tl.where(odds < 0.0, 0.0, -odds) - log,
        tl.where(odds < 0.0, small, large),
        tl.where(odds < 0.0, large, small),
    )


@triton.jit
def difference(p, q):
    """p - q without cancellation when both are near 1."""
    return tl.where(p[2] > 0.5, q[3] - p[3], p[2] - q[2])


@triton.jit
def binary_kl(q, p):
    """KL between (target, not target) of teacher q and student p."""
    return weighted(q[2], q[0] - p[0]) + weighted(q[3], q[1] - p[1])


@triton.jit
def non_target(temperature, sum_s, sum_t, mean, log_t):
    """T^2 (mean / T + log sum_s - log_t), the mean being of logits: the non-target KL for
    log_t = log sum_t and mean of t - s, the cross-entropy for log_t = 0 and mean of -s. 0 without
    teacher mass, infinite where the teacher has mass and the student none."""
    value = temperature * (mean + temperature * (tl.log(sum_s) - log_t))
    return tl.where(sum_t == 0.0, 0.0, tl.where(sum_s == 0.0, INF, value))


@triton.jit
def pair_coef(temperature, inverse_s, inverse_t, h, beta, g):
    """Target: T H. Others: T [(beta - H) ph - beta qh]. Times the upstream gradient g."""
    t = g * temperature
    beta = tl.where(inverse_t == 0.0, 0.0, beta)
    return t * (beta - h) * inverse_s, -t * beta * inverse_t, t * h


@triton.jit
def log_total(p, relative, total):
    """log of the sum over all classes, relative to the pivot: by the one whose probability is not
    small."""
    return tl.where(p[2] > 0.5, relative - p[0], tl.log(total) - p[1])


@triton.jit
def smoothed(p, relative, total, own, one):
    """Of -log p over the classes that count, those that are not at -inf: the mean, one over their
    number, and d mean / d logit of the target. The twin of Smoothed in csrc/stats.h."""
    masked = relative == -INF
    every = log_total(p, relative, total)
    shares = inverse(one + tl.where(masked, 0.0, SHARE))
    mean = every - shares * (own + tl.where(masked, 0.0, relative * SHARE))
    each = shares * SHARE
    return mean, each, p[2] - tl.where(masked, 0.0, each)


@triton.jit
def smooth_cross_entropy(params, own, total, sum_ds, counted, relative, g, rest, y):
    """kd_weight * (rest + own * -log p_y) + ce_weight * CE(student, target) at temperature 1, as
    the loss and its two parts, and what it adds to the gradient: the coefficient of the
    exponential at temperature 1, that of a class that counts, and y with the target's share."""
    kd_weight, ce_weight, smoothing = params[1], params[2], params[3]
    p = split(relative, 1.0, total)
    mean, each, at_target = smoothed(p, relative, total, sum_ds, counted)
    sharp = 1.0 - smoothing
    spread = ce_weight * smoothing
    weight = kd_weight * own + ce_weight * sharp
    distillation = rest + weighted(own, -p[0])
    ce = weighted(sharp, -p[0]) + weighted(smoothing, mean)
    loss = weighted(kd_weight, rest) + weighted(spread, mean) + weighted(weight, -p[0])
    extra = weighted(weight, g * p[3])
    c2 = weighted(weight + spread, g * p[3]) * inverse(total)
    y = y - extra + g * spread * at_target
    return (loss, distillation, ce), c2, -g * spread * each, y


@triton.jit
def add_cross_entropy(params, own, sums, relative, g, rest, c0, c1, y, VARIANT: tl.constexpr):
    """kd_weight * (rest + own * -log p_y) + ce_weight * CE(student, target) at temperature 1;
    SMOOTH gives the two as parts, too. c0, c1 and y are the coefficients of kd_weight * rest.
    Returns what FINISH does."""
    if VARIANT % 4 == 2:
        values, c2, each, y = smooth_cross_entropy(
            params, own, sums[3], sums[len(sums) - 2], sums[len(sums) - 1], relative, g, rest, y
        )
        return values, (c0, c1, c2, each), y
    else:
        kd_weight, ce_weight = params[1], params[2]
        if VARIANT % 4 == 1:
            total = sums[3]
        else:
            total = sums[0]
        p = split(relative, 1.0, total)
        weight = kd_weight * own + ce_weight
        loss = weighted(kd_weight, rest) + weighted(weight, -p[0])
        extra = tl.where(weight == 0.0, 0.0, g * weight * p[3])
        if VARIANT % 4 == 1:
            return (loss,), (c0, c1, extra * inverse(total)), y - extra
        else:
            return (loss,), (c0 + extra * inverse(total), c1), y - extra


@triton.jit
def both_splits(sums, ps, pt, s_y, t_y, temperature, of_teacher):
    """(student's split, teacher's split, T^2 NCKD, 1 / sum_s, 1 / sum_t, s_y - pivot)"""
    relative = s_y - usable(ps)
    inverse_t = inverse(sums[1])
    p = split(relative, temperature, sums[0])
    q = split(t_y - usable(pt), of_teacher, sums[1])
    nckd = non_target(temperature, sums[0], sums[1], sums[2] * inverse_t, tl.log(sums[1]))
    return p, q, nckd, inverse(sums[0]), inverse_t, relative
