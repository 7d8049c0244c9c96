"""From checked arguments to a loss: a backend runs, rows are reduced."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import backend, ops, reference, sharded, tensors
from kdkernels.arguments import (
    COMMON,
    INTEGER_DTYPES,
    LOGIT_DTYPES,
    WEIGHTS,
    Inputs,
    any_wants_gradient,
    check_like,
    check_option,
    common_options,
    is_on,
    kept,
    number,
    positive,
    read_tensors,
    scalar,
    tensor,
    wants_gradient,
    wrong_target,
)
from kdkernels.autograd import counted_rows, divided
from kdkernels.rows import as_rows
from kdkernels.tensors import WHOLE

Numbers = tuple[float | Tensor, ...]


class Parts(NamedTuple):
    """What a loss returns with `return_parts`, each reduced alike.

    loss is kd_weight * distillation + ce_weight * cross_entropy; these two are detached.
    """

    loss: Tensor
    distillation: Tensor
    cross_entropy: Tensor


class Settings(NamedTuple):
    """What the options and numbers of a call come to, whatever its tensors are."""

    options: Mapping[str, Any]
    params: Numbers  # in the order of the operators
    needs_target: bool = False
    at_once: _AtOnce | None = None  # where nothing about the call is special


class _AtOnce(NamedTuple):
    """What an operator is given beside the tensors of a call with such settings."""

    backend: str | None
    mean: bool
    ignore_index: int


def loss(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    own: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Any:
    """The loss `name`. own: its own parameters, the temperature first and then in the order of the
    operators; given: common ones.
    """
    settings = _settings(_weighed, name, own, given)
    if target is None and settings.needs_target:
        ce_weight = settings.options["ce_weight"]
        raise ValueError(f"target: got None; ce_weight={ce_weight} needs a tensor of class ids")
    return _over_rows(name, student, teacher, target, settings)


def alone(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    own: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Any:
    """The loss `name` by itself: nothing weighs it against a cross-entropy. own: its parameters in
    order.
    """
    return _over_rows(name, student, teacher, target, _settings(_by_itself, name, own, given))


def _weighed(name: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    options = common_options(f"{name}_loss", tuple(own), given)
    temperature, *rest = _checked(name, own)
    weights = (options["kd_weight"], options["ce_weight"], options["label_smoothing"])
    params = (temperature, *weights, *(temperature if x is None else x for x in rest))
    return Settings(options, params, is_on(options["ce_weight"]))


def _by_itself(name: str, own: Mapping[str, Any], given: Mapping[str, Any]) -> Settings:
    options = common_options(f"{name}_loss", tuple(own), given, WEIGHTS)
    return Settings(options, _checked(name, own))


# Options that change nothing in the way of a call to its operator.
_ORDINARY = {*WEIGHTS, "ignore_index", "reduction", "backend"} - {"return_parts"}
_Reader = Callable[[str, Mapping[str, Any], Mapping[str, Any]], Settings]
# Of these, equal values of one type are one value (0.0 and -0.0, too).
_VALUES = frozenset((float, int, bool, str, type(None)))


def _settings(
    read: _Reader, name: str, own: Mapping[str, Any], given: Mapping[str, Any]
) -> Settings:
    """Reads the options of a call, or remembers what they came to."""
    values = (*own.values(), *given.values())
    if torch.compiler.is_compiling() or not _VALUES.issuperset(map(type, values)):
        return read(name, own, given)
    return _remembered(read, name, tuple(own), tuple(given), *values)


@lru_cache(maxsize=1024, typed=True)
def _remembered(
    read: _Reader, name: str, own: tuple[str, ...], given: tuple[str, ...], *values: Any
) -> Settings:
    settings = read(
        name,
        dict(zip(own, values, strict=False)),
        dict(zip(given, values[len(own) :], strict=True)),
    )
    options = settings.options
    special = {x for x in COMMON if options[x] != COMMON[x]} - _ORDINARY
    if special or options["reduction"] not in ("mean", "sum"):
        return settings
    mean = options["reduction"] == "mean"
    at_once = _AtOnce(options["backend"], mean, options["ignore_index"])
    return settings._replace(at_once=at_once)


def _checked(loss: str, own: Mapping[str, Any]) -> tuple[Any, ...]:
    """Numbers as the operators take them. Those of rows are checked when these are known."""
    return tuple(
        [
            value
            if isinstance(value, Tensor) and value.dim() > 0
            else check_option(name, value, loss)
            for name, value in own.items()
        ]
    )


def _over_rows(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    settings: Settings,
) -> Any:
    options, params, _, at_once = settings
    if at_once is not None:
        try:
            value = _reduced_at_once(name, student, teacher, target, at_once, params)
        except RuntimeError:
            wrong = _what_is_wrong(name, student, teacher, target, options, params)
            if wrong is None:
                raise
        else:
            wrong = None
        if wrong is not None:
            kind, words = wrong
            raise kind(words)
        if value is not None:
            return value
    if sharded.is_sharded(student):
        run = partial(_rows, name, params=params)
        return _over_ranks(name, run, student, teacher, target, options, params)
    inputs, params = _read(name, student, teacher, target, options, params)
    divisor = _divisor(options, student)
    with_parts = options["return_parts"]
    if divisor is None or not _fits_one_sweep(inputs, divisor, params):
        value, parts = _rows(name, inputs, params, with_parts)
        value = _reduce(value, inputs, divisor)
    else:
        value, parts = _reduced(name, inputs, params, divisor, with_parts)
    if with_parts and target is None and parts is not None:
        # The class that a mask was given along with is nobody's target.
        parts = torch.stack((parts[0], torch.zeros_like(parts[1])))
    return _returned(value, parts, inputs, divisor) if with_parts else value


def _reduced_at_once(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    settings: _AtOnce,
    numbers: Numbers,
) -> Tensor | None:
    """The reduced loss of a call that is nothing special, with few questions asked; None where one
    is not answered as expected. The operator refuses the rest.
    """
    if type(student) not in WHOLE or student.dim() > 3:
        return None
    if tensors.is_transformed() or tensors.is_mapped_by_autograd(student):
        return None
    with_grad = torch.is_grad_enabled()
    if teacher is not None:
        if type(teacher) not in WHOLE or teacher.device != student.device:
            return None
        if with_grad and teacher.requires_grad:
            return None
    if target is not None:
        if type(target) not in WHOLE or target.dtype is not torch.int64:
            return None
        if target.shape != student.shape[:-1] or target.device != student.device:
            return None
        if target.is_inference() or not target.is_contiguous():
            return None
    with_grad = with_grad and student.requires_grad
    if with_grad and student.dtype is torch.float16:
        return None
    named, mean, ignore_index = settings
    chosen = backend.choose(named, student.device)
    if chosen != "cpu" and (chosen == "reference" or backend.checks_targets(student.device)):
        return None
    operators = ops.TRITON if chosen == "triton" else ops.FUSED
    return operators.reduced_loss(
        with_grad, name, student, teacher, target, mean, _constant(numbers), ignore_index
    )


def _what_is_wrong(
    name: str,
    student: Any,
    teacher: Any,
    target: Any,
    options: Mapping[str, Any],
    params: Numbers,
) -> tuple[type[Exception], str] | None:
    """Which argument an operator has refused, if one: as words, see wrong_target."""
    try:
        inputs, _ = _read(name, student, teacher, target, options, params)
    except (TypeError, ValueError) as error:
        return type(error), str(error)
    words = _refused_target(inputs)
    return None if words is None else (ValueError, words)


def _refused_target(inputs: Inputs) -> str | None:
    """Of a call that an operator has refused: the target, if that is why. The CPU kernels check it
    before they start; others do not, nor may the host wait for it.
    """
    target = inputs.target
    looked_at = inputs.backend == "cpu" and target is not None and tensors.is_eager(target)
    return wrong_target(inputs) if looked_at else None


def rows(
    name: str, logits: Tensor, target: Tensor, own: Mapping[str, Any], options: Mapping[str, Any]
) -> Tensor:
    """The rows of a loss of one tensor without weights."""
    numbers = _checked(name, own)

    def local(logits: Tensor, _: Any, target: Tensor, __: Any) -> Tensor:
        inputs, params = _read(name, logits, None, target, options, numbers, "logits")
        return _rows(name, inputs, params)[0]

    if sharded.is_sharded(logits):
        _refuse_for_ranks(name, numbers)
        value: Tensor = sharded.over_rows(
            local, logits, None, target, None, options["dim"], "logits"
        )
        return value
    return local(logits, None, target, None)


def _read(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    options: Mapping[str, Any],
    params: Numbers,
    student_name: str = "student",
    names: Sequence[str] = (),
) -> tuple[Inputs, Numbers]:
    """The checked tensors of a call, with the backend that takes it, and its checked numbers.

    names: of the numbers, where they are not those of the loss.
    """
    inputs = read_tensors(name, student, teacher, target, options, student_name)
    if any([isinstance(x, Tensor) for x in params]):
        named = zip(names or reference.LOSSES[name].params, params, strict=True)
        params = tuple([_of_call(name, of, x, inputs) for of, x in named])
    return _where_kernels_serve(inputs, params, options["backend"]), params


def _of_call(loss: str, name: str, value: float | Tensor, inputs: Inputs) -> float | Tensor:
    """A number, checked against the logits; those of each row in the rows that are read."""
    if not isinstance(value, Tensor):
        return value
    if value.dim() == 0:
        here = inputs.student.device
        if value.device not in (here, _CPU):
            allowed = "cpu" if here == _CPU else f"cpu or {here}"
            raise ValueError(f"{name}: got device {value.device}; must be {allowed}")
        return value
    tensor(name, value, (*LOGIT_DTYPES, *INTEGER_DTYPES))
    shape = inputs.student.shape[:-1]
    if value.shape != shape:
        raise ValueError(
            f"{name}: got shape {tuple(value.shape)}; a tensor must be 0-d, or hold one number"
            f" for each row: {tuple(shape)}"
        )
    check_like(name, value, shape, inputs.student)
    unread = None
    if inputs.target is not None:
        unread = inputs.target == inputs.ignore_index
    if inputs.row_weight is not None and not wants_gradient(inputs.row_weight):
        of_no_weight = inputs.row_weight == 0
        unread = of_no_weight if unread is None else unread | of_no_weight
    if unread is not None:
        value = torch.where(unread, 1.0, value)
    checked: Tensor = check_option(name, value, loss)
    return checked


def _are_of_rows(numbers: Numbers) -> bool:
    """Whether one of them is a tensor of one for each row."""
    return any([isinstance(x, Tensor) and x.dim() > 0 for x in numbers])


def _returned(
    value: Tensor, parts: Tensor | None, inputs: Inputs, divisor: _Divisor | None
) -> Parts:
    assert parts is not None
    parts = parts.detach()
    if divisor is not None:
        parts = torch.stack([_reduce(x, inputs, divisor) for x in parts])
    return Parts(value, *parts.unbind())


def _over_ranks(
    name: str,
    run: Callable[..., tuple[Tensor, Tensor | None]],
    student: Any,
    teacher: Any,
    target: Any,
    options: Mapping[str, Any],
    params: Numbers,
) -> Any:
    """A loss of DTensors. run(inputs=, with_parts=): its rows."""
    with_parts, row_weight = options["return_parts"], options["row_weight"]

    def local(student: Tensor, teacher: Any, target: Any, row_weight: Any) -> Tensor:
        own = {**options, "row_weight": row_weight}
        inputs, _ = _read(name, student, teacher, target, own, params)
        value, parts = run(inputs=inputs, with_parts=with_parts)
        counts = torch.ones_like(value)
        if inputs.target is not None:
            counts = (inputs.target != inputs.ignore_index).to(value.dtype)
        of_parts = () if parts is None else parts.detach().unbind()
        if of_parts and target is None:
            of_parts = (of_parts[0], torch.zeros_like(of_parts[1]))
        return torch.stack([value, *of_parts, counts])

    _refuse_for_ranks(name, params)
    if options["causal"]:
        sharded.refuse_split_sequences(student)
    stacked = sharded.over_rows(local, student, teacher, target, row_weight, options["dim"])
    divisor = _divisor(options, student)
    if divisor is None:
        out = [stacked[i] for i in range(stacked.shape[0] - 1)]
    else:
        totals = sharded.totals(stacked)
        whole = divided(totals[:-1], divisor.normalizer, totals[-1] if divisor.mean else None)
        out = [sharded.replicated(x, student) for x in whole.unbind()]
    return Parts(*out) if with_parts else out[0]


def _refuse_for_ranks(name: str, params: Numbers) -> None:
    """Numbers that DTensors cannot be computed with."""
    if _are_of_rows(params):
        names = zip(reference.LOSSES[name].params, params, strict=False)
        of = next(of for of, x in names if isinstance(x, Tensor) and x.dim() > 0)
        raise ValueError(
            f"{of}: got a tensor of one number for each row; with DTensors it must be a number or"
            " a 0-d tensor"
        )
    if any_wants_gradient(params):
        raise ValueError(
            "temperature and weights: got one that requires a gradient, of which each rank would"
            " have a part; with DTensors they are numbers, or tensors that require none"
        )


# ---- parameters as the operators take them -----------------------------------------------------


def _constant(numbers: Numbers) -> Tensor:
    # Where a mode has its way with every tensor, this one would be of its kind for all that follow.
    make = _make_constant if torch._C._len_torch_dispatch_stack() else _keep_constant
    return make(numbers)


def _make_constant(numbers: Numbers) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(numbers, dtype=torch.float64, device="cpu")


_keep_constant = lru_cache(maxsize=1024)(_make_constant)
_CPU = torch.device("cpu")
# Backends whose operators take params of (rows, numbers), on the device of the logits.
_TAKE_NUMBERS_OF_ROWS = ("cpu", "triton")


def _as_tensor(number: float | Tensor, device: torch.device) -> Tensor:
    if isinstance(number, Tensor) and number.device == device:
        return number.to(torch.float64)
    # By arithmetic: so a number that changes from call to call stays a variable of a graph, and
    # goes to a device along with a kernel, without a copy that the host would wait for.
    return torch.zeros((), dtype=torch.float64, device=device) + number


def _packed(numbers: Numbers, like: Tensor) -> Tensor:
    """Numbers as the operators take them; `like` is the student of the call."""
    plain = tensors.is_eager(like) and not tensors.is_transformed()
    if plain and all(type(x) is float for x in numbers):
        return _constant(numbers)
    if not numbers:
        return torch.zeros(0, dtype=torch.float64, device="cpu")
    if not (_are_of_rows(numbers) or _are_on_a_device(numbers)):
        return torch.stack([_as_tensor(x, _CPU) for x in numbers], -1)
    # A number on the device is one of every row.
    rows = math.prod(like.shape[:-1])
    return torch.stack([_as_tensor(x, like.device).reshape(-1).expand(rows) for x in numbers], -1)


def _are_on_a_device(numbers: Numbers) -> bool:
    """Whether the host cannot read one of them without waiting for it."""
    return any([isinstance(x, Tensor) and x.device.type != "cpu" for x in numbers])


def _where_kernels_serve(inputs: Inputs, params: Numbers, named: str | None) -> Inputs:
    """Moves a call that the kernels of its backend cannot take to those of Triton, or else to the
    reference, with words; refuses it where the kernels were asked for by name.
    """
    if inputs.backend == "reference":
        return inputs
    other = ""
    if torch.compiler.is_compiling() and tensors.is_functorch():
        # The operators stay whole while a graph is traced, and torch.func has to look into them.
        why = "torch.func under torch.compile"
    elif tensors.is_forward_over_forward():
        why = "forward mode over forward mode"
    elif not any([isinstance(x, Tensor) for x in params]):
        return inputs
    else:
        of_rows = _are_of_rows(params)
        if not (of_rows or _are_on_a_device(params)):
            return inputs
        if not tensors.is_transformed():
            if inputs.backend in _TAKE_NUMBERS_OF_ROWS:
                return inputs
            if backend.serves("triton", inputs.student.device):
                if named is None:
                    return inputs._replace(backend="triton")
                other = " or take 'triton'"
        why = "numbers of each row" if of_rows else "numbers that are tensors on a device"
        why += " (the kernels of the CPU and of Triton take them, but not under torch.func)"
    if named is not None:
        raise RuntimeError(
            f"backend: got {named!r}, which cannot compute {why}; leave it None{other}"
        )
    backend.warn_once(
        why,
        f"kdkernels computes {why} in the reference, which is slower and takes more memory than"
        f" backend {inputs.backend!r}",
    )
    return inputs._replace(backend="reference")


# ---- reductions ----------------------------------------------------------------------------


class _Divisor(NamedTuple):
    """What a sum of rows is divided by, as the operator `reduced` takes it."""

    normalizer: Tensor | None
    mean: bool


def _divisor(options: Mapping[str, Any], student: Tensor) -> _Divisor | None:
    """None for reduction "none". student: the logits as given."""
    reduction, normalizer = options["reduction"], options["normalizer"]
    if reduction == "none":
        if normalizer is not None:
            raise ValueError("normalizer: got one with reduction 'none', which divides by nothing")
        return None
    if isinstance(normalizer, Tensor):
        return _Divisor(_as_divisor(scalar("normalizer", normalizer), student), False)
    if normalizer is not None:
        return _Divisor(_packed((positive("normalizer", normalizer),), student)[0], False)
    if reduction == "batchmean":
        dim = options["dim"] % student.dim()
        rest = [n for i, n in enumerate(student.shape) if i != dim]
        size = float(max(rest[0], 1)) if rest else 1.0
        return _Divisor(_packed((size,), student)[0] if size != 1 else None, False)
    return _Divisor(None, reduction == "mean")


def _as_divisor(normalizer: Tensor, student: Tensor) -> Tensor:
    if sharded.is_sharded(normalizer):
        normalizer = normalizer.full_tensor()  # type: ignore[attr-defined]
    normalizer = kept(normalizer)
    # On the CPU it is read by the kernels, and nothing has to be sent. Elsewhere a cast is a
    # launch: _run() and divided() make the one that they need.
    here = normalizer.device.type == "cpu"
    return normalizer.double() if here else normalizer.to(student.device)


def _reduce(value: Tensor, inputs: Inputs, divisor: _Divisor | None) -> Tensor:
    if divisor is None:
        return value
    shape = inputs.student.shape[:-1]
    counted = counted_rows(divisor.mean, shape, inputs.target, inputs.ignore_index)
    return divided(value.sum(), divisor.normalizer, counted)


# ---- running -------------------------------------------------------------------------------


def _fits_one_sweep(inputs: Inputs, divisor: _Divisor, params: Numbers) -> bool:
    """Whether loss and gradient can come from one sweep, before the upstream gradient is known."""
    if inputs.backend == "reference" or tensors.is_transformed():
        return False
    others = (inputs.teacher, inputs.row_weight, divisor.normalizer, *params)
    if any_wants_gradient(others):
        return False
    # A float16 gradient must be rounded after the upstream gradient has multiplied it: rounded
    # before, it underflows, and the scale of a GradScaler comes too late.
    return not (inputs.student.dtype == torch.float16 and wants_gradient(inputs.student))


def _run(op_name: str, name: str, inputs: Inputs, params: Numbers, *options: Any) -> Any:
    operators = ops.TRITON if inputs.backend == "triton" else ops.FUSED
    packed = _packed(params, inputs.student)
    with_grad = any_wants_gradient((*inputs[:4], packed))
    op = getattr(operators, op_name)
    if op_name == "reduced":
        (normalizer, mean), with_parts = options
        if normalizer is not None and normalizer.device.type != "cpu":
            normalizer = normalizer.to(inputs.dtype)
        divisor = (normalizer, mean)
        more: tuple[Any, ...] = (*divisor, packed, inputs.ignore_index, with_grad, with_parts)
    else:
        more = (packed, inputs.ignore_index, *options)
    more = (*more, inputs.classes)
    try:
        return operators.apply(op, with_grad, name, *as_rows(*inputs[:4]), *more)
    except RuntimeError:
        wrong = _refused_target(inputs)
        if wrong is None:
            raise
    raise ValueError(wrong)


def _reduced(
    name: str, inputs: Inputs, params: Numbers, divisor: _Divisor, with_parts: bool = False
) -> tuple[Tensor, Tensor | None]:
    value, *rest = _run("reduced", name, inputs, params, divisor, with_parts)
    return value, rest[-1] if with_parts else None


def _rows(
    name: str, inputs: Inputs, params: Numbers, with_parts: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The loss of each row, in the shape of the target; several outputs are stacked in front. And
    its parts, (2, *rows).
    """
    row_weight = inputs.row_weight
    if wants_gradient(row_weight):
        assert row_weight is not None
        value, parts = _rows(name, inputs._replace(row_weight=None), params, with_parts)
        if parts is not None:
            parts = _weigh(parts.detach(), row_weight.detach())
        return _weigh(value, row_weight), parts
    if inputs.backend == "reference":
        return _reference_rows(name, inputs, params, with_parts)
    teacher = inputs.teacher
    if teacher is not None and wants_gradient(teacher):
        backend.warn_once(
            "teacher",
            "kdkernels: the teacher requires a gradient, which the reference computes: slower, and"
            " with several times the memory. If it is not meant to be trained, run it under"
            " torch.no_grad() or call requires_grad_(False) on it",
        )
    compiling = torch.compiler.is_compiling()
    if not compiling and teacher is not None and wants_gradient(inputs.student):
        # Kept for the backward pass, for which autograd takes no tensor of inference mode.
        inputs = inputs._replace(teacher=teacher.clone() if teacher.is_inference() else teacher)
    value, _, parts = _run("forward", name, inputs, params, with_parts)
    shape = inputs.student.shape[:-1]
    if len(shape) > 2:
        value = value.view(value.shape[:-2] + shape)
        parts = parts.view(2, *shape) if with_parts else parts
    return value, parts if with_parts else None


