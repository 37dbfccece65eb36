"""MNIST: handwritten digits by a very deep and very thin residual network, trained by MG/OPT in depth (paper 000).

    y_0 = Q x,   y_{k+1} = y_k + h s(W_k y_k + b_k),  k = 0 .. K-1,  h = T/K,  s the ReLU,
    L = mean cross entropy(W_K y_K + b_K) + beta 2^(L-l) (|W|^2 + |b|^2 + |Q|^2),

with 784 pixels x and width 10; a cycle for every minibatch (algorithm 3), or for all images.

The paper has 460 V-cycles of a single level to 93 %. At its rate of 0.01 we are at 80 % after 460 minibatches of 1000,
and, in one run with 8 frozen blocks and ten times the rate, at 93 % after 2,500: 25,000 at 0.01, or 417 epochs. So we
read the paper's numbers as epochs, and look for no hidden scaling of data, loss or weights. A cycle is a minibatch. Try

    python drivers/mgopt_mnist.py
    python drivers/mgopt_mnist.py --mgopt.schedule="[{1}]"
    mpirun -n 2 python drivers/mgopt_mnist.py --mgrit.max_levels=2 --mgrit.intervals=16 --resume auto
    python drivers/mgopt_mnist.py --smoke --out /tmp/mgopt_mnist
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from xbraid_py.comm import Communicator
from xbraid_py.data.mnist_columns import SCALINGS
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.mgopt_options import LevelOptions, MGOptOptions
from xbraid_py.problem.problem import DenseResNetOptions
from xbraid_py.recipes.mgopt import Job, MnistSamples
from xbraid_py.recipes.mgopt_follow import Following, follow
from xbraid_py.run.folder import claim
from xbraid_py.run.launch import launch
from xbraid_py.run.options import to_dict
from xbraid_py.run.progress import setup_logging


@dataclass(frozen=True, kw_only=True)
class Options:
    """The job of MNIST by MG/OPT.

    Parameters
    ----------
    num_layers
        Residual layers of the finest network.
    batch_size
        Images of a minibatch, one for each cycle; 0 takes all images in every cycle.
    portion
        With batch_size=0, images that are propagated together.
    scaling
        Of the pixels: in [0, 1] less the mean of each (centered), in [0, 1] (unit), or of mean 0 and standard
        deviation 1 (standard).
    num_train
        Take only the first so many training images.
    num_test
        Take only the first so many test images, for the validation.
    data_dir
        Folder of the four files.
    seed
        Of initial weights and order.
    dtype
        Of weights and states.
    beta
        Tikhonov regularization of the finest network.
    goal
        Validation accuracy at which the run ends.
    max_cycles
        End after so many cycles, whatever the accuracy.
    validate_every
        Cycles between two validations.
    checkpoint_every
        Cycles between two checkpoints.
    keep
        Newest checkpoints to keep, besides the best.
    out
        Folder of the record, the checkpoints and the picture.
    resume
        Checkpoint to go on from, or auto for the newest good one in the out folder (if there is one). It holds no
        momentum and no pairs: those of momentum, adam and lbfgs begin anew.
    smoke
        A run of seconds: other defaults, each of which may still be given.
    network
        The network.
    mgopt
        Levels, transfers and optimizers.
    mgrit
        Solver of the states; the default propagates layer after layer, which is the best on one rank.
    """

    num_layers: int = 2048
    batch_size: int = 1000
    portion: int = 2000
    scaling: Literal["centered", "unit", "standard"] = "centered"
    num_train: int | None = None
    num_test: int | None = None
    data_dir: Path | None = None
    seed: int = 0
    dtype: Literal["float64", "float32"] = "float32"
    beta: float = 1e-5
    goal: float = 0.93
    max_cycles: int = 2000
    validate_every: int = 5
    checkpoint_every: int = 100
    keep: int = 3
    out: Path = Path("runs/mgopt_mnist")
    resume: str | None = None
    smoke: bool = False
    network: DenseResNetOptions = DenseResNetOptions(width=10, T=1.0, activation="relu")
    mgopt: MGOptOptions = MGOptOptions(optim=LevelOptions(learning_rate=(0.01,)))
    mgrit: MGRIT = MGRIT(max_levels=1)

    def __post_init__(self):
        _ = self.following
        if self.portion < 1:
            raise ValueError(f"portion={self.portion} must be at least 1; use 2000")
        if self.batch_size < 0:
            raise ValueError(f"batch_size={self.batch_size} must be at least 0; use 1000, or 0 for all images")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling={self.scaling!r} must be {' or '.join(SCALINGS)}; use centered")
        if not 0.0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta} must be at least 0 and finite; use 1e-5")

    @property
    def following(self) -> Following:
        """When the run ends, and how often it is looked at."""
        return Following(
            goal=self.goal,
            max_cycles=self.max_cycles,
            validate_every=self.validate_every,
            checkpoint_every=self.checkpoint_every,
            keep=self.keep,
        )


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The job in seconds."""

    __doc__ = Options.__doc__
    num_layers: int = 32
    batch_size: int = 50
    portion: int = 50
    num_train: int | None = 200
    num_test: int | None = 100
    max_cycles: int = 12
    validate_every: int = 2
    checkpoint_every: int = 4
    mgopt: MGOptOptions = MGOptOptions(levels=4, optim=LevelOptions(learning_rate=(0.05,)))


def configured(options: Options, comm: Communicator) -> Job:
    """One configuration, ready to run; reads the files, sends no message."""
    samples = MnistSamples(
        batch_size=options.batch_size,
        portion=options.portion,
        scaling=options.scaling,
        num_train=options.num_train,
        num_test=options.num_test,
        seed=options.seed,
        dtype=getattr(torch, options.dtype),
        data_dir=options.data_dir,
    )
    return samples.job(options.num_layers, options.mgopt, options.network, options.beta, comm, options.mgrit)


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    setup_logging(comm)
    folder = claim(options.out, comm)
    job = configured(options, comm)

    def draw(rows: list[dict]) -> None:
        if comm.rank == 0:
            from xbraid_py.recipes.pictures import cycles  # matplotlib takes its time to load: on one rank only

            cycles.over_cycles({str(job.training.schedule): rows}, folder.figures / "cycles.png")

    return follow(
        job, options.following, folder, to_dict(options), options.mgopt.cycle, resume=options.resume, finish=draw
    )


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
