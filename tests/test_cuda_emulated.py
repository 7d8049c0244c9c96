"""The CUDA kernels against the reference in float64, run and checked by the emulation.

The grid of test_equivalence.py on small and odd shapes. Every regime is forced in turn, with few
threads, for the planner would take only the first ones for rows this short, and under another
schedule for each call. A race, an access outside of a tensor or a value that nobody wrote is an
error, not a wrong number: see csrc/simt/simt.h.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any

import contracts
import pytest
import torch
from cases import (
    BF16,
    CASES,
    DTYPE_PAIRS,
    F16,
    F32,
    F64,
    IGNORED,
    INF,
    KERNEL_CASES,
    LAYOUTS,
    MAIN_CASES,
    MAIN_KERNEL_CASES,
    MAIN_SCALARS,
    OPERATORS,
    PRECISE_CASES,
    SOME,
    USUAL,
    WALKED,
    Case,
    assert_same,
    evaluate,
    make_inputs,
)
from contracts import (
    KINDS,
    PATTERNS,
    REDUCTIONS,
    Reduction,
    Variants,
    check_a_weight_of_0,
    check_digits_near_the_teacher,
    check_first_classes,
    check_infinite_logits,
    check_operators,
    check_reduction,
    check_rows,
)
from emulated import DEVICE, EMULATED, emulate
from grid import pairwise

import kdkernels

pytestmark = pytest.mark.full  # the emulation is built for make test-full

REGIMES: dict[str, dict[str, Any]] = {
    "as planned": {},
    "8 lanes": {"regime": "lanes", "lanes": 8, "threads": 32, "blocks": 2},
    "16 lanes": {"regime": "lanes", "lanes": 16, "threads": 64, "blocks": 1},
    "32 lanes": {"regime": "lanes", "lanes": 32, "threads": 64, "blocks": 2},
    "8 lanes, many": {"regime": "lanes", "lanes": 8, "lane_classes": 16, "blocks": 1},
    "16 lanes, many": {"regime": "lanes", "lanes": 16, "lane_classes": 16, "blocks": 2},
    "block": {"regime": "block", "threads": 64, "blocks": 2},
    "block of 4 warps": {"regime": "block", "threads": 128, "blocks": 1},
    "block of a warp": {"regime": "block", "threads": 32, "blocks": 2},
    "staged": {"regime": "staged", "threads": 64, "blocks": 2},
    "staged, room for 1 more": {"regime": "staged", "blocks": 1, "more_slots": 1},
    "staged, room for 2 rows": {"regime": "staged", "blocks": 2, "more_slots": 9},
    "cluster of 1": {"regime": "cluster", "threads": 64, "clusters": 2},
    "cluster of 1, a warp": {"regime": "cluster", "clusters": 1, "stages": 1},
    "cluster of 2": {"regime": "cluster", "parts": 2, "threads": 64, "clusters": 1, "stages": 3},
    "cluster of 4": {"regime": "cluster", "parts": 4, "clusters": 2, "stages": 2},
    "cluster of 8": {"regime": "cluster", "parts": 8, "clusters": 3, "stages": 1},
    "cluster of 16": {"regime": "cluster", "parts": 16, "clusters": 1, "stages": 2},
    "sweeps": {"regime": "sweeps", "threads": 64, "blocks": 2},
    "sweeps of a warp": {"regime": "sweeps", "threads": 32, "blocks": 1},
    "split": {"regime": "split", "threads": 64, "wave": 2, "parts": 3},
    "split in one": {"regime": "split", "threads": 32, "wave": 64, "parts": 1},
    "strided": {"regime": "strided", "threads": 32, "blocks": 1},
}
Dtypes = tuple[torch.dtype, torch.dtype]
SEEDS = range(4)  # in order, in reverse order, and two at random; see simt.h


def each_regime(names: Sequence[str], seed: int) -> Iterator[str]:
    for i, name in enumerate(names):
        with emulate(seed + i, **REGIMES[name]):
            yield f"{name}, seed {seed + i}"


def one(regime: str, seed: int) -> Variants:
    return partial(each_regime, [regime], seed)


def all_regimes(seed: int) -> Variants:
    return partial(each_regime, list(REGIMES), seed)


# ---- the grid -------------------------------------------------------------------------------

# Fewer classes than a vector; a vector and its neighbours; those of real data; lanes and blocks
# that are just filled; rows of several vectors per thread.
CLASSES = (1, 2, 3, 7, 8, 9, 31, 33, 64, 71, 100, 128, 135, 257, 1003)


@pairwise(
    case=WALKED, regime=[*REGIMES], classes=CLASSES, dtypes=DTYPE_PAIRS, kind=KINDS, rows=[1, 7, 3],
    ignored=[0.0, 0.2], seed=SEEDS,
)  # fmt: skip
def test_shapes(
    case: Case, regime: str, classes: int, dtypes: Dtypes, kind: str, rows: int, ignored: float,
    seed: int, generator: torch.Generator,
) -> None:  # fmt: skip
    inputs = make_inputs(kind, rows, classes, dtypes, generator, ignored=ignored)
    check_rows(case, *inputs, generator, backend="cuda", variants=one(regime, seed))


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("case", MAIN_KERNEL_CASES, ids=str)
def test_types_in_every_regime(case: Case, dtypes: Dtypes, generator: torch.Generator) -> None:
    inputs = make_inputs("masked", 3, 103, dtypes, generator)
    check_rows(case, *inputs, generator, backend="cuda", variants=all_regimes(0))


@pytest.mark.parametrize("dtype", [BF16, F32], ids=str)
@pytest.mark.parametrize("case", MAIN_KERNEL_CASES, ids=str)
def test_rows_of_several_warps(case: Case, dtype: torch.dtype, generator: torch.Generator) -> None:
    """Each with a maximum of its own, in every regime: what one warp has does not fit another."""
    student, teacher, target = make_inputs("normal", 2, 1003, dtype, generator)
    rising = torch.linspace(-12, 12, 1003)
    inputs = (student + rising.to(dtype), teacher - rising.to(dtype), target)
    check_rows(case, *inputs, generator, backend="cuda", variants=all_regimes(1))
    if case.outputs == 1:
        # Only the one sweep has coefficients to rebase from the row's maxima to a warp's.
        inputs = make_inputs("normal", (1, 3), 1003, (dtype, dtype), generator)
        check_reduction(case, ("mean", None), inputs, generator, backend="cuda",
                        variants=all_regimes(2))  # fmt: skip


@pairwise(
    student_layout=[*LAYOUTS], teacher_layout=[*LAYOUTS], regime=[*REGIMES], case=KERNEL_CASES,
    classes=[5, 37, 150], dtypes=DTYPE_PAIRS, seed=SEEDS,
)  # fmt: skip
def test_layouts(
    student_layout: str, teacher_layout: str, regime: str, case: Case, classes: int, dtypes: Dtypes,
    seed: int, generator: torch.Generator,
) -> None:  # fmt: skip
    """Every alignment of student and teacher; the neighbours of their logits are NaN."""
    dense = make_inputs("normal", (3, 4), classes, dtypes, generator, ignored=0.1)
    views = []
    for layout, x in zip((student_layout, teacher_layout), dense[:2], strict=True):
        view, dim = LAYOUTS[layout](x)
        views.append(view.movedim(dim, -1))
    check_rows(case, *views, dense[2], generator, backend="cuda", variants=one(regime, seed))


# What decides how a granule is cut: the type, where rows begin, how far from them the teacher's do.
PLACES = [*product([F16, BF16, F32, F64], range(8), [0, 1, 5])]


@pairwise(place=PLACES, regime=[*REGIMES], classes=[29, 64, 101], case=KERNEL_CASES)
def test_every_place_between_two_granules(
    place: tuple[torch.dtype, int, int], regime: str, classes: int, case: Case,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Rows that begin anywhere, teachers that begin elsewhere, and gradients that lie otherwise."""
    dtype, shift, apart = place
    student, teacher, target = make_inputs("normal", 3, classes, dtype, generator)
    views = []
    for x, before in ((student, shift), (teacher, (shift + apart) % 8)):
        wide = torch.full((3, classes + 16), math.nan, dtype=dtype)
        views.append(wide[:, before : before + classes].copy_(x))
    check_rows(case, *views, target, generator, backend="cuda", variants=one(regime, shift % 4))


