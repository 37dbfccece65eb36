"""Integers of a propagation along a sequence: its windows, its padding, and which rank owns which step."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layer_parallel.solves import Solvers
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.grid import LayerGrid


def padded(options: MGRIT, length: int) -> tuple[int, int]:
    """The least number of steps from `length` on that all coarsenings divide that `options` ask for, and the levels.

    Steps are added at the end where no factor divides a length; a level that would have fewer than `min_coarse` steps
    is not made.
    """
    steps, unit, level = length, 1, 0
    while True:
        if level == 0 and options.cycle == "lagged" and options.cfactor is None:
            # As many intervals as asked for, whatever the length.
            factor = options.cfactor_of(0, options.intervals * -(-steps // options.intervals))
        else:
            factor = options.cfactor_of(level, steps)
        if factor is None or -(-steps // factor) < options.min_coarse:
            return steps * unit, level + 1
        steps, unit, level = -(-steps // factor), unit * factor, level + 1


@dataclass(frozen=True)
class SequencePlan:
    """Who owns which steps of a sequence of `length` steps, cut in windows.

    Attributes
    ----------
    length : int
        Steps of the sequence.
    window : int
        Steps of a window, padding included; the last one may be padded by more.
    solvers : Solvers
        Of a window.
    """

    length: int
    window: int
    solvers: Solvers

    @classmethod
    def make(
        cls, options: MGRIT, adjoint: MGRIT, length: int, windows: int, dt: float, comm: Communicator
    ) -> SequencePlan:
        """The plan for `length` steps of size `dt` in so many windows, fewer if they would not have a step each."""
        wanted = -(-length // min(windows, length))
        window, levels = padded(options, wanted)
        options, adjoint = (replace(each, max_levels=levels) for each in (options, adjoint))
        return cls(length, window, Solvers(options, adjoint, LayerGrid(window, window * dt), comm))

    @property
    def partition(self) -> Partition:
        """Owners of the steps of a window."""
        return self.solvers.partition

    @cached_property
    def intervals(self) -> Partition:
        """Owners of the intervals of a window."""
        return self.solvers.hierarchy.intervals

    @property
    def num_windows(self) -> int:
        """Windows that have steps of the sequence."""
        return -(-self.length // self.window)

    def count(self, window: int) -> int:
        """Steps of the sequence in a window."""
        return min(self.window, self.length - window * self.window)

    def own(self, window: int, rank: int) -> range:
        """Steps of a window that belong to a rank and to the sequence."""
        first, last = self.partition.bounds[rank : rank + 2]
        count = self.count(window)
        return range(window * self.window + min(first, count), window * self.window + min(last, count))