def _reference_rows(
    name: str, inputs: Inputs, params: Numbers, with_parts: bool
) -> tuple[Tensor, Tensor | None]:
    # As the operators take them: what is made of a number of 16 bits, such as 1 - x, is not.
    # Copied: what is changed before the backward pass, or made in inference mode, is kept by none.
    params = tuple(x.to(torch.float64, copy=True) if isinstance(x, Tensor) else x for x in params)
    given = inputs[:2] if reference.LOSSES[name].teacher else inputs[:1]
    logits = [tensors.counted(x, inputs.classes) for x in given if x is not None]
    parts: dict[str, bool] = {"parts": True} if with_parts else {}
    value = tensors.formula(
        name, logits, inputs.target, params, inputs.ignore_index, inputs.row_weight, **parts
    )
    return (value[0], value[1:]) if with_parts else (value, None)


def _weigh(rows: Tensor, row_weight: Tensor) -> Tensor:
    """rows * row_weight, 0 where that is: also for weights that are learned."""
    unusable = (row_weight == 0) & ~rows.isfinite()
    return torch.where(unusable, 0.0, rows) * row_weight


# ---- tf-NKD ----------------------------------------------------------------------------------

_OF_TF_NKD = ("kd_weight", "ce_weight", "label_smoothing")


def tf_nkd(
    student: Tensor,
    target: Tensor,
    mean_confidence: float | Tensor | None,
    given: Mapping[str, Any],
) -> Any:
    """Cross-entropy with a factor per row, made of the rows' own confidences."""
    options = common_options("tf_nkd_loss", ("mean_confidence",), given)
    weights = (options["kd_weight"], options["ce_weight"], options["label_smoothing"])
    if sharded.is_sharded(student):
        return _tf_nkd_over_ranks(student, target, mean_confidence, options, weights)
    inputs, _ = _read("cross_entropy", student, None, target, options, weights, names=_OF_TF_NKD)
    divisor = _divisor(options, student)
    confidence = _confidence(mean_confidence, inputs.dtype)
    with_parts = options["return_parts"]
    if (
        inputs.backend == "reference"
        or divisor is None
        or not _fits_one_sweep(inputs, divisor, weights)
    ):
        value, parts = _tf_nkd_rows(inputs, weights, confidence, with_parts)
        value = _reduce(value, inputs, divisor)
        return _returned(value, parts, inputs, divisor) if with_parts else value
    # One sweep for the factors, one with them as weights for the loss and its gradient.
    kd_weight, ce_weight, smoothing = weights
    smooth = is_on(smoothing) and is_on(ce_weight)
    with torch.no_grad():
        cross_entropy = _read_cross_entropy(inputs)
        share = _tf_nkd_share(cross_entropy, inputs, confidence)
        factor = kd_weight * share + (0.0 if smooth else ce_weight)
    value, _ = _reduced("cross_entropy", _weighted(inputs, factor), (0.0, 0.0), divisor)
    if smooth:
        weight = torch.ones_like(factor) * ce_weight
        smoothed = _weighted(inputs, weight)
        value = value + _reduced("cross_entropy", smoothed, (smoothing, 0.0), divisor)[0]
    if not with_parts:
        return value
    with torch.no_grad():
        parts = _tf_nkd_parts(cross_entropy, share, inputs, smoothing)
    return _returned(value, parts, inputs, divisor)


