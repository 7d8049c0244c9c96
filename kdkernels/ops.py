"""The operators `torch.ops.kdkernels.*`: schemas, shapes for tracing, and differentiation.

Logits are 3-D views `(outer, inner, classes)` of any strides, target and row_weight are contiguous
`(outer, inner)`. Kernels are registered for a device by the extension modules; everything here is
independent of which of them exist.

forward    rows `(outer, inner)`, or `(outputs, outer, inner)` for a loss of several outputs,
           already multiplied by row_weight; and the row statistics that `backward` needs
backward   the gradient of the student from those statistics and one upstream value per row
reduced    sum over rows of row_weight * scale * loss and, on request, its gradient, in one sweep
scale_     multiplies a gradient in place by a 0-d tensor; writes nothing when that is 1
"""

from __future__ import annotations

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

_library = torch.library.Library("kdkernels", "DEF")
_INPUTS = "Tensor student, Tensor? teacher, Tensor? target, Tensor? row_weight"
# Exact strides: the layout of a gradient follows that of the student, also when compiled.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
for _schema in (
    f"forward(str loss, {_INPUTS}, float[] params, int ignore_index)"
    " -> (Tensor rows, Tensor stats)",
    f"backward(str loss, Tensor grad_rows, {_INPUTS}, Tensor stats, float[] params,"
    " int ignore_index) -> Tensor grad_student",
    f"reduced(str loss, {_INPUTS}, Tensor scale, float[] params, int ignore_index,"
    " bool with_grad) -> (Tensor loss, Tensor grad)",
    "scale_(Tensor(a!) grad, Tensor factor) -> ()",
):
    _library.define(_schema, tags=_TAGS)

forward = torch.ops.kdkernels.forward.default
backward = torch.ops.kdkernels.backward.default
reduced = torch.ops.kdkernels.reduced.default
scale_ = torch.ops.kdkernels.scale_.default


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


# Shapes, for tracing.


@torch.library.register_fake("kdkernels::forward", lib=_library)
def _(
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    params: Sequence[float],
    ignore_index: int,
) -> tuple[Tensor, Tensor]:
    outer, inner, _ = student.shape
    outputs = LOSSES[loss].outputs
    shape = (outer, inner) if outputs == 1 else (outputs, outer, inner)
    # Statistics are kept in double where that costs nothing.
    stats_dtype = torch.float64 if student.device.type == "cpu" else loss_dtype(student, teacher)
    return (
        student.new_empty(shape, dtype=loss_dtype(student, teacher)),
        student.new_empty((outer * inner, STATS_WIDTH), dtype=stats_dtype),
    )


@torch.library.register_fake("kdkernels::backward", lib=_library)
def _(
    loss: str,
    grad_rows: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    stats: Tensor,
    params: Sequence[float],
    ignore_index: int,
) -> Tensor:
    return torch.empty_like(student)


@torch.library.register_fake("kdkernels::reduced", lib=_library)
def _(
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    scale: Tensor,
    params: Sequence[float],
    ignore_index: int,
    with_grad: bool,
) -> tuple[Tensor, Tensor]:
    grad = torch.empty_like(student) if with_grad else student.new_empty((0,))
    return student.new_empty((), dtype=loss_dtype(student, teacher)), grad


@torch.library.register_fake("kdkernels::scale_", lib=_library)
def _(grad: Tensor, factor: Tensor) -> None:
    return None


# Differentiation. The kernels give the student's gradient; whatever else is asked for (another
# input's gradient, or a gradient that is itself differentiable) comes from the reference.


class _Forward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        rows, stats = _below_autograd(forward, keys, inputs)
        ctx.loss, student, teacher, target, row_weight, ctx.params, ctx.ignore_index = inputs
        ctx.save_for_backward(student, teacher, target, row_weight, stats)
        ctx.mark_non_differentiable(stats)
        # Otherwise autograd makes zeros for the gradient of the statistics.
        ctx.set_materialize_grads(False)
        return rows, stats

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_rows is None:
            return (None,) * 8
        student, teacher, target, row_weight, stats = ctx.saved_tensors
        if _needs_reference(ctx):
            inputs = (student, teacher, target, row_weight, None)
            return *_reference_gradients(ctx, grad_rows, inputs)[:-1], None, None
        gradient = backward(
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
        return None, None, gradient, None, None, None, None, None


class _Reduced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keys: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        loss, gradient = _below_autograd(reduced, keys, inputs)
        ctx.loss, *tensors, ctx.params, ctx.ignore_index, with_grad = inputs
        ctx.save_for_backward(*tensors)
        ctx.mark_non_differentiable(gradient)
        ctx.set_materialize_grads(False)
        # Not among the saved tensors, because backward gives this very buffer away.
        ctx.gradient = gradient if with_grad else None
        return loss, gradient

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if grad_loss is None:
            return (None,) * 10
        if _needs_reference(ctx):
            return *_reference_gradients(ctx, grad_loss, ctx.saved_tensors), None, None, None
        gradient, ctx.gradient = ctx.gradient, None
        if gradient is None:
            # A second backward through the same graph: the first one took the gradient.
            *inputs, scale = ctx.saved_tensors
            rows, stats = forward(ctx.loss, *inputs, ctx.params, ctx.ignore_index)
            grad_rows = (grad_loss * scale).expand(rows.shape).contiguous()
            gradient = backward(ctx.loss, grad_rows, *inputs, stats, ctx.params, ctx.ignore_index)
        elif is_eager(gradient):
            scale_(gradient, grad_loss)
        else:
            # A traced graph must not change what its forward half returned.
            gradient = gradient * grad_loss
        return None, None, gradient, None, None, None, None, None, None, None


def _needs_reference(ctx: Any) -> bool:
    # The inputs begin with the dispatch keys, the loss's name and the student.
    return torch.is_grad_enabled() or any(ctx.needs_input_grad[3:])


def _reference_gradients(
    ctx: Any, grad: Tensor, tensors: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Gradients of the inputs up to the last of (student, teacher, target, row_weight, scale).

    None where none is needed.
    """
    create_graph = torch.is_grad_enabled()
    student, teacher, target, row_weight, scale = tensors
    assert student is not None
    with torch.enable_grad():
        value = reference_rows(
            ctx.loss, student, teacher, target, row_weight, ctx.params, ctx.ignore_index
        )
        if scale is not None:
            value = (value * scale).sum()
        needed = [x for x in tensors if x is not None and x.requires_grad]
        gradients = iter(
            torch.autograd.grad(value, needed, grad, create_graph=create_graph, allow_unused=True)
        )
    of_tensors = [next(gradients) if x is not None and x.requires_grad else None for x in tensors]
    return None, None, *of_tensors


def _below_autograd(op: torch._ops.OpOverload, keys: Any, inputs: tuple[Any, ...]) -> Any:
    with torch._C._AutoDispatchBelowAutograd():
        return op.redispatch(keys & torch._C._after_autograd_keyset, *inputs)


def _register_autograd(op: torch._ops.OpOverload, function: type[torch.autograd.Function]) -> None:
    # What torch.library.register_autograd does, without its walk over the schema at every call:
    # that takes longer than a loss of a few hundred thousand logits.
    def autograd(keys: Any, *inputs: Any) -> Any:
        tensors = (x for x in inputs if isinstance(x, Tensor))
        if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
            return function.apply(keys, *inputs)
        return _below_autograd(op, keys, inputs)

    _library.impl(op._opname, autograd, "Autograd", with_keyset=True)


_register_autograd(forward, _Forward)
_register_autograd(reduced, _Reduced)
