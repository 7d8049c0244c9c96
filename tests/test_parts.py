"""Distillation and cross-entropy as parts of a loss, and label smoothing, in the CPU kernels."""

from __future__ import annotations

import contracts
import pytest
import torch
from cases import BF16, F32, F64, OPERATORS, needs_cpu
from contracts import GOOD, REDUCTION, as_params, each_isa

from kdkernels import ops

pytestmark = needs_cpu

PAIRS = [name for name in OPERATORS if ops.LOSSES[name].parts]
# Rows across the lanes, batches, tiles.
CLASSES = (2, 40, 1500)


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", PAIRS)
def test_parts(name, classes, dtypes, generator) -> None:
    contracts.check_parts(ops.FUSED, name, classes, dtypes, generator, each_isa)


@pytest.mark.parametrize("classes", CLASSES)
@pytest.mark.parametrize("name", PAIRS)
def test_a_kd_weight_of_0_wins_over_an_infinite_distillation(name, classes) -> None:
    contracts.check_infinite_distillation(ops.FUSED, name, classes, each_isa)


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
@pytest.mark.parametrize("classes", [1, 2, 5, 40, 300, 2500])
def test_label_smoothing_is_torchs(classes, dtype) -> None:
    contracts.check_smoothing_is_torchs(ops.FUSED, classes, dtype, each_isa)


def test_a_loss_without_weights_has_no_parts() -> None:
    alone = {**GOOD, "loss": "cross_entropy", "teacher": None, "params": as_params(0.0, 0.0)}
    for call in (
        lambda: ops.FUSED.forward(**alone, with_parts=True),
        lambda: ops.FUSED.reduced(**alone, **REDUCTION, with_parts=True),
    ):
        with pytest.raises(RuntimeError, match="with_parts: 'cross_entropy' has no weights"):
            call()


def test_parts_carry_no_gradient() -> None:
    student = GOOD["student"].clone().requires_grad_()
    _, _, parts = ops.FUSED.forward(**{**GOOD, "student": student}, with_parts=True)
    assert not parts.requires_grad and parts.shape == (2, *student.shape[:-1])
    assert parts.dtype == torch.float32
