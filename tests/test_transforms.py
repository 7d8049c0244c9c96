"""Differentiation beyond backward(): torch.func, forward mode, vmap, and all of them composed.

Truth is the same transform of the reference in float64, and finite differences.
"""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import F32, F64, MAIN_CASES, MAIN_SCALARS, SOME, Case, make_inputs, needs_cpu
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.utils._pytree import tree_leaves

import kdkernels
from kdkernels import backend, ops, tensors

pytestmark = needs_cpu

ROWS, CLASSES = 4, 6
BACKENDS = ["cpu", "reference"]


def close(ours: Any, theirs: Any, what: str = "") -> None:
    ours, theirs = tree_leaves(ours), tree_leaves(theirs)
    assert len(ours) == len(theirs) > 0
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-10, msg=lambda m: f"{what}: {m}")


def inputs_of(generator: torch.Generator, rows: Any = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    return make_inputs("normal", rows, CLASSES, F64, generator, ignored=0.2)


def rows_of(case: Case, target: Tensor, name: str | None, weighted: bool) -> Callable[..., Tensor]:
    """(student, teacher, row_weight) -> losses of the rows."""

    def rows(student: Tensor, teacher: Tensor, row_weight: Tensor | None = None) -> Tensor:
        options = {"row_weight": row_weight} if weighted else {}
        return case.rows(student, teacher, target, backend=name, **options)

    return rows


# None: forward mode over forward mode is not for the kernels, who refuse it by their name.
def backends_of(transform: str) -> list[str | None]:
    return [None if transform == "forward over forward" else "cpu", "reference"]


# Each takes a function of (student, teacher), and these; a step in each; and makes it a number.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, s, t, ds, dt: grad(lambda *x: f(*x).sum(), argnums=(0, 1))(s, t),
    "vjp": lambda f, s, t, ds, dt: vjp(f, s, t)[1](f(s, t).detach() * 1.5 - 1),
    "jvp": lambda f, s, t, ds, dt: jvp(f, (s, t), (ds, dt)),
    "jvp of one": lambda f, s, t, ds, dt: jvp(lambda x: f(x, t), (s,), (ds,)),
    "jacrev": lambda f, s, t, ds, dt: jacrev(f, argnums=(0, 1))(s, t),
    "jacfwd": lambda f, s, t, ds, dt: jacfwd(f, argnums=(0, 1))(s, t),
    "hessian": lambda f, s, t, ds, dt: hessian(lambda *x: f(*x).sum(), argnums=(0, 1))(s, t),
    "reverse over reverse": lambda f, s, t, ds, dt: jacrev(jacrev(f), argnums=1)(s, t),
    "reverse over forward": lambda f, s, t, ds, dt: jacrev(lambda x: jvp(f, (x, t), (ds, dt))[1])(
        s
    ),
    "forward over forward": lambda f, s, t, ds, dt: jvp(
        lambda x: jvp(lambda x: f(x, t), (x,), (ds,))[1], (s,), (ds,)
    ),
    "penalty": lambda f, s, t, ds, dt: grad(
        lambda x: grad(lambda x: f(x, t).sum())(x).square().sum()
    )(s),
    "vmap": lambda f, s, t, ds, dt: vmap(f)(torch.stack([s, ds]), torch.stack([t, dt])),
    "vmap of one": lambda f, s, t, ds, dt: vmap(f, in_dims=(1, None))(torch.stack([s, ds], 1), t),
    "vmap of two": lambda f, s, t, ds, dt: vmap(vmap(f, in_dims=(None, 0)), in_dims=(0, None))(
        torch.stack([s, ds]), torch.stack([t, dt, s])
    ),
    "gradient of each": lambda f, s, t, ds, dt: vmap(grad(lambda *x: f(*x).sum()))(
        torch.stack([s, ds]), torch.stack([t, dt])
    ),
    "through vmap": lambda f, s, t, ds, dt: grad(lambda x: vmap(f)(x, x.flip(0) * 2).sum())(
        torch.stack([s, ds])
    ),
}


