"""The losses as functions: arguments are checked, logits are viewed as rows, a backend runs."""

from __future__ import annotations

import math
import numbers
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kdkernels import ops, reference
from kdkernels.autograd import divided
from kdkernels.backend import check_name, checks_targets, choose
from kdkernels.registry import is_eager, reference_rows

REDUCTIONS = ("mean", "sum", "batchmean", "none")

_LOGIT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TARGET_DTYPES = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


class TargetSplit(NamedTuple):
    """What `target_split` returns, each with the shape of the target."""

    log_target: Tensor
    log_rest: Tensor
    logsumexp_rest: Tensor


def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float = 4.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Knowledge distillation: T^2 KL(teacher || student) at temperature T, per row.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        student: raw logits `(..., classes)`, or with the classes at `dim`; float16, bfloat16,
            float32 or float64.
        teacher: raw logits of the same shape on the same device; its dtype may differ.
        target: integer class ids, the shape of the logits without the classes. Optional here;
            needed when `ce_weight` is not 0, and a given target applies `ignore_index`.
        temperature: T > 0.
        ce_weight: adds this multiple of the cross-entropy of student and target at temperature 1,
            from the same sweep.
        ignore_index: rows with this target give loss 0 and gradient 0, are not read (they may hold
            NaN) and do not count in the mean.
        row_weight: floating point, the shape of the target; multiplies each row's loss. Rows of
            weight 0 are not read but count in the mean. When it requires a gradient they are read,
            because their loss is that gradient.
        normalizer: a number > 0 or a 0-d tensor that replaces the divisor of the reduction, such
            as the number of tokens of a whole gradient accumulation. A tensor's value is not
            checked. Not allowed with reduction "none".
        reduction: "mean" divides the sum by the number of rows that are not ignored (0 rows give
            0), "batchmean" by the size of the first dimension left without the classes (1 if there
            is none), "sum" by nothing; "none" returns each row's loss in the shape of the target.
        dim: the dimension of the classes.
        backend: "cuda", "triton", "cpu" or "reference"; None takes the fastest available.

    Returns:
        float64 if either of the logits is float64, else float32: 0-d, or the shape of the target.

    The student's gradient is fused and comes in the student's dtype. Gradients of the teacher,
    and gradients that are differentiated again, are computed by the reference.

    No input is copied at the size of the logits, with one exception: logits of four or more
    dimensions whose strides let the dimensions other than the classes be merged into no two.

    Raises:
        TypeError: an argument is of the wrong type or dtype.
        ValueError: a shape, device or value is not allowed. A target out of range is one on a CPU;
            on other devices it makes its row NaN unless the environment sets KDKERNELS_CHECK=1,
            and compiled graphs leave it to the kernel.
        RuntimeError: the backend asked for is not available.
    """
    params = (
        check_option("temperature", temperature),
        check_option("kd_weight", kd_weight),
        check_option("ce_weight", ce_weight),
        check_option("label_smoothing", label_smoothing),
    )
    if ce_weight != 0 and target is None:
        raise ValueError(f"target: got None; ce_weight={ce_weight} needs a tensor of class ids")
    inputs = _check("kd", student, teacher, target, ignore_index, row_weight, dim, backend)
    return _loss("kd", inputs, params, normalizer, reduction)


def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Decoupled knowledge distillation: T^2 (alpha TCKD + beta NCKD), per row.

    TCKD is the divergence between the binary distributions (target, not target) of teacher and
    student, NCKD that between their distributions over the other classes. Zhao et al., "Decoupled
    Knowledge Distillation", arXiv 2203.08679; the defaults are those for CIFAR-100, ImageNet has
    T = 1, alpha = 1, beta = 0.5. The paper's loss adds cross-entropy (`ce_weight=1`) and warms the
    distillation up over the first epochs, which is left to the caller.

    Args:
        target: integer class ids, the shape of the logits without the classes.
        temperature: T > 0.
        alpha, beta: finite, >= 0.

    The other arguments, the result and the errors are those of `kd_loss`.
    """
    params = (
        check_option("temperature", temperature),
        check_option("kd_weight", kd_weight),
        check_option("ce_weight", ce_weight),
        check_option("label_smoothing", label_smoothing),
        check_option("alpha", alpha),
        check_option("beta", beta),
    )
    inputs = _check("dkd", student, teacher, target, ignore_index, row_weight, dim, backend)
    return _loss("dkd", inputs, params, normalizer, reduction)


