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

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from xbraid_py.comm import Communicator
from xbraid_py.data.pde_source import SampleSource
from xbraid_py.data.poisson import Poisson
from xbraid_py.multilevel.width.training_options import WidthTrainingOptions
from xbraid_py.recipes.width_networks import WidthNetwork
from xbraid_py.recipes.width_run_options import WidthRunOptions, set_up
from xbraid_py.run.launch import launch


@dataclass(frozen=True, kw_only=True)
class Options(WidthRunOptions):
    """The Poisson job.

    Parameters
    ----------
    mesh
        Points in each direction.
    """

    mesh: int = 32
    out: Path = Path("runs/poisson")


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The Poisson job in seconds."""

    mesh: int = 12
    num_train: int = 160
    num_val: int = 40
    batch_size: int = 20
    max_work: float = 140.0
    validate_every: float = 28.0
    checkpoint_every: int = 4
    network: WidthNetwork = WidthNetwork(widths=(32, 32), channels=(8, 8), kernels=(3, 3), strides=(2, 1))
    training: WidthTrainingOptions = WidthTrainingOptions(learning_rate=0.1, rematch_every=4)


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    source = SampleSource(
        problem=Poisson(mesh=options.mesh),
        num_train=options.num_train,
        num_val=options.num_val,
        seed=options.seed,
        data_dir=options.data_dir,
    )
    return set_up(options, source, "poisson", comm)


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
