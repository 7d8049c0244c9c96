"""Fused knowledge-distillation losses for PyTorch."""

from kdkernels import losses
from kdkernels.backend import Availability, Memory, backends, memory, release_memory
from kdkernels.call import Parts
from kdkernels.losses import *

__version__ = "0.1.0"

__all__ = ["Availability", "Memory", "Parts", "backends", "memory", "release_memory"]
__all__ += losses.__all__