@pairwise(
    case=[x for x in WALKED if x.outputs == 1], how=REDUCTIONS, regime=[*REGIMES],
    classes=[17, 101], dtypes=DTYPE_PAIRS, kind=["normal", "masked"], ignored=[0.0, 0.2],
    weighted=[True, False], seed=SEEDS,
)  # fmt: skip
def test_reductions(
    case: Case, how: Reduction, regime: str, classes: int, dtypes: Dtypes, kind: str,
    ignored: float, weighted: bool, seed: int, generator: torch.Generator,
) -> None:  # fmt: skip
    inputs = make_inputs(kind, (3, 3), classes, dtypes, generator, ignored=ignored)
    check_reduction(case, how, inputs, generator, weighted, "cuda", one(regime, seed))


@pairwise(
    case=MAIN_KERNEL_CASES,
    sizes=[
        (1, 16411, (BF16, BF16), "split"),
        (3, 12345, (F16, F16), "staged"),
        (2, 9999, (F32, F32), "staged"),
        (4, 8200, (BF16, F32), "sweeps"),
    ],
)
def test_large_vocabulary(
    case: Case, sizes: tuple[int, int, Dtypes, str], generator: torch.Generator
) -> None:
    """As planned, on 3 multiprocessors: rows that are few or many, staged, in sweeps, in waves."""
    rows, classes, dtypes, regime = sizes
    inputs = make_inputs("normal", rows, classes, dtypes, generator)
    for seed in (0, 2):
        with emulate(seed) as done:
            planned = partial(iter, ["planned"])
            check_rows(case, *inputs, generator, backend="cuda", variants=planned)
            if case.teacher:
                assert done.runs[0]["regime"] == regime, done.runs[0]


