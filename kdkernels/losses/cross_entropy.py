"""Cross-entropy with the target."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdkernels import call
from kdkernels.arguments import WEIGHTS, takes_common
from kdkernels.losses.module import LossModule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdkernels.arguments import OfRows, SettingsOfRows

__all__ = [
    "CrossEntropyLoss",
    "cross_entropy_loss",
]


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
    own = {"label_smoothing": label_smoothing, "z_weight": z_weight}
    return call.alone("cross_entropy", student, None, target, own, common)


class CrossEntropyLoss(LossModule):
    """Cross-entropy with label smoothing and z-loss; see `kdkernels.cross_entropy_loss`."""

    _function = cross_entropy_loss
    _without = WEIGHTS

    def __init__(
        self,
        *,
        label_smoothing: float | Tensor = 0.0,
        z_weight: float | Tensor = 0.0,
        **common: Unpack[SettingsOfRows],
    ) -> None:
        super().__init__({"label_smoothing": label_smoothing, "z_weight": z_weight}, common)

    def forward(
        self,
        student: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        return self._call(student, target, row_weight=row_weight, normalizer=normalizer)
