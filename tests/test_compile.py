"""torch.compile(fullgraph=True): the same values and gradients, and no compilation too many.

Tracing and the split into forward and backward graphs are what can go wrong with an operator, and
backend "aot_eager" does all of that; the tests with inductor see what its code generation adds.
"""

import warnings
from collections.abc import Callable, Iterator

import cases
import pytest
import torch
from cases import (
    CPU,
    MAIN_CASES,
    MAIN_KERNEL_CASES,
    USUAL,
    assert_same,
    evaluate,
    make_inputs,
    needs_cpu,
)
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import kdkernels
from kdkernels import backend

pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script_method")  # torch's own
BACKENDS = ("cpu", "reference") if CPU.available else ("reference",)
KD, DKD, TF_NKD = USUAL["kd"], USUAL["dkd"], USUAL["tf_nkd"]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def compiled(call: Callable[..., Tensor], compiler: str = "aot_eager", **options):
    """The function, compiled, and what counts its graphs."""
    counter = CompileCounterWithBackend(compiler)
    return torch.compile(call, fullgraph=True, backend=counter, **options), counter


def assert_close(ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
        assert x.stride() == y.stride()


@pytest.mark.parametrize(
    "name", [x if x == BACKENDS[0] else pytest.param(x, marks=pytest.mark.full) for x in BACKENDS]
)
@pytest.mark.parametrize(
    "case",
    [x if x in MAIN_KERNEL_CASES else pytest.param(x, marks=pytest.mark.full) for x in MAIN_CASES],
    ids=str,
)
def test_every_loss(case, name):
    inputs = make_inputs("normal", (2, 6), 7, ignored=0.2)
    student, teacher = (x[:, :-1] for x in inputs[:2])  # strided, as for language models
    inputs = (student, teacher, inputs[2][:, 1:])
    for call in [case.rows] if case.outputs > 1 else [case.rows, case]:
        upstream = torch.rand(call(*inputs).shape)
        function, counter = compiled(lambda *x, call=call: call(*x, backend=name))
        eager = evaluate(call, *inputs, upstream, backend=name)
        for _ in range(2):
            assert_close(evaluate(function, *inputs, upstream), eager)
        assert counter.frame_count == 1


@pytest.mark.parametrize("name", BACKENDS)
def test_row_weight_and_normalizer(name):
    inputs = make_inputs("normal", 6, 7)

    def call(student, teacher, target, **options):
        return kdkernels.nkd_loss(
            student, teacher, target, temperature=2.0, ce_weight=1.0, **options
        )

    function, _ = compiled(call)
    options = {"row_weight": torch.rand(6), "normalizer": torch.tensor(3), "backend": name}
    assert_close(evaluate(function, *inputs, **options), evaluate(call, *inputs, **options))


@needs_cpu
def test_fall_backs_warn_while_the_graph_is_traced(monkeypatch):
    inputs = make_inputs("normal", 6, 7)
    function, _ = compiled(kdkernels.dkd_loss)

    def teachers(loss):
        return lambda teacher, student, target: loss(student, teacher, target)

    monkeypatch.setattr(backend, "_warned", set())
    teacher_first = inputs[1], inputs[0], inputs[2]
    with pytest.warns(RuntimeWarning, match="the teacher requires a gradient"):
        ours = evaluate(teachers(function), *teacher_first)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)  # it came
        assert_close(ours, evaluate(teachers(kdkernels.dkd_loss), *teacher_first))
    transformed = torch.func.vmap(lambda *rows: kdkernels.dkd_loss(*rows))
    with pytest.warns(RuntimeWarning, match="computes torch.func under torch.compile in the refer"):
        torch.testing.assert_close(compiled(transformed)[0](*inputs), transformed(*inputs))


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", [DKD, TF_NKD], ids=str)
def test_dynamic_shapes(case, name):
    function, counter = compiled(lambda *x: case(*x, backend=name))
    for rows, classes in ((6, 7), (9, 11), (300, 20), (2, 1200)):
        inputs = make_inputs("normal", rows, classes)
        student = inputs[0].requires_grad_()
        for x in inputs[:2]:
            torch._dynamo.mark_dynamic(x, 0)
            torch._dynamo.mark_dynamic(x, 1)
        torch._dynamo.mark_dynamic(inputs[2], 0)
        value = function(*inputs)
        (gradient,) = torch.autograd.grad(value, student)
        assert_close((value.detach(), gradient), evaluate(case, *inputs, backend=name))
    assert counter.frame_count == 1


