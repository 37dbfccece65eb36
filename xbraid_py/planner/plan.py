"""How the solves of an update are set up: replicas that share samples, and within each a cycle over the layers."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

from xbraid_py.mgrit import MGRIT, Hierarchy
from xbraid_py.mgrit.grid import LayerGrid

CYCLES = ("serial", "pipeline", "lagged", "V", "F")
# What plans are called; the simplest first.
KINDS = ("serial", "replicas", "pipeline", "replicas of pipelines")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Replicas, portions, and cycle and levels of the solves of an update.

    Parameters
    ----------
    cycle
        serial (one layer after the other), pipeline (portions of the samples follow each other through the ranks),
        lagged, V or F. The first two are exact.
    cfactors
        Coarsening factors, the finest first; none for exact propagation.
    nrelax
        CF-relaxations after the F-relaxation, of V- and F-cycles: 0 is F, 1 is FCF.
    iterations, adjoint_iterations
        Iterations of V- and F-cycles, fine sweeps of the lagged cycle, of the state and of the adjoint solves.
    euler
        Coarse steps by one step of forward Euler, instead of the cycle's own of two evaluations of a layer.
    replicas
        Copies of the network that share samples and weights, each on as many ranks.
    portions
        Portions of the samples of all replicas together, each solved for itself; at least one for each replica.
    """

    cycle: Literal["serial", "pipeline", "lagged", "V", "F"] = "lagged"
    cfactors: tuple[int, ...] = ()
    nrelax: int = 1
    iterations: int = 1
    adjoint_iterations: int = 1
    euler: bool = False
    replicas: int = 1
    portions: int = 1

    def __post_init__(self):
        if self.cycle not in CYCLES:
            raise ValueError(f"cycle={self.cycle!r} must be {', '.join(CYCLES[:-1])} or {CYCLES[-1]}; use lagged")
        if self.is_exact != (not self.cfactors):
            raise ValueError(
                f"cfactors={self.cfactors}: exact propagation has none, cycle={self.cycle!r} has one or more; use (4,)"
            )
        if not self.is_exact and min(self.iterations, self.adjoint_iterations) < 1:
            raise ValueError(
                f"iterations={self.iterations}, adjoint_iterations={self.adjoint_iterations} must be at least 1; use 1"
            )
        if not 1 <= self.replicas <= self.portions:
            raise ValueError(
                f"replicas={self.replicas} must be at least 1, and at most portions={self.portions}; "
                f"use portions={max(1, self.replicas)}"
            )
        if self.cycle == "serial" and self.portions > 1:
            raise ValueError(f"portions={self.portions}: cycle='serial' has one; use cycle='pipeline'")

    @property
    def is_exact(self) -> bool:
        """Whether there is no coarse level."""
        return self.cycle in ("serial", "pipeline")

    @property
    def coarsest(self) -> int:
        """By how much the coarsest level has fewer steps than the finest."""
        return prod(self.cfactors)

    @property
    def portions_each(self) -> int:
        """Portions of the replica that has most of them."""
        return -(-self.portions // self.replicas)

    def stages(self, num_ranks: int) -> int:
        """Ranks of a replica.

        Raises
        ------
        ValueError
            If the replicas do not divide the ranks.
        """
        if num_ranks % self.replicas:
            raise ValueError(f"replicas={self.replicas} does not divide num_ranks={num_ranks}; use 1")
        return num_ranks // self.replicas

    def kind(self, num_ranks: int) -> str:
        """What the plan is on so many ranks: one of `KINDS`, or the cycle, by itself or within replicas."""
        if not self.is_exact:
            return self.cycle if self.replicas == 1 else f"replicas of {self.cycle}"
        if self.stages(num_ranks) == 1:
            return "serial" if self.replicas == 1 else "replicas"
        if self.replicas > 1:
            return "replicas of pipelines"
        return "pipeline" if self.portions > 1 else "serial"

    def simplicity(self, num_ranks: int) -> tuple[int, ...]:
        """To sort plans by: the simpler come first."""
        kind = self.kind(num_ranks)
        return (KINDS.index(kind) if kind in KINDS else len(KINDS), len(self.cfactors), self.replicas, self.portions)

    def hierarchy(self, num_layers: int, num_ranks: int) -> Hierarchy:
        """The levels at a depth, on the ranks of a replica; their step sizes mean nothing.

        Raises
        ------
        ValueError
            If a coarsening factor does not divide the steps of its level, or the replicas do not divide the ranks.
        """
        if self.cycle == "pipeline":
            options = MGRIT(cycle="pipeline")
        else:
            options = MGRIT(cycle="V", cfactor=self.cfactors or 2, max_levels=len(self.cfactors) + 1, min_coarse=1)
        return Hierarchy.plan(options, LayerGrid(num_layers, 1.0), self.stages(num_ranks))

    def options(self, num_layers: int) -> MGRIT:
        """The options of the solvers for a depth; `replicas` go to the problem.

        Where it can be said so, in intervals instead of coarsening factors: that fits other depths as well.
        """
        if self.cycle == "serial":
            return MGRIT(max_levels=1)
        if self.cycle == "pipeline":
            return MGRIT(cycle="pipeline", portions=self.portions)
        common = {"cycle": self.cycle, "max_levels": len(self.cfactors) + 1, "min_coarse": 2}
        if self.portions > 1:
            common["portions"] = self.portions
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
        """The plan in a few words, as in "2 replicas, lagged, 64/8 intervals": so many on each level, finest first."""
        if self.cycle == "serial":
            return "serial"
        each = f", {count(self.portions_each, 'portion')}{' each' * (self.replicas > 1)}"
        shared = f"{self.replicas} replicas, " if self.replicas > 1 else ""
        if self.cycle == "pipeline":
            return f"{shared}pipeline{each}"
        counts, steps = [], num_layers
        for factor in self.cfactors:
            steps //= factor
            counts.append(str(steps))
        relaxation = "" if self.cycle == "lagged" else ", " + "FC" * self.nrelax + "F"
        times = self.iterations, self.adjoint_iterations
        repeated = "" if times == (1, 1) else f", {times[0]}+{times[1]} sweeps"
        portions = each if self.portions_each > 1 else ""
        return f"{shared}{self.cycle}{relaxation}, {'/'.join(counts)} intervals{repeated}{portions}"


SERIAL = Plan(cycle="serial")


def count(number: int, what: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{number} {what}{'s' * (number != 1)}"


def figure(number: float) -> str:
    """Two digits, or whole numbers above ten: `0.95`, `2.1`, `31`, `1,204`."""
    return f"{number:,.0f}" if number >= 9.95 else f"{number:.2g}"
