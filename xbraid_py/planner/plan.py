"""How a solve is set up, as the planner varies it: cycle, coarsening factors, iterations."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from xbraid_py.mgrit import MGRIT, Hierarchy
from xbraid_py.mgrit.grid import LayerGrid


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Cycle and levels of the solves of an update.

    Parameters
    ----------
    cycle
        serial (one layer after the other), lagged (design, 4.4), V or F.
    cfactors
        Coarsening factors, the finest first; none for serial propagation.
    nrelax
        CF-relaxations after the F-relaxation, of V- and F-cycles: 0 is F, 1 is FCF.
    iterations, adjoint_iterations
        Iterations of V- and F-cycles, fine sweeps of the lagged cycle, of the state and of the adjoint solves.
    euler
        Coarse steps by one step of forward Euler, instead of the cycle's own of two evaluations of a layer.
    """

    cycle: Literal["serial", "lagged", "V", "F"] = "lagged"
    cfactors: tuple[int, ...] = ()
    nrelax: int = 1
    iterations: int = 1
    adjoint_iterations: int = 1
    euler: bool = False

    def __post_init__(self):
        if self.cycle not in ("serial", "lagged", "V", "F"):
            raise ValueError(f"cycle={self.cycle!r} must be serial, lagged, V or F; use lagged")
        if (self.cycle == "serial") != (not self.cfactors):
            raise ValueError(
                f"cfactors={self.cfactors}: serial propagation has none, cycle={self.cycle!r} has one or more; use (4,)"
            )
        if self.cycle != "serial" and min(self.iterations, self.adjoint_iterations) < 1:
            raise ValueError(
                f"iterations={self.iterations}, adjoint_iterations={self.adjoint_iterations} must be at least 1; use 1"
            )

    @property
    def coarsest(self) -> int:
        """By how much the coarsest level has fewer steps than the finest."""
        return prod(self.cfactors)

    def hierarchy(self, num_layers: int, num_ranks: int) -> Hierarchy:
        """The levels at a depth; their step sizes mean nothing.

        Raises
        ------
        ValueError
            If a coarsening factor does not divide the steps of its level.
        """
        return _hierarchy(self.cfactors, num_layers, num_ranks)

    def options(self, num_layers: int) -> MGRIT:
        """The options of the solvers for a depth.

        Where it can be said so, in intervals instead of coarsening factors: that fits other depths as well.
        """
        if self.cycle == "serial":
            return MGRIT(max_levels=1)
        common = {"cycle": self.cycle, "max_levels": len(self.cfactors) + 1, "min_coarse": 2}
        if self.euler:
            common |= {"coarse_step": "euler", "coarse_parts": 1}
        if self.cycle == "lagged":
            fits = MGRIT(**common, intervals=max(2, num_layers // self.cfactors[0]))
            levels = Hierarchy.plan(fits, LayerGrid(num_layers, 1.0), 1).levels
            if tuple(level.cfactor for level in levels[:-1]) == self.cfactors:
                return fits
            return MGRIT(**common, cfactor=self.cfactors)
        return MGRIT(**common, cfactor=self.cfactors, nrelax=self.nrelax, max_iter=self.iterations)

    def text(self, num_layers: int) -> str:
        """The plan in a few words, as in "lagged, 64/8 intervals": so many on each level, the finest first."""
        if self.cycle == "serial":
            return "serial"
        counts, steps = [], num_layers
        for factor in self.cfactors:
            steps //= factor
            counts.append(str(steps))
        relaxation = "" if self.cycle == "lagged" else ", " + "FC" * self.nrelax + "F"
        times = self.iterations, self.adjoint_iterations
        repeated = "" if times == (1, 1) else f", {times[0]}+{times[1]} sweeps"
        return f"{self.cycle}{relaxation}, {'/'.join(counts)} intervals{repeated}"


def _hierarchy(cfactors: tuple[int, ...], num_layers: int, num_ranks: int) -> Hierarchy:
    options = MGRIT(cycle="V", cfactor=cfactors or 2, max_levels=len(cfactors) + 1, min_coarse=1)
    return Hierarchy.plan(options, LayerGrid(num_layers, 1.0), num_ranks)
