"""Poisson's equation with a varying coefficient: its solution learned by a network, multilevel in width (paper 002).

    -div(kappa grad u) = f  in the unit square,  u = 0  on its boundary,

from kappa, x and y on 32 x 32 points to u on the same ones, by V-cycles over networks of half, a quarter, ... as many
neurons; the loss is the mean square error. Try

    python drivers/poisson.py
    python drivers/poisson.py --training.levels=1 --training.learning_rate=0.1
    python drivers/poisson.py --network.kind=convolutional
    mpirun -n 2 python drivers/poisson.py --data_dir=runs/data --resume auto
    python drivers/poisson.py --smoke --out /tmp/poisson
"""

from __future__ import annotations

from collections.abc import Callable

from xbraid_py import recipes
from xbraid_py.comm import Communicator
from xbraid_py.recipes import PoissonOptions as Options
from xbraid_py.run.launch import launch

PRESETS = {
    "smoke": {
        "mesh": 12,
        "num_train": 160,
        "num_val": 40,
        "batch_size": 20,
        "max_work": 140.0,
        "validate_every": 28.0,
        "checkpoint_every": 4,
        "network": {"widths": (32, 32), "channels": (8, 8), "kernels": (3, 3), "strides": (2, 1)},
        "training": {"learning_rate": 0.1, "rematch_every": 4},
    }
}


def setup(options: Options, comm: Communicator) -> Callable[[], object]:
    """Read and check everything, without a message; returns the run."""
    return recipes.width.set_up(options, comm)


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
