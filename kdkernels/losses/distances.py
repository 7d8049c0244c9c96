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
    "TVDLoss",
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
