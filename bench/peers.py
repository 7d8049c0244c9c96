"""Losses of other libraries, called the way their users call them.

    liger-kernel     KD, JSD, cross-entropy    in Triton; where they are installed, also CuTe DSL
    flash-attn       cross-entropy             in Triton
    quack-kernels    cross-entropy             in CuTe DSL

None of them is a dependency, and nothing of them is imported before it is asked for or called.
Every function takes raw logits (rows, classes) and a target (rows,), as those of `eager` do, and
returns the mean over the rows. What a library leaves to its user is part of the call and done as
well as PyTorch's operators allow: softmaxes in float32, in one kernel from logits of any type.
Options are at their defaults. liger-kernel has more losses for distillation, but they start from
hidden states and include the last layer of the model: those are no match for these.

What to know before reading results:

- liger-kernel, all losses: the backward pass asks the device whether the upstream gradient is 1;
  "ce" asks three more questions about the targets. The host waits for each answer, so that what it
  takes to launch the rest shows in a time between two events, most of all at small shapes.
- liger-kernel, "jsd": from compute capability 9 on it takes a kernel in CuTe DSL if that can be
  imported. quack-kernels brings it along: the same version, but another kernel. The one in Triton
  is kept by LIGER_KERNEL_IMPL_JSD_LOSS_AND_GRAD=nvidia-triton in the environment.
- liger-kernel, "ce" of 16-bit logits: the loss of every row is rounded to 16 bits, and so is their
  sum.
- flash-attn is built from source, and its package is not imported without its compiled attention,
  although this loss has no use for that.
- quack-kernels: rows of 16-bit or float32 logits with stride 1. It does not compile for 16-bit
  rows of an odd number of classes, and refuses rows that are less aligned than gcd(16 bytes, row).
  It compiles once per number of classes.
- flash-attn and quack-kernels write the gradient beside the logits, from which the backward pass
  computes it.
- None of them computes in float64.
"""

from __future__ import annotations

import importlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from bench.cases import Loss


@dataclass(frozen=True)
class Peer:
    """A library, and its losses by the names that they have in the benchmarks."""

    package: str  # what pip installs
    module: str  # what the losses import
    losses: Mapping[str, Loss]
    interpretable: bool = False  # takes CPU tensors in Triton's interpreter, for tests

    @property
    def version(self) -> str | None:
        return measure.version(self.package)

    def missing(self, device: torch.device) -> str | None:
        """Why the losses cannot be called on this device, or None if they can."""
        if self.version is None:  # also a checkout without metadata: a result needs a version
            return f"{self.package} is not installed"
        if device.type != "cuda" and not (self.interpretable and _interpreted()):
            return "needs a CUDA device"
        try:
            importlib.import_module(self.module)
        except Exception as error:  # a shared library that is not there need not be an ImportError
            return f"{type(error).__name__}: {error}".splitlines()[0]
        return None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "on", "y")


# ------------------------------------------------------------------------------------ liger-kernel
def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, in their own type if nothing is lost by that.

    A power of two only changes the exponent, and 16 bits are half the traffic of 32. Any other
    temperature would round 16-bit logits a second time.
    """
    exact = temperature >= 1 and math.frexp(temperature)[0] == 0.5
    return (logits if exact else logits.float()) / temperature


def liger_kd(student: Tensor, teacher: Tensor, target: Tensor, temperature: float = 4.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)).

    The library knows no temperature: T^2 comes after it, and its backward pass then multiplies the
    gradient by that in a kernel of its own.
    """
    from liger_kernel.transformers import functional

    log_p = F.log_softmax(_tempered(student, temperature), dim=1, dtype=torch.float32)
    q = F.softmax(_tempered(teacher, temperature), dim=1, dtype=torch.float32)
    return functional.liger_kl_div(log_p, q, reduction="batchmean") * temperature**2


def liger_jsd(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Jensen-Shannon divergence at T = 1: the mean of both KL divergences from the average."""
    from liger_kernel.transformers import functional

    log_p = F.log_softmax(student, dim=1, dtype=torch.float32)
    log_q = F.log_softmax(teacher, dim=1, dtype=torch.float32)
    return functional.liger_jsd(log_p, log_q, beta=0.5)


def liger_ce(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of a copy of the logits, because the forward pass overwrites them.

    It leaves the gradient where the logits were, and has no option against it. The benchmarks use
    their inputs again, and so must anyone who has a second loss on the same logits, such as one for
    distillation. The copy therefore counts: 1 read and 1 write more in the time, nothing more in
    the memory, since it becomes the gradient.
    """
    from liger_kernel.transformers import functional

    # Dense, or the library makes another copy of logits whose rows do not have stride 1.
    logits = student.clone(memory_format=torch.contiguous_format)
    return functional.liger_cross_entropy(logits, target)


# ------------------------------------------------------------------------------ cross-entropy only
def flash_attn_ce(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """The mean of the losses that it returns for the rows."""
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    losses, _ = cross_entropy_loss(student, target)  # the second is the z-loss, which is off
    return losses.mean()


def quack_ce(student: Tensor, teacher: Tensor, target: Tensor) -> Tensor:
    """Its own mean, over the targets that are not -100: a sum and a count of them."""
    from quack.cross_entropy import cross_entropy

    return cross_entropy(student, target, reduction="mean")


PEERS: dict[str, Peer] = {
    "liger": Peer(
        "liger-kernel",
        "liger_kernel.transformers.functional",
        {"kd": liger_kd, "jsd": liger_jsd, "ce": liger_ce},
        interpretable=True,
    ),
    # Not in the interpreter: it makes the logits' device current, which CPU tensors do not have.
    "flash_attn": Peer("flash-attn", "flash_attn.ops.triton.cross_entropy", {"ce": flash_attn_ce}),
    "quack": Peer("quack-kernels", "quack.cross_entropy", {"ce": quack_ce}),
}