def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    gamma: float = 1.5,
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Normalised knowledge distillation: -b log c - gamma T^2 sum_{i != y} qh_i log ph_i, per row.

    b and c are the probabilities of the target in teacher and student, at temperature 1; qh and ph
    their distributions over the other classes, at temperature T. Both terms are cross-entropies,
    so the minimum is not 0. Yang et al., arXiv 2303.13005 (first as 2208.10139); the defaults are
    those for ImageNet, CIFAR-100 has T = 3, gamma = 3.5. The paper's loss adds cross-entropy
    (`ce_weight=1`).

    Args:
        target: integer class ids, the shape of the logits without the classes.
        temperature: T > 0, of the second term only.
        gamma: finite, >= 0.

    The other arguments, the result and the errors are those of `kd_loss`.
    """
    params = (
        check_option("temperature", temperature),
        check_option("kd_weight", kd_weight),
        check_option("ce_weight", ce_weight),
        check_option("label_smoothing", label_smoothing),
        check_option("gamma", gamma),
    )
    inputs = _check("nkd", student, teacher, target, ignore_index, row_weight, dim, backend)
    return _loss("nkd", inputs, params, normalizer, reduction)


def tf_nkd_loss(
    student: Tensor,
    target: Tensor,
    *,
    mean_confidence: float | Tensor | None = None,
    ce_weight: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Teacher-free NKD: -(c + 1 - mean(c)) log c, per row, the factor not being differentiated.

    c is the student's probability of the target at temperature 1. Yang et al., "Rethinking
    Knowledge Distillation via Cross-Entropy", arXiv 2208.10139. The paper's loss adds cross-entropy
    (`ce_weight=1`).

    Args:
        target: integer class ids, the shape of the logits without the classes.
        mean_confidence: replaces mean(c), which is otherwise taken over the rows that are read
            (neither ignored nor of weight 0) and are not NaN. A number from 0 to 1, or a 0-d tensor
            whose value is not checked. With data split over processes, the mean over all of them.

    The other arguments, the result and the errors are those of `kd_loss`.
    """
    weight = check_option("ce_weight", ce_weight)
    inputs = _check("cross_entropy", student, None, target, ignore_index, row_weight, dim, backend)
    divisor = _divisor(inputs, normalizer, reduction)
    confidence = _confidence(mean_confidence, inputs)
    if divisor is None or not _fits_one_sweep(inputs, divisor):
        return _reduce(_tf_nkd_rows(inputs, weight, confidence), inputs, divisor)
    # One sweep for the factors, one with them as weights for the loss and its gradient.
    with torch.no_grad():
        factor = _tf_nkd_factor(_read_cross_entropy(inputs), inputs, weight, confidence)
    inputs = inputs._replace(row_weight=factor)
    return _run("reduced", "cross_entropy", inputs, *divisor, (0.0,), inputs.ignore_index)


