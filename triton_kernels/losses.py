"""The list of losses: a module each, one line each."""

from __future__ import annotations

from types import ModuleType

from . import (
    ab,
    aekt,
    cross_entropy,
    dkd,
    jsd,
    kd,
    mixed_kl,
    nkd,
    reverse_kl,
    skew_kl,
    skew_reverse_kl,
    target_split,
    tvd,
)

LOSSES: dict[str, ModuleType] = {
    "kd": kd,
    "dkd": dkd,
    "nkd": nkd,
    "aekt": aekt,
    "reverse_kl": reverse_kl,
    "mixed_kl": mixed_kl,
    "jsd": jsd,
    "skew_kl": skew_kl,
    "skew_reverse_kl": skew_reverse_kl,
    "tvd": tvd,
    "ab": ab,
    "cross_entropy": cross_entropy,
    "target_split": target_split,
}


def serving(loss: ModuleType, params: list[float]) -> tuple[ModuleType, list[float]]:
    """The loss that serves a call, with the numbers that it takes: at their ends mixtures are
    others, elsewhere they want both of their shares.
    """
    if not hasattr(loss, "instead"):
        return loss, params
    other, numbers = loss.instead(params)
    return other or loss, numbers
