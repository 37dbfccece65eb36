"""Handwritten digits as a job: options, data and training, whatever network reads them; and that of residual layers.

Shape letters: `B` images.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data import mnist
from xbraid_py.data.dataset import Batches
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.layer_parallel.minibatch.state import MinibatchState
from xbraid_py.layer_parallel.minibatch.updates import Batch, evaluate
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layers.dense import DenseBlock
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.recipes.minibatch import MinibatchTraining, network_of, prepare
from xbraid_py.recipes.options.digits import DigitOptions, MnistOptions
from xbraid_py.run.engine import Row
from xbraid_py.run.store.read import Checkpoint

PIXELS = 28 * 28
_TEST_BATCH = 500


@dataclass(frozen=True)
class Digits:
    """The images of a job (B, 28, 28) in bytes, their labels (B,), and the order in which they are trained on."""

    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    order: Batches

    @classmethod
    def load(cls, options: DigitOptions) -> Digits:
        """Read the files; raises what `mnist.load` and `Batches` raise."""
        data, train, test = mnist.load(options.data_dir), options.num_train, options.num_test
        labels = data.train_labels[:train]
        order = Batches(len(labels), options.batch_size, options.seed)
        return cls(data.train_images[:train], labels, data.test_images[:test], data.test_labels[:test], order)


DigitOptionsT = TypeVar("DigitOptionsT", bound=DigitOptions)


class DigitTraining(MinibatchTraining[DigitOptionsT]):
    """A network, logits (B, 10) of what `read` makes of images, that learns digits by Adam."""

    def __init__(self, options: DigitOptionsT, digits: Digits, model: nn.Module, grid: ProcessGrid, comm: Communicator):
        total = min(options.epochs * len(digits.order), options.max_updates or sys.maxsize)
        optimizer = torch.optim.Adam(model.parameters(), lr=options.learning_rate)
        is_cosine = options.schedule == "cosine"
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total) if is_cosine else None
        trained = MinibatchState(model=model, optimizer=optimizer, comm=comm, scheduler=cosine, grid=grid)
        super().__init__(options, trained, total)
        self.digits = digits

    def read(self, images: Tensor) -> Tensor:
        """What the network gets of images (B, 28, 28) of bytes."""
        return mnist.standardized(images)

    def batches(self, done: int) -> Iterator[Batch]:
        digits, order = self.digits, self.digits.order
        minibatches = order.epoch(done // len(order))
        for number in range(done, self.total):
            epoch, place = divmod(number, len(order))
            if place == 0:
                minibatches = order.epoch(epoch)
            chosen = minibatches[place]
            yield self.read(digits.train_images[chosen]), digits.train_labels[chosen]

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def validate(self) -> Row:
        portions = (each.split(_TEST_BATCH) for each in (self.digits.test_images, self.digits.test_labels))
        batches = ((self.read(images), labels) for images, labels in zip(*portions, strict=True))
        return {"val_accuracy": evaluate(self.trained.model, batches, _share_of_right_ones, self.trained.grid)}

    def say(self, row: Row) -> str:
        return f"test accuracy: {100 * row['val_accuracy']:.2f} %, {row['seconds']:.1f} seconds of training"


def _share_of_right_ones(logits: Tensor, labels: Tensor) -> Tensor:
    """Accuracy of a batch."""
    return (logits.argmax(1) == labels).double().mean()


def prepare_digits(
    kind: str,
    recipe: str,
    options: DigitOptions,
    comm: Communicator,
    build: Callable[[DigitOptions, Communicator | None], nn.Module],
    training: type[DigitTraining] = DigitTraining,
) -> Callable[[], Row]:
    """Read and check everything, without a message; returns the run.

    `build(options, comm)` makes the network on ranks, or without any for None; `training` is what reads the images, and
    how it is validated. For the rest see `xbraid_py.run.engine.train`.
    """
    digits = Digits.load(options)
    hold(comm, "training images", digits.train_images, digits.train_labels)
    hold(comm, "test images", digits.test_images, digits.test_labels)
    options, plan = options.planned(comm.size)

    def make(model: nn.Module, grid: ProcessGrid) -> DigitTraining:
        return training(options, digits, model, grid, comm)

    return prepare(kind, recipe, options, comm, partial(build, options), make, plan=plan)


def network(checkpoint: Checkpoint) -> nn.Module:
    """The trained network of a checkpoint as a plain module, from images (B, 1, 28, 28) to logits (B, 10)."""
    return to_sequential(network_of(checkpoint, MnistOptions, build))


def build(options: MnistOptions, comm: Communicator | None) -> nn.Sequential:
    """The network: opening, layers, head; what lies around the layers is the same on every rank."""
    width = options.width
    with own_random_numbers(options.seed):
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
        **options.solvers,
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
