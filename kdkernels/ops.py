"""The operators `torch.ops.kdkernels.*`: schemas, shapes for tracing, implementations.

There are two sets of the same operators: FUSED, implemented by the compiled extension on each
device it is built for, and TRITON, whose names begin with `triton_`.

Logits are `(*rows, classes)` with any strides and at most two dimensions of rows; target and
row_weight are contiguous and have the shape of the rows; params are the numbers that the loss's
reference takes, in its order, as one float64 tensor on the CPU: a tensor, because the numbers of a
schema are constants to a compiled graph. The CPU's and Triton's also take `(rows, params)`, those
of each row, on the device of the logits; what is a choice (t_squared, variants) is the same in all.
Kernels are registered for a device by the extension modules; everything here is independent of
which of them exist.

forward    losses in the shape of the rows, or `(outputs, *rows)` for a loss of several outputs,
           already multiplied by row_weight; the row statistics that `backward` needs; and with
           with_parts, `(2, *rows)`, the distillation and the cross-entropy of which the loss is the
           weighted sum, each times row_weight
backward   the gradient of the student from those statistics and one upstream value per row
reduced    the sum over rows of row_weight * loss, over normalizer (one number, on the CPU, or in
           the dtype of the loss on the device of the student) and, with mean, over the number of
           rows that are not ignored (at least 1); with with_grad its gradient, in one sweep; and
           the parts, of the rows, as `forward` gives them
others     the gradients of teacher, row_weight and params, by the reference; empty where there is
           no such input
scale_     multiplies a gradient in place by a 0-d tensor; writes nothing when that is 1

With `classes` only so many classes count, the first ones, of student and teacher, which may then
have different numbers of them; the gradient of the student's others is 0.

The compiled ones refuse targets out of range on a CPU before they compute anything; elsewhere such
a target makes its row NaN.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kdkernels.autograd import (
    Gradient,
    Reduced,
    Rows,
    below_autograd,
    counted_rows,
    divided,
    gradients_of_others,
    reduced_untransformed,
)
from kdkernels.reference import LOSSES
from kdkernels.tensors import STATS_WIDTH, is_functorch, is_transformed, loss_dtype

_LIBRARY = torch.library.Library("kdkernels", "DEF")
_INPUTS = "Tensor student, Tensor? teacher, Tensor? target, Tensor? row_weight"
_SCHEMAS = {
    "forward": f"(str loss, {_INPUTS}, Tensor params, int ignore_index, bool with_parts=False,"
    " int classes=0) -> (Tensor rows, Tensor stats, Tensor parts)",
    "backward": f"(str loss, Tensor grad_rows, {_INPUTS}, Tensor stats, Tensor params,"
    " int ignore_index, int classes=0) -> Tensor grad_student",
    "reduced": f"(str loss, {_INPUTS}, Tensor? normalizer, bool mean, Tensor params,"
    " int ignore_index, bool with_grad, bool with_parts=False, int classes=0)"
    " -> (Tensor loss, Tensor grad, Tensor parts)",
    "others": f"(str loss, Tensor grad_rows, {_INPUTS}, Tensor params, int ignore_index,"
    " int classes=0) -> (Tensor grad_teacher, Tensor grad_row_weight, Tensor grad_params)",
    "scale_": "(Tensor(a!) grad, Tensor factor) -> ()",
}
# Exact strides: the layout of a gradient follows that of the student, also when compiled.
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)


def empty_parts(student: Tensor, dtype: torch.dtype, with_parts: bool) -> Tensor:
    return student.new_empty((2, *student.shape[:-1]) if with_parts else (0,), dtype=dtype)


# Shapes, for tracing.


def _fake_forward(
    stats_dtype: Callable[[Tensor, torch.dtype], torch.dtype],
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    params: Tensor,
    ignore_index: int,
    with_parts: bool = False,
    classes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    rows, outputs = student.shape[:-1], LOSSES[loss].outputs
    shape = rows if outputs == 1 else (outputs, *rows)
    dtype = loss_dtype(student, teacher)
    return (
        student.new_empty(shape, dtype=dtype),
        student.new_empty((math.prod(rows), STATS_WIDTH), dtype=stats_dtype(student, dtype)),
        empty_parts(student, dtype, with_parts),
    )


def _fake_backward(loss: str, grad_rows: Tensor, student: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(student)


def _fake_reduced(
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
    with_parts: bool = False,
    classes: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    grad = torch.empty_like(student) if with_grad else student.new_empty((0,))
    dtype = loss_dtype(student, teacher)
    return student.new_empty((), dtype=dtype), grad, empty_parts(student, dtype, with_parts)


def _fake_others(
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
    def like(x: Tensor | None) -> Tensor:
        return grad_rows.new_empty((0,)) if x is None else torch.empty_like(x)

    return like(teacher), like(row_weight), torch.empty_like(params)


def _fake_scale(grad: Tensor, factor: Tensor) -> None:
    return None


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
        self.others = getattr(namespace, prefix + "others").default
        self.scale_ = getattr(namespace, prefix + "scale_").default
        for op, fake in (
            (self.forward, functools.partial(_fake_forward, stats_dtype)),
            (self.backward, _fake_backward),
            (self.reduced, _fake_reduced),
            (self.others, _fake_others),
            (self.scale_, _fake_scale),
        ):
            torch.library.register_fake(op, fake, lib=_LIBRARY)
        for name, function in (
            ("forward", self._differentiable_forward),
            ("backward", self._differentiable_backward),
            ("reduced", self._differentiable_reduced),
        ):
            _LIBRARY.impl(prefix + name, function, "Autograd")
        _LIBRARY.impl(prefix + "others", gradients_of_others, "CompositeExplicitAutograd")

    def implement(self, device_type: str, **functions: Callable[..., Any]) -> None:
        """Registers Python implementations for tensors of a device type."""
        for name, function in functions.items():
            _LIBRARY.impl(self._prefix + name, function, device_type.upper())

    # What the dispatcher calls where autograd is on: by direct users, and while graphs are traced.
    # It leaves out what has its default.

    def _differentiable_forward(self, *args: Any) -> Any:
        args = _completed(args, 9, False, 0)
        if _is_differentiated(args):
            return Rows.apply(self, *args)
        with below_autograd():
            return self.forward(*args)

    def _differentiable_backward(self, *args: Any) -> Any:
        args = _completed(args, 10, 0)
        loss, grad_rows, *inputs, stats, params, ignore_index, classes = args
        if _is_differentiated(args):
            more = (params, stats, ignore_index, classes)
            return Gradient.apply(self, loss, grad_rows, *inputs, *more)
        with below_autograd():
            return self.backward(*args)

    def _differentiable_reduced(self, *args: Any) -> Any:
        args = _completed(args, 12, False, 0)
        if is_transformed() and not is_functorch():
            return self._reduced_of_rows(*args)
        if _is_differentiated(args):
            return Reduced.apply(self, *args, True)
        with below_autograd():
            return self.reduced(*args)

    def _reduced_of_rows(
        self,
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
        with_parts: bool = False,
        classes: int = 0,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`reduced` as transforms can look into it; the gradient is theirs to take."""
        if with_grad:
            raise RuntimeError("with_grad: must be False under torch.func and forward mode")
        inputs = (student, teacher, target, row_weight)
        more = (params, ignore_index, with_parts, classes)
        rows, _, parts = Rows.apply(self, loss, *inputs, *more)
        counted = counted_rows(mean, student.shape[:-1], target, ignore_index)
        value = divided(rows.sum(), normalizer, counted)
        return value, student.new_empty((0,)), parts

    def apply(self, op: torch._ops.OpOverload, with_grad: bool, *inputs: Any) -> Any:
        """The outputs of this set's `forward` or `reduced` in the cheapest way: of `reduced` the
        loss is the first one, and the parts, if asked for, are the last.

        with_grad: whether a gradient of any input is wanted.
        """
        if torch.compiler.is_compiling():
            return op(*inputs)
        if with_grad or is_transformed():
            return (Rows if op is self.forward else Reduced).apply(self, *inputs)
        with below_autograd():
            return op(*inputs)

    def reduced_loss(
        self,
        with_grad: bool,
        loss: str,
        student: Tensor,
        teacher: Tensor | None,
        target: Tensor | None,
        mean: bool,
        params: Tensor,
        ignore_index: int,
    ) -> Tensor:
        """The first output of `reduced`, of tensors that are whole and under no transform."""
        none = None  # row_weight and normalizer
        value: Tensor
        if with_grad:
            (value,) = reduced_untransformed(
                *(self, loss, student, teacher, target, none, none),
                *(mean, params, ignore_index, True, False, 0),
            )
        else:
            with below_autograd():
                value, _, _ = self.reduced(
                    *(loss, student, teacher, target, none, none),
                    *(mean, params, ignore_index, False, False, 0),
                )
        return value


def _completed(args: tuple[Any, ...], count: int, *defaults: Any) -> tuple[Any, ...]:
    """All `count` of them, of which the last ones may be missing."""
    return (*args, *defaults[len(defaults) - count + len(args) :])


def _is_differentiated(args: tuple[Any, ...]) -> bool:
    if is_functorch():
        raise RuntimeError(
            "torch.func does not see into operators that are called directly; call the losses"
        )
    if is_transformed():
        return True
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)


def _compiled_stats(student: Tensor, dtype: torch.dtype) -> torch.dtype:
    # Kept in double where that costs nothing.
    return torch.float64 if student.device.type == "cpu" else dtype


FUSED = Operators("", _compiled_stats)
TRITON = Operators("triton_", lambda _, dtype: dtype)
