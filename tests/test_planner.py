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


# ---- the CUDA planner -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "classes", "options", "expected"),
    [
        (4096, 10, {}, ("lanes", 256)),
        (4096, 100, {}, ("lanes", 256)),
        (4096, 1000, {}, ("block", 32)),
        (1024, 1000, {"itemsize": 4}, ("block", 64)),
        (4096, 6144, {}, ("block", 192)),
        (4096, 6144, {"kept": 3}, ("staged", 384)),
        (4096, 16384, {}, ("staged", 384)),
        (4096, 32000, {}, ("staged", 768)),
        (4096, 32000, {"itemsize": 4}, ("split", 192)),
        (4096, 50257, {}, ("staged", 768)),
        (4096, 50257, {"alike": False}, ("sweeps", 384)),
        (4096, 151936, {}, ("split", 192)),
        (8, 32000, {}, ("split", 192)),
        (8, 151936, {}, ("split", 192)),
        (4096, 1000, {"alike": False}, ("sweeps", 64)),
        (4096, 1000, {"wide": True, "alike": False, "itemsize": 8}, ("sweeps", 192)),
        (4096, 32000, {"backward": True}, ("split", 192)),
        (4096, 100, {"backward": True, "alike": False}, ("split", 32)),
        (4096, 21, {"strided": True}, ("strided", 128)),
    ],
)
def test_cuda_regime(rows: int, classes: int, options: dict, expected: tuple) -> None:
    plan = _host.gpu_plan(device="H200", rows=rows, classes=classes, **options)
    assert (plan["regime"], plan["threads"]) == expected


@pytest.mark.parametrize("device", _host.gpu_devices() if ISAS else [])
@pytest.mark.parametrize("rows", [1, 2, 7, 66, 131, 132, 133, 5000, 10_000_000])
@pytest.mark.parametrize("itemsize", [2, 4, 8])
def test_every_cuda_plan_is_possible(device: str, rows: int, itemsize: int) -> None:
    """On every device, whatever the classes: bounds of the hardware, and every class covered."""
    for classes in (1, 8, 64, 71, 72, 263, 264, 6150, 8192, 8193, 28000, 50257, 151669, 262144):
        for alike, strided in ((True, False), (False, False), (False, True)):
            for backward in (False, True):
                plan = _host.gpu_plan(
                    device=device, rows=rows, classes=classes, itemsize=itemsize, backward=backward,
                    alike=alike and itemsize < 8, strided=strided, wide=itemsize == 8,
                )  # fmt: skip
                assert 32 <= plan["threads"] <= 1024 and plan["threads"] % 32 == 0
                assert 1 <= plan["blocks"] < 2**31
                vectors = classes // plan["vector"]
                if plan["regime"] == "lanes":
                    assert vectors * plan["vector"] <= plan["lane_classes"] * plan["lanes"]
                if plan["regime"] == "staged":
                    assert plan["stage_slots"] * plan["threads"] >= vectors
                if plan["regime"] == "split":
                    parts = plan["parts"]
                    assert 1 <= plan["wave"] <= rows and (backward or parts <= 64)
                    covered = parts * plan["part_vectors"]
                    assert covered >= vectors > covered - plan["part_vectors"] or vectors == 0
                    assert plan["blocks"] == plan["wave"] * parts
                assert not (backward and plan["regime"] in ("staged", "sweeps"))


def test_waves_are_what_the_cache_keeps() -> None:
    """Unless nothing is read twice, or the cache is too small to be worth the launches."""

    def plan(device: str, **options: bool) -> dict:
        return _host.gpu_plan(device=device, rows=4096, classes=151936, **options)

    assert 35 <= plan("H200")["wave"] <= 0.45 * (60 << 20) / (4 * 151936)
    assert plan("H200", writes=False)["regime"] == plan("RTX 3090")["regime"] == "sweeps"


def test_the_cuda_planner_shows_its_table() -> None:
    shown = _host.gpu_table("A100")
    assert "strided: classes are not adjacent" in shown and "151936  split" in shown
    with pytest.raises(ValueError, match="'Z80' is not known here; allowed: A100, "):
        _host.gpu_table("Z80")


def test_lists_of_losses_agree() -> None:
    in_cpp = {name: (x["teacher"], x["outputs"]) for name, x in _host.losses().items()}
    in_python = {name: (x.teacher, x.outputs) for name, x in ops.LOSSES.items()}
    assert in_cpp == in_python
    assert _host.stats_width() == ops.STATS_WIDTH
