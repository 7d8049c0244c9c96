"""What the kernels of every backend keep to, in all their variants, such as a planner's regimes.

Each check takes a variant after the other from `variants()`, and the backend by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import product

import pytest
import torch
from cases import (
    BF16,
    F16,
    F32,
    IGNORED,
    INF,
    ISAS,
    OPERATORS,
    SOME,
    USUAL,
    Case,
    as_params,
    assert_same,
    assert_within,
    evaluate,
    gradient_tolerance,
    loss_dtype,
    make_inputs,
    value_tolerance,
)
from torch import Tensor

from kdkernels import ops
from kdkernels.arguments import WEIGHTS
from kdkernels.reference import LOSSES as REFERENCE

# ---- values and gradients -------------------------------------------------------------------

KINDS = ("normal", "masked", "offset", "huge", "one_hot", "constant")
Variants = Callable[[], Iterator[str]]  # sets a variant up, yields its name, for all of them


def check_rows(
    case: Case,
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    generator: torch.Generator,
    dim: int = -1,
    backend: str = "cpu",
    variants: Variants | None = None,
) -> Tensor:
    """Reduction none under a random upstream gradient and row weights, on every variant of a
    backend: instruction sets of the CPU kernels unless others are given."""
    dtype = loss_dtype(student, teacher if case.teacher else None)
    shape = target.shape if case.outputs == 1 else (case.outputs, *target.shape)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    common: dict = {"dim": dim}
    weight = torch.ones(target.shape)
    if case.outputs == 1:
        weight = common["row_weight"] = 2 * torch.rand(target.shape, generator=generator)
    inputs = (student, teacher, target)
    exact = (student.double(), teacher.double(), target)
    truth, truth_gradient = evaluate(case.rows, *exact, upstream, backend="reference", **common)
    eager, eager_gradient = evaluate(case.rows, *inputs, upstream, backend="reference", **common)

    class_last = [x.movedim(dim, -1) for x in (student, teacher)]
    tolerance = weight * value_tolerance(case, truth / weight, *class_last, dtype)
    gradient_allowed = gradient_tolerance(
        case, truth_gradient.movedim(dim, -1), *class_last, target, weight * upstream, dtype
    ).movedim(-1, dim)
    gradient_allowed += interpreted(backend, truth_gradient, student)
    for variant in (variants or each_isa)():
        ours, gradient = evaluate(case.rows, *inputs, upstream, backend=backend, **common)
        assert ours.dtype == dtype and gradient.dtype == student.dtype
        assert_within(ours, truth, eager, tolerance, f"value, {variant}")
        allowed = (truth_gradient, eager_gradient, gradient_allowed)
        assert_within(gradient, *allowed, f"gradient, {variant}")
    return gradient


def interpreted(backend: str | None, gradient: Tensor, student: Tensor) -> Tensor | float:
    """Some of Triton's interpreters truncate to bfloat16: twice the error of rounding."""
    if backend != "triton" or student.dtype != BF16 or student.device.type != "cpu":
        return 0.0
    return 0.51 * torch.finfo(BF16).eps * gradient.abs()


def each_isa() -> Iterator[str]:
    """What the `isa` fixture does, within a test: the truth is computed once for all of them."""
    with pytest.MonkeyPatch.context() as patch:
        for isa in ISAS:
            patch.setenv("KDKERNELS_CPU_ISA", isa)
            yield isa


Reduction = tuple[str, float | None]  # and a normalizer
REDUCTIONS: list[Reduction] = [
    ("mean", None), ("sum", None), ("batchmean", None), ("mean", 7.5), ("sum", 0.5),
]  # fmt: skip


def divisor(reduction: str, target: Tensor, normalizer: float | None) -> float:
    if normalizer is not None:
        return normalizer
    counted = int((target != IGNORED).sum())
    return {"mean": max(counted, 1), "sum": 1, "batchmean": target.shape[0]}[reduction]


def check_reduction(
    case: Case,
    how: Reduction,
    inputs: tuple[Tensor, Tensor, Tensor],
    generator: torch.Generator,
    weighted: bool = True,
    backend: str = "cpu",
    variants: Variants | None = None,
) -> None:
    """The truth is summed here, from the reference's rows and one random upstream scalar.

    weighted: with row weights, a few of them 0.
    """
    student, teacher, target = inputs
    reduction, normalizer = how
    dtype = loss_dtype(student, teacher if case.teacher else None)
    weight = torch.ones(target.shape)
    common: dict = {}
    if weighted:
        weight = 2 * torch.rand(target.shape, generator=generator)
        weight = common["row_weight"] = torch.where(weight < 0.3, 0.0, weight)
    upstream = torch.randn((), generator=generator).to(dtype)
    per_row = (weight / divisor(reduction, target, normalizer)).double()

    exact = (student.double(), teacher.double(), target)
    rows, _ = evaluate(case.rows, *exact, backend="reference", **common)
    of_rows = upstream * per_row / weight.clamp(min=1e-9)
    _, truth_gradient = evaluate(case.rows, *exact, of_rows, backend="reference", **common)
    rows = rows / weight.clamp(min=1e-9)
    truth = (rows * per_row).sum()
    common |= {"reduction": reduction, "normalizer": normalizer}
    eager, eager_gradient = evaluate(case, *inputs, upstream, backend="reference", **common)
    tolerance = (value_tolerance(case, rows, student, teacher, dtype) * per_row).sum()
    allowed = gradient_tolerance(
        case, truth_gradient, student, teacher, target, upstream * per_row, dtype
    )
    # Rounded once in the sweep, and again when the upstream gradient has multiplied it.
    allowed += 0.51 * torch.finfo(student.dtype).eps * truth_gradient.abs()
    allowed += 2 * interpreted(backend, truth_gradient, student)
    for variant in (variants or each_isa)():
        ours, gradient = evaluate(case, *inputs, upstream, backend=backend, **common)
        assert ours.dtype == dtype and ours.shape == ()
        assert_within(ours, truth, eager, tolerance, f"value, {variant}")
        within = (truth_gradient, eager_gradient, allowed)
        assert_within(gradient, *within, f"gradient, {variant}")


