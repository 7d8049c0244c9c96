import os
import sys
from pathlib import Path

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # before kdkernels is imported; where there is a GPU it runs there
    os.environ.setdefault("TRITON_INTERPRET", "1")

from cases import ISAS

sys.path.append(str(Path(__file__).resolve().parents[1]))  # bench is not installed

# Nearly all tensors here are small, and threads that wait for a busy core cost more than they do.
# Tests of the threading set their own number.
torch.set_num_threads(1)


@pytest.fixture
def generator() -> torch.Generator:
    """The source of a test's random numbers: the same ones in every run."""
    return torch.Generator().manual_seed(20240913)


@pytest.fixture(params=ISAS or [pytest.param("", marks=pytest.mark.skip("no CPU kernels here"))])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs the test once per instruction set that is built in and works here."""
    monkeypatch.setenv("KDKERNELS_CPU_ISA", request.param)
    return request.param


@pytest.fixture(params=["reference", *ISAS])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The reference, and the CPU kernels once per instruction set."""
    if request.param == "reference":
        return "reference"
    monkeypatch.setenv("KDKERNELS_CPU_ISA", request.param)
    return "cpu"
