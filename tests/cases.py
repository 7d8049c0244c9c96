"""What the tests share: the losses with their options, inputs, layouts, and when numbers agree."""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any
from unittest.mock import patch

import formulas
import pytest
import torch
from torch import Tensor

import kdkernels
from kdkernels import arguments, call
from kdkernels.reference import AB_LIMIT, AEKT_VARIANTS

# Every random number of a run follows from one seed; the workers of pytest-xdist inherit it.
if os.environ.get("KDKERNELS_SEED") == "random":
    os.environ["KDKERNELS_SEED"] = str(int.from_bytes(os.urandom(4), "little"))
_SEED = os.environ.get("KDKERNELS_SEED") or "20240913"
if not _SEED.isdecimal() or int(_SEED) >= 2**63:
    raise pytest.UsageError(f"KDKERNELS_SEED={_SEED!r}: must be a number below 2^63, or random")
SEED = int(_SEED)

IGNORED = -100
INF = math.inf
CPU = kdkernels.backends()["cpu"]
ISAS: list[str] = []  # instruction sets of the CPU kernels, best last
if CPU.available:
    try:
        from kdkernels import _host

        ISAS = _host.isas()
    except ImportError:  # a wheel holds nothing for tests
        CPU = CPU._replace(available=False, reason="kdkernels._host, for tests, is not built")
needs_cpu = pytest.mark.skipif(not CPU.available, reason=f"no CPU kernels: {CPU.reason}")

# ---- losses ---------------------------------------------------------------------------------

Options = Mapping[str, Any]


@dataclass(frozen=True)
class Loss:
    """What the tests know of a loss. An entry in LOSSES brings it into every grid."""

    authors: Callable[..., Tensor]  # its rows as published: student, teacher, target, own options
    tested: Sequence[Options]  # options it is tested with, its usual ones first
    defaults: Options  # of its own parameters, as published
    weight: Callable[[Options], float]  # the sum of the weights of its terms, for tolerances
    divergence: Callable[[Options], bool] = lambda options: False  # >= 0; 0 at student == teacher
    drawn: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # what fuzz tests choose from
    module: str | None = None
    teacher: bool = True
    target: bool = True  # whether one is needed
    outputs: int = 1
    student: str = "student"  # the name of its first argument
    ratio: bool = False  # the ratio b / c of target probabilities is a factor of the gradient
    # By how much a row's extent of log(p / q) and largest logit multiply its rounding.
    grows: Callable[[Options, Tensor, Tensor], Tensor | float] = lambda *_: 1.0
    # Its terms go with this power of the probabilities: with less than 1, small ones count.
    power: Callable[[Options], float] = lambda _: 1.0
    cancels: Callable[[Options], float] = lambda _: (
        0.0
    )  # a factor of terms that cancel in the truth
    rounds: Callable[[Options], int] = lambda _: 1  # of sums over a row
    kinked: bool = False  # the gradient jumps where student and teacher agree on a class
    weights: bool = True  # kd_weight, ce_weight and return_parts are taken
    lacking: Callable[[Options], bool] = lambda _: False  # infinite where the teacher lacks a class
    bounded: Callable[[Options], bool] = lambda _: False  # finite whatever lacks a class
    held: Callable[[Options], bool] = lambda options: False  # factors are: no gradcheck
    unmoved: Options = field(default_factory=dict)  # under which a common offset changes nothing
    apart: Options = field(default_factory=dict)  # options under which rows do not share a number
    blind: Callable[[Options], bool] = lambda options: False  # to the target's own logit
    # Per class of its operator at one temperature, and at two: for the sums, for the gradient.
    exponentials: Sequence[tuple[int, int]] = ()
    near: Callable[[Options], float] = lambda _: (
        1e-3
    )  # relative error of two rounds at p = q + 1e-3
    refining: int = 0  # exponentials of a class in a second round that the first has not computed


def _ce(options: Options) -> float:
    return options["ce_weight"]


def _log_ratio(options: Options, extent: Tensor, _: Tensor) -> Tensor:
    """log(p / q) is a factor."""
    return 1 + extent


def _exponents(options: Options) -> tuple[float, float]:
    """Of the alpha-beta divergence; near its limits they are 0."""
    return tuple(x if x >= AB_LIMIT else 0.0 for x in (options["alpha"], options["beta"]))


def _of_exponents(options: Options, extent: Tensor, _: Tensor) -> Tensor:
    """expm1(a log(p / q)) / a is a factor, and where p < q the same with b."""
    a, b = (1 / x if x else math.inf for x in _exponents(options))
    return 1 + extent.clamp(max=max(a, b))


