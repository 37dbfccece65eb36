"""The solver: relaxation, FAS coarse problem, cycles; forwards and backwards alike.

Row i of an array of a level holds the input of its step i. In the direction of propagation, interval k begins
at the C-point c_k and ends at e_k. On the states this is left to right, on the adjoints right to left.

Shape letters: `n` rows of a level owned here, `c` cfactor, `K = n / c` intervals owned here, `S` shape of a state.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.mgrit.hierarchy import Hierarchy, Level
from xbraid_py.mgrit.options import MGRIT
from xbraid_py.propagator import Propagator

# States of at most this many bytes are relaxed in one call: more would leave the second-level cache.
_CHUNK_BYTES = 1 << 19


@dataclass(frozen=True)
class Solution:
    """What a solve gives.

    Attributes
    ----------
    points : (K, *S) tensor
        C-points of the finest level owned here, for a warm start; none (K = 0) if there is only one level.
    end : (*S) tensor or None
        Output of the very last step, on its owner.
    residuals : list of float
        Relative residual before the first and after each iteration; empty for a sequential sweep.
    work : float
        Evaluations of a layer on all ranks together, coarse ones included.
    """

    points: Tensor
    end: Tensor | None
    residuals: list[float]
    work: float

    @property
    def residual(self) -> float:
        """Relative residual of the solution; 0 for a sequential sweep."""
        return self.residuals[-1] if self.residuals else 0.0


class Solver:
    """Solves u_{n+1} = Phi(u_n) on a hierarchy of levels over a communicator.

    Parameters
    ----------
    options : MGRIT
    hierarchy : Hierarchy
        Planned for `comm.size` ranks.
    comm : Communicator
    """

    def __init__(self, options: MGRIT, hierarchy: Hierarchy, comm: Communicator):
        if hierarchy.partition.num_ranks != comm.size:
            raise ValueError(
                f"the hierarchy is planned for {hierarchy.partition.num_ranks} ranks, the communicator has {comm.size}"
            )
        self.options, self.hierarchy, self.comm = options, hierarchy, comm

    def solve(
        self, propagator: Propagator, start: Tensor | None, guess: Tensor | None = None, max_iter: int | None = None
    ) -> Solution:
        """Solve with the given first state; the last sweep is recorded by the propagator.

        Parameters
        ----------
        propagator : Propagator
            The steps of the finest level owned here.
        start : (*S) tensor
            Input of the first step, on the rank that owns it; ignored elsewhere.
        guess : (K, *S) tensor, optional
            C-points of an earlier solve. Without it the solve starts from the coarsest level.
        max_iter : int, optional
            Make up to this many iterations if the options ask for fewer.
        """
        return _Solve(self, propagator, start).run(guess, max(self.options.max_iter, max_iter or 0))


class _Solve:
    """One solve: the propagators of all levels, and what is common to its cycles."""

    def __init__(self, solver: Solver, propagator: Propagator, start: Tensor | None):
        self.options, self.comm = solver.options, solver.comm
        self.levels = solver.hierarchy.levels
        self.direction = propagator.direction
        self.start = start
        self.work = 0.0
        # induced[l] has the rows of level l where the next finer level has them (for tau), own[l] where
        # level l is relaxed.
        self.own, self.induced = [propagator], [propagator]
        for finer, level in zip(self.levels, self.levels[1:], strict=False):
            coarse = self.own[-1].coarsen(finer.cfactor, self.options.coarse_weights, self.options.coarse_step)
            self.induced.append(coarse)
            moved = level.induced != level.rows
            self.own.append(coarse.redistribute(self.comm, level.induced, level.rows) if moved else coarse)

    def run(self, guess: Tensor | None, max_iter: int) -> Solution:
        finest, tol = self.levels[0], self.options.tol
        if finest.cfactor is None:
            _, end = self._sweep(0, self.start, None, record=True)
            return Solution(self.own[0].empty(0), end, [], self.work)
        points = self._cold_start(1) if guess is None else guess.clone()
        if self._begins(finest):
            points[self._first] = self.start
        ends = self._relax(0, points, None, record=max_iter == 0 or tol > 0)
        norms, residuals = [], []
        for iteration in range(max_iter + 1):
            shifted = self._shift(finest, points, ends)
            norms.append(_squares(shifted - points, points))
            if tol > 0:
                residuals += self._residuals(norms[-1:])
            if iteration == max_iter or (tol > 0 and residuals[-1] <= tol):
                break
            # Only the last sweep need be recorded; with a tolerance any may turn out to be it.
            record = iteration == max_iter - 1 or tol > 0
            points, ends = self._cycle(0, points, ends, None, self.options.cycle, shifted=shifted, record=record)
        # With a fixed number of iterations nobody waits for the residuals: all of them in one message.
        residuals = residuals or self._residuals(norms)
        return Solution(points, ends[self._last] if self._finishes(finest) else None, residuals, self.work)

    def _cold_start(self, index: int) -> Tensor:
        """States of a level from the coarsest one alone: tau = 0 everywhere."""
        level = self.levels[index]
        if level.cfactor is None:
            return self._sweep(index, self._start_at(level), None)[0]
        points = self._cold_start(index + 1)
        inputs = self.own[index].empty(level.rows.count(self.comm.rank))
        self._relax(index, points, None, inputs=inputs)
        return self.comm.redistribute(inputs, level.rows, level.induced)

    def _start_at(self, level: Level) -> Tensor | None:
        """The first state on the rank where a level begins, which may be another than on the finest level."""
        first = 0 if self.direction > 0 else -1
        source, dest = (each.rows.owner(range(each.num_steps)[first]) for each in (self.levels[0], level))
        if source == dest:
            return self.start
        if self.comm.rank == source:
            self.comm.isend(self.start.contiguous(), dest)()
        return self.comm.recv(self.own[0].empty(1)[0], source) if self.comm.rank == dest else None

    def _cycle(self, index, points, ends, tau, kind, *, shifted=None, record=False, inputs=None):
        """One cycle on a level: from its C-points and the ends of its intervals to better ones.

        `shifted` are the C-points that `ends` propose, if they are known. The last relaxation is recorded
        by the propagator (`record`), or its states are written to `inputs`, if asked for.
        """
        level = self.levels[index]
        for _ in range(level.nrelax):
            points = self._shift(level, points, ends) if shifted is None else shifted
            shifted = None
            ends = self._relax(index, points, tau)
        # The three lines of FAS with injection in depth, design 4.2: tau_k = e_k - Phi_H(c_k), ...
        coarse = self.induced[index + 1]
        coarse_tau = ends - coarse.step(points, slice(None))
        self.work += self.levels[index + 1].num_steps * coarse.cost
        # ... u_{k+1} = Phi_H(u_k) + tau_k, c_k <- u_k.
        points = self._coarse_solve(index + 1, points, coarse_tau, kind)
        return points, self._relax(index, points, tau, record=record, inputs=inputs)

    def _coarse_solve(self, index: int, u: Tensor, tau: Tensor, kind: str) -> Tensor:
        """Solve u_{k+1} = Phi_H(u_k) + tau_k for the rows of a level: exactly on the coarsest, else by a cycle."""
        level = self.levels[index]
        if level.cfactor is None:
            return self._sweep(index, u[self._first] if len(u) else None, tau)[0]
        inputs = self.comm.redistribute(u, level.induced, level.rows)
        tau = self.comm.redistribute(tau, level.induced, level.rows)
        if inputs is u:
            inputs = u.clone()
        points = inputs[self._at(level, 0)].clone()
        ends = self._relax(index, points, tau)
        # An F-cycle solves the coarse problem by an F-cycle and then a V-cycle.
        for part in ("F", "V") if kind == "F" else ("V",):
            points, ends = self._cycle(index, points, ends, tau, part, inputs=inputs)
        return self.comm.redistribute(inputs, level.rows, level.induced)

    def _sweep(self, index: int, start: Tensor | None, tau: Tensor | None, record: bool = False):
        """Step through a level one row after the other, rank after rank; its inputs, and the last output.

        With `record`, on the finest level, the propagator keeps the states, and the inputs are not returned.
        """
        level, propagator, rank = self.levels[index], self.own[index], self.comm.rank
        count = level.rows.count(rank)
        inputs = propagator.empty(0 if record else count)
        self.work += level.num_steps * propagator.cost
        if not count:
            return inputs, None
        ahead = level.rows.neighbour(rank, self.direction)
        behind = level.rows.neighbour(rank, -self.direction)
        x = start[None] if behind is None else self.comm.recv(propagator.empty(1), behind)
        step = propagator.record if record else propagator.step
        for i in range(count)[:: self.direction]:
            here = slice(i, i + 1)
            if not record:
                inputs[here] = x
                if ahead is None and i == range(count)[self._last]:
                    break  # nobody asks for the output of the very last coarse step
            x = step(x, here)
            if tau is not None:
                x += tau[here]
        if ahead is not None:
            self.comm.isend(x, ahead)()
        return inputs, x[0] if ahead is None else None

    def _relax(self, index, points, tau, *, record=False, inputs=None) -> Tensor:
        """F-relaxation: from the C-points through their intervals to the ends, some intervals at a time."""
        level, propagator = self.levels[index], self.own[index]
        self.work += level.num_steps * propagator.cost
        step = propagator.record if record else propagator.step
        ends = torch.empty_like(points)
        chunk = max(1, _CHUNK_BYTES // max(1, points[:1].nbytes))
        for k in range(0, len(points), chunk):
            x = points[k : k + chunk]
            for j in range(level.cfactor):
                at = self._at(level, j, k, k + len(x))
                if inputs is not None:
                    inputs[at] = x
                x = step(x, at)
                if tau is not None:
                    x += tau[at]
            ends[k : k + chunk] = x
        return ends

    def _shift(self, level: Level, points: Tensor, ends: Tensor) -> Tensor:
        """C-relaxation: c_{k+1} <- e_k; the first C-point stays."""
        if not len(points):
            return points
        shifted = torch.empty_like(points)
        if self.direction > 0:
            shifted[1:] = ends[:-1]
        else:
            shifted[:-1] = ends[1:]
        received = self.comm.shift(ends[self._last], level.rows, self.direction)
        shifted[self._first] = points[self._first] if received is None else received
        return shifted

    def _residuals(self, norms: list[Tensor]) -> list[float]:
        """Relative residuals from the squares of residual and state on each interval, in one message."""
        finest = self.levels[0]
        counts = finest.rows.coarsen(finest.cfactor).counts
        sums = self.comm.ordered_sum(torch.stack(norms, 1), counts)
        return [float((r / s.clamp_min(torch.finfo(s.dtype).tiny)).sqrt()) for r, s in sums.unbind(0)]

    def _at(self, level: Level, j: int, first: int = 0, stop: int | None = None) -> slice:
        """Rows of the j-th step, in the direction of propagation, of intervals `first` to `stop`."""
        c = level.cfactor
        offset = j if self.direction > 0 else c - 1 - j
        return slice(first * c + offset, None if stop is None else stop * c, c)

    @property
    def _first(self) -> int:
        return 0 if self.direction > 0 else -1

    @property
    def _last(self) -> int:
        return -1 if self.direction > 0 else 0

    def _begins(self, level: Level) -> bool:
        rank = self.comm.rank
        return level.rows.count(rank) > 0 and level.rows.neighbour(rank, -self.direction) is None

    def _finishes(self, level: Level) -> bool:
        rank = self.comm.rank
        return level.rows.count(rank) > 0 and level.rows.neighbour(rank, self.direction) is None


def _squares(residual: Tensor, points: Tensor) -> Tensor:
    """Squared 2-norms (K, 2) of residual and state on each interval."""
    return torch.stack([residual.square().flatten(1).sum(1), points.square().flatten(1).sum(1)], 1)