def _tf_nkd_over_ranks(
    student: Any, target: Any, mean_confidence: Any, options: Mapping[str, Any], weights: Numbers
) -> Any:
    name, dim = "cross_entropy", options["dim"]

    def counted(student: Tensor, _: Any, target: Any, row_weight: Any) -> Tensor:
        own = {**options, "row_weight": row_weight}
        inputs, _ = _read(name, student, None, target, own, weights, names=_OF_TF_NKD)
        confidence = _read_cross_entropy(inputs).neg().exp()
        read = _is_read(confidence, inputs)
        return torch.stack((torch.where(read, confidence, 0.0), read.to(confidence.dtype)))

    if mean_confidence is None:
        with torch.no_grad():
            sums = sharded.over_rows(counted, student, None, target, options["row_weight"], dim)
            total, count = sharded.totals(sums).unbind()
            mean_confidence = total / count.clamp(min=1)
    confidence = _confidence(mean_confidence, tensors.loss_dtype(student, None))
    run = partial(_tf_nkd_rows, weights=weights, confidence=confidence)
    return _over_ranks(name, run, student, None, target, options, weights)


def _weighted(inputs: Inputs, factor: Tensor) -> Inputs:
    """With another factor of each row beside its weight."""
    own = inputs.row_weight
    factor = factor.to(inputs.dtype)
    if own is not None:
        factor = torch.where(own == 0, 0.0, factor * own)
    return inputs._replace(row_weight=factor)


