"""The Triton kernels in Triton's interpreter against the reference in float64.

The grid of test_equivalence.py on small and odd shapes, every regime forced in turn: the planner
would take only the first for rows this short. Blocks are smaller than any that a GPU gets, so that
a row of 100 classes has several. Kernels run in NumPy, on CPU tensors; nothing here says how they
are compiled, see test_triton_compiled.py.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product

import contracts
import pytest
import torch
from cases import (
    BF16,
    CASES,
    DTYPE_PAIRS,
    F32,
    F64,
    IGNORED,
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
    as_params,
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
from grid import pairwise

import kdkernels

TRITON = kdkernels.backends()["triton"]
pytestmark = [
    pytest.mark.skipif(not TRITON.available, reason=f"no Triton: {TRITON.reason}"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_gpu_*.py run them on the GPU"),
    # NumPy's, about what the kernels do on purpose: log 0, -inf - -inf under a mask.
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
]
if TRITON.available:
    from kdkernels.triton_kernels import launch, losses, planner
    from kdkernels.triton_kernels.planner import Device, Plan, plan


def forced(regime: str, block: int) -> object:
    """A planner that knows one regime."""

    def planned(rows: int, window: int, device: Device, **_: bool) -> Plan:
        chunks = math.ceil(window / block)
        if regime == "resident":
            one = 1 << max(0, window - 1).bit_length()
            return Plan("resident", max(one, 16), 2, 4, math.ceil(rows / 2))
        if regime == "cluster":  # of two CTAs, neither of which holds all that it could
            one = 1 << max(0, window - 1).bit_length()
            return Plan("resident", max(4 * one, 128), 1, 4, rows, ctas=2)
        if regime == "sweeps":  # more rows than programs
            return Plan("sweeps", block, 1, 4, max(1, rows // 2))
        part_chunks = math.ceil(chunks / 3)
        return Plan("split", block, 1, 4, rows, math.ceil(chunks / part_chunks), part_chunks)

    return planned


Dtypes = tuple[torch.dtype, torch.dtype]
REGIMES = ("as planned", "resident", "cluster", "sweeps", "split")


def in_regime(regime: str) -> Iterator[str]:
    """As planned, or with blocks of 32; the backward pass in one and in many slices."""
    with pytest.MonkeyPatch.context() as patch:
        if regime != "as planned":
            patch.setattr(launch, "plan", forced(regime, 32))
            patch.setattr(planner, "SLICE", (32, 4))
            patch.setattr(planner, "SLICE_WIDE", (32, 4))
        yield regime


def one(regime: str) -> Variants:
    return partial(in_regime, regime)


# For `make test` the grid below is enough of the others.
every_regime = pytest.mark.parametrize(
    "regime", [x if x == "as planned" else pytest.param(x, marks=pytest.mark.full) for x in REGIMES]
)


# ---- the grid -------------------------------------------------------------------------------


@pairwise(
    case=[x for x in MAIN_CASES if x.loss in kdkernels.ops.LOSSES], regime=REGIMES,
    classes=[40, 3, 1], dtypes=[(F32, F32), (BF16, F32), (F64, F64)],
)  # fmt: skip
def test_numbers_of_each_row(
    case: Case, regime: str, classes: int, dtypes: Dtypes, generator: torch.Generator
) -> None:
    inputs = make_inputs("normal", 5, classes, dtypes, generator, ignored=0.1)
    own = contracts.numbers_of(case, (5,), generator)
    contracts.check_numbers_of_rows(case, inputs, own, generator, "triton", one(regime))


@pytest.mark.parametrize("name", OPERATORS)
def test_each_row_is_taken_once(name: str) -> None:
    """In float64 where its temperature is large, and by the loss that serves its numbers."""
    temperatures = torch.tensor([2.0, math.nan, 0.0, -3.0, 40.0, math.inf, 32.0]).double()
    facts = kdkernels.ops.LOSSES[name]
    for end in (0.0, 0.5, 1.0, math.nan):
        student, teacher, target = make_inputs("normal", 7, 5)
        params = OPERATORS[name].repeat(7, 1)
        mixed = [x for x, meaning in facts.means.items() if meaning == "mixed share"]
        for x in mixed:
            params[:, facts.params.index(x)] = end
        if facts.temperature:
            params[:, 0] = temperatures
        inputs = (student, teacher if facts.teacher else None, target, None, params, IGNORED)
        found = [*launch.Call.of(name, *inputs, None).served()]
        taken = torch.stack([x.numbers[0] != 0 for x in found])
        assert taken.sum(0).eq(1).all()
        for x, own in zip(found, taken, strict=True):
            assert not facts.teacher or (x.numbers[0][own] > 32).eq(x.large).all()
            known = params[0].tolist() if facts.temperature else [1.0, *params[0].tolist()]
            assert not own.any() or x.loss is losses.serving(losses.LOSSES[name], known)[0]


@every_regime
def test_temperatures_that_are_none(regime: str) -> None:
    contracts.check_temperatures_that_are_none(kdkernels.ops.TRITON, one(regime))


@pairwise(
    case=CASES, regime=REGIMES, classes=[1, 3, 8, 33, 100], dtypes=DTYPE_PAIRS, kind=KINDS,
    rows=[1, 4, 3], ignored=[0.1, 0.0],
)  # fmt: skip
def test_shapes(
    case: Case, regime: str, classes: int, dtypes: Dtypes, kind: str, rows: int, ignored: float,
    generator: torch.Generator,
) -> None:  # fmt: skip
    inputs = make_inputs(kind, rows, classes, dtypes, generator, ignored=ignored)
    check_rows(case, *inputs, generator, backend="triton", variants=one(regime))


@pytest.mark.full
@pairwise(case=MAIN_KERNEL_CASES, dtypes=DTYPE_PAIRS, regime=REGIMES)
def test_types(case: Case, dtypes: Dtypes, regime: str, generator: torch.Generator) -> None:
    inputs = make_inputs("masked", 2, 103, dtypes, generator)
    check_rows(case, *inputs, generator, backend="triton", variants=one(regime))


@pytest.mark.full
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("case", MAIN_KERNEL_CASES, ids=str)
def test_large_vocabulary(case: Case, rows: int, generator: torch.Generator) -> None:
    """As planned: two sweeps for 5 rows on 4 multiprocessors, a split row for one."""
    inputs = make_inputs("normal", rows, 16411, BF16, generator)
    check_rows(case, *inputs, generator, backend="triton", variants=one("as planned"))


@pytest.mark.full
@pytest.mark.parametrize("case", [USUAL["kd"], SOME], ids=str)
def test_large_vocabulary_in_a_cluster(
    case: Case, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a device with clusters gets: a tile of 32768 indices, each CTA with an equal share."""
    seen = []
    run = launch.launch

    def spied(kernel: object, grid: tuple, warps: int, arguments: dict, *ctas: int) -> None:
        seen.append((arguments["BLOCK"], arguments["CTAS"], *ctas))
        run(kernel, grid, warps, arguments, *ctas)

    monkeypatch.setattr(launch, "launch", spied)
    monkeypatch.setattr(launch, "device_of", lambda device: Device(4, ctas=16))
    inputs = make_inputs("normal", 2, 20011, BF16, generator)
    check_rows(case, *inputs, generator, backend="triton", variants=one("as planned"))
    assert seen[0] == (32768, 4, 4)


