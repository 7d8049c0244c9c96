"""The planner's choice of regime, and the C++ list of losses against the Python one."""

from __future__ import annotations

import re
from contextlib import suppress
from functools import partial

import pytest
from cases import ISAS

from kdkernels import ops, reference

_host = pytest.importorskip("kdkernels._host")  # not in a wheel
ACROSS, BATCHES, ALONG = "lanes_are_rows", "batches", "lanes_are_classes"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("rows", "classes", "regime"),
    [
        (2, 1, ACROSS),
        (4096, 5, ACROSS),
        (2, 200, BATCHES),
        (4096, 256, BATCHES),
        (4096, 1025, ALONG),  # more than a tile: the row is worth its own finish
        (2, 151669, ALONG),
        (1, 5, ALONG),  # there are no rows to share anything with
        (1, 100, ALONG),
    ],
)
def test_regime(isa: str, rows: int, classes: int, regime: str) -> None:
    assert _host.plan(isa, rows, classes) == regime


@pytest.mark.parametrize("isa", ISAS)
def test_regimes_change(isa: str) -> None:
    """Where transposing costs more than sums across lanes; where few rows fit the cache."""
    short, long = {"baseline": (80, 256), "avx2": (160, 512), "avx512": (32, 1024)}[isa]
    assert _host.plan(isa, 64, short - 1) == ACROSS
    assert _host.plan(isa, 64, short) == _host.plan(isa, 64, long) == BATCHES
    assert _host.plan(isa, 64, long + 1) == ALONG


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("classes", [5, 100, 1025, 151669])
def test_strided_classes_lie_across(isa: str, classes: int) -> None:
    """What is apart in memory cannot be loaded as a vector; with one row it is not apart."""
    assert _host.plan(isa, 2, classes, class_strided=True) == ACROSS
    assert _host.plan(isa, 1, classes, class_strided=True) == ALONG


def test_instruction_sets() -> None:
    """The portable one is always there, and the best, which is the default, is the last."""
    assert ISAS[0] == "baseline"
    assert sorted(ISAS, key=["baseline", "avx2", "avx512"].index) == ISAS


# ---- the CUDA planner -----------------------------------------------------------------------


CUDA_REGIMES = [
    (4096, 10, {}, ("lanes", 256)),
    (4096, 100, {}, ("lanes", 256)),
    (4096, 1000, {}, ("block", 32)),
    (1024, 1000, {"itemsize": 4}, ("block", 64)),
    (4096, 6144, {}, ("block", 192)),
    (4096, 1000, {"alike": False}, ("sweeps", 64)),
    (4096, 1000, {"wide": True, "alike": False, "itemsize": 8}, ("sweeps", 192)),
    (4096, 32000, {"backward": True}, ("split", 192)),
    (4096, 100, {"backward": True, "alike": False}, ("split", 32)),
    (4096, 21, {"strided": True}, ("strided", 128)),
]
# The same shared memory and cache, without clusters: what an A100 gets.
WITHOUT_CLUSTERS = [
    (4096, 6144, {"kept": 3}, ("staged", 384)),
    (4096, 16384, {}, ("staged", 384)),
    (4096, 32000, {}, ("staged", 768)),
    (4096, 32000, {"itemsize": 4}, ("split", 192)),
    (4096, 32000, {"alike": False}, ("sweeps", 384)),
    (4096, 151936, {}, ("split", 192)),
    (8, 32000, {}, ("split", 192)),
    (8, 151936, {}, ("split", 192)),
]


@pytest.mark.parametrize(
    ("device", "rows", "classes", "options", "expected"),
    [("H200", *x) for x in CUDA_REGIMES] + [("A100", *x) for x in WITHOUT_CLUSTERS],
)
def test_cuda_regime(device: str, rows: int, classes: int, options: dict, expected: tuple) -> None:
    plan = _host.gpu_plan(device=device, rows=rows, classes=classes, **options)
    assert (plan["regime"], plan["threads"]) == expected


