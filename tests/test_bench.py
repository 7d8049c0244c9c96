"""The benchmark's harness on the CPU: cases, byte model, measuring, files, plots and pages.

No test asserts a time. Times that are compared come from a clock that the test made.
"""

import argparse
import csv
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cases import needs_cpu
from grid import pairwise
from torch import Tensor

from bench import __main__ as command
from bench import cases, eager, measure, providers, report, run
from bench.cases import DIRECTIONS, LOSSES, Case

F64 = torch.float64


def inputs_of(rows: int, classes: int, generator: torch.Generator) -> tuple[Tensor, ...]:
    student, teacher = (
        2 * torch.randn(rows, classes, generator=generator, dtype=F64) for _ in range(2)
    )
    return student.requires_grad_(), teacher, torch.randint(classes, (rows,), generator=generator)


def runner_of(*names: str, machine: measure.Machine | None = None, **options) -> run.Runner:
    options = {"seconds": 1e-3, "sets": 2} | options
    return run.Runner(machine or measure.Cpu(), names or providers.NAMES, **options)


# -------------------------------------------------------------------------------------- byte model
@pytest.mark.parametrize(
    ("loss", "forward", "backward", "both", "exponentials"),
    [
        # Read student and teacher; the same and write the gradient.
        ("kd", 2, 3, 3, 2),
        ("kd_ce", 2, 3, 3, 3),  # the student's at temperature 1, too
        ("kd_two_t", 2, 3, 3, 2),
        ("dkd", 2, 3, 3, 2),
        ("nkd", 2, 3, 3, 2),
        ("aekt", 2, 3, 3, 2),
        ("tf_nkd", 1, 2, 2, 1),  # no teacher
        ("ce", 1, 2, 2, 1),
        ("reverse_kl", 2, 3, 3, 2),
        ("mixed_kl", 2, 3, 3, 2),
        ("tvd", 2, 3, 3, 2),
        ("skew_kl", 2, 3, 3, 3),  # two exponentials and the logarithm of the mixture
        ("skew_reverse_kl", 2, 3, 3, 3),
        ("jsd", 2, 3, 3, 3),
        ("ab", 2, 3, 3, 6),  # two for the sums; p, a power of it and two of its ratio to q
    ],
)
def test_what_a_loss_must_move_and_compute(
    loss: str, forward: int, backward: int, both: int, exponentials: int
) -> None:
    rows, classes = 7, 50
    targets = 8 * rows if LOSSES[loss].target else 0
    for direction, passes in zip(DIRECTIONS, (forward, backward, both), strict=True):
        case = Case(loss, rows, classes, "bfloat16", direction=direction)
        assert case.bytes == passes * rows * classes * 2 + targets
        assert replace(case, dtype="float64").bytes == passes * rows * classes * 8 + targets
        assert case.exponentials == exponentials * rows * classes


# ------------------------------------------------------------------------------------------- cases
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [False, True])
def test_cases_of_a_device(device: str, quick: bool) -> None:
    chosen = cases.choose(device, quick=quick)
    assert len({replace(case, providers=None) for case in chosen}) == len(chosen)
    if quick:
        assert len(chosen) <= 9
        return
    assert {case.loss for case in chosen} == set(LOSSES)
    assert {case.direction for case in chosen} == set(DIRECTIONS)
    for case in chosen:
        assert "eager" in providers.of(case, device)


def test_flags_choose_cases() -> None:
    only = cases.choose("cpu", losses=["nkd"])
    assert only == [case for case in cases.choose("cpu") if case.loss == "nkd"]
    product = cases.choose(
        "cuda",
        losses=["kd", "jsd"],
        shapes=[(3, 5, "dense"), (7, 11, "sliced")],
        dtypes=["float16"],
        directions=["forward", "both"],
    )
    assert product == [
        Case(loss, rows, classes, "float16", layout, direction)
        for rows, classes, layout in [(3, 5, "dense"), (7, 11, "sliced")]
        for loss in ("kd", "jsd")
        for direction in ("forward", "both")
    ]


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_ignored_rows_are_neither_read_nor_computed(direction: str) -> None:
    case = Case("kd", 10, 7, "float16", direction=direction, ignored=30)
    reads, writes = 2 * 7 * 10 * 7 // 10 * 2, 10 * 7 * 2
    assert case.counted == 7 and case.exponentials == 2 * 7 * 7
    assert case.bytes == reads + (writes if direction != "forward" else 0) + 8 * 10
    target = measure.Inputs.draw(case, 1, 0, "cpu").targets[0]
    assert (target == cases.IGNORED).sum() == 3 and "30 % ignored" in str(case)


def test_layouts_lie_as_their_names_say() -> None:
    strides = {}
    for layout in cases.LAYOUTS:
        inputs = measure.Inputs.draw(Case("kd", 6, 10, layout=layout), 1, 0, "cpu")
        assert inputs.students[0].shape == inputs.teachers[0].shape == (6, 10)
        assert inputs.students[0].requires_grad and not inputs.teachers[0].requires_grad
        strides[layout] = inputs.students[0].stride()
    assert strides == {"dense": (10, 1), "sliced": (11, 1), "classes-first": (1, 6)}


