"""The time steps of a network as integers: how many, how long, cut in two and coarsened."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import accumulate
from math import gcd

from xbraid_py.comm.partition import require_multiple

MOST_LAYERS = 10**6  # layers are planned, and modules made, one by one


@dataclass(frozen=True)
class LayerGrid:
    """`num_layers` steps on the time interval [0, T]: equal ones, or of the given lengths.

    Parameters
    ----------
    num_layers : int
        Number N of residual layers, from 1 to `MOST_LAYERS`.
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
        if self.num_layers > MOST_LAYERS:
            raise ValueError(f"num_layers={self.num_layers} must be at most {MOST_LAYERS}; use 64")
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
