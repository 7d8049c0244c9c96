"""The losses as Triton kernels: of each a module of its name."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from kdkernels.reference import LOSSES as ALL

LOSSES: dict[str, ModuleType] = {name: import_module(f"{__package__}.{name}") for name in ALL}


def serving(loss: ModuleType, params: list[float]) -> tuple[ModuleType, list[float]]:
    """The loss that serves a call, with the numbers that it takes: at their ends mixtures are
    others, elsewhere they want both of their shares.
    """
    if not hasattr(loss, "instead"):
        return loss, params
    other, numbers = loss.instead(params)
    return other or loss, numbers