def test_input_sets_differ_and_a_seed_repeats_them() -> None:
    case = Case("kd", 4, 8)
    a, b = (measure.Inputs.draw(case, 2, 3, "cpu") for _ in range(2))
    assert torch.equal(a.students[1], b.students[1])
    assert not torch.equal(a.students[0], a.students[1])
    assert not torch.equal(a.students[0], a.teachers[0])


@pytest.mark.parametrize("rows", [1, 10, 1000])
def test_students_alone_exceed_the_cache(rows: int) -> None:
    case, cache = Case("kd", rows, 100), 30_000
    assert measure.sets_beyond_cache(case, cache) * case.tensor_bytes >= 4 * cache
    assert (measure.sets_beyond_cache(case, cache) - 1) * case.tensor_bytes < 4 * cache


# ------------------------------------------------------------------------------ truth and baselines
@pytest.mark.parametrize("loss", LOSSES)
def test_truth_is_what_is_published(
    loss: str, generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in chunks: the mean over all rows, the gradient of some."""
    rows, classes = 70, 9
    student, teacher, target = inputs_of(rows, classes, generator)
    value = LOSSES[loss].eager(student, teacher, target)
    (gradient,) = torch.autograd.grad(value, student)
    for some in (1, 13, 200):
        monkeypatch.setattr(cases, "CHUNK", some * classes + 1)
        mean, partial, checked = cases.truth(loss, student.detach(), teacher, target)
        assert len(set(checked)) == min(some, rows)
        assert checked[-1] == (0 if some == 1 else rows - 1)
        torch.testing.assert_close(mean, value.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(partial, gradient[checked], rtol=1e-8, atol=1e-12)


def test_truth_leaves_ignored_rows_out(generator: torch.Generator) -> None:
    student, teacher, target = inputs_of(30, 9, generator)
    target[[3, 4, 20]] = cases.IGNORED
    counted = target != cases.IGNORED
    for loss in ("kd", "nkd", "tf_nkd", "jsd"):
        value = LOSSES[loss].eager(student[counted], teacher[counted], target[counted])
        (gradient,) = torch.autograd.grad(value, student)
        mean, partial, checked = cases.truth(loss, student.detach(), teacher, target)
        assert sorted(checked) == list(range(30))
        torch.testing.assert_close(mean, value.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(partial, gradient[checked], rtol=1e-8, atol=1e-12)


def test_eager_jsd_is_the_definition(generator: torch.Generator) -> None:
    student, teacher, target = inputs_of(6, 11, generator)
    for beta in (0.5, 0.1):
        p, q = student.softmax(1), teacher.softmax(1)
        m = beta * q + (1 - beta) * p
        rows = beta * (q * (q / m).log()).sum(1) + (1 - beta) * (p * (p / m).log()).sum(1)
        value = eager.jsd(student, teacher, target, beta)
        torch.testing.assert_close(value, rows.mean())
        ours, true = (torch.autograd.grad(x, student)[0] for x in (value, rows.mean()))
        torch.testing.assert_close(ours, true)


def test_errors_see_a_wrong_loss_and_a_wrong_gradient() -> None:
    gradient = torch.tensor([[1.0, -4.0], [2.0, 0.5], [0.0, 1.0]], dtype=F64)
    truth = (torch.tensor(3.0, dtype=F64), gradient[[0, 2]], [0, 2])
    right = measure.gradient_errors((torch.tensor(3.0), gradient.float()), truth)
    assert right == {"loss_error": 0.0, "grad_error": 0.0}
    wrong = gradient.clone()
    wrong[2, 0] += 1
    assert measure.gradient_errors((torch.tensor(2.5), wrong), truth) == {
        "loss_error": 0.5,
        "grad_error": 0.25,
    }
    assert measure.gradient_errors((torch.tensor(3.0), None), truth) == {"loss_error": 0.0}


# --------------------------------------------------------------------------------------- measuring
class Nothing:
    """A call."""

    def prepare(self, index: int) -> int:
        return index

    def run(self, index: int) -> None: ...


def test_rounds_interleave_calls_and_rotate_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    now, order, taken = [0.0], [], []
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    calls = {"fast": Nothing(), "slow": Nothing()}
    names = {id(call): name for name, call in calls.items()}

    def clock(call: Nothing, index: int) -> float:
        taken.append(index)
        name = names[id(call)]
        order.append(name)
        seconds = 0.01 if name == "fast" else 0.2
        now[0] += seconds
        return seconds

    timings = measure.time_interleaved(
        calls,
        clock=clock,
        sets=3,
        seconds=1.0,
        min_rounds=2,
        min_slow=50,
        max_rounds=50,
        share=0.04,
    )
    rounds = len(timings["slow"].seconds)
    # The first round is of one call each; then the fast one is repeated to fill its share.
    assert len(timings["fast"].seconds) == 1 + 4 * (rounds - 1)
    assert order[:2] == ["fast", "slow"] and order[2:4] == ["slow", "fast"]
    assert 1.0 <= now[0] <= 1.3
    # No set comes again before all others, whoever takes it.
    assert taken == [(i + 1) % 3 for i in range(len(taken))]
    assert timings["fast"].median == 0.01


def test_a_slow_call_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    calls = {"fast": Nothing(), "slow": Nothing()}

    def clock(call: Nothing, _: int) -> float:
        seconds = 0.01 if call is calls["fast"] else 0.6
        now[0] += seconds
        return seconds

    timings = measure.time_interleaved(calls, clock=clock, seconds=4.0, max_calls=1)
    assert len(timings["slow"].seconds) == 4, "three rounds, and until it has its two seconds"
    assert len(timings["fast"].seconds) >= 150


def test_rounds_have_a_least_and_a_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure.time, "perf_counter", itertools.count(0, 100).__next__)
    call = Nothing()
    for seconds, least, most, expected in ((1, 4, 50, 4), (1e9, 1, 6, 6)):
        timings = measure.time_interleaved(
            {"x": call},
            clock=lambda call, index: 1.0,
            seconds=seconds,
            min_rounds=least,
            max_rounds=most,
            min_slow=most,
        )
        assert len(timings["x"].seconds) == expected


def test_summary_of_times() -> None:
    timing = measure.Timing([0.004, 0.001, 0.002, 0.003, 0.005])
    summary = timing.summary()
    assert summary == {"ms": 3.0, "ms_p20": 2.0, "ms_p80": 5.0, "ms_min": 1.0, "calls": 5}


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_is_timed_is_the_direction(direction: str) -> None:
    """A forward has no graph, a backward no forward."""
    done = []

    def loss(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
        done.append("graph" if torch.is_grad_enabled() else "no graph")
        return (student * teacher).sum()

    inputs = measure.Inputs.draw(Case("kd", 3, 4), 1, 0, "cpu")
    call = measure.LossCall(loss, inputs, direction)
    state = call.prepare(0)
    before = list(done)
    value, gradient = call.run(state)
    assert (before, done) == {
        "forward": ([], ["no graph"]),
        "backward": (["graph"], ["graph"]),
        "both": ([], ["graph"]),
    }[direction]
    expected = (inputs.students[0].detach() * inputs.teachers[0]).sum()
    assert torch.equal(value.detach(), expected)
    if direction == "forward":
        assert gradient is None
    else:
        assert torch.equal(gradient, inputs.teachers[0])


@pytest.mark.parametrize("loss", [x for x in LOSSES if LOSSES[x].plain])
def test_plain_formulas_are_the_published_ones(loss: str, generator: torch.Generator) -> None:
    student, teacher, target = inputs_of(30, 9, generator)
    values = [x(student, teacher, target) for x in (LOSSES[loss].plain, LOSSES[loss].eager)]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    gradients = [torch.autograd.grad(x, student)[0] for x in values]
    torch.testing.assert_close(*gradients, rtol=1e-8, atol=1e-12)


def test_a_baseline_is_the_formula_that_it_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile of each is of that one; a loss without a plain formula has neither."""
    spec = LOSSES["kd"]
    monkeypatch.setattr(torch, "compile", lambda formula, dynamic: (formula, "compiled"))
    built = {name: providers.build(name, Case("kd", 1, 1)) for name in providers.BASELINES}
    assert built == {
        "eager": spec.eager,
        "plain": spec.plain,
        "compile": (spec.eager, "compiled"),
        "plain_compile": (spec.plain, "compiled"),
    }
    assert providers.of(Case("tf_nkd", 1, 1), "cpu") == ["cpu", "eager", "compile"]


@pytest.mark.parametrize("layout", cases.LAYOUTS)
@pytest.mark.parametrize("rows", [1, 9])
@pytest.mark.parametrize(
    ("loss", "direction", "passes"),
    [("kd", "both", 3), ("kd", "forward", 2), ("ce", "both", 2), ("ce", "forward", 1)],
)
def test_the_copy_moves_as_much_as_the_case(
    loss: str, direction: str, passes: int, rows: int, layout: str
) -> None:
    """Of dense memory, however the logits lie, by the same operator whatever their dtype."""
    for dtype in ("float32", "bfloat16", "float64"):
        case = Case(loss, rows, 8, dtype, layout, direction)
        inputs = measure.Inputs.draw(case, 2, 0, "cpu")
        copy = measure.CopyCall(case, inputs)
        copy.run(copy.prepare(1))
        size = cases.DTYPES[dtype].itemsize
        assert copy.bytes == case.logit_bytes == passes * rows * 8 * size
        assert inputs.stores[1][0].data_ptr() == inputs.students[1].data_ptr()
        whole = inputs.stores[1][0].nbytes // 4 * 4 // size
        student, teacher = (x[:whole].view(torch.int32) for x in inputs.stores[1])
        expected = student + teacher if passes == 3 else student
        assert torch.equal(copy.out, expected[: copy.out.numel()])


def test_rows_of_a_shape_share_one_copy() -> None:
    """Of as many bytes by as many streams, whatever the dtype; the median of those of the run."""
    shapes = [(8, 64, "float32"), (16, 64, "bfloat16"), (4, 64, "float64")]
    some = [Case("kd", *x) for x in shapes]  # 3 x 2048 bytes
    others = [Case("ce", 12, 64), Case("kd", 9, 64)]  # as many bytes in 2 streams; more bytes
    records = []
    for case, ms in zip([*some, *others], (1.0, 9.0, 2.0, 4.0, 7.0), strict=True):
        for name, seconds in (("copy", ms), ("cpu", 4.0)):
            rate = case.logit_bytes / seconds
            facts = {**run.facts_of(case), "provider": name, "ms": seconds, "gb_per_s": rate}
            records.append(facts)
        records.append(run.without_result(case, "eager", "no luck"))
    run.pool_copies(records)
    shares = [x["share_of_copy"] for x in records if x["provider"] == "cpu"]
    assert shares == pytest.approx([0.5, 0.5, 0.5, 1.0, 7 / 4])
    copies = [x["share_of_copy"] for x in records if x["provider"] == "copy"]
    assert copies == pytest.approx([2.0, 2 / 9, 1.0, 1.0, 1.0])
    assert all("share_of_copy" not in x for x in records if x["provider"] == "eager")


@needs_cpu
@pytest.mark.full
@pairwise(loss=[*LOSSES], direction=DIRECTIONS, dtype=["float32", "bfloat16"])
def test_a_record_for_each_provider(loss: str, direction: str, dtype: str) -> None:
    case = Case(loss, 40, 301, dtype, direction=direction)
    records = {
        record["provider"]: record
        for record in runner_of(*(set(providers.NAMES) - set(providers.COMPILED))).measure(case)
    }
    peers = {name for name, peer in providers.PEERS.items() if loss in peer.losses}
    plain = {"plain"} if LOSSES[loss].plain else set()
    assert set(records) == {"copy", "cpu", "eager"} | plain | peers
    for name, record in records.items():
        assert run.case_of(record) == case
        if "missing" in record:
            assert name in peers
            assert record["missing"]
            continue
        assert record["ms_min"] <= record["ms_p20"] <= record["ms"] <= record["ms_p80"]
        assert record["gb_per_s"] == pytest.approx(record["bytes"] / record["ms"] / 1e6)
        if name == "copy":
            assert record["share_of_copy"] == 1
            continue
        share = record["gb_per_s"] / records["copy"]["gb_per_s"]
        assert record["share_of_copy"] == pytest.approx(share)
        assert record["bytes"] == case.bytes
        assert record["exponentials_per_s"] == pytest.approx(case.exponentials / record["ms"] * 1e3)
        assert record["loss_error"] < (2e-4 if dtype == "float32" else 2e-3)
        assert ("grad_error" in record) == (direction != "forward")
        assert record.get("grad_error", 0) < (1e-5 if dtype == "float32" else 1e-2)
        gradient = case.tensor_bytes if direction != "forward" else 0
        if name == "cpu":
            assert record["regime"]
            assert gradient <= record["peak_bytes"] <= gradient + 256 * case.rows + (64 << 10)


@pytest.mark.full
@needs_cpu
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("loss", ["kd", "dkd", "tf_nkd"])
def test_providers_ignore_the_same_rows(loss: str, direction: str) -> None:
    case = Case(loss, 40, 31, direction=direction, ignored=60)
    records = {x["provider"]: x for x in runner_of("cpu", "eager").measure(case)}
    assert run.case_of(records["cpu"]) == case
    for name in ("cpu", "eager"):
        assert records[name]["bytes"] == case.bytes
        assert records[name]["loss_error"] < 1e-5
        assert records[name].get("grad_error", 0) < 1e-5
    assert abs(records["copy"]["bytes"] - case.logit_bytes) < 3 * 4


@needs_cpu
@pytest.mark.full
def test_compiled_baselines_run() -> None:
    records = runner_of("cpu", *providers.COMPILED).measure(Case("dkd", 16, 40))
    assert [x["provider"] for x in records] == ["copy", "cpu", "compile", "plain_compile"]
    assert all("ms" in x for x in records)


@needs_cpu
def test_the_backward_has_work_of_its_own() -> None:
    """With a mean the forward would have written the gradient."""
    case = Case("dkd", 8, 30, direction="backward")
    inputs = measure.Inputs.draw(case, 1, 0, "cpu")
    call = measure.LossCall(providers.build("cpu", case), inputs, "backward")
    state = call.prepare(0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call.run(state)
    assert any(event.key == "kdkernels::backward" for event in profile.key_averages())


@needs_cpu
def test_a_provider_that_fails_is_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*inputs: Tensor) -> Tensor:
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setitem(LOSSES, "kd", replace(LOSSES["kd"], eager=broken))
    records = {x["provider"]: x for x in runner_of("cpu", "eager").measure(Case("kd", 4, 9))}
    assert records["eager"]["missing"] == "RuntimeError: no such luck"
    assert "ms" in records["cpu"] and "ms" in records["copy"]


@needs_cpu
def test_a_timing_that_fails_is_said_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*calls: object, **options: object) -> None:
        raise torch.OutOfMemoryError("too much together")

    monkeypatch.setattr(run, "time_interleaved", broken)
    records = runner_of("cpu", "eager").measure(Case("kd", 4, 9))
    assert [x["provider"] for x in records] == ["cpu", "eager"]
    assert all(x["missing"] == "OutOfMemoryError: too much together" for x in records)