def aekt_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    variant: str = "ratio_weighted_tckd",
    log_ratio_max: float = math.log(10),
    kd_weight: float = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    row_weight: Tensor | None = None,
    normalizer: float | Tensor | None = None,
    reduction: str = "mean",
    dim: int = -1,
    backend: str | None = None,
) -> Tensor:
    """Adaptive explicit knowledge transfer: T^2 (alpha phi(c; b) + beta NCKD), per row.

    b and c are the probabilities of the target in teacher and student at temperature T, NCKD as in
    `dkd_loss`. What is published (Park and Lee, arXiv 2409.01679, the abstract): the student learns
    the teacher's confidence in the target, explicit knowledge, adaptively by the ratio r = b / c,
    along with the other classes. The formula is not public. The forms of phi offered here are
    derived from that description, and the default may differ from the paper's loss:

    - "ratio_weighted_tckd" (default): r TCKD with r held constant: DKD whose explicit term counts
      more where the student lags the teacher, and less where it leads.
    - "ratio_weighted_ce": -r log c with r held constant; draws c to 1, not to b.
    - "confidence_weighted_ce": -b log c; the target term of NKD at temperature T.
    - "ratio_divergence": r - log r - 1, least at c = b. Its gradient holds r itself. Beyond
      `log_ratio_max` it goes on as the tangent in log r.
    - "ratio_coupled_tckd": r TCKD, r differentiated as well.

    The paper also separates classification from distillation by a linear layer on the student's
    logits: `kdkernels.TaskSerialization`.

    Args:
        target: integer class ids, the shape of the logits without the classes.
        temperature: T > 0.
        alpha, beta: finite, >= 0.
        variant: the form of phi, one of the above.
        log_ratio_max: log r is clamped here, from 0 to 80, because r overflows when c is tiny.

    The other arguments, the result and the errors are those of `kd_loss`.
    """
    params = (
        check_option("temperature", temperature),
        check_option("kd_weight", kd_weight),
        check_option("ce_weight", ce_weight),
        check_option("label_smoothing", label_smoothing),
        check_option("alpha", alpha),
        check_option("beta", beta),
        check_option("variant", variant),
        check_option("log_ratio_max", log_ratio_max),
    )
    inputs = _check("aekt", student, teacher, target, ignore_index, row_weight, dim, backend)
    return _loss("aekt", inputs, params, normalizer, reduction)


def target_split(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    dim: int = -1,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TargetSplit:
    """Splits softmax(logits / T) into the target and the rest, the decomposition under DKD and NKD.

    Args:
        logits: `(..., classes)`, or with the classes at `dim`; any floating dtype of `kd_loss`.
        target: integer class ids, the shape of the logits without the classes.
        temperature: T > 0.
        dim, ignore_index, backend: as in `kd_loss`; ignored rows are 0 in all three results.

    Returns:
        log_target: the logarithm of the target's probability, exact also when that is near 1.
        log_rest: the logarithm of 1 minus it, exact also when that is near 0.
        logsumexp_rest: the logsumexp of logits / T over the classes other than the target.

        Each has the shape of the target, float64 for float64 logits, else float32, and is
        differentiable. With no other class left, the last two are -inf.

    Raises the errors of `kd_loss`.
    """
    params = (check_option("temperature", temperature),)
    inputs = _check(
        "target_split", logits, None, target, ignore_index, None, dim, backend, "logits"
    )
    return TargetSplit(*_rows("target_split", inputs, params).unbind())


# Rules of the arguments, each written once.


def _number(name: str, value: Any, low: float, high: float, allowed: str) -> float:
    if type(value) is not float and (
        isinstance(value, bool) or not isinstance(value, (int, numbers.Real))
    ):
        raise TypeError(f"{name}: got {type(value).__name__}; must be {allowed}")
    number: Any = value  # Real declares no comparison
    if not low <= number <= high:
        raise ValueError(f"{name}: got {value}; must be {allowed}")
    return float(number)


def _positive(name: str, value: Any) -> float:
    return _number(name, value, math.ulp(0.0), sys.float_info.max, "a finite number > 0")


def _weight(name: str, value: Any) -> float:
    return _number(name, value, 0.0, sys.float_info.max, "a finite number >= 0")


def _clamp(name: str, value: Any) -> float:
    return _number(name, value, 0.0, 80.0, "a number from 0 to 80")


def _integer(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Integral)):
        raise TypeError(f"{name}: got {type(value).__name__}; must be an integer")
    return int(value)


def _variant(name: str, value: Any) -> float:
    return float(_position(name, value, reference.AEKT_VARIANTS))


def _reduction(name: str, value: Any) -> int:
    return _position(name, value, REDUCTIONS)


def _position(name: str, value: Any, allowed: tuple[str, ...]) -> int:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}; must be one of {', '.join(allowed)}")
    return allowed.index(value)


_RULES: dict[str, Callable[[str, Any], Any]] = {
    "temperature": _positive,
    "alpha": _weight,
    "beta": _weight,
    "gamma": _weight,
    "variant": _variant,
    "log_ratio_max": _clamp,
    "kd_weight": _weight,
    "ce_weight": _weight,
    "label_smoothing": _weight,
    "ignore_index": _integer,
    "reduction": _reduction,
    "dim": _integer,
    "backend": check_name,
}