@pytest.mark.filterwarnings("ignore:kdkernels")
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_transforms_are_those_of_the_reference(case, generator):
    student, teacher, target = inputs_of(generator)
    steps = [torch.randn(student.shape, dtype=F64, generator=generator) for _ in range(2)]
    weighted = case.outputs == 1
    weight = torch.rand(ROWS, dtype=F64, generator=generator)
    for name, transform in TRANSFORMS.items():
        ours, theirs = (
            transform(rows_of(case.apart, target, x, False), student, teacher, *steps)
            for x in backends_of(name)
        )
        close(ours, theirs, name)
        if weighted and name in ("jvp", "gradient of each", "hessian"):
            # The weights in the teacher's place.
            ours, theirs = (
                transform(
                    lambda s, w, x=x: rows_of(case.apart, target, x, True)(s, teacher, w),
                    student,
                    *(
                        (weight, steps[0], weight + 1)
                        if name == "jvp"
                        else (weight, student * 2, weight * 2)
                    ),
                )
                for x in BACKENDS
            )
            close(ours, theirs, f"{name} with weights")


@pytest.mark.filterwarnings("ignore:kdkernels")
@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_transforms_of_a_mean(case, generator):
    student, teacher, target = inputs_of(generator)
    step = torch.randn(student.shape, dtype=F64, generator=generator)
    for name in ("grad", "jvp of one", "jacfwd", "jacrev", "vmap", "gradient of each", "penalty"):
        ours, theirs = (
            TRANSFORMS[name](
                lambda s, t, x=x: case(s, t, target, backend=x), student, teacher, step, step
            )
            for x in BACKENDS
        )
        close(ours, theirs, name)


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_gradients_of_samples(case, generator):
    """One row each, targets mapped along; as a loop would have them."""
    case = case.apart
    student, teacher, target = inputs_of(generator)

    def loss(s: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return case(s, t, y, reduction="sum")

    found = vmap(grad(loss))(student, teacher, target)
    each = [grad(loss)(*x) for x in zip(student, teacher, target, strict=True)]
    close(found, torch.stack(each))
    assert found[target != -100].abs().amax(1).min() > 0


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("case", MAIN_CASES, ids=str)
def test_gradcheck_in_both_modes(case, name, generator):
    student, teacher, target = inputs_of(generator)
    if case.facts.held(case.all_options):
        case = case.having(variant="ratio_coupled_tckd") if case.loss == "aekt" else case
    if case.facts.held(case.all_options):
        pytest.skip("a factor is held constant, which finite differences do not know")
    leaves = [student.requires_grad_(), teacher.requires_grad_()][: 2 if case.teacher else 1]

    def rows(student: Tensor, teacher: Tensor | None = None) -> Tensor:
        return case.rows(student, teacher, target, backend=name)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for fast in (True, False) if name == "cpu" and case.loss == "dkd" else (True,):
            torch.autograd.gradcheck(
                rows,
                leaves,
                check_forward_ad=True,
                check_batched_grad=not fast,
                check_batched_forward_grad=not fast,
                fast_mode=fast,
            )
        torch.autograd.gradgradcheck(rows, leaves, check_fwd_over_rev=True, fast_mode=True)


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_batched_upstream_gradients(case, reduction, generator):
    student, teacher, target = inputs_of(generator)
    student.requires_grad_()
    value = case(student, teacher, target, reduction=reduction)
    upstream = torch.randn((3, *value.shape), dtype=F64, generator=generator)
    (batched,) = torch.autograd.grad(
        value, student, upstream, is_grads_batched=True, retain_graph=True
    )
    each = [torch.autograd.grad(value, student, u, retain_graph=True)[0] for u in upstream]
    close(batched, torch.stack(each))


def test_plain_forward_mode(generator):
    student, teacher, target = inputs_of(generator)
    step = torch.randn(student.shape, dtype=F64, generator=generator)
    for case in MAIN_CASES:
        tangents = []
        for name in BACKENDS:
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(student, step)
                value = case.rows(dual, teacher, target, backend=name)
                tangents.append(forward_ad.unpack_dual(value).tangent)
        close(*tangents)


def test_ensembles_of_students_are_trained(generator):
    """A student that requires a gradient keeps it under vmap, beside another loss."""
    students = torch.randn(3, ROWS, CLASSES, dtype=F64, generator=generator, requires_grad=True)
    teachers = torch.randn(3, ROWS, CLASSES, dtype=F64, generator=generator)
    losses = vmap(lambda s, t: kdkernels.kd_loss(s, t, temperature=2.0))(students, teachers)
    (losses.sum() + 0 * students.sum()).backward()
    each = [
        grad(lambda s, t=t: kdkernels.kd_loss(s, t, temperature=2.0))(s.detach())
        for s, t in zip(students, teachers, strict=True)
    ]
    close(students.grad, torch.stack(each))
    assert students.grad.abs().max() > 0.1


def test_a_model_in_functional_calls(generator):
    model = torch.nn.Linear(3, CLASSES, dtype=F64)
    x = torch.randn(ROWS, 3, dtype=F64, generator=generator)
    _, teacher, target = inputs_of(generator)
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        logits = functional_call(model, parameters, (x,))
        return kdkernels.dkd_loss(logits, teacher, target)

    found = grad(loss)({k: v.detach() for k, v in parameters.items()})
    loss(parameters).backward()
    close(found, {k: v.grad for k, v in parameters.items()})


@pytest.mark.parametrize("name", BACKENDS)
def test_a_teacher_made_from_the_student(name, generator):
    """Its derivative is not counted twice, by the losses and by the operators."""
    student, _, target = inputs_of(generator)
    params = torch.tensor(SOME.operator[1], dtype=F64)

    def of_losses(s: Tensor) -> Tensor:
        return SOME.rows(s, s.flip(1).square(), target, backend=name)

    def of_operators(s: Tensor) -> Tensor:
        return ops.FUSED.forward("dkd", s, s.flip(1).square(), target, None, params, -100)[0]

    def plain(s: Tensor) -> Tensor:
        return tensors.reference_rows("dkd", s, s.flip(1).square(), target, None, params, -100)

    direction = torch.randn(student.shape, dtype=F64, generator=generator)
    results = []
    for function in (of_losses, of_operators, plain):
        leaf = student.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf).sum(), leaf, create_graph=True)
        results.append((first, *torch.autograd.grad((first * direction).sum(), leaf)))
    close(results[0], results[2])
    close(results[1], results[2])