@pytest.mark.parametrize(
    ("device", "rows", "classes", "options", "parts", "stages", "blocks"),
    [
        ("H200", 4096, 6144, {"kept": 3}, 1, 3, 264),  # two blocks per multiprocessor
        ("H200", 4096, 32000, {}, 2, 3, 132),
        ("H200", 4096, 50257, {}, 2, 2, 132),
        ("H200", 4096, 128256, {}, 8, 3, 128),
        ("H200", 4096, 151936, {}, 8, 2, 128),
        ("H200", 4096, 151669, {"alike": False}, 8, 2, 128),
        ("H200", 4096, 262144, {}, 16, 3, 128),
        ("H200", 4096, 262144, {"itemsize": 4}, 16, 1, 128),
        ("H200", 4096, 151936, {"writes": False}, 8, 2, 128),
        ("H200", 3, 151936, {}, 16, 3, 48),  # few rows: more blocks for each
        ("B200", 4096, 151936, {}, 8, 2, 128),
        ("RTX 5090", 4096, 32000, {}, 4, 2, 164),
        ("RTX 5090", 4096, 151936, {}, 8, 1, 152),
    ],
)
def test_clusters(
    device: str, rows: int, classes: int, options: dict, parts: int, stages: int, blocks: int
) -> None:
    plan = _host.gpu_plan(device=device, rows=rows, classes=classes, **options)
    assert plan["regime"] == "cluster"
    assert (plan["parts"], plan["stages"], plan["blocks"]) == (parts, stages, blocks)


def test_rows_that_no_cluster_holds_are_read_twice() -> None:
    for device, classes in (("H200", 2_000_000), ("RTX 5090", 262144)):
        assert _host.gpu_plan(device=device, rows=4096, classes=classes)["regime"] == "split"


@pytest.mark.parametrize("device", _host.gpu_devices())
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
                if plan["regime"] == "cluster":
                    covered = plan["parts"] * plan["part_vectors"]
                    assert plan["parts"] in (1, 2, 4, 8, 16) and plan["stages"] >= 1
                    assert covered >= vectors and plan["blocks"] % plan["parts"] == 0
                    assert device not in ("A100", "RTX 3090", "L40S") and itemsize < 8
                if plan["regime"] == "split":
                    parts = plan["parts"]
                    assert 1 <= plan["wave"] <= rows and (backward or parts <= 64)
                    covered = parts * plan["part_vectors"]
                    assert covered >= vectors > covered - plan["part_vectors"] or vectors == 0
                    assert plan["blocks"] == plan["wave"] * parts
                assert not (backward and plan["regime"] in ("staged", "cluster", "sweeps"))


# ---- its override ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "rows", "classes", "override", "expected"),
    [
        ("H200", 4096, 10007, "regime=staged", {"regime": "staged", "per_multiprocessor": 2}),
        ("H200", 4096, 10007, "regime=staged per_multiprocessor=1", {"threads": 768}),
        ("H200", 4096, 10007, "regime=staged threads=96", {"threads": 96, "per_multiprocessor": 2}),
        ("H200", 4096, 128256, "regime=split", {"regime": "split", "parts": 9, "wave": 55}),
        ("H200", 4096, 128256, "regime=split parts=5 threads=64", {"parts": 5, "threads": 64}),
        ("H200", 4096, 128256, "regime=sweeps threads=128", {"threads": 128, "blocks": 55}),
        ("H200", 4096, 10007, "regime=sweeps per_multiprocessor=1", {"blocks": 132}),
        ("H200", 4096, 10007, "regime=sweeps threads=64 per_multiprocessor=2", {"blocks": 264}),
        ("H200", 4096, 128256, "parts=4", {"regime": "cluster", "parts": 4, "stages": 1}),
        ("H200", 4096, 128256, "stages=2", {"parts": 4 * 2, "stages": 2}),
        ("H200", 4096, 32000, "threads=192", {"threads": 192, "per_multiprocessor": 1}),
        ("H200", 4096, 32000, "per_multiprocessor=2", {"parts": 4, "blocks": 2 * 32 * 4}),
        ("H200", 4096, 10007, "", {"threads": 192, "per_multiprocessor": 2}),
        ("H200", 4096, 10007, "threads=384", {"threads": 384, "per_multiprocessor": 1}),
        ("H200", 4096, 128256, "parts=8 stages=1 per_multiprocessor=2", {"blocks": 2 * 16 * 8}),
        ("H200", 3, 151936, "parts=8", {"parts": 8, "blocks": 24}),  # few rows: no more than that
        ("H200", 4096, 100, "regime=cluster threads=32 stages=1", {"parts": 1, "threads": 32}),
        ("A100", 4096, 151936, "regime=sweeps", {"regime": "sweeps"}),
    ],
)
def test_a_plan_that_is_asked_for(
    device: str, rows: int, classes: int, override: str, expected: dict
) -> None:
    plan = _host.gpu_plan(device=device, rows=rows, classes=classes, override=override)
    assert {x: plan[x] for x in expected} == expected
    regime = override.partition("regime=")[2].split(" ")[0]
    assert plan["regime"] == (regime or "cluster")