def check_option(name: str, value: Any) -> Any:
    """Checks a keyword argument that is no tensor; returns it as the operators take it."""
    return _RULES[name](name, value)


def _confidence(value: Any, inputs: _Inputs) -> float | Tensor | None:
    if value is None:
        return None
    if isinstance(value, Tensor):
        _check_scalar("mean_confidence", value)
        return _beside_logits(value.detach(), inputs)
    return _number("mean_confidence", value, 0.0, 1.0, "a number from 0 to 1 or a 0-d tensor")


def _beside_logits(number: Tensor, inputs: _Inputs) -> Tensor:
    """A 0-d tensor on the device of the logits, in the dtype of the loss."""
    device = inputs.student.device
    if number.device.type == "cpu" and device.type != "cpu":
        # From pageable memory, hence the clone, a number is read before the call returns, and
        # nothing waits for the device. The other way round it would come before its value.
        return number.clone().to(device, inputs.dtype, non_blocking=True)
    return number.to(device, inputs.dtype)


def _tensor(name: str, value: Any, dtypes: tuple[torch.dtype, ...]) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: got {type(value).__name__}; must be a tensor")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name}: got dtype {value.dtype}; must be one of {allowed}")
    return value


def _check_like(name: str, value: Tensor, shape: torch.Size, logits: Tensor) -> None:
    if value.shape != shape:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; must be {tuple(shape)}")
    if value.device != logits.device:
        raise ValueError(f"{name}: got device {value.device}; must be {logits.device}")


def _check_scalar(name: str, value: Tensor) -> None:
    if value.dim() != 0:
        raise ValueError(f"{name}: got shape {tuple(value.shape)}; a tensor must be 0-d")


class _Inputs(NamedTuple):
    """Checked arguments, the classes last; target is int64 and row_weight in the loss dtype."""

    student: Tensor
    teacher: Tensor | None
    target: Tensor | None
    row_weight: Tensor | None
    ignore_index: int
    dtype: torch.dtype  # of the loss
    backend: str


def _check(
    name: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    ignore_index: int,
    row_weight: Tensor | None,
    dim: int,
    backend: str | None,
    student_name: str = "student",
) -> _Inputs:
    entry = ops.LOSSES[name]
    student = _tensor(student_name, student, _LOGIT_DTYPES)
    dims = student.dim()
    dim = check_option("dim", dim)
    if not -dims <= dim < dims:
        raise ValueError(f"dim: got {dim}; {student_name} has {dims} dimensions")
    if entry.teacher:
        teacher = _tensor("teacher", teacher, _LOGIT_DTYPES)
        _check_like("teacher", teacher, student.shape, student)
    if dim not in (-1, dims - 1):
        student = student.movedim(dim, -1)
        teacher = teacher.movedim(dim, -1) if teacher is not None else None
    shape, classes = student.shape[:-1], student.shape[-1]
    if classes == 0:
        raise ValueError(f"{student_name}: got 0 classes; must be at least 1")
    dtype = ops.loss_dtype(student, teacher)
    ignore_index = check_option("ignore_index", ignore_index)
    if target is not None or entry.target:
        target = _tensor("target", target, _TARGET_DTYPES)
        _check_like("target", target, shape, student)
        if target.dtype != torch.int64:
            target = target.long()
    if row_weight is not None:
        row_weight = _tensor("row_weight", row_weight, _LOGIT_DTYPES).to(dtype)
        _check_like("row_weight", row_weight, shape, student)
    chosen = choose(backend, student.device)
    if _wants_gradient(teacher):
        chosen = "reference"
    inputs = _Inputs(student, teacher, target, row_weight, ignore_index, dtype, chosen)
    # The CPU kernels check the range themselves; see _run.
    if chosen != "cpu" and target is not None and is_eager(target):
        error = _range_error(inputs) if checks_targets(target.device) else None
        if error is not None:
            raise error
    return inputs


