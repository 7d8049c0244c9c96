"""The list of losses, and what operators, autograd and callers need to know of one."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from kdkernels import reference

# Floating point statistics per row, the same for every loss; the kernels check it.
STATS_WIDTH = 10


@dataclass(frozen=True)
class Loss:
    """What is known of a loss. Its parameters are the reference's, in order."""

    reference: Callable[..., Tensor]
    teacher: bool = True
    target: bool = True  # whether one is required
    outputs: int = 1
    choices: tuple[str, ...] = ()  # parameters that are a choice, not a number
    soft_target: bool = False  # whether one of probabilities is taken, of which the largest counts

    @cached_property
    def params(self) -> tuple[str, ...]:
        """The names of its parameters, in the operators' order."""
        signature = inspect.signature(self.reference).parameters.values()
        positional = [x.name for x in signature if x.kind is x.POSITIONAL_OR_KEYWORD]
        return tuple(positional[3 if self.teacher else 2 :])  # behind the tensors

    @cached_property
    def temperature(self) -> bool:
        """Whether its first parameter is one."""
        return self.params[:1] == ("temperature",)


# The list of losses: one line each.
LOSSES = {
    "kd": Loss(reference.kd, target=False),
    "dkd": Loss(reference.dkd),
    "nkd": Loss(reference.nkd, soft_target=True),
    "aekt": Loss(reference.aekt, choices=("variant",)),
    "reverse_kl": Loss(reference.reverse_kl, target=False),
    "mixed_kl": Loss(reference.mixed_kl, target=False),
    "jsd": Loss(reference.jsd, target=False),
    "skew_kl": Loss(reference.skew_kl, target=False),
    "skew_reverse_kl": Loss(reference.skew_reverse_kl, target=False, choices=("detach_mixture",)),
    "tvd": Loss(reference.tvd, target=False),
    "ab": Loss(reference.ab, target=False),
    "cross_entropy": Loss(reference.cross_entropy, teacher=False),
    "target_split": Loss(reference.target_split, teacher=False, outputs=3),
}


def loss_dtype(student: Tensor, teacher: Tensor | None) -> torch.dtype:
    """float64 if either input is, else float32: losses are never rounded to 16 bits."""
    double = student.dtype == torch.float64 or (
        teacher is not None and teacher.dtype == torch.float64
    )
    return torch.float64 if double else torch.float32


# Whether a transform of torch.func is at work. Private to torch.
is_functorch = torch._C._are_functorch_transforms_active


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


def is_eager(tensor: Tensor) -> bool:
    """Whether this is a real tensor, with data to look at: subclasses may be fake or functional,
    and under vmap one tensor is many.
    """
    return (
        type(tensor) in (Tensor, Parameter)
        and not torch.compiler.is_compiling()
        and not is_functorch()
        # Of is_grads_batched, whose vmap is another one.
        and not torch._C._functorch.is_legacy_batchedtensor(tensor)
    )


def is_traced(tensor: Tensor) -> bool:
    """Whether the operations on this tensor are being recorded for later: it has no data."""
    return torch.compiler.is_compiling() or isinstance(tensor, (FakeTensor, FunctionalTensor))


def _constant(value: Tensor) -> float:
    """The value of what is the same for all that is mapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(value):
        value = torch._C._functorch.get_unwrapped(value)
    return float(value.detach().flatten()[0])


def counted_logits(
    loss: str, student: Tensor, teacher: Tensor | None, classes: int
) -> list[Tensor | None]:
    """The logits that a loss's reference takes, of the classes that count."""
    tensors = (student, teacher) if LOSSES[loss].teacher else (student,)
    return [x if x is None else x[..., : classes or None] for x in tensors]


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
    if params.shape != (len(entry.params),):
        raise RuntimeError(
            f"params: {loss!r} has {len(entry.params)}, got shape {tuple(params.shape)}"
        )
    logits = counted_logits(loss, student, teacher, classes)
    # As numbers where they are numbers: a term of weight 0 is then left out.
    plain = is_eager(params) and not params.requires_grad
    numbers = params.tolist() if plain else list(params.unbind())
    for i, name in enumerate(entry.params):
        if name in ("t_squared", *entry.choices) and not plain:
            numbers[i] = _constant(params[i])
    return entry.reference(
        *logits, target, *numbers, ignore_index=ignore_index, row_weight=row_weight
    )
