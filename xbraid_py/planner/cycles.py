"""A solve on the clocks of the ranks of a replica: what `mgrit` does, with seconds instead of states.

Shape letters: `P` ranks of a replica, `n` rows of a level on each rank, `K` intervals on each rank.
"""

from __future__ import annotations

import numpy as np

from xbraid_py.comm.partition import Partition
from xbraid_py.mgrit import COARSE_RELAXATIONS, Hierarchy
from xbraid_py.planner.clocks import Clock, counts, in_order, moves
from xbraid_py.planner.machine import Costs, SolveCosts, StepCost
from xbraid_py.planner.plan import Plan


class SolveWalk:
    """Walks the ranks' clocks through the solves of one kind, states or adjoints, for all portions of a replica.

    Parameters
    ----------
    clock : Clock
    plan : Plan
    hierarchy : Hierarchy
        Of the plan, for as many ranks as the clock has.
    costs : Costs
        For as many samples as a portion has.
    direction : int
        +1 for states, -1 for adjoints.
    """

    def __init__(self, clock: Clock, plan: Plan, hierarchy: Hierarchy, costs: Costs, direction: int):
        self.clock, self.plan, self.costs, self.direction = clock, plan, costs, direction
        self.levels = hierarchy.levels
        self.steps: SolveCosts = costs.states if direction > 0 else costs.adjoints
        if plan.euler:
            self.steps = self.steps.euler
        self.iterations = plan.iterations if direction > 0 else plan.adjoint_iterations
        self.own = [counts(level.rows) for level in self.levels]
        self.points = [own // (level.cfactor or 1) for own, level in zip(self.own, self.levels, strict=True)]

    def run(self) -> None:
        """The solves, warm-started, with the ends of the network; those of several portions one after the other."""
        if self.plan.cycle == "pipeline":
            self._pipeline()
            return
        for _ in range(self.plan.portions_each):
            self._solve()

    def _solve(self) -> None:
        self.clock.work(self.own[0] * self.steps.layer)
        self._make_levels()
        if self.plan.cycle == "serial":
            self._sweep(0)
            self._end()
            self.clock.collective(16)
        elif self.plan.cycle == "lagged":
            self._one_shot()
        else:
            self._cycles()

    def _pipeline(self) -> None:
        """Portions follow each other; the opening on the first rank, classification and loss on the last."""
        ranks, portions = in_order(self.levels[0].rows, self.direction), self.plan.portions_each
        self.clock.work(self.own[0] * self.steps.layer + self.steps.once * (self.own[0] > 0))
        seconds = self.steps.sweep.seconds(self.own[0])
        at = in_order(self.levels[0].rows, +1)
        seconds[at[0]] += self.steps.opening
        seconds[at[-1]] += self.steps.closing
        if self.direction < 0:
            seconds += self.own[0] * self.costs.add
        self.clock.pipeline(ranks, seconds, self.costs.state_bytes, portions)
        if self.direction > 0 and not self.costs.is_module:
            self.clock.collective(16 * portions)

    def _one_shot(self) -> None:
        """Design, 4.4: coarse sweep, fine relaxation, tau, coarse sweep; the last three repeated if inexact."""
        self._lagged(1)
        for _ in range(self.iterations):
            self._relax(0, self.steps.record)
            self._vectors(2 * self.points[0])  # tau += ends - predicted
            self._lagged(1)
            self._vectors(3 * self.points[0])  # how far the points have moved
            self.clock.work(self.steps.correct.seconds(self.points[0]))
            self._end(self.steps.check)
            self.clock.collective(16 * self.points[0].sum())

    def _lagged(self, index: int) -> None:
        """Solve a coarser level with its lagged tau: exactly on the coarsest, else by the same cycle again."""
        level = self.levels[index]
        if level.cfactor is None:
            self._sweep(index)
            self._vectors(self.own[index])  # the outputs
            return
        self._move(level.induced, level.rows)
        self._vectors(2 * self.own[index])  # by how much tau has changed
        for _ in range(COARSE_RELAXATIONS):
            self._lagged(index + 1)
            self._relax(index, self.steps.coarse)
            self._vectors(2 * self.points[index])  # tau
        self._vectors(self.own[index])  # the outputs
        for _ in ("inputs", "outputs"):
            self._move(level.rows, level.induced)

    def _cycles(self) -> None:
        """V- or F-cycles with a fixed number of iterations, from the C-points of an earlier solve."""
        self._relax(0, self.steps.relax)
        for iteration in range(self.iterations + 1):
            self._shift(0)
            self._vectors(2 * self.points[0])  # the norms of residual and state
            if iteration < self.iterations:
                last = iteration == self.iterations - 1
                self._cycle(0, self.plan.cycle, self.steps.record if last else self.steps.relax, shifted=True)
        self._end()
        self.clock.collective(16 * (self.iterations + 1) * self.points[0].sum())

    def _cycle(self, index: int, kind: str, step: StepCost, shifted: bool = False) -> None:
        for relaxation in range(self.plan.nrelax):
            if relaxation or not shifted:
                self._shift(index)
            self._relax(index, self.steps.coarse if index else self.steps.relax)
        # tau: coarse steps from the points, and a difference.
        self.clock.work(self.steps.coarse.seconds(self.points[index]))
        self._vectors(self.points[index])
        self._coarse_solve(index + 1, kind)
        self._relax(index, step)

    def _coarse_solve(self, index: int, kind: str) -> None:
        level = self.levels[index]
        if level.cfactor is None:
            self._sweep(index)
            return
        for _ in ("points", "tau"):
            self._move(level.induced, level.rows)
        self._vectors(self.points[index])
        self._relax(index, self.steps.coarse)
        for part in ("F", "V") if kind == "F" else ("V",):
            self._cycle(index, part, self.steps.coarse)
        self._move(level.rows, level.induced)

    def _make_levels(self) -> None:
        """The coarser propagators, and their rows where these change hands."""
        self.clock.work(sum(self.own[:-1], np.zeros(len(self.own[0]))) * self.costs.coarsen)
        row_bytes = self.costs.row_bytes + (self.costs.state_bytes if self.direction < 0 else 0)
        row_bytes *= 1 if self.plan.euler else 2  # for each evaluation of a layer
        for level in self.levels[1:]:
            self._move(level.induced, level.rows, row_bytes)

    def _relax(self, index: int, step: StepCost) -> None:
        """F-relaxation of the intervals owned by each rank."""
        self.clock.work(step.seconds(self.own[index]))

    def _sweep(self, index: int) -> None:
        """Rank after rank through a level."""
        step = self.steps.coarse_sweep if index else self.steps.sweep
        ranks = in_order(self.levels[index].rows, self.direction)
        self.clock.sweep(ranks, step.seconds(self.own[index]), self.costs.state_bytes)

    def _shift(self, index: int) -> None:
        """C-relaxation: the last end of each rank to the next one."""
        self._vectors(self.points[index])
        ranks = in_order(self.levels[index].rows, self.direction)
        self.clock.messages(ranks[:-1], ranks[1:], np.full(len(ranks) - 1, float(self.costs.state_bytes)))

    def _move(self, source: Partition, target: Partition, row_bytes: int | None = None) -> None:
        """Rows that change hands; states unless `row_bytes` says otherwise."""
        if source != target:
            sender, receiver, rows = moves(source, target)
            self.clock.messages(sender, receiver, rows * float(row_bytes or self.costs.state_bytes))

    def _end(self, check: float = 0.0) -> None:
        """Opening, classification and loss: counted on the rank where the states end."""
        seconds = np.zeros(len(self.own[0]))
        seconds[in_order(self.levels[0].rows, +1)[-1]] = self.steps.ends + check
        self.clock.work(seconds)

    def _vectors(self, number: np.ndarray) -> None:
        """So many passes over a state on each rank."""
        self.clock.work(number * self.costs.vector)
