"""The target apart from the other classes: DKD, NKD and AEKT, and the split itself."""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from kdkernels import call
from kdkernels.arguments import COMMON, check_option, takes_common
from kdkernels.losses.module import LossModule, TargetModule

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from kdkernels.arguments import Common, Settings

__all__ = [
    "AEKTLoss",
    "DKDLoss",
    "NKDLoss",
    "TFNKDLoss",
    "TargetSplit",
    "TaskSerialization",
    "aekt_loss",
    "dkd_loss",
    "nkd_loss",
    "target_split",
    "tf_nkd_loss",
]


@takes_common
def dkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    t_squared: bool = True,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
    **common: Unpack[Common],
) -> Any:
    """Decoupled knowledge distillation: T^2 (alpha TCKD + beta NCKD), per row.

    TCKD is the divergence between the binary distributions (target, not target) of teacher and
    student, NCKD that between their distributions over the other classes. Zhao et al., "Decoupled
    Knowledge Distillation", arXiv 2203.08679; the defaults are those for CIFAR-100, ImageNet has
    T = 1, alpha = 1, beta = 0.5. The paper's loss adds cross-entropy (`ce_weight=1`) and warms the
    distillation up over the first epochs (`kd_weight`), which is left to the caller.

    Args:
        student, teacher: raw logits, as for `kd_loss`, whose other promises hold as well.
        target: integer class ids, the shape of the logits without the classes.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether both terms are multiplied by T^2.
        alpha, beta: 0, or from 1e-30 to 1e30.
    """
    own = {"temperature": temperature, "t_squared": t_squared, "alpha": alpha, "beta": beta}
    return call.loss("dkd", student, teacher, target, own, common)


class DKDLoss(TargetModule):
    """Decoupled knowledge distillation; see `kdkernels.dkd_loss`."""

    _function = dkd_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 4.0,
        t_squared: bool = True,
        alpha: float | Tensor = 1.0,
        beta: float | Tensor = 8.0,
        **common: Unpack[Settings],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "alpha": alpha, "beta": beta}
        super().__init__(own, common)


@takes_common
def nkd_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    t_squared: bool = True,
    gamma: float | Tensor = 1.5,
    **common: Unpack[Common],
) -> Any:
    """Normalised knowledge distillation: -b log c - gamma T^2 sum_{i != y} qh_i log ph_i, per row.

    b and c are the probabilities of the target in teacher and student, at temperature 1; qh and ph
    their distributions over the other classes, at temperature T. Both terms are cross-entropies,
    so the minimum is not 0. Yang et al., arXiv 2303.13005 (first as 2208.10139); the defaults are
    those for ImageNet, CIFAR-100 has T = 3, gamma = 3.5. The paper's loss adds cross-entropy
    (`ce_weight=1`).

    Args:
        student, teacher: raw logits, as for `kd_loss`, whose other promises hold as well.
        target: integer class ids, the shape of the logits without the classes. Or, as the authors'
            code takes them, one-hot or mixed labels: floating point, the shape of the logits; of
            each row the class of the largest counts, the first of equal ones. `ce_weight` must then
            be 0, because cross-entropy with them is not the one with that class.
        temperature: T, from 1e-4 to 1e4, of the second term only.
        t_squared: whether the second term is multiplied by T^2.
        gamma: 0, or from 1e-30 to 1e30.
    """
    own = {"temperature": temperature, "t_squared": t_squared, "gamma": gamma}
    return call.loss("nkd", student, teacher, target, own, common)


class NKDLoss(TargetModule):
    """Normalised knowledge distillation; see `kdkernels.nkd_loss`."""

    _function = nkd_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        t_squared: bool = True,
        gamma: float | Tensor = 1.5,
        **common: Unpack[Settings],
    ) -> None:
        own = {"temperature": temperature, "t_squared": t_squared, "gamma": gamma}
        super().__init__(own, common)


@takes_common
def tf_nkd_loss(
    student: Tensor,
    target: Tensor,
    *,
    mean_confidence: float | Tensor | None = None,
    **common: Unpack[Common],
) -> Any:
    """Teacher-free NKD: -(c + 1 - mean(c)) log c, per row, the factor not being differentiated.

    c is the student's probability of the target at temperature 1. Yang et al., "Rethinking
    Knowledge Distillation via Cross-Entropy", arXiv 2208.10139. The paper's loss adds cross-entropy
    (`ce_weight=1`).

    Args:
        student: raw logits, as for `kd_loss`, whose other promises hold as well. They are swept
            twice, once for mean(c), and once more with label smoothing.
        target: integer class ids, the shape of the logits without the classes.
        mean_confidence: replaces mean(c), which is otherwise taken over the rows that are read
            (neither ignored nor of weight 0) and are not NaN. A number from 0 to 1, or a 0-d tensor
            whose value is not checked. With data split over processes, the mean over all of them.
    """
    return call.tf_nkd(student, target, mean_confidence, common)


class TFNKDLoss(LossModule):
    """Teacher-free NKD; see `kdkernels.tf_nkd_loss`.

    `mean_confidence` belongs to a batch, so it is an argument of the call, like `row_weight`.
    """

    _function = tf_nkd_loss

    def __init__(self, **common: Unpack[Settings]) -> None:
        super().__init__({}, common)

    def forward(
        self,
        student: Tensor,
        target: Tensor,
        *,
        mean_confidence: float | Tensor | None = None,
        row_weight: Tensor | None = None,
        normalizer: float | Tensor | None = None,
    ) -> Any:
        return self._call(
            student,
            target,
            mean_confidence=mean_confidence,
            row_weight=row_weight,
            normalizer=normalizer,
        )


