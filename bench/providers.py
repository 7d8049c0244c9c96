"""Who computes a loss: kdkernels' backends, formulas in plain PyTorch, and other libraries."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

import kdkernels
from bench.cases import DTYPES, IGNORED, Case, Loss
from bench.measure import Machine
from bench.peers import PEERS

FUSED = {"cuda": "cuda", "triton": "cuda", "cpu": "cpu"}  # backend: the type of its devices
# The published formulation and the fastest plain formula, and torch.compile of each.
BASELINES = ("eager", "plain", "compile", "plain_compile")
COMPILED = {"compile": "eager", "plain_compile": "plain"}
NAMES = (*FUSED, *BASELINES, *PEERS)
PLAN = "KDKERNELS_PLAN"  # overrides the CUDA backend's planner: see csrc/cuda/plan.h


def of(case: Case, device: str) -> list[str]:
    """Who could be expected to compute this case on devices of this type."""
    fused = [name for name, kind in FUSED.items() if kind == device]
    peers = [name for name, peer in PEERS.items() if case.loss in peer.losses]
    baselines = [x for x in BASELINES if case.spec.plain or "plain" not in x]
    return [
        name
        for name in [*fused, *baselines, *peers]
        if case.providers is None or name in case.providers
    ]


def missing(name: str, case: Case, device: str) -> str | None:
    """Why a provider of `of` cannot compute this case here; None if nothing is known against it."""
    if name in PEERS:
        return PEERS[name].missing(torch.device(device))
    if name in FUSED:
        state = kdkernels.backends()[name]
        return None if state.available else state.reason
    return None


def build(name: str, case: Case) -> Loss:
    """The mean over the rows as this provider computes it, to be called by users of it."""
    if name not in FUSED:
        formula = COMPILED.get(name, name)
        loss = case.spec.plain if formula == "plain" else case.spec.eager
        loss = PEERS[name].losses[case.loss] if name in PEERS else loss
        assert loss is not None
        if case.ignored:
            loss = _of_counted_rows(loss)
        return torch.compile(loss, dynamic=False) if name in COMPILED else loss
    fused = case.spec.fused

    def mean(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        known = target if case.takes_target else None
        if case.direction != "backward":
            return fused(student, teacher, known, backend=name)
        # With reduction "mean" the forward has written the gradient already, and there would be
        # nothing to time. Losses that are combined row by row have a backward of its own.
        rows = fused(student, teacher, known, backend=name, reduction="none")
        return rows.sum() / case.counted

    return mean


def _of_counted_rows(loss: Loss) -> Loss:
    """For those without ignored rows: the others are copied out first, as their users do."""

    def counted(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        rows = target != IGNORED
        return loss(student[rows], teacher[rows], target[rows])

    return counted


def regime(name: str, case: Case, machine: Machine) -> str | None:
    """Which kernel takes the call, where the planner is known to say so."""
    try:
        from kdkernels import _host
    except ImportError:
        return None
    if name == "cuda":
        return (cuda_plan(case, machine) or {}).get("regime")
    if name != "cpu":
        return None
    isa = os.environ.get("KDKERNELS_CPU_ISA") or list(_host.isas())[-1]
    return _host.plan(isa, case.rows, case.classes, case.layout == "classes-first")


@contextmanager
def planned(plan: str) -> Iterator[None]:
    """While the planner is overridden; "": while it is not."""
    before = os.environ.pop(PLAN, None)
    if plan:
        os.environ[PLAN] = plan
    try:
        yield
    finally:
        os.environ.pop(PLAN, None)
        if before is not None:
            os.environ[PLAN] = before


def cuda_plan(case: Case, machine: Machine) -> dict[str, Any] | None:
    """What the CUDA planner makes of the case, under the environment's override if there is one."""
    from kdkernels import _host

    itemsize = DTYPES[case.dtype].itemsize
    # Cards of a name may differ: an H100 has 114 or 132 multiprocessors.
    count = getattr(machine, "multiprocessors", 0)
    known = [x for x, y in _host.gpu_devices().items() if x in machine.name and y == count]
    if not known:
        return None
    return _host.gpu_plan(
        device=known[0],
        rows=case.rows,
        classes=case.classes,
        itemsize=itemsize,
        teacher=case.spec.tensors == 2,
        kept=case.spec.exponentials,
        alike=case.layout == "dense",
        strided=case.layout == "classes-first",
        wide=itemsize == 8,
        backward=case.direction == "backward",
        writes=case.direction != "forward",
        override=os.environ.get(PLAN, ""),
    )
