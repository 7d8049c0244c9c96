"""The losses as Triton kernels: of each a module of its name."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

from kdkernels.reference import LOSSES as ALL

LOSSES: dict[str, ModuleType] = {name: import_module(f"{__package__}.{name}") for name in ALL}


def servings(loss: ModuleType, params: list[Any]) -> list[tuple[Any, ModuleType, list[Any]]]:
    """By which losses a call of this one is computed: a mixture by itself, and at its ends by KL in
    one direction. Of each of them where it is (a bool, or one for each row), which loss, and its
    numbers. params: floats, or tensors of one for each row; exactly one serves a row.
    """
    own = loss.numbers(params) if hasattr(loss, "numbers") else params
    if not hasattr(loss, "instead"):
        return [(True, loss, own)]
    ends, other, numbers = loss.instead(params)
    return [(ends, other, numbers), (ends ^ True, loss, own)]


def serving(loss: ModuleType, params: list[float]) -> tuple[ModuleType, list[float]]:
    """The loss that serves a call of these numbers, and those that it takes."""
    return next(x[1:] for x in servings(loss, params) if x[0])
