"""The losses: of each family a file, with its functions and their modules.

The functions say what a loss is, what it takes and where it comes from; `call` computes all of
them. The formulas themselves are in `kdkernels.reference`.
"""

from kdkernels.losses import cross_entropy, decoupled, distances, kl, mixtures
from kdkernels.losses.cross_entropy import *
from kdkernels.losses.decoupled import *
from kdkernels.losses.distances import *
from kdkernels.losses.kl import *
from kdkernels.losses.mixtures import *

__all__: list[str] = []
__all__ += cross_entropy.__all__
__all__ += decoupled.__all__
__all__ += distances.__all__
__all__ += kl.__all__
__all__ += mixtures.__all__
