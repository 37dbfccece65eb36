"""The levels of a solve: which steps they have, and which rank owns which."""

from __future__ import annotations

from dataclasses import dataclass

from xbraid_py.comm.partition import Partition, require_multiple
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.mgrit.options import MGRIT


@dataclass(frozen=True)
class Level:
    """One level.

    Attributes
    ----------
    index : int
        0 is the finest.
    grid : LayerGrid
        Its steps.
    cfactor : int or None
        Coarsening factor to the next level; None on the coarsest, which is solved step by step.
    nrelax : int
        CF-relaxations after the F-relaxation.
    induced : Partition
        Owners of its steps as they follow from the next finer level: a step belongs to the owner of its interval.
    rows : Partition
        Owners of its steps during its relaxation, in whole intervals: an interval belongs to the owner of
        its first step. The same as `induced` where that does not cut an interval.
    """

    index: int
    grid: LayerGrid
    cfactor: int | None
    nrelax: int
    induced: Partition
    rows: Partition

    @property
    def num_steps(self) -> int:
        """Steps of this level on all ranks."""
        return self.grid.num_layers

    @property
    def factor(self) -> int:
        """`cfactor` of a level that is coarsened."""
        assert self.cfactor is not None
        return self.cfactor

    def begin(self, direction: int) -> slice:
        """Local rows where the intervals begin, in the direction of propagation."""
        return slice(0 if direction > 0 else self.factor - 1, None, self.factor)


@dataclass(frozen=True)
class Hierarchy:
    """All levels of a solve, the finest first; made by `Hierarchy.plan`.

    Attributes
    ----------
    levels : tuple of Level
    block : int
        Layers that belong to one rank together: those of an interval, or where there is one level a rule of their
        number. Sums over layers are made block by block.
    """

    levels: tuple[Level, ...]
    block: int = 1

    @classmethod
    def plan(cls, options: MGRIT, grid: LayerGrid, num_ranks: int, in_use: int | None = None) -> Hierarchy:
        """The levels that `options` ask for; layers on the first `in_use` ranks alone, if that is given.

        Coarsening ends at `max_levels`, before a level would have fewer than `min_coarse` steps, and where a
        coarsening factor that was not given for that very level does not divide the number of steps.

        Raises
        ------
        ValueError
            If a coarsening factor does not divide the number of layers, or one that was given for a
            coarser level does not divide the number of its steps.
        """
        factors: list[int] = []
        steps = grid.num_layers
        while (factor := options.cfactor_of(len(factors), steps)) is not None:
            given = isinstance(options.cfactor, tuple) and len(factors) < len(options.cfactor)
            if steps % factor and (given or not factors):
                what = "num_layers" if not factors else f"steps_of_level_{len(factors)}"
                require_multiple(what, steps, factor, "cfactor")
            if steps % factor or steps // factor < options.min_coarse:
                break
            factors.append(factor)
            steps //= factor
        first = factors[0] if factors else 1
        if options.cycle == "pipeline":
            first = grid.num_layers // _blocks(grid.num_layers)
        rows = Partition.balanced(grid.num_layers // first, num_ranks, in_use).refine(first)
        induced, levels = rows, []
        for index in range(len(factors) + 1):
            cfactor = factors[index] if index < len(factors) else None
            rows = induced if cfactor is None else induced.coarsen(cfactor).refine(cfactor)
            levels.append(Level(index, grid, cfactor, options.nrelax_of(index), induced, rows))
            if cfactor is not None:
                grid, induced = grid.coarsen(cfactor), rows.coarsen(cfactor)
        return cls(tuple(levels), first)

    @property
    def partition(self) -> Partition:
        """Owners of the layers."""
        return self.levels[0].rows

    @property
    def intervals(self) -> Partition:
        """Owners of the C-points of the finest level; of the layers themselves if there is one level."""
        return self.intervals_of(0)

    @property
    def blocks(self) -> Partition:
        """Owners of the blocks of layers."""
        return self.partition.coarsen(self.block)

    def intervals_of(self, index: int) -> Partition:
        """The same for a level."""
        level = self.levels[index]
        return level.rows.coarsen(level.cfactor or 1)

    def cycle_work(self, options: MGRIT) -> list[float]:
        """Evaluations of a layer that one cycle from the finest level makes on each level, on all ranks.

        The steps that enter tau are those of the coarser level's propagator, and are counted there.
        """
        one = 2.0 if options.scheme == "midpoint" else 1.0
        cost = [1.0] + [options.parts(level.factor) * one for level in self.levels[:-1]]
        sweep = [level.num_steps * factor for level, factor in zip(self.levels, cost, strict=True)]
        work = [0.0] * len(self.levels)

        def cycle(index: int, kind: str) -> None:
            work[index] += (self.levels[index].nrelax + 1) * sweep[index]
            work[index + 1] += 2 * sweep[index + 1]  # tau, and the first relaxation or the sweep
            if self.levels[index + 1].cfactor is not None:
                for part in ("F", "V") if kind == "F" else ("V",):
                    cycle(index + 1, part)

        if self.levels[0].cfactor is None:
            return [float(sweep[0])]
        if options.cycle == "lagged":
            # Between the finest and the coarsest level, each solve of a level solves the next one twice.
            last = len(sweep) - 1
            return [2.0 ** (index - (index == last)) * each for index, each in enumerate(sweep)]
        cycle(0, options.cycle)
        return work

    def solve_work(self, options: MGRIT) -> float:
        """Evaluations of a layer in a warm-started solve: with all iterations, or one if the cycle is lagged."""
        cycle = self.cycle_work(options)
        if len(self.levels) == 1:
            return cycle[0]
        if options.cycle == "lagged":
            return sum(cycle) + sum(cycle[1:])  # one iteration, and the coarse sweep before it
        return self.levels[0].num_steps + options.iterations * sum(cycle)

    def table(self, options: MGRIT) -> str:
        """The hierarchy as text: points, intervals, ranks in use, step, and the share of a cycle's work."""
        work = self.cycle_work(options)
        lines = ["level  points  intervals  cfactor  ranks        step    work"]
        for level, share in zip(self.levels, work, strict=True):
            intervals = level.num_steps // (level.cfactor or 1)
            lines.append(
                f"{level.index:5d}  {level.num_steps + 1:6d}  {intervals:9d}  {level.cfactor or '-':>7}  "
                f"{level.rows.ranks_in_use:5d}  {level.grid.h:10.4g}  {share / sum(work):6.1%}"
            )
        return "\n".join(lines)


# Fewer blocks could not be dealt out to that many ranks; of more, sums have more summands.
_LEAST_BLOCKS = 64


def _blocks(num_layers: int) -> int:
    """Blocks of so many layers: the fewest, of equal length, that are at least 64; single layers where there are fewer.

    They depend on the number of layers alone.
    """
    if num_layers <= _LEAST_BLOCKS:
        return num_layers
    return next(count for count in range(_LEAST_BLOCKS, num_layers + 1) if num_layers % count == 0)
