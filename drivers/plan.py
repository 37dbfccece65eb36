"""Plan: how long a weight update takes on how many ranks, by which cycle, and which is best.

Measures this machine for some seconds, simulates the critical path of an update, and predicts time, speedup and
memory. Ranks beyond those of a node go to further nodes, over a network whose constants are assumed.
The same as `xbraid-py plan`. Try

    python drivers/plan.py --num_layers 1024 --width 8 --batch 5000 --ranks 1,2,4,64,1024
    mpirun -n 4 python drivers/plan.py --ranks 1,2,4 --ranks_per_node 4
"""

from __future__ import annotations

from xbraid_py.planner.job import DESCRIPTION, Options, setup
from xbraid_py.run.launch import launch

if __name__ == "__main__":
    launch(Options, setup, description=DESCRIPTION)
