"""The arguments of the losses: what they are called, what is allowed, and how they are read."""

from __future__ import annotations

import inspect
import numbers
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from kdkernels import reference
from kdkernels.backend import check_name, checks_targets, choose
from kdkernels.reference import LOSSES
from kdkernels.sharded import is_sharded
from kdkernels.tensors import is_eager, loss_dtype

REDUCTIONS = ("mean", "sum", "batchmean", "none")

LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INTEGER_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


# ---- the keyword arguments that all losses share --------------------------------------------


class SettingsOfRows(TypedDict, total=False):
    """Keyword arguments of every loss that a module keeps."""

    ignore_index: int
    reduction: str
    dim: int
    classes: int | None
    causal: bool
    backend: str | None


class OfRows(SettingsOfRows, total=False):
    """And those that belong to a call."""

    row_weight: Tensor | None
    normalizer: float | Tensor | None


class Settings(SettingsOfRows, total=False):
    """Those of a loss that is weighed against a cross-entropy, and that a module keeps."""

    kd_weight: float | Tensor
    ce_weight: float | Tensor
    label_smoothing: float | Tensor
    return_parts: bool


class Common(Settings, OfRows, total=False):
    """All of them."""


COMMON: dict[str, Any] = {
    "kd_weight": 1.0,
    "ce_weight": 0.0,
    "label_smoothing": 0.0,
    "ignore_index": -100,
    "row_weight": None,
    "normalizer": None,
    "reduction": "mean",
    "dim": -1,
    "classes": None,
    "causal": False,
    "return_parts": False,
    "backend": None,
}

_COMMON_DOC = """
Common keyword arguments:
    kd_weight, ce_weight: the loss is kd_weight * distillation + ce_weight * cross-entropy of
        student and target at temperature 1, from the same sweep. 0, or from 1e-30 to 1e30.
    label_smoothing: from 0 to 1, of the cross-entropy alone, as torch's; spread over the classes
        that the student has not at -inf.
    ignore_index: rows with this target give loss 0 and gradient 0, are not read (they may hold
        NaN) and do not count in the mean.
    row_weight: the shape of the target. A bool one is a mask: False is an ignored row. Any other
        multiplies each row's loss; rows of weight 0 are not read but count in the mean. When it
        requires a gradient they are read, because their loss is that gradient.
    normalizer: a number from 1e-30 to 1e30 or a 0-d tensor that replaces the divisor of the
        reduction, such as the number of tokens of a whole gradient accumulation. A tensor's value
        is not checked; where nothing was counted, 0 / 0 is 0. Not with reduction "none".
    reduction: "mean" divides the sum by the number of rows that are not ignored (0 rows give 0),
        "batchmean" by the size of the first dimension left without the classes (1 if there is
        none), "sum" by nothing; "none" returns each row's loss in the shape of the target.
    dim: the dimension of the classes.
    classes: how many count, the first ones, from 1 to those of the smaller of the logits. The
        others are not read and their gradient is 0; student and teacher may then have different
        numbers of them, as padded or extended vocabularies do. None: all, as many in both.
    causal: logits `(batch, length, classes)` at position i are judged by the target, and weighed by
        the row_weight, at i + 1; the last position of a sequence is an ignored row. Nothing is
        sliced or copied at the size of the logits.
    return_parts: `Parts(loss, distillation, cross_entropy)` instead of the loss. The last two are
        detached, reduced alike and without kd_weight and ce_weight; without a target the last is 0.
    backend: "cuda", "triton", "cpu" or "reference"; None takes the fastest available.

Numbers that are multiplied or divided by (temperature and all weights) may be 0-d tensors as well,
on the CPU, where reading them waits for nothing, or on the device of the logits, and may require a
gradient (the reference's). Those of the loss itself (temperatures, alpha, beta, gamma, ratio,
z_weight) may also be tensors of the shape of the target, one number for each row, on the device of
the logits; with `causal` that of position i belongs to the logits there, and those of ignored rows
are not looked at. The CPU kernels take them, rows of equal numbers together. So do the Triton
kernels, and 0-d tensors on a device; with backend None they take such a call where the CUDA
kernels, which do not, take all others. As the host does not know these numbers, all are made
numbers of rows (8 bytes each), there is a launch for each precision and each loss that they may ask
for, in which the other rows are left alone, and where a target is given the cross-entropy is
computed whatever weighs it. No value on a device is checked or, but for AEKT's learned ones, waited
for: where a temperature is not positive, or NaN, so is the row's loss. Under torch.func, and where
there is no Triton, the reference takes these calls, in float64, with a warning, once. Under
torch.compile a number that changes is compiled once more, then no more; a tensor is not.

Returns:
    float64 if either of the logits is float64, else float32: 0-d, or the shape of the target.

Raises:
    TypeError: an argument is of the wrong type or dtype.
    ValueError: a shape, layout, device or value is not allowed. A target out of range is one on a
        CPU (under torch.func and torch.compile the kernel's RuntimeError); on other devices it
        makes its row NaN unless the environment sets KDKERNELS_CHECK=1.
    RuntimeError: the backend asked for is not available, or cannot do what is asked of it.
"""