def test_the_kernels_give_the_student_s_derivatives_under_transforms(monkeypatch, generator):
    """Not the reference, which would be right and slow."""
    student, teacher, target = inputs_of(generator)

    def refuse(*_: Any) -> None:
        raise AssertionError("the reference ran")

    monkeypatch.setattr("kdkernels.autograd.reference_rows", refuse)
    loss = lambda s: kdkernels.dkd_loss(s, teacher, target)  # noqa: E731
    grad(loss)(student)
    jvp(loss, (student,), (teacher,))
    jacrev(loss)(student)
    jacfwd(loss)(student)
    vmap(grad(lambda s, t, y: kdkernels.dkd_loss(s, t, y)))(student, teacher, target)


def test_forward_over_forward_warns_once(monkeypatch, generator):
    student, teacher, target = inputs_of(generator)
    monkeypatch.setattr(backend, "_warned", set())
    with pytest.warns(RuntimeWarning, match="forward mode over forward mode") as caught:
        for _ in range(2):
            jacfwd(jacfwd(lambda s: kdkernels.dkd_loss(s, teacher, target)))(student)
    assert len(caught) == 1
    with pytest.raises(RuntimeError, match="backend: got 'cpu', which cannot compute forward mode"):
        jacfwd(jacfwd(lambda s: kdkernels.dkd_loss(s, teacher, target, backend="cpu")))(student)


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_second_derivatives_where_the_first_is_0(case, generator):
    """A student that is its teacher, and constant logits: in every order of the two modes."""
    student, _, target = inputs_of(generator)
    for logits in (student, torch.zeros_like(student)):

        def loss(s: Tensor, x: str | None = None, t: Tensor = logits) -> Tensor:
            return case.apart(s, t, target, reduction="sum", backend=x)

        truth = jacrev(jacrev(lambda s: loss(s, "reference")))(logits)
        for order in (jacrev, jacfwd):
            close(order(jacrev(loss))(logits), truth)
        close(jacrev(jacfwd(loss))(logits), truth)


