"""What multi-level training of residual networks is told, and what it says: options, data, records.

Shape letters: `B` images, `H W` pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Literal, Protocol

import torch
from torch import Tensor

from xbraid_py.multilevel.resnet.cycles import CosineCycles

# Type of the weights, and of the products where it is another one.
PRECISIONS = {
    "float64": (torch.float64, None),
    "float32": (torch.float32, None),
    "bfloat16": (torch.float32, torch.bfloat16),
    "float16": (torch.float32, torch.float16),
}


class LabeledImages(Protocol):
    """Images (B, 3, H, W) uint8, and labels (B,) int64."""

    pixels: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Pipeline:
    """What becomes of images before the network sees them.

    Attributes
    ----------
    augment : callable
        `augment(pixels, indices, epoch)`, from uint8 to uint8, of training images by their numbers
        in the set, which are on the CPU.
    standardize : callable
        `standardize(pixels, dtype)`, from uint8 to floating point.
    """

    augment: Callable[[Tensor, Tensor, int], Tensor]
    standardize: Callable[[Tensor, torch.dtype], Tensor]


@dataclass(frozen=True, kw_only=True)
class ResNetTrainingOptions:
    """How a residual network is trained.

    Parameters
    ----------
    cycles
        Epochs and learning rates of the cycles.
    batch_size
        Images of a minibatch, shared by the ranks. Batch normalization takes each rank's share for itself, so that its
        results depend on the number of ranks; running statistics are averaged over the ranks after every epoch.
    momentum
        Of SGD.
    weight_decay
        Of SGD, on all weights.
    interpolation
        Of the weights in depth where the blocks are doubled.
    carry_momentum
        Prolong the momentum like the weights there; otherwise it begins anew (the paper says nothing).
    precision
        Of the numbers; with bfloat16 and float16 that of the products alone (mixed precision), float16 with a
        scaled loss.
    channels_last
        Lay the channels of an image innermost in memory: faster on GPUs with mixed precision.
    """

    cycles: CosineCycles = CosineCycles()
    batch_size: int = 100
    momentum: float = 0.9
    weight_decay: float = 2e-4
    interpolation: Literal["constant", "linear"] = "constant"
    carry_momentum: bool = False
    precision: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1; use 100")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must lie in 0 .. 1, 1 excluded; use 0.9")
        if not 0.0 <= self.weight_decay < inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; use 2e-4")
        if self.interpolation not in ("constant", "linear"):
            raise ValueError(f"interpolation={self.interpolation!r} must be constant or linear; use constant")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision={self.precision!r} must be one of {', '.join(PRECISIONS)}; use float32")


@dataclass(frozen=True)
class EpochRecord:
    """The state of a training run after an epoch.

    Attributes
    ----------
    epoch, cycle : int
        From 1.
    blocks : tuple of int
        Of each stage of the network.
    learning_rate : float
        Of the last training step.
    loss, error : float
        Mean cross entropy and share of wrong answers over the epoch's minibatches, each before its update.
    test_loss, test_error : float or None
        Of the test images, where they were looked at.
    seconds : float
        Time so far, without that of the test images.
    block_evaluations : int
        Images times blocks propagated for training so far, by all ranks: the unit of work.
    """

    epoch: int
    cycle: int
    blocks: tuple[int, ...]
    learning_rate: float
    loss: float
    error: float
    test_loss: float | None
    test_error: float | None
    seconds: float
    block_evaluations: int
