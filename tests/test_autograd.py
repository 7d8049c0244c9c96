"""Differentiation: whatever the upstream gradient, however often, and whichever input asks."""

import gc
import math
import weakref
from collections.abc import Iterator

import pytest
import torch
from cases import (
    BF16,
    CASES,
    DTYPES,
    F16,
    F32,
    F64,
    LAYOUTS,
    MAIN_CASES,
    MAIN_SCALARS,
    OPERATORS,
    SCALAR_CASES,
    SOME,
    USUAL,
    Case,
    assert_same,
    evaluate,
    make_inputs,
    needs_cpu,
)
from contracts import check_operators
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import kdkernels
from kdkernels import ops
from kdkernels.tensors import reference_rows

pytestmark = needs_cpu

ROWS, CLASSES = 6, 9
PAIRS = [case for case in SCALAR_CASES if case.teacher]
EXACT = {"rtol": 1e-9, "atol": 1e-11}


def inputs_of(case: Case, dtype=torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    return make_inputs("normal", ROWS, CLASSES, dtype, ignored=0.2)


def upstream_of(value: Tensor) -> Tensor:
    """Not ones, and of both signs."""
    return torch.linspace(-2, 3, value.numel(), dtype=value.dtype).view(value.shape)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, **EXACT)


# ---- the operators --------------------------------------------------------------------------


def op_inputs(name: str, teacher_gradient: bool = False) -> tuple[Tensor | None, ...]:
    """Student (strided), teacher, target, row_weight."""
    student, teacher, target = make_inputs("normal", (2, 4), CLASSES, ignored=0.2)
    student, teacher = student[:, :-1].requires_grad_(), teacher[:, :-1]
    with_teacher = teacher.requires_grad_(teacher_gradient) if ops.LOSSES[name].teacher else None
    return student, with_teacher, target[:, :-1].contiguous(), torch.rand(2, 3)


@pytest.mark.parametrize("name", OPERATORS)
def test_opcheck(name):
    check_operators(ops.FUSED, name, ["forward", "reduced", "backward", "scale_"])


@pytest.mark.parametrize("dtypes", [(BF16, F64), (F16, F32)], ids=str)
def test_opcheck_of_dtypes(dtypes):
    """The loss has another one than the student: for 16 bits, and with a teacher in float64."""
    check_operators(ops.FUSED, "dkd", ["forward", "reduced", "backward"], dtypes)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_opcheck_number_of_dimensions(dims):
    student, teacher, target, row_weight = op_inputs("dkd")
    for _ in range(3 - dims):
        student, teacher, target, row_weight = student[1], teacher[1], target[1], row_weight[1]
    inputs = (student.detach().requires_grad_(), teacher, target, row_weight)
    torch.library.opcheck(ops.FUSED.forward, ("dkd", *inputs, OPERATORS["dkd"], -100))
    args = ("dkd", *inputs, None, True, OPERATORS["dkd"], -100, True)
    torch.library.opcheck(ops.FUSED.reduced, args)


def test_opcheck_where_the_reference_differentiates():
    inputs = op_inputs("dkd", teacher_gradient=True)
    torch.library.opcheck(ops.FUSED.forward, ("dkd", *inputs, OPERATORS["dkd"], -100))
    normalizer = torch.tensor(4.0, requires_grad=True)
    args = ("dkd", *inputs, normalizer, True, OPERATORS["dkd"], -100, True)
    torch.library.opcheck(ops.FUSED.reduced, args)


def test_scale_writes_nothing_at_one():
    gradient = torch.full((3,), 2.0)
    ops.FUSED.scale_(gradient, torch.tensor(1.0))
    assert gradient.tolist() == [2.0] * 3
    ops.FUSED.scale_(gradient, torch.tensor(0.5))
    assert gradient.tolist() == [1.0] * 3


# ---- the student's gradient -----------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_any_upstream_gradient(case):
    inputs = inputs_of(case)
    upstream = upstream_of(case.rows(*inputs))
    ours, theirs = (
        evaluate(case.rows, *inputs, upstream, backend=name) for name in ("cpu", "reference")
    )
    close(ours[1], theirs[1])
    if case.outputs == 1:
        ones, scaled = (evaluate(case, *inputs, upstream.new_tensor(u))[1] for u in (1, -0.37))
        close(scaled, -0.37 * ones)
        # A sum of rows comes with an upstream gradient of stride 0.
        summed = evaluate(lambda *x: case.rows(*x).sum(), *inputs)[1]
        close(summed, evaluate(case, *inputs, reduction="sum")[1])


