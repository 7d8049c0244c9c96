"""The losses as modules: parameters at construction, tensors at the call."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from torch import Tensor, nn

from kdkernels import losses
from kdkernels.arguments import (
    COMMON,
    RULES,
    RULES_OF_A_MIXTURE,
    RULES_OF_POWERS,
    WEIGHTS,
    check_option,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class OfRows(TypedDict, total=False):
    """Keyword arguments of every loss module, as those of the functions."""

    ignore_index: int
    reduction: str
    dim: int
    classes: int | None
    causal: bool
    backend: str | None


class Common(OfRows, total=False):
    """And those of a loss that is weighed against a cross-entropy."""

    kd_weight: float | Tensor
    ce_weight: float | Tensor
    label_smoothing: float | Tensor
    return_parts: bool


_DEFAULTS = {name: x for name, x in COMMON.items() if name in Common.__annotations__}


class _Loss(nn.Module):
    """Holds the arguments of a loss function as attributes, which may be changed between calls."""

    _function: Callable[..., Any]  # the loss
    _without: tuple[str, ...] = ()  # common arguments that it does not take
    _rules: Mapping[str, Callable[..., Any]] = RULES

    def __new__(cls, *positional: Any, **_: Any) -> _Loss:
        if positional:
            own = [*inspect.signature(cls).parameters][:-1]
            example = f": {cls.__name__}({own[0]}={positional[0]!r})" if own else ""
            raise TypeError(
                f"{cls.__name__}: takes keyword arguments only{example};"
                f" allowed are {', '.join((*own, *cls._common()))}"
            )
        return super().__new__(cls)

    def __init__(self, own: dict[str, Any], common: OfRows) -> None:
        super().__init__()
        defaults = self._common()
        unknown = common.keys() - defaults.keys()
        if unknown:
            name, allowed = min(unknown), ", ".join((*own, *defaults))
            why = ", which belongs to the call" if name in COMMON else ""
            raise TypeError(
                f"{type(self).__name__}: got argument {name!r}{why}; allowed are {allowed}"
            )
        self._own = tuple(own)
        for name, value in {**own, **defaults, **common}.items():
            check_option(name, value, self._rules)
            setattr(self, name, value)

    @classmethod
    def _common(cls) -> dict[str, Any]:
        """The common arguments of a module, and their defaults."""
        return {name: value for name, value in _DEFAULTS.items() if name not in cls._without}

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self._own, *self._common())}

    def _call(self, *tensors: Tensor | None, **of_the_call: Any) -> Any:
        return type(self)._function(*tensors, **of_the_call, **self._options())

    def extra_repr(self) -> str:
        """Its own numbers, and whatever is not as by default."""
        own = inspect.signature(type(self)).parameters
        defaults = {**_DEFAULTS, **{name: own[name].default for name in self._own}}
        own = inspect.signature(type(self)).parameters
        defaults = {**_DEFAULTS, **{name: own[name].default for name in self._own}}

        def is_shown(name: str, value: Any) -> bool:
            flag = value is None or isinstance(value, bool)
            return (name in self._own and not flag) or bool(value != defaults[name])

        options = self._options().items()
        return ", ".join(f"{name}={value!r}" for name, value in options if is_shown(name, value))


class _TeacherLoss(_Loss):
    """Of student and teacher; a target is optional."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor | None = None,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        return self._call(student, teacher, target, row_weight=row_weight, normalizer=normalizer)


class _TargetLoss(_Loss):
    """Of student, teacher and target."""

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        target: Tensor,
        *,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        return self._call(student, teacher, target, row_weight=row_weight, normalizer=normalizer)


class KDLoss(_TeacherLoss):
    """Knowledge distillation; see `kdkernels.kd_loss`."""

    _function = losses.kd_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 4.0,
        t_squared: bool = True,
        teacher_temperature: float | Tensor | None = None,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "temperature": temperature,
            "t_squared": t_squared,
            "teacher_temperature": teacher_temperature,
        }
        super().__init__(own, common)


class ReverseKLLoss(_TeacherLoss):
    """Reverse KL; see `kdkernels.reverse_kl_loss`."""

    _function = losses.reverse_kl_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        **common: Unpack[Common],
    ) -> None:
        super().__init__({"temperature": temperature, "t_squared": t_squared}, common)


