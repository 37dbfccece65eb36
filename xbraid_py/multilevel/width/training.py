"""Multilevel training in width: V-cycles over networks of halved width (paper 002, algorithm 2).

Shape letters: `B` samples, `L` levels. Level 0 is the given network.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from xbraid_py.comm.errors import RunError
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.multilevel.cycle.module_objective import Loss, ModuleObjective
from xbraid_py.multilevel.cycle.stochastic import Minibatches, StochasticCycle
from xbraid_py.multilevel.cycle.vcycle import Damping
from xbraid_py.multilevel.width.layout import Layout
from xbraid_py.multilevel.width.matching import Matching
from xbraid_py.multilevel.width.training_options import WidthTrainingOptions
from xbraid_py.multilevel.width.transfer import WidthTransfer, match_layers, renewed
from xbraid_py.optim.levels import Point, TorchOptimizer


@dataclass(frozen=True)
class WidthRecord:
    """The state of a training run after a cycle.

    Attributes
    ----------
    cycle : int
    work, work_without_tau : float
        Work units by eq. 40 so far: forward and backward passes over a minibatch of the finest network.
    counted : float
        The same with the multiply-adds of the coarse networks as they are.
    seconds, matching_seconds : float
        Time so far, and the part of it that the matching took.
    loss : float
        Of the last step on the finest level, on its minibatch.
    widths : tuple of tuple of int
        Hidden layers of each level.
    """

    cycle: int
    work: float
    work_without_tau: float
    counted: float
    seconds: float
    matching_seconds: float
    loss: float
    widths: tuple[tuple[int, ...], ...]


class WidthTraining:
    """A run of multilevel training in width.

    Parameters
    ----------
    network : nn.Sequential
        Of dense and convolutional layers, see `Layout`; is left as it is.
    loss : callable
        A mean over samples.
    minibatches : Minibatches
        The same on all ranks.
    options : WidthTrainingOptions
    grid : ProcessGrid, optional
        Of replicas on one rank each, which share every minibatch and average gradients and tau.

    Attributes
    ----------
    x : Tensor
        Weights of the network.
    layout : Layout
    transfers : list of WidthTransfer
        Between the levels, since the last matching.

    Raises
    ------
    ValueError
        If the network cannot be made narrower as the options ask for.
    """

    def __init__(
        self,
        network: nn.Sequential,
        loss: Loss,
        minibatches: Minibatches,
        options: WidthTrainingOptions,
        grid: ProcessGrid | None = None,
    ):
        self.loss, self.minibatches, self.options, self.grid = loss, minibatches, options, grid
        self.layout = Layout.of(network)
        self.x = self.layout.vector(network)
        self.objective = ModuleObjective(self.layout.module(self.x), loss, grid)
        self.optimizer = options.optimizer(0)
        self.transfers: list[WidthTransfer] = []
        self._cycle: StochasticCycle | None = None
        self._costs: list[float] = []
        self._counted = 0.0
        self._matching_seconds = 0.0

    def match(self) -> None:
        """Pair the neurons by the weights as they are, and make the coarse networks of them; collective."""
        clock = time.perf_counter()
        layout, x, self.transfers = self.layout, self.x, []
        for level in range(1, self.options.levels):
            matchings = self._matchings(layout, x, level)
            self.transfers.append(WidthTransfer.of(layout, matchings, x, self.options.pairs))
            layout, x = self.transfers[-1].coarse, self.transfers[-1].restrict(x)
        self._matching_seconds += time.perf_counter() - clock
        self._build()

    def _matchings(self, layout: Layout, x: Tensor, level: int) -> list[Matching | None]:
        """Those of the first rank, on all of them: elsewhere a tie might be decided otherwise."""
        pairs = self.options.pairs
        if self.grid is None:
            found = match_layers(layout, x, pairs)
        else:
            comm = self.grid.data
            first = match_layers(layout, x, pairs) if comm.rank == 0 else []
            partners = comm.bcast([each and each.partner.cpu() for each in first])
            found = [each if each is None else Matching.of(each.to(x.device)) for each in partners]
        if not any(matching and matching.num_pairs for matching in found):
            raise ValueError(
                f"levels={self.options.levels}: the hidden layers of level {level - 1}, of widths {layout.widths}, "
                f"have no pair above threshold={pairs.threshold}; use levels={level} or a lower threshold"
            )
        return found

    def _build(self) -> None:
        """Objectives, optimizers and the cycle for the present transfers."""
        self._count()
        options, x = self.options, self.x
        objectives, optimizers = [self.objective], [self.optimizer]
        for level, transfer in enumerate(self.transfers, start=1):
            x = transfer.restrict(x)
            objectives.append(ModuleObjective(transfer.coarse.module(x), self.loss, self.grid))
            optimizers.append(options.optimizer(level))
        steps = [options.steps] * len(self.transfers)
        damping = Damping(options.gamma, options.alpha_p, options.alpha_m)
        self._cycle = StochasticCycle(
            objectives,
            self.transfers,
            optimizers,
            self.minibatches.draw,
            steps,
            steps,
            options.steps_of(len(self.transfers)),
            damping=damping,
            tau=options.tau,
        )
        inputs = self.minibatches.inputs[:1]
        costs = [_multiply_adds(each.module, inputs) for each in objectives]
        self._costs = [cost / costs[0] for cost in costs]

    def _count(self) -> None:
        """Work of the objectives as it is, from now on anew."""
        if self._cycle is not None:
            for objective, cost in zip(self._cycle.objectives, self._costs, strict=True):
                self._counted += objective.passes / self.minibatches.batch_size * cost
                objective.passes = 0

    def auxiliary(self, level: int) -> tuple[Layout, Tensor]:
        """A coarse network by restriction of the present weights, with their norms; 0 is the network itself."""
        layout, x = self.layout, self.x
        for transfer in renewed(self.transfers[:level], x):
            layout, x = transfer.coarse, transfer.restrict(x)
        return layout, x

    def state(self) -> dict[str, Tensor]:
        """Where the run has come to, by name: what `restore` needs to go on bitwise as if nothing had happened.

        Weights, minibatches drawn, the partners of every hidden layer, and the state of each level's optimizer.
        """
        found = {"weights": self.x, "drawn": torch.tensor([self.minibatches.drawn])}
        for level, transfer in enumerate(self.transfers):
            for layer, matching in enumerate(transfer.matchings):
                if matching is not None:
                    found[f"level{level}/partner{layer}"] = matching.partner
        for level, optimizer in enumerate(self._optimizers()):
            for name, value in optimizer.state.items():
                if isinstance(value, Tensor):
                    found[f"level{level}/{name}"] = value.reshape(-1)
        return found

    def restore(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` of the same run gave.

        Raises
        ------
        ValueError, KeyError
            If it is of another network, or something is missing.
        """
        self.layout.check(state["weights"])
        self.x, self.minibatches.drawn = state["weights"].to(self.x), int(state["drawn"])
        layout, x, self.transfers = self.layout, self.x, []
        for level in range(self.options.levels - 1):
            partners = [state.get(f"level{level}/partner{layer}") for layer in range(len(layout.widths))]
            matchings = [None if each is None else Matching.of(each.to(x.device)) for each in partners]
            self.transfers.append(WidthTransfer.of(layout, matchings, x, self.options.pairs))
            layout, x = self.transfers[-1].coarse, self.transfers[-1].restrict(x)
        self._build()
        for level, optimizer in enumerate(self._optimizers()):
            for name, value in state.items():
                owner, _, kind = name.partition("/")
                if owner == f"level{level}" and not kind.startswith("partner"):
                    optimizer.state[kind] = value.reshape(()).clone() if kind == "step" else value.to(self.x)

    def _optimizers(self) -> list[TorchOptimizer]:
        return [each.optimizer for each in self._cycle.smoothers] if self._cycle else [self.optimizer]

    def run(self, max_cycles: int, done: WidthRecord | None = None) -> Iterator[WidthRecord]:
        """Make cycles; yields a record after each, when `x` are the weights that it is of.

        Parameters
        ----------
        max_cycles : int
            Cycles in all.
        done : WidthRecord, optional
            Where an earlier run has come to.

        Raises
        ------
        RunError
            On all ranks, if the loss is not finite.
        """
        options = self.options
        unit, unit_without = options.work()
        first, seconds = (done.cycle, done.seconds) if done else (0, 0.0)
        counted, matching = (done.counted, done.matching_seconds) if done else (0.0, 0.0)
        for cycle in range(first, max_cycles):
            clock = time.perf_counter()
            if self._cycle is None or cycle % options.rematch_every == 0:
                self.match()
            self.x = self._cycle.run(Point(self.x)).x
            self._count()
            loss = self.objective.loss_before
            if not isfinite(loss):
                raise RunError(
                    f"cycle {cycle + 1}: the loss is {loss}; use a smaller learning rate, or with several levels a "
                    f"larger eta, or a smaller gamma, alpha_p or alpha_m"
                )
            seconds += time.perf_counter() - clock
            yield WidthRecord(
                cycle + 1,
                (cycle + 1) * unit,
                (cycle + 1) * unit_without,
                counted + self._counted,
                seconds,
                matching + self._matching_seconds,
                loss,
                (self.layout.widths, *(transfer.coarse.widths for transfer in self.transfers)),
            )


def errors(module: nn.Module, inputs: Tensor, targets: Tensor, portion: int = 1000) -> tuple[float, float]:
    """Mean square and largest error of a module over all samples and outputs, as in the tables of paper 002."""
    squares, largest = 0.0, 0.0
    with torch.no_grad():
        for some, wanted in zip(inputs.split(portion), targets.split(portion), strict=True):
            error = (module(some) - wanted).double()
            squares += float(error.square().sum())
            largest = max(largest, float(error.abs().max()))
    return squares / targets.numel(), largest


def _multiply_adds(module: nn.Module, inputs: Tensor) -> float:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module(inputs)
    return float(counter.get_total_flops())
