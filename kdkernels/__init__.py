"""Fused knowledge-distillation losses for PyTorch."""

from kdkernels.backend import Availability, backends
from kdkernels.call import Parts
from kdkernels.losses import (
    TargetSplit,
    aekt_loss,
    dkd_loss,
    kd_loss,
    nkd_loss,
    target_split,
    tf_nkd_loss,
)
from kdkernels.modules import AEKTLoss, DKDLoss, KDLoss, NKDLoss, TaskSerialization, TFNKDLoss

__version__ = "0.1.0"

__all__ = [
    "AEKTLoss",
    "Availability",
    "DKDLoss",
    "KDLoss",
    "NKDLoss",
    "Parts",
    "TFNKDLoss",
    "TargetSplit",
    "TaskSerialization",
    "aekt_loss",
    "backends",
    "dkd_loss",
    "kd_loss",
    "nkd_loss",
    "target_split",
    "tf_nkd_loss",
]
