"""Predictions: seconds of a weight update and its parts, memory, speedup; and the plan that is best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from xbraid_py.comm.partition import Partition
from xbraid_py.planner.clocks import Clock, Clocks, SharedCores, counts, in_order
from xbraid_py.planner.cycles import Plan, SolveWalk
from xbraid_py.planner.machine import Costs, Machine

SERIAL = Plan(cycle="serial")
# Up to so many ranks are simulated event by event, cores and memory shared.
_EVENTS_UP_TO = 16
# A coarsest level with fewer steps is not accurate enough for one sweep in an update.
MIN_COARSE = 8
# A plan must be better than a simpler one, or one with fewer ranks, by more than this.
_MARGIN = 0.03


@dataclass(frozen=True)
class Prediction:
    """What an update costs.

    Attributes
    ----------
    plan : Plan
    num_ranks : int
    states, adjoints, optimizer : float
        Seconds of its parts: state solve with the loss, adjoint solve, direction of the optimizer.
    memory : int
        Bytes of states, adjoints, weights and pairs of L-BFGS on all ranks together, at the peak.
    serial : float
        Seconds of an update with serial propagation on one rank.
    """

    plan: Plan
    num_ranks: int
    states: float
    adjoints: float
    optimizer: float
    memory: int
    serial: float

    @property
    def seconds(self) -> float:
        """Of one update."""
        return self.states + self.adjoints + self.optimizer

    @property
    def speedup(self) -> float:
        """Against serial propagation on one rank."""
        return self.serial / self.seconds

    @property
    def efficiency(self) -> float:
        """Speedup for each rank."""
        return self.speedup / self.num_ranks


@dataclass(frozen=True)
class Planner:
    """Predictions for one machine and one kind of layer.

    Parameters
    ----------
    machine : Machine
    costs : Costs
    pairs : int
        Pairs that L-BFGS keeps.
    collectives : int, optional
        Sums over all ranks that the optimizer makes in an update: for the new pair, and for the new gradient.
    """

    machine: Machine
    costs: Costs
    pairs: int = 10
    collectives: int = 2

    def __post_init__(self):
        for name in ("pairs", "collectives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0; use {getattr(Planner, name)}")

    def predict(self, plan: Plan, num_layers: int, num_ranks: int) -> Prediction:
        """One update at a depth on a number of ranks.

        Raises
        ------
        ValueError
            If a coarsening factor of the plan does not divide the steps of its level.
        """
        serial = sum(self._seconds(SERIAL, num_layers, 1))
        parts = self._seconds(plan, num_layers, num_ranks)
        return Prediction(plan, num_ranks, *parts, self.memory(plan, num_layers, num_ranks), serial)

    def memory(self, plan: Plan, num_layers: int, num_ranks: int) -> int:
        """Bytes on all ranks together: one copy of the fine states; C-points, ends and taus; weights.

        The states of the coarser levels and of the intervals in flight are counted, the data are not.
        """
        hierarchy = plan.hierarchy(num_layers, num_ranks)
        states = num_layers + 4 * hierarchy.levels[0].rows.ranks_in_use
        for finer, level in zip(hierarchy.levels, hierarchy.levels[1:], strict=False):
            # Warm starts of both solves, taus (those of the lagged cycle stay), ends, and what moves.
            states += (6 if finer.index == 0 else 3) * level.num_steps
        return int(states * self.costs.state_bytes + num_layers * self.costs.row_bytes * (2 * self.pairs + 6))

    def best(self, num_layers: int, num_ranks: int, cycles: Sequence[str] = ("lagged",)) -> Prediction:
        """The fastest plan; the simplest of those that are as good as the fastest."""
        found = [self.predict(plan, num_layers, num_ranks) for plan in candidates(num_layers, cycles)]
        limit = min(each.seconds for each in found) * (1 + _MARGIN)
        return min((each for each in found if each.seconds <= limit), key=lambda each: len(each.plan.cfactors))

    def _seconds(self, plan: Plan, num_layers: int, num_ranks: int) -> tuple[float, float, float]:
        """Seconds of states, adjoints and optimizer."""
        hierarchy = plan.hierarchy(num_layers, num_ranks)
        own = counts(hierarchy.levels[0].rows)
        clock = Clocks(self.machine, num_ranks) if num_ranks > _EVENTS_UP_TO else SharedCores(self.machine, num_ranks)
        marks = [0.0]
        for direction in (+1, -1):
            if direction > 0:
                self._regularize(clock, hierarchy.partition)
            SolveWalk(clock, plan, hierarchy, self.costs, direction).run()
            marks.append(clock.finish())
        self._optimize(clock, own, hierarchy.intervals.num_rows)
        marks.append(clock.finish())
        return tuple(b - a for a, b in zip(marks, marks[1:], strict=False))

    def _regularize(self, clock: Clock, partition: Partition) -> None:
        """Smoothness in depth: the weights of the neighboring layers, from both sides."""
        ranks = in_order(partition, +1)
        sizes = np.full(len(ranks) - 1, float(self.costs.row_bytes))
        clock.messages(ranks[:-1], ranks[1:], sizes)
        clock.messages(ranks[1:], ranks[:-1], sizes)

    def _optimize(self, clock: Clock, own: np.ndarray, intervals: int) -> None:
        """Local products of vectors, cut into pieces by the collectives, each of a number for every product."""
        pieces = max(1, self.collectives)
        seconds = (self.costs.optimizer + own * self.costs.optimizer_layer) / pieces
        for piece in range(pieces):
            clock.work(seconds)
            if piece < self.collectives:
                clock.collective(8 * intervals * (2 * self.pairs + 2))


def candidates(num_layers: int, cycles: Sequence[str] = ("lagged",)) -> Iterator[Plan]:
    """Serial propagation, and the plans of a search, with at least `MIN_COARSE` steps on the coarsest level.

    The second and all further coarsening factors are equal. V- and F-cycles make two iterations with
    FCF-relaxation on states and adjoints, as published.
    """
    yield SERIAL
    for cycle in cycles:
        sweeps = 1 if cycle == "lagged" else 2
        for first in _factors(num_layers):
            for cfactors in _chains(first, num_layers // first):
                yield Plan(cycle=cycle, cfactors=cfactors, iterations=sweeps, adjoint_iterations=sweeps)


def _chains(first: int, steps: int) -> Iterator[tuple[int, ...]]:
    """Coarsening factors that begin with `first` and go on from so many steps."""
    yield (first,)
    for factor in (2, 4, 8, 16):
        cfactors, left = (first,), steps
        while left % factor == 0 and left // factor >= MIN_COARSE:
            cfactors, left = (*cfactors, factor), left // factor
            yield cfactors


def _factors(num_steps: int) -> list[int]:
    """Coarsening factors that leave enough steps: powers of two if there are enough of them, else all."""
    fits = [c for c in range(2, num_steps // MIN_COARSE + 1) if num_steps % c == 0]
    powers = [c for c in fits if c & (c - 1) == 0]
    return powers if len(powers) > 2 else fits
