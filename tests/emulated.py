"""The operators of the CUDA backend on CPU tensors: its kernels themselves, run by the emulation.

`emulate()` makes `backend="cuda"` of the public functions take CPU tensors while it lasts.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor

from kdkernels import backend, ops

try:
    from kdkernels import _simt
except ImportError:
    pytest.skip("the emulation is not built: KDKERNELS_SIMT=1", allow_module_level=True)

# Small, so that few rows are many; shared memory and cache as on an H200.
DEVICE = {
    "multiprocessors": 3,
    "shared_per_block": 227 << 10,
    "shared_per_multiprocessor": 228 << 10,
    "l2": 60 << 20,
    "clusters": [],
}


@dataclass
class Settings:
    """How calls are emulated, and what the last ones did."""

    seed: int = 0
    forced: Mapping[str, Any] = field(default_factory=dict)  # see forced_plan in module.cpp
    device: Mapping[str, Any] = field(default_factory=lambda: DEVICE)
    runs: list[dict[str, Any]] = field(default_factory=list)  # plan, launches and copies of each


settings = Settings()


def _array(x: Tensor | None) -> numpy.ndarray | None:
    """The same memory; 16-bit types as their bits."""
    if x is None:
        return None
    x = x.detach()
    return (x.view(torch.int16) if x.itemsize == 2 else x).numpy()


def _logits(name: str, x: Tensor | None) -> dict[str, Any]:
    if x is None:
        return {}
    view = x[(None,) * (3 - x.dim())]
    return {name: _array(view), f"{name}_dtype": str(x.dtype).removeprefix("torch.")}


def _run(
    pass_: str,
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    params: Tensor,
    ignore_index: int,
    grad: Tensor | None = None,
    classes: int = 0,
    **more: Any,
) -> None:
    if classes:
        if grad is not None:
            grad[..., classes:] = 0
        student, teacher, grad = (
            x if x is None else x[..., :classes] for x in (student, teacher, grad)
        )
    if student.shape[:-1].numel() == 0:
        return
    shown = _simt.run(
        loss=loss,
        pass_=pass_,
        **_logits("student", student),
        **_logits("teacher", teacher),
        grad=None if grad is None else _logits("grad", grad)["grad"],
        target=_array(target),
        row_weight=_array(row_weight),
        params=params.tolist(),
        ignore_index=ignore_index,
        device=settings.device,
        forced=settings.forced,
        override=os.environ.get("KDKERNELS_PLAN", ""),  # as the binding does
        seed=settings.seed,
        **{k: _array(x) if isinstance(x, Tensor) else x for k, x in more.items()},
    )
    settings.runs.append({"pass": pass_, **shown})


def _poisoned(x: Tensor) -> Tensor:
    """What no kernel has written is NaN."""
    return x.fill_(float("nan"))


def forward(
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    params: Tensor,
    ignore_index: int,
    with_parts: bool = False,
    classes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (student, teacher, target, row_weight, params, ignore_index)
    dtype, outputs = ops.loss_dtype(student, teacher), ops.LOSSES[loss].outputs
    shape = student.shape[:-1] if outputs == 1 else (outputs, *student.shape[:-1])
    rows = _poisoned(student.new_empty(shape, dtype=dtype))
    count = student.shape[:-1].numel()
    stats = _poisoned(student.new_empty((count, ops.STATS_WIDTH), dtype=dtype))
    parts = _poisoned(ops.empty_parts(student, dtype, with_parts))
    asked = {"parts": parts} if with_parts else {}
    _run("forward", loss, *inputs, classes=classes, rows=rows, stats=stats, **asked)
    return rows, stats, parts


def backward(
    loss: str,
    grad_rows: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    stats: Tensor,
    params: Tensor,
    ignore_index: int,
    classes: int = 0,
) -> Tensor:
    grad = _poisoned(torch.empty_like(student))
    inputs = (student, teacher, target, row_weight, params, ignore_index)
    known = {"upstream": grad_rows.contiguous(), "stats": stats}
    _run("backward", loss, *inputs, grad, classes, **known)
    return grad


def reduced(
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    normalizer: Tensor | None,
    mean: bool,
    params: Tensor,
    ignore_index: int,
    with_grad: bool,
    with_parts: bool = False,
    classes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, scale, dtype = student.shape[:-1].numel(), 1.0, ops.loss_dtype(student, teacher)
    # A number on the host, unless it is in the dtype of the loss and so stands for the device's.
    if normalizer is not None and normalizer.dtype != dtype:
        scale, normalizer = 1 / normalizer.item(), None
    if mean and target is None:
        scale /= max(rows, 1)
    grad = _poisoned(torch.empty_like(student)) if with_grad else None
    total = student.new_zeros((), dtype=dtype)
    parts = _poisoned(ops.empty_parts(student, dtype, with_parts))
    _run(
        "forward_grad", loss, student, teacher, target, row_weight, params, ignore_index, grad,
        classes, scale=scale, normalizer=normalizer, mean=mean and target is not None, total=total,
        **({"parts": parts} if with_parts else {}),
    )  # fmt: skip
    return total, student.new_empty((0,)) if grad is None else grad, parts


def scale_(grad: Tensor, factor: Tensor) -> None:
    if grad.numel():
        name = str(grad.dtype).removeprefix("torch.")
        _simt.scale(grad=_array(grad), dtype=name, factor=_array(factor), seed=settings.seed)


EMULATED = ops.Operators("emulated_", lambda _, dtype: dtype)
EMULATED.implement("cpu", forward=forward, backward=backward, reduced=reduced, scale_=scale_)


@contextlib.contextmanager
def emulate(
    seed: int = 0, *, device: Mapping[str, Any] | None = None, **forced: Any
) -> Iterator[Settings]:
    """`backend="cuda"` runs emulated; `forced` names a regime and its numbers."""
    with pytest.MonkeyPatch.context() as patch:
        there = backend.Availability(True, "emulated")
        patch.setattr(backend, "_available", {**backend.backends(), "cuda": there})
        patch.setitem(backend._DEVICE, "cuda", "cpu")
        patch.setattr(ops, "FUSED", EMULATED)
        patch.setattr(settings, "seed", seed)
        patch.setattr(settings, "forced", forced)
        patch.setattr(settings, "runs", [])
        patch.setattr(settings, "device", device or DEVICE)
        yield settings
