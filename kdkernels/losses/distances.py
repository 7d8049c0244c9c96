"""Other divergences of two softmaxes, class by class."""

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
    "ABLoss",
    "TVDLoss",
    "ab_loss",
    "tvd_loss",
]


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
    own = {"temperature": temperature, "t_squared": t_squared}
    return call.loss("tvd", student, teacher, target, own, common)


class TVDLoss(TeacherModule):
    """Total variation distance; see `kdkernels.tvd_loss`."""

    _function = tvd_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = False,
        **common: Unpack[Settings],
    ) -> None:
        super().__init__({"temperature": temperature, "t_squared": t_squared}, common)


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
    own = {"temperature": temperature, "t_squared": t_squared, "alpha": alpha, "beta": beta}
    return call.loss("ab", student, teacher, target, own, common)


class ABLoss(TeacherModule):
    """Alpha-beta divergence; see `kdkernels.ab_loss`."""

    _function = ab_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        alpha: float | Tensor = 0.5,
        beta: float | Tensor = 0.5,
        **common: Unpack[Settings],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "alpha": alpha, "beta": beta}
        super().__init__(own, common)