def test_no_two_ctas_of_a_cluster_write_one_element(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The interpreter writes one after the other, and the last wins; CTAs have no order."""
    from triton.runtime import interpreter

    store = interpreter.InterpreterBuilder.create_masked_store

    def checked(self: object, ptrs: object, value: object, mask: object, *rest: object) -> object:
        written = ptrs.data[mask.data]
        assert len(set(written.tolist())) == written.size
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_store", checked)
    inputs = make_inputs("normal", 2, 103, torch.bfloat16, generator)
    for _ in in_regime("cluster"):
        for x in inputs[0], inputs[0].T.contiguous().T:  # in granules, and one by one
            evaluate(USUAL["kd"], x, *inputs[1:], backend="triton")


@pytest.mark.full
@pairwise(
    student_layout=[*LAYOUTS], teacher_layout=[*LAYOUTS], case=KERNEL_CASES, dtypes=DTYPE_PAIRS,
    regime=REGIMES,
)  # fmt: skip
def test_layouts(
    student_layout: str, teacher_layout: str, case: Case, dtypes: Dtypes, regime: str,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """Strides, and bases that are not aligned, of student and teacher alike or otherwise."""
    dense = make_inputs("normal", (2, 3), 37, dtypes, generator, ignored=0.1)
    views = []
    for layout, x in zip((student_layout, teacher_layout), dense[:2], strict=True):
        view, dim = LAYOUTS[layout](x)
        views.append(view.movedim(dim, -1))
    check_rows(case, *views, dense[2], generator, backend="triton", variants=one(regime))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("same", ["student", "teacher", "both"])
def test_layouts_of_one_type(layout: str, same: str, generator: torch.Generator) -> None:
    """Which alone may lie alike: one tensor of a layout beside a contiguous one, or both of it."""
    dense = make_inputs("normal", (2, 3), 37, F32, generator)
    views = []
    for name, x in zip(("student", "teacher"), dense[:2], strict=True):
        view, dim = LAYOUTS[layout if same in (name, "both") else "contiguous"](x)
        views.append(view.movedim(dim, -1))
    check_rows(SOME, *views, dense[2], generator, backend="triton", variants=one("as planned"))


@pytest.mark.full
@pytest.mark.parametrize("classes", [31, 32, 63, 64, 128])
@pytest.mark.parametrize("regime", REGIMES)
def test_rows_that_reach_into_one_more_block(
    regime: str, classes: int, generator: torch.Generator
) -> None:
    """Because they begin between two granules: blocks have 32 classes here, shares of a CTA 64."""
    student, teacher, target = make_inputs("normal", (1, 3), classes, BF16, generator)
    views = [LAYOUTS["unaligned"](x)[0] for x in (student, teacher)]
    check_rows(SOME, *views, target, generator, backend="triton", variants=one(regime))


@pytest.mark.full
@pytest.mark.parametrize("dim", [0, 1, -1])
@pytest.mark.parametrize("case", MAIN_KERNEL_CASES, ids=str)
def test_dim(case: Case, dim: int, generator: torch.Generator) -> None:
    student, teacher, target = make_inputs("normal", (2, 3, 2), 4, F32, generator)
    inputs = (*(x.movedim(-1, dim).contiguous() for x in (student, teacher)), target)
    check_rows(case, *inputs, generator, dim, backend="triton", variants=one("as planned"))


@pytest.mark.full
@pairwise(
    case=[x for x in WALKED if x.outputs == 1], how=REDUCTIONS, regime=REGIMES, classes=[10, 37],
    dtypes=DTYPE_PAIRS,
    kind=["normal", "masked"], ignored=[0.0, 0.2], weighted=[True, False],
)  # fmt: skip
def test_reductions(
    case: Case, how: Reduction, regime: str, classes: int, dtypes: Dtypes, kind: str,
    ignored: float, weighted: bool, generator: torch.Generator,
) -> None:  # fmt: skip
    inputs = make_inputs(kind, (2, 2), classes, dtypes, generator, ignored=ignored)
    check_reduction(case, how, inputs, generator, weighted, "triton", one(regime))


@pytest.mark.parametrize("classes", [5, 300])
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_no_rows(case: Case, classes: int, generator: torch.Generator) -> None:
    inputs = make_inputs("normal", 0, classes, torch.float32, generator)
    value, gradient = evaluate(case.rows, *inputs, backend="triton")
    assert value.numel() == 0 and gradient.shape == (0, classes)


# ---- the contracts --------------------------------------------------------------------------


@every_regime
@pytest.mark.parametrize("case", MAIN_KERNEL_CASES, ids=str)
def test_rows_that_do_not_count_are_not_read(
    case: Case, regime: str, generator: torch.Generator
) -> None:
    check = contracts.check_that_rows_that_do_not_count_are_not_read
    check(case, generator, "triton", one(regime))


@every_regime
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_nan_stays_in_its_row(case: Case, regime: str, generator: torch.Generator) -> None:
    contracts.check_that_nan_stays_in_its_row(case, generator, "triton", one(regime))


@pytest.mark.full
@pairwise(case=KERNEL_CASES, regime=REGIMES)
def test_nan_wins_over_infinities_and_weights_of_0(case: Case, regime: str) -> None:
    contracts.check_that_nan_wins(case, 9, "triton", one(regime), step=5)


@pytest.mark.full
@pairwise(
    case=[x for x in MAIN_CASES if x.teacher], temperature=contracts.LARGE_TEMPERATURES,
    regime=REGIMES, dtype=[F32, BF16],
)  # fmt: skip
def test_large_temperatures(
    case: Case, temperature: float, regime: str, dtype: torch.dtype, generator: torch.Generator
) -> None:
    check = contracts.check_large_temperatures
    check(case, temperature, 37, dtype, "triton", one(regime), generator)


@pytest.mark.full
@pairwise(case=KERNEL_CASES, gap=contracts.FAR, side=contracts.SIDES, regime=REGIMES)
def test_a_target_far_above(
    case: Case, gap: float, side: str, regime: str, generator: torch.Generator
) -> None:
    for _ in in_regime(regime):
        contracts.check_a_target_far_above(case, gap, side, "triton", generator)


@pytest.mark.full
@pairwise(case=KERNEL_CASES, pattern=[*PATTERNS], regime=REGIMES)
def test_infinite_logits(case: Case, pattern: str, regime: str, generator: torch.Generator) -> None:
    for _ in in_regime(regime):
        check_infinite_logits(case, pattern, 9, "triton", generator)


@pytest.mark.full
@pairwise(case=[SOME, USUAL["jsd"]], regime=REGIMES, sizes=[(5, 8, 10), (37, 37, 48), (70, 77, 70)])
def test_first_classes(
    case: Case, regime: str, sizes: tuple[int, int, int], generator: torch.Generator
) -> None:
    check_first_classes(case, sizes, F32, "triton", partial(in_regime, regime), generator)


@pytest.mark.full
@pairwise(loss=[*contracts.SHARE_OF], share=contracts.END_SHARES, regime=REGIMES)
def test_shares_near_the_ends(
    loss: str, share: float, regime: str, generator: torch.Generator
) -> None:
    variants = partial(in_regime, regime)
    contracts.check_shares_near_the_ends(loss, share, "triton", variants, generator)


@pytest.mark.full
@pairwise(case=PRECISE_CASES, regime=REGIMES, with_target=[True, False])
def test_digits_near_the_teacher(
    case: Case, regime: str, with_target: bool, generator: torch.Generator
) -> None:
    variants = partial(in_regime, regime)
    check_digits_near_the_teacher(case, 70, "triton", variants, with_target, generator)


@pytest.mark.full
@pairwise(regime=REGIMES, gap=[20.0, 60.0, 120.0, 200.0], temperature=[1.0, 3.0])
def test_saturated_targets(
    regime: str, gap: float, temperature: float, generator: torch.Generator
) -> None:
    for _ in in_regime(regime):
        contracts.check_saturated_target_of_dkd(gap, 40, "triton", generator)
        contracts.check_saturated_target_of_nkd(gap, temperature, 40, "triton", generator)


@pytest.mark.parametrize("ignore_index", [0, 3, 2**40])
def test_any_class_may_be_ignored(ignore_index: int, generator: torch.Generator) -> None:
    check = contracts.check_that_any_class_may_be_ignored
    check(ignore_index, 5, "triton", generator, one("as planned"))


@every_regime
def test_kd_without_a_target(regime: str, generator: torch.Generator) -> None:
    contracts.check_kd_without_a_target(F32, 40, "triton", generator, one(regime))


@pytest.mark.full
@every_regime
@pytest.mark.parametrize("bad", [-1, 70, 2**32 + 1])
def test_a_bad_target_makes_its_row_nan(bad: int, regime: str, generator: torch.Generator) -> None:
    for case in MAIN_KERNEL_CASES if regime == "as planned" else [SOME]:
        check = contracts.check_that_a_bad_target_makes_its_row_nan
        check(case, generator, "triton", one(regime), bad)


@every_regime
@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_same_bits_again_and_without_gradient(
    case: Case, regime: str, generator: torch.Generator
) -> None:
    inputs = make_inputs("normal", 3, 70, BF16, generator, ignored=0.2)
    for _ in in_regime(regime):
        first, second = (evaluate(case, *inputs, backend="triton") for _ in range(2))
        assert_same(first[0], second[0])
        assert_same(first[1], second[1])
        assert_same(case(*inputs, backend="triton"), first[0])


@pairwise(classes=[1, 7, 8, 9, 17, 40], offset=[0, 5, 8], regime=REGIMES)
def test_nothing_outside_the_gradient_is_written(
    classes: int, offset: int, regime: str, generator: torch.Generator
) -> None:
    """The gradient as the middle of a larger buffer, for every alignment of both ends."""
    student, teacher, target = make_inputs("normal", 3, classes, BF16, generator)
    buffer = torch.full((offset + student.numel() + 16,), 7.0, dtype=student.dtype)
    grad = buffer[offset : offset + student.numel()].view(student.shape)
    name, params = SOME.operator
    inputs = (student, teacher, target, None, as_params(*params), IGNORED)
    call = launch.Call.of(name, *inputs, grad)
    for _ in in_regime(regime):
        launch._run(call, student.new_empty(3, dtype=F32), None)
    assert (buffer[:offset] == 7).all() and (buffer[offset + student.numel() :] == 7).all()
    assert (grad != 7).all()


def test_scale_writes_nothing_at_one() -> None:
    scale_ = kdkernels.ops.TRITON.scale_
    gradient = torch.full((4099,), 2.0)
    scale_(gradient, torch.tensor(1.0))
    assert gradient.eq(2).all()
    scale_(gradient, torch.tensor(0.5))
    assert gradient.eq(1).all()


MALFORMED = [x for x in contracts.MALFORMED if x[1:2] != ("stats",)]


@pytest.mark.parametrize(("op", "argument", "value"), MALFORMED)
def test_operators_check_what_memory_safety_needs(op: object, argument: str, value: object) -> None:
    own = getattr(kdkernels.ops.TRITON, op._opname)
    contracts.check_refusal(own, op, argument, value, torch.float32)


def test_a_loss_of_several_outputs_is_not_reduced() -> None:
    student, _, target = make_inputs("normal", 3, 5)
    params = as_params(1.0)
    inputs = ("target_split", student, None, target, None, None, False, params, IGNORED, False)
    with pytest.raises(RuntimeError, match="'target_split' has several outputs"):
        kdkernels.ops.TRITON.reduced(*inputs)


@every_regime
@pytest.mark.parametrize("loss", [kdkernels.dkd_loss, kdkernels.aekt_loss])
def test_a_weight_of_0_wins_over_a_row_without_logits(loss: object, regime: str) -> None:
    for _ in in_regime(regime):
        check_a_weight_of_0(loss, 70, "triton")


@pytest.mark.full
@pytest.mark.parametrize("temperature", contracts.EXTREME_TEMPERATURES)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_extreme_temperatures_give_numbers(case: Case, temperature: float) -> None:
    check = contracts.check_that_extreme_temperatures_give_numbers
    check(case, temperature, 9, "triton", one("as planned"))


@pytest.mark.full
@pytest.mark.parametrize(
    "dtypes", [(torch.float32, torch.bfloat16), (torch.float64, torch.float16)]
)
def test_nothing_behind_the_logits_is_read(dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """A granule is that of the tensor that is read, not of one with smaller elements beside it.

    The last 16 bytes of a page, and behind it a page that must not be touched.
    """
    script = f"""
import ctypes, mmap, torch, kdkernels
memory = mmap.mmap(-1, 2 * mmap.PAGESIZE)
address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
mprotect = ctypes.CDLL(None).mprotect
mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
page = torch.frombuffer(memory, dtype={dtypes[0]})[: mmap.PAGESIZE // {dtypes[0].itemsize}]
for classes in range(1, 40):
    student = page[page.numel() - classes :].view(1, -1)
    teacher = torch.randn(1, classes).to({dtypes[1]})
    assert mprotect(address + mmap.PAGESIZE, mmap.PAGESIZE, 0) == 0
    kdkernels.kd_loss(student, teacher, backend="triton", reduction="none")
    assert mprotect(address + mmap.PAGESIZE, mmap.PAGESIZE, 3) == 0
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.full
@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name: str) -> None:
    check_operators(kdkernels.ops.TRITON, name, ["forward", "reduced", "backward", "scale_"])


def test_compiles_whole(generator: torch.Generator) -> None:
    student, teacher, target = make_inputs("normal", 4, 10, torch.float32, generator)

    def loss(student: torch.Tensor) -> torch.Tensor:
        return kdkernels.dkd_loss(student, teacher, target, backend="triton")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for x, y in zip(evaluate(loss_of(compiled), student, None, None),
                    evaluate(loss_of(loss), student, None, None), strict=True):  # fmt: skip
        assert_same(x, y)


def loss_of(function):
    return lambda student, teacher, target: function(student)


# ---- the planner ----------------------------------------------------------------------------

H200 = 132


@pytest.mark.parametrize(
    ("rows", "classes", "small", "wide", "expected"),
    [
        (4096, 100, True, False, ("resident", 128, 8)),
        (4096, 1000, True, False, ("resident", 1024, 1)),
        (4096, 16384, True, False, ("resident", 16384, 1)),
        (4096, 16384, False, False, ("sweeps", 8192, 1)),  # two temperatures, or float32
        (4096, 32000, True, False, ("sweeps", 8192, 1)),
        (4096, 128256, True, False, ("sweeps", 8192, 1)),
        (4096, 4096, False, True, ("sweeps", 1024, 1)),
        (8, 128256, True, False, ("split", 4096, 1)),
    ],
)
def test_the_planner_takes(
    rows: int, classes: int, small: bool, wide: bool, expected: tuple[str, int, int]
) -> None:
    chosen = plan(rows, classes, Device(H200), small=small, wide=wide)
    assert (chosen.regime, chosen.block, chosen.rows) == expected


def test_heavy_losses_keep_to_8_warps() -> None:
    for most in (1, 16):
        device = Device(H200, ctas=most)
        for rows, classes in product((3, 4096), (1000, 4096, 4097, 8192, 50264, 151936)):
            chosen = plan(rows, classes, device, small=False, wide=False, heavy=True)
            assert chosen.warps <= 8 and chosen.ctas == 1 and chosen.block <= 4096
            assert (chosen.regime == "resident") == (classes <= 4096)
            of_doubles = plan(rows, classes, device, small=False, wide=True, heavy=True)
            assert of_doubles == plan(rows, classes, device, small=False, wide=True)


@pytest.mark.parametrize(
    ("classes", "small", "most", "expected"),
    [
        (16384, True, 16, ("resident", 16384, 1, 16)),
        (16385, True, 16, ("resident", 32768, 4, 8)),
        (50264, True, 16, ("resident", 65536, 8, 8)),
        (128256, True, 16, ("resident", 131072, 16, 8)),
        (151936, True, 16, ("resident", 262144, 16, 16)),
        (262145, True, 16, ("sweeps", 8192, 1, 16)),
        (8193, False, 16, ("resident", 16384, 4, 8)),
        (65537, False, 16, ("resident", 131072, 16, 16)),
        (131073, False, 16, ("sweeps", 8192, 1, 16)),
        (128256, True, 8, ("resident", 131072, 8, 16)),
        (131073, True, 8, ("sweeps", 8192, 1, 16)),
        (50264, True, 1, ("sweeps", 8192, 1, 16)),
    ],
)
def test_the_planner_takes_clusters(
    classes: int, small: bool, most: int, expected: tuple[str, int, int, int]
) -> None:
    chosen = plan(4096, classes, Device(H200, ctas=most), small=small, wide=False)
    assert (chosen.regime, chosen.block, chosen.ctas, chosen.warps) == expected
    if chosen.ctas > 1:
        few = plan(3, classes, Device(H200, ctas=most), small=small, wide=False)
        assert few == replace(chosen, programs=3, rows=1)
    for rows in (3, 4096):
        plans = [plan(rows, classes, Device(H200, x), small=False, wide=True) for x in (1, most)]
        assert plans[0] == plans[1]


def test_which_devices_have_clusters() -> None:
    largest = partial(planner.largest_cluster, version="3.9.0", amd=False)
    assert [largest(x, H200) for x in (8, 9, 10, 11, 12)] == [1, 16, 16, 1, 1]
    assert [largest(9, x) for x in (78, 114, 127, 128)] == [8, 8, 8, 16]
    assert largest(9, 304, amd=True) == 1
    versions = ("3.6.0", "3.8.1", "3.9.0+git1", "3.10.0", "4.0.0")
    assert [largest(9, H200, version=x) for x in versions] == [1, 1, 16, 16, 16]


def test_only_clusters_are_compiled_with_ctas() -> None:
    assert "num_ctas" not in launch.options(16, amd=False)
    chosen = launch.options(8, 4, amd=False)
    assert (chosen["num_ctas"], chosen["maxnreg"]) == (4, 128)


@pytest.mark.parametrize("rows", [1, 2, 7, 131, 132, 133, 5000])
@pytest.mark.parametrize("window", [1, 15, 16, 17, 8192, 8193, 16384, 16385, 128263, 262151])
@pytest.mark.parametrize("wide", [False, True])
def test_every_plan_covers_every_class_once(rows: int, window: int, wide: bool) -> None:
    for small, ctas in product((True, False), (1, 8, 16)):
        chosen = plan(rows, window, Device(H200, ctas), small=small, wide=wide)
        if chosen.regime == "resident":
            assert window <= chosen.block and rows <= chosen.programs * chosen.rows
        if chosen.regime == "sweeps":
            assert 1 <= chosen.programs <= H200
        if chosen.regime == "split":
            covered = chosen.parts * chosen.part_chunks * chosen.block
            assert covered >= window > covered - chosen.part_chunks * chosen.block
            assert chosen.parts <= planner.MOST_PARTS
        back = planner.backward_plan(rows, window, wide=wide)
        assert back.parts * back.block >= window and back.programs * back.rows >= rows


# ---- what a loss is made of ------------------------------------------------------------------


# Every loss as planned, one of them in every regime.
@pytest.mark.parametrize(
    ("name", "regime"),
    [
        (name, regime)
        if name == SOME.loss and regime == REGIMES[0]
        else pytest.param(name, regime, marks=pytest.mark.full)
        for name in OPERATORS
        for regime in (REGIMES if name == SOME.loss else REGIMES[:1])
        if kdkernels.ops.LOSSES[name].parts
    ],
)
def test_parts(name: str, regime: str, generator: torch.Generator) -> None:
    contracts.check_parts(kdkernels.ops.TRITON, name, 70, (F32, F32), generator, one(regime))
    contracts.check_infinite_distillation(kdkernels.ops.TRITON, name, 70, one(regime))


@every_regime
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_label_smoothing_is_torchs(regime: str, dtype: torch.dtype) -> None:
    contracts.check_smoothing_is_torchs(kdkernels.ops.TRITON, 70, dtype, one(regime))