def _cancelling(options: Options) -> float:
    """1 / (a b), a factor of what the published formula sums."""
    a, b = _exponents(options)
    return 1 / (a * b) if a * b else 0.0


SHARES = (0.0, 1e-8, 0.1, 0.5, 0.9, 1 - 1e-8, 1.0)
FACTORS = (0.0, 0.5, 1.0, 8.0)
# Temperature 1 and others, with and without cross-entropy: the kernels sum at one temperature or
# at two.
LOSSES = {
    "kd": Loss(
        authors=formulas.kd,
        tested=[
            {"temperature": 4.0, "ce_weight": 0.0},
            {"temperature": 1.0, "ce_weight": 0.0},
            {"temperature": 1.0, "ce_weight": 0.7},
            {"temperature": 2.5, "ce_weight": 0.7},
            {"temperature": 2.5, "kd_weight": 0.5, "ce_weight": 0.7, "label_smoothing": 0.1},
            {"temperature": 2.5, "teacher_temperature": 1.5},
            {"temperature": 2.5, "teacher_temperature": 4.0, "ce_weight": 0.7, "t_squared": False},
        ],
        defaults={"temperature": 4.0, "t_squared": True, "teacher_temperature": None},
        weight=lambda o: 1 + _ce(o),
        divergence=lambda o: _ce(o) == 0 and o["teacher_temperature"] is None,
        drawn={"teacher_temperature": (None, None, 0.7, 4.0)},
        module="KDLoss",
        target=False,
        exponentials=[(2, 2), (3, 3)],
    ),
    "dkd": Loss(
        authors=formulas.dkd,
        tested=[
            {"temperature": 4.0, "alpha": 1.0, "beta": 8.0, "ce_weight": 0.0},
            {"temperature": 1.0, "alpha": 1.0, "beta": 0.5, "ce_weight": 1.0},
            {"temperature": 0.5, "alpha": 2.0, "beta": 0.0, "ce_weight": 1.0},
            {"temperature": 2.0, "t_squared": False, "alpha": 0.0, "beta": 1.0, "ce_weight": 0.0},
            {"temperature": 1.0, "kd_weight": 0.5, "ce_weight": 1.0, "label_smoothing": 0.1},
        ],
        defaults={"temperature": 4.0, "t_squared": True, "alpha": 1.0, "beta": 8.0},
        weight=lambda o: o["alpha"] + o["beta"] + _ce(o),
        divergence=lambda o: _ce(o) == 0,
        drawn={"alpha": FACTORS, "beta": FACTORS},
        module="DKDLoss",
        blind=lambda o: o["alpha"] == 0,
        exponentials=[(2, 2), (3, 3)],
    ),
    "nkd": Loss(
        authors=formulas.nkd,
        tested=[
            {"temperature": 1.0, "gamma": 1.5, "ce_weight": 0.0},
            {"temperature": 3.0, "gamma": 3.5, "ce_weight": 1.0},
            {"temperature": 3.0, "gamma": 3.5, "t_squared": False},
            {"temperature": 2.0, "gamma": 0.0, "ce_weight": 0.0},
            {"temperature": 3.0, "kd_weight": 0.5, "ce_weight": 1.0, "label_smoothing": 0.1},
        ],
        defaults={"temperature": 1.0, "t_squared": True, "gamma": 1.5},
        weight=lambda o: 1 + o["gamma"] + _ce(o),
        drawn={"gamma": FACTORS},
        module="NKDLoss",
        exponentials=[(2, 2), (4, 3)],
    ),
    "tf_nkd": Loss(
        authors=formulas.tf_nkd,
        tested=[{}, {"ce_weight": 1.0, "mean_confidence": 0.3}],
        defaults={"mean_confidence": None},
        weight=lambda o: 2 + _ce(o),
        module="TFNKDLoss",
        teacher=False,
        held=lambda o: True,
        apart={"mean_confidence": 0.3},
        exponentials=[(1, 1)],
    ),
    "aekt": Loss(
        authors=formulas.aekt,
        tested=[
            *({"variant": x, "temperature": 4.0, "beta": 8.0, "ce_weight": 0.0}
              for x in AEKT_VARIANTS),
            {"variant": "ratio_weighted_tckd", "temperature": 1.0, "beta": 1.0, "ce_weight": 1.0},
            {"variant": "ratio_coupled_tckd", "temperature": 2.0, "beta": 1.0, "ce_weight": 0.5},
            {"variant": "ratio_divergence", "temperature": 1.0, "alpha": 0.5, "beta": 1.0,
             "log_ratio_max": 0.4, "t_squared": False},
            {"variant": "ratio_divergence", "beta": 1.0, "ce_weight": 1.0, "label_smoothing": 0.1},
        ],
        defaults={
            "temperature": 4.0,
            "t_squared": True,
            "alpha": 1.0,
            "beta": 8.0,
            "variant": "ratio_weighted_tckd",
            "log_ratio_max": math.log(10),
        },
        weight=lambda o: math.exp(o["log_ratio_max"]) * o["alpha"] + o["beta"] + _ce(o),
        divergence=lambda o: _ce(o) == 0 and not o["variant"].endswith("_ce"),
        drawn={
            "alpha": FACTORS,
            "beta": FACTORS,
            "variant": AEKT_VARIANTS,
            "log_ratio_max": (0.0, 0.5, math.log(10)),
        },
        module="AEKTLoss",
        ratio=True,
        held=lambda o: o["variant"].startswith("ratio_weighted"),
        blind=lambda o: o["alpha"] == 0,
        exponentials=[(2, 2), (3, 3)],
    ),
    "reverse_kl": Loss(
        authors=formulas.reverse_kl,
        tested=[
            {"temperature": 1.0},
            {"temperature": 2.5, "t_squared": False},
            {"temperature": 2.5, "kd_weight": 0.5, "ce_weight": 0.7, "label_smoothing": 0.1},
        ],
        defaults={"temperature": 1.0, "t_squared": True},
        weight=lambda o: 1 + _ce(o),
        divergence=lambda o: _ce(o) == 0,
        module="ReverseKLLoss",
        lacking=lambda o: True,
        target=False,
        grows=_log_ratio,
        exponentials=[(2, 1), (3, 2)],
    ),
    "mixed_kl": Loss(
        authors=formulas.mixed_kl,
        tested=[
            {"temperature": 1.0, "ratio": 0.5},
            {"temperature": 2.5, "ratio": 0.2, "t_squared": False},
            {"temperature": 1.0, "ratio": 0.0},
            {"temperature": 3.0, "ratio": 1.0, "ce_weight": 0.7},
        ],
        defaults={"temperature": 1.0, "t_squared": True, "ratio": 0.5},
        weight=lambda o: 1 + _ce(o),
        divergence=lambda o: _ce(o) == 0,
        drawn={"ratio": (0.0, 0.3, 0.5, 1.0)},
        module="MixedKLLoss",
        lacking=lambda o: o["ratio"] < 1,
        target=False,
        grows=_log_ratio,
        exponentials=[(2, 2), (3, 3)],
    ),
    "jsd": Loss(
        authors=formulas.jsd,
        tested=[
            {"temperature": 1.0, "beta": 0.5},
            {"temperature": 2.5, "beta": 0.1, "t_squared": False},
            {"temperature": 1.0, "beta": 0.0},
            {"temperature": 2.5, "beta": 1.0},
            {"temperature": 3.0, "beta": 0.7, "kd_weight": 0.5, "ce_weight": 0.7,
             "label_smoothing": 0.1},
        ],
        defaults={"temperature": 1.0, "t_squared": True, "beta": 0.5},
        weight=lambda o: 1 + _ce(o),
        divergence=lambda o: _ce(o) == 0,
        drawn={"beta": SHARES},
        module="JSDLoss",
        lacking=lambda o: o["beta"] == 1,
        bounded=lambda o: 0 < o["beta"] < 1,
        rounds=lambda o: 1 + (0 < o["beta"] < 1),
        target=False,
        grows=_log_ratio,
        exponentials=[(2, 2), (3, 3)],
    ),
    "skew_kl": Loss(
        authors=formulas.skew_kl,
        tested=[
            {"temperature": 1.0, "alpha": 0.1},
            {"temperature": 2.5, "alpha": 0.9, "ce_weight": 0.7},
            {"temperature": 2.5, "alpha": 0.0, "t_squared": False},
        ],
        defaults={"temperature": 1.0, "t_squared": True, "alpha": 0.1},
        weight=lambda o: 1 + _ce(o),
        divergence=lambda o: _ce(o) == 0,
        drawn={"alpha": SHARES},
        module="SkewKLLoss",
        bounded=lambda o: o["alpha"] > 0,
        rounds=lambda o: 1 + (o["alpha"] > 0),
        target=False,
        grows=_log_ratio,
        exponentials=[(2, 2), (3, 3)],
    ),
    "skew_reverse_kl": Loss(
        authors=formulas.skew_reverse_kl,
        tested=[
            {"temperature": 1.0, "alpha": 0.1},
            {"temperature": 2.5, "alpha": 0.3, "detach_mixture": True},
            {"temperature": 2.5, "alpha": 0.0, "t_squared": False, "ce_weight": 0.7},
        ],
        defaults={"temperature": 1.0, "t_squared": True, "alpha": 0.1, "detach_mixture": False},
        weight=lambda o: 1 + _ce(o),
        divergence=lambda o: _ce(o) == 0,
        drawn={"alpha": SHARES, "detach_mixture": (False, True)},
        module="SkewReverseKLLoss",
        lacking=lambda o: o["alpha"] == 0,
        bounded=lambda o: o["alpha"] > 0,
        rounds=lambda o: 1 + (o["alpha"] > 0),
        target=False,
        held=lambda o: o["detach_mixture"],
        grows=_log_ratio,
        exponentials=[(2, 2), (3, 3)],
    ),
    "tvd": Loss(
        authors=formulas.tvd,
        tested=[
            {"temperature": 1.0},
            {"temperature": 2.5, "t_squared": True, "ce_weight": 0.7},
        ],
        defaults={"temperature": 1.0, "t_squared": False},
        weight=lambda o: 1 + _ce(o),
        divergence=lambda o: _ce(o) == 0,
        module="TVDLoss",
        kinked=True,
        bounded=lambda o: True,
        rounds=lambda o: 2,
        target=False,
        exponentials=[(2, 2), (3, 3)],
    ),
    "ab": Loss(
        authors=formulas.ab,
        tested=[
            {"temperature": 1.0, "alpha": 0.5, "beta": 0.5},
            {"temperature": 2.5, "alpha": 0.2, "beta": 0.7, "t_squared": False},
            {"temperature": 1.0, "alpha": 0.0, "beta": 0.5},
            {"temperature": 2.5, "alpha": 0.5, "beta": 0.0},
            {"temperature": 1.0, "alpha": 0.0, "beta": 0.0},
            {"temperature": 1.0, "alpha": 1.0, "beta": 1.0},
            {"temperature": 1.0, "alpha": 5e-5, "beta": 0.5},
            {"temperature": 3.0, "alpha": 0.9, "beta": 0.3, "kd_weight": 0.5, "ce_weight": 0.7,
             "label_smoothing": 0.1},
        ],
        defaults={"temperature": 1.0, "t_squared": True, "alpha": 0.5, "beta": 0.5},
        weight=lambda o: 1 + _ce(o),
        divergence=lambda o: _ce(o) == 0,
        drawn={
            "alpha": (0.0, 5e-5, 2e-4, 0.1, 0.5, 1.0),
            "beta": (0.0, 5e-5, 2e-4, 0.1, 0.5, 1.0),
        },
        module="ABLoss",
        lacking=lambda o: _exponents(o)[0] == 0,
        bounded=lambda o: min(_exponents(o)) > 0,
        rounds=lambda o: 2,
        target=False,
        grows=_of_exponents,
        power=lambda o: sum(_exponents(o)),
        cancels=_cancelling,
        # What is rounded in the sums of a row counts in all classes alike, or in the largest alone.
        near=lambda o: 4e-3 if sum(_exponents(o)) in (0, 2) else 1e-3,
        exponentials=[(2, 4), (3, 5)],
        refining=4,
    ),
    "cross_entropy": Loss(
        authors=formulas.cross_entropy,
        tested=[
            {},
            {"label_smoothing": 0.1},
            {"z_weight": 0.01, "label_smoothing": 0.1},
        ],
        defaults={"label_smoothing": 0.0, "z_weight": 0.0},
        weight=lambda o: 1 + o["z_weight"],
        drawn={"z_weight": (0.0, 1e-4, 0.1)},
        unmoved={"z_weight": 0.0},
        grows=lambda o, _, largest: 1 + 2 * o["z_weight"] * largest,
        module="CrossEntropyLoss",
        teacher=False,
        weights=False,
        exponentials=[(1, 1)],
    ),
    "target_split": Loss(
        authors=formulas.target_split,
        tested=[{"temperature": 1.0}, {"temperature": 3.0}],
        defaults={"temperature": 1.0},
        weight=lambda o: 1.0,
        teacher=False,
        outputs=3,
        student="logits",
        exponentials=[(1, 1)],
    ),
}  # fmt: skip


