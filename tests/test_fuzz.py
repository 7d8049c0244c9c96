"""Random losses, shapes, strides, dtypes and values against the reference in float64.

Every tensor of logits lies somewhere in a larger buffer of NaN: a kernel that reads beside its rows
computes NaN, and one that writes there is seen. Rows that must not be read hold NaN as well. Run
under AddressSanitizer (`make asan`), this is the test of all memory accesses.

KDKERNELS_FUZZ_EXAMPLES says how many examples are drawn (`make test-full`: 400), KDKERNELS_SEED
which ones.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
from cases import (
    DTYPES,
    IGNORED,
    ISAS,
    KINDS,
    LOSSES,
    SEED,
    Case,
    as_params,
    assert_within,
    evaluate,
    gradient_tolerance,
    make_inputs,
    needs_cpu,
    value_tolerance,
)
from contracts import GOOD, MALFORMED, REDUCTION, TARGET, check_refusal
from hypothesis import HealthCheck, event, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from kdkernels import ops
from kdkernels.reference import AEKT_VARIANTS

pytestmark = [needs_cpu, pytest.mark.fuzz]

EXAMPLES = int(os.environ.get("KDKERNELS_FUZZ_EXAMPLES", "100"))
often = settings(
    max_examples=EXAMPLES, database=None, deadline=None, suppress_health_check=list(HealthCheck)
)
seldom = settings(often, max_examples=EXAMPLES // 4)
seeded = seed(SEED)
NAN = math.nan
UPSTREAM = 1.7  # of a scalar

# ---- what is drawn --------------------------------------------------------------------------

temperatures = st.sampled_from([1.0, 4.0]) | st.floats(0.05, 100).map(lambda x: round(x, 2))
# Around whole vectors, the bounds between the regimes, and whole tiles.
class_counts = (
    st.integers(1, 70) | st.integers(250, 262) | st.integers(1020, 1030) | st.integers(2040, 2055)
)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    name = draw(st.sampled_from(sorted(LOSSES)))
    loss = LOSSES[name]
    options = {key: draw(st.sampled_from(values)) for key, values in loss.drawn.items()}
    if "temperature" in loss.defaults:
        options["temperature"] = draw(temperatures)
    if "t_squared" in loss.defaults:
        options["t_squared"] = draw(st.booleans())
    if loss.outputs == 1 and loss.weights:
        options["ce_weight"] = draw(st.sampled_from([0.0, 0.0, 0.7]))
        if Case(name, options).weight == 0:
            options["ce_weight"] = 0.7  # a loss of nothing: see test_autograd.py
    return Case(name, options)


@dataclass(frozen=True)
class Layout:
    """How a tensor lies in a buffer of NaN: the order of its dimensions in memory, outermost first;
    of each, the step between its elements and the gap after them; elements before and after all."""

    order: tuple[int, ...]
    steps: tuple[int, ...]
    gaps: tuple[int, ...]
    before: int
    after: int  # with 0, and steps and gaps to match, a sanitizer sees what reads past the end

    def place(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The buffer, and the view of it that holds x."""
        padded = [x.size(i) * self.steps[i] + self.gaps[i] for i in self.order]
        size = math.prod(padded)
        buffer = x.new_full((self.before + size + self.after,), NAN)
        view = buffer[self.before : self.before + size].view(padded)
        slices = [slice(0, x.size(i) * self.steps[i], self.steps[i]) for i in self.order]
        inverse = sorted(range(x.dim()), key=self.order.__getitem__)
        return buffer, view[tuple(slices)].permute(inverse).copy_(x)


@st.composite
def layouts(draw: st.DrawFn, dims: int) -> Layout:
    kind = draw(st.sampled_from(["dense", "classes last", "any"]))
    order = tuple(draw(st.permutations(range(dims)))) if kind == "any" else tuple(range(dims))
    before, after = draw(st.integers(0, 5)), draw(st.sampled_from([0, 7]))
    if kind == "dense":
        return Layout(order, (1,) * dims, (0,) * dims, before, after)
    steps = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in order)
    gaps = tuple(draw(st.sampled_from([0, 1, 5])) for _ in order)
    return Layout(order, steps if kind == "any" else (*steps[:-1], 1), gaps, before, after)


