"""Differentiation of the operators: of every input, in both modes, to any order, under transforms.

The kernels give the student's gradient. Whatever else is asked for, another input's gradient or a
derivative of the gradient, comes from the reference. Three functions make it:

Rows       the operator `forward`; its backward is Gradient, for the student
Gradient   the operator `backward`; its own derivatives are the reference's
Reduced    the operator `reduced`, for the student's first gradient alone; any other derivative is
           taken of the same loss made with Rows

Under `torch.func.vmap` the mapped dimension becomes one more dimension of rows. The operators are
registered with these functions too, and the losses apply them directly: the way through the
dispatcher takes longer than a loss of a hundred thousand logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kdkernels.reference import LOSSES
from kdkernels.rows import as_rows
from kdkernels.tensors import (
    WHOLE,
    is_eager,
    is_traced,
    is_transformed,
    loss_dtype,
    reference_rows,
)

if TYPE_CHECKING:
    from kdkernels.ops import Operators

# An autograd.Function runs its forward without gradients, so the registered autograd only passes on
# what it gets, but that takes as long as the rest of the call. This guard skips it. It is private
# to torch.
below_autograd = torch._C._AutoDispatchBelowAutograd


def divided(value: Tensor, normalizer: Tensor | None, counted: float | Tensor | None) -> Tensor:
    """What `reduced` does to a sum of rows. counted: the rows that a mean divides by. 0 / 0 is 0:
    there was nothing to divide.
    """
    if normalizer is not None:
        normalizer = normalizer.to(value.dtype)
        value = value / torch.where((normalizer == 0) & (value == 0), 1.0, normalizer)
    if counted is not None:
        value = value / (counted.clamp(min=1) if isinstance(counted, Tensor) else max(counted, 1))
    return value


def counted_rows(
    mean: bool, shape: Sequence[int], target: Tensor | None, ignore_index: int
) -> float | Tensor | None:
    """The rows that are not ignored, for a mean."""
    if not mean:
        return None
    return math.prod(shape) if target is None else target.ne(ignore_index).sum()


Differentiable = Callable[..., Any]
_vjp: Callable[..., Any] = torch.func.vjp


def _pullback(
    function: Differentiable, inputs: Sequence[Tensor]
) -> Callable[[Tensor], Sequence[Tensor | None]]:
    """The derivative of function(*inputs) as a map from upstream gradients to gradients.

    The inputs are taken apart from what made them: a teacher that was computed from the student is
    an input like any other. What is returned can be differentiated again where gradients are on.
    """
    if is_transformed():
        pull_here: Callable[[Tensor], Sequence[Tensor | None]] = _vjp(function, *inputs)[1]
        return pull_here
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        apart = [x.view_as(x) for x in inputs]
        apart = [x if x.requires_grad else x.detach().requires_grad_() for x in apart]
        value = function(*apart)

    def pull(upstream: Tensor) -> Sequence[Tensor | None]:
        return torch.autograd.grad(value, apart, upstream, create_graph=again, allow_unused=True)

    return pull


def _pushforward(
    function: Differentiable, inputs: Sequence[Tensor], tangents: Sequence[Tensor]
) -> Tensor:
    """The derivative of function(*inputs) along the tangents: the transpose of its transpose."""
    value, pull = _vjp(function, *inputs)
    out: Tensor = _vjp(pull, torch.zeros_like(value))[1](tuple(tangents))[0]
    return out


def _with(values: Sequence[Any], places: Sequence[int], replaced: Sequence[Any]) -> list[Any]:
    out = list(values)
    for place, value in zip(places, replaced, strict=True):
        out[place] = value
    return out


# What a call has beside tensors, `how`: ignore_index, and how many classes count (0: all).
# Places in (student, teacher, target, row_weight, params); of the others that can have a gradient.
_STUDENT, _OTHERS = 0, (1, 3, 4)


def _rows_of(
    loss: str, inputs: Sequence[Any], how: tuple[int, int], places: Sequence[int]
) -> Differentiable:
    """The rows of the reference as a function of the inputs at these places."""

    def rows(*given: Tensor) -> Tensor:
        student, teacher, target, row_weight, params = _with(inputs, places, given)
        return reference_rows(loss, student, teacher, target, row_weight, params, *how)

    return rows


def _gradient_of(
    loss: str, inputs: Sequence[Any], how: tuple[int, int], places: Sequence[int]
) -> Differentiable:
    """The reference's gradient of the student as a function of upstream gradients and inputs:
    of (grad_rows, *inputs), those at these places.
    """

    def gradient(*given: Tensor) -> Tensor:
        grad_rows, *own = _with(inputs, places, given)
        with torch.enable_grad():
            pull = _pullback(_rows_of(loss, own, how, (_STUDENT,)), (own[_STUDENT],))
            (out,) = pull(grad_rows)
        assert out is not None
        return out

    return gradient


# ---- the rules of vmap ------------------------------------------------------------------------


def _in_front(size: int, dim: int | None, x: Any, place: int = 0) -> Any:
    """A tensor with the mapped dimension at `place`, as long if it has none; None stays None."""
    if x is None:
        return None
    if dim is None:
        shape = list(x.shape)
        return x.unsqueeze(place).expand(*shape[:place], size, *shape[place:])
    return x.movedim(dim, place)


def _one_by_one(function: Any, info: Any, in_dims: Sequence[Any], args: Sequence[Any]) -> Any:
    """Where parameters are mapped: the kernels take one set of them at a time."""
    each = [
        function.apply(
            *(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True))
        )
        for i in range(info.batch_size)
    ]
    if isinstance(each[0], Tensor):
        return torch.stack(each), 0
    return tuple(torch.stack(x) for x in zip(*each, strict=True)), (0,) * len(each[0])


def _of_more_rows(size: int, params: Tensor) -> Tensor:
    """Parameters of each row when the rows become `size` times as many, in front."""
    return params.repeat(size, 1) if params.dim() == 2 else params


def _several(loss: str) -> int:
    """Dimensions in front of those of the rows: 1 for a loss of several outputs."""
    return int(LOSSES[loss].outputs > 1)


# ---- the functions ----------------------------------------------------------------------------


class _Function(torch.autograd.Function):
    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As of every function; but torch binds the arguments to their names at every call, which
        takes as long as a small loss, and which only transforms need.
        """
        if is_transformed():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*args)  # type: ignore[misc]


