"""The planner's choice of regime, and the C++ list of losses against the Python one."""

from __future__ import annotations

import pytest
from cases import ISAS, needs_cpu

from kdkernels import ops

pytestmark = needs_cpu
if ISAS:
    from kdkernels import _host

LANES = {"baseline": 4, "avx2": 8, "avx512": 16}  # of float32
ACROSS, BATCHES, ALONG = "lanes_are_rows", "batches", "lanes_are_classes"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("rows", "classes", "regime"),
    [
        (2, 1, ACROSS),
        (4096, 5, ACROSS),
        (2, 100, BATCHES),
        (4096, 1024, BATCHES),
        (4096, 1025, ALONG),  # more than a tile: the row is worth its own finish
        (2, 151669, ALONG),
        (1, 5, ALONG),  # there are no rows to share anything with
        (1, 100, ALONG),
    ],
)
def test_regime(isa: str, rows: int, classes: int, regime: str) -> None:
    assert _host.plan(isa, rows, classes) == regime


@pytest.mark.parametrize("isa", ISAS)
def test_regime_changes_where_a_row_fills_two_vectors(isa: str) -> None:
    full = 2 * LANES[isa]
    assert _host.plan(isa, 64, full - 1) == ACROSS
    assert _host.plan(isa, 64, full) == BATCHES


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("classes", [5, 100, 1025, 151669])
def test_strided_classes_lie_across(isa: str, classes: int) -> None:
    """What is apart in memory cannot be loaded as a vector; with one row it is not apart."""
    assert _host.plan(isa, 2, classes, class_strided=True) == ACROSS
    assert _host.plan(isa, 1, classes, class_strided=True) == ALONG


def test_instruction_sets() -> None:
    """The portable one is always there, and the best, which is the default, is the last."""
    assert ISAS[0] == "baseline"
    assert sorted(ISAS, key=list(LANES).index) == ISAS


def test_lists_of_losses_agree() -> None:
    in_cpp = {name: (x["teacher"], x["outputs"]) for name, x in _host.losses().items()}
    in_python = {name: (x.teacher, x.outputs) for name, x in ops.LOSSES.items()}
    assert in_cpp == in_python
    assert _host.stats_width() == ops.STATS_WIDTH