class _Called(Exception):
    """An operator was about to run."""


@dataclass(frozen=True)
class Case:
    """A loss with its options; called as `case(student, teacher, target, backend=..., ...)`."""

    loss: str  # the function's name without _loss
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        shown = [str(x) if isinstance(x, str) else f"{k[0]}{x:g}" for k, x in self.options.items()]
        return "-".join([self.loss, *shown])

    def __hash__(self) -> int:
        return hash(str(self))

    @property
    def facts(self) -> Loss:
        return LOSSES[self.loss]

    @property
    def teacher(self) -> bool:
        return self.facts.teacher

    @property
    def outputs(self) -> int:
        return self.facts.outputs

    @property
    def usual(self) -> bool:
        return self.options == self.facts.tested[0]

    @cached_property
    def all_options(self) -> dict[str, Any]:
        """Defaults included."""
        parameters = inspect.signature(self.function).parameters.values()
        defaults = {x.name: x.default for x in parameters if x.kind is x.KEYWORD_ONLY}
        return defaults | self.options

    @property
    def weight(self) -> float:
        return self.facts.weight(self.all_options)

    @property
    def divergence(self) -> bool:
        return self.facts.divergence(self.all_options)

    @property
    def lacking(self) -> bool:
        return self.facts.lacking(self.all_options)

    @property
    def rounds(self) -> int:
        return self.facts.rounds(self.all_options)

    @property
    def bounded(self) -> bool:
        return self.facts.bounded(self.all_options)

    @property
    def power(self) -> float:
        return self.facts.power(self.all_options)

    @property
    def temperature(self) -> float:
        return self.all_options.get("temperature", 1.0)

    @property
    def temperatures(self) -> tuple[float, float]:
        """Of student and teacher."""
        of_teacher = self.all_options.get("teacher_temperature")
        return self.temperature, of_teacher or self.temperature

    @property
    def function(self) -> Callable[..., Any]:
        return getattr(kdkernels, self.loss if self.outputs > 1 else f"{self.loss}_loss")

    @property
    def apart(self) -> Case:
        """The same, with rows that do not share a number, such as a mean."""
        return self.having(**self.facts.apart)

    def having(self, **options: Any) -> Case:
        return replace(self, options={**self.options, **options})

    @cached_property
    def operator(self) -> tuple[str, tuple[float, ...]]:
        """The loss and the parameters that the operators are called with."""
        inputs = make_inputs("normal", 1, 2)
        with (
            patch.object(arguments, "choose", lambda *_: "cpu"),
            patch.object(call, "_run", side_effect=_Called) as run,
            pytest.raises(_Called),
        ):
            self.rows(*inputs)
        _, name, _, params, *_ = run.call_args.args
        return name, tuple(params)

    def __call__(
        self, student: Tensor, teacher: Tensor | None, target: Tensor | None, **common: Any
    ) -> Tensor:
        """The loss; several outputs are stacked in front. Losses without teacher leave it."""
        logits = (student, teacher) if self.teacher else (student,)
        out = self.function(*logits, target, **self.options, **common)
        return out if self.outputs == 1 else torch.stack(out)

    def rows(
        self, student: Tensor, teacher: Tensor | None, target: Tensor | None, **common: Any
    ) -> Tensor:
        """The loss of every row, `(outputs, *target.shape)` where there are several outputs."""
        reduction = {"reduction": "none"} if self.outputs == 1 else {}
        return self(student, teacher, target, **reduction, **common)


