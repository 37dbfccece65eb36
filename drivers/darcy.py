"""Flow through a porous medium: the pressure, or the outflow, learned by a network, multilevel in width (paper 002).

    q = -k grad p,  div q = 0  in the unit square,  p = 1  on the left,  p = 0  on the right,

from a log-normal permeability k on 32 x 32 cells to p, or to the mean outflow on the right (eq. 43), by V-cycles over
networks of half, a quarter, ... as many neurons; or from the two phases of the public 16 x 16 set to its pressure. Try

    python drivers/darcy.py
    python drivers/darcy.py --training.levels=4 --training.eta=2.83
    python drivers/darcy.py --target=flux
    python drivers/darcy.py --source=public --num_train=1000 --num_val=50
    mpirun -n 2 python drivers/darcy.py --data_dir=runs/data --resume auto
    python drivers/darcy.py --smoke --out /tmp/darcy
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from xbraid_py.comm import Communicator
from xbraid_py.data.darcy import Darcy
from xbraid_py.data.pde_source import SampleSource
from xbraid_py.multilevel.width.training_options import WidthTrainingOptions
from xbraid_py.recipes.width_networks import WidthNetwork
from xbraid_py.recipes.width_run_options import WidthRunOptions, set_up
from xbraid_py.run.launch import launch


@dataclass(frozen=True, kw_only=True)
class Options(WidthRunOptions):
    """The Darcy job.

    Parameters
    ----------
    source
        Of the samples: generated, or the public set, of which data_dir is then the folder.
    target
        What is to be learned of generated samples.
    mesh
        Cells in each direction.
    correlation_length
        Of the logarithm of the permeability, in units of the square's side.
    variance
        Of the logarithm.
    smoothness
        Of its covariance: 0.5 for the exponential one, larger for smoother fields.
    """

    source: Literal["generated", "public"] = "generated"
    target: Literal["pressure", "flux"] = "pressure"
    mesh: int = 32
    correlation_length: float = 0.2
    variance: float = 1.0
    smoothness: float = 1.0
    out: Path = Path("runs/darcy")
    training: WidthTrainingOptions = WidthTrainingOptions(steps=2, weight_decay=1e-6, rematch_every=10)


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The Darcy job in seconds."""

    mesh: int = 12
    num_train: int = 160
    num_val: int = 40
    batch_size: int = 20
    max_work: float = 140.0
    validate_every: float = 28.0
    checkpoint_every: int = 4
    network: WidthNetwork = WidthNetwork(widths=(32, 32, 32), channels=(8, 8, 8), kernels=(3, 3, 2), strides=(2, 1, 1))
    training: WidthTrainingOptions = WidthTrainingOptions(steps=2, weight_decay=1e-6, rematch_every=10)


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    names = ("mesh", "correlation_length", "variance", "smoothness")
    problem = Darcy(**{name: getattr(options, name) for name in names})
    public = options.source == "public"
    source = SampleSource(
        problem=None if public else problem,
        num_train=options.num_train,
        num_val=options.num_val,
        seed=options.seed,
        target=options.target,
        data_dir=options.data_dir,
    )
    return set_up(options, source, "darcy", comm)


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
