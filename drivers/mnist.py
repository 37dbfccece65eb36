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
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from xbraid_py import MGRIT, DenseBlock, GradientControl, LayerParallel
from xbraid_py.comm import Communicator
from xbraid_py.data import mnist
from xbraid_py.recipes.digits import DigitOptions, prepare
from xbraid_py.run.launch import launch

PIXELS = 28 * 28


@dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
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
    schedule
        Of the learning rate: falling to zero along a cosine, or constant.
    accuracy
        What is asked of the gradients.
    """

    variant: Literal["conv", "dense"] = "conv"
    num_layers: int = 32
    T: float = 2.0
    width: int = 16
    schedule: Literal["cosine", "constant"] = "cosine"
    out: Path = Path("runs/mnist")
    accuracy: GradientControl = GradientControl()

    def __post_init__(self):
        super().__post_init__()
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1; use 10")


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

    def made(layers: Communicator | None) -> nn.Module:
        return build(options, layers)

    return prepare(options, comm, made, mnist.standardized, constant_rate=options.schedule == "constant")


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


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
