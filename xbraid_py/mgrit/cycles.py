"""V- and F-cycles with F- or FCF-relaxation (paper 001, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from xbraid_py.mgrit.hierarchy import Level
from xbraid_py.mgrit.levels import Levels, Solution, squares


class Cycles(Levels):
    """A solve by cycles; see `Levels`."""

    def run(self, warm: tuple[Tensor, ...] | None, max_iter: int, tol: float) -> Solution:
        """Up to `max_iter` cycles, from the C-points in `warm`, or from the coarsest level."""
        finest = self.levels[0]
        points = warm[0].clone() if warm else self._cold_start(1)
        if self.begins(finest):
            points[self.first] = self.start
        ends = self.relax(0, points, None, record=max_iter == 0 or tol > 0)
        changes, residuals = [], []
        for iteration in range(max_iter + 1):
            shifted = self._shift(finest, points, ends)
            changes.append(squares(shifted, points))
            if tol > 0:
                residuals += self._residual(changes[-1])
            if iteration == max_iter or (tol > 0 and residuals[-1] <= tol):
                break
            # Only the last sweep need be recorded; with a tolerance any may turn out to be it.
            record = iteration == max_iter - 1 or tol > 0
            points, ends = self._cycle(0, points, ends, None, self.options.cycle, shifted=shifted, record=record)
        end = ends[self.last] if self.finishes(finest) else None
        # With a fixed number of iterations nobody waits for the residuals: all of them in one message.
        found, measured = self.reduce([] if residuals else changes, end, None)
        return Solution((points,), end, residuals or found, self.work, self.sweeps, measured)

    def _residual(self, change: Tensor) -> list[float]:
        monitor, self.monitor = self.monitor, None
        found, _ = self.reduce([change], None, None)
        self.monitor = monitor
        return found

    def _cold_start(self, index: int) -> Tensor:
        """States of a level from the coarsest one alone: tau = 0 everywhere."""
        level = self.levels[index]
        if level.cfactor is None:
            return self.sweep(index, self.start_at(level), None)[0]
        points = self._cold_start(index + 1)
        inputs = self.own[index].empty(level.rows.count(self.comm.rank))
        self.relax(index, points, None, inputs=inputs)
        return self.comm.redistribute(inputs, level.rows, level.induced)

    def _cycle(self, index, points, ends, tau, kind, *, shifted=None, record=False, inputs=None):
        """One cycle on a level: from its C-points and the ends of its intervals to better ones.

        `shifted` are the C-points that `ends` propose, if they are known. The last relaxation is recorded
        by the propagator (`record`), or its states are written to `inputs`, if asked for.
        """
        level = self.levels[index]
        for _ in range(level.nrelax):
            points = self._shift(level, points, ends) if shifted is None else shifted
            shifted = None
            ends = self.relax(index, points, tau)
        # The three lines of FAS with injection in depth, design 4.2: tau_k = e_k - Phi_H(c_k), ...
        coarse = self.induced[index + 1]
        coarse_tau = ends - coarse.step(points)
        self.work += self.levels[index + 1].num_steps * coarse.cost
        # ... u_{k+1} = Phi_H(u_k) + tau_k, c_k <- u_k.
        points = self._coarse_solve(index + 1, points, coarse_tau, kind)
        return points, self.relax(index, points, tau, record=record, inputs=inputs)

    def _coarse_solve(self, index: int, u: Tensor, tau: Tensor, kind: str) -> Tensor:
        """Solve u_{k+1} = Phi_H(u_k) + tau_k for the rows of a level: exactly on the coarsest, else by a cycle."""
        level = self.levels[index]
        if level.cfactor is None:
            return self.sweep(index, u[self.first] if len(u) else None, tau)[0]
        inputs = self.comm.redistribute(u, level.induced, level.rows)
        tau = self.comm.redistribute(tau, level.induced, level.rows)
        # The C-points of the level are overwritten as inputs of its steps, with themselves.
        points = inputs[level.begin(self.direction)].clone()
        if inputs is u:
            inputs = torch.empty_like(u)
        ends = self.relax(index, points, tau)
        # An F-cycle solves the coarse problem by an F-cycle and then a V-cycle.
        for part in ("F", "V") if kind == "F" else ("V",):
            points, ends = self._cycle(index, points, ends, tau, part, inputs=inputs)
        return self.comm.redistribute(inputs, level.rows, level.induced)

    def _shift(self, level: Level, points: Tensor, ends: Tensor) -> Tensor:
        """C-relaxation: c_{k+1} <- e_k; the first C-point stays."""
        if not len(points):
            return points
        finish = self.comm.begin_shift(ends[self.last], level.rows, self.direction)
        shifted = torch.empty_like(points)
        if self.direction > 0:
            shifted[1:] = ends[:-1]
        else:
            shifted[:-1] = ends[1:]
        received = finish()
        shifted[self.first] = points[self.first] if received is None else received
        return shifted
