"""The CPU kernels for Arm (NEON), cross-compiled and run in QEMU's user-mode emulation.

arm/driver.cpp reads problems from stdin, each a header and its arrays, and writes of each the rows
of a forward pass, the gradient of a backward one and, of losses with one output, rows and gradient
of the pass that makes both. Skipped where there is no cross-compiler or no emulator: on Debian and
Ubuntu the packages g++-aarch64-linux-gnu and qemu-user.
"""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from cases import (
    BF16,
    CASES,
    F16,
    F32,
    F64,
    Case,
    assert_within,
    evaluate,
    gradient_tolerance,
    loss_dtype,
    make_inputs,
    value_tolerance,
)
from grid import pairwise
from torch import Tensor

ROOT = Path(__file__).parents[1]
COMPILER, EMULATOR = "aarch64-linux-gnu-g++", shutil.which("qemu-aarch64")
TYPES = [F32, F64, F16, BF16]  # in the order of DType
pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(
        not (shutil.which(COMPILER) and EMULATOR), reason=f"needs {COMPILER} and qemu-aarch64"
    ),
]


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arm")
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    flags = " ".join(re.findall(r'^COMPILE \+?= "(.*)"$', setup, re.MULTILINE)).split()
    assert "-O3" in flags and "-ffp-contract=fast" in flags, "as setup.py compiles them"
    sources = ["csrc/cpu/kernels.cpp", "csrc/cpu/dispatch.cpp", "tests/arm/driver.cpp"]
    command = [COMPILER, *flags, "-Werror", "-static", "-DKD_ISA=baseline", *sources]
    subprocess.run([*command, "-o", folder / "driver"], cwd=ROOT, check=True)
    return folder / "driver"


def raw(x: Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes()


def run(
    driver: Path, case: Case, inputs: tuple[Tensor, Tensor, Tensor], upstream: Tensor, strided: bool
) -> tuple[Tensor, ...]:
    student, teacher, target = inputs
    name, params = case.operator
    rows, classes = student.shape
    header = struct.pack(
        "<32s6i2q",
        name.encode(),
        TYPES.index(student.dtype),
        TYPES.index(teacher.dtype),
        strided,
        True,
        len(params),
        0,
        rows,
        classes,
    )
    lying = [x.t() if strided else x for x in (student, teacher)]
    numbers = struct.pack(f"<{len(params)}d", *params)
    logits = [raw(x) for x in (lying if case.teacher else lying[:1])]
    problem = b"".join([header, numbers, *logits, raw(upstream), raw(target)])
    found = subprocess.run([EMULATOR, driver], input=problem, capture_output=True, check=True)
    out, at = [], 0

    def take(dtype: torch.dtype, *shape: int) -> None:
        nonlocal at
        x = torch.empty(shape, dtype=dtype)
        size = x.numel() * x.element_size()
        data = torch.frombuffer(bytearray(found.stdout[at : at + size]), dtype=dtype)
        out.append(data.view(shape))
        at += size

    def take_gradient() -> None:
        take(student.dtype, *((classes, rows) if strided else (rows, classes)))
        out[-1] = out[-1].t() if strided else out[-1]

    take(upstream.dtype, *upstream.shape)
    take_gradient()
    if case.outputs == 1:
        take(F64, rows)
        take_gradient()
    assert at == len(found.stdout)
    return tuple(out)


# tf-NKD is made of the rows of cross-entropy.
PLAIN = [case for case in CASES if case.function.__name__ != "tf_nkd_loss"]


@pairwise(
    case=PLAIN, dtypes=[(F32, F32), (BF16, BF16), (F16, F16), (F64, F64), (F32, BF16)],
    classes=[1, 3, 10, 100, 300, 1100], strided=[False, True],
)  # fmt: skip
def test_as_the_reference(
    driver: Path,
    case: Case,
    dtypes: tuple[torch.dtype, torch.dtype],
    classes: int,
    strided: bool,
    generator: torch.Generator,
) -> None:
    student, teacher, target = make_inputs("normal", 11, classes, dtypes, generator, ignored=0.2)
    dtype = loss_dtype(student, teacher if case.teacher else None)
    shape = (case.outputs, 11) if case.outputs > 1 else (11,)
    upstream = torch.randn(shape, generator=generator, dtype=F64).to(dtype)
    exact = (student.double(), teacher.double(), target)
    for given, of_pass in ((upstream, 0), (torch.ones_like(upstream), 1)):
        if of_pass and case.outputs > 1:
            continue
        truth, truth_gradient = evaluate(
            case.rows, *exact, upstream=given.double(), backend="reference"
        )
        eager, eager_gradient = evaluate(
            case.rows, student, teacher, target, upstream=given, backend="reference"
        )
        results = run(driver, case, (student, teacher, target), upstream, strided)
        value, gradient = results[2 * of_pass : 2 * of_pass + 2]
        allowed = value_tolerance(case, truth, student, teacher, dtype)
        assert_within(value, truth, eager, allowed, "value")
        allowed = gradient_tolerance(case, truth_gradient, student, teacher, target, given, dtype)
        assert_within(gradient, truth_gradient, eager_gradient, allowed, "gradient")
