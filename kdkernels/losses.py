"""The losses as functions."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from kdkernels import call
from kdkernels.arguments import (
    COMMON,
    RULES_OF_A_MIXTURE,
    RULES_OF_POWERS,
    WEIGHTS,
    check_option,
    takes_common,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdkernels.arguments import Common, OfRows


class TargetSplit(NamedTuple):
    """What `target_split` returns, each with the shape of the target."""

    log_target: Tensor
    log_rest: Tensor
    logsumexp_rest: Tensor


@takes_common
def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 4.0,
    t_squared: bool = True,
    teacher_temperature: float | Tensor | None = None,
    **common: Unpack[Common],
) -> Any:
    """Knowledge distillation: T^2 KL(teacher || student) at temperature T, per row.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        student: raw logits `(..., classes)`, or with the classes at `dim`; float16, bfloat16,
            float32 or float64. Probabilities given as logits are not noticed: the loss is then that
            of softmaxes of probabilities, which are nearly uniform.
        teacher: raw logits of the same shape on the same device; its dtype may differ.
        target: integer class ids, the shape of the logits without the classes. Optional here;
            needed when `ce_weight` is not 0, and a given target applies `ignore_index`.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2, so that its gradient does not
            shrink as T grows. False is the divergence itself, as most trainers have it.
        teacher_temperature: the teacher's, where it is another one than T.

    With one class every softmax is 1: the loss is 0, and so is the gradient; of every loss.

    In float32 the value is a difference of terms that are rounded to some 1e-7 T^2: a divergence
    below that has no digits left, here and in `reverse_kl_loss` and `mixed_kl_loss`. Its gradient
    keeps them.

    The student's gradient is fused and comes in the student's dtype. Every other derivative is
    right, and the reference's: the teacher's gradient (with a warning, once), those of weights
    and temperature, second derivatives. Transforms of torch.func (grad, vjp, jvp, jacrev, jacfwd,
    hessian, vmap and their compositions) and forward mode work, with the kernels where they give
    what is asked for. A teacher made under torch.inference_mode() is taken; it is copied where it
    is kept for backward (reduction "none", float16 students, or weights that are learned).

    DTensors may be sharded or replicated over their rows, never over the classes.

    No input is copied at the size of the logits, with two exceptions: logits of four or more
    dimensions whose strides let the dimensions other than the classes be merged into no two, and
    the teacher just named.
    """
    temperature = check_option("temperature", temperature)
    of_teacher = check_option("teacher_temperature", teacher_temperature)
    own = {
        "t_squared": check_option("t_squared", t_squared),
        "teacher_temperature": temperature if of_teacher is None else of_teacher,
    }
    return call.loss("kd", student, teacher, target, temperature, own, common)


@takes_common
def reverse_kl_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    **common: Unpack[Common],
) -> Any:
    """Reverse KL: T^2 KL(student || teacher) at temperature T, per row.

    Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543. Where
    the student has mass on a class that the teacher has at -inf the loss is infinite. The gradient
    is finite there, too: T p (h - sum p h) with h = log(p / q), and h = 0 for such classes.

    Args:
        student, teacher, target: as for `kd_loss`, whose other promises hold as well.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2.
    """
    temperature = check_option("temperature", temperature)
    own = {"t_squared": check_option("t_squared", t_squared)}
    return call.loss("reverse_kl", student, teacher, target, temperature, own, common)


@takes_common
def mixed_kl_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    ratio: float | Tensor = 0.5,
    **common: Unpack[Common],
) -> Any:
    """Both directions of KL: T^2 (ratio KL(q || p) + (1 - ratio) KL(p || q)), per row.

    q and p are the softmax at T of teacher and student. The mixed KL of NeMo-RL, and torchtune's
    symmetric KL; with a ratio of 0.5 half of Jeffreys' divergence. One sweep computes both. Where
    the reverse direction is infinite see `reverse_kl_loss`.

    Args:
        student, teacher, target: as for `kd_loss`, whose other promises hold as well.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2.
        ratio: the share of the forward direction, from 0 to 1.
    """
    temperature = check_option("temperature", temperature)
    own = {"t_squared": check_option("t_squared", t_squared), "ratio": check_option("ratio", ratio)}
    return call.loss("mixed_kl", student, teacher, target, temperature, own, common)


@takes_common
def jsd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    beta: float | Tensor = 0.5,
    **common: Unpack[Common],
) -> Any:
    """Generalised Jensen-Shannon divergence: T^2 (beta KL(q || m) + (1 - beta) KL(p || m)).

    q and p are the softmax at T of teacher and student, m = beta q + (1 - beta) p. beta = 0 is
    KL(q || p) and beta = 1 is KL(p || q): the formula is switched there, as TRL does it; these are
    not its limits, which are 0. Agarwal et al., "On-Policy Distillation of Language Models" (GKD),
    arXiv 2306.13649. Between the ends its terms are summed without cancellation: it keeps its
    digits where teacher and student nearly agree, and is exactly 0 where they do.

    Args:
        student, teacher, target: as for `kd_loss`, whose other promises hold as well.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2.
        beta: 0, or from 1e-30 to 1.
    """
    temperature = check_option("temperature", temperature)
    own = {
        "t_squared": check_option("t_squared", t_squared),
        "beta": check_option("beta", beta, RULES_OF_A_MIXTURE),
    }
    return call.loss("jsd", student, teacher, target, temperature, own, common)


@takes_common
def skew_kl_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    alpha: float | Tensor = 0.1,
    **common: Unpack[Common],
) -> Any:
    """Skew KL: T^2 KL(q || alpha q + (1 - alpha) p) at temperature T, per row.

    q and p are the softmax at T of teacher and student. alpha = 0 is the plain KL(q || p), alpha =
    1 is 0. Ko et al., "DistiLLM", arXiv 2402.03898, whose code leaves out the teacher's entropy, a
    constant.

    Args:
        student, teacher, target: as for `kd_loss`, whose other promises hold as well.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2.
        alpha: the teacher's share of the mixture, 0 or from 1e-30 to 1.
    """
    temperature = check_option("temperature", temperature)
    own = {
        "t_squared": check_option("t_squared", t_squared),
        "alpha": check_option("alpha", alpha, RULES_OF_A_MIXTURE),
    }
    return call.loss("skew_kl", student, teacher, target, temperature, own, common)


@takes_common
def skew_reverse_kl_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    alpha: float | Tensor = 0.1,
    detach_mixture: bool = False,
    **common: Unpack[Common],
) -> Any:
    """Skew reverse KL: T^2 KL(p || alpha p + (1 - alpha) q) at temperature T, per row.

    q and p are the softmax at T of teacher and student. alpha = 0 is the plain KL(p || q), infinite
    where the student has mass and the teacher none; alpha = 1 is 0. Ko et al., "DistiLLM", arXiv
    2402.03898, and DistiLLM-2, arXiv 2503.07067.

    Args:
        student, teacher, target: as for `kd_loss`, whose other promises hold as well.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2.
        alpha: the student's share of the mixture, 0 or from 1e-30 to 1.
        detach_mixture: whether the student's part in the mixture is held constant, as in
            DistiLLM-2.
    """
    temperature = check_option("temperature", temperature)
    own = {
        "t_squared": check_option("t_squared", t_squared),
        "alpha": check_option("alpha", alpha, RULES_OF_A_MIXTURE),
        "detach_mixture": check_option("detach_mixture", detach_mixture),
    }
    return call.loss("skew_reverse_kl", student, teacher, target, temperature, own, common)


@takes_common
def tvd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = False,
    **common: Unpack[Common],
) -> Any:
    """Total variation distance: 1/2 sum |p - q| at temperature T, per row.

    Its gradient is 0 by classes where p and q are equal. Wen et al., "f-Divergence Minimization for
    Sequence-Level Knowledge Distillation", arXiv 2307.15190.

    Args:
        student, teacher, target: as for `kd_loss`, whose other promises hold as well.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2.
    """
    temperature = check_option("temperature", temperature)
    own = {"t_squared": check_option("t_squared", t_squared)}
    return call.loss("tvd", student, teacher, target, temperature, own, common)


@takes_common
def ab_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    alpha: float | Tensor = 0.5,
    beta: float | Tensor = 0.5,
    **common: Unpack[Common],
) -> Any:
    """Alpha-beta divergence of q and p, the softmax at T of teacher and student, per row:

        -T^2 / (a b) sum (q^a p^b - a / (a + b) q^(a + b) - b / (a + b) p^(a + b))

    with a = alpha and b = beta. Wang et al., "ABKD", arXiv 2505.04560, whose scripts have
    alpha = 0.2, beta = 0.7 for language models and 0.8, 0.3 for images. alpha + beta = 1 is the
    alpha divergence, of which alpha = 1, beta = 0 is KL(q || p), and alpha = 0, beta = 1 is
    KL(p || q); alpha = beta = 0.5 is 4 times the squared Hellinger distance, 1/2 sum (sqrt p -
    sqrt q)^2. A parameter below 1e-4 is taken to be 0, and the formula to be its limit there:

        alpha = 0   sum (p^b log(p^b / q^b) - p^b + q^b) / b^2
        beta = 0    sum (q^a log(q^a / p^a) - q^a + p^a) / a^2
        both        1/2 sum (log p - log q)^2

    The authors' code divides by b, and by a, where the limits have their squares: it jumps there
    unless that parameter is 1. Terms that cancel are not summed: the loss keeps its digits where
    teacher and student nearly agree, near the limits too, and is exactly 0 where they do.

    Where the student has a class and the teacher has it at -inf, the loss is infinite if alpha is
    0; where the teacher has one that the student has not, if beta is 0. The gradient is that of the
    finite terms then, as in `reverse_kl_loss`.

    Args:
        student, teacher, target: as for `kd_loss`, whose other promises hold as well.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2.
        alpha, beta: the exponents, each from 0 to 1.
    """
    temperature = check_option("temperature", temperature)
    own = {
        "t_squared": check_option("t_squared", t_squared),
        "alpha": check_option("alpha", alpha, RULES_OF_POWERS),
        "beta": check_option("beta", beta, RULES_OF_POWERS),
    }
    return call.loss("ab", student, teacher, target, temperature, own, common)


@partial(takes_common, without=WEIGHTS)
def cross_entropy_loss(
    student: Tensor,
    target: Tensor,
    *,
    label_smoothing: float | Tensor = 0.0,
    z_weight: float | Tensor = 0.0,
    **common: Unpack[OfRows],
) -> Any:
    """Cross-entropy of the student with the target: -log p_y + z_weight log(sum exp z)^2, per row.

    As torch's, with label smoothing over the classes that are not at -inf, and the z-loss of PaLM
    (Chowdhery et al., arXiv 2204.02311), which keeps the logarithm of the normaliser near 0.

    Args:
        student: raw logits, as for `kd_loss`, whose other promises hold as well.
        target: integer class ids, the shape of the logits without the classes.
        label_smoothing: from 0 to 1, as torch's.
        z_weight: 0, or from 1e-30 to 1e30.
    """
    own = {
        "label_smoothing": check_option("label_smoothing", label_smoothing),
        "z_weight": check_option("z_weight", z_weight),
    }
    return call.alone("cross_entropy", student, None, target, own, common)


@takes_common
def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    t_squared: bool = True,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
    **common: Unpack[Common],
) -> Any:
    """Decoupled knowledge distillation: T^2 (alpha TCKD + beta NCKD), per row.

    TCKD is the divergence between the binary distributions (target, not target) of teacher and
    student, NCKD that between their distributions over the other classes. Zhao et al., "Decoupled
    Knowledge Distillation", arXiv 2203.08679; the defaults are those for CIFAR-100, ImageNet has
    T = 1, alpha = 1, beta = 0.5. The paper's loss adds cross-entropy (`ce_weight=1`) and warms the
    distillation up over the first epochs (`kd_weight`), which is left to the caller.

    Args:
        student, teacher: raw logits, as for `kd_loss`, whose other promises hold as well.
        target: integer class ids, the shape of the logits without the classes.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether both terms are multiplied by T^2.
        alpha, beta: 0, or from 1e-30 to 1e30.
    """
    temperature = check_option("temperature", temperature)
    own = {
        "t_squared": check_option("t_squared", t_squared),
        "alpha": check_option("alpha", alpha),
        "beta": check_option("beta", beta),
    }
    return call.loss("dkd", student, teacher, target, temperature, own, common)


@takes_common
def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    gamma: float | Tensor = 1.5,
    **common: Unpack[Common],
) -> Any:
    """Normalised knowledge distillation: -b log c - gamma T^2 sum_{i != y} qh_i log ph_i, per row.

    b and c are the probabilities of the target in teacher and student, at temperature 1; qh and ph
    their distributions over the other classes, at temperature T. Both terms are cross-entropies,
    so the minimum is not 0. Yang et al., arXiv 2303.13005 (first as 2208.10139); the defaults are
    those for ImageNet, CIFAR-100 has T = 3, gamma = 3.5. The paper's loss adds cross-entropy
    (`ce_weight=1`).

    Args:
        student, teacher: raw logits, as for `kd_loss`, whose other promises hold as well.
        target: integer class ids, the shape of the logits without the classes. Or, as the authors'
            code takes them, one-hot or mixed labels: floating point, the shape of the logits; of
            each row the class of the largest counts, the first of equal ones. `ce_weight` must then
            be 0, because cross-entropy with them is not the one with that class.
        temperature: T, from 1e-4 to 1e4, of the second term only.
        t_squared: whether the second term is multiplied by T^2.
        gamma: 0, or from 1e-30 to 1e30.
    """
    temperature = check_option("temperature", temperature)
    own = {"t_squared": check_option("t_squared", t_squared), "gamma": check_option("gamma", gamma)}
    return call.loss("nkd", student, teacher, target, temperature, own, common)


@takes_common
def tf_nkd_loss(
    student: Tensor,
    target: Tensor,
    *,
    mean_confidence: float | Tensor | None = None,
    **common: Unpack[Common],
) -> Any:
    """Teacher-free NKD: -(c + 1 - mean(c)) log c, per row, the factor not being differentiated.

    c is the student's probability of the target at temperature 1. Yang et al., "Rethinking
    Knowledge Distillation via Cross-Entropy", arXiv 2208.10139. The paper's loss adds cross-entropy
    (`ce_weight=1`).

    Args:
        student: raw logits, as for `kd_loss`, whose other promises hold as well. They are swept
            twice, once for mean(c), and once more with label smoothing.
        target: integer class ids, the shape of the logits without the classes.
        mean_confidence: replaces mean(c), which is otherwise taken over the rows that are read
            (neither ignored nor of weight 0) and are not NaN. A number from 0 to 1, or a 0-d tensor
            whose value is not checked. With data split over processes, the mean over all of them.
    """
    return call.tf_nkd(student, target, mean_confidence, common)


@takes_common
def aekt_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    t_squared: bool = True,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
    variant: str = "ratio_weighted_tckd",
    log_ratio_max: float = math.log(10),
    **common: Unpack[Common],
) -> Any:
    """Adaptive explicit knowledge transfer: T^2 (alpha phi(c; b) + beta NCKD), per row.

    b and c are the probabilities of the target in teacher and student at temperature T, NCKD as in
    `dkd_loss`. Park and Lee, arXiv 2409.01679: the preprint is public, but its full text was not
    available when this was built. The forms of phi are ours, derived from a published summary of it
    (the student learns the teacher's confidence in the target, explicit knowledge, adaptively by
    the ratio r = b / c, along with the other classes); the default may differ from the paper's:

    - "ratio_weighted_tckd" (default): r TCKD with r held constant: DKD whose explicit term counts
      more where the student lags the teacher, and less where it leads.
    - "ratio_weighted_ce": -r log c with r held constant; draws c to 1, not to b.
    - "confidence_weighted_ce": -b log c; the target term of NKD at temperature T.
    - "ratio_divergence": r - log r - 1, least at c = b. Its gradient holds r itself. Beyond
      `log_ratio_max` it goes on as the tangent in log r.
    - "ratio_coupled_tckd": r TCKD, r differentiated as well.

    The paper also separates classification from distillation by a linear layer on the student's
    logits: `kdkernels.TaskSerialization`.

    Args:
        student, teacher: raw logits, as for `kd_loss`, whose other promises hold as well.
        target: integer class ids, the shape of the logits without the classes.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether both terms are multiplied by T^2.
        alpha, beta: 0, or from 1e-30 to 1e30.
        variant: the form of phi, one of the above.
        log_ratio_max: log r is clamped here, from 0 to 80, because r overflows when c is tiny.
    """
    temperature = check_option("temperature", temperature)
    own = {
        "t_squared": check_option("t_squared", t_squared),
        "alpha": check_option("alpha", alpha),
        "beta": check_option("beta", beta),
        "variant": check_option("variant", variant),
        "log_ratio_max": check_option("log_ratio_max", log_ratio_max),
    }
    return call.loss("aekt", student, teacher, target, temperature, own, common)


def target_split(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int = -1,
    classes: int | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TargetSplit:
    """Splits softmax(logits / T) into the target and the rest, the decomposition under DKD and NKD.

    Args:
        logits: `(..., classes)`, or with the classes at `dim`; any floating dtype of `kd_loss`.
        target: integer class ids, the shape of the logits without the classes.
        temperature: T, from 1e-4 to 1e4.
        dim, classes, ignore_index, backend: as in `kd_loss`; ignored rows are 0 in all results.

    Returns:
        log_target: the logarithm of the target's probability, accurate also when that is near 1.
        log_rest: the logarithm of 1 minus it, accurate also when that is near 0.
        logsumexp_rest: the logsumexp of logits / T over the classes other than the target.

        Each has the shape of the target, float64 for float64 logits, else float32, and is
        differentiable. With no other class left, the last two are -inf.

    Raises the errors of `kd_loss`.
    """
    own = check_option("temperature", temperature)
    given = {"dim": dim, "classes": classes, "ignore_index": ignore_index, "backend": backend}
    options = {**COMMON, **{name: check_option(name, value) for name, value in given.items()}}
    return TargetSplit(*call.rows("target_split", logits, target, (own,), options).unbind())
