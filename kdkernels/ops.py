"""The operators `torch.ops.kdkernels.*`: schemas, shapes for tracing, and differentiation.

There are two sets of the same operators: FUSED, implemented by the compiled extension on each
device it is built for, and TRITON, whose names begin with `triton_`.

Logits are `(*rows, classes)` with any strides and at most two dimensions of rows; target and
row_weight are contiguous and have the shape of the rows. Kernels are registered for a device by the
extension modules; everything here is independent of which of them exist.

forward    losses in the shape of the rows, or `(outputs, *rows)` for a loss of several outputs,
           already multiplied by row_weight; and the row statistics that `backward` needs
backward   the gradient of the student from those statistics and one upstream value per row
reduced    the sum over rows of row_weight * loss, times scale, over normalizer (0-d, in the dtype
           of the loss) and, with mean, over the number of rows that are not ignored (at least 1);
           and, on request, its gradient, in one sweep
scale_     multiplies a gradient in place by a 0-d tensor; writes nothing when that is 1

The compiled ones refuse targets out of range on a CPU before they compute anything; elsewhere such
a target makes its row NaN.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kdkernels import reference

# Floating point statistics per row, the same for every loss; the kernels check it.
STATS_WIDTH = 8


@dataclass(frozen=True)
class Loss:
    """What the operators know of a loss. Its parameters are the reference's, in order."""

    reference: Callable[..., Tensor]
    teacher: bool = True
    target: bool = True  # whether one is required
    outputs: int = 1


# The list of losses: one line each.
LOSSES = {
    "kd": Loss(reference.kd, target=False),
    "dkd": Loss(reference.dkd),
    "nkd": Loss(reference.nkd),
    "aekt": Loss(reference.aekt),
    "cross_entropy": Loss(reference.cross_entropy, teacher=False),
    "target_split": Loss(reference.target_split, teacher=False, outputs=3),
}

_LIBRARY = torch.library.Library("kdkernels", "DEF")
_INPUTS = "Tensor student, Tensor? teacher, Tensor? target, Tensor? row_weight"
_SCHEMAS = {
    "forward": f"(str loss, {_INPUTS}, float[] params, int ignore_index)"
    " -> (Tensor rows, Tensor stats)",
    "backward": f"(str loss, Tensor grad_rows, {_INPUTS}, Tensor stats, float[] params,"
    " int ignore_index) -> Tensor grad_student",
    "reduced": f"(str loss, {_INPUTS}, float scale, Tensor? normalizer, bool mean, float[] params,"
    " int ignore_index, bool with_grad) -> (Tensor loss, Tensor grad)",
    "scale_": "(Tensor(a!) grad, Tensor factor) -> ()",
}
# Exact strides: the layout of a gradient follows that of the student, also when compiled.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def loss_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """float64 if either input is, else float32: losses are never rounded to 16 bits."""
    double = student.dtype == torch.float64 or (
        teacher is not None and teacher.dtype == torch.float64
    )
    return torch.float64 if double else torch.float32


def is_eager(tensor: Tensor) -> bool:
    """Whether this is a real tensor outside tracing: subclasses may be fake or functional."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def reference_rows(
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    params: Sequence[float],
    ignore_index: int,
) -> Tensor:
    """The reference under the operators' signature."""
    entry = LOSSES[loss]
    logits = (student, teacher) if entry.teacher else (student,)
    return entry.reference(
        *logits, target, *params, ignore_index=ignore_index, row_weight=row_weight
    )


def scaled(
    value: Tensor,
    rows: Sequence[int],
    target: Tensor | None,
    ignore_index: int,
    scale: float,
    normalizer: Tensor | None,
    mean: bool,
) -> Tensor:
    """What `reduced` does to the sum of the rows, and its derivative to an upstream gradient."""
    value = value * scale
    if normalizer is not None:
        value = value / normalizer
    if mean and target is None:
        value = value / max(math.prod(rows), 1)
    elif mean and target is not None:
        value = value / target.ne(ignore_index).sum().clamp_(min=1)
    return value


# Shapes, for tracing.