def _range_error(inputs: _Inputs) -> ValueError | None:
    """What is wrong with the range of the target, if anything."""
    target, classes, ignore_index = inputs.target, inputs.student.shape[-1], inputs.ignore_index
    if target is None:
        return None
    bad = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
    if not bad.numel():
        return None
    return ValueError(
        f"target: got class {bad[0].item()}; must be from 0 to {classes - 1}"
        f" or ignore_index {ignore_index}"
    )


def _wants_gradient(value: Tensor | None) -> bool:
    return value is not None and value.requires_grad and torch.is_grad_enabled()


# From checked arguments to a loss.


def _loss(
    name: str,
    inputs: _Inputs,
    params: tuple[float, ...],
    normalizer: float | Tensor | None,
    reduction: str,
) -> Tensor:
    divisor = _divisor(inputs, normalizer, reduction)
    if divisor is None or not _fits_one_sweep(inputs, divisor):
        return _reduce(_rows(name, inputs, params), inputs, divisor)
    return _run("reduced", name, inputs, *divisor, params, inputs.ignore_index)


def _float64(number: float) -> Tensor:
    return torch.tensor(number, dtype=torch.float64)


class _Divisor(NamedTuple):
    """What a sum of rows is divided by, as the operator `reduced` takes it."""

    normalizer: Tensor | None
    mean: bool


def _divisor(inputs: _Inputs, normalizer: float | Tensor | None, reduction: str) -> _Divisor | None:
    """None for reduction "none"."""
    check_option("reduction", reduction)
    if reduction == "none":
        if normalizer is not None:
            raise ValueError("normalizer: got one with reduction 'none', which divides by nothing")
        return None
    if isinstance(normalizer, Tensor):
        _check_scalar("normalizer", normalizer)
        return _Divisor(_beside_logits(normalizer, inputs), False)
    if normalizer is not None:
        return _Divisor(_float64(_positive("normalizer", normalizer)), False)
    if reduction == "batchmean":
        shape = inputs.student.shape[:-1]
        return _Divisor(_float64(float(max(shape[0], 1))) if shape else None, False)
    return _Divisor(None, reduction == "mean")


def _fits_one_sweep(inputs: _Inputs, divisor: _Divisor) -> bool:
    """Whether loss and gradient can come from one sweep, before the upstream gradient is known."""
    if inputs.backend == "reference":
        return False
    if _wants_gradient(divisor.normalizer) or _wants_gradient(inputs.row_weight):
        return False
    # A float16 gradient must be rounded after the upstream gradient has multiplied it: rounded
    # before, it underflows, and the scale of a GradScaler comes too late.
    return not (inputs.student.dtype == torch.float16 and _wants_gradient(inputs.student))


def _run(op_name: str, loss: str, inputs: _Inputs, *options: Any) -> Tensor:
    operators = ops.TRITON if inputs.backend == "triton" else ops.FUSED
    with_grad = _wants_gradient(inputs.student)
    *options, params, ignore_index = options
    options = (*options, torch.tensor(params, dtype=torch.float64), ignore_index)
    if op_name == "reduced":
        options = (*options, with_grad)
    options = (*options, False)
    op = getattr(operators, op_name)
    try:
        return operators.apply(op, with_grad, loss, *_as_rows(inputs), *options)[0]
    except RuntimeError:
        # The CPU kernels check the targets before they start, so it is not done here as well.
        error = _range_error(inputs) if inputs.backend == "cpu" else None
        if error is None:
            raise
    raise error


def _reduce(rows: Tensor, inputs: _Inputs, divisor: _Divisor | None) -> Tensor:
    if divisor is None:
        return rows
    return divided(rows.sum(), rows.shape, inputs.target, inputs.ignore_index, *divisor)


def _rows(name: str, inputs: _Inputs, params: tuple[float, ...]) -> Tensor:
    """The loss of each row, in the shape of the target; several outputs are stacked in front."""
    row_weight = inputs.row_weight
    if row_weight is not None and _wants_gradient(row_weight):
        return _weigh(_rows(name, inputs._replace(row_weight=None), params), row_weight)
    if inputs.backend == "reference":
        return reference_rows(
            name, *inputs[:4], torch.tensor(params, dtype=torch.float64), inputs.ignore_index
        )
    rows = _run("forward", name, inputs, params, inputs.ignore_index)
    shape = inputs.student.shape[:-1]
    return rows if len(shape) <= 2 else rows.view(rows.shape[:-2] + shape)