def _tf_nkd_parts(
    cross_entropy: Tensor, share: Tensor, inputs: Inputs, smoothing: float | Tensor
) -> Tensor:
    smoothed = cross_entropy
    if is_on(smoothing):
        smoothed = _read_cross_entropy(inputs, smoothing)
    parts = torch.stack((share * cross_entropy, smoothed))
    return parts if inputs.row_weight is None else _weigh(parts, inputs.row_weight)


def _tf_nkd_rows(
    inputs: Inputs, weights: Numbers, confidence: float | Tensor | None, with_parts: bool
) -> tuple[Tensor, Tensor | None]:
    row_weight = inputs.row_weight
    if inputs.backend == "reference" and not wants_gradient(row_weight):
        assert inputs.target is not None
        kd_weight, ce_weight, smoothing = weights
        value = reference.tf_nkd(
            tensors.counted(inputs.student, inputs.classes),
            inputs.target,
            kd_weight,
            ce_weight,
            smoothing,
            confidence,
            ignore_index=inputs.ignore_index,
            row_weight=row_weight,
            parts=with_parts,
        )
        return (value[0], value[1:]) if with_parts else (value, None)
    if wants_gradient(row_weight):
        assert row_weight is not None
        if confidence is None:
            # The mean leaves out rows of weight 0, which are read below.
            with torch.no_grad():
                confidence = _mean_confidence(_read_cross_entropy(inputs), inputs)
        bare = inputs._replace(row_weight=None)
        value, parts = _tf_nkd_rows(bare, weights, confidence, with_parts)
        if parts is not None:
            parts = _weigh(parts.detach(), row_weight.detach())
        return _weigh(value, row_weight), parts
    kd_weight, ce_weight, smoothing = weights
    cross_entropy = _read_cross_entropy(inputs)
    share = _tf_nkd_share(cross_entropy.detach(), inputs, confidence)
    if is_on(smoothing) and is_on(ce_weight):
        smoothed = _read_cross_entropy(inputs, smoothing)
        weight = torch.ones_like(share) * ce_weight
        value = _weigh(cross_entropy, kd_weight * share) + _weigh(smoothed, weight)
    else:
        value = _weigh(cross_entropy, kd_weight * share + ce_weight)
    if row_weight is not None:
        value = _weigh(value, row_weight)
    parts = None
    if with_parts:
        parts = _tf_nkd_parts(cross_entropy.detach(), share, inputs, smoothing)
    return value, parts


