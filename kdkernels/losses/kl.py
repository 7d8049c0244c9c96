"""KL divergence in either direction, and both."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdkernels import call
from kdkernels.arguments import takes_common
from kdkernels.losses.module import TeacherModule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdkernels.arguments import Common, Settings

__all__ = [
    "KDLoss",
    "MixedKLLoss",
    "ReverseKLLoss",
    "kd_loss",
    "mixed_kl_loss",
    "reverse_kl_loss",
]


@takes_common
def kd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 4.0,
    t_squared: bool = True,
    teacher_temperature: float | Tensor | None = None,
    **common: Unpack[Common],
) -> Any:
    """Knowledge distillation: T^2 KL(teacher || student) at temperature T, per row.

    Hinton, Vinyals and Dean, "Distilling the Knowledge in a Neural Network", arXiv 1503.02531.

    Args:
        student: raw logits `(..., classes)`, or with the classes at `dim`; float16, bfloat16,
            float32 or float64. Probabilities given as logits are not noticed: the loss is then that
            of softmaxes of probabilities, which are nearly uniform.
        teacher: raw logits of the same shape on the same device; its dtype may differ.
        target: integer class ids, the shape of the logits without the classes. Optional here;
            needed when `ce_weight` is not 0, and a given target applies `ignore_index`.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2, so that its gradient does not
            shrink as T grows. False is the divergence itself, as most trainers have it.
        teacher_temperature: the teacher's, where it is another one than T.

    With one class every softmax is 1: the loss is 0, and so is the gradient; of every loss.

    In float32 the value is a difference of terms that are rounded to some 1e-7 T^2: a divergence
    below that has no digits left, here and in `reverse_kl_loss` and `mixed_kl_loss`. Its gradient
    keeps them.

    The student's gradient is fused and comes in the student's dtype. Every other derivative is
    right, and the reference's: the teacher's gradient (with a warning, once), those of weights
    and temperature, second derivatives. Transforms of torch.func (grad, vjp, jvp, jacrev, jacfwd,
    hessian, vmap and their compositions) and forward mode work, with the kernels where they give
    what is asked for. A teacher made under torch.inference_mode() is taken; it is copied where it
    is kept for backward (reduction "none", float16 students, or weights that are learned).

    DTensors may be sharded or replicated over their rows, never over the classes.

    No input is copied at the size of the logits, with two exceptions: logits of four or more
    dimensions whose strides let the dimensions other than the classes be merged into no two, and
    the teacher just named.
    """
    own = {
        "temperature": temperature,
        "t_squared": t_squared,
        "teacher_temperature": teacher_temperature,
    }
    return call.loss("kd", student, teacher, target, own, common)


class KDLoss(TeacherModule):
    """Knowledge distillation; see `kdkernels.kd_loss`."""

    _function = kd_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 4.0,
        t_squared: bool = True,
        teacher_temperature: float | Tensor | None = None,
        **common: Unpack[Settings],
    ) -> None:
        own = {
            "temperature": temperature,
            "t_squared": t_squared,
            "teacher_temperature": teacher_temperature,
        }
        super().__init__(own, common)


@takes_common
def reverse_kl_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    **common: Unpack[Common],
) -> Any:
    """Reverse KL: T^2 KL(student || teacher) at temperature T, per row.

    Gu et al., "MiniLLM: Knowledge Distillation of Large Language Models", arXiv 2306.08543. Where
    the student has mass on a class that the teacher has at -inf the loss is infinite. The gradient
    is finite there, too: T p (h - sum p h) with h = log(p / q), and h = 0 for such classes.

    Args:
        student, teacher, target: as for `kd_loss`, whose other promises hold as well.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2.
    """
    own = {"temperature": temperature, "t_squared": t_squared}
    return call.loss("reverse_kl", student, teacher, target, own, common)


class ReverseKLLoss(TeacherModule):
    """Reverse KL; see `kdkernels.reverse_kl_loss`."""

    _function = reverse_kl_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        **common: Unpack[Settings],
    ) -> None:
        super().__init__({"temperature": temperature, "t_squared": t_squared}, common)


@takes_common
def mixed_kl_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    ratio: float | Tensor = 0.5,
    **common: Unpack[Common],
) -> Any:
    """Both directions of KL: T^2 (ratio KL(q || p) + (1 - ratio) KL(p || q)), per row.

    q and p are the softmax at T of teacher and student. The mixed KL of NeMo-RL, and torchtune's
    symmetric KL; with a ratio of 0.5 half of Jeffreys' divergence. One sweep computes both. Where
    the reverse direction is infinite see `reverse_kl_loss`.

    Args:
        student, teacher, target: as for `kd_loss`, whose other promises hold as well.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether the distillation is multiplied by T^2.
        ratio: the share of the forward direction, from 0 to 1.
    """
    own = {"temperature": temperature, "t_squared": t_squared, "ratio": ratio}
    return call.loss("mixed_kl", student, teacher, target, own, common)


class MixedKLLoss(TeacherModule):
    """Both directions of KL; see `kdkernels.mixed_kl_loss`."""

    _function = mixed_kl_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        ratio: float | Tensor = 0.5,
        **common: Unpack[Settings],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "ratio": ratio}
        super().__init__(own, common)
