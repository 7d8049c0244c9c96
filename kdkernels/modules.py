"""The losses as modules: parameters at construction, tensors at the call."""

from __future__ import annotations

import inspect
import math
import warnings
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from kdkernels import losses
from kdkernels.arguments import COMMON, check_option

if TYPE_CHECKING:
    from typing_extensions import Unpack


class Common(TypedDict, total=False):
    """Keyword arguments of every loss module, as those of the functions."""

    kd_weight: float | Tensor
    ce_weight: float | Tensor
    label_smoothing: float | Tensor
    ignore_index: int
    reduction: str
    dim: int
    causal: bool
    return_parts: bool
    backend: str | None


_DEFAULTS = {name: COMMON[name] for name in Common.__annotations__}


class _Loss(nn.Module):
    """Holds the arguments of a loss function as attributes, which may be changed between calls."""

    def __new__(cls, *positional: Any, **_: Any) -> _Loss:
        if positional:
            own = [*inspect.signature(cls).parameters][:-1]
            example = f": {cls.__name__}({own[0]}={positional[0]!r})" if own else ""
            raise TypeError(
                f"{cls.__name__}: takes keyword arguments only{example};"
                f" allowed are {', '.join((*own, *_DEFAULTS))}"
            )
        return super().__new__(cls)

    def __init__(self, own: dict[str, Any], common: Common) -> None:
        super().__init__()
        unknown = common.keys() - _DEFAULTS.keys()
        if unknown:
            name, allowed = min(unknown), ", ".join((*own, *_DEFAULTS))
            why = ", which belongs to the call" if name in COMMON else ""
            raise TypeError(
                f"{type(self).__name__}: got argument {name!r}{why}; allowed are {allowed}"
            )
        self._own = tuple(own)
        for name, value in {**own, **_DEFAULTS, **common}.items():
            check_option(name, value)
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

    def __init__(self, *, temperature: float | Tensor = 4.0, **common: Unpack[Common]) -> None:
        super().__init__({"temperature": temperature}, common)

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
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
        temperature: float | Tensor = 4.0,
        alpha: float | Tensor = 1.0,
        beta: float | Tensor = 8.0,
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
    ) -> Any:
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
        self,
        *,
        temperature: float | Tensor = 1.0,
        gamma: float | Tensor = 1.5,
        **common: Unpack[Common],
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
    ) -> Any:
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
    ) -> Any:
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
        temperature: float | Tensor = 4.0,
        alpha: float | Tensor = 1.0,
        beta: float | Tensor = 8.0,
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
    ) -> Any:
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
        classes: the number of classes; the layer holds classes^2 + classes parameters, of which a
            warning speaks beyond 4096 classes.
        device, dtype: of the parameters, as of any module; they may be made on "meta" and then
            initialised by `reset_parameters()`, as FSDP does.
    """

    def __init__(
        self,
        classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(classes, bool) or not isinstance(classes, int):
            raise TypeError(f"classes: got {type(classes).__name__}; must be an integer")
        if classes < 1:
            raise ValueError(f"classes: got {classes}; must be at least 1")
        if classes > 4096:
            warnings.warn(
                f"TaskSerialization({classes}) holds {classes * (classes + 1):,} parameters:"
                " it is meant for some thousand classes at most",
                RuntimeWarning,
                stacklevel=2,
            )
        self.classes = classes
        self.linear = _Identity(classes, classes, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()

    def forward(self, student_logits: Tensor) -> Tensor:
        """Distillation logits `(..., classes)` from class logits of the same shape."""
        return self.linear(student_logits)


class _Identity(nn.Linear):
    """A linear map that starts as the identity, whoever initialises it: FSDP and others look for
    `reset_parameters` at the module that holds the parameters.
    """

    def reset_parameters(self) -> None:
        with torch.no_grad():
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)