@takes_common
def aekt_loss(
    student: Tensor,
    teacher: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 4.0,
    t_squared: bool = True,
    alpha: float | Tensor = 1.0,
    beta: float | Tensor = 8.0,
    variant: str = "ratio_weighted_tckd",
    log_ratio_max: float = math.log(10),
    **common: Unpack[Common],
) -> Any:
    """Adaptive explicit knowledge transfer: T^2 (alpha phi(c; b) + beta NCKD), per row.

    b and c are the probabilities of the target in teacher and student at temperature T, NCKD as in
    `dkd_loss`. Park and Lee, arXiv 2409.01679: the preprint is public, but its full text was not
    available when this was built. The forms of phi are ours, derived from a published summary of it
    (the student learns the teacher's confidence in the target, explicit knowledge, adaptively by
    the ratio r = b / c, along with the other classes); the default may differ from the paper's:

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
        student, teacher: raw logits, as for `kd_loss`, whose other promises hold as well.
        target: integer class ids, the shape of the logits without the classes.
        temperature: T, from 1e-4 to 1e4.
        t_squared: whether both terms are multiplied by T^2.
        alpha, beta: 0, or from 1e-30 to 1e30.
        variant: the form of phi, one of the above.
        log_ratio_max: log r is clamped here, from 0 to 80, because r overflows when c is tiny.
    """
    own = {
        "temperature": temperature,
        "t_squared": t_squared,
        "alpha": alpha,
        "beta": beta,
        "variant": variant,
        "log_ratio_max": log_ratio_max,
    }
    return call.loss("aekt", student, teacher, target, own, common)


class AEKTLoss(TargetModule):
    """Adaptive explicit knowledge transfer, in derived forms; see `kdkernels.aekt_loss`."""

    _function = aekt_loss

    def __init__(
        self,
        *,
        temperature: float | Tensor = 4.0,
        t_squared: bool = True,
        alpha: float | Tensor = 1.0,
        beta: float | Tensor = 8.0,
        variant: str = "ratio_weighted_tckd",
        log_ratio_max: float = math.log(10),
        **common: Unpack[Settings],
    ) -> None:
        own = {
            "temperature": temperature,
            "t_squared": t_squared,
            "alpha": alpha,
            "beta": beta,
            "variant": variant,
            "log_ratio_max": log_ratio_max,
        }
        super().__init__(own, common)


class TaskSerialization(nn.Module):
    """AEKT's layer between classification and distillation (arXiv 2409.01679).

    A linear map from the student's class logits to the logits that the distillation loss sees. The
    class logits themselves go to the cross-entropy, and alone serve after training: the layer is
    trained along and then dropped. It starts as the identity, that is from plain distillation. How
    the paper initialises the layer, and where exactly it places it, we do not know: its full text
    was not available when this was built.

        distilled = serialization(logits)
        loss = cross_entropy(logits, target) + aekt_loss(distilled, teacher_logits, target)

    Args:
        classes: the number of classes; the layer holds classes^2 + classes parameters, of which a
            warning speaks beyond 4096 classes.
        device, dtype: of the parameters, as of any module; they may be made on "meta" and then
            initialised by `reset_parameters()`, as FSDP does.
    """

    def __init__(
        self,
        classes: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(classes, bool) or not isinstance(classes, int):
            raise TypeError(f"classes: got {type(classes).__name__}; must be an integer")
        if classes < 1:
            raise ValueError(f"classes: got {classes}; must be at least 1")
        if classes > 4096:
            warnings.warn(
                f"TaskSerialization({classes}) holds {classes * (classes + 1):,} parameters:"
                " it is meant for some thousand classes at most",
                RuntimeWarning,
                stacklevel=2,
            )
        self.classes = classes
        self.linear = _Identity(classes, classes, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        self.linear.reset_parameters()

    def forward(self, student_logits: Tensor) -> Tensor:
        """Distillation logits `(..., classes)` from class logits of the same shape."""
        return self.linear(student_logits)


class _Identity(nn.Linear):
    """A linear map that starts as the identity, whoever initialises it: FSDP and others look for
    `reset_parameters` at the module that holds the parameters.
    """

    def reset_parameters(self) -> None:
        with torch.no_grad():
            nn.init.eye_(self.weight)
            nn.init.zeros_(self.bias)


class TargetSplit(NamedTuple):
    """What `target_split` returns, each with the shape of the target."""

    log_target: Tensor
    log_rest: Tensor
    logsumexp_rest: Tensor


def target_split(
    logits: Tensor,
    target: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    dim: int = -1,
    classes: int | None = None,
    ignore_index: int = -100,
    backend: str | None = None,
) -> TargetSplit:
    """Splits softmax(logits / T) into the target and the rest, the decomposition under DKD and NKD.

    Args:
        logits: `(..., classes)`, or with the classes at `dim`; any floating dtype of `kd_loss`.
        target: integer class ids, the shape of the logits without the classes.
        temperature: T, from 1e-4 to 1e4; a tensor of it may be 0-d or hold one for each row.
        dim, classes, ignore_index, backend: as in `kd_loss`; ignored rows are 0 in all results.

    Returns:
        log_target: the logarithm of the target's probability, accurate also when that is near 1.
        log_rest: the logarithm of 1 minus it, accurate also when that is near 0.
        logsumexp_rest: the logsumexp of logits / T over the classes other than the target.

        Each has the shape of the target, float64 for float64 logits, else float32, and is
        differentiable. With no other class left, the last two are -inf.

    Raises the errors of `kd_loss`.
    """
    name, own = "target_split", {"temperature": temperature}
    given = {"dim": dim, "classes": classes, "ignore_index": ignore_index, "backend": backend}
    options = {**COMMON, **{key: check_option(key, x, name) for key, x in given.items()}}
    return TargetSplit(*call.rows(name, logits, target, own, options).unbind())
