"""Temperatures and other numbers of a loss that are tensors of one for each row."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from cases import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    MAIN_CASES,
    MAIN_SCALARS,
    Case,
    evaluate,
    make_inputs,
    needs_cpu,
    value_tolerance,
)
from torch import Tensor

import kdkernels
from kdkernels import backend as backends
from kdkernels.reference import LOSSES

# From where each is drawn.
RANGES = {"temperature": (0.5, 5.0), "teacher_temperature": (0.5, 5.0), "gamma": (0.0, 3.0)}


def numbers_of(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Of every number that a loss has of its own, one for each row."""
    choices = ("t_squared", "log_ratio_max", "kd_weight", "ce_weight", "label_smoothing")
    facts = LOSSES[case.loss]
    names = [x for x in facts.params if x not in (*choices, *facts.choices)]
    found = {}
    for name in names:
        low, high = RANGES.get(name, (0.0, 1.0))
        found[name] = low + (high - low) * torch.rand(shape, generator=generator)
        if low == 0.0:  # what is switched off in one row is not in the next
            found[name].view(-1)[0], found[name].view(-1)[-1] = 0.0, 1.0
    return found


OF_ROWS = [case for case in MAIN_CASES if case.loss in LOSSES]
SCALARS = [case for case in MAIN_SCALARS if case.loss in LOSSES]


@pytest.mark.filterwarnings("ignore:kdkernels computes numbers of each row")
@pytest.mark.parametrize(
    ("classes", "dtype"), [(1, F32), (3, F16), (37, BF16), (1500, F64), (1500, F32)], ids=str
)
@pytest.mark.parametrize("case", OF_ROWS, ids=str)
def test_each_row_has_its_own(
    case: Case, classes: int, dtype: torch.dtype, backend: str, generator: torch.Generator
) -> None:
    """Loss and gradient against a call for each row, with plain numbers, in float64."""
    s, t, y = make_inputs("normal", 7, classes, dtype, generator, ignored=0.2)
    own = numbers_of(case, (7,), generator)
    weight = {"ce_weight": 0.7} if case.facts.weights and case.outputs == 1 else {}
    upstream = torch.randn((3, 7) if case.outputs > 1 else (7,), generator=generator)
    ours, gradient = evaluate(
        partial(case.having(**own, **weight).rows, backend=backend), s, t, y, upstream
    )
    for i in range(7):
        plain = case.having(**{name: x[i].item() for name, x in own.items()}, **weight)
        mine = [x[i : i + 1] for x in (s.double(), t.double(), y)]
        of_row = partial(plain.rows, backend="reference")
        value, truth = evaluate(of_row, *mine, upstream[..., i : i + 1].double())
        tolerance = value_tolerance(plain, value, s[i : i + 1], t[i : i + 1], ours.dtype)
        error = (ours[..., i : i + 1].double() - value).abs()
        assert ((error <= tolerance) | (ours[..., i : i + 1] == value)).all(), (i, error, tolerance)
        eps = torch.finfo(dtype).eps
        of_largest = truth.abs().amax() * (2 * eps + 2e-5 * (dtype != F64))
        assert (gradient[i].double() - truth[0]).abs().amax() <= of_largest + 4e-7, i


