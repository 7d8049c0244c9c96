"""The CUDA backend on a CUDA device: which kernels a call launches, and how many."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import on_gpu
import pytest
import torch
from cases import BF16, MAIN_SCALARS, Case, make_inputs
from on_gpu import (
    DEVICE,
    KD,
    REGIMES,
    SPLIT,
    Shape,
    check,
    has_clusters,
    inputs_on_device,
    kernels_in,
    multiprocessors,
    on_device,
    our_kernels,
)
from torch.profiler import ProfilerActivity, profile

# gpu_check.py looks for "mark.gpu" in each file.
pytestmark = [pytest.mark.gpu, *on_gpu.MARKS]
cuda_backend = on_gpu.cuda_backend


def kernels_of(call: Callable[[], object], folder: Path) -> list[str]:
    """The names of the kernels that a warm call launches."""
    call()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        result = call()
        torch.cuda.synchronize()
    del result
    recorded.export_chrome_trace(str(folder / "trace.json"))
    names = kernels_in(json.loads((folder / "trace.json").read_text(errors="replace")))
    if not names:
        pytest.skip("the profiler sees no kernels here")
    return names


@pytest.mark.parametrize(
    ("shape", "kernels"),
    [
        ((4096, 100), ["lanes"]),
        ((1024, 1000), ["block"]),
        ((8193, 100), ["count", "lanes"]),
        (SPLIT, ["cluster"] if has_clusters() else ["count", "split_stats", "split_gradient"]),
    ],
    ids=str,
)
@pytest.mark.parametrize("with_gradient", [True, False], ids=["gradient", "value"])
@pytest.mark.parametrize("case", [case for case in MAIN_SCALARS if case.teacher], ids=str)
def test_launches_of_a_mean(
    case: Case,
    with_gradient: bool,
    shape: tuple[int, int],
    kernels: list[str],
    cuda_backend: str,
    tmp_path: Path,
) -> None:
    """tf-NKD looks at all rows once more."""
    student, teacher, target = inputs_on_device("normal", *shape, BF16)
    student.requires_grad_(with_gradient)
    names = kernels_of(lambda: case(student, teacher, target, backend=cuda_backend), tmp_path)
    first = kernels.index("split_stats") + 1 if "split_stats" in kernels else 0
    refined = ["split_refined"] if first and case.rounds == 2 else []
    assert our_kernels(names) == [*kernels[:first], *refined, *kernels[first:]], names


@pytest.mark.parametrize("shape", REGIMES.values(), ids=REGIMES)
def test_shapes_reach_the_kernels_they_are_for(
    shape: Shape, cuda_backend: str, generator: torch.Generator, tmp_path: Path
) -> None:
    student, teacher, target = (on_device(x) for x in shape.inputs("normal", generator))
    pair = student.itemsize + teacher.itemsize
    if shape.kernel == "staged":
        device = torch.cuda.get_device_properties(DEVICE)
        if shape.classes * pair + (4 << 10) > getattr(device, "shared_memory_per_block_optin", 0):
            pytest.skip("rows do not fit into the shared memory of this GPU")
    mean = shape.mean(target.numel())
    forward = [x for x in mean if x != "count"]
    names = kernels_of(lambda: KD.rows(student, teacher, target, backend=cuda_backend), tmp_path)
    assert our_kernels(names) == forward, names
    student.requires_grad_()
    names = kernels_of(lambda: KD(student, teacher, target, backend=cuda_backend), tmp_path)
    assert our_kernels(names) == mean, names
    value = KD.rows(student, teacher, target, backend=cuda_backend)
    upstream = torch.ones_like(value)
    names = kernels_of(
        lambda: torch.autograd.grad(value, student, upstream, retain_graph=True), tmp_path
    )
    assert our_kernels(names) == [shape.backward], names


@pytest.mark.parametrize(
    ("plan", "kernels"),
    [
        ("regime=staged", ["staged"]),
        ("regime=staged threads=256 per_multiprocessor=2", ["staged"]),
        ("regime=sweeps", ["sweeps"]),
        ("regime=split", ["split_stats", "split_gradient"]),
        ("regime=split parts=3 threads=64", ["split_stats", "split_gradient"]),
        ("regime=cluster parts=4 stages=2", ["cluster"]),
        ("regime=cluster parts=16 stages=1 threads=192 per_multiprocessor=2", ["cluster"]),
    ],
)
@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_regimes_that_are_asked_for(
    case: Case,
    plan: str,
    kernels: list[str],
    cuda_backend: str,
    generator: torch.Generator,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """On Hopper clusters take the long rows of all of them."""
    if kernels == ["cluster"] and not has_clusters():
        pytest.skip("this GPU has no clusters")
    monkeypatch.setenv("KDKERNELS_PLAN", plan)
    rows = multiprocessors() + 3
    student, teacher, target = make_inputs("normal", rows, 8003, BF16, generator, ignored=0.1)
    check(case, student, teacher, target, generator, cuda_backend)
    check(case, student, teacher, target, generator, cuda_backend, "mean")
    placed = [on_device(x) for x in (student, teacher, target)]
    names = kernels_of(lambda: case.rows(*placed, backend=cuda_backend), tmp_path)
    ours = [x for x in our_kernels(names) if x in ("cluster", "staged", "sweeps", "split_stats")]
    assert ours and set(ours) == set(kernels) - {"split_gradient"}, names


def test_a_plan_that_is_not_possible_is_refused(
    cuda_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = inputs_on_device("normal", 7, 8003, BF16)
    for plan in ("regime=staged threads=1024", "regime=cluster parts=3", "threads=many"):
        monkeypatch.setenv("KDKERNELS_PLAN", plan)
        with pytest.raises((RuntimeError, ValueError), match=r"KDKERNELS_PLAN.*allowed"):
            KD(*inputs, backend=cuda_backend)