@needs_cpu
def test_a_wrong_provider_shows_in_its_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("nkd", 8, 20)
    wrong = replace(LOSSES["nkd"], eager=lambda *inputs: 1.5 * eager.nkd(*inputs))
    monkeypatch.setitem(LOSSES, "nkd", wrong)
    records = {x["provider"]: x for x in runner_of("cpu", "eager").measure(case)}
    assert records["eager"]["grad_error"] == pytest.approx(0.5, rel=1e-3)
    assert records["cpu"]["grad_error"] < 1e-5


class SmallMachine(measure.Cpu):
    def __init__(self, free: int) -> None:
        super().__init__()
        self.free = free

    @property
    def free_memory(self) -> int:
        return self.free

    @free_memory.setter
    def free_memory(self, value: int) -> None:
        self.free = value


@needs_cpu
def test_what_does_not_fit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case("kd", 100, 1000)
    monkeypatch.setattr(cases, "CHUNK", 10)
    enough = 2 * case.memory(1, fused=False)
    for free, ran in ((enough, {"cpu", "eager"}), (2 * case.memory(1, fused=True), {"cpu"})):
        runner = runner_of("cpu", "eager", machine=SmallMachine(free), sets=1)
        records = {x["provider"]: x for x in runner.measure(case)}
        assert {x for x in ("cpu", "eager") if "ms" in records[x]} == ran
        for name in {"cpu", "eager"} - ran:
            assert "GiB" in records[name]["missing"]
    nothing = runner_of("cpu", "eager", machine=SmallMachine(1000)).measure(case)
    assert ["missing" in x for x in nothing] == [True, True]


