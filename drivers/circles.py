"""Co-centric circles: a very deep and very thin residual network, trained by MG/OPT in depth (paper 000).

    y_0 = Q x,   y_{k+1} = y_k + h s(W_k y_k + b_k),  k = 0 .. K-1,  h = T/K,  s the ReLU,
    L = mean cross entropy(W_K y_K + b_K) + beta 2^(L-l) (|W|^2 + |b|^2 + |Q|^2),

minimised over W, b and Q by cycles over networks of K, K/2, K/4, ... layers, until every validation point is
classified rightly. Try

    python drivers/circles.py
    python drivers/circles.py --mgopt.schedule="[{1}]"
    mpirun -n 2 python drivers/circles.py --mgrit.cfactor=8
    python drivers/circles.py --smoke --out /tmp/circles
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from xbraid_py.comm import Communicator
from xbraid_py.data import circles, peaks
from xbraid_py.data.dataset import Dataset
from xbraid_py.io.launch import launch
from xbraid_py.io.options import to_dict
from xbraid_py.io.progress import Progress, setup_logging
from xbraid_py.io.run_folder import RunFolder, claim
from xbraid_py.io.signals import Stopped
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel import MGOpt, MGOptOptions
from xbraid_py.multilevel.perceptron import PerceptronProblem, perceptron_weights
from xbraid_py.objective import Regularization
from xbraid_py.problem import Architecture

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
        Tikhonov regularisation of the finest network.
    goal
        Validation accuracy at which the run ends.
    max_cycles
        End after so many cycles, whatever the accuracy.
    out
        Folder of the record and the pictures.
    smoke
        A run of seconds: other defaults, each of which may still be given.
    network
        The network.
    mgopt
        Levels, transfers and optimisers.
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
    out: Path = Path("runs/circles")
    smoke: bool = False
    network: Architecture = Architecture(width=3, T=1.0, activation="relu")
    mgopt: MGOptOptions = MGOptOptions()
    mgrit: MGRIT = MGRIT(max_levels=1)

    def __post_init__(self):
        if self.max_cycles < 1:
            raise ValueError(f"max_cycles={self.max_cycles} must be at least 1; use 300")
        if not 0.0 < self.goal <= 1.0:
            raise ValueError(f"goal={self.goal} must be above 0 and at most 1; use 1.0")
        if not 0.0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta} must be at least 0 and finite; use 1e-4")


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The circles job in seconds."""

    __doc__ = Options.__doc__
    num_layers: int = 64
    num_train: int = 200
    num_val: int = 100
    max_cycles: int = 20
    mgopt: MGOptOptions = MGOptOptions(levels=4)


def configured(options: Options, comm: Communicator) -> tuple[MGOpt, Dataset]:
    """One configuration, ready to run, and its validation points; sends no message."""
    dtype = getattr(torch, options.dtype)
    train, validation = circles.generate(options.num_train, options.num_val, options.seed, options.sampling, dtype)
    problem = PerceptronProblem(
        features=train.features,
        labels=train.labels,
        num_classes=train.num_classes,
        architecture=options.network,
        # beta |.|^2 is gamma/2 |.|^2 with gamma = 2 beta.
        regularization=Regularization(2 * options.beta, 0.0, 2 * options.beta, "sum"),
        forward=options.mgrit,
        adjoint=options.mgrit.for_adjoint(),
        comm=comm,
        dtype=dtype,
    )
    run = MGOpt(problem, options.num_layers, options.mgopt)
    run.x = perceptron_weights(run.network, options.seed)
    return run, validation


def rows_of(run: MGOpt, validation: Dataset, goal: float, max_cycles: int) -> Iterator[dict]:
    """Train to the goal; a row of the record for the start and for each cycle. The last one says `final`."""
    for record in run.run(max_cycles):
        classes = run.network.predict(run.x, validation.features)
        accuracy = float((classes == validation.labels).double().mean())
        final = accuracy >= goal or record.cycle == max_cycles
        yield {
            "kind": "update",
            "run": "mgopt",
            "level": 0,
            "num_layers": run.network.grid.num_layers,
            "update": record.cycle,
            "cycle": record.cycle,
            "work": record.work,
            "counted_work": record.counted,
            "gradients": record.gradients,
            "seconds": record.seconds,
            "objective": record.evaluation.value,
            "loss": record.evaluation.loss,
            "train_accuracy": record.evaluation.accuracy,
            "val_accuracy": accuracy,
            "state_residual": record.evaluation.residual,
            "reached": accuracy >= goal,
            "final": final,
        }
        if final:
            return


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    setup_logging(comm)
    folder = claim(options.out, comm)
    training, validation = configured(options, comm)

    def run() -> None:
        folder.set_aside()
        rows = []
        with folder.open(to_dict(options), options.max_cycles), Progress(comm, options.max_cycles, every=1) as progress:
            progress.note(f"{training.schedule}, {training.schedule.work(options.mgopt.cycle):.2f} work units a cycle")
            for row in rows_of(training, validation, options.goal, options.max_cycles):
                rows.append(row)
                progress.update(row)
                folder.write(row)
                stop = folder.update(row["cycle"], row["objective"], row["val_accuracy"])
                if stop and not row["final"]:
                    raise Stopped(f"stopped after cycle {row['cycle']}; such a run takes seconds: start it again")
            draw(training, rows, folder)
        if comm.rank == 0:
            print(summary(rows[-1]), flush=True)

    return run


def summary(row: dict) -> str:
    """The last line of a run."""
    return (
        f"validation accuracy {100 * row['val_accuracy']:.2f} %{'' if row['reached'] else ', not the goal,'} after "
        f"{row['cycle']} cycles, {row['work']:.1f} work units (counted: {row['counted_work']:.1f}), "
        f"{row['seconds']:.2f} seconds"
    )


def draw(run: MGOpt, rows: list[dict], folder: RunFolder) -> None:
    """The pictures of a run."""
    mesh = peaks.mesh(MAP_SIZE, run.network.dtype)
    classes = run.network.predict(run.x, mesh).reshape(MAP_SIZE, MAP_SIZE)
    if folder.comm.rank == 0:
        from xbraid_py.report import cycles, maps  # matplotlib takes its time to load: on one rank only

        cycles.over_cycles({str(run.schedule): rows}, folder.figures / "cycles.png")
        true = circles.class_of(*mesh.double().numpy()).reshape(classes.shape)
        maps.class_map(classes, true, ["elsewhere", "ring"], folder.figures / "classes.png")


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