class Rows(_Function):
    """The losses of the rows, their statistics, and their parts if asked for."""

    @staticmethod
    def forward(
        operators: Operators,
        loss: str,
        student: Tensor,
        teacher: Tensor | None,
        target: Tensor | None,
        row_weight: Tensor | None,
        params: Tensor,
        ignore_index: int,
        with_parts: bool,
        classes: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inputs = (student, teacher, target, row_weight)
        with below_autograd():
            return operators.forward(loss, *inputs, params, ignore_index, with_parts, classes)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.operators, ctx.loss, *tensors, ignore_index, _, classes = inputs
        ctx.how = ignore_index, classes
        _, stats, parts = output
        ctx.save_for_backward(*tensors, stats)
        ctx.save_for_forward(*tensors, stats)
        ctx.mark_non_differentiable(stats, parts)
        # Otherwise autograd makes zeros for the gradients of the other outputs.
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, grad_rows: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor | None] = [None] * 5
        if grad_rows is not None:
            *inputs, stats = ctx.saved_tensors
            needed = ctx.needs_input_grad[2:7]
            if needed[_STUDENT]:
                gradients[_STUDENT] = Gradient.apply(
                    ctx.operators, ctx.loss, grad_rows, *inputs, stats, *ctx.how
                )
            others = [place for place in _OTHERS if needed[place]]
            if others:
                found = _gradients_of_others(
                    ctx.operators, ctx.loss, grad_rows, inputs, ctx.how, others
                )
                gradients = _with(gradients, others, found)
        return None, None, *gradients, None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        *inputs, stats = ctx.saved_tensors
        student, loss, along = inputs[_STUDENT], ctx.loss, tangents[2:7]
        found = []
        if along[_STUDENT] is not None:
            dtype = loss_dtype(student, inputs[1])
            count, shape = LOSSES[loss].outputs, student.shape[:-1]
            units = torch.eye(count, dtype=dtype, device=student.device)
            each = []
            for unit in units.view(count, count, *[1] * len(shape)).expand(count, count, *shape):
                upstream = unit if _several(loss) else unit[0]
                args = (upstream, *inputs, stats, *ctx.how)
                gradient = Gradient.apply(ctx.operators, loss, *args).to(dtype)
                along_student = along[_STUDENT].to(dtype)
                # What is not read is not read in the tangent either.
                unread = (gradient == 0) & ~along_student.isfinite()
                each.append((gradient * torch.where(unread, 0.0, along_student)).sum(-1))
            found.append(torch.stack(each) if _several(loss) else each[0])
        others = [place for place in _OTHERS if along[place] is not None]
        if others:
            rows = _rows_of(loss, inputs, ctx.how, others)
            given = [inputs[place] for place in others]
            found.append(_pushforward(rows, given, [along[place] for place in others]))
        return sum(found[1:], found[0]) if found else None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        operators, loss, *inputs, params, ignore_index, with_parts, classes = args
        if in_dims[6] is not None:
            return _one_by_one(Rows, info, in_dims, args)
        size, lead = info.batch_size, _several(loss)
        params = _of_more_rows(size, params)
        tensors = [_in_front(size, *x) for x in zip(in_dims[2:6], inputs, strict=True)]
        rows, stats, parts = Rows.apply(
            operators, loss, *as_rows(*tensors), params, ignore_index, with_parts, classes
        )
        shape = tensors[_STUDENT].shape[:-1]
        rows = rows.reshape(*rows.shape[:lead], *shape)
        stats = stats.view(size, -1, stats.shape[-1])
        parts = parts.reshape(2, *shape) if with_parts else parts
        return (rows, stats, parts), (lead, 0, 1 if with_parts else None)