@needs_cpu
def test_inputs_are_drawn_once_for_cases_that_share_them(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    draw = measure.Inputs.draw
    monkeypatch.setattr(
        measure.Inputs, "draw", staticmethod(lambda *x: drawn.append(x[0].inputs) or draw(*x))
    )
    runner = runner_of("cpu")
    some = [Case("kd", 4, 9), Case("dkd", 4, 9), Case("dkd", 4, 9, "bfloat16"), Case("kd", 4, 9)]
    for case in some:
        runner.measure(case)
    assert drawn == [some[0].inputs, some[2].inputs, some[0].inputs]


@needs_cpu
def test_nothing_begins_after_the_budget() -> None:
    some = [Case("kd", 4, 9), Case("nkd", 4, 9)]
    records = list(itertools.chain(*run.run(runner_of("cpu", "eager"), some, budget=0)))
    assert [x["provider"] for x in records] == ["cpu", "eager"] * 2
    assert all("budget of 0 s" in x["missing"] for x in records)
    assert all("ms" in x for x in itertools.chain(*run.run(runner_of("cpu"), some, budget=1e9)))


def test_missing_backends_and_losses_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    state = SimpleNamespace(available=False, reason="no compiler")
    monkeypatch.setattr(providers.kdkernels, "backends", lambda: {"cpu": state})
    assert providers.missing("cpu", Case("kd", 1, 1), "cpu") == "no compiler"
    assert providers.missing("eager", Case("jsd", 1, 1), "cpu") is None
    assert providers.of(Case("ce", 1, 1), "cuda")[:4] == ["cuda", "triton", "eager", "compile"]
    assert providers.of(Case("ce", 1, 1, providers=("eager",)), "cuda") == ["eager"]


# ------------------------------------------------------------------------------- a GPU, as imagined
class FakeGpu:
    """Stands for torch.cuda: a device that takes a second for a call, and notes what it is asked.

    What a test here cannot show is that the real one answers like it: test_a_run_on_a_gpu does.
    """

    def __init__(self) -> None:
        self.done: list[str] = []
        self.now = 0.0
        self.lost = False

    def Event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(at=None)

        def record() -> None:
            self.done.append("event")
            event.at = self.now

        event.record = record
        event.synchronize = self.synchronize
        event.elapsed_time = lambda end: 1e3 * (end.at - event.at)
        return event

    def _sleep(self, cycles: int) -> None:
        self.done.append("sleep")
        self.now += cycles / 1e9

    def synchronize(self) -> None:
        self.done.append("synchronize")
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def current_device(self) -> int:
        return 0

    def get_device_properties(self, device: int) -> SimpleNamespace:
        return SimpleNamespace(
            name="Imagined H200", L2_cache_size=1 << 16, multi_processor_count=132, uuid="0"
        )

    def mem_get_info(self) -> tuple[int, int]:
        return 10 << 30, 80 << 30

    def memory_reserved(self) -> int:
        return 5 << 30

    def memory_allocated(self) -> int:
        return 2 << 30

    def empty_cache(self) -> None:
        self.done.append("empty")
        if self.lost:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def reset_peak_memory_stats(self) -> None:
        self.done.append("reset")

    def memory_stats(self) -> dict[str, int]:
        self.done.append("stats")
        return {"requested_bytes.all.current": 100, "requested_bytes.all.peak": 175}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    monkeypatch.setattr(measure.torch, "cuda", fake)
    return fake


def test_the_time_of_a_gpu_is_that_between_two_events(gpu: FakeGpu) -> None:
    def prepare(index: int) -> int:
        gpu.done.append(f"prepare {index}")
        gpu.now += 5
        return index

    def run(state: int) -> None:
        gpu.done.append(f"run {state}")
        gpu.now += 1

    clock = measure.EventClock(hold_up=1e-3)
    gpu.done.clear()
    seconds = clock(SimpleNamespace(prepare=prepare, run=run), 3)
    assert seconds == pytest.approx(1)
    assert gpu.done == ["prepare 3", "sleep", "event", "run 3", "event", "synchronize"]
    before = gpu.now
    gpu._sleep(clock._cycles)
    assert gpu.now - before == pytest.approx(1e-3)  # the hold-up that was asked for


def test_the_peak_of_a_gpu_is_of_the_call_alone(gpu: FakeGpu) -> None:
    machine = measure.Cuda()
    gpu.done.clear()
    assert machine.peak_memory(lambda: gpu.done.append("call")) == 75
    assert gpu.done == ["synchronize", "reset", "stats", "call", "synchronize", "stats"]
    assert machine.free_memory == 13 << 30  # what torch keeps for later is free


def test_every_call_is_launched_a_few_times_before_it_is_timed(gpu: FakeGpu) -> None:
    ran = []
    call = SimpleNamespace(prepare=lambda index: index, run=ran.append)
    clock, found = measure.Cuda().clock({"x": call})
    assert isinstance(clock, measure.EventClock)
    assert found["x"]["launch_ms"] > 0 and len(ran) == 5


@needs_cpu
def test_a_lost_device_is_said_and_nothing_more_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = measure.Cpu()

    def fails() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def broken(*inputs: Tensor) -> Tensor:
        monkeypatch.setattr(machine, "synchronize", fails)
        monkeypatch.setattr(machine, "release", fails)
        fails()

    monkeypatch.setitem(LOSSES, "kd", replace(LOSSES["kd"], eager=broken))
    runner = runner_of("cpu", "eager", "liger", machine=machine)
    first = {x["provider"]: x["missing"] for x in runner.measure(Case("kd", 4, 9))}
    assert first["eager"] == "RuntimeError: CUDA error: an illegal memory access was encountered"
    lost = "not begun: the device was lost in KD 4x9 float32, eager, RuntimeError: CUDA error"
    assert first["cpu"].startswith(lost) and first["liger"].startswith(lost)
    assert all(x["missing"].startswith(lost) for x in runner.measure(Case("nkd", 4, 9)))


@pytest.mark.parametrize(
    ("name", "count", "expected"),
    [("NVIDIA H200", 132, "cluster"), ("NVIDIA H200", 100, None), ("another", 132, None)],
)
def test_kernels_are_named_for_known_devices(name: str, count: int, expected: str | None) -> None:
    pytest.importorskip("kdkernels._host")
    machine = SimpleNamespace(name=name, multiprocessors=count)
    assert providers.regime("cuda", Case("kd", 4096, 128256, "bfloat16"), machine) == expected
    assert providers.regime("triton", Case("kd", 4096, 128256, "bfloat16"), machine) is None


# ----------------------------------------------------------------------------------------- command
@pytest.mark.parametrize("text", ["12", "x12", "0x5", "5x0", "3x4:", "3x4:diagonal", "3x4x5"])
def test_a_shape_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=text):
        command.shape_of(text)


