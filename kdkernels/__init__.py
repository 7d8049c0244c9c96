"""Fused knowledge-distillation losses for PyTorch."""

from kdkernels.backend import Availability, backends
from kdkernels.call import Parts
from kdkernels.losses import (
    TargetSplit,
    aekt_loss,
    cross_entropy_loss,
    dkd_loss,
    kd_loss,
    mixed_kl_loss,
    nkd_loss,
    reverse_kl_loss,
    target_split,
    tf_nkd_loss,
)
from kdkernels.modules import (
    AEKTLoss,
    CrossEntropyLoss,
    DKDLoss,
    KDLoss,
    MixedKLLoss,
    NKDLoss,
    ReverseKLLoss,
    TaskSerialization,
    TFNKDLoss,
)

__version__ = "0.1.0"

__all__ = [
    "AEKTLoss",
    "Availability",
    "CrossEntropyLoss",
    "DKDLoss",
    "KDLoss",
    "MixedKLLoss",
    "NKDLoss",
    "Parts",
    "ReverseKLLoss",
    "TFNKDLoss",
    "TargetSplit",
    "TaskSerialization",
    "aekt_loss",
    "backends",
    "cross_entropy_loss",
    "dkd_loss",
    "kd_loss",
    "mixed_kl_loss",
    "nkd_loss",
    "reverse_kl_loss",
    "target_split",
    "tf_nkd_loss",
]
