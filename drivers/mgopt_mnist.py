"""MNIST: handwritten digits by a very deep and very thin residual network, trained by MG/OPT in depth (paper 000).

    y_0 = Q x,   y_{k+1} = y_k + h s(W_k y_k + b_k),  k = 0 .. K-1,  h = T/K,  s the ReLU,
    L = mean cross entropy(W_K y_K + b_K) + beta 2^(L-l) (|W|^2 + |b|^2 + |Q|^2),

with 784 pixels x and width 10; a cycle for every minibatch (algorithm 3), or for all images.

The paper has 460 V-cycles of a single level to 93 %. At its rate of 0.01 we are at 80 % after 460 minibatches of 1000,
and, in one run with 8 frozen blocks and ten times the rate, at 93 % after 2,500: 25,000 at 0.01, or 417 epochs. So we
read the paper's numbers as epochs, and look for no hidden scaling of data, loss or weights. A cycle is a minibatch. Try

    python drivers/mgopt_mnist.py
    python drivers/mgopt_mnist.py --mgopt.schedule="[{1}]"
    mpirun -n 2 python drivers/mgopt_mnist.py --mgrit.cfactor=8 --resume auto
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
from xbraid_py.io.checkpoint_store import CheckpointStore
from xbraid_py.io.cycle_checkpoint import NAME, read_cycle, save_cycle
from xbraid_py.io.launch import launch
from xbraid_py.io.metrics import read
from xbraid_py.io.options import to_dict
from xbraid_py.io.progress import Progress, setup_logging
from xbraid_py.io.run_checkpoint import checkpoint_folder
from xbraid_py.io.run_folder import claim
from xbraid_py.io.training import prepare
from xbraid_py.mgopt_cases import Job, MnistSamples
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel import CycleRecord, LevelOptions, MGOptOptions
from xbraid_py.problem import Architecture

# What may differ between a run and its continuation.
FREE = ("out", "resume", "smoke", "checkpoint_every", "keep", "validate_every", "max_cycles", "goal", "data_dir")


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
        Of the pixels: in [0, 1] less the mean of each (centred), in [0, 1] (unit), or of mean 0 and standard
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
        Tikhonov regularisation of the finest network.
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
        Levels, transfers and optimisers.
    mgrit
        Solver of the states; the default propagates layer after layer, which is the best on one rank.
    """

    num_layers: int = 2048
    batch_size: int = 1000
    portion: int = 2000
    scaling: Literal["centred", "unit", "standard"] = "centred"
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
    network: Architecture = Architecture(width=10, T=1.0, activation="relu")
    mgopt: MGOptOptions = MGOptOptions(optim=LevelOptions(learning_rate=(0.01,)))
    mgrit: MGRIT = MGRIT(max_levels=1)

    def __post_init__(self):
        for name in ("portion", "max_cycles", "validate_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use {getattr(Options, name)}")
        if self.batch_size < 0:
            raise ValueError(f"batch_size={self.batch_size} must be at least 0; use 1000, or 0 for all images")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling={self.scaling!r} must be {' or '.join(SCALINGS)}; use centred")
        if not 0.0 < self.goal <= 1.0:
            raise ValueError(f"goal={self.goal} must be above 0 and at most 1; use 0.93")
        if not 0.0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta} must be at least 0 and finite; use 1e-5")


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


def row_of(record: CycleRecord, num_layers: int, accuracy: float | None, goal: float, final: bool) -> dict:
    """A record as the object of `metrics.jsonl`."""
    return {
        "kind": "update",
        "run": NAME,
        "level": 0,
        "num_layers": num_layers,
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
        "reached": accuracy is not None and accuracy >= goal,
        "final": final,
    }


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    setup_logging(comm)
    folder = claim(options.out, comm)
    job = configured(options, comm)
    training, configuration = job.training, to_dict(options)
    state = read_cycle(options.resume, options.out, training.network, configuration, FREE)

    def run() -> None:
        done = state.record if state else None
        if state and (done.cycle >= options.max_cycles or state.is_final):
            if comm.rank == 0:
                print(f"the run in {options.out} is finished; for more cycles give another --max_cycles or --goal")
            return
        prepare(options.out, comm, [NAME], {NAME: state} if state else {})
        training.x = state.x if state else training.x
        store = CheckpointStore(checkpoint_folder(options.out, NAME), options.keep)
        before = done.cycle if done else 0
        with (
            folder.open(configuration, options.max_cycles, before, append=state is not None),
            Progress(comm, options.max_cycles, done=before) as progress,
        ):
            progress.note(f"{training.schedule}, {training.schedule.work(options.mgopt.cycle):.2f} work units a cycle")
            for record, accuracy, final in job.run(options.goal, options.max_cycles, options.validate_every, done):
                row = row_of(record, options.num_layers, accuracy, options.goal, final)
                progress.update(row)
                folder.write(row)
                stop = folder.update(record.cycle, row["objective"], row["val_accuracy"])
                if stop or row["final"] or (record.cycle and record.cycle % options.checkpoint_every == 0):
                    network, reached = training.network, row["reached"]
                    path = save_cycle(store, network, training.x, record, reached, configuration, accuracy)
                    if stop and not row["final"]:
                        raise folder.stopped(path)
            if comm.rank == 0:
                from xbraid_py.report import cycles  # matplotlib takes its time to load: on one rank only

                rows = [each for each in read(folder.metrics)[1:] if each.get("val_accuracy") is not None]
                cycles.over_cycles({str(training.schedule): rows}, folder.figures / "cycles.png")
        if comm.rank == 0:
            print(
                f"validation accuracy {100 * row['val_accuracy']:.2f} %{'' if row['reached'] else ', not the goal,'} "
                f"after {row['cycle']} cycles, {row['work']:.1f} work units, {row['seconds']:.1f} seconds",
                flush=True,
            )

    return run


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