class MixedKLLoss(_TeacherLoss):
    """Both directions of KL; see `kdkernels.mixed_kl_loss`."""

    _function = losses.mixed_kl_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        ratio: float | Tensor = 0.5,
        **common: Unpack[Common],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "ratio": ratio}
        super().__init__(own, common)


class JSDLoss(_TeacherLoss):
    """Generalised Jensen-Shannon divergence; see `kdkernels.jsd_loss`."""

    _function = losses.jsd_loss
    _rules = RULES_OF_A_MIXTURE

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        beta: float | Tensor = 0.5,
        **common: Unpack[Common],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "beta": beta}
        super().__init__(own, common)


class SkewKLLoss(_TeacherLoss):
    """Skew KL; see `kdkernels.skew_kl_loss`."""

    _function = losses.skew_kl_loss
    _rules = RULES_OF_A_MIXTURE

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        alpha: float | Tensor = 0.1,
        **common: Unpack[Common],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "alpha": alpha}
        super().__init__(own, common)


class SkewReverseKLLoss(_TeacherLoss):
    """Skew reverse KL; see `kdkernels.skew_reverse_kl_loss`."""

    _function = losses.skew_reverse_kl_loss
    _rules = RULES_OF_A_MIXTURE

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        alpha: float | Tensor = 0.1,
        detach_mixture: bool = False,
        **common: Unpack[Common],
    ) -> None:
        own = {
            "temperature": temperature,
            "t_squared": t_squared,
            "alpha": alpha,
            "detach_mixture": detach_mixture,
        }
        super().__init__(own, common)


class TVDLoss(_TeacherLoss):
    """Total variation distance; see `kdkernels.tvd_loss`."""

    _function = losses.tvd_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = False,
        **common: Unpack[Common],
    ) -> None:
        super().__init__({"temperature": temperature, "t_squared": t_squared}, common)


class ABLoss(_TeacherLoss):
    """Alpha-beta divergence; see `kdkernels.ab_loss`."""

    _function = losses.ab_loss
    _rules = RULES_OF_POWERS

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        alpha: float | Tensor = 0.5,
        beta: float | Tensor = 0.5,
        **common: Unpack[Common],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "alpha": alpha, "beta": beta}
        super().__init__(own, common)


class DKDLoss(_TargetLoss):
    """Decoupled knowledge distillation; see `kdkernels.dkd_loss`."""

    _function = losses.dkd_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 4.0,
        t_squared: bool = True,
        alpha: float | Tensor = 1.0,
        beta: float | Tensor = 8.0,
        **common: Unpack[Common],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "alpha": alpha, "beta": beta}
        super().__init__(own, common)


class NKDLoss(_TargetLoss):
    """Normalised knowledge distillation; see `kdkernels.nkd_loss`."""

    _function = losses.nkd_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        gamma: float | Tensor = 1.5,
        **common: Unpack[Common],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "gamma": gamma}
        super().__init__(own, common)


class AEKTLoss(_TargetLoss):
    """Adaptive explicit knowledge transfer, in derived forms; see `kdkernels.aekt_loss`."""

    _function = losses.aekt_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 4.0,
        t_squared: bool = True,
        alpha: float | Tensor = 1.0,
        beta: float | Tensor = 8.0,
        variant: str = "ratio_weighted_tckd",
        log_ratio_max: float = math.log(10),
        **common: Unpack[Common],
    ) -> None:
        own = {
            "temperature": temperature,
            "t_squared": t_squared,
            "alpha": alpha,
            "beta": beta,
            "variant": variant,
            "log_ratio_max": log_ratio_max,
        }
        super().__init__(own, common)


class TFNKDLoss(_Loss):
    """Teacher-free NKD; see `kdkernels.tf_nkd_loss`.

    `mean_confidence` belongs to a batch, so it is an argument of the call, like `row_weight`.
    """

    _function = losses.tf_nkd_loss

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
        return self._call(
            student,
            target,
            mean_confidence=mean_confidence,
            row_weight=row_weight,
            normalizer=normalizer,
        )


class CrossEntropyLoss(_Loss):
    """Cross-entropy with label smoothing and z-loss; see `kdkernels.cross_entropy_loss`."""

    _function = losses.cross_entropy_loss
    _without = WEIGHTS

    def __init__(
        self,
        *,
        label_smoothing: float | Tensor = 0.0,
        z_weight: float | Tensor = 0.0,
        **common: Unpack[OfRows],
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