def _fake_forward(
    stats_dtype: Callable[[Tensor, torch.dtype], torch.dtype],
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    rows, outputs = student.shape[:-1], LOSSES[loss].outputs
    shape = rows if outputs == 1 else (outputs, *rows)
    dtype = loss_dtype(student, teacher)
    return (
        student.new_empty(shape, dtype=dtype),
        student.new_empty((math.prod(rows), STATS_WIDTH), dtype=stats_dtype(student, dtype)),
    )


def _fake_backward(loss: str, grad_rows: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _fake_reduced(
    loss: str, student: Tensor, teacher: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    with_grad = rest[-1]
    grad = torch.empty_like(student) if with_grad else student.new_empty((0,))
    return student.new_empty((), dtype=loss_dtype(student, teacher)), grad


def _fake_scale(grad: Tensor, factor: Tensor) -> None:
    return None


# Differentiation. The kernels give the student's gradient; whatever else is asked for (another
# input's gradient, or a gradient that is itself differentiable) comes from the reference.
#
# Each operator is differentiated by one pair of functions, which serves two callers: the operator
# itself, registered with torch.library for graphs and for direct users, and an autograd.Function
# for eager calls of the losses. The registered way walks over the schema at every call, which takes
# longer than a loss of a hundred thousand logits.


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.loss, student, teacher, target, row_weight, ctx.params, ctx.ignore_index = inputs
    ctx.save_for_backward(student, teacher, target, row_weight, output[1])
    ctx.mark_non_differentiable(output[1])
    # Otherwise autograd makes zeros for the gradient of the statistics.
    ctx.set_materialize_grads(False)


def _differentiate_rows(
    ctx: Any, grad_rows: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_rows is None:
        return (None,) * 7
    student, teacher, target, row_weight, stats = ctx.saved_tensors
    if _needs_reference(ctx):
        inputs = (student, teacher, target, row_weight)
        return None, *_reference_gradients(ctx, grad_rows, inputs), None, None
    gradient = ctx.operators.backward(
        ctx.loss,
        grad_rows.contiguous(),
        student,
        teacher,
        target,
        row_weight,
        stats,
        ctx.params,
        ctx.ignore_index,
    )
    return None, gradient, None, None, None, None, None


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    (
        ctx.loss,
        student,
        teacher,
        target,
        row_weight,
        ctx.scale,
        normalizer,
        ctx.mean,
        ctx.params,
        ctx.ignore_index,
        with_grad,
    ) = inputs
    ctx.save_for_backward(student, teacher, target, row_weight, normalizer)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    # Not among the saved tensors, because backward gives this very buffer away.
    ctx.gradient = output[1] if with_grad else None


def _differentiate_loss(
    ctx: Any, grad_loss: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    if grad_loss is None:
        return (None,) * 11
    if _needs_reference(ctx):
        *inputs, normalizer = ctx.saved_tensors
        *of_inputs, of_normalizer = _reference_gradients(ctx, grad_loss, inputs, normalizer)
        return None, *of_inputs, None, of_normalizer, None, None, None, None
    gradient, ctx.gradient = ctx.gradient, None
    if gradient is None:
        # A second backward through the same graph: the first one took the gradient.
        *inputs, normalizer = ctx.saved_tensors
        rows, stats = ctx.operators.forward(ctx.loss, *inputs, ctx.params, ctx.ignore_index)
        grad_rows = _scaled(ctx, grad_loss, inputs, normalizer).expand(rows.shape).contiguous()
        gradient = ctx.operators.backward(
            ctx.loss, grad_rows, *inputs, stats, ctx.params, ctx.ignore_index
        )
    elif is_eager(gradient):
        ctx.operators.scale_(gradient, grad_loss)
    else:
        # A traced graph must not change what its forward half returned.
        gradient = gradient * grad_loss
    return None, gradient, None, None, None, None, None, None, None, None, None


def _needs_reference(ctx: Any) -> bool:
    return torch.is_grad_enabled() or True in ctx.needs_input_grad[ctx.after_student :]


def _scaled(ctx: Any, value: Tensor, inputs: Sequence[Any], normalizer: Tensor | None) -> Tensor:
    student, _, target, _ = inputs
    rows = student.shape[:-1]
    return scaled(value, rows, target, ctx.ignore_index, ctx.scale, normalizer, ctx.mean)


def _reference_gradients(
    ctx: Any, grad: Tensor, inputs: Sequence[Any], *normalizer: Tensor | None
) -> list[Tensor | None]:
    """Gradients of (student, teacher, target, row_weight), of the rows or, with a normalizer or
    None for it, of the reduced loss and then also of that. None where none is needed.
    """
    create_graph = torch.is_grad_enabled()
    tensors = (*inputs, *normalizer)
    with torch.enable_grad():
        student, teacher, target, row_weight = inputs
        value = reference_rows(
            ctx.loss, student, teacher, target, row_weight, ctx.params, ctx.ignore_index
        )
        if normalizer:
            value = _scaled(ctx, value.sum(), inputs, *normalizer)
        needed = [x for x in tensors if x is not None and x.requires_grad]
        gradients = iter(
            torch.autograd.grad(value, needed, grad, create_graph=create_graph, allow_unused=True)
        )
    return [next(gradients) if x is not None and x.requires_grad else None for x in tensors]


# An autograd.Function runs its forward without gradients, so the registered autograd only passes on
# what it gets, but that takes as long as the rest of the call. This guard skips it. It is private
# to torch; without it the results are the same.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operators: Operators, *inputs: Any) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            output = operators.forward(*inputs)
        ctx.operators, ctx.after_student = operators, 3
        _save_rows(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_differentiate_rows(ctx, *grads)


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operators: Operators, *inputs: Any) -> tuple[Tensor, Tensor]:
        with _below_autograd():
            output = operators.reduced(*inputs)
        ctx.operators, ctx.after_student = operators, 3
        _save_loss(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None, *_differentiate_loss(ctx, *grads)


class Operators:
    """One set of the operators: what they are called, traced and differentiated as."""

    def __init__(
        self, prefix: str, stats_dtype: Callable[[Tensor, torch.dtype], torch.dtype]
    ) -> None:
        """stats_dtype: of the row statistics, from the student and the dtype of the loss."""
        self._prefix = prefix
        for name, schema in _SCHEMAS.items():
            _LIBRARY.define(prefix + name + schema, tags=_TAGS)
        namespace = torch.ops.kdkernels
        self.forward = getattr(namespace, prefix + "forward").default
        self.backward = getattr(namespace, prefix + "backward").default
        self.reduced = getattr(namespace, prefix + "reduced").default
        self.scale_ = getattr(namespace, prefix + "scale_").default
        for op, fake in (
            (self.forward, functools.partial(_fake_forward, stats_dtype)),
            (self.backward, _fake_backward),
            (self.reduced, _fake_reduced),
            (self.scale_, _fake_scale),
        ):
            torch.library.register_fake(op, fake, lib=_LIBRARY)
        for op, differentiate, save in (
            (self.forward, _differentiate_rows, _save_rows),
            (self.reduced, _differentiate_loss, _save_loss),
        ):
            save = functools.partial(self._set_up, save)
            torch.library.register_autograd(op, differentiate, setup_context=save, lib=_LIBRARY)

    def _set_up(self, save: Callable[..., None], ctx: Any, inputs: Any, output: Any) -> None:
        # The inputs begin with the loss's name and the student.
        ctx.operators, ctx.after_student = self, 2
        save(ctx, inputs, output)

    def implement(self, device_type: str, **functions: Callable[..., Any]) -> None:
        """Registers Python implementations for tensors of a device type."""
        for name, function in functions.items():
            _LIBRARY.impl(self._prefix + name, function, device_type.upper())

    def apply(self, op: torch._ops.OpOverload, with_grad: bool, *inputs: Any) -> Tensor:
        """The first output of this set's `forward` or `reduced`, in the cheapest way.

        with_grad: whether a gradient of the student is wanted, and of nothing else.
        """
        if torch.compiler.is_compiling():
            return op(*inputs)[0]
        if with_grad:
            return (_Rows if op is self.forward else _Loss).apply(self, *inputs)[0]
        with _below_autograd():
            return op(*inputs)[0]


def _compiled_stats(student: Tensor, dtype: torch.dtype) -> torch.dtype:
    # Kept in double where that costs nothing.
    return torch.float64 if student.device.type == "cpu" else dtype


FUSED = Operators("", _compiled_stats)
TRITON = Operators("triton_", lambda _, dtype: dtype)