CASES = [Case(name, dict(options)) for name, loss in LOSSES.items() for options in loss.tested]
# Losses of two rounds keep their digits where student and teacher nearly agree.
PRECISE_CASES = [case for case in CASES if case.rounds == 2 and case.divergence]
SCALAR_CASES = [case for case in CASES if case.outputs == 1]
DIVERGENCES = [case for case in CASES if case.divergence]
# Each loss with its usual options, for tests that need not see every option.
USUAL = {case.loss: case for case in CASES if case.usual}
MAIN_CASES = list(USUAL.values())
MAIN_SCALARS = [case for case in MAIN_CASES if case.outputs == 1]
# Any loss, where which one does not matter: with a target, a teacher, and two terms.
SOME = USUAL["dkd"]


# ---- inputs ---------------------------------------------------------------------------------

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
DTYPES = (F32, BF16, F16, F64)
# Of student and teacher.
DTYPE_PAIRS = [
    *((dtype, dtype) for dtype in DTYPES),
    (F32, BF16), (BF16, F32), (F16, F32), (F32, F64), (F64, F16), (F16, BF16),
]  # fmt: skip


def _normal(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return 3 * torch.randn(shape, generator=generator, dtype=torch.float64)


def _masked(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    logits = _normal(shape, generator)
    return torch.where(torch.rand(shape, generator=generator) < 0.2, -INF, logits)


def _one_hot(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    hot = torch.randint(shape[-1], shape[:-1], generator=generator)
    return torch.zeros(shape, dtype=torch.float64).scatter(-1, hot.unsqueeze(-1), 60.0)


KINDS: dict[str, Callable[[tuple[int, ...], torch.Generator], Tensor]] = {
    "normal": _normal,
    "huge": lambda shape, g: 1e4 * (2 * torch.rand(shape, generator=g, dtype=torch.float64) - 1),
    "offset": lambda shape, g: _normal(shape, g) + 1e4,
    "constant": lambda shape, g: torch.full(shape, -2.5, dtype=torch.float64),
    "one_hot": _one_hot,
    "masked": _masked,  # a fifth of the classes at -inf, at least one is not
    "masked_lowest": lambda shape, g: _masked(shape, g).clamp(min=torch.finfo().min),
}


def make_logits(
    kind: str,
    rows: int | tuple[int, ...],
    classes: int,
    dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Logits `(*rows, classes)` of one of KINDS."""
    shape = (*(rows if isinstance(rows, tuple) else (rows,)), classes)
    logits = KINDS[kind](shape, generator or torch.Generator().manual_seed(SEED))
    if kind == "masked":  # no row without a finite logit
        logits[..., 0] = torch.where(logits.isneginf().all(-1), 0.0, logits[..., 0])
    lowest = torch.finfo(dtype).min
    return torch.where(logits.isinf(), logits, logits.clamp(lowest, -lowest)).to(dtype)


def make_target(
    rows: int | tuple[int, ...],
    classes: int,
    generator: torch.Generator | None = None,
    ignored: float = 0.0,
) -> Tensor:
    """Class ids; a share `ignored` of the rows, the second one first, is IGNORED."""
    shape = rows if isinstance(rows, tuple) else (rows,)
    target = torch.randint(classes, shape, generator=generator)
    if ignored:
        out = torch.rand(shape, generator=generator) < ignored
        out.view(-1)[1:2] = True
        target[out] = IGNORED
    return target


def make_inputs(
    kind: str,
    rows: int | tuple[int, ...],
    classes: int,
    dtype: torch.dtype | tuple[torch.dtype, torch.dtype] = torch.float32,
    generator: torch.Generator | None = None,
    ignored: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Student, teacher and target. dtype: of both, or of each. Targets have finite logits."""
    generator = generator or torch.Generator().manual_seed(SEED)
    dtypes = dtype if isinstance(dtype, tuple) else (dtype, dtype)
    student, teacher = (make_logits(kind, rows, classes, x, generator) for x in dtypes)
    target = make_target(rows, classes, generator, ignored)
    if kind == "masked":
        # What the student lacks the teacher has not got either, or the loss is rightly infinite.
        teacher = torch.where(student.isneginf(), -INF, teacher)
        hot = torch.arange(classes) == target.unsqueeze(-1)
        student = torch.where(hot & student.isneginf(), 0.5, student)
        teacher = torch.where(hot & teacher.isneginf(), -0.5, teacher)
    return student, teacher, target


def as_params(*numbers: float) -> Tensor:
    """As the operators take them."""
    return torch.tensor(numbers, dtype=torch.float64)


# The operators, each with the parameters of a loss that leads to it.
OPERATORS = {name: as_params(*x) for name, x in (case.operator for case in reversed(CASES))}


def _one_of_each_kernel(cases: list[Case]) -> list[Case]:
    """Losses that sum alike share their kernels: the first case of each kind of sums, of losses
    with other shapes of arguments as well. All where nothing is built that could tell.
    """
    if not ISAS:
        return cases
    found: dict[Any, Case] = {}
    for case in cases:
        name, params = case.operator
        found.setdefault((_host.sums(name, list(params)), case.teacher, case.outputs), case)
    return list(found.values())


# For tests of how rows are walked, which do not depend on what becomes of their sums.
KERNEL_CASES = _one_of_each_kernel(CASES)
MAIN_KERNEL_CASES = _one_of_each_kernel(MAIN_CASES)
# And each loss: what becomes of the sums in the emulation is the CPU code, tested with all options.
WALKED = list(dict.fromkeys([*KERNEL_CASES, *MAIN_CASES]))

# ---- layouts --------------------------------------------------------------------------------


def _inside(logits: Tensor, *slices: slice) -> Tensor:
    """The same logits, as this part of a larger tensor of NaN."""
    shape = [
        n if s == slice(None) else (n - 1) * (s.step or 1) + 1 + (s.start or 0) - (s.stop or 0)
        for n, s in zip(logits.shape, slices, strict=True)
    ]
    part = logits.new_full(shape, math.nan)[slices]
    assert part.shape == logits.shape
    return part.copy_(logits)


ALL = slice(None)
# From dense `(outer, inner, classes)` to a tensor of the same values, and its dimension of classes.
LAYOUTS: dict[str, Callable[[Tensor], tuple[Tensor, int]]] = {
    "contiguous": lambda x: (x, -1),
    "unaligned": lambda x: (_inside(x, ALL, ALL, slice(1, -2)), -1),
    "next_token": lambda x: (_inside(x, ALL, slice(0, -1), ALL), -1),  # logits[:, :-1]
    "every_other_row": lambda x: (_inside(x, ALL, slice(1, None, 2), ALL), -1),
    "every_other_class": lambda x: (_inside(x, ALL, ALL, slice(0, None, 2)), -1),
    "rows_swapped": lambda x: (x.transpose(0, 1).contiguous().transpose(0, 1), -1),
    "classes_second": lambda x: (x.movedim(-1, 1).contiguous(), 1),  # (N, C, pixels)
    "classes_first": lambda x: (x.movedim(-1, 0).contiguous(), 0),
}

# ---- values and gradients -------------------------------------------------------------------


def evaluate(
    call: Callable[..., Tensor],
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    upstream: Tensor | None = None,
    **common: Any,
) -> tuple[Tensor, Tensor]:
    """What `call` (a case, or its .rows) gives and the student's gradient under `upstream`.

    A leaf of the very strides of `student` is differentiated; without upstream, ones are used.
    """
    student = student.detach().requires_grad_()
    value = call(student, teacher, target, **common)
    upstream = torch.ones_like(value) if upstream is None else upstream.to(value.dtype)
    (gradient,) = torch.autograd.grad(value, student, upstream)
    return value.detach(), gradient


# ---- agreement ------------------------------------------------------------------------------


def loss_dtype(*logits: Tensor | None) -> torch.dtype:
    double = any(x is not None and x.dtype == torch.float64 for x in logits)
    return torch.float64 if double else torch.float32


def _extent(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of the logits of each row that are not masked: largest minus smallest, largest magnitude."""
    masked = x <= torch.finfo(x.dtype).min / 2
    x = x.double()
    low, high = torch.where(masked, INF, x).amin(-1), torch.where(masked, -INF, x).amax(-1)
    return high - low, torch.maximum(high.abs(), low.abs())


def _rounding(
    case: Case, student: Tensor, teacher: Tensor | None, dtype: torch.dtype, order: int
) -> Tensor:
    """What rounding may change in a row, relative to its log-probabilities at T times T^order.

    Exponentials and sums are off by a few units in the last place, a sum of n terms in the lanes
    of the narrowest vectors by n / lanes / 2 of them (a tile of 1024 classes at most); logits
    that are averaged bring their extent. The truth in float64 takes no differences from a pivot
    first, so there the offset of the logits counts, too.
    """
    own, of_teacher = case.temperatures
    logits = [(student, 1.0)]
    if case.teacher and teacher is not None:
        logits.append((teacher, own / of_teacher))  # in units of the student's
    found = [[scale * size for size in _extent(x)] for x, scale in logits]
    extents, magnitudes = zip(*found, strict=True)
    lanes = 16 // dtype.itemsize
    units = 4 + min(student.shape[-1], 1024) / lanes / 2
    exact = torch.finfo(torch.float64).eps
    temperature = max(case.temperature, 1.0)  # cross-entropy has T = 1
    relative = torch.finfo(dtype).eps * units * (temperature + sum(extents))
    order -= 2 * (case.outputs > 1)  # target_split is not multiplied with T^2
    spread = sum(extents) / temperature
    ratio = torch.zeros_like(spread)
    if len(logits) == 2:
        difference = logits[1][0].double() * logits[1][1] - student.double()
        ratio = _extent(difference.nan_to_num(0.0, 0.0, 0.0))[0] / temperature
    grown = case.facts.grows(case.all_options, ratio, sum(magnitudes))
    # Its probabilities are off by the magnitude of the logits, and the extent is a factor of them.
    of_truth = 4 * exact * sum(magnitudes) * torch.maximum(1 + spread, grown + 0 * spread)
    if case.all_options.get("t_squared") is False and case.temperature < 1:
        order, temperature = order - 2, case.temperature
    return case.weight * temperature ** (order - 1) * (grown * relative + of_truth)


def powers_of(case: Case, student: Tensor, teacher: Tensor | None) -> Tensor | None:
    """The sizes of a loss's terms where they are not those of the probabilities."""
    if case.power >= 1 or teacher is None:
        return None
    log_p, log_q = (x.double().div(case.temperature).log_softmax(-1) for x in (student, teacher))
    largest = torch.maximum(log_p, log_q)
    return torch.where(largest == -INF, 0.0, (case.power * largest.clamp(min=-1e300)).exp())


def value_tolerance(
    case: Case, truth: Tensor, student: Tensor, teacher: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """What rounding explains, per row, of a difference to `truth`."""
    rounding = _rounding(case, student, teacher, dtype, 2)
    powers = powers_of(case, student, teacher)
    if powers is not None:
        of_truth = 8 * torch.finfo(torch.float64).eps * case.facts.cancels(case.all_options)
        rounding = rounding * (1 + powers.sum(-1))
        rounding += of_truth * max(case.temperature, 1.0) ** 2 * powers.sum(-1)
    return 4 * torch.finfo(dtype).eps * truth.abs() + rounding


def gradient_tolerance(
    case: Case,
    truth: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    upstream: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """What rounding explains, per class, for class-last logits.

    Errors are relative to the probabilities that a gradient is made of, class by class, so that
    small ones are held to their own size. Those of the truth are relative to the plain softmax:
    it may take 1 - 1. On top, the rounding of the result to its dtype.
    """
    exact = torch.finfo(torch.float64).eps / torch.finfo(dtype).eps
    logits = [x for x in (student, teacher if case.teacher else None) if x is not None]
    envelope = torch.zeros(student.shape, dtype=torch.float64)
    for x in logits:
        for t in {*case.temperatures, 1.0}:
            scaled = x.double() / t
            envelope += _sensitivity(scaled, target, case.facts.ratio)
            envelope += exact * scaled.softmax(-1)
    powers = powers_of(case, student, teacher)
    if powers is not None:  # and by the sum of them, which every class has a share of
        p = (student.double() / case.temperature).softmax(-1)
        envelope += powers + p * powers.sum(-1, keepdim=True)
    upstream = upstream.double().abs().sum(0) if case.outputs > 1 else upstream.double().abs()
    scale = (upstream * _rounding(case, student, teacher, dtype, 1)).unsqueeze(-1)
    underflow = torch.finfo(dtype).tiny / torch.finfo(dtype).eps
    compute = 4 * torch.finfo(dtype).eps * truth.abs() + scale * (envelope + underflow)
    if case.facts.kinked and teacher is not None:
        compute = compute + scale * _of_ties(case, student, teacher, dtype)
    stored = torch.finfo(student.dtype)
    rounded = compute + 0.51 * stored.eps * (truth.abs() + stored.smallest_normal)
    return torch.where(truth.abs() > stored.max, INF, rounded)  # what it does not hold


def _of_ties(case: Case, student: Tensor, teacher: Tensor, dtype: torch.dtype) -> Tensor:
    """What the sign of p - q decides where rounding does, in units of the rounding of a row."""
    p, q = (
        (x.double() / t).softmax(-1)
        for x, t in zip((student, teacher), case.temperatures, strict=True)
    )
    units = _rounding(case, student, teacher, dtype, 1).unsqueeze(-1)
    tied = p * ((p - q).abs() <= 8 * units * torch.maximum(p, q))
    return (
        (tied + p * tied.sum(-1, keepdim=True))
        * case.weight
        * max(case.temperature, 1 / case.temperature)
        / units
    )


def _sensitivity(scaled: Tensor, target: Tensor | None, ratio: bool) -> Tensor:
    """How much a gradient moves with the log-probabilities, per class.

    By the probabilities among the classes other than the target. At the target by c (1 - c), what
    an error of the log-odds moves; by 1 - c where the ratio b / c is a factor.
    """
    if target is None:
        return scaled.softmax(-1)
    hot = torch.arange(scaled.shape[-1]) == target.unsqueeze(-1)
    rest = torch.where(hot, -INF, scaled)
    odds = torch.where(hot, scaled, -INF).logsumexp(-1) - rest.logsumexp(-1)
    at_target = (-odds).sigmoid() * (1.0 if ratio else odds.sigmoid())
    return torch.where(hot, at_target.unsqueeze(-1), rest.softmax(-1).nan_to_num(0.0))


def assert_within(
    ours: Tensor, truth: Tensor, eager: Tensor, tolerance: Tensor, what: str = ""
) -> None:
    """|ours - truth| <= |eager - truth| + tolerance, elementwise, truth being float64.

    Equal infinities agree. Where eager is not finite the tolerance alone counts.
    """
    ours, eager = ours.double(), eager.double()
    error = torch.where(ours == truth, 0.0, (ours - truth).abs())
    allowed = (eager - truth).abs().nan_to_num(0.0, posinf=0.0) + tolerance
    bad = ~(error <= allowed)
    if bad.any():
        index = (error / allowed).nan_to_num(INF).argmax()
        at = tuple(int(i) for i in torch.unravel_index(index, error.shape))
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} off; worst at {at}: {ours[at]:.9g}, truth"
            f" {truth[at]:.9g}, error {error[at]:.3g}, allowed {allowed[at]:.3g}"
        )


def assert_same(ours: Tensor, theirs: Tensor, what: str = "") -> None:
    """The same bits, NaN included."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    assert torch.equal(ours.nan_to_num(123.0), theirs.nan_to_num(123.0)), what
    assert torch.equal(ours.isnan(), theirs.isnan()), what
