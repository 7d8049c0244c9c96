"""The GPU backends on a CUDA device: the equivalence grid, and what only a device can show.

The truth is the reference in float64, computed on the CPU from the same inputs, and the tolerances
are those of the CPU kernels. As in test_equivalence.py the grids rotate through types and kinds of
logits instead of multiplying them. They are picked so that cases which differ in numbers alone
share a kernel: compiling is what takes time here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from cases import (
    CASES,
    DTYPES,
    IGNORED,
    LAYOUTS,
    MAIN_CASES,
    Case,
    assert_same,
    assert_within,
    evaluate,
    gradient_tolerance,
    loss_dtype,
    make_inputs,
    value_tolerance,
)
from test_equivalence import DTYPE_PAIRS, KINDS, divisor
from torch import Tensor

import kdkernels
from kdkernels.backend import _DEVICE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method"),  # torch's own
]

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DEVICE = "cuda"
BACKENDS = [
    name
    for name in ("cuda", "triton")
    if _DEVICE[name] == DEVICE and kdkernels.backends()[name].available
]
LOSSES = list(dict.fromkeys(case.loss for case in CASES))
ONE_NUMBER = [case for case in MAIN_CASES if case.outputs == 1]
KD, DKD, *_ = MAIN_CASES
SMALL = (1, 2, 3, 31, 32, 33, 100, 1000, 1003, 4099)
# The end of resident rows of 16-bit logits and one beyond it, and real vocabularies.
LARGE = (16384, 16385, 32000, 50257)
LARGEST = (128256, 151669)
SPLIT = (2, 20011)  # fewer rows than multiprocessors, longer than a program can hold


@pytest.fixture(
    params=BACKENDS or [pytest.param("none", marks=pytest.mark.skip("no GPU backend available"))]
)
def backend(request: pytest.FixtureRequest, record_property: Callable[..., None]) -> str:
    record_property("backend", request.param)  # gpu_check.py groups by it
    return request.param


def on_device(x: Tensor | None, device: str | torch.device | None = None) -> Tensor | None:
    """The tensor on the device with its very strides, and as far from an aligned address.

    Its memory ends with a whole granule of 16 bytes, as all that an allocator hands out does:
    kernels read granules whole, and a memory checker goes by the size that was asked for.
    """
    if x is None:
        return None
    whole = x.as_strided((x.untyped_storage().nbytes() // x.itemsize,), (1,), 0)
    padded = whole.new_empty(-(-whole.numel() // 8) * 8, device=device or DEVICE)
    whole = padded[: whole.numel()].copy_(whole)
    return whole.as_strided(x.shape, x.stride(), x.storage_offset())


def inputs_on_device(*arguments, **options) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(on_device(x) for x in make_inputs(*arguments, **options))


def calls_of(case: Case) -> list[Callable[..., Tensor]]:
    """Forward and backward, and both in one sweep."""
    return [case.rows] if case.outputs > 1 else [case.rows, case]


def assert_same_results(ours: tuple[Tensor, ...], theirs: tuple[Tensor, ...], what="") -> None:
    for x, y, name in zip(ours, theirs, ("value", "gradient"), strict=True):
        assert_same(x.cpu(), y.cpu(), f"{name} {what}")


def multiprocessors() -> int:
    return torch.cuda.get_device_properties(DEVICE).multi_processor_count


# ---- equivalence ----------------------------------------------------------------------------


def check(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None,
    generator: torch.Generator,
    backend: str,
    reduction: str = "none",
    normalizer: float | None = None,
) -> None:
    """Inputs are on the CPU and go to the device as they lie; random upstream and row weights."""
    dtype = loss_dtype(student, teacher if case.teacher else None)
    shape = student.shape[:-1]
    scalar = reduction != "none"
    outputs = () if case.outputs == 1 else (case.outputs,)
    upstream = torch.randn(() if scalar else outputs + shape, generator=generator).to(dtype)
    weight, common = torch.ones(shape), {}
    if case.outputs == 1:
        weight = common["row_weight"] = 0.1 + 2 * torch.rand(shape, generator=generator)
    call = case if scalar else case.rows
    per_row = weight.double()
    if scalar:
        common |= {"reduction": reduction, "normalizer": normalizer}
        counted = torch.zeros(shape, dtype=torch.long) if target is None else target
        per_row = per_row / divisor(reduction, counted, normalizer)

    exact = (student.double(), teacher.double(), target)
    rows, truth_gradient = evaluate(case.rows, *exact, upstream * per_row, backend="reference")
    inputs = (student, teacher, target)
    eager, eager_gradient = evaluate(call, *inputs, upstream, backend="reference", **common)
    truth = rows * per_row
    tolerance = per_row * value_tolerance(case, rows, student, teacher, dtype)
    allowed = gradient_tolerance(
        case, truth_gradient, student, teacher, target, upstream * per_row, dtype
    )
    if scalar:
        truth, tolerance = truth.sum(), tolerance.sum()
        # Rounded once in the sweep, and again when the upstream gradient has multiplied it.
        allowed += 0.51 * torch.finfo(student.dtype).eps * truth_gradient.abs()

    placed = [on_device(x) for x in inputs]
    if "row_weight" in common:
        common["row_weight"] = on_device(weight)
    ours, gradient = evaluate(call, *placed, on_device(upstream), backend=backend, **common)
    assert ours.device == gradient.device == placed[0].device
    assert ours.dtype == dtype and gradient.dtype == student.dtype
    assert gradient.stride() == torch.empty_like(placed[0]).stride()
    assert_within(ours.cpu(), truth, eager, tolerance, "value")
    assert_within(gradient.cpu(), truth_gradient, eager_gradient, allowed, "gradient")


@pytest.mark.parametrize("classes", SMALL)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_shapes(case: Case, classes: int, backend: str, generator: torch.Generator) -> None:
    dtypes = DTYPE_PAIRS[(3 * LOSSES.index(case.loss) + SMALL.index(classes)) % len(DTYPE_PAIRS)]
    for i, rows in enumerate((1, 7, 33)):
        kind = KINDS[(CASES.index(case) + SMALL.index(classes) + 3 * i) % len(KINDS)]
        inputs = make_inputs(kind, rows, classes, dtypes, generator, ignored=0.1 * (i % 2))
        check(case, *inputs, generator, backend)


@pytest.mark.parametrize(
    "classes", [*LARGE, *(pytest.param(n, marks=pytest.mark.slow) for n in LARGEST)]
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_large_vocabularies(
    case: Case, classes: int, backend: str, generator: torch.Generator
) -> None:
    step = 3 * LOSSES.index(case.loss) + (LARGE + LARGEST).index(classes)
    kind = KINDS[(CASES.index(case) + step) % len(KINDS)]
    inputs = make_inputs(kind, 2, classes, DTYPE_PAIRS[step % len(DTYPE_PAIRS)], generator)
    check(case, *inputs, generator, backend)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS, ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_dtypes(
    case: Case,
    dtypes: tuple[torch.dtype, torch.dtype],
    backend: str,
    generator: torch.Generator,
) -> None:
    for rows, classes in ((7, 100), SPLIT):
        inputs = make_inputs("masked", rows, classes, dtypes, generator, ignored=0.1)
        check(case, *inputs, generator, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_more_long_rows_than_multiprocessors(
    case: Case, dtype: torch.dtype, backend: str, generator: torch.Generator
) -> None:
    """Persistent programs: some take two rows."""
    inputs = make_inputs("normal", multiprocessors() + 3, 16411, dtype, generator, ignored=0.1)
    check(case, *inputs, generator, backend)


@pytest.mark.parametrize("kind", dict.fromkeys(KINDS))
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_kinds_of_logits(case: Case, kind: str, backend: str, generator: torch.Generator) -> None:
    for rows, classes in ((7, 100), SPLIT):
        inputs = make_inputs(kind, rows, classes, F32, generator, ignored=0.1)
        check(case, *inputs, generator, backend)


@pytest.mark.parametrize("teacher_layout", ["the same", "contiguous"])
@pytest.mark.parametrize("student_layout", LAYOUTS)
@pytest.mark.parametrize("classes", [37, 1003, 16391])
def test_layouts(
    student_layout: str,
    teacher_layout: str,
    classes: int,
    backend: str,
    generator: torch.Generator,
) -> None:
    if teacher_layout == "the same":
        teacher_layout = student_layout
    step = list(LAYOUTS).index(student_layout) + classes
    dtypes = (BF16, F32) if teacher_layout != student_layout else (BF16, BF16)
    dense = make_inputs("normal", (3, 6), classes, dtypes, generator, ignored=0.1)
    views = []
    for layout, x in zip((student_layout, teacher_layout), dense[:2], strict=True):
        view, dim = LAYOUTS[layout](x)
        views.append(view.movedim(dim, -1))
    check(MAIN_CASES[step % len(MAIN_CASES)], *views, dense[2], generator, backend)


@pytest.mark.parametrize(
    ("reduction", "normalizer"),
    [("mean", None), ("sum", None), ("batchmean", None), ("mean", 7.5), ("sum", 0.5)],
)
@pytest.mark.parametrize("case", ONE_NUMBER, ids=str)
def test_reductions(
    case: Case,
    reduction: str,
    normalizer: float | None,
    backend: str,
    generator: torch.Generator,
) -> None:
    for dtype in (F32, BF16, F16):
        for rows, classes in ((33, 100), SPLIT):
            inputs = make_inputs("normal", rows, classes, dtype, generator, ignored=0.2)
            check(case, *inputs, generator, backend, reduction, normalizer)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_no_target(reduction: str, backend: str, generator: torch.Generator) -> None:
    for rows, classes in ((33, 100), SPLIT):
        student, teacher, _ = make_inputs("normal", rows, classes, BF16, generator)
        check(KD, student, teacher, None, generator, backend, reduction)


@pytest.mark.parametrize("case", ONE_NUMBER, ids=str)
def test_a_normalizer_on_the_device(case: Case, backend: str) -> None:
    inputs = inputs_on_device("normal", 33, 100)
    number, tensor = (
        evaluate(case, *inputs, backend=backend, normalizer=x)
        for x in (4.0, torch.tensor(4.0, device=inputs[0].device))
    )
    assert_same_results(number, tensor)


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_no_rows(case: Case, backend: str) -> None:
    for call in calls_of(case):
        value, gradient = evaluate(call, *inputs_on_device("normal", 0, 100), backend=backend)
        assert not value.any() and gradient.shape == (0, 100)


@pytest.mark.parametrize("classes", [33, 1003, 16391])
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_accesses_stay_inside_the_tensors(
    case: Case, classes: int, backend: str, generator: torch.Generator
) -> None:
    """Odd shapes, rows at odd addresses. It takes compute-sanitizer to see a stray access, which
    runs this one test: gpu_check.py."""
    student, teacher, target = make_inputs("normal", 5, classes, BF16, generator, ignored=0.2)
    check(case, student, teacher, target, generator, backend)
    for layout in ("unaligned", "every_other_class"):
        views = [LAYOUTS[layout](x[None])[0] for x in (student, teacher)]
        check(case, *views, target[None], generator, backend)
    if case.outputs == 1:
        check(case, student, teacher, target, generator, backend, "mean")
    # Elements of two sizes have granules of two lengths; 16 bytes from where the larger ones begin.
    for wide, narrow in ((F32, BF16), (BF16, F32), (F64, F16)):
        inputs = make_inputs("normal", 5, classes, (wide, narrow), generator)
        moved = [torch.cat([x.new_zeros(16 // x.itemsize), x.flatten()]) for x in inputs[:2]]
        student, teacher = (
            x[16 // x.itemsize :].view_as(y) for x, y in zip(moved, inputs[:2], strict=True)
        )
        check(case, student, teacher, inputs[2], generator, backend)


def test_more_rows_than_some_dimensions_of_a_grid_take(backend: str) -> None:
    rows, classes = 65_537, 513
    student, teacher = (torch.randn(rows, classes, device=DEVICE, dtype=BF16) for _ in range(2))
    picked = [0, 1, rows - 2, rows - 1]
    few = [x[picked].cpu() for x in (student, teacher)]
    _, gradient = evaluate(KD.rows, student, teacher, None, backend=backend)
    _, truth = evaluate(KD.rows, few[0].double(), few[1].double(), None, backend="reference")
    torch.testing.assert_close(gradient[picked].double().cpu(), truth, rtol=1e-2, atol=1e-4)


# ---- what must not reach other rows -----------------------------------------------------------


# A mean over the rows that are not NaN is part of tf-NKD: a row that becomes NaN changes it.
INDEPENDENT = [case for case in MAIN_CASES if case.loss != "tf_nkd"]


@pytest.mark.parametrize("shape", [(33, 100), (5, 20011)], ids=str)
@pytest.mark.parametrize("case", INDEPENDENT, ids=str)
def test_a_target_out_of_range_makes_its_row_nan_and_changes_no_other(
    case: Case, shape: tuple[int, int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KDKERNELS_CHECK", raising=False)
    student, teacher, target = inputs_on_device("normal", *shape)
    value, gradient = evaluate(case.rows, student, teacher, target, backend=backend)
    others = torch.arange(shape[0], device=target.device) != 2
    for wrong in (shape[1], -1, 2**40, -(2**40)):
        bad = target.clone()
        bad[2] = wrong
        bad_value, bad_gradient = evaluate(case.rows, student, teacher, bad, backend=backend)
        assert bad_value[..., 2].isnan().all()
        assert_same_results(
            (bad_value[..., others], bad_gradient[others]), (value[..., others], gradient[others])
        )


def test_a_target_out_of_range_is_refused_when_asked_for(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KDKERNELS_CHECK", "1")
    student, teacher, target = inputs_on_device("normal", 5, 33)
    kdkernels.dkd_loss(student, teacher, target, backend=backend)
    target[2] = 33
    with pytest.raises(ValueError, match="target: got class 33; must be from 0 to 32"):
        kdkernels.dkd_loss(student, teacher, target, backend=backend)


@pytest.mark.parametrize("shape", [(33, 100), (5, 20011)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_ignored_rows_are_not_read(case: Case, shape: tuple[int, int], backend: str) -> None:
    student, teacher, target = inputs_on_device("normal", *shape, BF16, ignored=0.2)
    ignored = target == IGNORED
    assert ignored.any()
    for call in calls_of(case):
        clean = evaluate(call, student, teacher, target, backend=backend)
        assert clean[1].isfinite().all() and not clean[1][ignored].any()
        dirty = [x.masked_fill(ignored[:, None], math.nan) for x in (student, teacher)]
        assert_same_results(evaluate(call, *dirty, target, backend=backend), clean)


@pytest.mark.parametrize("case", ONE_NUMBER, ids=str)
def test_all_rows_ignored(case: Case, backend: str) -> None:
    student, teacher, target = inputs_on_device("normal", 7, 100)
    value, gradient = evaluate(case, student, teacher, torch.full_like(target, IGNORED),
                               backend=backend)  # fmt: skip
    assert value == 0 and not gradient.any()


# ---- the same bits ----------------------------------------------------------------------------


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_same_bits_every_time(case: Case, backend: str, generator: torch.Generator) -> None:
    for rows, classes in ((3000, 33), SPLIT, (multiprocessors() + 3, 16411)):
        inputs = inputs_on_device("normal", rows, classes, F32, generator, ignored=0.1)
        for call in calls_of(case):
            first = evaluate(call, *inputs, backend=backend)
            for _ in range(3):
                assert_same_results(evaluate(call, *inputs, backend=backend), first)


@pytest.mark.parametrize("case", ONE_NUMBER, ids=str)
def test_loss_without_gradient_is_the_same(case: Case, backend: str) -> None:
    for rows, classes in ((33, 100), SPLIT):
        inputs = inputs_on_device("normal", rows, classes)
        with_gradient, _ = evaluate(case, *inputs, backend=backend)
        assert_same(case(*inputs, backend=backend).cpu(), with_gradient.cpu())


# ---- streams, graphs, devices -----------------------------------------------------------------


@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_work_goes_to_the_current_stream(case: Case, backend: str) -> None:
    """The inputs arrive late on that stream: work on another one would read what was there."""
    inputs = inputs_on_device("normal", 33, 1003, ignored=0.2)
    for call in calls_of(case):
        expected = evaluate(call, *inputs, backend=backend)  # compiles, too
        late = [torch.zeros_like(x) for x in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
            for x, y in zip(late, inputs, strict=True):
                x.copy_(y)
            ours = evaluate(call, *late, backend=backend)
        stream.synchronize()
        assert_same_results(ours, expected)


@pytest.mark.parametrize("shape", [(33, 1003), SPLIT], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_a_captured_graph_replays_with_new_inputs(
    case: Case, shape: tuple[int, int], backend: str, generator: torch.Generator
) -> None:
    for call in calls_of(case):
        static = inputs_on_device("normal", *shape, BF16, generator)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            evaluate(call, *static, backend=backend)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = evaluate(call, *static, backend=backend)
        for ignored in (0.0, 0.3):  # the number of rows that count in the mean changes
            new = inputs_on_device("offset", *shape, BF16, generator, ignored=ignored)
            for x, y in zip(static, new, strict=True):
                x.copy_(y)
            graph.replay()
            torch.cuda.synchronize()
            assert_same_results(captured, evaluate(call, *new, backend=backend), f"{ignored}")


@contextmanager
def no_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_synchronisation_would_be_seen() -> None:
    x = torch.ones((), device=DEVICE)
    with no_sync(), pytest.raises(RuntimeError, match="synchroniz"):
        x.item()


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_no_call_waits_for_the_device(
    case: Case, dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("KDKERNELS_CHECK", raising=False)
    student, teacher, target = inputs_on_device("normal", 33, 100, dtype, ignored=0.2)
    targets = [target, None] if case is KD else [target]
    reductions = [{"reduction": x} for x in ("mean", "sum")] if case.outputs == 1 else []
    for y in targets:
        for call, common in [(case.rows, {}), *((case, x) for x in reductions)]:
            evaluate(call, student, teacher, y, backend=backend, **common)  # compiles
            with no_sync():
                evaluate(call, student, teacher, y, backend=backend, **common)


@pytest.mark.parametrize("pinned", [False, True])
def test_numbers_on_the_host_do_not_wait_for_the_device(backend: str, pinned: bool) -> None:
    student, teacher, target = inputs_on_device("normal", 33, 100)
    number = torch.tensor(7.0)
    number = number.pin_memory() if pinned else number

    def loss(student: Tensor, teacher: Tensor, target: Tensor, **common) -> Tensor:
        return kdkernels.kd_loss(student, teacher, target, normalizer=number, **common)

    expected = evaluate(loss, student, teacher, target, backend=backend)
    with no_sync():
        torch.cuda._sleep(100_000_000)  # cycles, some 50 ms
        ours = evaluate(loss, student, teacher, target, backend=backend)
        number.fill_(1.0)  # too late to change anything
    assert_same_results(ours, expected)


def test_numbers_on_the_device_of_logits_on_the_host_arrive_first() -> None:
    student, teacher, target = make_inputs("normal", 33, 100)
    expected = kdkernels.kd_loss(student, teacher, target, normalizer=7.0)
    torch.cuda._sleep(100_000_000)
    number = torch.full((), 7.0, device=DEVICE)
    torch.testing.assert_close(
        kdkernels.kd_loss(student, teacher, target, normalizer=number), expected
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device")
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_tensors_of_a_device_that_is_not_the_current_one(case: Case, backend: str) -> None:
    inputs = make_inputs("normal", 33, 100, ignored=0.2)
    for call in calls_of(case):
        first, second = (
            evaluate(call, *(on_device(x, device) for x in inputs), backend=backend)
            for device in ("cuda:0", "cuda:1")
        )
        assert second[0].device == second[1].device == torch.device("cuda:1")
        assert torch.cuda.current_device() == 0
        for x, y in zip(first, second, strict=True):  # the two may be of different kinds
            torch.testing.assert_close(x.cpu(), y.cpu(), rtol=1e-5, atol=1e-6)


# ---- torch.compile ----------------------------------------------------------------------------


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


# ---- memory -----------------------------------------------------------------------------------


def peak_of(call: Callable[[], object]) -> int:
    """Largest number of bytes asked for at once beyond those held before.

    Not `max_memory_allocated`: the allocator may hand out a block that is up to 1 MiB larger.
    """
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    result = call()
    torch.cuda.synchronize()
    del result
    return torch.cuda.memory_stats()["requested_bytes.all.peak"] - before


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(4000, 1003), (8, 151669)], ids=str)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_peak_memory_is_the_gradient(
    case: Case, shape: tuple[int, int], dtype: torch.dtype, backend: str
) -> None:
    rows, classes = shape
    inputs = (
        *(torch.randn(shape, device=DEVICE).to(dtype) for _ in range(2)),
        torch.randint(classes, (rows,), device=DEVICE),
    )
    gradient, slack = inputs[0].nbytes, 256 * rows + (64 << 10)
    assert slack < gradient / 4, "the bound would notice a copy of the logits"
    for call in calls_of(case):
        evaluate(call, *inputs, backend=backend)  # what is loaded once
        peak = peak_of(lambda call=call: evaluate(call, *inputs, backend=backend))
        assert gradient <= peak <= gradient + slack
        loss = peak_of(lambda call=call: call(*inputs, backend=backend))
        assert loss <= slack, "the loss alone holds no gradient"


@pytest.mark.parametrize("case", [KD, DKD], ids=str)
def test_more_elements_than_32_bits_can_count(
    case: Case, backend: str, rows: int = 70_000, classes: int = 32_000
) -> None:
    """Rows before, across and after the 2^31st element, and the last one, against the reference."""
    needed = 3 * 2 * rows * classes + (1 << 30)  # student, teacher, gradient in bfloat16
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < needed:
        pytest.skip(f"needs {needed / 2**30:.0f} GiB of free device memory")
    check_sampled_rows(case, backend, rows, classes)


def check_sampled_rows(case: Case, backend: str, rows: int, classes: int) -> None:
    across = min(2**31 // classes, rows - 1)
    picked = sorted({0, across - 1, across, min(across + 1, rows - 1), rows - 2, rows - 1})
    generator = torch.Generator(DEVICE).manual_seed(0)
    student, teacher = (
        torch.empty((rows, classes), dtype=BF16, device=DEVICE).normal_(0, 3, generator=generator)
        for _ in range(2)
    )
    target = torch.randint(classes, (rows,), device=DEVICE, generator=generator)
    upstream = torch.randn(rows, device=DEVICE, generator=generator)
    few = [x[picked].cpu() for x in (student, teacher, target)]
    for call in calls_of(case):
        scalar = call is case
        common = {"reduction": "sum"} if scalar else {}
        given = upstream.new_ones(()) if scalar else upstream
        value, gradient = evaluate(call, student, teacher, target, given, backend=backend, **common)
        chosen = torch.ones(len(picked)) if scalar else upstream[picked].cpu()
        exact = (few[0].double(), few[1].double(), few[2])
        truth, truth_gradient = evaluate(case.rows, *exact, chosen, backend="reference")
        eager, eager_gradient = evaluate(case.rows, *few, chosen, backend="reference")
        if not scalar:
            allowed = value_tolerance(case, truth, *few[:2], F32)
            assert_within(value[picked].cpu(), truth, eager, allowed, "value")
        assert value.isfinite().all()
        allowed = gradient_tolerance(case, truth_gradient, *few, chosen, F32)
        allowed += 0.51 * torch.finfo(BF16).eps * truth_gradient.abs()
        ours = gradient[picked].cpu()
        assert_within(ours, truth_gradient, eager_gradient, allowed, "gradient")
        del gradient