# ---- numbers of each row ----------------------------------------------------------------------

# From where each is drawn.
RANGES = {"temperature": (0.5, 5.0), "teacher_temperature": (0.5, 5.0), "gamma": (0.0, 3.0)}


def numbers_of(case: Case, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
    """Of every number that a loss has of its own, one for each of 5 rows or more."""
    choices = ("t_squared", "detach_mixture", "log_ratio_max", *WEIGHTS)
    facts = REFERENCE[case.loss]
    names = [x for x in facts.params if x not in (*choices, *facts.choices)]
    found: dict[str, Tensor] = {}
    for name in names:
        low, high = RANGES.get(name, (0.0, 1.0))
        found[name] = low + (high - low) * torch.rand(shape, generator=generator)
        of_row = found[name].view(-1)
        if low == 0.0:  # what is switched off in one row is not in the next
            of_row[0], of_row[-1] = 0.0, 1.0
            of_row[2 + len(found) % 2] = 0.0  # and one number alone
        else:
            of_row[1] = 40.0  # computed in float64
            of_row[2] = 1.5  # of student and teacher alike
    return found


def check_numbers_of_rows(
    case: Case,
    inputs: tuple[Tensor, Tensor, Tensor],
    own: dict[str, Tensor],
    generator: torch.Generator,
    backend: str | None,
    variants: Variants,
    placed: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """Each row against a call of its own, with plain numbers, in float64: under a random upstream
    gradient and row weights, and a mean. placed: puts a tensor where the backend wants it."""
    student, teacher, target = inputs
    rows, scalar = target.shape[0], case.outputs == 1
    dtype = loss_dtype(student, teacher if case.teacher else None)
    options: dict = {"ce_weight": 0.7} if case.facts.weights and scalar else {}
    weight = torch.ones(rows, dtype=dtype)
    if scalar:
        weight = 0.1 + 2 * torch.rand(rows, generator=generator).to(dtype)
        weight[rows // 2] = 0.0
    shape = (rows,) if scalar else (case.outputs, rows)
    upstream = torch.randn(shape, generator=generator).to(dtype)
    found = []
    for i in range(rows):
        plain = case.having(**{name: x[i].item() for name, x in own.items()}, **options)
        mine = [x[i : i + 1] for x in inputs]
        given = weight[i].double() * upstream[..., i : i + 1]
        exact = (*(x.double() for x in mine[:2]), mine[2])
        truth, gradient = evaluate(plain.rows, *exact, given, backend="reference")
        eager, eager_gradient = evaluate(plain.rows, *mine, given, backend="reference")
        tolerance = value_tolerance(plain, truth, *mine[:2], dtype)
        allowed = gradient_tolerance(plain, gradient, *mine, given, dtype)
        values = [weight[i] * x for x in (truth, eager, tolerance)]
        found.append([*values, gradient, eager_gradient, allowed])
    joined = [torch.cat(x, -1) for x in list(zip(*found, strict=True))[:3]]
    of_gradient = [torch.cat(x) for x in list(zip(*found, strict=True))[3:]]
    moved = [placed(x) for x in inputs]
    of_gradient[2] += interpreted(backend, of_gradient[0], moved[0])
    of_rows = case.having(**{name: placed(x) for name, x in own.items()}, **options)
    common: dict = {"backend": backend}
    if scalar:
        common["row_weight"] = placed(weight)
    u, counted = 0.75, max(int((target != IGNORED).sum()), 1)
    per_row = (u / counted / upstream).unsqueeze(-1)
    for variant in variants():
        ours, gradient = evaluate(of_rows.rows, *moved, placed(upstream), **common)
        assert_within(ours.cpu(), *joined, f"value, {variant}")
        assert_within(gradient.cpu(), *of_gradient, f"gradient, {variant}")
        if scalar:
            ours, gradient = evaluate(of_rows, *moved, placed(torch.tensor(u)), **common)
            assert_within(ours.cpu(), *(x.sum() / counted for x in joined), f"mean, {variant}")
            truth, eager, allowed = (x * per_row for x in of_gradient)
            allowed = allowed.abs() + 0.51 * torch.finfo(student.dtype).eps * truth.abs()
            allowed += interpreted(backend, truth, moved[0])
            assert_within(gradient.cpu(), truth, eager, allowed, f"gradient of it, {variant}")


def check_temperatures_that_are_none(
    operators: ops.Operators,
    variants: Variants,
    placed: Callable[[Tensor], Tensor] = lambda x: x,
) -> None:
    """On a device nobody looks at them before the kernels do: their rows are NaN, no other is, and
    what is not read is 0.
    """
    bad = torch.tensor([2.0, math.nan, 0.0, -3.0, 40.0, -INF, math.nan]).double()
    student, teacher, target = (placed(x) for x in make_inputs("normal", 7, 70, F32))
    target[6] = IGNORED
    for name in ("kd", "jsd", "ab"):
        params = placed(OPERATORS[name].repeat(7, 1))
        params[:, 0] = placed(bad)
        params[4, -1] = 1.0  # at its end a mixture is another loss
        for _ in variants():
            inputs = (student, teacher, target, None)
            how = (params, IGNORED)
            rows, stats, _ = operators.forward(name, *inputs, *how)
            gradient = operators.backward(name, torch.ones_like(rows), *inputs, stats, *how)
            total, at_once, _ = operators.reduced(name, *inputs, None, False, *how, True)
            is_none = torch.tensor([0, 1, 1, 1, 0, 1, 0]).bool()
            assert total.isnan() and torch.equal(rows.isnan().cpu(), is_none)
            for x in gradient.cpu(), at_once.cpu():
                assert torch.equal(x.isnan(), is_none[:, None].expand(7, 70))
                assert not x[6].any() and x[0].any() and x[4].any()
            assert rows[6] == 0


# ---- rows that do not count, numbers that are none ------------------------------------------


def check_that_rows_that_do_not_count_are_not_read(
    case: Case, generator: torch.Generator, backend: str, variants: Variants
) -> None:
    """Ignored rows, and rows of weight 0, full of NaN."""
    student, teacher, target = make_inputs("normal", 4, 70, F32, generator)
    dead = torch.tensor([0, 1, 0, 1]).bool()
    target[3] = IGNORED
    student[dead] = teacher[dead] = math.nan
    common: dict = {"backend": backend}
    if case.outputs == 1:
        common["row_weight"] = torch.tensor([1.0, 0.0, 2.0, 1.0])
    else:
        target[1] = IGNORED
    for _ in variants():
        for call in (case.rows, case)[: 2 if case.outputs == 1 else 1]:
            value, gradient = evaluate(call, student, teacher, target, **common)
            assert value.isfinite().all()
            assert value.dim() == 0 or not value[..., dead].any()
            assert not gradient[dead].any()
            assert gradient.isfinite().all() and gradient[~dead].any(-1).all()


def check_that_nan_stays_in_its_row(
    case: Case, generator: torch.Generator, backend: str, variants: Variants, at: int = 50
) -> None:
    case = case.apart
    clean = make_inputs("normal", 3, 70, F32, generator)
    others = torch.arange(3) != 2
    for _ in variants():
        good = evaluate(case.rows, *clean, backend=backend)
        for which in range(1 + case.teacher):
            dirty = [x.clone() for x in clean]
            dirty[which][2, at] = math.nan
            value, gradient = evaluate(case.rows, *dirty, backend=backend)
            assert value[..., 2].isnan().any() and gradient[2].isnan().any()
            assert_same(value[..., others], good[0][..., others])
            assert_same(gradient[others], good[1][others])


def check_that_nan_wins(
    case: Case, classes: int, backend: str, variants: Variants, step: int = 1
) -> None:
    """NaN at the target (class 2) or at another class (the last one), of student or teacher; and
    the target, or all other classes, of student, teacher or both at -inf.

    step: more than 1 where rows are slow: one of so many of these, and only once.
    """
    hot = torch.arange(classes) == 2
    rows = list(product((0, 1)[: 1 + case.teacher], (2, -1), *[(False, True)] * 4))[::step]
    logits = make_inputs("normal", len(rows), classes, F32)[:2]
    for i, (tensor, at, *masks) in enumerate(rows):
        for mask, (x, where) in zip(masks, product(logits, (hot, ~hot)), strict=True):
            x[i, where & torch.tensor(mask)] = -INF
        logits[tensor][i, at] = math.nan
    target = torch.full((len(rows),), 2)
    off = dict.fromkeys({"alpha", "beta", "gamma"} & set(case.options), 0.0)
    for _ in variants():
        for x in (case, case.having(**off), case.having(**off, ce_weight=0.0))[
            : 3 if off and step == 1 else 1
        ]:
            assert x.rows(*logits, target, backend=backend).isnan().all()
        if step == 1 and not case.facts.target:
            no_ce = case.having(ce_weight=0.0)
            assert no_ce.rows(*logits, None, backend=backend).isnan().all()


def check_that_a_bad_target_makes_its_row_nan(
    case: Case, generator: torch.Generator, backend: str, variants: Variants, bad: int
) -> None:
    """What happens on a GPU, where nobody looks at targets before the kernel does."""
    case = case.apart
    student, teacher, target = make_inputs("normal", 3, 70, F32, generator)
    others = torch.arange(3) != 2
    wrong = torch.where(others, target, bad)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kdkernels.arguments.checks_targets", lambda _: False)
        for _ in variants():
            value, gradient = evaluate(case.rows, student, teacher, wrong, backend=backend)
            good = evaluate(case.rows, student, teacher, target, backend=backend)
            assert value[..., 2].isnan().all() and gradient[2].isnan().all()
            assert_same(value[..., others], good[0][..., others])
            assert_same(gradient[others], good[1][others])


EXTREME_TEMPERATURES = (1e-4, 1e4)  # all that the functions take lies between


def check_that_extreme_temperatures_give_numbers(
    case: Case, temperature: float, classes: int, backend: str, variants: Variants
) -> None:
    if "temperature" not in case.options:
        return
    case = case.having(temperature=temperature)
    for _ in variants():
        for kind in ("normal", "huge", "masked_lowest"):
            student, teacher, target = make_inputs(kind, 3, classes)
            if kind == "masked_lowest":  # in both: what one alone masks costs 3e38 T
                teacher = torch.where(student < -1e30, student, teacher.clamp(min=-10.0))
                target = student.argmax(-1)
            value, gradient = evaluate(case.rows, student, teacher, target, backend=backend)
            assert value.isfinite().all() and gradient.isfinite().all()
        agree_with_reference(case, *make_inputs("normal", 3, classes), backend)


# Of a mixture, by the option that has them.
END_SHARES = [1e-30, 1e-8, 1e-4, 1 - 1e-6, 1 - 1e-8]
SHARE_OF = {"jsd": "beta", "skew_kl": "alpha", "skew_reverse_kl": "alpha"}


def check_shares_near_the_ends(
    loss: str, share: float, backend: str, variants: Variants, generator: torch.Generator
) -> None:
    """Of rows in which either tensor lacks classes: the logarithm of the share is the loss then."""
    case = USUAL[loss].having(**{SHARE_OF[loss]: share})
    student, teacher, target = make_inputs("normal", 6, 40, generator=generator)
    student[1:, 3] = student[2, 5] = teacher[2:, 7] = teacher[3, 5] = -INF
    exact = (student.double(), teacher.double(), target)
    truth, truth_gradient = evaluate(case.rows, *exact, backend="reference")
    assert truth.isfinite().all() and truth_gradient.isfinite().all()
    largest = truth_gradient.abs().amax(-1, keepdim=True).expand_as(truth_gradient)
    for variant in variants():
        value, gradient = evaluate(case.rows, student, teacher, target, backend=backend)
        assert_within(value, truth, truth, 1e-4 * truth + 1e-12, f"value, {variant}")
        assert_within(gradient, truth_gradient, truth_gradient, 1e-4 * largest + 1e-12, variant)


def check_first_classes(
    case: Case, sizes: tuple[int, int, int], dtype: torch.dtype, backend: str, variants: Variants,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """As of the logits without the others, which are NaN here; their gradient is 0."""
    counted, *of_each = sizes
    student, teacher, target = make_inputs("normal", 5, counted, dtype, generator, ignored=0.2)
    wide = [
        torch.cat((x, torch.full((5, n - counted), math.nan, dtype=dtype)), -1)
        for x, n in zip((student, teacher), of_each, strict=True)
    ]
    upstream = torch.randn(5 if case.outputs == 1 else (3, 5), generator=generator)
    one = [(case, upstream.flatten()[0])] if case.outputs == 1 else []
    for call, up in ((case.rows, upstream), *one):
        for variant in variants():
            truth, gradient = evaluate(call, student, teacher, target, up, backend=backend)
            value, ours = evaluate(call, *wide, target, up, backend=backend, classes=counted)
            torch.testing.assert_close(value, truth, msg=variant)
            torch.testing.assert_close(ours[:, :counted], gradient, msg=variant)
            assert ours.shape == wide[0].shape and not ours[:, counted:].any(), variant


def check_digits_near_the_teacher(
    case: Case, classes: int, backend: str, variants: Variants, with_target: bool,
    generator: torch.Generator,
) -> None:  # fmt: skip
    """A divergence is of second order there; at equal logits it is 0, and so is its gradient."""
    student, _, target = make_inputs("normal", 3, classes, generator=generator)
    given = target if with_target else None
    teacher = student + 1e-3 * torch.randn(student.shape, generator=generator)
    exact = (student.double(), teacher.double(), given)
    truth, truth_gradient = evaluate(case.rows, *exact, backend="reference")
    near = case.facts.near(case.all_options)
    allowed = near * truth_gradient.abs().amax(-1, keepdim=True).expand_as(truth_gradient)
    if case.facts.kinked:  # the sign of what rounding hides
        ones = torch.ones_like(truth)
        allowed = allowed + gradient_tolerance(
            case, truth_gradient, student, teacher, given, ones, F32
        )
    for variant in variants():
        value, gradient = evaluate(case.rows, student, student, given, backend=backend)
        assert not value.any() and not gradient.any(), variant
        value, gradient = evaluate(case.rows, student, teacher, given, backend=backend)
        assert_within(value, truth, truth, near * truth, f"value, {variant}")
        assert_within(gradient, truth_gradient, truth_gradient, allowed, f"gradient, {variant}")


LARGE_TEMPERATURES = (33.0, 100.0, 1e4)


def check_large_temperatures(
    case: Case, temperature: float, classes: int, dtype: torch.dtype, backend: str,
    variants: Variants, generator: torch.Generator,
) -> None:  # fmt: skip
    """What is left of logarithms times T^2 is held to its own size; of the logits, their spread.

    A gradient from statistics that were stored in float32 is off by about 4e-7 T times that size.
    """
    if not case.teacher or "temperature" not in case.options:
        return
    case = case.having(temperature=temperature)
    student, teacher, target = make_inputs("normal", 5, classes, dtype, generator, ignored=0.2)
    common: dict = {"row_weight": 1 + torch.rand(5, generator=generator)}
    upstream = torch.randn(5, generator=generator)
    stored = 4e-7 * temperature
    in_one_sweep = (
        stored if dtype == F16 else 0.0
    )  # float16 is not: the upstream gradient scales it
    for call, up, off in ((case.rows, upstream, stored), (case, upstream[0], in_one_sweep)):
        exact = (student.double(), teacher.double(), target)
        truth, truth_gradient = evaluate(call, *exact, up, backend="reference", **common)
        eps = torch.finfo(dtype).eps + 4 * torch.finfo(F32).eps + off
        size = truth_gradient.abs().amax(-1, keepdim=True) + torch.finfo(dtype).smallest_normal
        allowed = eps * size + 2 * interpreted(backend, truth_gradient, student)
        allowed = allowed.expand_as(truth_gradient)
        for variant in variants():
            ours, gradient = evaluate(call, student, teacher, target, up, backend=backend, **common)
            assert ours.dtype == F32 and gradient.dtype == dtype
            assert_within(ours, truth, truth, 1e-5 * truth.abs(), f"value, {variant}")
            assert_within(gradient, truth_gradient, truth_gradient, allowed, f"gradient, {variant}")


def check_a_weight_of_0(loss, classes: int, backend: str) -> None:
    student, teacher, target = make_inputs("normal", 4, classes)
    student[1] = teacher[1] = -INF
    options = {"alpha": 0.0, "reduction": "none", "backend": backend}
    value, gradient = evaluate(loss, student, teacher, target, **options)
    assert value[1] == 0 and not gradient[1].any()
    assert value.isfinite().all() and gradient.isfinite().all() and gradient[2].any()


# ---- infinite and huge logits ----------------------------------------------------------------


def agree_with_reference(
    case: Case, student: Tensor, teacher: Tensor, target: Tensor, backend: str
) -> tuple[Tensor, Tensor]:
    """Value and gradient of float32 inputs, held against the reference in float64."""
    inputs = (student, teacher, target)
    exact = (student.double(), teacher.double(), target)
    truth, truth_gradient = evaluate(case.rows, *exact, backend="reference")
    eager, eager_gradient = evaluate(case.rows, *inputs, backend="reference")
    value, gradient = evaluate(case.rows, *inputs, backend=backend)
    allowed = value_tolerance(case, truth, student, teacher, F32)
    assert_within(value, truth, eager, allowed, "value")
    allowed = gradient_tolerance(
        case, truth_gradient, student, teacher, target, torch.ones_like(truth), F32
    )
    assert_within(gradient, truth_gradient, eager_gradient, allowed, "gradient")
    return value, gradient


# Edits of (student, teacher) in row 3, whose target is class 2.
PATTERNS: dict[str, Callable[[Tensor, Tensor], None]] = {
    "student lacks a class": lambda s, t: s[3, 1:2].fill_(-INF),
    "student lacks the target": lambda s, t: s[3, 2:3].fill_(-INF),
    "teacher lacks a class": lambda s, t: t[3, 1:2].fill_(-INF),
    "teacher lacks the target": lambda s, t: t[3, 2:3].fill_(-INF),
    "neither has the target": lambda s, t: (s[3, 2:3].fill_(-INF), t[3, 2:3].fill_(-INF)),
    "student has one other class": lambda s, t: (s[3, :4].fill_(-INF), s[3, 5:].fill_(-INF)),
    "student has the target only": lambda s, t: (s[3, :2].fill_(-INF), s[3, 3:].fill_(-INF)),
    "teacher has one other class": lambda s, t: (t[3, :4].fill_(-INF), t[3, 5:].fill_(-INF)),
    "teacher has the target only": lambda s, t: (t[3, :2].fill_(-INF), t[3, 3:].fill_(-INF)),
    "both have the target only": lambda s, t: (
        s[3, :2].fill_(-INF), s[3, 3:].fill_(-INF), t[3, :2].fill_(-INF), t[3, 3:].fill_(-INF),
    ),
    "they have no class in common": lambda s, t: (s[3, ::2].fill_(-INF), t[3, 1::2].fill_(-INF)),
}  # fmt: skip


FAR = [1e3, 1e9]
SIDES = ["student", "teacher", "both"]


def check_a_target_far_above(
    case: Case, gap: float, side: str, backend: str, generator: torch.Generator
) -> None:
    """The rest of the student, of the teacher or of both lies `gap` below the target: sums that
    leave the target out know nothing of how far that is.
    """
    student, teacher, target = make_inputs("normal", 7, 9, F32, generator)
    rest = torch.arange(9) != target[:, None]
    for name, x in (("student", student), ("teacher", teacher)):
        if side in (name, "both"):
            x[rest] -= gap
    exact = (student.double(), teacher.double(), target)
    truth, truth_gradient = evaluate(case.rows, *exact, backend="reference")
    value, gradient = evaluate(case.rows, student, teacher, target, backend=backend)
    scale = case.temperature**2
    torch.testing.assert_close(value.double(), truth, rtol=2e-5, atol=2e-5 * scale)
    largest = truth_gradient.abs().amax(-1, keepdim=True)
    wrong = (gradient - truth_gradient).abs() > 2e-5 * largest + 1e-7
    assert not wrong.any(), (gradient[wrong], truth_gradient[wrong])


def check_infinite_logits(
    case: Case, pattern: str, classes: int, backend: str, generator: torch.Generator
) -> None:
    """Values may be infinite; gradients are finite, and other rows are what they were."""
    student, teacher, target = make_inputs("normal", 7, classes, F32, generator)
    target[3] = 2
    _, before = evaluate(case.rows, student, teacher, target, backend=backend)
    PATTERNS[pattern](student, teacher)
    value, gradient = agree_with_reference(case, student, teacher, target, backend)
    assert not value.isnan().any() and gradient.isfinite().all()
    if case.outputs == 1:
        loss, from_mean = evaluate(case, student, teacher, target, backend=backend)
        assert loss == INF if value.isinf().any() else loss.isfinite()
        assert from_mean.isfinite().all()
    if not case.facts.apart:  # else rows share a number
        others = torch.arange(7) != 3
        assert value[..., others].isfinite().all()
        assert_same(gradient[others], before[others])


def expected_dkd(
    student: Tensor, teacher: Tensor, alpha: float, beta: float
) -> tuple[Tensor, Tensor]:
    """Loss and gradient at T = 1 of float64 rows with target 0, b and c near 1."""
    odds = [x[:, 0] - x[:, 1:].logsumexp(1) for x in (teacher, student)]
    b_rest, c_rest = ((-g).sigmoid() for g in odds)
    log_b_rest, log_c_rest = (torch.nn.functional.logsigmoid(-g) for g in odds)
    # log(b / c) from what is missing to 1.
    tckd = (1 - b_rest) * torch.log1p((c_rest - b_rest) / (1 - c_rest))
    tckd = tckd + b_rest * (log_b_rest - log_c_rest)
    log_ph, log_qh = (x[:, 1:].log_softmax(1) for x in (student, teacher))
    nckd = (log_qh.exp() * (log_qh - log_ph)).sum(1)
    h = alpha * (b_rest - c_rest).unsqueeze(1)
    others = (beta - h) * log_ph.exp() - beta * log_qh.exp()
    return alpha * tckd + beta * nckd, torch.cat((h, others), 1)


def check_saturated_target_of_dkd(
    gap: float, classes: int, backend: str, generator: torch.Generator
) -> None:
    """The published code gives TCKD < 0 and target gradient 0 at 20 and 60, NaN at 120."""
    student, teacher, target = make_inputs("normal", 4, classes, F32, generator)
    target.zero_()
    student[:, 0] = student.amax(1) + gap
    teacher[:, 0] = teacher.amax(1) + 30.0
    for alpha, beta in ((1.0, 0.0), (1.0, 8.0)):
        truth, truth_gradient = expected_dkd(student.double(), teacher.double(), alpha, beta)
        options = dict(temperature=1.0, alpha=alpha, beta=beta)
        value, gradient = evaluate(
            Case("dkd", options).rows, student, teacher, target, backend=backend
        )
        close = dict(rtol=3e-5, atol=3e-6 * beta, check_dtype=False)
        torch.testing.assert_close(value, truth, **close)
        torch.testing.assert_close(gradient, truth_gradient, **close)
        # The target's own gradient is 1e-13 here, and right to 5 digits.
        at_target = gradient[:, 0], truth_gradient[:, 0]
        torch.testing.assert_close(*at_target, rtol=3e-5, atol=0, check_dtype=False)


def check_saturated_target_of_nkd(
    gap: float, temperature: float, classes: int, backend: str, generator: torch.Generator
) -> None:
    """Non-target distributions stay exact although all of their mass is e^-200 of the row."""
    student, teacher, target = make_inputs("normal", 4, classes, F32, generator)
    student.scatter_add_(1, target.unsqueeze(1), torch.full((4, 1), gap))
    teacher.scatter_add_(1, target.unsqueeze(1), torch.full((4, 1), 200.0))
    options = dict(temperature=temperature, gamma=1.0)
    value, gradient = evaluate(Case("nkd", options).rows, student, teacher, target, backend=backend)
    hot = torch.arange(classes) == target.unsqueeze(1)
    rest_1, rest_s, rest_t = (
        torch.where(hot, -INF, x.double() / t)
        for x, t in ((student, 1), (student, temperature), (teacher, temperature))
    )
    # b = 1, and the target's term is -log c.
    odds = student[hot].double() - rest_1.logsumexp(1)
    target_term = torch.nn.functional.softplus(-odds)
    log_ph = torch.where(hot, 0.0, rest_s.log_softmax(1))
    expected = target_term - temperature**2 * (rest_t.softmax(1) * log_ph).sum(1)
    torch.testing.assert_close(value, expected, rtol=3e-6, atol=0, check_dtype=False)

    c_rest = (-odds).sigmoid().unsqueeze(1)
    non_target = temperature * (rest_s.softmax(1) - rest_t.softmax(1))
    expected = torch.where(hot, -c_rest, c_rest * rest_1.softmax(1) + non_target)
    close = dict(rtol=3e-5, check_dtype=False)
    torch.testing.assert_close(gradient, expected, atol=3e-7 * temperature, **close)
    # The target's own is -2e-9 or so at the gap of 20, and right to 5 digits.
    torch.testing.assert_close(gradient[hot], expected[hot], atol=1e-30, **close)


# ---- targets that may be left out -------------------------------------------------------------


def check_that_any_class_may_be_ignored(
    ignore_index: int, rows: int, backend: str, generator: torch.Generator, variants: Variants
) -> None:
    """Also by the count of rows that the mean divides by."""
    student, teacher, target = make_inputs("normal", rows, 6, F32, generator)
    target[1::3] = ignore_index
    common = {"ignore_index": ignore_index}
    truth = evaluate(SOME, student, teacher, target, backend="reference", **common)
    for _ in variants():
        ours = evaluate(SOME, student, teacher, target, backend=backend, **common)
        torch.testing.assert_close(ours[0], truth[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours[1], truth[1], rtol=1e-5, atol=1e-7)


def check_kd_without_a_target(
    dtype: torch.dtype, classes: int, backend: str, generator: torch.Generator, variants: Variants
) -> None:
    kd = USUAL["kd"]
    student, teacher, _ = make_inputs("normal", 3, classes, dtype, generator)
    exact = (student.double(), teacher.double(), None)
    for call in (kd.rows, kd):
        truth = evaluate(call, *exact, backend="reference")
        for _ in variants():
            value, gradient = evaluate(call, student, teacher, None, backend=backend)
            torch.testing.assert_close(value.double(), truth[0], rtol=1e-5, atol=1e-4)
            rounded = truth[1].to(dtype).double()
            torch.testing.assert_close(gradient.double(), rounded, rtol=1e-2, atol=1e-6)


# ---- the operators, called with what the functions never give them --------------------------

STUDENT, TEACHER, TARGET = make_inputs("normal", (2, 4), 5)
GOOD = {
    "loss": "dkd",
    "student": STUDENT,
    "teacher": TEACHER,
    "target": TARGET,
    "row_weight": torch.ones(2, 4),
    "params": OPERATORS["dkd"],
    "ignore_index": IGNORED,
}
REDUCTION = {"normalizer": torch.tensor(2.0), "mean": True, "with_grad": True}
STATS = {"grad_rows": torch.ones(2, 4), "stats": torch.ones(8, ops.STATS_WIDTH).double()}
MALFORMED = [
    (ops.FUSED.forward, "loss", "kld"),
    (ops.FUSED.forward, "loss", "cross_entropy"),  # takes no teacher
    (ops.FUSED.forward, "student", STUDENT[0]),
    (ops.FUSED.forward, "student", STUDENT[None]),
    (ops.FUSED.forward, "student", STUDENT[0, 0, 0]),
    (ops.FUSED.forward, "student", STUDENT.long()),
    (ops.FUSED.forward, "student", STUDENT[..., :0]),
    (ops.FUSED.forward, "teacher", None),
    (ops.FUSED.forward, "teacher", TEACHER[:, :3]),
    (ops.FUSED.forward, "teacher", TEACHER[..., :4]),
    (ops.FUSED.forward, "teacher", TEACHER[:1].expand(2, 4, 5)[..., None]),
    (ops.FUSED.forward, "target", None),
    (ops.FUSED.forward, "target", TARGET[:, :3].contiguous()),
    (ops.FUSED.forward, "target", TARGET.int()),
    (ops.FUSED.forward, "target", TARGET.t().contiguous().t()),
    (ops.FUSED.forward, "target", TARGET[:1].expand(2, 4)),
    (ops.FUSED.forward, "row_weight", torch.ones(7)),
    (ops.FUSED.forward, "row_weight", torch.ones(2, 4).double()),
    (ops.FUSED.forward, "row_weight", torch.ones(1).expand(2, 4)),
    (ops.FUSED.forward, "params", torch.ones(8).double()),
    (ops.FUSED.forward, "params", torch.ones(6).double()),
    (ops.FUSED.forward, "params", torch.ones(7)),
    (ops.FUSED.backward, "grad_rows", torch.ones(2, 3)),
    (ops.FUSED.backward, "grad_rows", torch.ones(2, 4).double()),
    (ops.FUSED.backward, "stats", torch.ones(8, ops.STATS_WIDTH - 1).double()),
    (ops.FUSED.backward, "stats", torch.ones(8, ops.STATS_WIDTH)),
    (ops.FUSED.backward, "stats", torch.ones(1, 1).double().expand(8, ops.STATS_WIDTH)),
    (ops.FUSED.reduced, "normalizer", torch.ones(2)),
    (ops.FUSED.reduced, "normalizer", torch.tensor(1)),
    (ops.FUSED.reduced, "student", STUDENT.double()),  # row_weight is still float32
]


def check_refusal(op, like, argument: str, value: object, stats: torch.dtype) -> None:
    """like: the operator of FUSED that it is the twin of; stats: the dtype of row statistics."""
    kept = {**STATS, "stats": STATS["stats"].to(stats)}
    more = {ops.FUSED.reduced: REDUCTION, ops.FUSED.backward: kept}.get(like, {})
    arguments = {**GOOD, **more}
    op(**arguments)
    shown = {"loss": "(loss|teacher)", "student": "(student|teacher|row_weight)"}
    with pytest.raises(RuntimeError, match=rf"{shown.get(argument, argument)}: "):
        op(**{**arguments, argument: value})


def check_operators(
    operators: ops.Operators,
    name: str,
    passes: Sequence[str],
    dtypes: tuple[torch.dtype, torch.dtype] = (F32, F32),
) -> None:
    """torch.library.opcheck of the operators of a loss, on strided logits with ignored rows."""
    facts, params = ops.LOSSES[name], OPERATORS[name]
    student, teacher, target = make_inputs("normal", (2, 4), 9, dtypes, ignored=0.2)
    plain = (
        student[:, :-1],
        teacher[:, :-1] if facts.teacher else None,
        target[:, :-1].contiguous(),
        torch.rand(2, 3).to(loss_dtype(student, teacher if facts.teacher else None)),
    )
    leaves = (plain[0].clone().requires_grad_(), *plain[1:])
    rows, stats, _ = operators.forward(name, *plain, params, IGNORED)
    normalizer = torch.tensor(4.0, dtype=rows.dtype)
    arguments: dict[str, list[tuple]] = {
        "forward": [(name, *leaves, params, IGNORED)],
        "backward": [(name, torch.randn_like(rows), *plain, stats, params, IGNORED)],
        "reduced": [
            (name, *leaves, None, True, params, IGNORED, True),
            (name, *leaves, normalizer, False, params, IGNORED, True),
            (name, *plain, None, True, params, IGNORED, False),
        ],
        "scale_": [(torch.randn(2, 3), torch.tensor(factor)) for factor in (1.0, 3.0)],
    }
    for operator in passes:
        if operator == "reduced" and facts.outputs > 1:
            continue
        for call in arguments[operator]:
            torch.library.opcheck(getattr(operators, operator), call)


# ---- what a loss is made of ------------------------------------------------------------------

# kd_weight, ce_weight, label_smoothing: every way to a term that the loss itself leaves out.
MIXTURES = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.5, 0.7, 0.1), (1.0, 0.0, 0.1), (0.0, 0.0, 0.0))


def check_parts(
    operators: ops.Operators,
    name: str,
    classes: int,
    dtypes: tuple[torch.dtype, torch.dtype],
    generator: torch.Generator,
    variants: Variants,
) -> None:
    """Distillation and cross-entropy of the rows, of both operators, and that the loss and its
    gradient do not change where they are asked for."""
    inputs = make_inputs("masked", 5, classes, dtypes, generator, ignored=0.2)
    student, teacher, target = inputs
    dtype = loss_dtype(student, teacher)
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0]).to(dtype)
    close = {"rtol": 1e-3, "atol": 1e-4}
    # A large temperature is computed in float64, whatever the dtype of the parts.
    for temperature, mixture in (*product((1.0, 3.0), MIXTURES), (100.0, MIXTURES[2])):
        params = own_params(name, temperature, *mixture)
        exact = (student.double(), teacher.double(), target)
        leaf = student.double().requires_grad_()
        truth = ops.LOSSES[name].reference(
            leaf, *exact[1:], *params.tolist(), row_weight=weight.double(), parts=True
        )
        (of_student,) = torch.autograd.grad(truth[0].sum(), leaf)
        truth = truth.detach()
        end = (params, IGNORED)
        number = torch.tensor(2.0, dtype=torch.float64)
        for variant in variants():
            rows, stats, parts = operators.forward(name, *inputs, weight, *end, True)
            total, gradient, again = operators.reduced(
                name, *inputs, weight, number, True, *end, True, True
            )
            torch.testing.assert_close(rows.double(), truth[0], **close, msg=variant)
            for found in (parts, again):
                torch.testing.assert_close(found.double(), truth[1:], **close, msg=variant)
            # Where nobody asks, fewer sums may be taken.
            plain = operators.reduced(name, *inputs, weight, number, True, *end, True, False)
            torch.testing.assert_close(total, plain[0], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(gradient, plain[1], rtol=1e-2, atol=1e-5)
            upstream = torch.ones_like(rows)
            pulled = operators.backward(name, upstream, *inputs, weight, stats, *end)
            torch.testing.assert_close(pulled.double(), of_student, rtol=1e-2, atol=2e-3)
    if not ops.LOSSES[name].target:
        student, teacher, _ = make_inputs("normal", 5, classes, dtypes, generator)
        exact = (student.double(), teacher.double(), None)
        truth = ops.LOSSES[name].reference(*exact, *params.tolist(), parts=True)
        for _ in variants():
            _, _, parts = operators.forward(name, student, teacher, None, None, *end, True)
            torch.testing.assert_close(parts.double(), truth[1:], **close)
            assert not parts[1].any()


def own_params(name: str, temperature: float, *weights: float) -> Tensor:
    """With a loss's usual own parameters; the teacher's temperature is T, or, for T = 3, not."""
    names = ops.LOSSES[name].params
    numbers = [temperature, *weights, *OPERATORS[name].tolist()[1 + len(weights) :]]
    if "teacher_temperature" in names and temperature != 3:
        numbers[names.index("teacher_temperature")] = temperature
    return as_params(*numbers)


def check_infinite_distillation(
    operators: ops.Operators, name: str, classes: int, variants: Variants
) -> None:
    """A kd_weight of 0 wins over it, in the loss and its gradient; the part shows it."""
    student, teacher, target = make_inputs("normal", 3, classes)
    target[:] = 0
    student[1, 1:] = -INF
    teacher[2, 1:] = -INF
    for smoothing in (0.0, 0.1):
        params = own_params(name, 2.0, 0.0, 1.0, smoothing)
        truth, distillation, _ = ops.LOSSES[name].reference(
            student.double(), teacher.double(), target, *params.tolist(), parts=True
        )
        ce = ops.LOSSES["cross_entropy"].reference(student.double(), target, smoothing)
        assert_same(truth, ce)
        for _ in variants():
            rows, stats, parts = operators.forward(
                name, student, teacher, target, None, params, IGNORED, True
            )
            torch.testing.assert_close(rows.double(), truth, rtol=1e-5, atol=1e-6)
            assert_same(parts[0].isinf(), distillation.isinf())
            inputs = (student, teacher, target, None, stats, params, IGNORED)
            gradient = operators.backward(name, torch.ones_like(rows), *inputs)
            assert gradient.isfinite().all() and not gradient[1].any()  # one class is left


def check_smoothing_is_torchs(
    operators: ops.Operators, classes: int, dtype: torch.dtype, variants: Variants
) -> None:
    """Of nothing masked; and of masked classes it is torch's on the classes that are left. Those
    at the lowest number count, with a huge share of a loss that stays finite."""
    student, _, target = make_inputs("normal", 4, classes, dtype)
    masked, lowest = student.clone(), student.clone()
    masked[:, ::3] = -INF
    lowest[:, ::3] = max(torch.finfo(x).min for x in (dtype, F32))
    target -= (target % 3 == 0).long() * (target - 1) if classes > 1 else 0
    for smoothing in (0.1, 1.0):
        params = as_params(smoothing, 0.0)
        others, every = torch.arange(classes) % 3 > 0, slice(None)
        for logits, left in ((student, every), (masked, others), (lowest, every)):
            if classes < 2 and logits is masked:
                continue
            leaf = logits.double()[:, left].requires_grad_()
            index = torch.zeros(classes, dtype=torch.int64)
            index[left] = torch.arange(leaf.shape[1])
            truth = torch.nn.functional.cross_entropy(
                leaf, index[target], label_smoothing=smoothing, reduction="none"
            )
            truth.sum().backward()
            expected = torch.zeros(logits.shape, dtype=torch.float64)
            expected[:, left] = leaf.grad
            for variant in variants():
                inputs = ("cross_entropy", logits, None, target, None)
                rows, stats, _ = operators.forward(*inputs, params, IGNORED, False)
                torch.testing.assert_close(rows.double(), truth.detach(), rtol=1e-5, atol=1e-5)
                name, *inputs = inputs
                gradient = operators.backward(
                    name, torch.ones_like(rows), *inputs, stats, params, IGNORED
                )
                rounding = {"rtol": 1e-2 if dtype == BF16 else 1e-4, "atol": 1e-6, "msg": variant}
                torch.testing.assert_close(gradient.double(), expected, **rounding)