@pytest.mark.parametrize(
    ("device", "override", "options"),
    [
        ("A100", "regime=cluster", {}),
        ("RTX 5090", "parts=16", {}),
        ("H200", "parts=3 regime=cluster", {}),
        ("H200", "parts=3", {}),  # which would be possible with split
        ("H200", "stages=4", {}),
        ("H200", "stages=3", {"classes": 262144, "itemsize": 4}),
        ("H200", "threads=416", {}),
        ("H200", "threads=100", {}),
        ("H200", "threads=384 per_multiprocessor=2", {}),  # more than registers hold
        ("H200", "parts=8 stages=2 per_multiprocessor=2", {}),  # or shared memory
        ("H200", "per_multiprocessor=3", {}),
        ("H200", "regime=staged", {}),
        ("H200", "regime=staged", {"classes": 10007, "alike": False}),
        ("H200", "regime=staged threads=800", {"classes": 10007}),
        ("H200", "regime=staged threads=416 per_multiprocessor=2", {"classes": 10007}),
        ("H200", "regime=staged stages=2", {"classes": 10007}),
        ("H200", "regime=split parts=65", {}),
        ("H200", "regime=split parts=7", {"classes": 80}),  # 10 vectors make 5 parts of 2
        ("H200", "regime=split threads=224", {}),
        ("H200", "regime=split per_multiprocessor=2", {}),
        ("H200", "regime=sweeps threads=384 per_multiprocessor=2", {}),
        ("H200", "regime=sweeps threads=224", {"itemsize": 8, "wide": True, "alike": False}),
        ("H200", "regime=cluster", {"itemsize": 8, "wide": True, "alike": False}),
        ("H200", "regime=split", {"strided": True}),
        ("H200", "threads=64", {"classes": 100}),  # what the planner picks by itself has no choice
    ],
)
def test_a_plan_that_is_not_possible(device: str, override: str, options: dict) -> None:
    with pytest.raises(ValueError, match=r"KDKERNELS_PLAN: .* is not possible for 4096 rows") as e:
        _host.gpu_plan(
            **{"device": device, "rows": 4096, "classes": 128256, "override": override, **options}
        )
    assert all(f" {word}" in str(e.value).partition("; allowed: ")[0] for word in override.split())


@pytest.mark.parametrize(
    "word",
    ["regime=", "regime=lanes", "regime", "parts=0", "parts=-1", "parts=1.5", "parts=12345",
     "stages=two", "clusters=0", "=", "parts=4,stages=2"],
)  # fmt: skip
def test_a_bad_override_is_refused(word: str) -> None:
    with pytest.raises(ValueError, match=r"^KDKERNELS_PLAN: got '.*'; allowed: words such as") as e:
        _host.gpu_plan(device="H200", rows=4096, classes=128256, override=f"threads=192 {word}")
    assert f"got '{word}'" in str(e.value)


MIXED: dict = {"alike": False, "wide": True}


