"""The lane functions of every instruction set, and the conversions of 16-bit logits.

Bounds are those that csrc/cpu/simd.h states. NumPy's long double is the truth.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from cases import KERNEL_CASES, Case, assert_same
from numpy.typing import NDArray

from kdkernels import ops

_host = pytest.importorskip("kdkernels._host")  # not in a wheel
EXACT = np.longdouble
# A long double that is no longer than a double would test nothing.
extended = pytest.mark.skipif(np.finfo(EXACT).eps > 1e-18, reason="no extended precision here")


def relative_error(ours: NDArray, truth: NDArray) -> float:
    return float(np.max(np.abs(ours.astype(EXACT) - truth) / np.abs(truth)))


# ---- functions ------------------------------------------------------------------------------


def test_exp2_f32(isa: str) -> None:
    near_zero = -np.logspace(-45, 0, 5001, dtype=np.float32)
    steps = np.arange(-126, 0, dtype=np.float32)
    halves = np.concatenate([np.nextafter(steps + 0.5, side) for side in np.float32([-200, 0])])
    x = np.concatenate([np.linspace(-126, 0, 2**20, dtype=np.float32), near_zero, steps, halves])
    truth = np.exp2(x.astype(np.float64))
    assert relative_error(_host.exp2_f32(isa, x), truth) < 2e-7


def test_exp2_f32_at_the_ends(isa: str) -> None:
    x = np.float32([0.0, -0.0, -np.inf, np.nan, np.finfo(np.float32).min, -1.0, -126.0])
    expected = np.float32([1, 1, 0, np.nan, 0, 0.5, 2.0**-126])
    np.testing.assert_array_equal(_host.exp2_f32(isa, x), expected)


def test_exp2_f32_below_the_smallest_normal_is_tiny(isa: str) -> None:
    x = np.linspace(-1000, -126.01, 4001, dtype=np.float32)
    y = _host.exp2_f32(isa, x)
    assert (y >= 0).all() and (y <= 2.0**-126).all()


@extended
def test_exp2_f64(isa: str) -> None:
    x = np.concatenate([np.linspace(-1021.5, 0, 2**18), np.linspace(-2, 2, 2**16)])
    assert relative_error(_host.exp2_f64(isa, x), np.exp2(x.astype(EXACT))) < 4e-16
    ends = np.array([0.0, -0.0, -np.inf, np.inf, np.nan, -1e308, 1.0, -1022.0])
    expected = np.array([1, 1, 0, np.inf, np.nan, 0, 2, 2.0**-1022])
    np.testing.assert_array_equal(_host.exp2_f64(isa, ends), expected)


@extended
def test_log_f64(isa: str) -> None:
    positive = np.logspace(-307, 308, 2**18)
    x = np.concatenate([positive, np.linspace(0.5, 2, 2**16), np.array([1 + 2**-40, 1 - 2**-40])])
    x = x[x != 1]
    assert relative_error(_host.log_f64(isa, x), np.log(x.astype(EXACT))) < 4e-16
    ends = np.array([1.0, 0.0, np.inf, np.nan])
    np.testing.assert_array_equal(_host.log_f64(isa, ends), [0, -np.inf, np.inf, np.nan])


@extended
def test_log1p_f64(isa: str) -> None:
    """Over [0, 1], where exp(-|x|) lies."""
    x = np.concatenate([np.logspace(-307, 0, 2**18), np.linspace(2**-16, 1, 2**16)])
    assert relative_error(_host.log1p_f64(isa, x), np.log1p(x.astype(EXACT))) < 6e-16
    np.testing.assert_array_equal(_host.log1p_f64(isa, np.array([0.0, np.nan])), [0, np.nan])


@pytest.mark.parametrize("size", [0, 1, 15, 16, 17])
def test_sizes(size: int, isa: str) -> None:
    np.testing.assert_array_equal(_host.exp2_f64(isa, -np.arange(size, dtype=float)),
                                  0.5 ** np.arange(size))  # fmt: skip


def test_unknown_instruction_set() -> None:
    with pytest.raises(ValueError, match=r"isa: 'mmx'.*allowed: baseline"):
        _host.exp2_f32("mmx", np.zeros(1, np.float32))


# ---- the algebra of sums --------------------------------------------------------------------


@pytest.mark.parametrize("case", KERNEL_CASES, ids=str)
def test_coefficients_move_against_what_is_kept(case: Case, generator: torch.Generator) -> None:
    """Sums relative to one pair of pivots are those relative to another, moved. `rebase` makes up
    for how what is kept of a class moves: in coefficients, or in what opens a second round.
    """
    for _ in range(20):
        name, params = case.operator
        student, teacher = (3 * torch.randn(7, generator=generator).double() for _ in range(2))
        student[0] = teacher[0] = teacher[1] = -torch.inf
        pivots = [(10 * torch.randn(2, generator=generator)).tolist() for _ in range(2)]
        numbers = torch.randn(16, generator=generator).tolist()
        found = _host.algebra(
            name, list(params), student.tolist(), teacher.tolist(), *pivots, numbers
        )
        assert set(found) == {"stats", "refined" if case.rounds == 2 else "gradient"}
        for what, (here, moved) in found.items():
            size = float(np.abs(here).max())
            assert size > 0, what
            np.testing.assert_allclose(moved, here, rtol=1e-11, atol=1e-13 * size, err_msg=what)


# ---- 16-bit logits --------------------------------------------------------------------------

HALVES = [torch.float16, torch.bfloat16]
# Rows across the lanes, in windows of too few and of enough classes; batches; one row, and many
# classes: tiles, with a tail that is converted one by one.
SHAPES = [(40, 5), (40, 19), (40, 37), (1, 37), (3, 1037)]


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All finite numbers of a 16-bit type."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    return every[every.isfinite()]


def in_shape(values: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """`values`, cut into as many tensors of the shape as it takes, the last filled with zeros."""
    rows, classes = shape
    padded = torch.zeros(-(-len(values) // (rows * classes)), rows * classes, dtype=values.dtype)
    padded.view(-1)[: len(values)] = values
    return padded.view(-1, rows, classes)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_load_is_exact(dtype: torch.dtype, shape: tuple[int, int], isa: str) -> None:
    """All numbers of the type, subnormal ones included, give what their float32 copies give."""
    values = every_value(dtype)
    values = values[torch.randperm(len(values), generator=torch.Generator().manual_seed(0))]
    target = torch.zeros(shape[0], dtype=torch.long)
    for logits in in_shape(values, shape)[:40]:
        # At a temperature of the largest logit every one of them counts.
        temperature = float(logits.abs().max())
        # target_split's sums make the value; its logsumexp is that of float32 logits, bit by bit.
        params = torch.tensor([temperature], dtype=torch.float64)
        ours, truth = (
            ops.FUSED.forward("target_split", x, None, target, None, params, -100, False)[0]
            for x in (logits, logits.float())
        )
        assert_same(ours, truth)


def gradient(
    student: torch.Tensor, teacher: torch.Tensor, upstream: torch.Tensor, temperature: float = 4.0
) -> torch.Tensor:
    """Of KD. The operators take temperatures that the functions refuse."""
    params = torch.tensor([temperature, 1.0, 0.0, 0.0, 1.0, temperature], dtype=torch.float64)
    inputs = (student, teacher, None, None)
    _, stats, _ = ops.FUSED.forward("kd", *inputs, params, -100, False)
    return ops.FUSED.backward("kd", upstream, *inputs, stats, params, -100)


@pytest.mark.parametrize("stored", ["student", "teacher"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_value_is_loaded_as_itself(dtype: torch.dtype, stored: str, isa: str) -> None:
    """Also the subnormal ones: each against its float32 copy, so cold that any difference shows."""
    values = every_value(dtype)
    logits = torch.stack((values, torch.zeros_like(values)), dim=1)
    pair = (logits, logits.float()) if stored == "student" else (logits.float(), logits)
    cold = 2.0**-123
    assert gradient(*pair, torch.full(values.shape, 1 / cold), cold).abs().max() < 1e-6
    # The float32 copies themselves are told from 0.
    away = gradient(torch.zeros_like(logits), logits.float(), torch.ones(values.shape) / cold, cold)
    assert (away[values != 0].abs() > 1e-6).all()


# 2^-30 takes gradients through the subnormal numbers of float16 to 0, 2^-120 those of bfloat16;
# 2^20 and 2^127 past the largest ones.
@pytest.mark.parametrize("exponent", [0, -12, -30, 20, -120, -130, 127])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_store_rounds_as_torch(
    dtype: torch.dtype, shape: tuple[int, int], exponent: int, isa: str, generator: torch.Generator
) -> None:
    """A 16-bit gradient is the float32 gradient of the same logits, rounded as torch rounds."""
    student = (4 * torch.randn(shape, generator=generator)).to(dtype)
    teacher = (4 * torch.randn(shape, generator=generator)).to(dtype)
    upstream = torch.rand(shape[0], generator=generator) * 2.0**exponent
    ours = gradient(student, teacher, upstream)
    expected = gradient(student.float(), teacher, upstream)
    assert ours.dtype == dtype and expected.dtype == torch.float32
    assert expected.abs().max() > 0
    assert_same(ours, expected.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_store_keeps_nan(dtype: torch.dtype, isa: str) -> None:
    for classes in (5, 37, 1037):
        for rows in (1, 40):
            student = torch.zeros(rows, classes, dtype=dtype)
            student[0, 3] = torch.nan
            ours = gradient(student, torch.zeros(rows, classes), torch.ones(rows))
            assert ours[0].isnan().all() and not ours[1:].isnan().any()
