"""How the tests run: where, from which seed, and which of them are for `make test-full` alone."""

import os
import sys
from pathlib import Path

import pytest
import torch

if (
    not torch.cuda.is_available()
):  # before kdkernels is imported; where there is a GPU it runs there
    os.environ.setdefault("TRITON_INTERPRET", "1")

pytest.register_assert_rewrite("cases", "contracts", "on_gpu")
from cases import ISAS, KERNEL_CASES, SEED, Case  # noqa: E402

sys.path.append(str(Path(__file__).resolve().parents[1]))  # bench is not installed

# Nearly all tensors here are small, and threads that wait for a busy core cost more than they do.
# Tests of the threading set their own number.
torch.set_num_threads(1)

# Files whose tests share what was costly to compile: one process runs all of one. Without
# pytest-xdist that is so anyway.
SHARING = ("test_build", "test_cuda_compiled", "test_launches", "test_triton_compiled")
assert all(Path(__file__).with_name(f"{x}.py").exists() for x in SHARING)
KERNELS = {x for case in KERNEL_CASES for x in (case, case.apart)}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "xdist_group(name): of pytest-xdist, which may be missing")


@pytest.hookimpl(tryfirst=True)  # before -m looks at the marks
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """`make test` sees the usual options of a loss, and the instruction set of this processor. The
    other sets, of the same source, see one case of each kind of sums.
    """
    kept, left = [], []
    for item in items:
        chosen = item.callspec.params if hasattr(item, "callspec") else {}
        case, isa = chosen.get("case"), chosen.get("isa", chosen.get("backend"))
        older = isa in ISAS[:-1]
        if (isinstance(case, Case) and not case.usual) or older:
            item.add_marker(pytest.mark.full)
        if item.path.stem in SHARING:
            item.add_marker(pytest.mark.xdist_group(item.path.stem))
        (left if older and isinstance(case, Case) and case not in KERNELS else kept).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    terminalreporter.write_line(f"KDKERNELS_SEED={SEED} draws the same again, =random others")


@pytest.fixture(autouse=True)
def seeded() -> None:
    """What draws from torch's own generator does not depend on which tests ran before."""
    torch.manual_seed(SEED)


@pytest.fixture
def generator() -> torch.Generator:
    """The source of a test's random numbers."""
    return torch.Generator().manual_seed(SEED)


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
