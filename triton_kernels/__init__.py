"""The losses as Triton kernels, compiled just in time for any GPU that Triton knows.

Installed as `kdkernels.triton_kernels`; a top-level `triton_kernels` belongs to another project.

<loss>.py   one loss: four jit functions (stats, merge, finish, grad), the twins of its C++ struct;
            two more (opening, refine) where it takes a second round over the classes
stats.py    the mergeable pieces that losses are made of;  split.py  the target against the rest
reverse.py  KL in either direction;  score.py  losses of two rounds
row.py      the generic kernels, the only loads and stores
launch.py   the planner, from tensors to launches, the operators
"""

from . import launch as launch
