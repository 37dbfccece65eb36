"""Flow through a porous medium: the pressure, or the outflow, learned by a network, multilevel in width (paper 002).

    q = -k grad p,  div q = 0  in the unit square,  p = 1  on the left,  p = 0  on the right,

from the logarithm of a log-normal permeability k on 32 x 32 cells to the mean outflow on the right (eq. 43), or to p,
by V-cycles over networks of half, a quarter, ... as many neurons; or from the two phases of the public 16 x 16 set to
its pressure. Try

    python drivers/darcy.py
    python drivers/darcy.py --training.levels=4 --training.eta=2.83
    python drivers/darcy.py --target=pressure --inputs="[k]"
    python drivers/darcy.py --source=public --num_train=1000 --num_val=50
    mpirun -n 2 python drivers/darcy.py --data_dir=runs/data --resume auto
    python drivers/darcy.py --smoke --out /tmp/darcy
"""

from __future__ import annotations

from collections.abc import Callable

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.recipes import DarcyOptions as Options
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "target": "pressure",  # a field: the pictures of one are made too
        "inputs": ("k",),
        "mesh": 12,
        "num_train": 160,
        "num_val": 40,
        "batch_size": 20,
        "max_work": 140.0,
        "validate_every": 28.0,
        "checkpoint_every": 4,
        "network": {"widths": (32, 32, 32), "channels": (8, 8, 8), "kernels": (3, 3, 2), "strides": (2, 1, 1)},
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Read and check everything, without a message; returns the run."""
    return recipes.width.set_up(options, comm)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
