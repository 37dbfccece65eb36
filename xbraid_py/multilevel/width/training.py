"""Multilevel training in width: V-cycles over networks of halved width (paper 002, algorithm 2).

Shape letters: `B` samples, `L` levels. Level 0 is the given network.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from math import isfinite, nan
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from xbraid_py.comm.agreement import RunError
from xbraid_py.comm.base import present
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.multilevel.stochastic import Loss, Minibatches, ModuleObjective, StochasticCycle
from xbraid_py.multilevel.vcycle import Damping
from xbraid_py.multilevel.width.matching import Matching
from xbraid_py.multilevel.width.options import WidthTrainingOptions
from xbraid_py.multilevel.width.transfer import WidthLayout, WidthTransfer, match_layers, renewed
from xbraid_py.optim.levels import Point
from xbraid_py.run.store.read import Checkpoint, no_state
from xbraid_py.run.store.write import Shard


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
        Of dense and convolutional layers, see `WidthLayout`; is left as it is.
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
    layout : WidthLayout
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
        self.layout = WidthLayout.of(network)
        self.x = self.layout.vector(network)
        self.objective = ModuleObjective(self.layout.module(self.x), loss, grid)
        self.optimizer = options.optimizer(0)
        self.transfers: list[WidthTransfer] = []
        self._cycle: StochasticCycle | None = None
        # Of all levels; the cost of each is in gradients of the finest.
        self._objectives: list[ModuleObjective] = []
        self._optimizers = [self.optimizer]
        self._costs: list[float] = []
        self._counted = 0.0
        self._matching_seconds = 0.0
        self._last = WidthRecord(0, 0.0, 0.0, 0.0, 0.0, 0.0, nan, ())

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

    def _matchings(self, layout: WidthLayout, x: Tensor, level: int) -> list[Matching | None]:
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
        self._objectives, self._optimizers = objectives, optimizers

    def _count(self) -> None:
        """Work of the objectives as it is, from now on anew."""
        for objective, cost in zip(self._objectives, self._costs, strict=True):
            self._counted += objective.passes / self.minibatches.batch_size * cost
            objective.passes = 0

    def auxiliary(self, level: int) -> tuple[WidthLayout, Tensor]:
        """A coarse network by restriction of the present weights, with their norms; 0 is the network itself."""
        layout, x = self.layout, self.x
        for transfer in renewed(self.transfers[:level], x):
            layout, x = transfer.coarse, transfer.restrict(x)
        return layout, x

    def state(self) -> tuple[dict[str, Shard], dict[str, Any]]:
        """Where `run` has come to: global arrays, and the numbers of the last record and of the minibatches drawn.

        The arrays are the weights, the partners of every hidden layer, and what each level's optimizer keeps. All
        ranks have the same: the first one gives them.
        """
        found = {"weights": self.x}
        for level, transfer in enumerate(self.transfers):
            for layer, matching in enumerate(transfer.matchings):
                if matching is not None:
                    found[f"level{level}/partner{layer}"] = matching.partner
        for level, optimizer in enumerate(self._optimizers):
            for name, value in optimizer.state.items():
                if isinstance(value, Tensor):
                    found[f"level{level}/{name}"] = value.reshape(-1)
        is_first = self.grid is None or self.grid.data.rank == 0
        arrays = {name: Shard(values.cpu(), 0, len(values)) for name, values in found.items()} if is_first else {}
        return arrays, asdict(self._last) | {"drawn": self.minibatches.drawn}

    def load(self, checkpoint: Checkpoint) -> None:
        """Let `run` go on from a state, bitwise as if nothing had happened; sends no message.

        Its numbers are the meta data "state"; it was written on any number of ranks. Raises `CheckpointError`,
        `LookupError`, `TypeError` or `ValueError` if it is the state of something else.
        """
        numbers = checkpoint.meta["state"]
        done = {each.name: numbers[each.name] for each in fields(WidthRecord)}
        done["widths"] = tuple(tuple(widths) for widths in done["widths"])
        drawn = numbers["drawn"]
        if not all(type(each) is int and each >= 0 for each in (done["cycle"], drawn)):
            raise no_state(checkpoint.path, f"cycle={done['cycle']!r}, drawn={drawn!r}")
        arrays = {name: checkpoint.rows(name) for name in checkpoint.names()}
        self.layout.check(arrays["weights"])
        self.x, self.minibatches.drawn = arrays["weights"].to(self.x), drawn
        layout, x, self.transfers = self.layout, self.x, []
        for level in range(self.options.levels - 1):
            partners = [arrays.get(f"level{level}/partner{layer}") for layer in range(len(layout.widths))]
            matchings = [None if each is None else Matching.of(each.to(x.device)) for each in partners]
            self.transfers.append(WidthTransfer.of(layout, matchings, x, self.options.pairs))
            layout, x = self.transfers[-1].coarse, self.transfers[-1].restrict(x)
        self._build()
        for level, optimizer in enumerate(self._optimizers):
            for name, value in arrays.items():
                owner, _, kind = name.partition("/")
                if owner == f"level{level}" and not kind.startswith("partner"):
                    optimizer.state[kind] = value.reshape(()).clone() if kind == "step" else value.to(self.x)
        self._last = WidthRecord(**done)
        self._counted, self._matching_seconds = self._last.counted, self._last.matching_seconds

    def run(self, max_cycles: int) -> Iterator[WidthRecord]:
        """Make cycles, so many in all; yields a record after each, when `x` are the weights that it is of.

        Goes on from what `load` has read: the next record is that of the cycle after it. Raises `RunError` on all ranks
        if the loss is not finite.
        """
        unit, unit_without = self.options.work()
        for cycle in range(self._last.cycle, max_cycles):
            clock = time.perf_counter()
            if self._cycle is None or cycle % self.options.rematch_every == 0:
                self.match()
            self.x = present(self._cycle).run(Point(self.x)).x
            self._count()
            loss = self.objective.loss_before
            if not isfinite(loss):
                raise RunError(
                    f"cycle {cycle + 1}: the loss is {loss}; use a smaller learning rate, or with several levels a "
                    f"larger eta, or a smaller gamma, alpha_p or alpha_m"
                )
            self._last = WidthRecord(
                cycle + 1,
                (cycle + 1) * unit,
                (cycle + 1) * unit_without,
                self._counted,
                self._last.seconds + time.perf_counter() - clock,
                self._matching_seconds,
                loss,
                (self.layout.widths, *(transfer.coarse.widths for transfer in self.transfers)),
            )
            yield self._last


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
