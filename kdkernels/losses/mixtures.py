"""Divergences from a mixture of student and teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdkernels import call
from kdkernels.arguments import takes_common
from kdkernels.losses.module import TeacherModule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdkernels.arguments import Common, Settings

__all__ = [
    "JSDLoss",
    "SkewKLLoss",
    "SkewReverseKLLoss",
    "jsd_loss",
    "skew_kl_loss",
    "skew_reverse_kl_loss",
]


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
    own = {"temperature": temperature, "t_squared": t_squared, "beta": beta}
    return call.loss("jsd", student, teacher, target, own, common)


class JSDLoss(TeacherModule):
    """Generalised Jensen-Shannon divergence; see `kdkernels.jsd_loss`."""

    _function = jsd_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        beta: float | Tensor = 0.5,
        **common: Unpack[Settings],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "beta": beta}
        super().__init__(own, common)


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

    In float32 a class whose mixture is below 1e-37 has no value, and near alpha = 1, where the loss
    is of the order (1 - alpha)^2, terms of the order 1 - alpha are what is rounded: at 0.9 half a
    per cent of the loss where teacher and student are 1e-3 apart, less where they are more so.
    """
    own = {"temperature": temperature, "t_squared": t_squared, "alpha": alpha}
    return call.loss("skew_kl", student, teacher, target, own, common)


class SkewKLLoss(TeacherModule):
    """Skew KL; see `kdkernels.skew_kl_loss`."""

    _function = skew_kl_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        alpha: float | Tensor = 0.1,
        **common: Unpack[Settings],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "alpha": alpha}
        super().__init__(own, common)


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
        alpha: the student's share of the mixture, 0 or from 1e-30 to 1; what float32 holds of the
            loss is as for `skew_kl_loss`.
        detach_mixture: whether the student's part in the mixture is held constant, as in
            DistiLLM-2.
    """
    own = {
        "temperature": temperature,
        "t_squared": t_squared,
        "alpha": alpha,
        "detach_mixture": detach_mixture,
    }
    return call.loss("skew_reverse_kl", student, teacher, target, own, common)


class SkewReverseKLLoss(TeacherModule):
    """Skew reverse KL; see `kdkernels.skew_reverse_kl_loss`."""

    _function = skew_reverse_kl_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        alpha: float | Tensor = 0.1,
        detach_mixture: bool = False,
        **common: Unpack[Settings],
    ) -> None:
        own = {
            "temperature": temperature,
            "t_squared": t_squared,
            "alpha": alpha,
            "detach_mixture": detach_mixture,
        }
        super().__init__(own, common)