@pytest.mark.filterwarnings("ignore:kdkernels computes numbers of each row")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout: str, backend: str, generator: torch.Generator) -> None:
    s, t, y = make_inputs("normal", (2, 3), 40, F32, generator)
    own = numbers_of(Case("skew_kl"), (2, 3), generator)
    lay = LAYOUTS[layout]
    (student, dim), (teacher, _) = lay(s), lay(t)
    ours, gradient = evaluate(
        partial(kdkernels.skew_kl_loss, **own, backend=backend, dim=dim), student, teacher, y
    )
    value, truth = evaluate(
        partial(kdkernels.skew_kl_loss, **own, backend="reference"), s.double(), t.double(), y
    )
    torch.testing.assert_close(ours, value.float())
    torch.testing.assert_close(gradient.movedim(dim, -1), truth.float(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("options", [{"causal": True}, {"reduction": "sum", "classes": 4}], ids=str)
@pytest.mark.parametrize("case", SCALARS, ids=str)
@needs_cpu
def test_all_that_a_call_can_have(
    case: Case, options: dict[str, Any], generator: torch.Generator
) -> None:
    """With weights of rows, learned numbers, second derivatives: the kernels' and the reference's
    paths agree.
    """
    s, t, y = make_inputs("normal", (2, 3), 4, F64, generator, ignored=0.2)
    drawn = numbers_of(case, (2, 3), generator)
    own = {k: 0.1 + 0.8 * x.double() for k, x in drawn.items()}  # inside of where it is smooth
    logits = (s, t) if case.teacher else (s,)
    row_weight = torch.rand((2, 3), generator=generator, dtype=F64)

    def found(backend: str) -> list[Tensor]:
        given = [x.clone().requires_grad_() for x in (*logits, row_weight, *own.values())]
        *mine, weight = given[: len(logits) + 1]
        numbers = dict(zip(own, given[len(logits) + 1 :], strict=True))
        all_options = {**case.options, **numbers, **options}
        value = case.function(*mine, y, **all_options, row_weight=weight, backend=backend)
        first = torch.autograd.grad(value, given, create_graph=True)
        again = torch.autograd.grad(sum(x.square().sum() for x in first), given)
        return [value, *first, *again]

    for ours, theirs in zip(found("cpu"), found("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-7)


@pytest.mark.filterwarnings("ignore:kdkernels")
@pytest.mark.parametrize("case", SCALARS, ids=str)
def test_gradients_of_the_numbers(case: Case, generator: torch.Generator) -> None:
    """Against a call for each row with 0-d tensors; classes at -inf have no part in them."""
    s, t, y = make_inputs("masked", 5, 6, F64, generator)
    t = torch.where(s.isneginf(), s, t.nan_to_num(neginf=-1.0))
    drawn = numbers_of(case, (5,), generator)
    own = {k: (0.1 + 0.8 * x.double()).requires_grad_() for k, x in drawn.items()}
    each = {k: [x[i].detach().requires_grad_() for i in range(5)] for k, x in own.items()}
    case.having(**own).rows(s, t, y).sum().backward()
    for i in range(5):
        single = case.having(**{k: x[i] for k, x in each.items()})
        single.rows(s[i], t[i], y[i], backend="reference").backward()
    for k, x in own.items():
        truth = torch.stack([z.grad for z in each[k]])
        assert truth.isfinite().all() and x.grad is not None, k
        torch.testing.assert_close(x.grad, truth)


@pytest.mark.filterwarnings("ignore:kdkernels")
@pytest.mark.parametrize("padding", [0.0, torch.nan, torch.inf, -1.0])
def test_numbers_of_unread_rows_are_not_looked_at(padding: float, backend: str) -> None:
    s, t, y = make_inputs("normal", 5, 6, F64)
    read = torch.tensor([True, False, True, True, False])
    ones = torch.where(read, 1.5, 1.0).double()
    padded = torch.where(read, 1.5, padding).double()
    for how in (
        {"target": torch.where(read, y, -100)},
        {"target": y, "row_weight": read},
        {"target": y, "row_weight": read.double()},
    ):
        found = []
        for given in (ones, padded):
            student, numbers = s.clone().requires_grad_(), given.clone().requires_grad_()
            value = kdkernels.dkd_loss(student, t, temperature=numbers, backend=backend, **how)
            found.append((value, *torch.autograd.grad(value, (student, numbers))))
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs)


def test_nothing_and_a_row_without_dimensions(backend: str) -> None:
    x = torch.zeros((0, 5), requires_grad=True)
    temperature = torch.ones(0, requires_grad=True)
    value = kdkernels.kd_loss(x, x.detach(), temperature=temperature, backend=backend)
    value.backward()
    assert value == 0 and temperature.grad is not None and temperature.grad.shape == (0,)


@needs_cpu
def test_schedules_compile_once() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda s, t, a: kdkernels.skew_kl_loss(s, t, alpha=a, backend="cpu"),
        backend=counter,
        fullgraph=True,
    )
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        s, t, _ = make_inputs("normal", 5, 11, F32, generator)
        alpha = torch.rand(5, generator=generator)
        student = s.requires_grad_()
        value = function(student, t, alpha)
        (gradient,) = torch.autograd.grad(value, student)
        eager = kdkernels.skew_kl_loss(student, t, alpha=alpha, backend="cpu")
        torch.testing.assert_close(value, eager)
        torch.testing.assert_close(gradient, *torch.autograd.grad(eager, student))
    assert counter.frame_count == 1


@needs_cpu
def test_compiled_first_in_a_process() -> None:
    """Nothing that a graph needs is worked out only when the first call without one comes."""
    text = """
import torch, kdkernels
s, t = torch.randn(4, 7, requires_grad=True), torch.randn(4, 7)
loss = torch.compile(
    lambda s, t, x: kdkernels.kd_loss(s, t, temperature=x), backend="aot_eager", fullgraph=True
)
loss(s, t, torch.ones(4)).backward()
assert s.grad is not None
"""
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", text], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


@needs_cpu
def test_mapped_upstream_gradients(generator: torch.Generator) -> None:
    s, t, _ = make_inputs("normal", 4, 9, F64, generator)
    numbers = torch.rand(4, generator=generator, dtype=F64) + 0.5
    given = [x.clone().requires_grad_() for x in (s, numbers)]
    value = kdkernels.kd_loss(given[0], t, temperature=given[1], reduction="none", backend="cpu")

    def pull(upstream: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(value, given, upstream, retain_graph=True)

    units = torch.eye(4, dtype=F64)
    mapped = torch.func.vmap(pull)(units)
    for ours, *theirs in zip(mapped, *(pull(x) for x in units), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs))


@pytest.mark.filterwarnings("ignore:kdkernels computes numbers of each row")
def test_transforms(generator: torch.Generator) -> None:
    s, t, _ = make_inputs("normal", (2, 4), 9, F64, generator)
    ratio = torch.rand((2, 4), generator=generator, dtype=F64)

    def each(s: Tensor, t: Tensor, ratio: Tensor) -> Tensor:
        return kdkernels.mixed_kl_loss(s, t, ratio=ratio, reduction="sum")

    mapped = torch.func.vmap(each)(s, t, ratio)
    one_by_one = torch.stack([each(*x) for x in zip(s, t, ratio, strict=True)])
    torch.testing.assert_close(mapped, one_by_one)
    found = torch.func.grad(each, argnums=2)(s, t, ratio)
    learned = ratio.clone().requires_grad_()
    torch.testing.assert_close(found, *torch.autograd.grad(each(s, t, learned), learned))


def test_refused() -> None:
    s, t, y = make_inputs("normal", 4, 5)
    dkd = kdkernels.dkd_loss
    for options, words in (
        (
            {"temperature": torch.ones(3)},
            r"temperature: got shape \(3,\); a tensor must be 0-d, or .* row: \(4,\)",
        ),
        ({"temperature": torch.ones(4, 1)}, r"temperature: got shape \(4, 1\)"),
        ({"temperature": torch.tensor([1.0, 2.0, 0.0, 1.0])}, "temperature: got 0.0; must be a"),
        ({"alpha": torch.tensor([1.0, torch.nan, 0.0, 1.0])}, "alpha: got nan"),
        ({"temperature": torch.ones(4, device="meta")}, "temperature: got device meta"),
        ({"ce_weight": torch.ones(4)}, r"ce_weight: got shape \(4,\); a tensor must be 0-d"),
        ({"label_smoothing": torch.zeros(4)}, "label_smoothing: got shape"),
    ):
        with pytest.raises(ValueError, match=words):
            dkd(s, t, y, **options)
    for beta in (torch.ones(4, dtype=torch.bool), torch.ones(4, dtype=torch.complex64)):
        with pytest.raises(TypeError, match="beta: got dtype"):
            dkd(s, t, y, beta=beta)


@needs_cpu
def test_operators_refuse_what_does_not_fit() -> None:
    s, t, y = make_inputs("normal", 4, 5)
    operator = torch.ops.kdkernels.forward
    for shape in ((3, 9), (4, 8), (1, 4, 9)):
        with pytest.raises(RuntimeError, match="params: "):
            operator("kd", s, t, y, None, torch.ones(shape, dtype=F64), -100)


@needs_cpu
def test_what_no_kernel_takes_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    s, t, _ = make_inputs("normal", 4, 5)
    monkeypatch.setattr(backends, "_warned", set())
    loss = partial(kdkernels.kd_loss, temperature=torch.ones(4))
    with (
        pytest.raises(RuntimeError, match="got 'cpu', which cannot compute numbers of each row"),
    ):
        torch.func.grad(partial(loss, backend="cpu"))(s, t)
    with pytest.warns(RuntimeWarning, match="computes numbers of each row .* in the reference"):
        torch.func.grad(loss)(s, t)