@dataclass(frozen=True)
class Problem:
    case: Case
    isa: str
    shape: tuple[int, ...]
    classes: int
    dim: int
    dtypes: tuple[torch.dtype, torch.dtype]
    layouts: tuple[Layout, Layout]
    kind: str
    ignored: float
    broken: float  # share of the rows with a NaN
    weighted: bool
    reduction: str
    seed: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the loss."""
        double = torch.float64 in self.dtypes[: 2 if self.case.teacher else 1]
        return torch.float64 if double else torch.float32

    @property
    def scalar(self) -> bool:
        return self.reduction != "none"


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    shape = tuple(draw(st.lists(st.integers(0, 20) | st.integers(1, 6), max_size=3)))
    if math.prod(shape) > 400:
        shape = (*shape[:-1], 1)
    classes = draw(class_counts)
    dims = len(shape) + 1
    case = draw(cases())
    one = case.outputs == 1
    return Problem(
        case=case,
        isa=draw(st.sampled_from(ISAS)),
        shape=shape,
        classes=classes,
        dim=draw(st.just(-1) | st.integers(-dims, dims - 1)),
        dtypes=(draw(st.sampled_from(DTYPES)), draw(st.sampled_from(DTYPES))),
        layouts=(draw(layouts(dims)), draw(layouts(dims))),
        kind=draw(st.sampled_from(sorted(KINDS))),
        ignored=draw(st.sampled_from([0.0, 0.0, 0.3, 1.0])),
        broken=draw(st.sampled_from([0.0, 0.0, 0.2])),
        weighted=one and draw(st.booleans()),
        reduction=draw(st.sampled_from(["none", "mean", "sum", "batchmean"][: 4 if one else 1])),
        seed=draw(st.integers(0, 2**31)),
    )


@dataclass(frozen=True)
class Rows:
    """The tensors of a problem, dense and with the classes last."""

    student: Tensor
    teacher: Tensor
    target: Tensor
    weight: Tensor
    dead: Tensor  # ignored, or of weight 0
    broken: Tensor  # with a NaN in the student
    upstream: Tensor  # of each row, the reduction included
    divisor: int

    @classmethod
    def of(cls, problem: Problem) -> Rows:
        generator = torch.Generator().manual_seed(problem.seed)
        shape = problem.shape
        lowest = problem.kind == "masked_lowest"
        kind = "masked" if lowest else problem.kind
        # Where all classes count alike: of log p - log q no digit is left beside such numbers.
        lowest = lowest and problem.case.power > 0
        student, teacher, target = make_inputs(
            kind, shape, problem.classes, problem.dtypes, generator
        )
        if lowest:  # where the student has them the teacher has them, too
            shared = student.isneginf()
            student, teacher = (x.clamp(min=torch.finfo(x.dtype).min) for x in (student, teacher))
            if problem.case.lacking:  # what the teacher lacks alone costs 3e38 / T
                teacher = torch.where(shared, teacher, teacher.clamp(min=-5.0))

        def chance(share: float) -> Tensor:
            return torch.rand(shape, generator=generator) < share

        ignored = chance(problem.ignored)
        weight = torch.rand(shape, generator=generator).masked_fill(chance(0.3), 0)
        weight = weight if problem.weighted else torch.ones(shape)
        dead = ignored | (weight == 0)
        counted = max(int((~ignored).sum()), 1)
        divisor = {"mean": counted, "batchmean": shape[0] if shape else 1}.get(problem.reduction, 1)
        upstream = torch.full(shape, UPSTREAM / max(divisor, 1), dtype=torch.float64)
        if not problem.scalar:
            outputs = (3,) if problem.case.outputs > 1 else ()
            upstream = torch.randn(outputs + shape, generator=generator)
        return cls(
            student,
            teacher,
            target.masked_fill(ignored, IGNORED),
            weight.to(problem.dtype),
            dead,
            chance(problem.broken) & ~dead,
            upstream,
            max(divisor, 1),
        )


def expected(problem: Problem, rows: Rows, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The reference, per row, where rows that are dead or broken are ignored."""

    def weighted(*inputs: Tensor) -> Tensor:
        return problem.case.rows(*inputs, backend="reference") * rows.weight.to(dtype)

    target = rows.target.masked_fill(rows.dead | rows.broken, IGNORED)
    return evaluate(weighted, rows.student.to(dtype), rows.teacher.to(dtype), target, rows.upstream)


def computed(problem: Problem, rows: Rows) -> tuple[Tensor, Tensor]:
    """The kernels, on logits anywhere in memory, with NaN where they must not look."""
    student, teacher = rows.student.clone(), rows.teacher.clone()
    student[rows.dead], teacher[rows.dead] = NAN, math.inf
    where = torch.Generator().manual_seed(problem.seed)
    hit = torch.randint(problem.classes, problem.shape, generator=where).unsqueeze(-1)
    student.masked_fill_((torch.arange(problem.classes) == hit) & rows.broken.unsqueeze(-1), NAN)
    (s_buffer, student), (t_buffer, teacher) = (
        layout.place(x.movedim(-1, problem.dim))
        for layout, x in zip(problem.layouts, (student, teacher), strict=True)
    )
    before = s_buffer.clone(), t_buffer.clone()
    options: dict[str, Any] = {"dim": problem.dim, "backend": "cpu"}
    if problem.weighted:
        options["row_weight"] = rows.weight
    call, upstream = problem.case.rows, rows.upstream
    if problem.scalar:
        call, upstream = problem.case, torch.tensor(UPSTREAM, dtype=torch.float64)
        options["reduction"] = problem.reduction
    with patch.dict(os.environ, KDKERNELS_CPU_ISA=problem.isa):
        value, gradient = evaluate(call, student, teacher, rows.target, upstream, **options)
    for x, y in zip((s_buffer, t_buffer), before, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8)), "inputs, or beside them"
    assert value.dtype == problem.dtype
    assert gradient.dtype == student.dtype and gradient.shape == student.shape
    return value, gradient.movedim(problem.dim, -1)


