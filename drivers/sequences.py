"""Sequences: digits read row by row, or pixel by pixel, by a gated recurrent network parallel over its time steps.

    h_{n+1} = h_n + (1 - z_n)(candidate_n - h_n),  n = 0 .. L-1,   logits = head(h_L),

the gate z and the candidate those of a GRU; with `--kind implicit` the step is diagonally implicit. Adam. Try

    mpirun -n 2 python drivers/sequences.py
    mpirun -n 2 python drivers/sequences.py --order pixels --windows 4
    mpirun -n 2 python drivers/sequences.py --length 1024 --resume auto
    python drivers/sequences.py --network torch
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from xbraid_py import MGRIT, ParallelGRU
from xbraid_py.comm import Communicator
from xbraid_py.data import mnist
from xbraid_py.data.mnist_sequences import ORDERS, sequences
from xbraid_py.io.launch import launch
from xbraid_py.io.options import to_dict
from xbraid_py.io.progress import setup_logging
from xbraid_py.io.run_folder import claim
from xbraid_py.io.tensorboard import require_tensorboard
from xbraid_py.minibatch import Trained, evaluate, follow, read_resumed
from xbraid_py.process_grid import ProcessGrid

# What may differ between a run and its continuation: where things are, how often it looks, how ranks are shared out.
FREE = (
    *("out", "resume", "smoke", "data_dir", "record_every", "test_every", "checkpoint_every", "keep", "tensorboard"),
    *("replicas", "windows"),
)
TEST_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class Options:
    """The job on sequences.

    Parameters
    ----------
    order
        What a step sees of an image: a row, a column or a pixel.
    length
        Steps of a sequence, to which it is resampled; 28 of rows and columns and 784 of pixels if not given.
    network
        Parallel over the sequence, or the GRU of torch, the same on every rank.
    hidden_size
        Numbers of a hidden state.
    num_layers
        Recurrent layers on top of each other.
    kind
        Plain steps, those of a GRU, or implicit ones.
    dt
        Step size; 1 is that of a GRU.
    coarse
        Coarse steps: composed of fine ones with the same gates, or single long ones.
    windows
        Stretches that are solved one after the other: less memory, one more forward solve.
    epochs
        Passes over the training images.
    batch_size
        Images of an update, of all replicas together.
    learning_rate
        Of Adam; falls to zero along a cosine.
    clip
        2-norm above which the gradient is scaled down.
    max_updates
        End after so many updates, whatever the epochs.
    num_train
        Use only the first so many training images; all if not given.
    num_test
        The same for the test images.
    data_dir
        Folder of the four files; by default mnist in the folder that XBRAID_DATA names, or in ../shared/data.
    seed
        Of initial weights and of the order of the images.
    replicas
        Copies of the network, each on as many ranks, that share out every batch; divides the number of ranks.
    exact
        Propagate one step after the other instead of by MGRIT.
    record_every
        Updates between two rows of the record.
    test_every
        Updates between two tests, the last of which ends the run.
    checkpoint_every
        Updates between two checkpoints.
    keep
        Newest checkpoints to keep, besides the best.
    out
        Folder of the record, the checkpoints and the picture.
    resume
        Checkpoint to go on from, or auto for the newest good one in the out folder (if there is one).
    tensorboard
        Write event files for TensorBoard as well.
    smoke
        A run of seconds: other defaults, each of which may still be given.
    mgrit
        Solver of the states.
    adjoint
        Solver of the adjoints; what is left at its default is taken from mgrit.
    """

    order: Literal["rows", "columns", "pixels"] = "rows"
    length: int | None = None
    network: Literal["parallel", "torch"] = "parallel"
    hidden_size: int = 64
    num_layers: int = 1
    kind: Literal["plain", "implicit"] = "plain"
    dt: float = 1.0
    coarse: Literal["compose", "euler"] = "compose"
    windows: int = 1
    epochs: int = 3
    batch_size: int = 100
    learning_rate: float = 3e-3
    clip: float = 1.0
    max_updates: int | None = None
    num_train: int | None = None
    num_test: int | None = None
    data_dir: Path | None = None
    seed: int = 0
    replicas: int = 1
    exact: bool = False
    record_every: int = 10
    test_every: int = 300
    checkpoint_every: int = 100
    keep: int = 3
    out: Path = Path("runs/sequences")
    resume: str | None = None
    tensorboard: bool = False
    smoke: bool = False
    mgrit: MGRIT = MGRIT(tol=0.1)
    adjoint: MGRIT = MGRIT()

    def __post_init__(self):
        sizes = ("batch_size", "num_train", "num_test", "replicas", "epochs", "max_updates")
        for name in (*sizes, "record_every", "test_every", "checkpoint_every", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 10")
        if self.length is not None and self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2; use 128")
        for name, good in (("learning_rate", "0.003"), ("clip", "1.0")):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite; use {good}")
        if self.network == "torch" and (self.kind, self.dt) != ("plain", 1.0):
            raise ValueError(f"network='torch' has kind=plain and dt=1.0 only, not {self.kind} and {self.dt}")


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The job on sequences in seconds."""

    __doc__ = Options.__doc__
    hidden_size: int = 12
    batch_size: int = 20
    max_updates: int | None = 8
    num_train: int | None = 200
    num_test: int | None = 100
    record_every: int = 1
    checkpoint_every: int = 4


