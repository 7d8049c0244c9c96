"""Temperatures and other numbers of a loss that are tensors of one for each row."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from functools import partial
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch.utils._python_dispatch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    LAYOUTS,
    MAIN_CASES,
    MAIN_SCALARS,
    USUAL,
    Case,
    evaluate,
    make_inputs,
    needs_cpu,
)
from contracts import check_numbers_of_rows, numbers_of
from torch import Tensor

import kdkernels
from kdkernels import backend as backends
from kdkernels import call
from kdkernels.reference import LOSSES

TRITON = kdkernels.backends()["triton"].available and backends._INTERPRETED
needs_triton = pytest.mark.skipif(not TRITON, reason="no interpreter of Triton here")
KERNELS = [pytest.param("cpu", marks=needs_cpu), pytest.param("triton", marks=needs_triton)]
# NumPy's, about what the Triton kernels do on purpose.
quiet = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")

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
    inputs = make_inputs("normal", 7, classes, dtype, generator, ignored=0.2)
    own = numbers_of(case, (7,), generator)
    check_numbers_of_rows(case, inputs, own, generator, backend, lambda: iter([backend]))


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


@quiet
@pytest.mark.parametrize("options", [{"causal": True}, {"reduction": "sum", "classes": 4}], ids=str)
@pytest.mark.parametrize(
    ("case", "kernels"),
    [
        *(pytest.param(case, "cpu", marks=needs_cpu) for case in SCALARS),
        *(pytest.param(USUAL[x], "triton", marks=needs_triton) for x in ("kd", "jsd")),
    ],
    ids=str,
)
def test_all_that_a_call_can_have(
    case: Case, kernels: str, options: dict[str, Any], generator: torch.Generator
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

    for ours, theirs in zip(found(kernels), found("reference"), strict=True):
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


@quiet
@pytest.mark.parametrize("kernels", KERNELS)
def test_schedules_compile_once(kernels: str) -> None:
    """Learned ones, too."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(
        lambda s, t, a: kdkernels.skew_kl_loss(s, t, alpha=a, backend=kernels),
        backend=counter,
        fullgraph=True,
    )
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        s, t, _ = make_inputs("normal", 5, 11, F32, generator)
        alpha = torch.rand(5, generator=generator).requires_grad_(seed > 1)
        given = [x for x in (s.requires_grad_(), alpha) if x.requires_grad]
        value = function(s, t, alpha)
        eager = kdkernels.skew_kl_loss(s, t, alpha=alpha, backend=kernels)
        torch.testing.assert_close(value, eager)
        torch.testing.assert_close(*(torch.autograd.grad(x, given) for x in (value, eager)))
        assert counter.frame_count == 1 + (seed > 1)


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


@quiet
@needs_triton
def test_the_default_on_a_device_is_triton(
    generator: torch.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the CUDA kernels are preferred, which do not take them: on a CPU that stands for a GPU.
    So does a number on the device, which is one of every row.
    """
    monkeypatch.setattr(backends, "_warned", set())
    monkeypatch.setitem(backends._PREFERENCE, "cpu", ("cuda", "triton"))
    monkeypatch.setitem(backends._DEVICE, "cuda", "cpu")
    monkeypatch.setitem(backends._available, "cuda", backends.Availability(True, ""))
    s, t, y = make_inputs("normal", 5, 9, F32, generator)
    temperature = torch.tensor([1.0, 2.0, 40.0, 0.5, 3.0])
    alpha = torch.tensor(0.3)
    operators: list[str] = []

    class Seen(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None):
            operators.append(str(op))
            return op(*args, **(kwargs or {}))

    def check(**own: Any) -> None:
        loss = partial(kdkernels.skew_kl_loss, **own)
        operators.clear()
        with Seen(), warnings.catch_warnings():
            warnings.filterwarnings("error", "kdkernels")
            ours, gradient = evaluate(loss, s, t, y)
        assert "kdkernels.triton_reduced.default" in operators
        value, truth = evaluate(partial(loss, backend="reference"), s.double(), t.double(), y)
        torch.testing.assert_close(ours, value.float())
        torch.testing.assert_close(gradient, truth.float(), atol=1e-6, rtol=1e-4)

    check(temperature=temperature)
    named = partial(kdkernels.skew_kl_loss, s, t, y, backend="cuda")
    with pytest.raises(RuntimeError, match=r"of each row .*; leave it None or take 'triton'"):
        named(temperature=temperature)
    with monkeypatch.context() as patch:
        patch.setattr(call, "_are_on_a_device", lambda numbers: any(x is alpha for x in numbers))
        check(alpha=alpha)
        check(alpha=alpha, temperature=temperature)
        with pytest.raises(RuntimeError, match=r"that are tensors on a device .*take 'triton'"):
            named(alpha=alpha)
    monkeypatch.setitem(backends._available, "triton", backends.Availability(False, "none"))
    with pytest.warns(RuntimeWarning, match="computes numbers of each row .* in the reference"):
        kdkernels.skew_kl_loss(s, t, y, temperature=temperature)


@quiet
@needs_triton
@pytest.mark.parametrize("with_target", [True, False])
def test_parts_and_layouts_in_triton(with_target: bool, generator: torch.Generator) -> None:
    s, t, y = make_inputs("normal", (2, 3), 40, F32, generator)
    target = {"target": y, "ce_weight": 0.3, "label_smoothing": 0.1} if with_target else {}
    for name in ("kd", "skew_kl"):
        own = numbers_of(Case(name), (2, 3), generator)
        loss = partial(getattr(kdkernels, f"{name}_loss"), **own, **target, return_parts=True)
        truth = loss(s.double(), t.double(), backend="reference")
        for layout in LAYOUTS.values():
            (student, dim), (teacher, _) = layout(s), layout(t)
            ours = loss(student, teacher, dim=dim, backend="triton")
            for x, exact in zip(ours, truth, strict=True):
                torch.testing.assert_close(x, exact.float())


@needs_triton
def test_operators_of_triton_refuse_what_does_not_fit() -> None:
    s, t, y = make_inputs("normal", 4, 5)
    for params in (torch.ones(3, 6), torch.ones(4, 5), torch.ones(1, 4, 6), torch.ones(4, 6, 1)):
        with pytest.raises(RuntimeError, match="params: must be 6 float64 numbers for 'kd'"):
            torch.ops.kdkernels.triton_forward("kd", s, t, y, None, params.double(), -100)
