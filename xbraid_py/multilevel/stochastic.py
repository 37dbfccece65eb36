"""V-cycles on minibatches: the stochastic tau of paper 002 (section 5.6, 6.1.1), and the objective of a torch module.

Shape letters: `B` samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle as endless
from typing import Protocol

import torch
from torch import Tensor, nn

from xbraid_py.comm.base import present
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.multilevel.vcycle import UNDAMPED, Damping, Transfer, VCycle
from xbraid_py.multilevel.width.options import TAU
from xbraid_py.optim.levels import LevelOptimizer, Point
from xbraid_py.optim.objective import Evaluation, Objective
from xbraid_py.problem.portions import Samples

# A mean over samples, of the module's output and what should come out.
Loss = Callable[[Tensor, Tensor], Tensor]
# `draw(count)`: the next minibatches.
Draw = Callable[[int], list[Samples]]


class SampledObjective(Objective, Protocol):
    """An objective over samples that can be exchanged."""

    def use(self, inputs: Tensor, targets: Tensor) -> None:
        """Take these samples from now on."""
        ...


class Minibatches:
    """An endless stream of minibatches of equal size of (N, ...) samples, in another order in every epoch.

    A batch may begin in one epoch and end in the next. Raises `ValueError` if the numbers of samples differ, or there
    are fewer than `batch_size`.
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
    """The optimizer of a level with another minibatch for every step; `own` is the objective of the level itself."""

    def __init__(self, optimizer: LevelOptimizer, own: SampledObjective, batches: Iterator[Samples]):
        self.optimizer, self.own, self.batches = optimizer, own, batches

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

    def minimize(self, objective: Objective, point: Point, steps: int) -> Point:
        for _ in range(steps):
            self.own.use(*next(self.batches))
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
        self._sampled = tuple(objectives)
        smoothers = [MinibatchSmoother(*each) for each in zip(optimizers, objectives, self._batches, strict=False)]
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

    def _ready(self, level: int, objective: Objective, point: Point) -> Point:
        subset = self.draw(self._steps(level + 1))
        self._subsets[level + 1] = endless(subset)
        if not self.damping.coupling:
            return Point(point.x)
        if self.tau == "other":
            subset = self.draw(len(subset))
        inputs, targets = (torch.cat(parts) for parts in zip(*subset, strict=True))
        for own in self._sampled[level : level + 2]:
            own.use(inputs, targets)
        return Point(point.x).complete(objective)


class LossOfModule:
    """A loss of a module as a function of its weights; see `Objective`.

    The module's parameters become views of the vectors that it is evaluated at, in the order of
    `module.parameters()`, so nothing is copied; frozen ones are left out.

    Parameters
    ----------
    module : Module
        Without buffers that training changes.
    grid : ProcessGrid, optional
        Each replica takes its share of the samples; values and gradients are the means over all of them.

    Attributes
    ----------
    samples : int
        Samples in use, of all replicas.
    passes : int
        Samples that gradients were computed for so far.
    loss_before : float
        The loss where it was evaluated last.
    """

    shift = None

    def __init__(self, module: nn.Module, grid: ProcessGrid | None = None):
        self.module, self.grid = module, grid
        self.samples = self.passes = 0
        self._weight = 1  # of this replica in the means
        self.loss_before = float("nan")
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._shapes = [p.shape for p in self._parameters]
        self._sizes = [p.numel() for p in self._parameters]
        self._value: Tensor | None = None

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self._sizes)

    def load(self, x: Tensor) -> nn.Module:
        """The module with the weights x, without a copy: as long as x stays as it is, and until the next call."""
        if x.shape != (self.size,):
            raise ValueError(f"x has the shape {tuple(x.shape)}, must be flat and of this module; use ({self.size},)")
        for parameter, part, shape in zip(self._parameters, x.split(self._sizes), self._shapes, strict=True):
            parameter.data = part.view(shape)
        return self.module

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        """The mean loss at x; the accuracy is not defined."""
        with torch.enable_grad():
            self._value = found = self._loss_of(self.load(x))
        value = float(found.detach())
        if self.grid:
            weighted = torch.tensor([[value * self._weight, self._weight]], dtype=torch.float64)
            summed, count = self.grid.data.ordered_sum(weighted, [1] * self.grid.replicas).tolist()
            value = summed / count
        self.loss_before = value
        return Evaluation(value, value, float("nan"), 0.0)

    def _loss_of(self, module: nn.Module) -> Tensor:
        """That of this replica's samples."""
        raise NotImplementedError

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        """The gradient of the mean loss at x, where `evaluate` has been called last."""
        found = torch.zeros_like(x)
        for parameter, part, shape in zip(self._parameters, found.split(self._sizes), self._shapes, strict=True):
            parameter.grad = part.view(shape)
        present(self._value).backward()
        self._value = None
        if self.grid:
            self.grid.average_gradients(self._parameters, samples=self._weight)
        for parameter in self._parameters:
            parameter.grad = None
        self.passes += self.samples
        return found

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Dot products; every rank has whole vectors."""
        return torch.stack([torch.stack([torch.dot(u, v) for v in b]) for u in a])


class ModuleObjective(LossOfModule):
    """Mean loss of a module on samples that can be exchanged.

    Parameters
    ----------
    module, grid
        As of `LossOfModule`.
    loss : callable
        `loss(module(inputs), targets)`, the mean over the samples.
    """

    def __init__(self, module: nn.Module, loss: Loss, grid: ProcessGrid | None = None):
        super().__init__(module, grid)
        self.loss = loss
        self._share: Samples | None = None

    def use(self, inputs: Tensor, targets: Tensor) -> None:
        """Take these samples (B, ...) from now on, the same on all ranks."""
        self.samples = len(inputs)
        inputs, targets = self._share = self.grid.shard((inputs, targets)) if self.grid else (inputs, targets)
        self._weight = len(inputs)

    def _loss_of(self, module: nn.Module) -> Tensor:
        inputs, targets = present(self._share)
        return self.loss(module(inputs), targets)