class Gradient(_Function):
    """The student's gradient from statistics and upstream gradients of the rows."""

    @staticmethod
    def forward(
        operators: Operators,
        loss: str,
        grad_rows: Tensor,
        student: Tensor,
        teacher: Tensor | None,
        target: Tensor | None,
        row_weight: Tensor | None,
        params: Tensor,
        stats: Tensor,
        ignore_index: int,
        classes: int,
    ) -> Tensor:
        inputs = (student, teacher, target, row_weight)
        with below_autograd():
            return operators.backward(
                loss, grad_rows.contiguous(), *inputs, stats, params, ignore_index, classes
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.operators, ctx.loss, *tensors, ignore_index, classes = inputs
        ctx.how = ignore_index, classes
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, _ = ctx.saved_tensors
        needed = ctx.needs_input_grad[2:8]
        places = [place for place, wanted in enumerate(needed) if wanted]
        gradient = _gradient_of(ctx.loss, inputs, ctx.how, places)
        found = _pullback(gradient, [inputs[place] for place in places])(upstream)
        return None, None, *_with([None] * 6, places, found), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        *inputs, _ = ctx.saved_tensors
        along = tangents[2:8]
        places = [place for place, tangent in enumerate(along) if tangent is not None]
        gradient = _gradient_of(ctx.loss, inputs, ctx.how, places)
        given = [inputs[place] for place in places]
        return _pushforward(gradient, given, [along[place] for place in places])

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        operators, loss, grad_rows, *inputs, params, stats, ignore_index, classes = args
        if in_dims[7] is not None:
            return _one_by_one(Gradient, info, in_dims, args)
        size, lead = info.batch_size, _several(loss)
        params = _of_more_rows(size, params)
        tensors = [_in_front(size, *x) for x in zip(in_dims[3:7], inputs, strict=True)]
        student, teacher, target, row_weight = as_rows(*tensors)
        grad_rows = _in_front(size, in_dims[2], grad_rows, lead)
        grad_rows = grad_rows.reshape(*grad_rows.shape[:lead], *student.shape[:-1])
        stats = _in_front(size, in_dims[8], stats).reshape(-1, stats.shape[-1]).contiguous()
        out = Gradient.apply(
            *(operators, loss, grad_rows, student, teacher, target, row_weight),
            *(params, stats, ignore_index, classes),
        )
        return out.reshape(tensors[_STUDENT].shape), 0


class Reduced(_Function):
    """The reduced loss and, if asked for, the parts. Not for use under transforms.

    whole: also the student's gradient, as the operator returns it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        operators: Operators,
        loss: str,
        student: Tensor,
        teacher: Tensor | None,
        target: Tensor | None,
        row_weight: Tensor | None,
        normalizer: Tensor | None,
        mean: bool,
        params: Tensor,
        ignore_index: int,
        with_grad: bool,
        with_parts: bool,
        classes: int,
        whole: bool = False,
    ) -> tuple[Tensor, ...]:
        inputs = (student, teacher, target, row_weight, normalizer)
        with below_autograd():
            value, gradient, parts = operators.reduced(
                loss, *inputs, mean, params, ignore_index, with_grad, with_parts, classes
            )
        # Autograd keeps no tensor that was made in inference mode, and this one has done its part.
        gone = teacher is not None and teacher.is_inference()
        ctx.call = operators, loss, mean, ignore_index, classes, gone
        # The gradient is kept where hooks see it, which may drop it (checkpoints) or move it away.
        kept, of_student = None if gone else teacher, gradient if with_grad else None
        ctx.save_for_backward(student, kept, target, row_weight, params, normalizer, of_student)
        ctx.set_materialize_grads(False)
        ctx.taken = False
        if whole:
            ctx.mark_non_differentiable(gradient, parts)
            return value, gradient, parts
        if with_parts:
            ctx.mark_non_differentiable(parts)
            return value, parts
        return (value,)

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad
        if grad_loss is None:
            return (None,) * len(needed)
        *inputs, gradient = ctx.saved_tensors
        ready = gradient is not None and not ctx.taken and not torch.is_grad_enabled()
        if ready and sum(needed) == 1 and needed[2]:
            own = Reduced._scaled(ctx, gradient, grad_loss)
            return (None, None, own, *(None,) * (len(needed) - 3))
        # In the order of _again(), not that of the arguments: normalizer comes last.
        places = [place for place, i in enumerate((2, 3, 4, 5, 8, 6)) if needed[i]]
        given = [inputs[place] for place in places]
        pull = _pullback(Reduced._again(ctx, inputs, places), given)
        *of_inputs, of_params, of_normalizer = _with([None] * 6, places, pull(grad_loss))
        rest = (None,) * (len(needed) - 9)
        return None, None, *of_inputs, of_normalizer, None, of_params, *rest

    @staticmethod
    def _scaled(ctx: Any, gradient: Tensor, grad_loss: Tensor) -> Tensor:
        if type(gradient) not in WHOLE or not is_eager(grad_loss):
            # A traced graph must not change what its forward half returned, and under vmap one
            # gradient becomes many.
            return (gradient * grad_loss).to(gradient.dtype)
        # Given away: what the caller does with it must not look like a change of what was kept,
        # which nobody looks at again.
        ctx.taken = True
        gradient = gradient.data
        # A factor of 1, the ordinary case, is seen at once where it is on the host and nobody
        # records what is done.
        plain = grad_loss.is_cpu and not torch._C._len_torch_dispatch_stack()
        if not (plain and grad_loss.item() == 1):
            ctx.call[0].scale_(gradient, grad_loss)
        return gradient

    @staticmethod
    def _again(ctx: Any, inputs: Sequence[Any], places: Sequence[int]) -> Differentiable:
        """The loss once more, made so that everything about it can be differentiated."""
        operators, name, mean, ignore_index, classes, teacher_is_gone = ctx.call
        if teacher_is_gone:
            raise RuntimeError(
                "teacher: was made under torch.inference_mode(), so nothing of it was kept for a"
                " second backward pass or a second derivative; make it under torch.no_grad(), or"
                " pass teacher.clone()"
            )

        def loss(*given: Tensor) -> Tensor:
            *of_rows, normalizer = _with(inputs, places, given)
            rows, _, _ = Rows.apply(operators, name, *of_rows, ignore_index, False, classes)
            student, _, target, *_ = of_rows
            counted = counted_rows(mean, student.shape[:-1], target, ignore_index)
            return divided(rows.sum(), normalizer, counted)

        return loss


# Reduced.apply where it is known that no transform is at work.
reduced_untransformed = super(torch.autograd.Function, Reduced).apply


def _gradients_of_others(
    operators: Operators,
    loss: str,
    grad_rows: Tensor,
    inputs: Sequence[Any],
    how: tuple[int, int],
    places: Sequence[int],
) -> Sequence[Tensor | None]:
    """The reference's gradients of teacher, row_weight and params, of those at these places."""
    if is_traced(grad_rows):
        # The values of parameters, which the reference branches on, are not known while tracing.
        *rest, params = inputs
        found = operators.others(loss, grad_rows, *rest, params, *how)
        return [found[_OTHERS.index(place)] for place in places]
    rows = _rows_of(loss, inputs, how, places)
    return _pullback(rows, [inputs[place] for place in places])(grad_rows)


def gradients_of_others(
    loss: str,
    grad_rows: Tensor,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    params: Tensor,
    ignore_index: int,
    classes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The operator `others`."""
    inputs = (student, teacher, target, row_weight, params)
    apart: list[Any] = [None if x is None else x.detach() for x in inputs]
    places = [place for place in _OTHERS if apart[place] is not None]
    rows = _rows_of(loss, apart, (ignore_index, classes), places)
    pull = _pullback(rows, [apart[x] for x in places])
    with torch.no_grad():
        found = dict(zip(places, pull(grad_rows.detach()), strict=True))

    def gradient(place: int) -> Tensor:
        if apart[place] is None:
            return grad_rows.new_empty((0,))
        out = found[place]
        return torch.zeros_like(apart[place]) if out is None else out

    return gradient(_OTHERS[0]), gradient(_OTHERS[1]), gradient(_OTHERS[2])
