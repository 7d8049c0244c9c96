"""The losses as modules: parameters at construction, tensors at the call."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from kdkernels import losses

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Common(TypedDict, total=False):
    """Keyword arguments of every loss module, as those of the functions."""

    ce_weight: float
    ignore_index: int
    reduction: str
    dim: int
    backend: str | None


_DEFAULTS: Common = {
    "ce_weight": 0.0,
    "ignore_index": -100,
    "reduction": "mean",
    "dim": -1,
    "backend": None,
}


class _Loss(nn.Module):
    """Holds the arguments of a loss function as attributes, which may be changed between calls."""

    def __init__(self, own: dict[str, Any], common: Common) -> None:
        super().__init__()
        unknown = common.keys() - _DEFAULTS.keys()
        if unknown:
            allowed = ", ".join((*own, *_DEFAULTS))
            raise TypeError(
                f"{type(self).__name__}: got argument {min(unknown)!r}; allowed are {allowed}"
            )
        self._own = tuple(own)
        for name, value in {**own, **_DEFAULTS, **common}.items():
            losses.check_option(name, value)
            setattr(self, name, value)

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self._own, *_DEFAULTS)}

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}={value!r}"
            for name, value in self._options().items()
            if name in self._own or value != _DEFAULTS.get(name)
        )


class KDLoss(_Loss):
    """Knowledge distillation; see `kdkernels.kd_loss`."""

    def __init__(self, *, temperature: float = 4.0, **common: Unpack[Common]) -> None:
        super().__init__({"temperature": temperature}, common)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return losses.kd_loss(
            student,
            teacher,
            target,
            row_weight=row_weight,
            normalizer=normalizer,
            **self._options(),
        )


class DKDLoss(_Loss):
    """Decoupled knowledge distillation; see `kdkernels.dkd_loss`."""

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        **common: Unpack[Common],
    ) -> None:
        super().__init__({"temperature": temperature, "alpha": alpha, "beta": beta}, common)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return losses.dkd_loss(
            student,
            teacher,
            target,
            row_weight=row_weight,
            normalizer=normalizer,
            **self._options(),
        )


class NKDLoss(_Loss):
    """Normalised knowledge distillation; see `kdkernels.nkd_loss`."""

    def __init__(
        self, *, temperature: float = 1.0, gamma: float = 1.5, **common: Unpack[Common]
    ) -> None:
        super().__init__({"temperature": temperature, "gamma": gamma}, common)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return losses.nkd_loss(
            student,
            teacher,
            target,
            row_weight=row_weight,
            normalizer=normalizer,
            **self._options(),
        )


class TFNKDLoss(_Loss):
    """Teacher-free NKD; see `kdkernels.tf_nkd_loss`.

    `mean_confidence` belongs to a batch, so it is an argument of the call, like `row_weight`.
    """

    def __init__(self, **common: Unpack[Common]) -> None:
        super().__init__({}, common)

    def forward(
        self,
        student: Tensor,
        target: Tensor,
        *,
        mean_confidence: float | Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return losses.tf_nkd_loss(
            student,
            target,
            mean_confidence=mean_confidence,
            row_weight=row_weight,
            normalizer=normalizer,
            **self._options(),
        )


class AEKTLoss(_Loss):
    """Adaptive explicit knowledge transfer, in derived forms; see `kdkernels.aekt_loss`."""

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        variant: str = "ratio_weighted_tckd",
        log_ratio_max: float = math.log(10),
        **common: Unpack[Common],
    ) -> None:
        own = {
            "temperature": temperature,
            "alpha": alpha,
            "beta": beta,
            "variant": variant,
            "log_ratio_max": log_ratio_max,
        }
        super().__init__(own, common)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Tensor:
        return losses.aekt_loss(
            student,
            teacher,
            target,
            row_weight=row_weight,
            normalizer=normalizer,
            **self._options(),
        )


class TaskSerialization(nn.Module):
    """AEKT's layer between classification and distillation (arXiv 2409.01679).

    A linear map from the student's class logits to the logits that the distillation loss sees. The
    class logits themselves go to the cross-entropy, and alone serve after training: the layer is
    trained along and then dropped. It starts as the identity, that is from plain distillation. How
    the paper initialises the layer, and where exactly it places it, we do not know: its full text
    was not available when this was built.

        distilled = serialization(logits)
        loss = cross_entropy(logits, target) + aekt_loss(distilled, teacher_logits, target)

    Args:
        classes: the number of classes; the layer holds classes^2 + classes parameters.
    """

    def __init__(self, classes: int) -> None:
        super().__init__()
        if isinstance(classes, bool) or not isinstance(classes, int):
            raise TypeError(f"classes: got {type(classes).__name__}; must be an integer")
        if classes < 1:
            raise ValueError(f"classes: got {classes}; must be at least 1")
        self.classes = classes
        self.linear = nn.Linear(classes, classes)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        with torch.no_grad():
            nn.init.eye_(self.linear.weight)
            nn.init.zeros_(self.linear.bias)

    def forward(self, student_logits: Tensor) -> Tensor:
        """Distillation logits `(..., classes)` from class logits of the same shape."""
        return self.linear(student_logits)
