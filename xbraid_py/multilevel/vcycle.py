"""MG/OPT (paper 000, algorithm 1): the steps of a cycle on each level, and cycles over coupled objectives.

Shape letters: `L` levels. Lists over the levels begin with the finest, level 0.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from torch import Tensor

from xbraid_py.optim import Armijo
from xbraid_py.optim.levels import LevelOptimizer, Point
from xbraid_py.optim.objective import Objective, ShiftedObjective

CYCLES = {"V": 1, "W": 2}  # visits to the next coarser level
MOST_LEVELS = 64  # of which each has half as much as the one above it
_EXAMPLE = "[(1), 1, 1, 2, 2, {2}]"
_ENTRY = re.compile(r"(?P<both>\d+)|\((?P<down>\d+)\)|(?P<pre>\d+)/(?P<post>\d+)|\{(?P<coarse>\d+)\}")


@dataclass(frozen=True)
class Schedule:
    """Steps of the level optimizers in the list notation of paper 000 (section 4), and their cost.

    Parameters
    ----------
    pre, post : tuple of int
        mu_1 and mu_2, on the way down and up, of all levels but the coarsest.
    coarse : int
        Steps on the coarsest level, at least 1.
    """

    pre: tuple[int, ...]
    post: tuple[int, ...]
    coarse: int

    def __post_init__(self):
        if len(self.pre) != len(self.post):
            raise ValueError(
                f"pre={list(self.pre)} and post={list(self.post)} must have one number for each level but the "
                f"coarsest; use post={[0] * len(self.pre)}"
            )
        for name in ("pre", "post"):
            if any(steps < 0 for steps in getattr(self, name)):
                raise ValueError(f"{name}={list(getattr(self, name))} must all be at least 0; use 1")
        if self.coarse < 1:
            raise ValueError(f"coarse={self.coarse} must be at least 1; use 2")

    @property
    def levels(self) -> int:
        """L."""
        return len(self.pre) + 1

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read `[(1), 1, 1, 2, 2, {2}]`, the finest level first; `ValueError` for another form names the entry.

        `n` are n steps on the way down and n on the way up, `(n)` none on the way up, `{n}` those of the coarsest
        level. `m/n`, which the paper has not, are m on the way down and n on the way up.
        """
        words = text.strip()
        if not (words.startswith("[") and words.endswith("]")):
            raise ValueError(f"schedule={text!r} must be a list in square brackets; use {_EXAMPLE}")
        entries = [word.strip() for word in words[1:-1].split(",")]
        found = [_ENTRY.fullmatch("".join(word.split())) for word in entries]
        for number, (word, entry) in enumerate(zip(entries, found, strict=True), 1):
            if entry is None:
                raise ValueError(
                    f"schedule={text!r}: entry {number}, {word!r}, must be n, (n), m/n or, for the coarsest level, "
                    f"{{n}}; use {_EXAMPLE}"
                )
            if (entry["coarse"] is None) == (number == len(entries)):
                raise ValueError(
                    f"schedule={text!r}: entry {number}, {word!r}: the last entry and no other stands in curly "
                    f"brackets, for the coarsest level; use {_EXAMPLE}"
                )
        above = [entry.groupdict() for entry in found[:-1]]
        return cls(
            tuple(int(entry["both"] or entry["down"] or entry["pre"]) for entry in above),
            tuple(int(entry["both"] or entry["post"] or 0) for entry in above),
            int(found[-1]["coarse"]),
        )

    @classmethod
    def of_paper(cls, levels: int) -> Self:
        """The setup of table 1: two steps on the coarser half of the levels, one on the others, (1) on the finest."""
        if levels < 1:
            raise ValueError(f"levels={levels} must be at least 1; use 8")
        if levels == 1:
            return cls((), (), 1)
        # The paper counts from the coarsest level, 1: those up to L/2 make two steps.
        pre = tuple(2 if levels - index <= levels / 2 else 1 for index in range(levels - 1))
        return cls((1, *pre[1:]), (0, *pre[1:]), 2)

    def __str__(self) -> str:
        return f"[{', '.join([*map(_entry, self.pre, self.post), f'{{{self.coarse}}}'])}]"

    def below(self, level: int) -> Schedule:
        """The schedule of the levels from `level` on (0 is the finest)."""
        return Schedule(self.pre[level:], self.post[level:], self.coarse)

    def work(self, cycle: str = "V", costs: Sequence[float] | None = None) -> float:
        """Work units of a cycle, one being a gradient on the finest level (paper 000, eq. 10).

        Each level makes its steps and one gradient more, for the coupling term below it; the gradient that the
        coupling term above it needs is that of its own first step. With W-cycles level l is visited 2^l times.
        `costs` are those of a gradient on each level; by default a level costs half of the finer one.
        """
        visits = CYCLES[cycle]
        last = self.levels - 1
        costs = [0.5**level for level in range(self.levels)] if costs is None else costs
        work = self.coarse * visits ** max(0, last - 1) * costs[last]
        for level, (pre, post) in enumerate(zip(self.pre, self.post, strict=True)):
            work += (pre + post + 1) * visits**level * costs[level]  # eq. 10
        return work

    def full_multigrid_work(self, cycles: int, cycle: str = "V", costs: Sequence[float] | None = None) -> float:
        """Work units of a full-multigrid start with so many cycles on each level."""
        costs = [0.5**level for level in range(self.levels)] if costs is None else costs
        starts = (cycles * self.below(level).work(cycle, costs[level:]) for level in range(self.levels - 1))
        return sum(starts) + self.coarse * costs[-1]


def _entry(pre: int, post: int) -> str:
    if pre == post:
        return f"{pre}"
    return f"({pre})" if post == 0 else f"{pre}/{post}"


class Transfer(Protocol):
    """What a cycle knows of two neighboring levels."""

    def prolong(self, x: Tensor) -> Tensor:
        """I x: a correction, or weights, of the coarse level on the fine one."""

    def restrict(self, x: Tensor) -> Tensor:
        """Weights of the fine level on the coarse one."""

    def restrict_gradient(self, gradient: Tensor) -> Tensor:
        """R g with R = I^T: a gradient of the fine level on the coarse one."""

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
    smoothers : sequence of L LevelOptimizer
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
        smoothers: Sequence[LevelOptimizer],
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
        restricted = transfer.restrict_gradient(point.gradient)
        start = Point(transfer.restrict(point.x)).complete(coarse)
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
        change = self.transfers[level].prolong(coarse.momentum - sent)
        fine.momentum = fine.momentum + self.damping.momentum * change

    def _corrected(self, objective: Objective, point: Point, correction: Tensor) -> Point:
        if self.damping.correction != 1.0:
            correction = self.damping.correction * correction
        if self.line_search is None:
            return Point(point.x + correction)
        slope = -float(objective.dots([point.gradient], [correction])[0, 0])
        trial = self.line_search.search(
            point.x,
            point.evaluation.value,
            -correction,
            slope,
            lambda x, error: objective.evaluate(x, None, error),
        )
        return point if trial is None else Point(trial.x, trial.evaluation)
