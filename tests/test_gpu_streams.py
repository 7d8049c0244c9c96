"""The GPU backends on a CUDA device: streams, graphs, several devices, and calls that must not wait
for the device.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import on_gpu
import pytest
import torch
from cases import BF16, F16, F32, MAIN_CASES, MAIN_SCALARS, Case, evaluate, make_inputs
from on_gpu import (
    DEVICE,
    DKD,
    KD,
    SPLIT,
    assert_same_results,
    calls_of,
    inputs_on_device,
    multiprocessors,
    on_device,
)
from torch import Tensor

import kdkernels

# gpu_check.py looks for "mark.gpu" in each file.
pytestmark = [pytest.mark.gpu, *on_gpu.MARKS]
backend = on_gpu.backend  # a fixture, in place of conftest.py's
cuda_backend = on_gpu.cuda_backend


# ---- streams, graphs, devices -----------------------------------------------------------------


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_work_goes_to_the_current_stream(case: Case, backend: str) -> None:
    """The inputs arrive late on that stream: work on another one would read what was there."""
    inputs = inputs_on_device("normal", 33, 1003, ignored=0.2)
    for call in calls_of(case):
        expected = evaluate(call, *inputs, backend=backend)  # compiles, too
        late = [torch.zeros_like(x) for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)
            ours = evaluate(call, *late, backend=backend)
        stream.synchronize()
        assert_same_results(ours, expected)


def captured(
    call: Callable[..., Tensor], static: tuple[Tensor, ...], backend: str
) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, Tensor]]:
    """A graph of value and gradient, and where it leaves them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        evaluate(call, *static, backend=backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = evaluate(call, *static, backend=backend)
    return graph, results


@pytest.mark.parametrize("shape", [(300, 100), (33, 1003), "staged", SPLIT, (9000, 10)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_a_captured_graph_replays_with_new_inputs(
    case: Case, shape: tuple[int, int] | str, backend: str, generator: torch.Generator
) -> None:
    shape = (multiprocessors() + 3, 10007) if isinstance(shape, str) else shape
    for call in calls_of(case):
        static = inputs_on_device("normal", *shape, BF16, generator)
        graph, results = captured(call, static, backend)
        # The number of rows that count in the mean changes.
        for kind, ignored in (("offset", 0.0), ("normal", 0.3), ("one_hot", 0.1), ("normal", 0.0)):
            new = inputs_on_device(kind, *shape, BF16, generator, ignored=ignored)
            for x, y in zip(static, new, strict=True):
                x.copy_(y)
            for x in results:
                x.fill_(math.nan)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_results(results, evaluate(call, *new, backend=backend), f"{kind} {ignored}")


@pytest.mark.parametrize("together", [False, True], ids=["alternately", "at once"])
@pytest.mark.parametrize("shape", [(3000, 100), (300, 1003), SPLIT], ids=str)
@pytest.mark.parametrize("case", [KD, DKD], ids=str)
def test_two_graphs(
    case: Case, shape: tuple[int, int], together: bool, backend: str, generator: torch.Generator
) -> None:
    """Replayed in turn, then on two streams at once; eager calls in between take no counter of
    theirs."""
    work = []
    for ignored in (0.0, 0.3):
        static = inputs_on_device("normal", *shape, BF16, generator, ignored=ignored)
        expected = evaluate(case, *static, backend=backend)
        stream = torch.cuda.Stream() if together else torch.cuda.current_stream()
        work.append((*captured(case, static, backend), static, expected, stream))
    wrong = [torch.zeros((), dtype=torch.bool, device=DEVICE) for _ in work]
    torch.cuda.synchronize()
    for _ in range(50):
        if together:  # held up until both are queued
            for *_, stream in work:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(1_000_000)
        for (graph, results, static, expected, stream), bad in zip(work, wrong, strict=True):
            with torch.cuda.stream(stream):
                for x in results:
                    x.fill_(math.nan)
                graph.replay()
                for x, y in zip(results, expected, strict=True):
                    bad.logical_or_((x != y).any())
                if not together:
                    value = case(*static, backend=backend)
                    bad.logical_or_(value != expected[0])
    torch.cuda.synchronize()
    assert not any(x.item() for x in wrong)


FIRST_CALL = """
import torch
import kdkernels

rows = torch.cuda.get_device_properties("cuda").multi_processor_count
student, teacher = (torch.randn(rows, 20011, device="cuda").bfloat16() for _ in range(2))
target = torch.randint(20011, (rows,), device="cuda")
student.requires_grad_()
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    captured = kdkernels.dkd_loss(student, teacher, target, backend="cuda").detach()
for _ in range(2):
    graph.replay()
eager = kdkernels.dkd_loss(student, teacher, target, backend="cuda")
assert captured.isfinite() and torch.equal(captured, eager), (captured, eager)
"""


def test_the_first_call_of_a_process_may_be_captured(cuda_backend: str) -> None:
    """The module, the kernel and its share of shared memory are then set up during the capture."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_calls_on_several_streams_at_once(backend: str, generator: torch.Generator) -> None:
    """Blocks of a call find out which of them is the last one: not those of another call."""
    shapes = ((3000, 100), (300, 1003), (multiprocessors() + 3, 8003), SPLIT)
    work = []
    for shape, case in zip(shapes, MAIN_SCALARS, strict=False):
        inputs = inputs_on_device("normal", *shape, BF16, generator, ignored=0.1)
        expected = evaluate(case, *inputs, backend=backend)
        wrong = torch.zeros((), dtype=torch.bool, device=DEVICE)
        work.append((torch.cuda.Stream(), case, inputs, expected, wrong))
    torch.cuda.synchronize()
    for _ in range(5):
        for stream, *_ in work:  # held up until there is something to interleave
            with torch.cuda.stream(stream):
                torch.cuda._sleep(50_000_000)
        for _ in range(40):
            for stream, case, inputs, expected, wrong in work:
                with torch.cuda.stream(stream):
                    ours = evaluate(case, *inputs, backend=backend)
                    for x, y in zip(ours, expected, strict=True):
                        wrong.logical_or_((x != y).any())
                    wrong.logical_or_(case(*inputs, backend=backend) != expected[0])
        torch.cuda.synchronize()
    for _, case, _, _, wrong in work:
        assert not wrong.item(), str(case)


@pytest.mark.full
@pytest.mark.parametrize("shape", [(300, 100), (33, 1003)], ids=str)
def test_more_calls_than_there_are_counters(
    shape: tuple[int, int], backend: str, generator: torch.Generator
) -> None:
    """Each call finds at 0 what the one 65,536 calls ago has left."""
    inputs = inputs_on_device("normal", *shape, BF16, generator)
    expected = KD(*inputs, backend=backend)
    wrong = torch.zeros((), dtype=torch.bool, device=DEVICE)
    for _ in range(2 * 65_536 + 100):
        wrong.logical_or_(KD(*inputs, backend=backend) != expected)
    assert not wrong.item()


# ---- what must not be waited for ----------------------------------------------------------------


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_synchronisation_would_be_seen() -> None:
    x = torch.ones((), device=DEVICE)
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_no_call_waits_for_the_device(
    case: Case, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KDKERNELS_CHECK", raising=False)
    student, teacher, target = inputs_on_device("normal", 33, 100, dtype, ignored=0.2)
    targets = [target, None] if case is KD else [target]
    reductions = [{"reduction": x} for x in ("mean", "sum")] if case.outputs == 1 else []
    for y in targets:
        for call, common in [(case.rows, {}), *((case, x) for x in reductions)]:
            evaluate(call, student, teacher, y, backend=backend, **common)  # compiles
            with no_sync():
                evaluate(call, student, teacher, y, backend=backend, **common)


@pytest.mark.parametrize("pinned", [False, True])
def test_numbers_on_the_host_do_not_wait_for_the_device(backend: str, pinned: bool) -> None:
    student, teacher, target = inputs_on_device("normal", 33, 100)
    number = torch.tensor(7.0)
    number = number.pin_memory() if pinned else number

    def loss(student: Tensor, teacher: Tensor, target: Tensor, **common) -> Tensor:
        return kdkernels.kd_loss(student, teacher, target, normalizer=number, **common)

    expected = evaluate(loss, student, teacher, target, backend=backend)
    with no_sync():
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        ours = evaluate(loss, student, teacher, target, backend=backend)
        number.fill_(1.0)  # too late to change anything
    assert_same_results(ours, expected)


def test_numbers_on_the_device_of_logits_on_the_host_arrive_first() -> None:
    student, teacher, target = make_inputs("normal", 33, 100)
    expected = kdkernels.kd_loss(student, teacher, target, normalizer=7.0)
    torch.cuda._sleep(100_000_000)
    number = torch.full((), 7.0, device=DEVICE)
    torch.testing.assert_close(
        kdkernels.kd_loss(student, teacher, target, normalizer=number), expected
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_tensors_of_a_device_that_is_not_the_current_one(case: Case, backend: str) -> None:
    inputs = make_inputs("normal", 33, 100, ignored=0.2)
    for call in [*calls_of(case)] * 3:  # in turn
        first, second = (
            evaluate(call, *(on_device(x, device) for x in inputs), backend=backend)
            for device in ("cuda:0", "cuda:1")
        )
        assert second[0].device == second[1].device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        for x, y in zip(first, second, strict=True):  # the two may be of different kinds
            torch.testing.assert_close(x.cpu(), y.cpu(), rtol=1e-5, atol=1e-6)
