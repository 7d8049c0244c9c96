"""Peak extra memory: the gradient and O(rows), nothing else of the size of the logits.

Torch's profiler reports every allocation and release of the CPU allocator with its size, those
inside operators too, so the peak counted from them is exact and the same in every run; resident
memory is neither. What it cannot see is memory that the kernels take past torch (their scratch
rows): one test looks at the process for that, with a margin.
"""

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from cases import CASES, LAYOUTS, MAIN_CASES, MAIN_SCALARS, SCALAR_CASES, make_inputs, needs_cpu
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import kdkernels

pytestmark = needs_cpu

ROWS, CLASSES = (8, 40), 1003
COUNT = 8 * 40
PER_ROW = 8 * 16  # bytes: statistics of 8 doubles, and a few tensors of one number per row
MIXED = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float32, torch.float64),
]


def peak_of(call: Callable[[], object]) -> int:
    """Largest number of bytes held at once beyond those held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    del result
    events = [x for x in profiler.profiler.kineto_results.events() if x.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def peak_of_step(call: Callable[..., Tensor], student: Tensor, *inputs: Tensor, **common) -> int:
    student = student.detach().requires_grad_()
    return peak_of(lambda: torch.autograd.grad(call(student, *inputs, **common).sum(), student))


def assert_one_gradient(peak: int, student: Tensor) -> None:
    gradient = student.numel() * student.element_size()
    assert gradient <= peak <= gradient + COUNT * PER_ROW
    assert gradient / 10 > COUNT * PER_ROW, "the bound would notice a second one"


def test_the_peak_is_seen():
    x = torch.ones(1000, requires_grad=True)
    peak = peak_of_step(lambda x: (2 * x).exp() * 3, x)
    assert 12000 <= peak <= 20100, "three to five tensors of 4000 bytes"
    inputs = make_inputs("normal", ROWS, CLASSES)
    assert peak_of_step(kdkernels.kd_loss, *inputs, backend="reference") > 5 * 4 * COUNT * CLASSES


@pytest.mark.parametrize("case", CASES, ids=str)
def test_rows(case):
    inputs = make_inputs("normal", ROWS, CLASSES, ignored=0.1)
    assert_one_gradient(peak_of_step(case.rows, *inputs), inputs[0])


@pytest.mark.parametrize("case", SCALAR_CASES, ids=str)
def test_mean(case):
    inputs = make_inputs("normal", ROWS, CLASSES, ignored=0.1)
    assert_one_gradient(peak_of_step(case, *inputs, row_weight=torch.ones(ROWS)), inputs[0])


def test_backward_twice_holds_a_second_gradient_for_the_second_time_only():
    """The first one is kept where hooks see it, until the graph is gone."""
    student, teacher, target = make_inputs("normal", ROWS, CLASSES)
    student.requires_grad_()

    def twice() -> None:
        loss = kdkernels.dkd_loss(student, teacher, target)
        for retain in (True, False):
            torch.autograd.grad(3 * loss, student, retain_graph=retain)

    peak, gradient = peak_of(twice), student.numel() * student.element_size()
    assert peak <= 2 * gradient + COUNT * PER_ROW


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_any_layout(case, layout):
    student, teacher, target = make_inputs("normal", ROWS, CLASSES)
    student, dim = LAYOUTS[layout](student)
    teacher = LAYOUTS[layout](teacher)[0]
    target = target.t() if dim == 0 else target
    target = target.contiguous().view(student.movedim(dim, -1).shape[:-1])
    for reduction in ("mean", "none"):
        peak = peak_of_step(case, student, teacher, target, dim=dim, reduction=reduction)
        assert_one_gradient(peak, student)


def test_images():
    """Segmentation, (N, C, H, W): four dimensions are merged into three by views alone."""
    target = make_inputs("normal", (2, 8, 20), CLASSES)[2]
    for layout in (torch.contiguous_format, torch.channels_last):
        student, teacher = (
            torch.randn(2, CLASSES, 8, 20).contiguous(memory_format=layout) for _ in range(2)
        )
        peak = peak_of_step(kdkernels.nkd_loss, student, teacher, target, dim=1)
        assert_one_gradient(peak, student)


@pytest.mark.parametrize("dtypes", MIXED, ids=str)
@pytest.mark.parametrize("case", [case for case in MAIN_CASES if case.teacher], ids=str)
def test_mixed_dtypes(case, dtypes):
    inputs = make_inputs("normal", ROWS, CLASSES, dtypes)
    for reduction in ("mean", "none"):
        assert_one_gradient(peak_of_step(case, *inputs, reduction=reduction), inputs[0])


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_the_loss_alone_holds_no_gradient(case):
    inputs = make_inputs("normal", ROWS, CLASSES)
    assert peak_of(lambda: case(*inputs)) <= COUNT * PER_ROW


# Of this process; getrusage would also tell of the one that started it.
NOW = """
import re, torch, kdkernels
torch.set_num_threads(2)
def status(name):
    return 1024 * int(re.search(name + r":\\s*(\\d+) kB", open("/proc/self/status").read())[1])
"""


def run_script(script: str) -> None:
    done = subprocess.run([sys.executable, "-c", NOW + script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("strides", ["(V, 1)", "(1, 2)"], ids=["last", "first"])
def test_scratch_of_many_classes(strides):
    """Classes that are adjacent: a row's exponentials, of which little is kept after the call.
    Others: no more than a tile of a row per SIMD lane."""
    run_script(f"""
V = 1_000_000

def step(classes):
    student, teacher = (torch.randn(2 * V).as_strided((2, V), {strides})[:, :classes] for _ in "st")
    target = torch.tensor([3, classes - 1])
    student.requires_grad_()
    before, peak = status("VmRSS"), status("VmHWM")
    loss = kdkernels.dkd_loss(student, teacher, target, ce_weight=1.0)
    loss.backward()
    return status("VmRSS") - before, status("VmHWM") - peak

step(2000)  # what is set up once
kept, peak = (x - 2 * V * 4 for x in step(V))  # beside the gradient
assert kept < 6e6, kept
assert peak < 2 * 3 * 4 * V * {strides.endswith("1)")} + 6e6, peak
""")


@pytest.mark.full
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("strides", ["(512 * V, V, 1)", "(512 * V, 1, 512)"], ids=["last", "first"])
def test_resident_memory_of_a_process(strides):
    run_script(f"""
V = 32000

def step(rows):
    student, teacher = (torch.randn(512 * V).as_strided((1, rows, V), {strides}) for _ in range(2))
    target = torch.randint(V, (1, rows))
    student.requires_grad_()
    before = status("VmHWM")
    kdkernels.dkd_loss(student, teacher, target, ce_weight=1.0).backward()
    return status("VmHWM") - before, student.grad.numel() * 4

step(1)  # what is set up once
grown, gradient = step(512)
assert gradient == 512 * V * 4
# Each thread keeps scratch for one row, or for a tile of a row per SIMD lane of strided ones.
assert 0.8 * gradient < grown < 1.3 * gradient, (grown, gradient)
""")
