"""Predictions: seconds of a weight update and its parts, memory, speedup; and the plan that is best."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from xbraid_py.comm.partition import Partition
from xbraid_py.comm.tree import nodes_between
from xbraid_py.mgrit import Hierarchy
from xbraid_py.planner.clocks import Clock, Clocks, SharedCores, counts, in_order
from xbraid_py.planner.cycles import SolveWalk
from xbraid_py.planner.machine import Costs, Machine
from xbraid_py.planner.plan import SERIAL, Plan

# Up to so many ranks are simulated event by event, cores and memory shared.
_EVENTS_UP_TO = 16
# A coarsest level with fewer steps is not accurate enough for one sweep in an update.
MIN_COARSE = 8
# Portions of a pipeline, in each replica.
PORTIONS = (1, 2, 4, 8, 16, 32)
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
        Seconds of its parts: state solve with the loss, adjoint solve, direction of the optimizer. The messages by
        which replicas share weights are in the first, those by which they sum gradients in the second.
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

    @property
    def kind(self) -> str:
        """That of the plan; see `Plan.kind`."""
        return self.plan.kind(self.num_ranks)


@dataclass(frozen=True)
class Planner:
    """Predictions for one machine and one kind of layer.

    Parameters
    ----------
    machine : Machine
    costs : Costs
        For all samples.
    pairs : int
        Pairs that L-BFGS keeps.
    collectives : int, optional
        Sums over all ranks that the optimizer makes in an update: for the new pair, and for the new gradient.
    sweeps, adjoint_sweeps : int
        Fine sweeps of the lagged cycle in a solve.
    events_up_to : int
        Up to so many ranks are simulated event by event, where cores and memory are shared.
    """

    machine: Machine
    costs: Costs
    pairs: int = 10
    collectives: int = 2
    sweeps: int = 1
    adjoint_sweeps: int = 1
    events_up_to: int = _EVENTS_UP_TO

    def __post_init__(self):
        for name in ("pairs", "collectives"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0; use {getattr(Planner, name)}")

    def predict(self, plan: Plan, num_layers: int, num_ranks: int) -> Prediction:
        """One update at a depth on a number of ranks.

        Raises
        ------
        ValueError
            If a coarsening factor of the plan does not divide the steps of its level, if the replicas do not divide the
            ranks, or if there are fewer samples than portions.
        """
        return self._predict(plan, num_layers, num_ranks, self.serial(num_layers))

    def serial(self, num_layers: int) -> float:
        """Seconds of an update with serial propagation on one rank."""
        return sum(self._seconds(SERIAL, num_layers, 1))

    def _predict(self, plan: Plan, num_layers: int, num_ranks: int, serial: float) -> Prediction:
        parts = self._seconds(plan, num_layers, num_ranks)
        return Prediction(plan, num_ranks, *parts, self.memory(plan, num_layers, num_ranks), serial)

    def memory(self, plan: Plan, num_layers: int, num_ranks: int) -> int:
        """Bytes on all ranks together: one copy of the fine states; C-points, ends and taus; weights.

        The states of the coarser levels and of the intervals in flight are counted, the data are not. Each replica
        has all weights of its layers, and gradients of some portions.
        """
        hierarchy = plan.hierarchy(num_layers, num_ranks)
        states = num_layers + 4 * hierarchy.levels[0].rows.ranks_in_use
        for finer, level in zip(hierarchy.levels, hierarchy.levels[1:], strict=False):
            # Warm starts of both solves, taus (those of the lagged cycle stay), ends, and what moves.
            states += (6 if finer.index == 0 else 3) * level.num_steps
        weights = 2 * self.pairs + 6
        if plan.portions > 1:
            weights += plan.replicas * (2 + plan.portions_each.bit_length())
        return int(states * self.costs.state_bytes + num_layers * self.costs.row_bytes * weights)

    def candidates(self, num_layers: int, num_ranks: int, cycles: Sequence[str] = ("lagged",)) -> Iterator[Plan]:
        """What `best` chooses from; see `candidates`."""
        sweeps = (self.sweeps, self.adjoint_sweeps)
        return candidates(num_layers, cycles, num_ranks=num_ranks, samples=self.costs.samples, sweeps=sweeps)

    def of_each_kind(
        self,
        num_layers: int,
        num_ranks: int,
        cycles: Sequence[str] = ("lagged",),
        plans: Sequence[Plan] | None = None,
        limit: float = inf,
    ) -> list[Prediction]:
        """The best plan of each kind, the fastest first; of those as good as the fastest of a kind the simplest.

        Parameters
        ----------
        num_layers, num_ranks : int
        cycles : sequence of str
            Cycles to choose from, besides exact propagation.
        plans : sequence of Plan, optional
            To choose from instead.
        limit : float
            Plans that take more than so many seconds are left out.
        """
        serial = self.serial(num_layers)
        found: dict[str, list[Prediction]] = {}
        offered = self.candidates(num_layers, num_ranks, cycles) if plans is None else plans
        # The most promising first: what cannot beat the best of its kind need not be simulated.
        bounds = [(self._bound(plan, num_layers, num_ranks), number, plan) for number, plan in enumerate(offered)]
        for bound, _, plan in sorted(bounds, key=lambda row: row[:2]):
            kind = found.setdefault(plan.kind(num_ranks), [])
            if bound <= min((each.seconds * (1 + _MARGIN) for each in kind), default=limit):
                kind.append(self._predict(plan, num_layers, num_ranks, serial))
        best = [simplest(kind) for kind in found.values() if kind]
        return sorted(best, key=lambda each: (rounded(each.seconds), each.plan.simplicity(num_ranks)))

    def best(self, num_layers: int, num_ranks: int, cycles: Sequence[str] = ("lagged",)) -> Prediction:
        """The fastest plan; the simplest of those that are as good as the fastest."""
        return simplest(self.of_each_kind(num_layers, num_ranks, cycles))

    def _bound(self, plan: Plan, num_layers: int, num_ranks: int) -> float:
        """Seconds that an update takes at least: layers and ends alone, no message."""
        costs = self.costs.at(self.costs.portion(plan.portions))
        stages, portions = plan.stages(num_ranks), plan.portions_each
        if plan.is_exact:
            layers = -(-num_layers // stages)
            layers += num_layers / stages / portions * (stages - 1) if stages <= num_layers else 0.0
            each = costs.states.sweep.each + costs.adjoints.sweep.each
        else:
            layers = num_layers / stages
            # A coarse sweep meets all intervals, however many ranks there are.
            coarse = num_layers // plan.coarsest if len(plan.cfactors) == 1 else 0
            each = plan.iterations * costs.states.record.each + plan.adjoint_iterations * costs.adjoints.record.each
            both = 2 * (costs.states.coarse_sweep.each + costs.adjoints.coarse_sweep.each) if not plan.euler else 0.0
            return portions * (layers * each + (coarse * both if plan.cycle == "lagged" else 0.0))
        return portions * layers * each

    def _seconds(self, plan: Plan, num_layers: int, num_ranks: int) -> tuple[float, float, float]:
        """Seconds of states, adjoints and optimizer."""
        if plan.portions > self.costs.samples > 1:
            raise ValueError(
                f"portions={plan.portions} are more than the samples={self.costs.samples}; use {self.costs.samples}"
            )
        hierarchy, replicas = plan.hierarchy(num_layers, num_ranks), plan.replicas
        costs = self.costs.at(self.costs.portion(plan.portions)) if plan.portions > 1 else self.costs
        kind = Clocks if num_ranks > self.events_up_to else SharedCores
        clock: Clock = kind(self.machine, num_ranks, replicas)
        own, marks = counts(hierarchy.levels[0].rows), [0.0]
        for direction in (+1, -1):
            if direction > 0 and not costs.is_module:
                self._regularize(clock, hierarchy.partition)
                if replicas > 1:
                    clock.share(_of_rows(lambda rows: self.machine.collective(replicas, rows * costs.row_bytes), own))
            SolveWalk(clock, plan, hierarchy, costs, direction).run()
            if direction < 0 and replicas > 1:
                self._sum_gradients(clock, plan, costs, own)
            if replicas > 1 and not plan.is_exact:
                clock.collective(32 * plan.portions)  # loss and work of all portions
            if costs.is_module:
                clock.collective(self.costs.state_bytes / replicas)  # the last state, for all ranks
            marks.append(clock.finish())
        self._optimize(clock, plan, hierarchy)
        marks.append(clock.finish())
        states, adjoints, rest = (b - a for a, b in zip(marks, marks[1:], strict=False))
        return states, adjoints, rest

    def _regularize(self, clock: Clock, partition: Partition) -> None:
        """Smoothness in depth: the weights of the neighboring layers, from both sides."""
        ranks = in_order(partition, +1)
        sizes = np.full(len(ranks) - 1, float(self.costs.row_bytes))
        clock.messages(ranks[:-1], ranks[1:], sizes)
        clock.messages(ranks[1:], ranks[:-1], sizes)

    def _sum_gradients(self, clock: Clock, plan: Plan, costs: Costs, own: np.ndarray) -> None:
        """The gradients of all replicas: each rank sums its share, and of modules hands it on to the others."""
        machine, replicas = self.machine, plan.replicas
        if costs.is_module:
            clock.share(_of_rows(lambda rows: machine.exchange(replicas, rows * costs.row_bytes), own))
            clock.work(own * costs.add)
            clock.share(_of_rows(lambda rows: machine.collective(replicas, rows * costs.row_bytes), own))
            return
        # Of portions whose sums are no single subtree there are several pieces.
        pieces = len(nodes_between(plan.portions, 0, plan.portions_each))
        clock.share(_of_rows(lambda rows: machine.exchange(replicas, pieces * rows * costs.row_bytes), own))
        clock.work(own * (pieces * costs.add))

    def _optimize(self, clock: Clock, plan: Plan, hierarchy: Hierarchy) -> None:
        """Local products of vectors, cut into pieces by the collectives, each of a number for every product."""
        costs, pieces = self.costs, max(1, self.collectives)
        own = counts(hierarchy.levels[0].rows)
        blocks = hierarchy.levels[0].rows.num_rows // hierarchy.block
        if plan.replicas > 1 and not costs.is_module:
            # Replicas share the weights of their layers in whole blocks.
            own = -(-(own // hierarchy.block) // plan.replicas) * hierarchy.block
        seconds = (costs.optimizer + own * costs.optimizer_layer) / pieces
        for piece in range(pieces):
            clock.work(seconds)
            if piece < self.collectives:
                clock.collective(8 * blocks * (2 * self.pairs + 2))


def _of_rows(seconds: Callable[[int], float], own: np.ndarray) -> np.ndarray:
    """Seconds on each rank, of its number of rows."""
    numbers, at = np.unique(own, return_inverse=True)
    return np.array([seconds(rows) for rows in numbers.tolist()])[at]


def simplest(predictions: Sequence[Prediction]) -> Prediction:
    """Of those as good as the fastest."""
    limit = rounded(min(each.seconds for each in predictions)) * (1 + _MARGIN)
    good = [each for each in predictions if rounded(each.seconds) <= limit]
    return min(good, key=lambda each: (each.plan.simplicity(each.num_ranks), rounded(each.seconds)))


def rounded(seconds: float) -> float:
    """To six digits: what is decided by it does not depend on how a processor rounds."""
    return float(f"{seconds:.5e}")


def candidates(
    num_layers: int,
    cycles: Sequence[str] = ("lagged",),
    *,
    num_ranks: int = 1,
    samples: int = 1,
    sweeps: tuple[int, int] = (1, 1),
) -> Iterator[Plan]:
    """The plans of a search: replicas, as many as divide the ranks, times cycles over the layers.

    Replicas are at most as many as samples. Within them: pipelines with `PORTIONS`; the lagged cycle and others with at
    least `MIN_COARSE` steps on the coarsest level, where the second and all further coarsening factors are equal.
    V- and F-cycles make two iterations with FCF-relaxation on states and adjoints, as published.

    Parameters
    ----------
    num_layers : int
    cycles : sequence of str
        Besides exact propagation: lagged, V, F.
    num_ranks, samples : int
        With one of each there are neither replicas nor portions.
    sweeps : tuple of int
        Fine sweeps of the lagged cycle, of state and adjoint solves.
    """
    yield SERIAL
    for replicas in (number for number in range(1, min(num_ranks, samples) + 1) if num_ranks % number == 0):
        for each in PORTIONS:
            if 1 < replicas * each <= samples:
                yield Plan(cycle="pipeline", replicas=replicas, portions=replicas * each)
        if replicas > 1 and replicas == num_ranks:
            continue
        for cycle in cycles:
            times = sweeps if cycle == "lagged" else (2, 2)
            common = {"cycle": cycle, "replicas": replicas, "portions": replicas}
            common |= {"iterations": times[0], "adjoint_iterations": times[1]}
            for first in _factors(num_layers):
                for cfactors in _chains(first, num_layers // first):
                    yield Plan(cfactors=cfactors, **common)


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
