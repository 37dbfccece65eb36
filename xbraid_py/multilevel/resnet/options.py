"""Options of multi-level residual networks, and the plan of cycles (paper 003); torch is not loaded for them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import cos, inf, pi
from typing import Literal

MODELS = ("first", "last", "multilevel")
_PRECISIONS = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True)
class CosineCycles:
    """Cycles of epochs, in each of which the learning rate falls along a cosine.

    Parameters
    ----------
    epochs
        Of each cycle.
    eta_max
        Learning rate at the beginning of a cycle.
    eta_min
        Learning rate at its end.
    reset
        Begin anew in every cycle; otherwise one cosine spans all of them (paper 003, figure 10).
    """

    epochs: tuple[int, ...] = (60, 50, 50)
    eta_max: float = 0.5
    eta_min: float = 0.001
    reset: bool = True

    def __post_init__(self):
        if not self.epochs or min(self.epochs) < 1:
            raise ValueError(
                f"epochs={list(self.epochs)} must be numbers of at least 1, one for each cycle; use 60,50,50"
            )
        if not 0.0 <= self.eta_min <= self.eta_max < inf:
            raise ValueError(
                f"eta_min={self.eta_min} and eta_max={self.eta_max} must be ordered, at least 0 and finite; "
                f"use 0.001 and 0.5"
            )

    @property
    def total(self) -> int:
        """Epochs of all cycles."""
        return sum(self.epochs)

    @property
    def ends(self) -> tuple[int, ...]:
        """Epochs before the end of each cycle."""
        return tuple(accumulate(self.epochs))

    @property
    def time_saved(self) -> float:
        """Share of block evaluations that blocks doubled in every cycle save against those of the last one throughout.

        For equal cycles that of table 2, `1 - (2^(k+1) - 1) / (2^k (k+1))` with k interpolations.
        """
        spent = sum(count * 2**cycle for cycle, count in enumerate(self.epochs))
        return 1.0 - spent / (self.total * 2 ** (len(self.epochs) - 1))

    def cycle_of(self, epoch: int) -> int:
        """Number, from 0, of the cycle of an epoch, from 0."""
        if not 0 <= epoch < self.total:
            raise ValueError(f"epoch={epoch} must lie in 0 .. {self.total - 1}; use 0")
        return sum(epoch >= end for end in self.ends)

    def learning_rate(self, step: int, steps_per_epoch: int) -> float:
        """That of a training step, both counted from 0 over all cycles."""
        cycle = self.cycle_of(step // steps_per_epoch)
        first, length = (self.ends[cycle] - self.epochs[cycle], self.epochs[cycle]) if self.reset else (0, self.total)
        share = (step - first * steps_per_epoch) / (length * steps_per_epoch)
        return self.eta_min + 0.5 * (self.eta_max - self.eta_min) * (1.0 + cos(pi * share))  # eq. 9


@dataclass(frozen=True)
class Discretization:
    """The network of one cycle: residual blocks of each of its stages, and its explicit step size h."""

    blocks: tuple[int, ...]
    step_size: float


def plan(
    model: str,
    blocks: tuple[int, ...],
    cycles: int,
    step_size: float = 1.0,
    last_step_size: float | None = None,
) -> tuple[Discretization, ...]:
    """The networks of the cycles, one for each.

    Parameters
    ----------
    model : {"first", "last", "multilevel"}
        The network of the first cycle all the time, that of the last one, or one whose blocks are doubled, and whose
        step size is halved, at the beginning of every further cycle (paper 003, table 1).
    blocks, step_size
        Of the first cycle.
    cycles : int
    last_step_size : float, optional
        Of the model "last" alone; by default that of the last cycle.

    Raises
    ------
    ValueError
        If there is no such model, or a number is out of its range.
    """
    if model not in MODELS:
        raise ValueError(f"model={model!r} must be {', '.join(MODELS[:-1])} or {MODELS[-1]}; use {MODELS[-1]}")
    if not blocks or min(blocks) < 1:
        raise ValueError(f"blocks={list(blocks)} must be numbers of at least 1, one for each stage; use 2,2,2")
    for name, value in (("step_size", step_size), ("last_step_size", last_step_size)):
        if value is not None and not 0.0 < value < inf:
            raise ValueError(f"{name}={value} must be positive and finite; use 1.0")
    doubled = tuple(Discretization(tuple(n * 2**k for n in blocks), step_size / 2**k) for k in range(cycles))
    if model == "multilevel":
        if len(doubled) > 1 and min(blocks[1:], default=2) < 2:
            raise ValueError(
                f"blocks={list(blocks)}: stages behind the first need at least 2 blocks to be doubled, since the first "
                f"block has another shape than the others; use {[blocks[0], *(max(2, n) for n in blocks[1:])]}"
            )
        return doubled
    if model == "first":
        return doubled[:1] * cycles
    last = doubled[-1] if last_step_size is None else Discretization(doubled[-1].blocks, last_step_size)
    return (last,) * cycles


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
    noise
        Standard deviation of what is added there to the weights of the inserted blocks, in units of the weights' own;
        the paper adds nothing.
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
    noise: float = 0.0
    precision: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False

    def __post_init__(self):
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1; use 100")
        if not 0.0 <= self.momentum < 1.0:
            raise ValueError(f"momentum={self.momentum} must lie in 0 .. 1, 1 excluded; use 0.9")
        if not 0.0 <= self.weight_decay < inf:
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; use 2e-4")
        if not 0.0 <= self.noise < inf:
            raise ValueError(f"noise={self.noise} must be at least 0 and finite; use 0.1")
        if self.interpolation not in ("constant", "linear"):
            raise ValueError(f"interpolation={self.interpolation!r} must be constant or linear; use constant")
        if self.precision not in _PRECISIONS:
            raise ValueError(f"precision={self.precision!r} must be one of {', '.join(_PRECISIONS)}; use float32")
