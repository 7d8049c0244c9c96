"""The losses as Triton kernels, compiled just in time for any GPU that Triton knows.

Installed as `kdkernels.triton_kernels`; a top-level `triton_kernels` belongs to another project.

<loss>.py   one loss: four jit functions (stats, merge, finish, grad), the twins of its C++ struct;
            two more (opening, refine) where it takes a second round over the classes
stats.py    the mergeable pieces that losses are made of;  split.py  the target against the rest
reverse.py  KL in either direction;  score.py  losses of two rounds
kernels.py  the generic kernels; rows.py and tiles.py, of which they are made, have the only loads
            and stores: of what a row has, and of its logits
losses.py   the list of losses;  planner.py  which kernel takes a call
launch.py   from tensors to launches, the operators
"""

from . import launch as launch