def test_one_output_of_several():
    case = USUAL["target_split"]
    inputs = inputs_of(case)
    for output in range(case.outputs):
        ours, theirs = (
            evaluate(lambda *x, k=output, **o: case.rows(*x, **o)[k], *inputs, backend=name)[1]
            for name in ("cpu", "reference")
        )
        close(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtype_and_layout_of_the_gradient(dtype, layout, reduction):
    student, teacher, target = make_inputs("normal", (2, 3), CLASSES, dtype)
    student, dim = LAYOUTS[layout](student)
    teacher = LAYOUTS[layout](teacher)[0]
    target = LAYOUTS[layout](target.unsqueeze(-1))[0].squeeze(dim) if dim >= 0 else target
    value, gradient = evaluate(
        kdkernels.kd_loss, student, teacher, target, dim=dim, reduction=reduction
    )
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert gradient.dtype == dtype and gradient.shape == student.shape
    assert gradient.stride() == torch.empty_like(student).stride()


def test_a_float16_gradient_is_rounded_after_the_upstream_gradient():
    # What GradScaler relies on: 1e-8 is 0 in float16, 2^20 times that is not.
    inputs = make_inputs("normal", 8, 50)
    case, scale = USUAL["kd"], 2.0**20
    student = inputs[0].half()
    truth = evaluate(case, student.double(), *inputs[1:], normalizer=1e8)[1] * scale
    ours = evaluate(case, student, *inputs[1:], torch.tensor(scale), normalizer=1e8)[1]
    torch.testing.assert_close(ours.double(), truth, rtol=2e-3, atol=1e-7)
    assert truth.abs().max() / scale < 2e-8, "as it is without the scale"


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_backward_twice(case, reduction):
    student, teacher, target = inputs_of(case)
    student.requires_grad_()
    value = case(student, teacher, target, reduction=reduction)
    upstream = upstream_of(value) if value.dim() else torch.tensor(3.0)
    (first,) = torch.autograd.grad(value, student, upstream, retain_graph=True)
    kept = first.clone()
    (second,) = torch.autograd.grad(value, student, upstream, retain_graph=True)
    (third,) = torch.autograd.grad(value, student, 2 * upstream)
    assert_same(first, kept, "the caller's gradient is left alone")
    close(second, first)
    close(third, 2 * first)
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(value, student, upstream)


def test_gradients_accumulate():
    student, teacher, target = inputs_of(SOME)
    student.requires_grad_()
    parts = [evaluate(case, student, teacher, target)[1] for case in MAIN_SCALARS]
    for case in MAIN_SCALARS:
        case(student, teacher, target).backward()
    close(student.grad, sum(parts))
    sum(case(student, teacher, target) for case in MAIN_SCALARS).backward()
    close(student.grad, 2 * sum(parts))


def test_through_a_layer():
    student, teacher, target = inputs_of(SOME)
    weights = []
    for name in ("cpu", "reference"):
        weight = torch.eye(CLASSES, dtype=torch.float64, requires_grad=True)
        loss = kdkernels.dkd_loss((student @ weight).relu(), teacher, target, backend=name)
        (-0.5 * loss).backward()
        weights.append(weight.grad)
    close(*weights)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_activation_checkpointing(reduction):
    inputs = inputs_of(SOME)

    def loss(*logits_and_target: Tensor) -> Tensor:
        return kdkernels.nkd_loss(*logits_and_target, reduction=reduction)

    def checkpointed(*logits_and_target: Tensor) -> Tensor:
        return checkpoint(loss, *logits_and_target, use_reentrant=False)

    assert_same(evaluate(checkpointed, *inputs)[1], evaluate(loss, *inputs)[1])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_loss_of_nothing_still_has_a_gradient(backend, reduction):
    """As of a schedule that begins with weights of 0: backward() must not fail, as for any loss."""
    inputs = inputs_of(SOME)
    for loss in (kdkernels.dkd_loss, kdkernels.aekt_loss):
        options = {"alpha": 0.0, "beta": 0.0, "reduction": reduction, "backend": backend}
        value, gradient = evaluate(loss, *inputs, **options)
        assert not value.any() and not gradient.any()


class GradientsMade(TorchDispatchMode):
    """Sees the gradients that come out of the operators."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func is ops.FUSED.reduced:
            self.sizes.append(out[1].numel())
        if func is ops.FUSED.backward:
            self.sizes.append(out.numel())
        return out


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients_none_is_computed(context):
    student, teacher, target = inputs_of(SOME)
    student.requires_grad_()
    for case in MAIN_CASES:
        with context(), GradientsMade() as made:
            loss = case(student, teacher, target)
        assert not loss.requires_grad and not any(made.sizes)
    with GradientsMade() as made:
        assert not kdkernels.kd_loss(student.detach(), teacher).requires_grad
    assert made.sizes == [0]
    with GradientsMade() as made:
        kdkernels.kd_loss(student, teacher).backward()
    assert made.sizes == [student.numel()], "one gradient, with the loss"


def test_logits_changed_in_place_are_noticed():
    student, teacher, _ = inputs_of(SOME)
    logits = student.requires_grad_() * 1
    rows = kdkernels.kd_loss(logits, teacher, reduction="none")
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        rows.sum().backward()


# ---- other inputs and higher derivatives ----------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_double_backward_is_the_references(case):
    results = []
    for name in ("cpu", "reference"):
        student, teacher, target = inputs_of(case)
        student.requires_grad_()
        value = case.rows(student, teacher, target, backend=name)
        upstream = upstream_of(value).requires_grad_()
        (gradient,) = torch.autograd.grad(value, student, upstream, create_graph=True)
        direction = torch.linspace(-1, 1, gradient.numel(), dtype=torch.float64)
        scalar = (gradient * direction.view_as(gradient)).sum()
        results.append([gradient, *torch.autograd.grad(scalar, (student, upstream))])
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)
    fused = evaluate(case.rows, *inputs_of(case), upstream_of(value), backend="cpu")[1]
    close(results[0][0].detach(), fused)


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_double_backward_of_a_mean(case):
    results = []
    for name in ("cpu", "reference"):
        student, teacher, target = inputs_of(case)
        student.requires_grad_()
        loss = case(student, teacher, target, backend=name)
        (gradient,) = torch.autograd.grad(loss, student, create_graph=True)
        (gradient.square().sum() + loss).backward()  # a gradient penalty, and the loss again
        results.append(student.grad)
    close(*results)


@pytest.mark.parametrize("case", PAIRS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_teacher_gradient(case, reduction):
    results = []
    for name in ("cpu", "reference"):
        student, teacher, target = inputs_of(case)
        leaves = (student.requires_grad_(), teacher.requires_grad_())
        value = case(student, teacher, target, reduction=reduction, backend=name)
        results.append(torch.autograd.grad(value, leaves, upstream_of(value)))
    for ours, theirs in zip(*results, strict=True):
        close(ours, theirs)
    assert results[0][1].abs().max() > 1e-3
    # The student's gradient is the one that comes without the teacher's.
    inputs = inputs_of(case)
    close(results[0][0], evaluate(case, *inputs, upstream_of(value), reduction=reduction)[1])


def test_only_the_teacher_is_learned():
    student, teacher, target = inputs_of(SOME)
    kdkernels.kd_loss(student, teacher.requires_grad_(), target).backward()
    _, both = torch.autograd.grad(
        kdkernels.kd_loss(student.requires_grad_(), teacher, target), (student, teacher)
    )
    close(teacher.grad, both)


def test_operators_called_directly_differentiate_every_input():
    student, teacher, target, row_weight = op_inputs("dkd")
    inputs = [x.detach().double().requires_grad_() for x in (student, teacher, row_weight)]
    normalizer = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    counted = (target != -100).sum()

    def fused(student, teacher, row_weight, normalizer):
        inputs = (student, teacher, target, row_weight)
        args = ("dkd", *inputs, normalizer, True, OPERATORS["dkd"], -100, True)
        return ops.FUSED.reduced(*args)[0]

    def plain(student, teacher, row_weight, normalizer):
        args = ("dkd", student, teacher, target, row_weight, OPERATORS["dkd"], -100)
        return reference_rows(*args).sum() / normalizer / counted

    leaves = (*inputs, normalizer)
    ours, theirs = (torch.autograd.grad(f(*leaves), leaves) for f in (fused, plain))
    for x, y in zip(ours, theirs, strict=True):
        close(x, y)


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("learned", ["row_weight", "normalizer", "both"])
def test_gradients_of_row_weight_and_normalizer(case, backend, learned):
    case = case.apart  # a mean over rows leaves out those of weight 0
    student, teacher, target = inputs_of(case)
    weight = torch.linspace(0, 2, ROWS, dtype=torch.float64)
    normalizer = torch.tensor(5.0, dtype=torch.float64)
    weight.requires_grad_(learned != "normalizer")
    normalizer.requires_grad_(learned != "row_weight")
    options = {"row_weight": weight, "normalizer": normalizer, "backend": backend}
    loss = case(student.requires_grad_(), teacher, target, **options)
    leaves = [x for x in (student, weight, normalizer) if x.requires_grad]
    of_student, *others = torch.autograd.grad(loss, leaves)

    rows = case.rows(student, teacher, target, backend=backend).detach()
    close(loss, (rows * weight).sum() / 5)
    if weight.requires_grad:
        close(others.pop(0), rows / 5)
    if normalizer.requires_grad:
        close(others.pop(0), -loss.detach() / 5)
    options = {"row_weight": weight.detach(), "normalizer": 5, "backend": backend}
    close(of_student, evaluate(case, student, teacher, target, **options)[1])


INFINITE = [case for case in MAIN_SCALARS if case.teacher and not case.bounded]


@pytest.mark.parametrize("case", INFINITE, ids=str)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_learned_weight_of_0_hides_an_infinite_loss(case, backend):
    """Of a row whose student lacks a class that the teacher has, or the other way round."""
    student, teacher, target = make_inputs("normal", ROWS, CLASSES, torch.float64)
    one = teacher if case.lacking else student
    one[1] = -math.inf
    one[1, target[1]] = 0
    weight = torch.ones(ROWS, dtype=torch.float64)
    weight[1] = 0
    options = {"row_weight": weight.requires_grad_(), "backend": backend, "reduction": "sum"}
    others = torch.arange(ROWS) != 1
    rows = case.rows(student, teacher, target, backend=backend)
    assert rows[1].isinf()
    close(case(student, teacher, target, **options).detach(), rows[others].sum())


# ---- memory and bits ------------------------------------------------------------------------


@pytest.fixture
def no_collection() -> Iterator[None]:
    """What dies here dies by its reference count."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def kept_gradient(loss: Tensor) -> StorageWeakRef:
    return StorageWeakRef(loss.grad_fn.saved_tensors[-1].untyped_storage())


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("case", [case for case in MAIN_SCALARS if case.teacher], ids=str)
def test_the_gradient_lives_no_longer_than_needed(case):
    student, teacher, target = inputs_of(case)
    student.requires_grad_()

    loss = case(student, teacher, target)
    unused = kept_gradient(loss)
    del loss
    assert unused.expired(), "a loss that is dropped takes its gradient along"

    loss = case(student, teacher, target)
    buffer = loss.grad_fn.saved_tensors[-1].data_ptr()
    held = kept_gradient(loss)
    loss.backward()
    assert student.grad.data_ptr() == buffer, "handed over, not copied"
    student.grad = None
    assert held.expired(), "a loss that is kept, for a log, does not keep it"


@pytest.mark.usefixtures("no_collection")
@pytest.mark.parametrize("create_graph", [False, True])
def test_no_reference_cycle_keeps_the_inputs(create_graph):
    for case in MAIN_CASES:
        for reduction in ("mean", "none"):
            student, teacher, target = inputs_of(case)
            student.requires_grad_()
            options = {"reduction": reduction} if case.outputs == 1 else {}
            value = case(student, teacher, target, **options).sum()
            (gradient,) = torch.autograd.grad(value, student, create_graph=create_graph)
            references = [weakref.ref(x) for x in (student, teacher, gradient)]
            del student, teacher, value, gradient
            assert [x() for x in references] == [None] * 3, (str(case), reduction)
