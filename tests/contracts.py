"""What the kernels of every backend keep to, in all their variants, such as a planner's regimes.

Each takes a variant after the other from `variants()`, and the backend by its name.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cases import CASES, IGNORED, Case, assert_same, evaluate, make_inputs
from test_equivalence import Variants

F32 = torch.float32


def rows_alone(case: Case) -> Case:
    """A case whose rows do not share a number: the one after tf-NKD, which has its own mean."""
    return CASES[CASES.index(case) + 1] if case.loss == "tf_nkd" else case


def check_that_rows_that_do_not_count_are_not_read(
    case: Case, generator: torch.Generator, backend: str, variants: Variants
) -> None:
    """Ignored rows, and rows of weight 0, full of NaN."""
    student, teacher, target = make_inputs("normal", 4, 70, F32, generator)
    dead = torch.tensor([0, 1, 0, 1]).bool()
    target[3] = IGNORED
    student[dead] = teacher[dead] = math.nan
    common: dict = {"backend": backend}
    if case.outputs == 1:
        common["row_weight"] = torch.tensor([1.0, 0.0, 2.0, 1.0])
    else:
        target[1] = IGNORED
    for _ in variants():
        for call in (case.rows, case)[: 2 if case.outputs == 1 else 1]:
            value, gradient = evaluate(call, student, teacher, target, **common)
            assert value.isfinite().all()
            assert value.dim() == 0 or not value[..., dead].any()
            assert not gradient[dead].any()
            assert gradient.isfinite().all() and gradient[~dead].any(-1).all()


def check_that_nan_stays_in_its_row(
    case: Case, generator: torch.Generator, backend: str, variants: Variants, at: int = 50
) -> None:
    case = rows_alone(case)
    clean = make_inputs("normal", 3, 70, F32, generator)
    dirty = [x.clone() for x in clean]
    dirty[0][2, at] = math.nan
    others = torch.arange(3) != 2
    for _ in variants():
        value, gradient = evaluate(case.rows, *dirty, backend=backend)
        good = evaluate(case.rows, *clean, backend=backend)
        assert value[..., 2].isnan().any() and gradient[2].isnan().any()
        assert_same(value[..., others], good[0][..., others])
        assert_same(gradient[others], good[1][others])


def check_that_a_bad_target_makes_its_row_nan(
    case: Case, generator: torch.Generator, backend: str, variants: Variants, bad: int
) -> None:
    """What happens on a GPU, where nobody looks at targets before the kernel does."""
    case = rows_alone(case)
    student, teacher, target = make_inputs("normal", 3, 70, F32, generator)
    others = torch.arange(3) != 2
    wrong = torch.where(others, target, bad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdkernels.losses.checks_targets", lambda _: False)
        for _ in variants():
            value, gradient = evaluate(case.rows, student, teacher, wrong, backend=backend)
            good = evaluate(case.rows, student, teacher, target, backend=backend)
            assert value[..., 2].isnan().all() and gradient[2].isnan().all()
            assert_same(value[..., others], good[0][..., others])
            assert_same(gradient[others], good[1][others])


EXTREME_TEMPERATURES = (1e-60, 1e-30, 1e30, 1e150)


def check_that_extreme_temperatures_give_numbers(
    case: Case, temperature: float, classes: int, backend: str, variants: Variants
) -> None:
    if "temperature" not in case.options:
        return
    case = replace(case, options={**case.options, "temperature": temperature})
    inputs = make_inputs("normal", 3, classes)
    for _ in variants():
        value, gradient = evaluate(case.rows, *inputs, backend=backend)
        assert not value.isnan().any() and gradient.isfinite().all()