# ---- what must hold -------------------------------------------------------------------------


@seeded
@often
@given(problem=problems())
def test_any_input(problem: Problem) -> None:
    case, rows = problem.case, Rows.of(problem)
    event(f"{case.loss}, {problem.isa}")
    fine = ~(rows.dead | rows.broken)
    value, gradient = computed(problem, rows)
    truth, truth_gradient = expected(problem, rows, torch.float64)
    eager, eager_gradient = expected(problem, rows, problem.dtype)

    logits = (rows.student, rows.teacher if case.teacher else None)
    allowed = rows.weight * value_tolerance(case, truth, *logits, problem.dtype)
    # A number that float32 cannot hold is rightly infinite.
    if not problem.scalar:
        assert not value[..., rows.dead].any()
        results = (value, truth.to(problem.dtype).double(), eager, allowed)
        assert_within(*(x[..., fine] for x in results), "value")
    elif not rows.broken.any():
        total = (truth.sum() / rows.divisor).to(problem.dtype).double()
        allowed = allowed[fine].sum() / rows.divisor
        assert_within(value, total, eager.sum() / rows.divisor, allowed, "value")
    # Elsewhere a probability of 0 may rightly hide the NaN.
    if problem.kind == "normal" and not case.facts.blind(case.all_options) and rows.broken.any():
        nan = value.isnan() if case.outputs == 1 else value.isnan().any(0)
        assert nan.all() if problem.scalar else nan[rows.broken].all()

    assert not gradient[rows.dead].any()
    held = truth_gradient.abs() <= torch.finfo(gradient.dtype).max  # float16 may not
    assert (gradient.isfinite() | ~held)[fine].all()
    target, upstream = rows.target.masked_fill(~fine, IGNORED), rows.upstream * rows.weight
    allowed = gradient_tolerance(case, truth_gradient, *logits, target, upstream, problem.dtype)
    if problem.scalar:  # rounded once more when the upstream gradient multiplies it
        stored = torch.finfo(gradient.dtype)
        allowed += 0.51 * stored.eps * (truth_gradient.abs() + stored.smallest_normal)
    results = (gradient, truth_gradient, eager_gradient.to(gradient.dtype), allowed)
    assert_within(*(x[fine] for x in results), "gradient")


NO_CLASS = st.sampled_from([-(2**63), -(2**31) - 1, -101, -1, 0, 1, 2**31, 2**32, 2**63 - 1])


@seeded
@seldom
@given(case=cases(), shape=st.tuples(st.integers(1, 3), st.integers(1, 20)), data=st.data())
def test_targets_out_of_range(case: Case, shape: tuple[int, int], data: st.DataObject) -> None:
    """Refused before any row is read."""
    classes = data.draw(class_counts)
    student, teacher, target = make_inputs("normal", shape, classes)
    bad = data.draw(NO_CLASS)
    bad = bad if bad < 0 else min(classes + bad, 2**63 - 1)
    target.view(-1)[data.draw(st.integers(0, target.numel() - 1))] = bad
    with pytest.raises(
        ValueError, match=f"target: got class {bad}; must be from 0 to {classes - 1} "
    ):
        case(student, teacher, target, backend="cpu")


# ---- the operators, called with what the functions never give them --------------------------


@pytest.mark.parametrize(
    ("op", "argument", "value"),
    MALFORMED,
    ids=[f"{op._opname}-{name}-{i}" for i, (op, name, _) in enumerate(MALFORMED)],
)
def test_operators_check_what_memory_safety_needs(op, argument, value) -> None:
    check_refusal(op, op, argument, value, torch.float64)


def test_operators_check_the_rest() -> None:
    split = {**GOOD, "loss": "target_split", "teacher": None, "params": as_params(1.0)}
    with pytest.raises(RuntimeError, match="'target_split' has several outputs"):
        ops.FUSED.reduced(**split, **REDUCTION)
    bad = TARGET.clone()
    bad[1, 2] = 5
    with pytest.raises(RuntimeError, match="class 5 in row 6 is out of range; allowed: 0 to 4"):
        ops.FUSED.forward(**{**GOOD, "target": bad})
    for factor in (torch.ones(2), torch.tensor(2), torch.ones(()).half()):
        with pytest.raises(RuntimeError, match="factor: must be"):
            ops.FUSED.scale_(torch.ones(3), factor)


@pytest.mark.parametrize("variant", AEKT_VARIANTS)
@pytest.mark.parametrize("classes", [1, 5, 300])
@pytest.mark.parametrize("log_ratio_max", [0.0, 2.0])
def test_no_variant_swallows_a_nan(variant: str, classes: int, log_ratio_max: float) -> None:
    student, teacher, target = make_inputs("normal", 9, classes)
    student[4, target[4]] = NAN
    options = {"variant": variant, "log_ratio_max": log_ratio_max, "beta": 0.0}
    value, gradient = evaluate(Case("aekt", options).rows, student, teacher, target, backend="cpu")
    assert value.isnan().nonzero().tolist() == [[4]] and gradient[4].isnan().any()
