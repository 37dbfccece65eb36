"""The lagged cycle: one fine relaxation between two coarse sweeps, with lagged tau."""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan
from typing import Any

import torch
from torch import Tensor

from xbraid_py import kernels
from xbraid_py.mgrit.levels import Levels, Solution
from xbraid_py.mgrit.norms import Size, Stop

# On a coarse level between the finest and the coarsest. One leaves an error that costs further fine relaxations.
COARSE_RELAXATIONS = 2


@dataclass(frozen=True)
class _Points:
    """What the solve of a coarse level gives, rows as the next finer level has them.

    `points` (K, *S) are the inputs of the steps, `outputs` (K, *S) what they make of them, tau included.
    """

    points: Tensor
    outputs: Tensor


class LaggedCycle(Levels):
    """A solve by lagged cycles; see `Levels`.

    tau of a level is what the last relaxation of the next finer one has found the coarse steps to be wrong by: it
    belongs to the weights of the last solve, and to the states there.
    """

    def run(self, warm: tuple[Tensor, ...] | None, max_iter: int, stop: Stop) -> Solution:
        """Up to `max_iter` relaxations, with the tau in `warm` (which is overwritten), or from tau = 0."""
        self.tau = warm or tuple(
            self.own[index].empty(level.rows.count(self.comm.rank) // level.factor).zero_()
            for index, level in enumerate(self.levels[:-1])
        )
        # tau that the last relaxation of a coarse level has added; that of level 0 is 0.
        self._added: list[Tensor | None] = [None] * len(self.levels)
        # 1. The coarse sweep, with the new weights and the old tau.
        coarse = self._coarse(1)
        sizes: list[Size] = []
        while True:
            # 2. One relaxation of the fine level from there, 3. the new tau and a second coarse sweep.
            ends = self.relax(0, coarse.points, None, record=True)
            coarse, change, fine_end = self._corrected(coarse, ends)
            end = None
            if fine_end is not None:
                end = coarse.outputs[self.last]
                at_end = self.norm.of_intervals(fine_end[None], end[None])[0]
                change[self.last] = self.norm.joined(change[self.last], at_end)
            found, measured = self.reduce([change], end, fine_end)
            sizes += found
            good = stop.met(sizes[-1]) and (self.monitor is None or self.monitor.suffices(measured))
            # With NaN nothing is gained by going on.
            if good or len(sizes) >= max_iter or isnan(sizes[-1].relative):
                return self.solution(self.tau, end, sizes, measured)

    def _corrected(self, coarse: _Points, ends: Tensor) -> tuple[_Points, Tensor, Tensor | None]:
        """The second coarse sweep, from the ends of the fine intervals (overwritten); what was recorded is corrected.

        Returns with it the shares of each interval in how far the corrected points are from those that the fine states
        start from, and on its owner the end of the last interval.
        """
        finest: Any = self.own[0]  # of a linear equation it is more than a Propagator
        linear, fine_end = None, None
        if self.levels[1].cfactor is None and hasattr(finest, "linear"):
            linear = finest.linear(self.own[1])
        if self.finishes(self.levels[0]):
            fine_end = ends[self.last]
        if linear is None:
            kernels.move(self.tau[0], ends, coarse.outputs)
            before, coarse = coarse, self._coarse(1)
            # What was recorded belongs to the points before the correction.
            finest.correct(before.points, coarse.points, self.induced[1])
            return coarse, self.norm.of_intervals(before.points, coarse.points), fine_end
        # Of a linear equation the changes are swept: that gives at once what they add to what was recorded.
        if fine_end is not None:
            fine_end = fine_end.clone()
        kernels.move(self.tau[0], ends, coarse.outputs, difference=ends)
        start = None
        if self.begins(self.levels[1]):
            assert self.start is not None
            start = torch.zeros_like(self.start)
        changes = _Points(*self.sweep(1, start, ends, linear=linear))
        finest.correct_by(linear)
        # Inputs and outputs share memory, but for the last output.
        change = self.norm.moved(coarse.points, changes.points)
        if len(ends):
            coarse.outputs[self.last].add_(changes.outputs[self.last])
        return coarse, change, fine_end

    def _coarse(self, index: int) -> _Points:
        """Solve u_{k+1} = Phi_H(u_k) + tau_k on a coarse level: exactly on the coarsest, else by this very cycle."""
        level, given = self.levels[index], self.tau[index - 1]
        if level.cfactor is None:
            return _Points(*self.sweep(index, self.start_at(level), given))
        tau = self.comm.redistribute(given, level.induced, level.rows)
        added = self._added[index]
        if added is not None:
            # tau of the next level belongs to the old tau of this one. To first order it changes by as much.
            change = tau - added
            for j in range(level.cfactor):
                self.tau[index].add_(change[j :: level.cfactor])
        self._added[index] = tau.clone() if tau is given else tau
        inputs = self.own[index].empty(len(tau))
        ends = inputs
        for _ in range(COARSE_RELAXATIONS):
            coarse = self._coarse(index + 1)
            ends = self.relax(index, coarse.points, tau, inputs=inputs)
            kernels.move(self.tau[index], ends, coarse.outputs)
        outputs = self._outputs(inputs, level.cfactor, ends)
        points, outputs = (self.comm.redistribute(rows, level.rows, level.induced) for rows in (inputs, outputs))
        return _Points(points, outputs)

    def _outputs(self, inputs: Tensor, cfactor: int, ends: Tensor) -> Tensor:
        """Outputs of the steps of intervals, from their inputs and the ends of the intervals."""
        if not len(inputs):
            return inputs
        outputs = torch.empty_like(inputs)
        if self.direction > 0:
            outputs[:-1] = inputs[1:]
            outputs[cfactor - 1 :: cfactor] = ends
        else:
            outputs[1:] = inputs[:-1]
            outputs[::cfactor] = ends
        return outputs
