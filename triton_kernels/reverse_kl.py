"""Reverse KL: T^2 KL(p || q), p and q the softmax of student and teacher at temperature T. Gu et
al. 2023, arXiv 2306.08543.

The twin of csrc/losses/reverse_kl.h. Parameters: temperature, kd_weight, ce_weight,
label_smoothing, t_squared.
"""

import triton
import triton.language as tl

from .reverse import reverse_finish, reverse_grad, reverse_merge, reverse_stats, variant

__all__ = ["finish", "grad", "merge", "stats", "variant"]


@triton.jit
def stats(ds, dt, k, VARIANT: tl.constexpr):
    return reverse_stats(ds, dt, k, VARIANT, False)


@triton.jit
def merge(sums, ds, dt, k, VARIANT: tl.constexpr):
    return reverse_merge(sums, ds, dt, k, VARIANT, False)


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    return reverse_finish(sums, ps, pt, s_y, t_y, g, params, 0.0, VARIANT, False)


@triton.jit
def grad(exps, coef, VARIANT: tl.constexpr):
    return reverse_grad(exps, coef, VARIANT, False)
