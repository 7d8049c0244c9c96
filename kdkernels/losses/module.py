"""What the modules have in common: parameters at construction, tensors at the call."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kdkernels.arguments import (
    COMMON,
    Settings,
    SettingsOfRows,
    check_option,
    complete_signature,
)

_DEFAULTS = {name: x for name, x in COMMON.items() if name in Settings.__annotations__}


class LossModule(nn.Module):
    """Holds the arguments of a loss function as attributes, which may be changed between calls."""

    _function: Callable[..., Any]  # the loss
    _without: tuple[str, ...] = ()  # common arguments that it does not take

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        bare = [*inspect.signature(cls.__init__).parameters.values()][1:]
        # As that of the functions: whoever asks for help sees all that is taken.
        cls.__signature__ = complete_signature(inspect.Signature(bare), cls._common())  # type: ignore[attr-defined]

    def __new__(cls, *positional: Any, **_: Any) -> LossModule:
        if positional:
            own = [name for name in inspect.signature(cls).parameters if name not in cls._common()]
            example = f": {cls.__name__}({own[0]}={positional[0]!r})" if own else ""
            raise TypeError(
                f"{cls.__name__}: takes keyword arguments only{example};"
                f" allowed are {', '.join((*own, *cls._common()))}"
            )
        return super().__new__(cls)

    def __init__(self, own: dict[str, Any], common: SettingsOfRows) -> None:
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
        self._names = (*own, *defaults)
        for name, value in {**own, **defaults, **common}.items():
            check_option(name, value, type(self)._function.__name__.removesuffix("_loss"))
            setattr(self, name, value)

    @classmethod
    def _common(cls) -> dict[str, Any]:
        """The common arguments of a module, and their defaults."""
        return {name: value for name, value in _DEFAULTS.items() if name not in cls._without}

    def _options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in self._names}

    def _call(self, *tensors: Tensor | None, **of_the_call: Any) -> Any:
        return type(self)._function(*tensors, **of_the_call, **self._options())

    def extra_repr(self) -> str:
        """Its own numbers, and whatever is not as by default."""
        own = inspect.signature(type(self)).parameters
        defaults = {**_DEFAULTS, **{name: x.default for name, x in own.items()}}

        def is_shown(name: str, value: Any) -> bool:
            flag = value is None or isinstance(value, bool)
            return (name in self._own and not flag) or bool(value != defaults.get(name))

        options = self._options().items()
        return ", ".join(f"{name}={value!r}" for name, value in options if is_shown(name, value))


class TeacherModule(LossModule):
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


class TargetModule(LossModule):
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
