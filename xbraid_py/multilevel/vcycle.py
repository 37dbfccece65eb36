"""MG/OPT (paper 000, algorithm 1): cycles over coupled objectives.

Shape letters: `L` levels. Lists over the levels begin with the finest, level 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from xbraid_py.comm.base import present
from xbraid_py.multilevel.schedule import CYCLES, Schedule
from xbraid_py.optim import Armijo
from xbraid_py.optim.levels import Point, Smoother
from xbraid_py.optim.objective import Objective, ShiftedObjective


class Transfer(Protocol):
    """What a cycle knows of two neighboring levels."""

    def prolong(self, x: Tensor) -> Tensor:
        """I x: a correction, or weights, of the coarse level on the fine one."""
        ...

    def restrict(self, x: Tensor) -> Tensor:
        """Weights of the fine level on the coarse one."""
        ...

    def restrict_gradient(self, gradient: Tensor) -> Tensor:
        """R g with R = I^T: a gradient of the fine level on the coarse one."""
        ...

    def renewed(self, x: Tensor) -> Transfer:
        """The transfer at the weights x of its fine level; itself where it does not depend on them."""
        return self


class ComposedTransfer(Transfer):
    """Transfers one after the other, the finest first: a coarse network that is narrower and shallower, for one.

    Parameters
    ----------
    parts : sequence of Transfer
    """

    def __init__(self, parts: Sequence[Transfer]):
        self.parts = tuple(parts)

    def renewed(self, x: Tensor) -> ComposedTransfer:
        found = []
        for part in self.parts:
            found.append(part.renewed(x))
            x = found[-1].restrict(x)
        return ComposedTransfer(found)

    def restrict(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part.restrict(x)
        return x

    def restrict_gradient(self, gradient: Tensor) -> Tensor:
        for part in self.parts:
            gradient = part.restrict_gradient(gradient)
        return gradient

    def prolong(self, x: Tensor) -> Tensor:
        for part in reversed(self.parts):
            x = part.prolong(x)
        return x


@dataclass(frozen=True)
class Damping:
    """Factors that keep a cycle stable (paper 002, section 6.1.4).

    Parameters
    ----------
    coupling
        gamma, of the coupling term dg (there: of the tau correction).
    correction
        alpha_p, of the correction of the weights.
    momentum
        alpha_m, of the correction of the momentum (eq. 36). With 0 each level keeps its own momentum; otherwise a level
        begins with the restricted one of the finer level, and what it changes there is prolonged and added.
    """

    coupling: float = 1.0
    correction: float = 1.0
    momentum: float = 0.0

    def __post_init__(self):
        for name in ("coupling", "correction", "momentum"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]; use {getattr(Damping, name)}")


UNDAMPED = Damping()


class VCycle:
    """Cycles of MG/OPT on any objectives and transfers.

    On level l the cycle makes steps on H^l (eq. 9), restricts weights and gradient, and minimizes

        H^{l-1}(x) = L^{l-1}(x) + <dg, x>,   dg = R grad H^l(x^l) - grad L^{l-1}(x^{l-1,0}),

    on the coarser level (in the paper's numbers, where the coarsest level is 1), so that the gradient there begins as
    the restricted one. What the coarse weights have changed by is prolonged and added.

    Parameters
    ----------
    objectives : sequence of L Objective
    transfers : sequence of L - 1 Transfer
        The l-th between the levels l and l + 1; at every restriction it is renewed at the weights there.
    smoothers : sequence of L Smoother
    pre, post : sequence of L - 1 int
        Steps on the way down and up.
    coarse : int
        Steps on the coarsest level.
    cycle : {"V", "W"}
        Visits to the next coarser level: one, or two one after the other (one to the coarsest).
    line_search : Armijo, optional
        How far to go along the prolonged correction; not at all where that is no descent. Without it the correction
        is added as it is.
    damping : Damping
        Factors of the coupling term, of the correction and of what is carried of the momentum.

    Raises
    ------
    ValueError
        If the lists do not fit each other.
    """

    def __init__(
        self,
        objectives: Sequence[Objective],
        transfers: Sequence[Transfer],
        smoothers: Sequence[Smoother],
        pre: Sequence[int],
        post: Sequence[int],
        coarse: int,
        *,
        cycle: str = "V",
        line_search: Armijo | None = None,
        damping: Damping = UNDAMPED,
    ):
        self.schedule = Schedule(tuple(pre), tuple(post), coarse)
        levels = len(objectives)
        for name, given, wanted in (
            ("transfers", len(transfers), levels - 1),
            ("smoothers", len(smoothers), levels),
            ("pre", len(pre), levels - 1),
        ):
            if given != wanted:
                raise ValueError(f"len({name})={given} must be {wanted} for {levels} levels; use {wanted}")
        if cycle not in CYCLES:
            raise ValueError(f"cycle={cycle!r} must be {' or '.join(CYCLES)}; use V")
        self.objectives, self.transfers, self.smoothers = tuple(objectives), list(transfers), tuple(smoothers)
        self.cycle, self.line_search, self.damping = cycle, line_search, damping

    @property
    def levels(self) -> int:
        """L."""
        return len(self.objectives)

    def run(self, point: Point) -> Point:
        """One cycle from weights of the finest level.

        The finest objective's `evaluate` is not called at the new weights, unless a line search has.
        """
        return self._cycle(0, None, point)

    def full_multigrid(self, x: Tensor, cycles: int = 1) -> Point:
        """A full-multigrid start: nested iteration with so many cycles on each level before it is refined.

        `x`, weights of the finest level, are restricted to the coarsest one; from there the weights are prolonged
        (paper 001, algorithm 1), and every level is cycled over with the levels below it.
        """
        for level in range(self.levels - 1):
            self.transfers[level] = self.transfers[level].renewed(x)
            x = self.transfers[level].restrict(x)
        point = self._cycle(self.levels - 1, None, Point(x))
        for level in reversed(range(self.levels - 1)):
            point = Point(self.transfers[level].prolong(point.x))
            for _ in range(cycles):
                point = self._cycle(level, None, point)
        return point

    def coupled(self, level: int, point: Point) -> tuple[Objective, Point]:
        """The objective of the level below a complete point of `level`, and where it starts, complete as well.

        Without coupling the objective is the level's own, and nothing is computed.
        """
        transfer, coarse = self.transfers[level], self.objectives[level + 1]
        if not self.damping.coupling:
            return coarse, Point(transfer.restrict(point.x))
        assert point.gradient is not None
        restricted = transfer.restrict_gradient(point.gradient)
        start = Point(transfer.restrict(point.x)).complete(coarse)
        assert start.gradient is not None and start.evaluation is not None
        shift = self.damping.coupling * (restricted - start.gradient)  # eq. 9
        objective = ShiftedObjective(coarse, shift)
        # grad H there is known: undamped, the restricted gradient. The first step costs none.
        gradient = restricted if self.damping.coupling == 1.0 else start.gradient + shift
        return objective, Point(start.x, objective.shifted(start.x, start.evaluation), gradient)

    def _cycle(self, level: int, objective: Objective | None, point: Point) -> Point:
        """Algorithm 1 on a level, for its own objective or the given coupled one."""
        objective = self.objectives[level] if objective is None else objective
        smoother, schedule = self.smoothers[level], self.schedule
        if level == self.levels - 1:
            return smoother.minimize(objective, point, schedule.coarse)
        point = smoother.minimize(objective, point, schedule.pre[level])
        self.transfers[level] = self.transfers[level].renewed(point.x)
        point = self._ready(level, objective, point)
        below, start = self.coupled(level, point)
        sent = self._send_momentum(level)
        end = start
        for _ in range(1 if level + 1 == self.levels - 1 else CYCLES[self.cycle]):
            end = self._cycle(level + 1, below, end)
        self._take_back_momentum(level, sent)
        point = self._corrected(objective, point, self.transfers[level].prolong(end.x - start.x))
        return smoother.minimize(objective, point, schedule.post[level])

    def _ready(self, level: int, objective: Objective, point: Point) -> Point:
        """A point with all that the level below is to know of it."""
        return point.complete(objective)

    def _send_momentum(self, level: int) -> Tensor | None:
        """Restrict the momentum of a level to the next coarser one: what was sent, if anything."""
        fine, coarse = self.smoothers[level], self.smoothers[level + 1]
        if not self.damping.momentum or fine.momentum is None or not coarse.takes_momentum:
            return None
        sent = self.transfers[level].restrict(fine.momentum)
        coarse.momentum = sent
        return sent

    def _take_back_momentum(self, level: int, sent: Tensor | None) -> None:
        """Add what the coarser level has changed of the momentum (paper 002, eq. 36)."""
        if sent is None:
            return
        fine, coarse = self.smoothers[level], self.smoothers[level + 1]
        change = self.transfers[level].prolong(present(coarse.momentum) - sent)
        fine.momentum = present(fine.momentum) + self.damping.momentum * change

    def _corrected(self, objective: Objective, point: Point, correction: Tensor) -> Point:
        if self.damping.correction != 1.0:
            correction = self.damping.correction * correction
        if self.line_search is None:
            return Point(point.x + correction)
        assert point.gradient is not None and point.evaluation is not None
        slope = -float(objective.dots([point.gradient], [correction])[0, 0])
        trial = self.line_search.search(
            point.x,
            point.evaluation.value,
            -correction,
            slope,
            lambda x, error: objective.evaluate(x, None, error),
        )
        return point if trial is None else Point(trial.x, trial.evaluation)
