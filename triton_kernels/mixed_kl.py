"""Both directions of KL: T^2 (ratio KL(q || p) + (1 - ratio) KL(p || q)), as NeMo-RL and torchtune
have it.

The twin of csrc/losses/mixed_kl.h. Parameters: temperature, kd_weight, ce_weight, label_smoothing,
t_squared, ratio.
"""

import triton
import triton.language as tl

from .reverse import reverse_finish, reverse_grad, reverse_merge, reverse_stats, variant

__all__ = ["finish", "grad", "merge", "stats", "variant"]


@triton.jit
def stats(ds, dt, k, VARIANT: tl.constexpr):
    return reverse_stats(ds, dt, k, VARIANT, True)


@triton.jit
def merge(sums, ds, dt, k, VARIANT: tl.constexpr):
    return reverse_merge(sums, ds, dt, k, VARIANT, True)


@triton.jit
def finish(sums, ps, pt, s_y, t_y, g, params, VARIANT: tl.constexpr):
    return reverse_finish(sums, ps, pt, s_y, t_y, g, params, params[5], VARIANT, True)


@triton.jit
def grad(exps, coef, VARIANT: tl.constexpr):
    return reverse_grad(exps, coef, VARIANT, True)
