"""The GPU backends on a CUDA device: the memory that a call takes, and more of it than 32 bits can
count.
"""

from __future__ import annotations

from collections.abc import Callable

import on_gpu
import pytest
import torch
from cases import BF16, F16, F32, MAIN_CASES, Case, evaluate
from on_gpu import DEVICE, DKD, KD, calls_of, check_sampled_rows

# gpu_check.py looks for "mark.gpu" in each file.
pytestmark = [pytest.mark.gpu, *on_gpu.MARKS]
backend = on_gpu.backend  # a fixture, in place of conftest.py's


def peak_of(call: Callable[[], object]) -> int:
    """Largest number of bytes asked for at once beyond those held before.

    Not `max_memory_allocated`: the allocator may hand out a block that is up to 1 MiB larger.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(4000, 1003), (400, 20011), (8, 151669)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_peak_memory_is_the_gradient(
    case: Case, shape: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    rows, classes = shape
    inputs = (
        *(torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)),
        torch.randint(classes, (rows,), device=DEVICE),
    )
    gradient, slack = inputs[0].nbytes, 256 * rows + (64 << 10)
    assert slack < gradient / 4, "the bound would notice a copy of the logits"
    for call in calls_of(case):
        evaluate(call, *inputs, backend=backend)  # what is loaded once
        peak = peak_of(lambda call=call: evaluate(call, *inputs, backend=backend))
        assert gradient <= peak <= gradient + slack
        loss = peak_of(lambda call=call: call(*inputs, backend=backend))
        assert loss <= slack, "the loss alone holds no gradient"


@pytest.mark.alone  # most of the memory of many GPUs, where others would take part of it
@pytest.mark.parametrize("case", [KD, DKD], ids=str)
def test_more_elements_than_32_bits_can_count(
    case: Case, backend: str, rows: int = 70_000, classes: int = 32_000
) -> None:
    """Rows before, across and after the 2^31st element, and the last one, against the reference:
    forward and backward, and both in one sweep."""
    needed = 3 * 2 * rows * classes + (1 << 30)  # student, teacher, gradient in bfloat16
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    check_sampled_rows(case, backend, rows, classes)
