"""The plan of multi-level training of residual networks (paper 003, section 4): cycles, blocks, learning rate."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate
from math import cos, inf, pi

MODELS = ("first", "last", "multilevel")


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
    """The network of one cycle.

    Attributes
    ----------
    blocks : tuple of int
        Residual blocks of each of its stages.
    step_size : float
        Its explicit step size h.
    """

    blocks: tuple[int, ...]
    step_size: float


def plan(
    model: str,
    blocks: tuple[int, ...],
    cycles: int,
    step_size: float = 1.0,
    last_step_size: float | None = None,
) -> tuple[Discretization, ...]:
    """The networks of the cycles.

    Parameters
    ----------
    model : {"first", "last", "multilevel"}
        The network of the first cycle all the time, that of the last one, or one whose blocks are doubled, and whose
        step size is halved, at the beginning of every further cycle (paper 003, table 1).
    blocks : tuple of int
        Of the first cycle.
    cycles : int
    step_size : float
        Of the first cycle.
    last_step_size : float, optional
        Of the model "last" alone; by default that of the last cycle.

    Returns
    -------
    tuple of Discretization
        One for each cycle.

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
