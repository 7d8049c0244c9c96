"""The GPU backends on a CUDA device, inside torch.compile."""

from __future__ import annotations

from collections.abc import Iterator

import on_gpu
import pytest
import torch
from cases import F32, MAIN_CASES, Case, evaluate
from on_gpu import calls_of, inputs_on_device
from torch import Tensor

# gpu_check.py looks for "mark.gpu" in each file.
pytestmark = [pytest.mark.gpu, *on_gpu.MARKS]
backend = on_gpu.backend  # a fixture, in place of conftest.py's


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_compiled_calls_agree_with_eager_ones(
    case: Case, backend: str, fresh_compiler: None, generator: torch.Generator
) -> None:
    """Between operations of inductor's own, on strided logits, as language models have them."""
    student, teacher, target = inputs_on_device("normal", (2, 6), 65, F32, generator, ignored=0.2)
    inputs = (student[:, :-1], teacher[:, :-1], target[:, 1:])
    for call in calls_of(case):

        def step(student: Tensor, *rest: Tensor, call=call) -> Tensor:
            return 3 * call(2 * student, *rest, backend=backend)

        function = torch.compile(step, fullgraph=True)
        upstream = torch.rand(step(*inputs).shape, generator=generator).to(student.device)
        eager = evaluate(step, *inputs, upstream)
        for _ in range(2):
            ours = evaluate(function, *inputs, upstream)
            for x, y in zip(ours, eager, strict=True):
                torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