class Classifier(nn.Module):
    """Logits (B, 10) of sequences (B, L, F), from the last state of the uppermost layer."""

    def __init__(self, options: Options, comm: Communicator | None):
        super().__init__()
        torch.manual_seed(options.seed)
        sizes = (ORDERS[options.order], options.hidden_size, options.num_layers)
        if options.network == "torch":
            self.recurrent: nn.Module = nn.GRU(*sizes, batch_first=True)
        else:
            self.recurrent = ParallelGRU(
                *sizes,
                batch_first=True,
                comm=comm,
                mgrit=replace(options.mgrit, max_levels=1) if options.exact else options.mgrit,
                adjoint=replace(options.adjoint, max_levels=1) if options.exact else options.adjoint,
                kind=options.kind,
                dt=options.dt,
                coarse=options.coarse,
                windows=options.windows,
                output="last",
                seed=options.seed,
            )
        # Both networks begin alike, whatever they have drawn.
        torch.manual_seed(options.seed + 1)
        self.head = nn.Linear(options.hidden_size, mnist.NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[1][-1])

    def solves(self) -> dict[str, float]:
        """What the last update's solves did: relaxations of the finest level, and residuals."""
        record = getattr(self.recurrent, "record", None)
        if record is None or not record.adjoint_sweeps:
            return {}
        return {
            "sweeps": max(record.forward_sweeps),
            "adjoint_sweeps": max(record.adjoint_sweeps),
            "residual": max(record.forward_residuals),
            "adjoint_residual": max(record.adjoint_residuals),
        }


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    setup_logging(comm)
    if comm.size % options.replicas:
        raise ValueError(f"replicas={options.replicas} does not divide the {comm.size} rank(s); use 1")
    if options.batch_size < options.replicas:
        raise ValueError(f"batch_size={options.batch_size} is too small for replicas={options.replicas}; use 100")
    alone = Classifier(options, None)  # without ranks it sends no message, and refuses what others would refuse
    if options.tensorboard:
        require_tensorboard()
    data = mnist.load(options.data_dir)
    train_images, train_labels = data.train_images[: options.num_train], data.train_labels[: options.num_train]
    test_images, test_labels = data.test_images[: options.num_test], data.test_labels[: options.num_test]
    order = mnist.Batches(len(train_labels), options.batch_size, options.seed)
    num_updates = min(options.epochs * len(order), options.max_updates or sys.maxsize)
    folder = claim(options.out, comm)
    start = read_resumed(options.resume, options.out, to_dict(options), FREE, alone)

    def read(images: Tensor) -> Tensor:
        return sequences(images, options.order, options.length)

    def batches(done: int) -> Iterator[tuple[Tensor, Tensor]]:
        minibatches = order.epoch(done // len(order))
        for number in range(done, num_updates):
            epoch, place = divmod(number, len(order))
            if place == 0:
                minibatches = order.epoch(epoch)
            yield read(train_images[minibatches[place]]), train_labels[minibatches[place]]

    def tests() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(test_images.split(TEST_BATCH), test_labels.split(TEST_BATCH), strict=True):
            yield read(images), labels

    def run() -> None:
        grid = ProcessGrid(comm, options.replicas)
        model = Classifier(options, grid.layers)
        optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate)

        def test() -> dict[str, float]:
            solves = model.solves()
            return {"test_accuracy": evaluate(model, tests(), share_of_right_ones, grid), **solves}

        tested = follow(
            Trained(
                model=model,
                optimiser=optimiser,
                scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_updates),
                grid=grid,
            ),
            batches,
            nn.functional.cross_entropy,
            test,
            folder=folder,
            configuration=to_dict(options),
            num_updates=num_updates,
            record_every=options.record_every,
            test_every=options.test_every,
            checkpoint_every=options.checkpoint_every,
            keep=options.keep,
            clip=options.clip,
            start=start,
            tensorboard=options.tensorboard,
        )
        if comm.rank == 0:
            accuracy, seconds = 100 * tested["test_accuracy"], tested["seconds"]
            print(f"test accuracy: {accuracy:.2f} %, {seconds:.1f} seconds of training", flush=True)

    return run


def share_of_right_ones(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a batch."""
    return (logits.argmax(1) == labels).double().mean()


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