_Function = TypeVar("_Function", bound=Callable[..., Any])


# What weighs a distillation against a cross-entropy; a loss that is one of them alone has it not.
WEIGHTS = ("kd_weight", "ce_weight", "label_smoothing", "return_parts")


def complete_signature(
    signature: inspect.Signature, common: Mapping[str, Any]
) -> inspect.Signature:
    """One that ends in **common, with these instead, and their defaults."""
    given = signature.parameters
    if not any(x.kind is x.VAR_KEYWORD for x in given.values()):
        return signature
    own = [x for x in given.values() if x.kind is not x.VAR_KEYWORD]
    more = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=value,
            annotation=Common.__annotations__[name].__forward_arg__,
        )
        for name, value in common.items()
        if name not in given
    ]
    return signature.replace(parameters=[*own, *more])


def takes_common(function: _Function, without: tuple[str, ...] = ()) -> _Function:
    """Gives a function that ends in **common the signature and docstring of what it takes."""
    common = {name: value for name, value in COMMON.items() if name not in without}
    function.__signature__ = complete_signature(inspect.signature(function), common)  # type: ignore[attr-defined]
    heads = tuple(
        f"\n    {x}" for x in ("kd_weight, ce_weight:", "label_smoothing:", "return_parts:")
    )
    shared = _COMMON_DOC
    for head in heads if without else ():
        shared = _without_entry(shared, head)
    function.__doc__ = inspect.cleandoc(function.__doc__ or "") + "\n" + shared
    return function


def _without_entry(text: str, head: str) -> str:
    """A docstring without the argument that begins so."""
    before, _, after = text.partition(head)
    lines = after.split("\n")
    end = next(i for i, line in enumerate(lines) if i > 0 and not line.startswith(" " * 8))
    return before + "\n" + "\n".join(lines[end:])


def common_options(
    function: str, own: tuple[str, ...], given: Mapping[str, Any], without: tuple[str, ...] = ()
) -> dict[str, Any]:
    """The common keyword arguments of a call, checked and complete."""
    for name in given:
        if name not in COMMON or name in without:
            allowed = ", ".join((*own, *(x for x in COMMON if x not in without)))
            raise TypeError(f"{function}: got argument {name!r}; allowed are {allowed}")
    options = {**COMMON, **given}
    for name, value in given.items():
        if name in RULES:
            options[name] = RULES[name](name, value)
    return options


# ---- rules of the arguments, each written once ------------------------------------------------