def _read_cross_entropy(inputs: Inputs, smoothing: float | Tensor = 0.0) -> Tensor:
    """Cross-entropy of each row without its weight; 0 where that is 0."""
    if inputs.row_weight is not None:
        inputs = inputs._replace(row_weight=(inputs.row_weight != 0).to(inputs.dtype))
    return _rows("cross_entropy", inputs, (smoothing, 0.0))[0]


def _tf_nkd_share(
    cross_entropy: Tensor, inputs: Inputs, mean_confidence: float | Tensor | None
) -> Tensor:
    """c + 1 - mean(c)."""
    if mean_confidence is None:
        mean_confidence = _mean_confidence(cross_entropy, inputs)
    return cross_entropy.neg().exp() + 1.0 - mean_confidence


def _mean_confidence(cross_entropy: Tensor, inputs: Inputs) -> Tensor:
    confidence = cross_entropy.neg().exp()
    counted = _is_read(confidence, inputs)
    total = torch.where(counted, confidence, 0.0).sum()
    return total / counted.sum().clamp(min=1)


def _is_read(confidence: Tensor, inputs: Inputs) -> Tensor:
    counted = (confidence >= 0) & (inputs.target != inputs.ignore_index)  # NaN is not >= 0
    return counted if inputs.row_weight is None else counted & (inputs.row_weight != 0)


def _confidence(value: Any, dtype: torch.dtype) -> float | Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        value = scalar("mean_confidence", value).detach()
        # A number on the host goes along with any kernel.
        return value.to(dtype)
    return number("mean_confidence", value, 0.0, 1.0, "a number from 0 to 1 or a 0-d tensor")
