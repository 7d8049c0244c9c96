"""`classes`: how many of them count, of a student and a teacher that may have different numbers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    F64,
    MAIN_SCALARS,
    OPERATORS,
    WALKED,
    Case,
    make_inputs,
    needs_cpu,
)
from contracts import check_first_classes
from test_memory import COUNT, PER_ROW, peak_of_step

import kdkernels
from kdkernels import ops

# Classes that count, of the student, of the teacher.
SIZES = [(1, 3, 1), (5, 8, 10), (100, 100, 128), (1003, 1024, 1003)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("case", WALKED, ids=str)
def test_only_the_first_classes_count(
    case: Case, sizes: tuple[int, int, int], backend: str, generator: torch.Generator
) -> None:
    for dtype in (F32, BF16, F16):
        check_first_classes(case, sizes, dtype, backend, partial(iter, [backend]), generator)


@pytest.mark.parametrize("case", MAIN_SCALARS, ids=str)
def test_in_every_direction(case: Case, backend: str, generator: torch.Generator) -> None:
    """Classes elsewhere, rows of rows, causal, the teacher's gradient, a second derivative."""
    s, t, y = make_inputs("normal", (2, 3), 9, F64, generator)
    wide = [torch.cat((x, torch.full((2, 3, n), torch.nan)), -1) for x, n in ((s, 2), (t, 4))]
    for options in ({}, {"causal": True}, {"reduction": "none"}):
        given = [x.clone().requires_grad_() for x in wide]
        some = [x.clone().requires_grad_() for x in (s, t)]
        mine = given if case.teacher else given[:1]
        value = case.function(*mine, y, **case.options, **options, classes=9, backend=backend)
        other = some if case.teacher else some[:1]
        truth = case.function(*other, y, **case.options, **options, backend=backend)
        torch.testing.assert_close(value, truth)
        ours, theirs = (
            torch.autograd.grad(x.sum(), z, create_graph=True)
            for x, z in ((value, mine), (truth, other))
        )
        again = [
            torch.autograd.grad(x[0][..., :9].square().sum(), z[0])[0]
            for x, z in ((ours, mine), (theirs, other))
        ]
        for a, b in (*zip(ours, theirs, strict=True), again):
            torch.testing.assert_close(a[..., :9], b)
            assert a[..., 9:].count_nonzero() == 0
    middle = [x.movedim(-1, 1) for x in wide][: 1 + case.teacher]
    value = case.function(*middle, y, **case.options, dim=1, classes=9, backend=backend)
    torch.testing.assert_close(
        value, case.function(*[s, t][: 1 + case.teacher], y, **case.options, backend=backend)
    )


def test_transforms(backend: str) -> None:
    s, t, y = make_inputs("normal", (2, 3), 9, F64)
    wide = torch.cat((s, torch.full((2, 3, 2), torch.nan)), -1)
    call = partial(kdkernels.jsd_loss, backend=backend)
    for x in (torch.func.vmap, torch.func.grad):
        if x is torch.func.vmap:
            ours = x(partial(call, classes=9))(wide, t, y)
            torch.testing.assert_close(ours, x(call)(s, t, y))
        else:
            ours = x(partial(call, classes=9))(wide, t, y)
            torch.testing.assert_close(ours[..., :9], x(call)(s, t, y))
            assert ours[..., 9:].count_nonzero() == 0
    _, ours = torch.func.jvp(
        lambda x: call(x, t, y, classes=9), (wide,), (torch.full_like(wide, 0.5).cumsum(-1),)
    )
    _, truth = torch.func.jvp(lambda x: call(x, t, y), (s,), (torch.full_like(s, 0.5).cumsum(-1),))
    torch.testing.assert_close(ours, truth)


@needs_cpu
def test_operators() -> None:
    inputs = make_inputs("normal", 3, 9, F64)
    student = torch.cat((inputs[0], torch.ones(3, 2)), -1).requires_grad_()
    args = ("kd", student, inputs[1], inputs[2], None)
    torch.library.opcheck(ops.FUSED.forward, (*args, OPERATORS["kd"], -100, False, 9))
    torch.library.opcheck(
        ops.FUSED.reduced, (*args, None, True, OPERATORS["kd"], -100, True, False, 9)
    )
    for classes, words in ((-1, "classes: got -1"), (12, "classes: got 12"), (10, "teacher: must")):
        with pytest.raises(RuntimeError, match=words):
            ops.FUSED.forward(*args, OPERATORS["kd"], -100, False, classes)


@needs_cpu
@pytest.mark.parametrize("loss", [kdkernels.kd_loss, kdkernels.jsd_loss])
def test_no_second_gradient(loss, generator: torch.Generator) -> None:
    """A slice's backward would take one more."""
    student, teacher, _ = make_inputs("normal", (8, 40), 1003, generator=generator)
    target = torch.zeros(8, 40).long()
    peak = peak_of_step(loss, student, teacher[..., :990], target, classes=980)
    assert peak <= student.nbytes + COUNT * PER_ROW
    sliced = peak_of_step(lambda x, *others: loss(x[..., :990], *others), student,
                          teacher[..., :990], target)  # fmt: skip
    assert sliced > 1.9 * student.nbytes


def test_compiled(backend: str) -> None:
    student, teacher, target = make_inputs("normal", 4, 9)
    wide = torch.cat((student, torch.full((4, 2), torch.nan)), -1).requires_grad_()
    call = partial(kdkernels.kd_loss, classes=9, backend=backend)
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for function in (call, compiled):
        wide.grad = None
        value = function(wide, teacher, target)
        value.backward()
        torch.testing.assert_close(value, kdkernels.kd_loss(student, teacher, target))
        assert wide.grad[:, 9:].count_nonzero() == 0 and wide.grad.any()


def test_labels_as_probabilities(backend: str) -> None:
    """Of the student's shape; those of classes that do not count do not either."""
    student, teacher, target = make_inputs("normal", 4, 9)
    labels = torch.nn.functional.one_hot(target, 11).float()
    labels[:, 10] = 2.0
    wide = torch.cat((student, torch.zeros(4, 2)), -1)
    value = kdkernels.nkd_loss(wide, teacher, labels, classes=9, backend=backend)
    torch.testing.assert_close(value, kdkernels.nkd_loss(student, teacher, target, backend=backend))


@pytest.mark.parametrize(
    ("classes", "error", "words"),
    [
        (0, ValueError, "classes: got 0; must be at least 1, or None"),
        (True, TypeError, "classes: got bool; must be an integer"),
        (9.0, TypeError, "classes: got float; must be an integer"),
        (12, ValueError, "classes: got 12; student has 11"),
        (10, ValueError, "classes: got 10; teacher has 9"),
        (None, ValueError, "teacher: got shape (4, 9); must be (4, 11)"),
    ],
)
def test_refusals(classes, error, words) -> None:
    import re

    student, teacher, target = torch.zeros(4, 11), torch.zeros(4, 9), torch.zeros(4).long()
    with pytest.raises(error, match=re.escape(words)):
        kdkernels.kd_loss(student, teacher, target, classes=classes)


def test_targets_are_among_those_that_count(backend: str) -> None:
    student, teacher = torch.zeros(4, 11), torch.zeros(4, 9)
    with pytest.raises(ValueError, match="target: got class 7; must be from 0 to 6"):
        kdkernels.dkd_loss(student, teacher, torch.full((4,), 7), classes=7, backend=backend)