def test_one_row(generator):
    """Mapped upstream gradients of a single row."""
    student, teacher, target = inputs_of(generator, 1)
    target.zero_()
    for case in MAIN_CASES:
        ours, theirs = (
            jacrev(lambda s, x=x, case=case: case.rows(s, teacher, target, backend=x))(student)
            for x in BACKENDS
        )
        close(ours, theirs)


def test_operators_called_directly_are_right_or_refused(generator):
    student, teacher, target = inputs_of(generator)
    params = torch.tensor(SOME.operator[1], dtype=F64)

    def reduced(s: Tensor) -> Tensor:
        return ops.FUSED.reduced("dkd", s, teacher, target, None, None, True, params, -100, False)[
            0
        ]

    with pytest.raises(RuntimeError, match=r"torch\.func does not see into operators"):
        grad(reduced)(student)
    with forward_ad.dual_level():
        value = reduced(forward_ad.make_dual(student, teacher))
        tangent = forward_ad.unpack_dual(value).tangent
    close(tangent, (grad(lambda s: SOME(s, teacher, target))(student) * teacher).sum())
    student.requires_grad_()
    rows, stats, _ = ops.FUSED.forward("dkd", student, teacher, target, None, params, -100)
    upstream = torch.randn(rows.shape, dtype=F64, generator=generator).requires_grad_()
    again = ops.FUSED.backward("dkd", upstream, student, teacher, target, None, stats, params, -100)
    (once,) = torch.autograd.grad(rows, student, upstream, create_graph=True)
    twice = [torch.autograd.grad(x.square().sum(), (student, upstream)) for x in (again, once)]
    close(*twice)


@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_learned_temperatures_and_weights(dtype, generator):
    """0-d tensors get their gradients, in every mode; the student's stays the kernels'."""
    student, teacher, target = make_inputs("normal", ROWS, CLASSES, dtype, generator)
    numbers = {"temperature": 2.0, "kd_weight": 0.7, "ce_weight": 0.3, "label_smoothing": 0.1}
    for loss, own in (
        ("kd", {}),
        ("dkd", {"alpha": 0.9, "beta": 2.0}),
        ("nkd", {"gamma": 1.2}),
        ("aekt", {"alpha": 0.9, "beta": 2.0}),
        ("tf_nkd", {}),
    ):
        names = {**numbers, **own}
        if loss == "tf_nkd":
            del names["temperature"]
        found = []
        for name in BACKENDS:
            leaves = {k: torch.tensor(v, dtype=F64, requires_grad=True) for k, v in names.items()}
            leaf = student.clone().requires_grad_()
            value = Case(loss, leaves)(leaf, teacher, target, backend=name)
            found.append(torch.autograd.grad(value, [leaf, *leaves.values()]))
            assert all(x.abs().max() > 1e-5 for x in found[-1]), loss
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(
                ours,
                theirs,
                rtol=1e-4 if dtype == F32 else 1e-8,
                atol=1e-5 if dtype == F32 else 1e-10,
            )
        as_numbers = Case(loss, names)(student, teacher, target)
        torch.testing.assert_close(as_numbers, value.detach(), rtol=1e-5, atol=1e-6)


def test_temperatures_that_are_mapped(generator):
    student, teacher, target = inputs_of(generator)
    temperatures = torch.tensor([0.5, 2.0, 40.0], dtype=F64)
    for loss in ("kd", "aekt"):
        case = lambda t, x=loss: Case(x, {"temperature": t})(student, teacher, target)  # noqa: E731
        close(vmap(case)(temperatures), torch.stack([case(t) for t in temperatures]))
        close(vmap(grad(case))(temperatures), torch.stack([grad(case)(t) for t in temperatures]))
