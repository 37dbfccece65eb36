"""What all cycles share: the propagators of a solve, relaxation, the sequential sweep, sums over ranks.

Row i of an array of a level holds the input of its step i. In the direction of propagation, interval k begins
at the C-point c_k and ends at e_k. On the states this is left to right, on the adjoints right to left.

Shape letters: `n` rows of a level owned here, `c` cfactor, `K = n / c` intervals owned here, `S` shape of a state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.mgrit.hierarchy import Hierarchy, Level
from xbraid_py.mgrit.norms import Norm, Size
from xbraid_py.mgrit.options import MGRIT
from xbraid_py.mgrit.protocols import Propagator, StateTransfer


class Monitor(Protocol):
    """What is computed from the output of a solve, and whether it is good enough."""

    def measure(self, end: Tensor | None, before: Tensor | None) -> Tensor:
        """Numbers (K, m), a row for each interval owned here; their sums over all intervals are what counts.

        `end` is the output of the last step, on its owner, and `before` what it was before the last correction, if
        there has been one.
        """
        ...

    def suffices(self, sums: Tensor) -> bool:
        """Whether the sums (m,) need no further iteration; the same on all ranks."""
        ...


@dataclass(frozen=True)
class Solution:
    """What a solve gives.

    Attributes
    ----------
    warm : tuple of Tensor
        What the next solve can start from: C-points (K, *S) of the finest level owned here (V- and F-cycles), or
        tau of all levels (lagged). Empty if there is only one level.
    end : (*S) tensor or None
        Output of the very last step, on its owner.
    residuals : list of float
        Relative residual before the first and after each iteration, in the norm of the options; with the lagged
        cycle, the relative error that is estimated after each. Empty for a sequential sweep.
    norms : list of float
        Norms of the same residuals.
    work : float
        Evaluations of a layer on all ranks together, coarse ones included.
    sweeps : int
        Relaxations of the finest level, or sequential sweeps through it.
    measured : (m,) tensor
        Sums of the monitor.
    """

    warm: tuple[Tensor, ...]
    end: Tensor | None
    residuals: list[float]
    norms: list[float]
    work: float
    sweeps: int
    measured: Tensor

    @property
    def residual(self) -> float:
        """Relative residual of the solution; 0 for a sequential sweep."""
        return self.residuals[-1] if self.residuals else 0.0


class Levels:
    """One solve: the propagators of all levels, and what is common to its cycles.

    Parameters
    ----------
    options, hierarchy, comm
        Of the solver.
    propagator : Propagator
        The steps of the finest level owned here.
    start : (*S) tensor
        Input of the first step, on the rank that owns it.
    monitor : Monitor, optional
    """

    def __init__(
        self,
        options: MGRIT,
        hierarchy: Hierarchy,
        comm: Communicator,
        propagator: Propagator,
        start: Tensor | None,
        monitor: Monitor | None = None,
    ):
        self.options, self.hierarchy, self.comm = options, hierarchy, comm
        self.levels = hierarchy.levels
        self.direction = propagator.direction
        self.start, self.monitor, self.norm = start, monitor, Norm(options.norm)
        self.work, self.sweeps = 0.0, 0
        # induced[l] has the rows of level l where the next finer level has them (for tau), own[l] where
        # level l is relaxed.
        self.own, self.induced = [propagator], [propagator]
        for finer, level in zip(self.levels, self.levels[1:], strict=False):
            how = options.coarse_weights, options.scheme, options.parts(finer.factor)
            coarse = self.own[-1].coarsen(finer.factor, *how)
            self.induced.append(coarse)
            moved = level.induced != level.rows
            self.own.append(coarse.redistribute(comm, level.induced, level.rows) if moved else coarse)

    def sequential(self) -> Solution:
        """The solution by one sweep: what there is to do with a single level."""
        _, outputs = self.sweep(0, self.start, None, record=True)
        end = outputs[self.last] if self.finishes(self.levels[0]) else None
        _, measured = self.reduce([], end, None)
        return self.solution((), end, [], measured)

    def solution(self, warm: tuple[Tensor, ...], end: Tensor | None, sizes: list[Size], measured: Tensor) -> Solution:
        """What the solve gives, with the sizes of its residuals."""
        relative, absolute = [size.relative for size in sizes], [size.absolute for size in sizes]
        return Solution(warm, end, relative, absolute, self.work, self.sweeps, measured)

    def relax(self, index: int, points: Tensor, tau: Tensor | None, *, record=False, inputs=None) -> Tensor:
        """F-relaxation: from the C-points (K, *S) of a level through their intervals to the ends (K, *S)."""
        level, propagator = self.levels[index], self.own[index]
        self.work += level.num_steps * propagator.cost
        self.sweeps += index == 0
        return propagator.relax(points, level.factor, tau, record, inputs)

    def sweep(self, index: int, start: Tensor | None, tau: Tensor | None, record: bool = False, linear=None):
        """Step through a level one row after the other, rank after rank.

        Returns the inputs and the outputs (n, *S) of the steps, which share memory. With `record`, on the finest level,
        the propagator keeps the states, no input is returned, and of the outputs only the last. With `linear` it is
        changes of the states that are swept, by that propagator, which is recorded.
        """
        level, propagator, rank = self.levels[index], linear or self.own[index], self.comm.rank
        count = level.rows.count(rank)
        self.work += level.num_steps * propagator.cost
        self.sweeps += index == 0
        if not count:
            return propagator.empty(0), propagator.empty(0)
        ahead = level.rows.neighbor(rank, self.direction)
        behind = level.rows.neighbor(rank, -self.direction)
        if behind is None:
            assert start is not None
            x = start[None]
        else:
            x = self.comm.recv(propagator.empty(1), behind)
        # Each output but the last is the input of the next step.
        states = propagator.empty(0 if record else count + 1)
        inputs, outputs = (states[:-1], states[1:]) if self.direction > 0 else (states[1:], states[:-1])
        end = propagator.relax(x, count, tau, record or linear is not None, None if record else inputs)
        if ahead is not None:
            self.comm.isend(end, ahead)()
        if record:
            return inputs, end
        outputs[self.last] = end[0]
        return inputs, outputs

    def transfer_to(self, index: int) -> StateTransfer | None:
        """How states come to a level from the next finer one; None if they are the same on both."""
        return self.own[index].transfer

    def start_at(self, level: Level) -> Tensor | None:
        """The first state on the rank where a level begins, which may be another than on the finest level."""
        first = 0 if self.direction > 0 else -1
        source, dest = (each.rows.owner(range(each.num_steps)[first]) for each in (self.levels[0], level))
        start = self.start
        if source != dest:
            if self.comm.rank == source:
                assert start is not None
                self.comm.isend(start.contiguous(), dest)()
            start = self.comm.recv(self.own[0].empty(1)[0], source) if self.comm.rank == dest else None
        if self.comm.rank == dest:
            assert start is not None
            for index in range(1, level.index + 1):
                if (transfer := self.transfer_to(index)) is not None:
                    start = transfer.restrict(start[None])[0]
        return start

    def reduce(self, changes: Sequence[Tensor], end: Tensor | None, before: Tensor | None) -> tuple[list[Size], Tensor]:
        """Sizes of changes, and the sums of the monitor; in one message, unless the norm is the largest number.

        `changes` are the shares (K, 2) of residual and state on each interval; see `Monitor.measure` for the rest.
        """
        counts = self.hierarchy.intervals.counts
        measured = [] if self.monitor is None else [self.monitor.measure(end, before)]
        apart = self.norm.kind == "max" and bool(changes)
        rows = measured if apart else [*changes, *measured]
        sums = self.comm.ordered_sum(torch.cat(rows, 1), counts) if rows else torch.empty(0)
        if apart:
            return self.norm.of_sums(self.norm.over_ranks(torch.cat(list(changes), 1), counts, self.comm)), sums
        split = 2 * len(changes)
        return self.norm.of_sums(sums[:split]), sums[split:]

    @property
    def first(self) -> int:
        """Row where propagation begins."""
        return 0 if self.direction > 0 else -1

    @property
    def last(self) -> int:
        """Row where propagation ends."""
        return -1 if self.direction > 0 else 0

    def begins(self, level: Level) -> bool:
        """Whether the propagation through a level begins on this rank."""
        rank = self.comm.rank
        return level.rows.count(rank) > 0 and level.rows.neighbor(rank, -self.direction) is None

    def finishes(self, level: Level) -> bool:
        """Whether the propagation through a level ends on this rank."""
        rank = self.comm.rank
        return level.rows.count(rank) > 0 and level.rows.neighbor(rank, self.direction) is None