def named(what: str) -> str:
    """The group of a pattern, in what a refusal says is allowed."""
    with pytest.raises(ValueError, match="; allowed: ") as e:
        _host.gpu_plan(device="H200", rows=4096, classes=16384, override="parts=0")
    found = re.search(what, str(e.value))
    assert found, str(e.value)
    return found[1]


@pytest.mark.parametrize(
    ("bound", "step", "words", "options"),
    [
        (r"(\d+) with staged", 32, "regime=staged threads={} per_multiprocessor=1", {}),
        (r"(\d+) with cluster", 32, "regime=cluster threads={} per_multiprocessor=1", {}),
        (r"(\d+) with sweeps,", 32, "regime=sweeps threads={}", {}),
        (r"(\d+) with split,", 32, "regime=split threads={}", {}),
        (r"(\d+) with sweeps and split of", 32, "regime=sweeps threads={}", MIXED),
        (r"(\d+) with sweeps and split of", 32, "regime=split threads={}", MIXED),
        (r"with split 1 to (\d+)", 1, "regime=split parts={}", {}),
        (r"stages: of a cluster 1 to (\d+)", 1, "regime=cluster parts=16 stages={}", {}),
    ],
)
def test_the_bounds_that_are_named_are_those_that_hold(
    bound: str, step: int, words: str, options: dict
) -> None:
    plan = partial(_host.gpu_plan, device="H200", rows=4096, classes=16384, **options)
    most = int(named(bound))
    assert f"regime={plan(override=words.format(most))['regime']}" in words
    with pytest.raises(ValueError, match="is not possible"):
        plan(override=words.format(most + step))


def test_the_sizes_of_clusters_that_are_named_are_those_that_there_are() -> None:
    possible = []
    for parts in range(1, 65):
        with suppress(ValueError):
            override = f"regime=cluster parts={parts}"
            _host.gpu_plan(device="H200", rows=4096, classes=16384, override=override)
            possible.append(str(parts))
    assert named(r"parts: of a cluster ([\d, ]+);").split(", ") == possible


def test_every_word_of_an_override_at_most_once() -> None:
    for word in ("regime=split", "threads=64"):
        with pytest.raises(ValueError, match=f"got '{word}'"):
            _host.gpu_plan(device="H200", rows=8, classes=9000, override=f"{word}  {word}")


def test_backward_passes_are_not_overridden() -> None:
    """A loss under an override may have one, and long rows have one kernel for it."""
    own, other = (
        _host.gpu_plan(device="H200", rows=64, classes=32000, backward=True, override=x)
        for x in ("", "regime=cluster parts=16 threads=32")
    )
    assert own == other and own["regime"] == "split"


def test_waves_are_what_the_cache_keeps() -> None:
    """Unless nothing is read twice, or the cache is too small to be worth the launches."""

    def plan(device: str, **options: bool) -> dict:
        return _host.gpu_plan(device=device, rows=4096, classes=151936, **options)

    assert 20 <= plan("A100")["wave"] <= 0.45 * (40 << 20) / (4 * 151936)
    assert plan("A100", writes=False)["regime"] == plan("RTX 3090")["regime"] == "sweeps"


def test_the_cuda_planner_shows_its_table() -> None:
    shown = _host.gpu_table("A100")
    assert "strided: classes are not adjacent" in shown and "151936  split" in shown
    with pytest.raises(ValueError, match="'Z80' is not known here; allowed: A100, "):
        _host.gpu_table("Z80")


def test_lists_of_losses_agree() -> None:
    shared = ("outputs", "teacher", "target", "parts")
    in_cpp = {
        name: (facts["params"], *(facts[x] for x in shared))
        for name, facts in _host.losses().items()
    }
    in_python = {
        name: (len(facts.params), *(getattr(facts, x) for x in shared))
        for name, facts in ops.LOSSES.items()
    }
    assert in_cpp == in_python
    assert _host.stats_width() == ops.STATS_WIDTH
    assert _host.large_temperature() == reference.LARGE_TEMPERATURE
