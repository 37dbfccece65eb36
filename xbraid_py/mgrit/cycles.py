"""V- and F-cycles with F- or FCF-relaxation (paper 001, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor

from xbraid_py.mgrit.hierarchy import Level
from xbraid_py.mgrit.levels import Levels, Solution
from xbraid_py.mgrit.norms import Size, Stop


class Cycles(Levels):
    """A solve by cycles; see `Levels`."""

    def run(self, warm: tuple[Tensor, ...] | None, max_iter: int, stop: Stop) -> Solution:
        """Up to `max_iter` cycles, from the C-points in `warm`, or from the coarsest level."""
        finest = self.levels[0]
        points = warm[0].clone() if warm else self._cold_start(1)
        if self.begins(finest):
            assert self.start is not None
            points[self.first] = self.start
        ends = self.relax(0, points, None, record=max_iter == 0 or stop.watches)
        changes, sizes = [], []
        for iteration in range(max_iter + 1):
            shifted = self._shift(finest, points, ends)
            changes.append(self.norm.of_intervals(shifted, points))
            if stop.watches:
                sizes += self._size(changes[-1])
            if iteration == max_iter or (stop.watches and stop.met(sizes[-1])):
                break
            # Only the last sweep need be recorded; with a tolerance any may turn out to be it.
            record = iteration == max_iter - 1 or stop.watches
            points, ends = self._cycle(0, points, ends, None, self.options.cycle, shifted=shifted, record=record)
        end = ends[self.last] if self.finishes(finest) else None
        # With a fixed number of iterations nobody waits for the residuals: all of them in one message.
        found, measured = self.reduce([] if sizes else changes, end, None)
        return self.solution((points,), end, sizes or found, measured)

    def _size(self, change: Tensor) -> list[Size]:
        monitor, self.monitor = self.monitor, None
        found, _ = self.reduce([change], None, None)
        self.monitor = monitor
        return found

    def _cold_start(self, index: int) -> Tensor:
        """States of a level without an earlier solve, rows as the next finer level has them.

        They come from the coarsest one with tau = 0 everywhere; full multigrid makes a cycle on each level on the way.
        """
        level = self.levels[index]
        if level.cfactor is None:
            points = self.sweep(index, self.start_at(level), None)[0]
        else:
            points = self._cold_start(index + 1)
            inputs = self.own[index].empty(level.rows.count(self.comm.rank))
            if self.options.start == "full":
                self._cycle(index, points, self.relax(index, points, None), None, "V", inputs=inputs)
            else:
                self.relax(index, points, None, inputs=inputs)
            points = self.comm.redistribute(inputs, level.rows, level.induced)
        transfer = self.transfer_to(index)
        if transfer is None:
            return points
        points = transfer.interpolate(points)
        finer = self.levels[index - 1]
        if index > 1:
            start = self.start_at(finer)
            if self.begins(finer):
                assert start is not None
                points[self.first] = start
        return points

    def _cycle(self, index, points, ends, tau, kind, *, shifted=None, record=False, inputs=None):
        """One cycle on a level: from its C-points and the ends of its intervals to better ones.

        `shifted` are the C-points that `ends` propose, if they are known. The last relaxation is recorded
        by the propagator (`record`), or its states are written to `inputs`, if asked for.
        """
        level, weight = self.levels[index], self.options.c_weight
        for _ in range(level.nrelax):
            shifted = self._shift(level, points, ends) if shifted is None else shifted
            points = shifted if weight == 1.0 else points + weight * (shifted - points)
            shifted = None
            ends = self.relax(index, points, tau)
        # The three lines of FAS with injection in depth, design 4.2: tau_k = e_k - Phi_H(c_k), ...
        coarse, transfer = self.induced[index + 1], self.transfer_to(index + 1)
        restricted = points if transfer is None else transfer.restrict(points)
        coarse_tau = (ends if transfer is None else transfer.restrict(ends)) - coarse.step(restricted)
        self.work += self.levels[index + 1].num_steps * coarse.cost
        # ... u_{k+1} = Phi_H(u_k) + tau_k, c_k <- u_k (or c_k + P(u_k - R c_k), where states are coarsened).
        solved = self._coarse_solve(index + 1, restricted, coarse_tau, kind)
        points = solved if transfer is None else points + transfer.interpolate(solved - restricted)
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
