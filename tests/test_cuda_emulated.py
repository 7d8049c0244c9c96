"""The CUDA kernels against the reference in float64, run and checked by the emulation.

The grid of test_equivalence.py on small and odd shapes. Every regime is forced in turn, with few
threads, for the planner would take only the first ones for rows this short, and under another
schedule for each call. A race, an access outside of a tensor or a value that nobody wrote is an
error, not a wrong number: see csrc/simt/simt.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cases import (
    CASES,
    IGNORED,
    LAYOUTS,
    MAIN_CASES,
    SCALAR_CASES,
    Case,
    assert_same,
    evaluate,
    make_inputs,
)
from emulated import emulate
from test_equivalence import DTYPE_PAIRS, KINDS, REDUCTIONS, Variants, check_reductions, check_rows

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64

REGIMES: dict[str, dict[str, Any]] = {
    "as planned": {},
    "8 lanes": {"regime": "lanes", "lanes": 8, "threads": 32, "blocks": 2},
    "16 lanes": {"regime": "lanes", "lanes": 16, "threads": 64, "blocks": 1},
    "32 lanes": {"regime": "lanes", "lanes": 32, "threads": 64, "blocks": 2},
    "block": {"regime": "block", "threads": 64, "blocks": 2},
    "block of a warp": {"regime": "block", "threads": 32, "blocks": 2},
    "staged": {"regime": "staged", "threads": 64, "blocks": 2},
    "sweeps": {"regime": "sweeps", "threads": 64, "blocks": 2},
    "sweeps of a warp": {"regime": "sweeps", "threads": 32, "blocks": 1},
    "split": {"regime": "split", "threads": 64, "wave": 2, "parts": 3},
    "split in one": {"regime": "split", "threads": 32, "wave": 64, "parts": 1},
    "strided": {"regime": "strided", "threads": 32, "blocks": 1},
}
SEEDS = range(4)  # in order, in reverse order, and two at random; see simt.h


def each_regime(names: Sequence[str], seed: int) -> Iterator[str]:
    for i, name in enumerate(names):
        with emulate(seed + i, **REGIMES[name]):
            yield f"{name}, seed {seed + i}"


def in_turn(step: int, count: int = 3) -> Variants:
    """`count` of the regimes: each test takes others, and other seeds."""
    names = list(REGIMES)
    picked = [names[(step + i * 5) % len(names)] for i in range(count)]
    return partial(each_regime, picked, step % 7)


def all_regimes(seed: int) -> Variants:
    return partial(each_regime, list(REGIMES), seed)


# ---- the grid -------------------------------------------------------------------------------

# Fewer classes than a vector; a vector and its neighbours; those of real data; lanes and blocks that
# are just filled; rows of several vectors per thread.
CLASSES = (1, 2, 3, 7, 8, 9, 31, 33, 64, 71, 100, 128, 135, 257, 1003)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(case: Case, classes: int, generator: torch.Generator) -> None:
    step = 3 * CASES.index(case) + CLASSES.index(classes)
    dtypes, kind = DTYPE_PAIRS[step % len(DTYPE_PAIRS)], KINDS[step % len(KINDS)]
    rows = (1, 7, 3)[step % 3]
    inputs = make_inputs(kind, rows, classes, dtypes, generator, ignored=0.2 * (step % 2))
    check_rows(case, *inputs, generator, backend="cuda", variants=in_turn(step))


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_types_in_every_regime(case: Case, dtypes: tuple, generator: torch.Generator) -> None:
    inputs = make_inputs("masked", 3, 103, dtypes, generator)
    check_rows(case, *inputs, generator, backend="cuda", variants=all_regimes(0))


@pytest.mark.parametrize("layouts", [(a, b) for a in LAYOUTS for b in LAYOUTS], ids="-".join)
def test_layouts(layouts: tuple[str, str], generator: torch.Generator) -> None:
    """Every alignment of student and teacher; the neighbours of their logits are NaN."""
    step = sum(map(list(LAYOUTS).index, layouts)) + list(LAYOUTS).index(layouts[0])
    for classes in (5, 37, 150):
        step += 1
        dtypes = DTYPE_PAIRS[step % len(DTYPE_PAIRS)]
        dense = make_inputs("normal", (3, 4), classes, dtypes, generator, ignored=0.1)
        views = []
        for layout, x in zip(layouts, dense[:2], strict=True):
            view, dim = LAYOUTS[layout](x)
            views.append(view.movedim(dim, -1))
        check_rows(CASES[step % len(CASES)], *views, dense[2], generator, backend="cuda",
                   variants=in_turn(step))  # fmt: skip


@pytest.mark.parametrize("shift", range(8))
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_every_place_between_two_granules(
    dtype: torch.dtype, shift: int, generator: torch.Generator
) -> None:
    """Rows that begin anywhere, teachers that begin elsewhere, and gradients that lie otherwise."""
    for classes in (29, 64, 101):
        step = shift + classes
        student, teacher, target = make_inputs("normal", 3, classes, dtype, generator)
        for apart in (0, 1, 5):
            views = []
            for x, before in ((student, shift), (teacher, (shift + apart) % 8)):
                wide = torch.full((3, classes + 16), math.nan, dtype=dtype)
                views.append(wide[:, before : before + classes].copy_(x))
            check_rows(CASES[step % len(CASES)], *views, target, generator, backend="cuda",
                       variants=in_turn(step + apart, 2))  # fmt: skip


@pytest.mark.parametrize(("reduction", "normalizer"), REDUCTIONS)
@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_reductions(
    case: Case, reduction: str, normalizer: float | None, generator: torch.Generator
) -> None:
    step = SCALAR_CASES.index(case) + 2 * REDUCTIONS.index((reduction, normalizer))
    check_reductions(case, reduction, normalizer, generator, (17, 101), backend="cuda",
                     variants=in_turn(step, 4), shape=(3, 3))  # fmt: skip