def _weigh(rows: Tensor, row_weight: Tensor) -> Tensor:
    """rows * row_weight for weights that are learned: their gradient is the row's loss."""
    unusable = (row_weight == 0) & ~rows.isfinite()
    return torch.where(unusable, 0.0, rows) * row_weight


def _tf_nkd_rows(
    inputs: _Inputs, ce_weight: float, mean_confidence: float | Tensor | None
) -> Tensor:
    row_weight = inputs.row_weight
    if row_weight is not None and _wants_gradient(row_weight):
        rows = _tf_nkd_rows(inputs._replace(row_weight=None), ce_weight, mean_confidence)
        return _weigh(rows, row_weight)
    if inputs.backend == "reference":
        assert inputs.target is not None
        return reference.tf_nkd(
            inputs.student,
            inputs.target,
            1.0,
            ce_weight,
            0.0,
            mean_confidence,
            ignore_index=inputs.ignore_index,
            row_weight=row_weight,
        )
    cross_entropy = _read_cross_entropy(inputs)
    factor = _tf_nkd_factor(cross_entropy.detach(), inputs, ce_weight, mean_confidence)
    return cross_entropy * factor


def _read_cross_entropy(inputs: _Inputs) -> Tensor:
    """Cross-entropy of each row without its weight; 0 where that is 0."""
    if inputs.row_weight is not None:
        inputs = inputs._replace(row_weight=(inputs.row_weight != 0).to(inputs.dtype))
    return _rows("cross_entropy", inputs, (0.0,))


def _tf_nkd_factor(
    cross_entropy: Tensor,
    inputs: _Inputs,
    ce_weight: float,
    mean_confidence: float | Tensor | None,
) -> Tensor:
    """What multiplies the cross-entropy of each row, its weight included."""
    confidence = cross_entropy.neg().exp_()
    if mean_confidence is None:
        counted = (confidence >= 0) & (inputs.target != inputs.ignore_index)  # NaN is not >= 0
        if inputs.row_weight is not None:
            counted &= inputs.row_weight != 0
        total = torch.where(counted, confidence, 0.0).sum()
        mean_confidence = total / counted.sum().clamp_(min=1)
    factor = confidence.add_(1.0 + ce_weight).sub_(mean_confidence)
    return factor if inputs.row_weight is None else factor.mul_(inputs.row_weight)


# Views of the logits with the one or two dimensions of rows, or none, that the operators take.


def _as_rows(inputs: _Inputs) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    student, teacher, target, row_weight = inputs[:4]
    if student.dim() > 3:
        if teacher is None:
            (student,) = _merge_rows(student)
        else:
            student, teacher = _merge_rows(student, teacher)
        target = target.reshape(student.shape[:-1]) if target is not None else None
        row_weight = row_weight.reshape(student.shape[:-1]) if row_weight is not None else None
    if target is not None:
        target = target.contiguous()
    if row_weight is not None:
        row_weight = row_weight.contiguous()
    return student, teacher, target, row_weight


def _merge_rows(*logits: Tensor) -> tuple[Tensor, ...]:
    """Merges all dimensions but the last into two, at the same place in every tensor.

    Views, unless the strides allow no common place; then as few tensors as possible are copied.
    """
    *shape, classes = logits[0].shape
    copies = [
        sum(not (_merges(x, 0, place) and _merges(x, place, len(shape))) for x in logits)
        for place in range(len(shape))
    ]
    place = copies.index(min(copies))
    merged = (math.prod(shape[:place]), math.prod(shape[place:]), classes)
    return tuple(x.reshape(merged) for x in logits)


def _merges(tensor: Tensor, start: int, stop: int) -> bool:
    """Whether dimensions start to stop - 1 can be viewed as one."""
    dims = [(tensor.size(i), tensor.stride(i)) for i in range(start, stop) if tensor.size(i) != 1]
    return all(
        outer_stride == size * stride for (_, outer_stride), (size, stride) in pairwise(dims)
    )
