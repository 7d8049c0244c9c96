"""DTensors: rows that are sharded or replicated, each rank's by itself, reduced by DTensor."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def is_sharded(value: Any) -> bool:
    # Nobody has one who has not imported this, which takes its time.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def over_rows(
    function: Callable[..., Tensor],
    student: Any,
    teacher: Any,
    target: Any,
    row_weight: Any,
    dim: int,
    student_name: str = "student",
) -> Any:
    """function(student, teacher, target, row_weight), which gives a tensor whose last dimensions
    are the rows, of the local tensors; the result as a DTensor. `dim` holds the classes.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    dims, mesh = student.dim(), student.device_mesh
    if not -dims <= dim < dims:
        raise ValueError(f"dim: got {dim}; {student_name} has {dims} dimensions")
    classes = dim % dims
    for axis, placement in enumerate(student.placements):
        if isinstance(placement, Shard) and placement.dim % dims == classes:
            raise ValueError(
                f"{student_name}: the classes are sharded over dimension {axis} of the device mesh;"
                " a loss needs whole rows, and classes split over ranks need vocabulary-parallel"
                " losses, which are not there yet: redistribute to rows"
            )
    kept = [p if type(p) is Shard else Replicate() for p in student.placements]

    def row_dim(placement: Any, lead: int = 0) -> Any:
        """Where a placement of the logits stands in a tensor of rows."""
        if not isinstance(placement, Shard):
            return placement
        own = placement.dim % dims
        return Shard(own - (own > classes) + lead)

    def local(name: str, value: Any, placements: list[Any]) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, DTensor):
            kind = type(value).__name__
            raise TypeError(f"{name}: got {kind}; must be a DTensor, as the {student_name} is")
        if value.device_mesh != mesh:
            raise ValueError(f"{name}: got another device mesh than the {student_name}'s")
        out: Tensor = value.redistribute(mesh, placements).to_local(grad_placements=placements)
        return out

    rows = [row_dim(placement) for placement in kept]
    value = function(
        local(student_name, student, kept),
        local("teacher", teacher, kept),
        local("target", target, rows),
        local("row_weight", row_weight, rows),
    )
    shape = [n for i, n in enumerate(student.shape) if i != classes]
    lead = value.dim() - len(shape)
    shape = [*value.shape[:lead], *shape]
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        value,
        mesh,
        [row_dim(placement, lead) for placement in kept],
        run_check=False,
        shape=torch.Size(shape),
        stride=strides,
    )


def totals(stacked: Any) -> Tensor:
    """The sums over all rows of `(k, *rows)`, the same plain tensor `(k,)` on every rank."""
    from torch.distributed.tensor import Replicate

    mesh = stacked.device_mesh
    rows = tuple(range(1, stacked.dim()))
    sums = stacked.sum(rows) if rows else stacked
    out: Tensor = sums.redistribute(mesh, [Replicate()] * mesh.ndim).to_local()
    return out


def replicated(value: Tensor, like: Any) -> Any:
    """The same value on every rank, as a DTensor on the mesh of `like`."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim, run_check=False)


def refuse_split_sequences(student: Any) -> None:
    from torch.distributed.tensor import Shard

    if any(isinstance(p, Shard) and p.dim % student.dim() == 1 for p in student.placements):
        raise ValueError(
            "causal: got sequences that are split over ranks, where the target of a position may"
            " be on another rank; shift the target yourself and leave causal=False"
        )
