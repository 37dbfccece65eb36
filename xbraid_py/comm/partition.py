"""Integers only: the grid of layers, and which rank owns which of its rows.

Shape letters: `N` layers, `c` coarsening factor, `K = N / c` intervals, `P` ranks.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass


def require_multiple(name: str, value: int, factor: int, factor_name: str) -> None:
    """Raise `ValueError`, naming values that work, unless `factor` divides `value`."""
    if value % factor:
        below, above = value - value % factor, value - value % factor + factor
        fits = f"{below} or {above}" if below else f"{above}"
        raise ValueError(f"{name}={value} is not a multiple of {factor_name}={factor}; use {fits}")


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

    @property
    def first_owner(self) -> int:
        """Owner of the first row."""
        return self.owner(0)

    @property
    def last_owner(self) -> int:
        """Owner of the last row."""
        return self.owner(self.num_rows - 1)

    def neighbor(self, rank: int, direction: int) -> int | None:
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
