"""What kind of tensors a call is made of: dtypes, and which are real, traced or mapped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from kdkernels.reference import LOSSES

# Floating point statistics per row, the same for every loss; the kernels check it.
STATS_WIDTH = 10


def loss_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """float64 if either input is, else float32: losses are never rounded to 16 bits."""
    double = student.dtype == torch.float64 or (
        teacher is not None and teacher.dtype == torch.float64
    )
    return torch.float64 if double else torch.float32


# Whether a transform of torch.func is at work. Private to torch.
is_functorch = torch._C._are_functorch_transforms_active
# Whether a tensor is many under is_grads_batched, whose vmap is another one. Private, too.
is_mapped_by_autograd = torch._C._functorch.is_legacy_batchedtensor


def is_transformed() -> bool:
    """Whether torch.func (vmap, grad, jvp, ...) or forward-mode differentiation is at work."""
    return is_functorch() or forward_ad._current_level >= 0


def is_forward_over_forward() -> bool:
    """Whether forward mode is differentiated in forward mode again, which torch does not do to any
    autograd.Function: the result would be 0.
    """
    if not is_functorch():
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    jvp = torch._C._functorch.TransformType.Jvp
    return sum(level.key() == jvp for level in stack) > 1


WHOLE = frozenset((Tensor, Parameter))  # types of tensors that may be looked into


def is_eager(tensor: Tensor) -> bool:
    """Whether this is a real tensor, with data to look at: subclasses may be fake or functional,
    and under vmap one tensor is many.
    """
    return (
        type(tensor) in WHOLE
        and not torch.compiler.is_compiling()
        and not is_functorch()
        and not is_mapped_by_autograd(tensor)
    )


def is_traced(tensor: Tensor) -> bool:
    """Whether the operations on this tensor are being recorded for later: it has no data."""
    return torch.compiler.is_compiling() or isinstance(tensor, (FakeTensor, FunctionalTensor))


def _constant(value: Tensor) -> float:
    """The value of what is the same for all that is mapped, and in all rows."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return float(value.detach().flatten()[0]) if value.numel() else 0.0


def counted(logits: Tensor, classes: int) -> Tensor:
    """Logits of the classes that count."""
    return logits[..., :classes] if classes else logits


def formula(
    loss: str,
    logits: Sequence[Tensor],
    target: Tensor | None,
    numbers: Sequence[float | Tensor],
    ignore_index: int,
    row_weight: Tensor | None,
    **parts: bool,
) -> Tensor:
    """The reference of a loss, where a number may also be a tensor of one for each row."""
    compute = LOSSES[loss].reference
    of_rows = [isinstance(x, Tensor) and x.dim() > 0 for x in numbers]
    shape = logits[0].shape[:-1]
    if any(of_rows) and math.prod(shape) == 0:  # there is nothing to map over
        numbers = [x.sum() if isinstance(x, Tensor) else x for x in numbers]
    elif any(of_rows):
        first = len(logits)

        def row(*given: Any) -> Tensor:
            return compute(
                *(*given[: first + 1], *given[first + 2 :]),
                ignore_index=ignore_index,
                row_weight=given[first + 1],
                **parts,
            )

        given: list[Any] = [x.reshape(-1, x.shape[-1]) for x in logits]
        given += [None if x is None else x.reshape(-1) for x in (target, row_weight)]
        given += [x.reshape(-1) if isinstance(x, Tensor) and x.dim() > 0 else x for x in numbers]
        mapped = [x is not None for x in given[: first + 2]] + of_rows
        in_dims = tuple(0 if x else None for x in mapped)
        value: Tensor = torch.vmap(row, in_dims, -1)(*given)
        return value.reshape(*value.shape[:-1], *shape)
    return compute(
        *logits, target, *numbers, ignore_index=ignore_index, row_weight=row_weight, **parts
    )


def reference_rows(
    loss: str,
    student: Tensor,
    teacher: Tensor | None,
    target: Tensor | None,
    row_weight: Tensor | None,
    params: Tensor,
    ignore_index: int,
    classes: int = 0,
) -> Tensor:
    """The reference under the operators' signature."""
    entry = LOSSES[loss]
    rows, count = student.shape[:-1], len(entry.params)
    of_rows = params.dim() == 2
    if params.shape != ((math.prod(rows), count) if of_rows else (count,)):
        raise RuntimeError(f"params: {loss!r} has {count}, got shape {tuple(params.shape)}")
    tensors = (student, teacher) if entry.teacher else (student,)
    logits = [counted(x, classes) for x in tensors if x is not None]
    # As numbers where they are numbers: a term of weight 0 is then left out.
    plain = is_eager(params) and not params.requires_grad and not of_rows
    numbers = params.tolist() if plain else list(params.unbind(-1))
    for i, name in enumerate(entry.params):
        if name in entry.choices and not plain:
            numbers[i] = _constant(numbers[i])
        elif of_rows:
            numbers[i] = numbers[i].reshape(rows)
    return formula(loss, logits, target, numbers, ignore_index, row_weight)
