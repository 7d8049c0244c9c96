"""Views of the logits with the one or two dimensions of rows, or none, that the operators take."""

from __future__ import annotations

import math
from itertools import pairwise

from torch import Tensor


def as_rows(
    student: Tensor, teacher: Tensor | None, target: Tensor | None, row_weight: Tensor | None
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The inputs as the operators take them. Classes are last."""
    if student.dim() > 3:
        if teacher is None:
            (student,) = _merge(student)
        else:
            student, teacher = _merge(student, teacher)
        target = target.reshape(student.shape[:-1]) if target is not None else None
        row_weight = row_weight.reshape(student.shape[:-1]) if row_weight is not None else None
    if target is not None:
        target = target.contiguous()
    if row_weight is not None:
        row_weight = row_weight.contiguous()
    return student, teacher, target, row_weight


def _merge(*logits: Tensor) -> tuple[Tensor, ...]:
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
