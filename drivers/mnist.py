"""MNIST: handwritten digits by a deep residual network whose layers are trained in parallel, on minibatches.

    u_0 = opening(image),   u_{n+1} = u_n + h F(u_n, theta_n),  n = 0 .. N-1,  h = T/N,   logits = head(u_N),

F a 3x3 convolution behind GroupNorm and ReLU, or a dense layer. Adam, and a gradient error that is watched. Try

    mpirun -n 4 python drivers/mnist.py
    mpirun -n 4 python drivers/mnist.py --resume auto
    mpirun -n 4 python drivers/mnist.py --variant dense --replicas 2
    python drivers/mnist.py --smoke --exact
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from xbraid_py import MGRIT, Accuracy, DenseBlock, LayerParallel
from xbraid_py.comm import Communicator
from xbraid_py.data import mnist
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
    "replicas",
)
PIXELS = 28 * 28
TEST_BATCH = 500


@dataclass(frozen=True, kw_only=True)
class Options:
    """The MNIST job.

    Parameters
    ----------
    variant
        Kind of the layers: convolutional or dense.
    num_layers
        Residual layers.
    T
        Final time; a step is T / num_layers.
    width
        Channels of the convolutional states (7 x 7 pixels), or numbers of a dense state.
    epochs
        Passes over the training images.
    batch_size
        Images of an update, of all replicas together.
    learning_rate
        Of Adam.
    schedule
        Of the learning rate: falling to zero along a cosine, or constant.
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
        Propagate layer after layer instead of by MGRIT.
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
    accuracy
        What is asked of the gradients.
    """

    variant: Literal["conv", "dense"] = "conv"
    num_layers: int = 32
    T: float = 2.0
    width: int = 16
    epochs: int = 1
    batch_size: int = 50
    learning_rate: float = 5e-3
    schedule: Literal["cosine", "constant"] = "cosine"
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
    out: Path = Path("runs/mnist")
    resume: str | None = None
    tensorboard: bool = False
    smoke: bool = False
    mgrit: MGRIT = MGRIT()
    adjoint: MGRIT = MGRIT()
    accuracy: Accuracy = Accuracy()

    def __post_init__(self):
        sizes = ("width", "batch_size", "num_train", "num_test", "replicas")
        for name in (*sizes, "epochs", "max_updates", "record_every", "test_every", "checkpoint_every", "keep"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 10")
        for name, good in (("learning_rate", "0.005"), ("clip", "1.0")):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite; use {good}")


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The MNIST job in seconds."""

    __doc__ = Options.__doc__
    num_layers: int = 8
    width: int = 8
    batch_size: int = 20
    max_updates: int | None = 8
    num_train: int | None = 200
    num_test: int | None = 100
    record_every: int = 1
    checkpoint_every: int = 4
    mgrit: MGRIT = MGRIT(cfactor=2, coarse_parts=1, min_coarse=2)


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""
    setup_logging(comm)
    if comm.size % options.replicas:
        raise ValueError(f"replicas={options.replicas} does not divide the {comm.size} rank(s); use 1")
    alone = build(options, None)  # without ranks it sends no message, and refuses what others would refuse
    if options.tensorboard:
        require_tensorboard()
    data = mnist.load(options.data_dir)
    train_images, train_labels = data.train_images[: options.num_train], data.train_labels[: options.num_train]
    test_images, test_labels = data.test_images[: options.num_test], data.test_labels[: options.num_test]
    order = mnist.Batches(len(train_labels), options.batch_size, options.seed)
    if options.batch_size < options.replicas:
        raise ValueError(f"batch_size={options.batch_size} is too small for replicas={options.replicas}; use 100")
    num_updates = min(options.epochs * len(order), options.max_updates or sys.maxsize)
    folder = claim(options.out, comm)
    start = read_resumed(options.resume, options.out, to_dict(options), FREE, alone)

    def batches(done: int) -> Iterator[tuple[Tensor, Tensor]]:
        minibatches = order.epoch(done // len(order))
        for number in range(done, num_updates):
            epoch, place = divmod(number, len(order))
            if place == 0:
                minibatches = order.epoch(epoch)
            yield mnist.standardised(train_images[minibatches[place]]), train_labels[minibatches[place]]

    def tests() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(test_images.split(TEST_BATCH), test_labels.split(TEST_BATCH), strict=True):
            yield mnist.standardised(images), labels

    def run() -> None:
        grid = ProcessGrid(comm, options.replicas)
        model = build(options, grid.layers)
        optimiser = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
        cosine = None
        if options.schedule == "cosine":
            cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, num_updates)
        tested = follow(
            Trained(model=model, optimiser=optimiser, scheduler=cosine, grid=grid),
            batches,
            nn.functional.cross_entropy,
            lambda: {"test_accuracy": evaluate(model, tests(), share_of_right_ones, grid)},
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


def build(options: Options, comm: Communicator | None) -> nn.Sequential:
    """The network: opening, layers, head; what lies around the layers is the same on every rank."""
    width = options.width
    torch.manual_seed(options.seed)
    if options.variant == "conv":
        opening = [nn.Conv2d(1, width, 5, stride=2, padding=2), nn.ReLU(), nn.MaxPool2d(2)]
        pooling = nn.AvgPool2d(2, padding=1)  # 7 x 7 pixels to 4 x 4
        head = [norm(width), nn.ReLU(), pooling, nn.Flatten(), nn.Linear(16 * width, mnist.NUM_CLASSES)]
    else:
        opening = [nn.Flatten(), nn.Linear(PIXELS, width)]
        head = [nn.Linear(width, mnist.NUM_CLASSES)]
    stack = LayerParallel(
        (lambda: conv_block(width)) if options.variant == "conv" else (lambda: DenseBlock(width)),
        options.num_layers,
        options.T,
        comm,
        mgrit=replace(options.mgrit, max_levels=1) if options.exact else options.mgrit,
        adjoint=replace(options.adjoint, max_levels=1) if options.exact else options.adjoint,
        accuracy=options.accuracy,
        seed=options.seed,
    )
    return nn.Sequential(*opening, stack, *head)


def conv_block(channels: int) -> nn.Sequential:
    """F(u) of a convolutional layer, for states (B, channels, 7, 7)."""
    return nn.Sequential(norm(channels), nn.ReLU(), nn.Conv2d(channels, channels, 3, padding=1))


def norm(channels: int) -> nn.GroupNorm:
    """Statistics over groups of four channels, or over all where four do not divide them."""
    return nn.GroupNorm(channels // 4 if channels % 4 == 0 else 1, channels)


def share_of_right_ones(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a batch."""
    return (logits.argmax(1) == labels).double().mean()


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
