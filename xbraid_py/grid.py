"""Integers only: the grid of layers, and which rank owns which of its rows.

Shape letters: `N` layers, `c` coarsening factor, `K = N / c` intervals, `P` ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import gcd


def require_multiple(name: str, value: int, factor: int, factor_name: str) -> None:
    """Raise `ValueError`, naming values that work, unless `factor` divides `value`."""
    if value % factor:
        below, above = value - value % factor, value - value % factor + factor
        fits = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"{name}={value} is not a multiple of {factor_name}={factor}; use {fits}")


@dataclass(frozen=True)
class LayerGrid:
    """`num_layers` steps on the time interval [0, T]: equal ones, or of the given lengths.

    Parameters
    ----------
    num_layers : int
        Number N of residual layers, at least 1.
    T : float
        Final time, positive.
    lengths : tuple of int, optional
        Length of each step, at least 1, in units of T / sum(lengths). Kept in lowest terms, and as None if all are
        equal: grids with the same steps are equal.
    """

    num_layers: int
    T: float
    lengths: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.num_layers < 1:
            raise ValueError(f"num_layers={self.num_layers} must be at least 1; use 64")
        if not 0 < self.T < float("inf"):
            raise ValueError(f"T={self.T} must be positive and finite; use 5.0")
        if self.lengths is not None:
            if len(self.lengths) != self.num_layers or min(self.lengths) < 1:
                raise ValueError(
                    f"lengths={self.lengths} must be num_layers={self.num_layers} whole numbers from 1 on; use "
                    f"{(1,) * min(self.num_layers, 8)}{' and so on' * (self.num_layers > 8)}"
                )
            unit = gcd(*self.lengths)
            lowest = tuple(length // unit for length in self.lengths)
            object.__setattr__(self, "lengths", None if max(lowest) == 1 else lowest)

    @classmethod
    def of_lengths(cls, lengths: Iterable[int], T: float) -> LayerGrid:
        """The grid with steps of these lengths, in whatever unit."""
        found = tuple(lengths)
        return cls(len(found), T, found)

    @property
    def is_uniform(self) -> bool:
        """Whether all steps have the same size."""
        return self.lengths is None

    @property
    def h(self) -> float:
        """Step size T / N; the mean of the sizes where they differ."""
        return self.T / self.num_layers

    def sizes(self, first: int = 0, count: int | None = None) -> list[float]:
        """Sizes of `count` steps from `first` on; of all others if it is not given."""
        last = self.num_layers if count is None else first + count
        if self.lengths is None:
            return [self.h] * (last - first)
        total = sum(self.lengths)
        return [self.T * length / total for length in self.lengths[first:last]]

    def middles(self, first: int = 0, count: int | None = None) -> list[float]:
        """Where the middles of `count` steps from `first` on are, as parts of [0, T]; of all others by default."""
        last = self.num_layers if count is None else first + count
        if self.lengths is None:
            return [(2 * n + 1) / (2 * self.num_layers) for n in range(first, last)]
        ends = [0, *accumulate(self.lengths)]
        return [(ends[n] + ends[n + 1]) / (2 * ends[-1]) for n in range(first, last)]

    def refine(self, factor: int) -> LayerGrid:
        """The grid with `factor` times as many layers on the same interval, each step cut in equal ones."""
        lengths = None if self.lengths is None else tuple(each for each in self.lengths for _ in range(factor))
        return LayerGrid(self.num_layers * factor, self.T, lengths)

    def halve(self, chosen: Collection[int]) -> LayerGrid:
        """The grid with the chosen steps cut in two equal ones, the others as they are."""
        lengths = self.lengths or (1,) * self.num_layers
        wrong = [row for row in chosen if not 0 <= row < self.num_layers]
        if wrong:
            raise ValueError(f"chosen={wrong[0]} is outside 0 .. {self.num_layers - 1}")
        cut = [(length, length) if row in chosen else (2 * length,) for row, length in enumerate(lengths)]
        return LayerGrid.of_lengths((each for pieces in cut for each in pieces), self.T)

    def coarsen(self, factor: int) -> LayerGrid:
        """The grid of every `factor`-th point; `factor` must divide `num_layers`."""
        require_multiple("num_layers", self.num_layers, factor, "cfactor")
        count = self.num_layers // factor
        if self.lengths is None:
            return LayerGrid(count, self.T)
        return LayerGrid.of_lengths((sum(self.lengths[k * factor : (k + 1) * factor]) for k in range(count)), self.T)


@dataclass(frozen=True)
class Partition:
    """Consecutive rows, each owned by one rank: rank r owns `bounds[r] .. bounds[r+1]`.

    A rank may own no row; the others are still in the order of the ranks.

    Parameters
    ----------
    bounds : tuple of int
        `P + 1` non-decreasing row numbers, the first of them 0.
    """

    bounds: tuple[int, ...]

    def __post_init__(self):
        ascending = all(a <= b for a, b in zip(self.bounds, self.bounds[1:], strict=False))
        if len(self.bounds) < 2 or self.bounds[0] != 0 or not ascending:
            raise ValueError(f"bounds={self.bounds} must rise from 0, one more than ranks; use (0, 4, 8)")

    @classmethod
    def balanced(cls, num_rows: int, num_ranks: int, in_use: int | None = None) -> Partition:
        """Rows dealt out in blocks whose lengths differ by one at most, longer ones first.

        With fewer rows than ranks the first ranks own one row each, the others none; and so do those behind the first
        `in_use` ranks, if that is given.
        """
        count = num_ranks if in_use is None else in_use
        if not 1 <= count <= num_ranks:
            raise ValueError(f"in_use={in_use} must lie in 1 .. num_ranks={num_ranks}; use {num_ranks}")
        share, extra = divmod(num_rows, count)
        return cls(tuple(min(num_rows, r * share + min(r, extra)) for r in range(num_ranks + 1)))

    @property
    def num_rows(self) -> int:
        """Rows in all."""
        return self.bounds[-1]

    @property
    def num_ranks(self) -> int:
        """Ranks, those without rows included."""
        return len(self.bounds) - 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of rows of every rank."""
        return tuple(b - a for a, b in zip(self.bounds, self.bounds[1:], strict=False))

    @property
    def ranks_in_use(self) -> int:
        """Number of ranks that own at least one row."""
        return sum(count > 0 for count in self.counts)

    def first(self, rank: int) -> int:
        """First row of a rank (meaningful if it owns any)."""
        return self.bounds[rank]

    def count(self, rank: int) -> int:
        """Number of rows of a rank."""
        return self.bounds[rank + 1] - self.bounds[rank]

    def owner(self, row: int) -> int:
        """Rank that owns `row`."""
        if not 0 <= row < self.num_rows:
            raise ValueError(f"row={row} is outside 0 .. {self.num_rows - 1}")
        return bisect_right(self.bounds, row) - 1

    def neighbour(self, rank: int, direction: int) -> int | None:
        """Owner of the row behind (`direction` +1) or before (-1) those of `rank`; None at an end."""
        row = self.bounds[rank + 1] if direction > 0 else self.bounds[rank] - 1
        return self.owner(row) if 0 <= row < self.num_rows else None

    def refine(self, factor: int) -> Partition:
        """Every row split into `factor` rows, owners unchanged."""
        return Partition(tuple(b * factor for b in self.bounds))

    def coarsen(self, factor: int) -> Partition:
        """Blocks of `factor` rows made one row each, owned by the owner of the block's first row."""
        require_multiple("num_rows", self.num_rows, factor, "factor")
        return Partition(tuple(-(-b // factor) for b in self.bounds))

    def overlaps(self, rank: int, other: Partition) -> list[tuple[int, slice]]:
        """Which rows of `rank` the ranks of `other` own: `(rank of other, slice of local rows)`."""
        low, high = self.bounds[rank], self.bounds[rank + 1]
        found = []
        row = low
        while row < high:
            peer = other.owner(row)
            end = min(high, other.bounds[peer + 1])
            found.append((peer, slice(row - low, end - low)))
            row = end
        return found