def shown(value: Any) -> str:
    """A value for a message, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # of foreign types, and of integers that are too long to print
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else text[:57] + "..."


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, numbers.Real, torch.SymFloat, torch.SymInt)) and not isinstance(
        value, bool
    )


def number(name: str, value: Any, low: float, high: float, allowed: str) -> Any:
    """A float from low to high."""
    x = value
    if type(value) is not float:
        if not _is_number(value):
            raise TypeError(f"{name}: got {type(value).__name__}; must be {allowed}")
        if not isinstance(value, torch.SymFloat):
            try:
                x = float(value)
            except OverflowError:
                raise ValueError(f"{name}: got {shown(value)}; must be {allowed}") from None
    if not low <= x <= high:
        raise ValueError(f"{name}: got {shown(value)}; must be {allowed}")
    return x


def _scheduled(
    name: str,
    value: Any,
    low: float,
    high: float,
    allowed: str,
    zero: bool = False,
    rows: bool = True,
) -> float | Tensor:
    """A float, or a tensor, whose values are looked at where that costs nothing. zero: is one;
    rows: a tensor may hold one number for each row.
    """
    if not isinstance(value, Tensor):
        more = "a tensor, 0-d or of one number for each row" if rows else "a 0-d tensor"
        return number(name, value, low, high, f"{allowed}, or {more}")
    value = tensor(name, value, (*LOGIT_DTYPES, *INTEGER_DTYPES)) if rows else scalar(name, value)
    if not is_eager(value) or value.device.type != "cpu":
        return value
    if value.dim() == 0:
        x = value.item()
        if not (zero and x == 0):
            number(name, x, low, high, allowed)
        return value
    # The ends as the tensor's own dtype has them.
    x = value.detach().float() if value.dtype.itemsize < 4 else value.detach()
    good = (x >= low) & (x <= high)
    if zero:
        good |= x == 0
    if not good.all():
        raise ValueError(f"{name}: got {x[~good][0].item()}; must be {allowed}")
    return value


def _temperature(name: str, value: Any) -> float | Tensor:
    return _scheduled(name, value, 1e-4, 1e4, "a number from 1e-4 to 1e4")


def _weight(name: str, value: Any, rows: bool = True) -> float | Tensor:
    # Beyond, float32 holds neither it nor its products.
    allowed = "0 or a number from 1e-30 to 1e30"
    if _is_number(value) and value == 0:
        return 0.0
    return _scheduled(name, value, 1e-30, 1e30, allowed, zero=True, rows=rows)


def positive(name: str, value: Any) -> float:
    return number(name, value, 1e-30, 1e30, "a number from 1e-30 to 1e30 or a 0-d tensor")


def _share(name: str, value: Any, rows: bool = True) -> float | Tensor:
    return _scheduled(name, value, 0.0, 1.0, "a number from 0 to 1", rows=rows)


def _share_of_a_mixture(name: str, value: Any) -> float | Tensor:
    # A share that float32 does not hold is none, and a divergence of none is another loss.
    allowed = "0 or a number from 1e-30 to 1"
    if _is_number(value) and value == 0:
        return 0.0
    return _scheduled(name, value, 1e-30, 1.0, allowed, zero=True)


def _clamp(name: str, value: Any) -> float:
    return float(number(name, value, 0.0, 80.0, "a number from 0 to 80"))


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: got {type(value).__name__}; must be an integer")
    value = int(value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: got {shown(value)}; must be an integer of 64 bits")
    return value


def _classes(name: str, value: Any) -> int | None:
    if value is None:
        return None
    value = _integer(name, value)
    if value < 1:
        raise ValueError(f"{name}: got {value}; must be at least 1, or None")
    return value


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: got {type(value).__name__}; must be True or False")
    return value


def _switch(name: str, value: Any) -> float:
    return float(_flag(name, value))


def _teacher_temperature(name: str, value: Any) -> float | Tensor | None:
    return None if value is None else _temperature(name, value)


def _position(name: str, value: Any, allowed: tuple[str, ...]) -> int:
    if not isinstance(value, str):
        kind = type(value).__name__
        raise TypeError(f"{name}: got {kind}; must be one of {', '.join(allowed)}")
    if value not in allowed:
        raise ValueError(f"{name}: got {shown(value)}; must be one of {', '.join(allowed)}")
    return allowed.index(value)


def _variant(name: str, value: Any) -> float:
    return float(_position(name, value, reference.AEKT_VARIANTS))


def _reduction(name: str, value: Any) -> str:
    return REDUCTIONS[_position(name, value, REDUCTIONS)]


def _backend(name: str, value: Any) -> Any:
    check_name(name, value)
    return value


RULES: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _temperature,
    "teacher_temperature": _teacher_temperature,
    "t_squared": _switch,
    "ratio": _share,
    "detach_mixture": _switch,
    "z_weight": _weight,
    "alpha": _weight,
    "beta": _weight,
    "gamma": _weight,
    "variant": _variant,
    "log_ratio_max": _clamp,
    "kd_weight": partial(_weight, rows=False),
    "ce_weight": partial(_weight, rows=False),
    "label_smoothing": partial(_share, rows=False),
    "ignore_index": _integer,
    "reduction": _reduction,
    "dim": _integer,
    "classes": _classes,
    "causal": _flag,
    "return_parts": _flag,
    "backend": _backend,
}


# What a name means in some losses (kdkernels.reference.Loss.means), and not in the rest.
MEANINGS = {"share": _share, "mixed share": _share_of_a_mixture}


def check_option(name: str, value: Any, loss: str) -> Any:
    """Checks a keyword argument of a loss; returns it as the operators take it."""
    meaning = LOSSES[loss].means.get(name) if loss in LOSSES else None
    return (MEANINGS[meaning] if meaning else RULES[name])(name, value)


def tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...], hint: str = "") -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; must be a tensor{hint}")
    if value.is_nested or value.layout is not torch.strided:
        layout = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise ValueError(f"{name}: got {layout}; must be dense (torch.strided)")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {value.dtype}; must be one of {allowed}{hint}")
    return value


def check_like(name: str, value: Tensor, shape: torch.Size, logits: Tensor) -> None:
    if is_sharded(value) and not is_sharded(logits):
        raise TypeError(f"{name}: got a DTensor beside logits that are none")
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; must be {tuple(shape)}")
    if value.device != logits.device:
        raise ValueError(f"{name}: got device {value.device}; must be {logits.device}")


def scalar(name: str, value: Tensor) -> Tensor:
    value = tensor(name, value, (*LOGIT_DTYPES, *INTEGER_DTYPES))
    if value.dim() != 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; a tensor must be 0-d")
    return value


# ---- tensors ----------------------------------------------------------------------------------


class Inputs(NamedTuple):
    """Checked arguments, the classes last; target is int64 and row_weight in the loss dtype."""

    student: Tensor
    teacher: Tensor | None
    target: Tensor | None
    row_weight: Tensor | None
    ignore_index: int
    dtype: torch.dtype  # of the loss
    backend: str
    classes: int = 0  # that count; 0: all


def read_tensors(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    options: Mapping[str, Any],
    student_name: str = "student",
) -> Inputs:
    """The tensors of a call, checked; options: the common ones, complete."""
    entry = LOSSES[name]
    student = tensor(student_name, student, LOGIT_DTYPES)
    dims, dim = student.dim(), options["dim"]
    if not -dims <= dim < dims:
        raise ValueError(f"dim: got {dim}; {student_name} has {dims} dimensions")
    if entry.teacher:
        teacher = tensor("teacher", teacher, LOGIT_DTYPES)
    counted = _counted_classes(options["classes"], dim, student_name, student, teacher)
    if options["causal"] and (dims != 3 or dim not in (-1, 2)):
        raise ValueError(
            f"causal: got {student_name} of {dims} dimensions with dim={dim};"
            " must be (batch, length, classes) with dim=-1"
        )
    soft = isinstance(target, Tensor) and target.is_floating_point() and entry.soft_target
    if soft:
        assert target is not None
        tensor("target", target, LOGIT_DTYPES)
        check_like("target", target, student.shape, student)
        _check_soft(target, options)
        # NaN is no label: its class is one that does not exist.
        nan = target.isnan().any(dim)
        target = target.narrow(dim, 0, counted or student.shape[dim]).argmax(dim)
        target = torch.where(nan, student.shape[dim], target)
    if dim not in (-1, dims - 1):
        student = student.movedim(dim, -1)
        teacher = teacher.movedim(dim, -1) if teacher is not None else None
    shape, classes = student.shape[:-1], student.shape[-1]
    if classes == 0:
        raise ValueError(f"{student_name}: got 0 classes; must be at least 1")
    dtype = loss_dtype(student, teacher)
    if target is not None or entry.target:
        target = tensor("target", target, INTEGER_DTYPES, _hint(entry.soft_target, target))
        check_like("target", target, shape, student)
        target = kept(target.long())
    row_weight = options["row_weight"]
    mask = None
    if row_weight is not None:
        allowed = (torch.bool, *LOGIT_DTYPES, *INTEGER_DTYPES)
        row_weight = tensor("row_weight", row_weight, allowed)
        check_like("row_weight", row_weight, shape, student)
        if row_weight.dtype == torch.bool:
            mask, row_weight = row_weight, None
        else:
            row_weight = kept(row_weight.to(dtype))
    ignore_index = options["ignore_index"]
    if options["causal"]:
        target, row_weight, mask = _one_behind(student, target, row_weight, mask, ignore_index)
    if mask is not None:
        if target is None:
            # Which class is set apart does not matter to a loss that needs no target.
            target, ignore_index = torch.where(mask, 0, -1), -1
        else:
            target = torch.where(mask, target, ignore_index)
    if row_weight is not None and target is not None:
        # Whatever an ignored row is weighed by, inf and NaN too, its loss is 0.
        row_weight = torch.where(target == ignore_index, 0.0, row_weight)
    backend = choose(options["backend"], student.device)
    inputs = Inputs(student, teacher, target, row_weight, ignore_index, dtype, backend, counted)
    # The CPU kernels check the range themselves; see run() in call.py.
    if (
        backend != "cpu"
        and target is not None
        and is_eager(target)
        and checks_targets(target.device)
    ):
        wrong = wrong_target(inputs)
        if wrong:
            raise ValueError(wrong)
    return inputs


def _counted_classes(
    classes: int | None, dim: int, student_name: str, student: Tensor, teacher: Tensor | None
) -> int:
    """How many classes count, 0 for all, and whether student and teacher have them."""
    if teacher is not None:
        shape = student.shape
        if classes is not None and teacher.dim() == student.dim():
            own = list(shape)
            own[dim] = teacher.shape[dim]
            shape = torch.Size(own)
        check_like("teacher", teacher, shape, student)
    if classes is None:
        return 0
    for name, x in ((student_name, student), ("teacher", teacher)):
        if x is not None and classes > x.shape[dim]:
            raise ValueError(f"classes: got {classes}; {name} has {x.shape[dim]}")
    same = all(x is None or x.shape[dim] == classes for x in (student, teacher))
    return 0 if same else classes


def _hint(soft_target: bool, target: Any) -> str:
    if _is_number(target):
        return " of class ids (options go by name: temperature=4.0)"
    return ", or a floating point one of the shape of the logits" if soft_target else ""


def _check_soft(target: Tensor, options: Mapping[str, Any]) -> None:
    if wants_gradient(target):
        raise ValueError("target: got probabilities that require a gradient, which they have not")
    weight = options["ce_weight"]
    if isinstance(weight, Tensor) or weight != 0 or options["return_parts"]:
        raise ValueError(
            "target: got probabilities of classes, of which the loss takes the largest; with them"
            " ce_weight must be 0 and return_parts False: add F.cross_entropy(student, target)"
        )


def kept(value: Tensor) -> Tensor:
    """One that autograd can keep: tensors of inference mode are copied, which are small here."""
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return value
    return value.clone() if value.is_inference() else value


def _one_behind(
    student: Tensor,
    target: Tensor | None,
    row_weight: Tensor | None,
    mask: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """What belongs to position i + 1, at position i; the last position of a sequence is ignored."""

    def moved(x: Tensor, last: float) -> Tensor:
        return torch.cat((x[:, 1:], x.new_full((x.shape[0], min(x.shape[1], 1)), last)), 1)

    if target is None and mask is None:
        mask = torch.ones(student.shape[:2], dtype=torch.bool, device=student.device)
    target = None if target is None else moved(target, ignore_index)
    row_weight = None if row_weight is None else moved(row_weight, 0.0)
    mask = None if mask is None else moved(mask, False)
    return target, row_weight, mask


def wrong_target(inputs: Inputs) -> str | None:
    """What is wrong with the range of the target, if anything. As words: an exception that a frame
    holds by a name holds that frame, and its tensors, until the garbage is collected.
    """
    target, ignore_index = inputs.target, inputs.ignore_index
    classes = inputs.classes or inputs.student.shape[-1]
    if target is None:
        return None
    bad = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if not bad.numel():
        return None
    return (
        f"target: got class {bad[0].item()}; must be from 0 to {classes - 1}"
        f" or ignore_index {ignore_index}"
    )


def wants_gradient(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled()


def any_wants_gradient(values: Iterable[Any]) -> bool:
    # A list: a generator costs several times as much.
    of_tensors = [isinstance(x, Tensor) and x.requires_grad for x in values]
    return any(of_tensors) and torch.is_grad_enabled()


def is_on(weight: float | Tensor) -> bool:
    """Whether a term with this weight is there: a tensor's value is not looked at."""
    return isinstance(weight, Tensor) or weight != 0.0