def test_shapes() -> None:
    assert command.shape_of("512x32000") == (512, 32000, "dense")
    assert command.shape_of("7x9:sliced") == (7, 9, "sliced")


@pytest.mark.parametrize(
    "words",
    [
        ["--sets", "0"],
        ["--threads", "0"],
        ["--seconds", "0"],
        ["--losses", "mse"],
        ["--malloc", "keep", "--device", "cuda"],
        ["--keep", "--out", "x"],
        ["--ignored", "100"],
        ["--pass", "up"],
    ],
    ids=" ".join,
)
def test_bad_flags_are_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.parse(words)
    assert stopped.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_only_default_cases_go_to_the_committed_results() -> None:
    assert command.parse(["--device", "cpu"]).default
    assert command.parse(["--device", "cuda"]).default
    for words in (
        ["--quick"],
        ["--seconds", "1"],
        ["--budget", "5"],
        ["--threads", "1"],
        ["--dtypes", "float32"],
        ["--shapes", "3x4"],
        ["--losses", "kd"],
        ["--pass", "both"],
        ["--providers", "cpu"],
        ["--sets", "1"],
        ["--ignored", "50"],
        ["--malloc", "default"],
    ):
        assert not command.parse([*words, "--device", "cpu"]).default


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_device_no_result(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="nothing was measured"):
        command.main(["--device", "cuda", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_the_list_measures_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    command.main(["--list", "--device", "cuda", "--losses", "jsd"])
    assert "JSD 4096x128256 bfloat16" in capsys.readouterr().out


@needs_cpu
def test_a_run_from_flags_to_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    out = tmp_path / "results"
    words = ["--device", "cpu", "--shapes", "8x50", "6x70:sliced", "8x90", "--losses", "kd", "ce"]
    words += ["--dtypes", "float32", "--providers", "cpu", "eager", "liger", "--sets", "2"]
    words += ["--seconds", "0.001", "--threads", str(torch.get_num_threads()), "--out", str(out)]
    pages = {name: (report.ROOT / name).read_bytes() for name in report.PAGES}
    command.main(words)
    shown = capsys.readouterr().out
    assert "KD 6x70:sliced float32" in shown and "CE 6x70:sliced float32" in shown
    assert {x.name for x in out.iterdir()} == {
        "results.json",
        "results.csv",
        "time.svg",
        "bandwidth.svg",
        "memory.svg",
    }
    made = json.loads((out / "results.json").read_text())
    assert made["command"].startswith("python -m bench --device cpu --shapes 8x50")
    for key in ("cpu", "torch", "python", "commit", "measured", "wall_seconds", "threads", "peers"):
        assert made["facts"][key] is not None
    with (out / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(made["records"])
    for row, record in zip(rows, made["records"], strict=True):
        assert {k: v for k, v in row.items() if k in record and v} == {
            k: str(v) for k, v in record.items() if v is not None
        }
        assert row["commit"] == made["facts"]["commit"] and row["machine"] and row["torch"]
        assert row["command"] == made["command"]
    measured = {(x["loss"], x["classes"]) for x in made["records"] if "ms" in x}
    assert measured == set(itertools.product(["kd", "ce"], [50, 70, 90]))
    drawn = (out / "time.svg").read_text()
    assert ">KD, fp32<" in drawn and ">eager<" in drawn
    # Results elsewhere change no page.
    assert pages == {name: (report.ROOT / name).read_bytes() for name in report.PAGES}


@needs_cpu
def test_pages_are_written_for_committed_results_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = []
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(report, "rewrite_pages", lambda: written.append(1) or [])
    words = ["--device", "cpu", "--shapes", "4x9", "--losses", "kd", "--providers", "cpu"]
    words += ["--sets", "1", "--seconds", "0.001", "--threads", str(torch.get_num_threads())]
    command.main([*words, "--out", str(tmp_path / "elsewhere")])
    assert not written
    command.main([*words, "--out", str(tmp_path / "results" / "machine")])
    assert written


# --------------------------------------------------------------------------------- tables and pages
def test_numbers_are_short() -> None:
    values = (None, math.nan, 0, 0.00001234, 0.012345, 1.2345, 123.45, 12345.6, 1.5e7)
    assert [report.number(x) for x in values] == [
        None, None, "0.00", "1.2e-05", "0.0123", "1.23", "123", "12346", "1.5e+07",
    ]  # fmt: skip
    assert [report.times(x) for x in (None, 0.456, 4.56, 45.6, 456.0)] == [
        None, "0.46x", "4.6x", "46x", "456x",
    ]  # fmt: skip
    assert report.percent(0.876) == "88 %" and report.percent(None) is None


def made_up(gpu: bool = False, **settings) -> report.Report:
    """A report of round numbers: the copy 1 ms, a backend 2, eager 20, compile 8, plain 12."""
    backend = "cuda" if gpu else "cpu"
    records = []
    for loss in ("kd", "dkd", "nkd"):
        for classes in (1000, 32000):
            case = Case(loss, 512, classes)
            times = {"copy": 1.0, backend: 2.0, "eager": 20.0, "plain": 12.0, "compile": 8.0}
            for name, ms in (times | {"plain_compile": 6.0}).items():
                records.append(
                    {
                        **run.facts_of(case),
                        "provider": name,
                        "ms": ms,
                        "ms_p20": ms,
                        "ms_p80": ms,
                        "bytes": case.bytes,
                        "gb_per_s": case.bytes / ms / 1e6,
                        "share_of_copy": 1 / ms,
                        "exponentials_per_s": case.exponentials / ms * 1e3,
                        "peak_bytes": case.tensor_bytes + 512,
                        "loss_error": 1e-7,
                        "grad_error": 2e-7,
                    }
                )
            records.append(run.without_result(case, "liger", "liger-kernel is not installed"))
    facts = {"cpu": "some CPU", "threads": 2, "torch_isa": "AVX2", "torch": "2.x", "commit": "c0"}
    facts |= {"measured": "2026-01-01", "wall_seconds": 9.0, "load_average": [0.0]}
    if gpu:
        facts |= {"gpu": "some GPU", "cuda": "13", "triton": "3", "capability": "9.0"}
        facts |= {"exponentials_per_s": 1e9}
    return {
        "command": "python -m bench",
        "settings": {"sets": None, "malloc": "default"} | settings,
        "facts": facts,
        "records": records,
    }


def test_the_readme_table() -> None:
    """Of freed memory kept, and of the CPU that was measured last."""
    kept, before = made_up(malloc="keep"), made_up(malloc="keep")
    before["facts"]["measured"] = "2025-12-31"
    others = {"a-cpu": made_up(), "in-cache": made_up(malloc="keep", sets=1), "before": before}
    gpu = made_up(gpu=True, malloc=None)
    text = report.speed({"a-gpu": gpu, "kept": kept} | others)
    assert "| 512x32000 fp32 | 2.00, 10x, 6.0x, 3.0x, 50 % |" in text, "the faster one compiled"
    assert text.count("| shape | KD | DKD | NKD |") == 2
    assert "[a-gpu]" in text and "[kept]" in text
    assert report.speed({}) == "No results have been committed."


def test_the_standing_of_a_case() -> None:
    text = report.standing({"a-cpu": made_up(), "a-gpu": made_up(gpu=True)})
    shown = "2.00 [2.00-2.00] | 1.00 | 50 % | 10x | 6.0x | 4.0x | 3.0x |"
    assert f"| KD 512x32000 float32 | cpu | {shown}" in text
    lucky = made_up()
    for record in lucky["records"]:
        if record["provider"] == "copy":  # in half the time of the others of as many bytes
            record |= {"share_of_copy": 2.0, "gb_per_s": 2 * record["gb_per_s"]}
    assert f"| KD 512x32000 float32 | cpu | {shown}" in report.standing({"a-cpu": lucky})
    # 512 x 32000 x 2 exponentials at 10^9 a second: more than the bytes take.
    assert "| KD 512x32000 float32 | cuda | 2.00 [2.00-2.00] | 32.8 | 50 % |" in text


def test_what_was_not_measured_is_said() -> None:
    text = report.unmeasured({"a-cpu": made_up()})
    assert "nothing has run on a GPU yet" in text
    assert "a-cpu, liger: liger-kernel is not installed (6 cases)" in text
    others = ", ".join(f"loss {x}" for x in LOSSES if x not in ("kd", "dkd", "nkd"))
    assert f"- a-cpu, not asked for: {others}, " in text
    assert "dtype float16" in text and "layout sliced" in text and "dtype float32" not in text
    assert "torch.compile in 0 of 6 cases" in text
    assert "on a GPU yet" not in report.unmeasured({"a-gpu": made_up(gpu=True)})


def test_goals() -> None:
    found = {what: (value, goal) for what, value, goal, _ in report.goals(made_up())}
    assert found["KD 512x32000 float32, cpu: times faster than eager"] == (10, 30)
    assert found["KD 512x32000 float32, cpu: share of the copy's bandwidth"] == (0.5, 0.4)
    assert found["DKD 512x32000 float32, cpu: bytes per row beside the gradient"] == (0, 256)
    on_gpu = {what: goal for what, _, goal, _ in report.goals(made_up(gpu=True))}
    assert on_gpu["KD 512x32000 float32, cuda: share of the copy's bandwidth"] == 0.9
    assert on_gpu["KD 512x1000 float32, cuda: share of the copy's bandwidth"] == 0.8
    text = report.goals_text(made_up())
    assert "times faster than eager: 10.0, goal >= 30" in text
    assert "share of the copy" not in text
    kept = [what for what, *_ in report.goals(made_up(malloc="keep"))]
    assert not any("times faster" in what for what in kept), "those are of fresh memory"


def test_blocks_are_filled() -> None:
    page = "a\n<!-- bench: x -->\nold\n<!-- end -->\nb\n<!-- bench: y -->\n<!-- end -->\n"
    once = report.filled(page, {"x": "1", "y": "2"})
    assert once == (
        "a\n<!-- bench: x -->\n\n1\n\n<!-- end -->\nb\n<!-- bench: y -->\n\n2\n\n<!-- end -->\n"
    )
    assert report.filled(once, {"x": "1", "y": "2"}) == once
    with pytest.raises(KeyError, match="no block 'y'"):
        report.filled(page, {"x": "1"})


@pytest.mark.parametrize("name", report.PAGES)
def test_pages_show_the_committed_results(name: str) -> None:
    """`python -m bench --pages` mends it."""
    text = (report.ROOT / name).read_text(encoding="utf-8")
    assert "<!-- bench: " in text
    assert text == report.filled(text, report.blocks(report.kept()))


def test_committed_results_fit_the_model() -> None:
    """Bytes, exponentials and providers as they are declared now."""
    for made in report.kept().values():
        for record in made["records"]:
            case = run.case_of(record)
            if "exponentials" in record:
                assert record["provider"] in providers.NAMES
                assert record["bytes"] == case.bytes
                assert record["exponentials"] == case.exponentials


def _ceiling(name: str) -> list[str]:
    line = next(x for x in report.ceilings().splitlines() if x.startswith(f"| {name} |"))
    return [x.strip() for x in line.strip("|").split("|")]


def test_ceilings_of_an_h200() -> None:
    """4096 x 128256 x 6 bytes at 4.8 TB/s; 16 x 132 x 1.98 GHz exponentials a second."""
    assert _ceiling("H200") == ["H200", "4.80", "4.18", "0.657", "0.251", "5.2", "3.5"]


def test_designs_say_what_bounds_them() -> None:
    """4096 x 128256 pairs on a B200: 6 exponentials at 4.65e12 a second, or 6 bytes at 8 TB/s."""
    lines = [x for x in report.designs().splitlines() if "the same" in x]
    assert "| 0.677 (exponentials) |" in lines[1] and "| 0.394 |" in lines[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_run_on_a_gpu(tmp_path: Path) -> None:
    words = ["--device", "cuda", "--shapes", "64x1000", "16x40000", "--losses", "kd", "tf_nkd"]
    words += ["--pass", *DIRECTIONS, "--providers", "cuda", "triton", "eager"]
    command.main([*words, "--seconds", "0.02", "--out", str(tmp_path)])
    made = json.loads((tmp_path / "results.json").read_text())
    states = command.kdkernels.backends()
    for record in made["records"]:
        name = record["provider"]
        unavailable = name in states and not states[name].available
        assert "missing" not in record or (unavailable and record["missing"] == states[name].reason)
        assert record.get("launch_ms", 1) > 0
        assert record.get("grad_error", 0) < 1e-2
    assert made["facts"]["exponentials_per_s"] is None or (
        made["facts"]["exponentials_per_s"] > 1e11
    )