@needs_cpu
def test_shapes_that_turn_out_to_be_dynamic():
    function, counter = compiled(KD)
    for rows in (6, 9, 30, 300):
        inputs = make_inputs("normal", rows, 7)
        assert_close(evaluate(function, *inputs), evaluate(KD, *inputs))
    assert counter.frame_count <= 2, "one compilation, and one that generalises it"


@needs_cpu
def test_options_changed_between_calls_are_seen():
    inputs = make_inputs("normal", 6, 7)
    loss = kdkernels.AEKTLoss()
    function, _ = compiled(loss)
    for change in ({}, {"temperature": 2.0}, {"variant": "ratio_divergence"}, {"reduction": "sum"}):
        for name, value in change.items():
            setattr(loss, name, value)
        assert_close(evaluate(function, *inputs), evaluate(loss, *inputs))


# What a schedule may change from step to step.
SCHEDULES = {
    "temperature": lambda x: {"temperature": 1.0 + x},
    "kd_weight": lambda x: {"kd_weight": x},
    "ce_weight": lambda x: {"ce_weight": x},
    "beta": lambda x: {"beta": 2 * x},
    "normalizer": lambda x: {"normalizer": 1.0 + x},
    "tokens": lambda x: {"normalizer": 100 + round(64 * x)},
}


# Plain PyTorch is torch's to compile; it takes its time.
@pytest.mark.parametrize(
    "name",
    [x if x != "reference" else pytest.param(x, marks=pytest.mark.full) for x in BACKENDS],
)
@pytest.mark.parametrize("what", SCHEDULES)
def test_a_schedule_of_numbers_compiles_twice(what, name):
    """Once with a constant, once with a variable, for the 8 values after which torch gives up, and
    more."""
    inputs = make_inputs("normal", 6, 7)

    def call(*inputs: Tensor, x: float) -> Tensor:
        return kdkernels.dkd_loss(*inputs, backend=name, **SCHEDULES[what](x))

    function, counter = compiled(call)
    for step in range(50 if what == "temperature" else 12):
        x = (step + 1) / 64
        ours, theirs = (evaluate(f, *inputs, x=x) for f in (function, call))
        assert_close(ours, theirs)
    assert counter.frame_count <= 2


@needs_cpu
@pytest.mark.parametrize("what", SCHEDULES)
def test_a_schedule_in_a_tensor_compiles_once(what):
    inputs = make_inputs("normal", 6, 7)

    def call(*inputs: Tensor, x: Tensor) -> Tensor:
        return kdkernels.dkd_loss(*inputs, **dict.fromkeys(SCHEDULES[what](1.0), x))

    function, counter = compiled(call)
    graphs = []
    for step in range(12):
        x = torch.tensor(1.0 + step / 8, dtype=torch.float64)
        ours, theirs = (evaluate(f, *inputs, x=x) for f in (function, call))
        assert_close(ours, theirs)
        graphs.append(counter.frame_count)
    # The compiler may run twice within the first call.
    assert graphs[0] == graphs[-1]


@needs_cpu
def test_a_module_s_schedule_compiles_twice():
    inputs = make_inputs("normal", 6, 7)
    loss = kdkernels.KDLoss(ce_weight=0.5)
    function, counter = compiled(loss)
    for step in range(12):
        loss.temperature = 1.0 + step / 8
        assert_close(evaluate(function, *inputs), evaluate(loss, *inputs))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("name", BACKENDS)
def test_parts_and_causal(name):
    student, teacher, target = make_inputs("normal", (2, 5), 7)
    options = {"causal": True, "return_parts": True, "ce_weight": 0.5, "backend": name}

    def call(*inputs: Tensor) -> Tensor:
        parts = kdkernels.dkd_loss(*inputs, **options)
        return parts.loss + 0 * (parts.distillation + parts.cross_entropy)

    function, _ = compiled(call)
    assert_close(
        evaluate(function, student, teacher, target), evaluate(call, student, teacher, target)
    )