@pairwise(case=KERNEL_CASES, dtypes=DTYPE_PAIRS, parts=[1, 2, 16], stages=[1, 2, 3])
def test_parts_longer_than_registers_hold(
    case: Case, dtypes: Dtypes, parts: int, stages: int, generator: torch.Generator
) -> None:
    """A warp keeps 1536 classes or fewer; the others are computed again for the gradient."""
    classes = 2003 if F64 not in dtypes and parts < 16 else 503
    student, teacher, target = make_inputs("normal", 3, classes, dtypes, generator)
    rising = torch.linspace(-12, 12, classes)
    inputs = ((student + rising).to(dtypes[0]), (teacher - rising).to(dtypes[1]), target)
    forced = {"regime": "cluster", "parts": parts, "stages": stages, "clusters": 2}
    how = {"backend": "cuda", "variants": partial(iter, [str(forced)])}
    with emulate(parts + stages, **forced):
        check_rows(case, *inputs, generator, **how)
        if case.outputs == 1:
            inputs = make_inputs("normal", (1, 3), classes, dtypes, generator)
            check_reduction(case, ("mean", None), inputs, generator, **how)


def test_clusters_do_not_wait_for_rows_that_are_not_read(generator: torch.Generator) -> None:
    """Long runs of them, at the beginning and the end; only the others are copied."""
    student, teacher, target = make_inputs("normal", 150, 70, BF16, generator)
    target[:40] = target[43:119] = target[140:] = IGNORED
    truth = evaluate(SOME, student, teacher, target, backend="cpu")
    for parts, clusters, stages in ((1, 1, 1), (2, 3, 2), (4, 2, 3), (2, 200, 2)):
        forced = {"regime": "cluster", "parts": parts, "clusters": clusters, "stages": stages}
        with emulate(parts, **forced) as done:
            value, gradient = evaluate(SOME, student, teacher, target, backend="cuda")
            assert done.runs[-1]["bulk_copies"] == 2 * parts * int((target != IGNORED).sum())
        torch.testing.assert_close(value, truth[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(gradient, truth[1], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("case", [x for x in MAIN_KERNEL_CASES if x.outputs == 1], ids=str)
def test_bits_do_not_depend_on_the_number_of_clusters(
    case: Case, generator: torch.Generator
) -> None:
    inputs = make_inputs("normal", 7, 203, BF16, generator, ignored=0.2)
    results = []
    for clusters, stages in ((1, 2), (2, 1), (3, 3), (7, 2), (9, 1)):
        forced = {"regime": "cluster", "parts": 4, "clusters": clusters, "stages": stages}
        with emulate(clusters, **forced):
            results.append(evaluate(case, *inputs, backend="cuda"))
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same(x, y)


@pairwise(
    case=[case for case in MAIN_KERNEL_CASES if case.teacher],
    sizes=[
        (40, 8211, (BF16, BF16), 1),
        (1, 12301, (F32, F32), 8),
        (3, 32003, (F16, F16), 8),
        (2, 30007, (BF16, F32), 8),
    ],
)
def test_long_rows_are_planned_for_clusters(
    case: Case, sizes: tuple[int, int, Dtypes, int], generator: torch.Generator
) -> None:
    """As an H200 would take them, but with few multiprocessors."""
    device = {**DEVICE, "multiprocessors": 32, "clusters": [32, 16, 8, 4, 2]}
    rows, classes, dtypes, parts = sizes
    inputs = make_inputs("normal", rows, classes, dtypes, generator)
    with emulate(parts, device=device) as done:
        planned = partial(iter, ["planned"])
        check_rows(case, *inputs, generator, backend="cuda", variants=planned)
        shown = done.runs[0]
        assert (shown["regime"], shown["parts"]) == ("cluster", parts), shown


def test_long_rows_come_in_waves(generator: torch.Generator) -> None:
    inputs = make_inputs("normal", 7, 101, BF16, generator)
    with emulate(1, **REGIMES["split"]) as done:
        for case in MAIN_SCALARS:
            evaluate(case, *inputs, backend="cuda")
            assert done.runs[-1]["launches"] == (1 + case.rounds) * 4 + 1  # and the count of rows
        evaluate(SOME.rows, *inputs, backend="cuda")
        assert [x["launches"] for x in done.runs[-2:]] == [2 * 4, 4]


@pytest.mark.parametrize("ignore_index", [0, 3, 2**40])
def test_any_class_may_be_ignored(ignore_index: int, generator: torch.Generator) -> None:
    """In every block, or in a launch before."""
    check = contracts.check_that_any_class_may_be_ignored
    check(ignore_index, 5, "cuda", generator, all_regimes(0))
    check(ignore_index, 8300, "cuda", generator, one("as planned", 0))


def test_a_normalizer_may_be_a_tensor(generator: torch.Generator) -> None:
    """Read on the device; as a number it becomes part of the scale."""
    inputs = make_inputs("normal", 5, 70, F32, generator, ignored=0.2)
    for _ in all_regimes(0)():
        number, tensor = (
            evaluate(SOME, *inputs, backend="cuda", normalizer=x) for x in (7.5, torch.tensor(7.5))
        )
        for x, y in zip(number, tensor, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("dtype", [BF16, F32, F64], ids=str)
def test_kd_without_a_target(dtype: torch.dtype, generator: torch.Generator) -> None:
    contracts.check_kd_without_a_target(dtype, 101, "cuda", generator, all_regimes(1))


@pairwise(case=KERNEL_CASES, pattern=[*PATTERNS], regime=[*REGIMES], classes=[9, 70], seed=SEEDS)
def test_infinite_logits(
    case: Case, pattern: str, regime: str, classes: int, seed: int, generator: torch.Generator
) -> None:
    for _ in one(regime, seed)():
        check_infinite_logits(case, pattern, classes, "cuda", generator)


@pairwise(case=KERNEL_CASES, gap=contracts.FAR, side=contracts.SIDES, regime=[*REGIMES])
def test_a_target_far_above(
    case: Case, gap: float, side: str, regime: str, generator: torch.Generator
) -> None:
    for _ in one(regime, 0)():
        contracts.check_a_target_far_above(case, gap, side, "cuda", generator)


@pairwise(case=KERNEL_CASES, regime=[*REGIMES], sizes=[(5, 8, 10), (37, 37, 48), (70, 77, 70)])
def test_first_classes(
    case: Case, regime: str, sizes: tuple[int, int, int], generator: torch.Generator
) -> None:
    check_first_classes(case, sizes, F32, "cuda", one(regime, 0), generator)


@pairwise(loss=[*contracts.SHARE_OF], share=contracts.END_SHARES, regime=[*REGIMES])
def test_shares_near_the_ends(
    loss: str, share: float, regime: str, generator: torch.Generator
) -> None:
    variants = one(regime, 0)
    contracts.check_shares_near_the_ends(loss, share, "cuda", variants, generator)


@pairwise(case=PRECISE_CASES, regime=[*REGIMES], with_target=[True, False])
def test_digits_near_the_teacher(
    case: Case, regime: str, with_target: bool, generator: torch.Generator
) -> None:
    check_digits_near_the_teacher(case, 70, "cuda", one(regime, 0), with_target, generator)


@pairwise(regime=[*REGIMES], gap=[20.0, 60.0, 120.0, 200.0], temperature=[1.0, 3.0])
def test_saturated_targets(
    regime: str, gap: float, temperature: float, generator: torch.Generator
) -> None:
    for _ in one(regime, 0)():
        contracts.check_saturated_target_of_dkd(gap, 70, "cuda", generator)
        contracts.check_saturated_target_of_nkd(gap, temperature, 70, "cuda", generator)


def test_one_teacher_row_for_all_and_one_row_alone(generator: torch.Generator) -> None:
    """Rows that do not move on, and logits without a dimension of rows."""
    for step, case in enumerate(MAIN_CASES):
        student, teacher, target = make_inputs("normal", (2, 3), 37, BF16, generator)
        teacher = teacher[:1, :1].expand_as(teacher)
        check_rows(case, student, teacher, target, generator, backend="cuda",
                   variants=all_regimes(step))  # fmt: skip
        alone = make_inputs("normal", (), 37, F32, generator)
        check_rows(case, *alone, generator, backend="cuda", variants=all_regimes(step))


# ---- the contracts --------------------------------------------------------------------------


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_rows_that_do_not_count_are_not_read(case: Case, generator: torch.Generator) -> None:
    variants = all_regimes(1)
    contracts.check_that_rows_that_do_not_count_are_not_read(case, generator, "cuda", variants)


@pytest.mark.parametrize("at", [0, 50, 69])
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_nan_stays_in_its_row(case: Case, at: int, generator: torch.Generator) -> None:
    contracts.check_that_nan_stays_in_its_row(case, generator, "cuda", all_regimes(at), at)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_nan_wins_over_infinities_and_weights_of_0(case: Case) -> None:
    contracts.check_that_nan_wins(case, 70, "cuda", all_regimes(0), step=5)


@pytest.mark.parametrize("bad", [-1, 70, 2**32 + 1])
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_a_bad_target_makes_its_row_nan(case: Case, bad: int, generator: torch.Generator) -> None:
    variants = all_regimes(0)
    contracts.check_that_a_bad_target_makes_its_row_nan(case, generator, "cuda", variants, bad)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_same_bits_under_every_schedule_and_without_gradient(
    case: Case, regime: str, generator: torch.Generator
) -> None:
    inputs = make_inputs("normal", 7, 70, BF16, generator, ignored=0.2)
    results = []
    for seed in SEEDS:
        with emulate(seed, **REGIMES[regime]):
            results.append(evaluate(case, *inputs, backend="cuda"))
            assert_same(case(*inputs, backend="cuda"), results[0][0])
            rows = evaluate(case.rows, *inputs, backend="cuda")
            results[-1] += rows
    for other in results[1:]:
        for x, y in zip(other, results[0], strict=True):
            assert_same(x, y)


@pytest.mark.parametrize("loss", [kdkernels.dkd_loss, kdkernels.aekt_loss])
def test_a_weight_of_0_wins_over_a_row_without_logits(loss: object) -> None:
    for _ in all_regimes(0)():
        check_a_weight_of_0(loss, 70, "cuda")


@pytest.mark.parametrize("temperature", contracts.EXTREME_TEMPERATURES)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_extreme_temperatures_give_numbers(case: Case, temperature: float) -> None:
    regimes = all_regimes(0)
    contracts.check_that_extreme_temperatures_give_numbers(case, temperature, 70, "cuda", regimes)


# Of the regimes, those that a call in double has.
@pairwise(
    case=[x for x in CASES if x.teacher], temperature=contracts.LARGE_TEMPERATURES,
    regime=["as planned", "sweeps", "split", "strided"], dtype=[F32, BF16, F16], seed=SEEDS,
)  # fmt: skip
def test_large_temperatures(
    case: Case, temperature: float, regime: str, dtype: torch.dtype, seed: int,
    generator: torch.Generator,
) -> None:  # fmt: skip
    check = contracts.check_large_temperatures
    check(case, temperature, 71, dtype, "cuda", one(regime, seed), generator)


@pytest.mark.parametrize("regime", REGIMES)
@pytest.mark.parametrize("low", [-INF, torch.finfo(F32).min])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_rows_without_logits_above_the_lowest(temperature: float, low: float, regime: str) -> None:
    """Every class masked but the target, whole vectors masked, and the largest one last."""
    student = torch.full((4, 203), low)
    student[0, 5] = 1.0
    student[1, 150:] = torch.arange(53) - 20.0
    student[2] = torch.arange(203) * 10.0  # rises by more than a running pivot allows
    student[3] = torch.arange(203) * -10.0
    target = torch.tensor([5, 160, 3, 7])
    case = Case("kd", {"temperature": temperature, "ce_weight": 1.0})
    with emulate(2, **REGIMES[regime]):
        value, gradient = evaluate(case.rows, student, student.clone(), target, backend="cuda")
    truth, truth_gradient = evaluate(
        case.rows, student.double(), student.double(), target, backend="reference"
    )
    torch.testing.assert_close(value.double(), truth, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gradient.double(), truth_gradient, rtol=1e-5, atol=1e-5)


# ---- the operators --------------------------------------------------------------------------


def test_few_classes_take_one_launch(generator: torch.Generator) -> None:
    """Count of the rows, losses, gradient and the sum; many rows are counted by a second one."""
    for rows, classes, launches in (
        (40, 10, 1), (8192, 10, 1), (8193, 10, 2), (4096, 100, 1), (1024, 1000, 1),
    ):  # fmt: skip
        inputs = make_inputs("normal", rows, classes, F32, generator, ignored=0.3)
        with emulate() as done:
            value, gradient = evaluate(USUAL["kd"], *inputs, backend="cuda")
            assert [x["launches"] for x in done.runs] == [launches]
        truth = evaluate(USUAL["kd"], *inputs, backend="cpu")
        torch.testing.assert_close(value, truth[0])
        torch.testing.assert_close(gradient, truth[1])


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64], ids=str)
def test_scale(dtype: torch.dtype, generator: torch.Generator) -> None:
    whole = torch.randn(300, generator=generator).to(dtype)
    for first, last in ((0, 300), (1, 299), (3, 4), (5, 7), (8, 264), (7, 64)):
        for factor in (torch.tensor(-2.5), torch.tensor(0.3, dtype=F64)):
            if dtype == F64 and factor.dtype == F32:
                continue
            ours = whole.clone()
            EMULATED.scale_(ours[first:last], factor)
            expected = whole.clone()
            expected[first:last] = (whole[first:last].to(factor.dtype) * factor).to(dtype)
            torch.testing.assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    check_operators(EMULATED, name, ["forward", "reduced", "backward"])


# ---- what a loss is made of ------------------------------------------------------------------


@pytest.mark.parametrize("dtypes", [(F32, F32), (BF16, F32), (F64, F64)], ids=str)
@pytest.mark.parametrize("name", [x for x in OPERATORS if kdkernels.ops.LOSSES[x].parts])
def test_parts(name: str, dtypes: Dtypes, generator: torch.Generator) -> None:
    contracts.check_parts(EMULATED, name, 40, dtypes, generator, all_regimes(1))
    if dtypes == (F32, F32):
        contracts.check_infinite_distillation(EMULATED, name, 40, all_regimes(2))


@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=str)
def test_label_smoothing_is_torchs(dtype: torch.dtype) -> None:
    contracts.check_smoothing_is_torchs(EMULATED, 70, dtype, all_regimes(3))
