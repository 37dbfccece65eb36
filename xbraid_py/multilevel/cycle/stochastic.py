"""V-cycles on minibatches: the stochastic tau of paper 002 (section 5.6, 6.1.1), on any objectives and transfers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle as endless
from typing import Protocol

import torch
from torch import Tensor

from xbraid_py.multilevel.cycle.vcycle import UNDAMPED, Damping, Transfer, VCycle
from xbraid_py.optim.levels import LevelOptimizer, Point
from xbraid_py.optim.objective import Objective, ShiftedObjective

Samples = tuple[Tensor, Tensor]
# `draw(count)`: the next minibatches.
Draw = Callable[[int], list[Samples]]
TAU = ("same", "other")


class SampledObjective(Objective, Protocol):
    """An objective over samples that can be exchanged."""

    def use(self, inputs: Tensor, targets: Tensor) -> None:
        """Take these samples from now on."""


class Minibatches:
    """An endless stream of minibatches of equal size, in another order in every epoch.

    Parameters
    ----------
    inputs, targets : (N, ...) tensor
    batch_size : int
        A batch may begin in one epoch and end in the next.
    seed : int

    Raises
    ------
    ValueError
        If the numbers of samples differ, or there are fewer than `batch_size`.
    """

    def __init__(self, inputs: Tensor, targets: Tensor, batch_size: int, seed: int = 0):
        if len(inputs) != len(targets):
            raise ValueError(f"inputs has {len(inputs)} samples and targets {len(targets)}; both must have as many")
        if not 1 <= batch_size <= len(inputs):
            raise ValueError(
                f"batch_size={batch_size} must lie in 1 .. {len(inputs)}, the samples there are; use {len(inputs)}"
            )
        self.inputs, self.targets, self.batch_size, self.seed = inputs, targets, batch_size, seed
        self.drawn = 0

    def draw(self, count: int = 1) -> list[Samples]:
        """The next minibatches."""
        found = []
        for _ in range(count):
            chosen = self._indices(self.drawn * self.batch_size, self.batch_size).to(self.inputs.device)
            found.append((self.inputs[chosen], self.targets[chosen]))
            self.drawn += 1
        return found

    def _indices(self, first: int, count: int) -> Tensor:
        total, parts = len(self.inputs), []
        while count:
            epoch, start = divmod(first, total)
            taken = min(count, total - start)
            parts.append(self._order(epoch)[start : start + taken])
            first, count = first + taken, count - taken
        return torch.cat(parts)

    def _order(self, epoch: int) -> Tensor:
        if getattr(self, "_known", (-1,))[0] != epoch:
            random = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._known = epoch, torch.randperm(len(self.inputs), generator=random)
        return self._known[1]


class MinibatchSmoother:
    """The optimizer of a level with another minibatch for every step.

    Parameters
    ----------
    optimizer : LevelOptimizer
    batches : iterator of Samples
    """

    def __init__(self, optimizer: LevelOptimizer, batches: Iterator[Samples]):
        self.optimizer, self.batches = optimizer, batches

    @property
    def takes_momentum(self) -> bool:
        return self.optimizer.takes_momentum

    @property
    def momentum(self) -> Tensor | None:
        return self.optimizer.momentum

    @momentum.setter
    def momentum(self, value: Tensor) -> None:
        self.optimizer.momentum = value

    def reset(self) -> None:
        self.optimizer.reset()

    def minimize(self, objective: SampledObjective | ShiftedObjective, point: Point, steps: int) -> Point:
        for _ in range(steps):
            _own(objective).use(*next(self.batches))
            # What is known of the point is of other samples.
            point = self.optimizer.minimize(objective, Point(point.x), 1)
        return point


class StochasticCycle(VCycle):
    """V-cycles of which each step is on a minibatch.

    On its way down the cycle draws as many minibatches as there will be steps on the next coarser level, takes the
    coupling term (there: tau, eq. 35) over all of them, and makes the coarse steps on one of them after the other.

    Parameters
    ----------
    objectives : sequence of L SampledObjective
    transfers : sequence of L - 1 Transfer
    optimizers : sequence of L LevelOptimizer
    draw : callable
        The next minibatches.
    pre, post, coarse
        As for `VCycle`.
    damping : Damping
        With `coupling=0` no coupling term is computed.
    tau : {"same", "other"}
        The minibatches of the coupling term: those of the coarse steps, or as many others.
    """

    def __init__(
        self,
        objectives: Sequence[SampledObjective],
        transfers: Sequence[Transfer],
        optimizers: Sequence[LevelOptimizer],
        draw: Draw,
        pre: Sequence[int],
        post: Sequence[int],
        coarse: int,
        *,
        damping: Damping = UNDAMPED,
        tau: str = "same",
    ):
        if tau not in TAU:
            raise ValueError(f"tau={tau!r} must be {' or '.join(TAU)}; use same")
        self._batches: list[Iterator[Samples]] = [self._of_level(level) for level in range(len(objectives))]
        smoothers = [MinibatchSmoother(each, batches) for each, batches in zip(optimizers, self._batches, strict=False)]
        super().__init__(objectives, transfers, smoothers, pre, post, coarse, damping=damping)
        self.draw, self.tau = draw, tau
        self._subsets: dict[int, Iterator[Samples]] = {}

    def _of_level(self, level: int) -> Iterator[Samples]:
        """The finest level takes what comes, a coarse one the minibatches drawn for it."""
        while True:
            yield next(self._subsets[level]) if level else self.draw(1)[0]

    def _steps(self, level: int) -> int:
        schedule = self.schedule
        return schedule.coarse if level == self.levels - 1 else schedule.pre[level] + schedule.post[level]

    def _ready(self, level: int, objective: SampledObjective | ShiftedObjective, point: Point) -> Point:
        subset = self.draw(self._steps(level + 1))
        self._subsets[level + 1] = endless(subset)
        if not self.damping.coupling:
            return Point(point.x)
        if self.tau == "other":
            subset = self.draw(len(subset))
        inputs, targets = (torch.cat(parts) for parts in zip(*subset, strict=True))
        _own(objective).use(inputs, targets)
        self.objectives[level + 1].use(inputs, targets)
        return Point(point.x).complete(objective)


def _own(objective: SampledObjective | ShiftedObjective) -> SampledObjective:
    return objective.objective if isinstance(objective, ShiftedObjective) else objective
