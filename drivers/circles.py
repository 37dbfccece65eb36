"""Co-centric circles: a very deep and very thin residual network, trained by MG/OPT in depth (paper 000).

    y_0 = Q x,   y_{k+1} = y_k + h s(W_k y_k + b_k),  k = 0 .. K-1,  h = T/K,  s the ReLU,
    L = mean cross entropy(W_K y_K + b_K) + beta 2^(L-l) (|W|^2 + |b|^2 + |Q|^2),

minimized over W, b and Q by cycles over networks of K, K/2, K/4, ... layers, until every validation point is
classified rightly. Try

    python drivers/circles.py
    python drivers/circles.py --mgopt.schedule="[{1}]"
    mpirun -n 2 python drivers/circles.py --mgrit.max_levels=2 --mgrit.intervals=16 --resume auto
    python drivers/circles.py --smoke --out /tmp/circles
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from xbraid_py.comm import Communicator
from xbraid_py.data import circles, peaks
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.mgopt import MGOpt
from xbraid_py.multilevel.depth.mgopt_options import MGOptOptions
from xbraid_py.problem.perceptron import perceptron_weights
from xbraid_py.problem.problem import DenseResNetOptions
from xbraid_py.recipes.mgopt import Job, perceptron_problem
from xbraid_py.recipes.mgopt_follow import Following, follow
from xbraid_py.run.folder import RunFolder, claim
from xbraid_py.run.launch import launch
from xbraid_py.run.options import to_dict
from xbraid_py.run.progress import setup_logging

MAP_SIZE = 200


@dataclass(frozen=True, kw_only=True)
class Options:
    """The circles job.

    Parameters
    ----------
    num_layers
        Residual layers of the finest network.
    num_train
        Training points.
    num_val
        Validation points.
    sampling
        Of the points: balanced classes with a gap between them, or uniform in the square.
    seed
        Of points and initial weights.
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
        Folder of the record, the checkpoints and the pictures.
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
    num_train: int = 2000
    num_val: int = 1000
    sampling: Literal["balanced", "square"] = "balanced"
    seed: int = 0
    dtype: Literal["float64", "float32"] = "float64"
    beta: float = 1e-4
    goal: float = 1.0
    max_cycles: int = 300
    validate_every: int = 1
    checkpoint_every: int = 20
    keep: int = 3
    out: Path = Path("runs/circles")
    resume: str | None = None
    smoke: bool = False
    network: DenseResNetOptions = DenseResNetOptions(width=3, T=1.0, activation="relu")
    mgopt: MGOptOptions = MGOptOptions()
    mgrit: MGRIT = MGRIT(max_levels=1)

    def __post_init__(self):
        _ = self.following
        if not 0.0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta} must be at least 0 and finite; use 1e-4")

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
    """The circles job in seconds."""

    __doc__ = Options.__doc__
    num_layers: int = 64
    num_train: int = 200
    num_val: int = 100
    max_cycles: int = 20
    mgopt: MGOptOptions = MGOptOptions(levels=4)


def configured(options: Options, comm: Communicator) -> Job:
    """One configuration, ready to run; sends no message."""
    dtype = getattr(torch, options.dtype)
    train, validation = circles.generate(options.num_train, options.num_val, options.seed, options.sampling, dtype)
    samples, unseen = (train.features, train.labels), (validation.features, validation.labels)
    problem = perceptron_problem(samples, train.num_classes, options.network, options.beta, comm, options.mgrit)
    training = MGOpt(problem, options.num_layers, options.mgopt)
    training.x = perceptron_weights(training.network, options.seed)
    return Job(training, unseen)


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    setup_logging(comm)
    folder = claim(options.out, comm)
    job = configured(options, comm)
    return follow(
        job,
        options.following,
        folder,
        to_dict(options),
        options.mgopt.cycle,
        resume=options.resume,
        finish=lambda rows: draw(job.training, rows, folder),
    )


def draw(run: MGOpt, rows: list[dict], folder: RunFolder) -> None:
    """The pictures of a run."""
    mesh = peaks.mesh(MAP_SIZE, run.network.dtype)
    classes = run.network.predict(run.x, mesh).reshape(MAP_SIZE, MAP_SIZE)
    if folder.comm.rank == 0:
        from xbraid_py.recipes.pictures import cycles, maps  # matplotlib takes its time to load: on one rank only

        cycles.over_cycles({str(run.schedule): rows}, folder.figures / "cycles.png")
        true = circles.class_of(*mesh.double().numpy()).reshape(classes.shape)
        maps.class_map(classes, true, ["elsewhere", "ring"], folder.figures / "classes.png")


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