@needs_cpu
def test_learned_temperature():
    student, teacher, target = make_inputs("normal", 6, 7)
    function, _ = compiled(lambda t: kdkernels.dkd_loss(student, teacher, target, temperature=t))
    found = []
    for f in (function, lambda t: kdkernels.dkd_loss(student, teacher, target, temperature=t)):
        temperature = torch.tensor(2.0, requires_grad=True)
        found.append(torch.autograd.grad(f(temperature), temperature)[0])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)
    assert found[0].abs() > 1e-3


@needs_cpu
def test_a_target_out_of_range_is_refused_by_the_kernel():
    student, teacher, target = make_inputs("normal", 6, 7)
    function, _ = compiled(kdkernels.dkd_loss)
    target[2] = 7
    with pytest.raises(RuntimeError, match="class 7 in row 2 is out of range; allowed: 0 to 6"):
        function(student, teacher, target)


def test_without_the_fast_backend(monkeypatch):
    # A pure Python installation that asks for no backend: its warning comes while the graph is
    # traced, and does not break it.
    monkeypatch.setattr(
        backend, "_available", {**backend._available, "cpu": backend.Availability(False, "gone")}
    )
    monkeypatch.setattr(backend, "_warned", set())
    inputs = make_inputs("normal", 6, 7)
    function, _ = compiled(KD)
    with pytest.warns(RuntimeWarning, match="slower backend 'reference'") as warned:
        value = evaluate(function, *inputs)
    assert_close(value, evaluate(KD, *inputs, backend="reference"))
    ours = [x.filename for x in warned if "kdkernels" in str(x.message)]
    assert ours == [cases.__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        evaluate(function, *inputs)
        evaluate(compiled(KD)[0], *inputs)


# ---- inductor -------------------------------------------------------------------------------


@pytest.mark.full
@needs_cpu
def test_inductor_in_a_training_step():
    """Between operations that inductor compiles itself, on strided logits, for two losses."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 33)
    hidden, teacher = torch.randn(2, 6, 8), torch.randn(2, 6, 33)
    target = torch.randint(33, (2, 6))

    def step(hidden: Tensor) -> Tensor:
        logits = layer(hidden).relu()[:, :-1]
        distilled = kdkernels.nkd_loss(logits, teacher[:, :-1], target[:, 1:], temperature=2.0)
        confident = kdkernels.tf_nkd_loss(2 * logits, target[:, 1:], reduction="none")
        return 3 * distilled + confident.square().mean()

    function, counter = compiled(step, "inductor")
    results = []
    for run in (function, step):
        layer.zero_grad()
        loss = run(hidden)
        loss.backward()
        results.append((loss.detach(), layer.weight.grad))
    assert_close(*results)
    assert counter.frame_count == 1


@pytest.mark.full
@needs_cpu
def test_inductor_and_a_schedule():
    inputs = make_inputs("normal", 6, 9)

    def call(*inputs: Tensor, x: float) -> Tensor:
        return kdkernels.dkd_loss(*inputs, temperature=1 + x, ce_weight=x, normalizer=2 + x)

    function, counter = compiled(call, "inductor")
    for step in range(10):
        x = (step + 1) / 8
        assert_close(evaluate(function, *inputs, x=x), evaluate(call, *inputs, x=x))
    assert counter.frame_count <= 2


@pytest.mark.full
@needs_cpu
def test_inductor_keeps_the_layout():
    """Classes in the middle: the kernel must get the strides it was traced with."""
    student, teacher, target = make_inputs("normal", (2, 5), 9)
    inputs = (*(x.transpose(1, 2).contiguous() for x in (student, teacher)), target)

    def call(*inputs: Tensor) -> Tensor:
        return kdkernels.dkd_loss(*inputs, dim=1)

    function, _ = compiled(call, "inductor")
    ours, theirs = evaluate(function, *inputs), evaluate(call, *inputs)
    assert_close(ours, theirs)
    assert_same(ours[1], theirs[1])


@pytest.mark.full
def test_inductor_compiles_the_reference():
    inputs = make_inputs("normal", 6, 9)
    function, _ = compiled(lambda *x: KD(*x, backend="reference"), "inductor")
    assert_close(evaluate(function, *inputs), evaluate(KD, *inputs, backend="reference"))
