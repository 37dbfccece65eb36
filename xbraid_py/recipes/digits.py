"""Jobs on handwritten digits: their options, and the run, for whatever network reads the images."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data import mnist
from xbraid_py.layer_parallel.minibatch.state import Trained
from xbraid_py.layer_parallel.minibatch.updates import evaluate
from xbraid_py.mgrit import MGRIT
from xbraid_py.recipes.digits_resume import read_resumed
from xbraid_py.recipes.digits_run import follow
from xbraid_py.run.folder import claim
from xbraid_py.run.options import to_dict
from xbraid_py.run.progress import setup_logging
from xbraid_py.run.tensorboard import require_tensorboard

# What may differ between a run and its continuation: where things are, how often it looks, how ranks are shared out.
_FREE = (
    *("out", "resume", "smoke", "data_dir", "record_every", "test_every", "checkpoint_every", "keep", "tensorboard"),
    "replicas",
)
_TEST_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class DigitOptions:
    """What all jobs on digits have.

    Parameters
    ----------
    epochs
        Passes over the training images.
    batch_size
        Images of an update, of all replicas together.
    learning_rate
        Of Adam.
    clip
        2-norm above which the gradient is scaled down; not at all if not given.
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
        Propagate layer after layer, or step after step of a sequence, instead of by MGRIT.
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

    epochs: int = 1
    batch_size: int = 50
    learning_rate: float = 5e-3
    clip: float | None = None
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
    out: Path = Path("runs/digits")
    resume: str | None = None
    tensorboard: bool = False
    smoke: bool = False
    mgrit: MGRIT = MGRIT()
    adjoint: MGRIT = MGRIT()

    def __post_init__(self):
        sizes = ("batch_size", "num_train", "num_test", "replicas", "epochs", "max_updates")
        for name in (*sizes, "record_every", "test_every", "checkpoint_every", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 10")
        for name, good in (("learning_rate", "0.005"), ("clip", "1.0")):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite; use {good}")

    @property
    def solvers(self) -> dict[str, MGRIT]:
        """The arguments `mgrit` and `adjoint` of what is solved for: without coarse levels if it is to be exact."""
        both = {"mgrit": self.mgrit, "adjoint": self.adjoint}
        return {name: replace(each, max_levels=1) for name, each in both.items()} if self.exact else both


def prepare(
    options: DigitOptions,
    comm: Communicator,
    build: Callable[[Communicator | None], nn.Module],
    read: Callable[[Tensor], Tensor],
    *,
    free: tuple[str, ...] = (),
    constant_rate: bool = False,
    also: Callable[[nn.Module], dict[str, float]] = lambda model: {},
) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run.

    Parameters
    ----------
    options : DigitOptions
    comm : Communicator
    build : callable
        Makes the network for a communicator, or without ranks; logits (B, 10) of what `read` makes.
    read : callable
        What the network gets of images (B, 28, 28) of bytes.
    free : tuple of str
        Further options that may differ between a run and its continuation.
    constant_rate : bool
        Or the learning rate falls to zero along a cosine.
    also : callable
        What a test records of the network besides the accuracy; called after an update, before the test.

    Raises
    ------
    ValueError
        If the replicas do not fit the ranks or the batch, or for what `build` and the checkpoint raise it.
    """
    setup_logging(comm)
    if comm.size % options.replicas:
        raise ValueError(f"replicas={options.replicas} does not divide the {comm.size} rank(s); use 1")
    if options.batch_size < options.replicas:
        raise ValueError(f"batch_size={options.batch_size} is too small for replicas={options.replicas}; use 100")
    alone = build(None)  # without ranks it sends no message, and refuses what others would refuse
    if options.tensorboard:
        require_tensorboard()
    data = mnist.load(options.data_dir)
    train_images, train_labels = data.train_images[: options.num_train], data.train_labels[: options.num_train]
    test_images, test_labels = data.test_images[: options.num_test], data.test_labels[: options.num_test]
    order = mnist.Batches(len(train_labels), options.batch_size, options.seed)
    num_updates = min(options.epochs * len(order), options.max_updates or sys.maxsize)
    folder = claim(options.out, comm)
    start = read_resumed(options.resume, options.out, to_dict(options), (*_FREE, *free), alone)

    def batches(done: int) -> Iterator[tuple[Tensor, Tensor]]:
        minibatches = order.epoch(done // len(order))
        for number in range(done, num_updates):
            epoch, place = divmod(number, len(order))
            if place == 0:
                minibatches = order.epoch(epoch)
            yield read(train_images[minibatches[place]]), train_labels[minibatches[place]]

    def tests() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(test_images.split(_TEST_BATCH), test_labels.split(_TEST_BATCH), strict=True):
            yield read(images), labels

    def run() -> None:
        grid = ProcessGrid(comm, options.replicas)
        model = build(grid.layers)
        optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
        cosine = None if constant_rate else torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_updates)

        def test() -> dict[str, float]:
            found = also(model)
            return {"test_accuracy": evaluate(model, tests(), _share_of_right_ones, grid), **found}

        tested = follow(
            Trained(model=model, optimizer=optimizer, scheduler=cosine, grid=grid),
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


def _share_of_right_ones(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a batch."""
    return (logits.argmax(1) == labels).double().mean()
