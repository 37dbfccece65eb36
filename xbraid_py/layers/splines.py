"""B-splines in depth: the weights of many layers from few coefficients.

theta_n = sum_j B_j(t_n) c_j with M basis functions B_j of degree d on [0, 1]. The place t_n of layer n is the middle of
its step as a part of the whole depth, so that M = N functions of degree 0 are the layers themselves. For any degree the
matrix B_j(t_n) of N equal layers and M = N functions is regular, because t_n lies inside the support of B_n, and the
weights of the layers are free. With centered knots, which are 1/M apart but further from the ends, B_n is largest near
t_n, and the condition of this matrix is at most 11 for any N. With uniform knots it grows exponentially with N for
d > 1, and is 800 for d = 3 and N = 16: take centered knots where M is near N.

Options hold splines: what takes long to load is loaded where numbers are computed.

Shape letters: `M` basis functions, `n` places, `d` degree, `p` parameters of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import isclose
from typing import TYPE_CHECKING, Any, Literal

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.mgrit.grid import LayerGrid

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

DEGREES = (0, 1, 2, 3)


@dataclass(frozen=True)
class Splines:
    """B-splines on [0, 1] with clamped ends.

    Parameters
    ----------
    num
        Basis functions M, and so coefficients of each weight; at least degree + 1.
    degree
        0 (piecewise constant) to 3 (cubic, twice differentiable).
    knots
        uniform: equal intervals. centered: the functions are centered on M equal layers. Or the ends of the M - degree
        intervals as parts of the depth, rising from 0 to 1.
    """

    num: int
    degree: int = 3
    knots: Literal["uniform", "centered"] | tuple[float, ...] = "uniform"

    def __post_init__(self):
        for name, good in (("num", 8), ("degree", 3)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name}={value!r} must be a whole number; use {good}")
        if self.degree not in DEGREES:
            raise ValueError(f"degree={self.degree} must be 0, 1, 2 or 3; use 3")
        if self.num <= self.degree:
            raise ValueError(
                f"num={self.num} must be at least {self.degree + 1}, one more than degree={self.degree}; "
                f"use {self.degree + 5}"
            )
        if isinstance(self.knots, str):
            if self.knots not in ("uniform", "centered"):
                raise ValueError(f"knots={self.knots!r} must be uniform, centered or a list of numbers; use uniform")
            return
        knots = tuple(float(knot) for knot in self.knots)
        rises = all(a < b for a, b in pairwise(knots))
        if len(knots) != self.num_intervals + 1 or knots[0] != 0.0 or knots[-1] != 1.0 or not rises:
            good = [round(knot, 3) for knot in _uniform(self.num_intervals)]
            raise ValueError(
                f"knots={list(self.knots)} must be num - degree + 1 = {self.num_intervals + 1} numbers that rise from "
                f"0 to 1; use {good}"
            )
        # Splines with the same knots are equal.
        object.__setattr__(self, "knots", "uniform" if knots == _uniform(self.num_intervals) else knots)

    @property
    def num_intervals(self) -> int:
        """Intervals between knots."""
        return self.num - self.degree

    @property
    def breaks(self) -> tuple[float, ...]:
        """Ends of all intervals."""
        if self.knots == "uniform":
            return _uniform(self.num_intervals)
        if self.knots == "centered":
            inner = [(1.0 + self.degree / 2 + k) / self.num for k in range(self.num_intervals - 1)]
            return (0.0, *inner, 1.0)
        return self.knots

    @cached_property
    def _all_knots(self) -> np.ndarray:
        """The knots with those of the ends d + 1 times."""
        import numpy as np

        return np.concatenate([[0.0] * self.degree, self.breaks, [1.0] * self.degree])

    def band(self, times: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The functions that are not zero there: their numbers (n, d + 1), consecutive, and their values (n, d + 1).

        Raises `ValueError` for a time outside [0, 1].
        """
        import numpy as np
        import torch
        from scipy.interpolate import BSpline

        at = np.asarray(times, dtype=np.float64)
        outside = at[~((at >= 0.0) & (at <= 1.0))]
        if len(outside):
            raise ValueError(f"times={outside[0]} must lie in 0 .. 1, as parts of the depth; use 0.5")
        shape = (len(at), self.degree + 1)
        if not len(at):
            return torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.float64)
        rows = BSpline.design_matrix(at, self._all_knots, self.degree)
        return (
            torch.from_numpy(rows.indices.reshape(shape).astype(np.int64)),
            torch.from_numpy(rows.data.reshape(shape)),
        )

    def matrix(self, times: Sequence[float]) -> Tensor:
        """Values B_j(t) of all functions, (n, M) in double precision; `ValueError` for a time outside [0, 1]."""
        import torch

        numbers, values = self.band(times)
        return torch.zeros(len(numbers), self.num, dtype=torch.float64).scatter_(1, numbers, values)

    def rows(self, times: Sequence[float], coefficients: Tensor) -> Tensor:
        """Values (n, p) of the functions with the coefficients (M, p)."""
        numbers, values = self.band(times)
        return combined(numbers, values.to(coefficients.dtype), coefficients)

    def fit(self, times: Sequence[float], rows: Tensor) -> Tensor:
        """Coefficients (M, p) of the function that is nearest to the rows (n, p) at the times.

        Exact where the matrix is regular; of several that are equally near the one with the least coefficients.
        """
        import numpy as np
        import torch

        found = np.linalg.lstsq(self.matrix(times).numpy(), rows.double().numpy(), rcond=None)[0]
        return torch.from_numpy(found).to(rows.dtype)

    def refine(self) -> Splines:
        """Splines on intervals of half the length; every function of these is one of those."""
        halved = [each for a, b in pairwise(self.breaks) for each in (a, (a + b) / 2)]
        return self._on((*halved, 1.0))

    def coarsen(self, factor: int = 2) -> Splines:
        """Splines on every `factor`-th knot; `ValueError` if the number of intervals is no multiple of the factor."""
        count, rest = divmod(self.num_intervals, factor)
        if rest:
            fits = [each * factor + self.degree for each in (count, count + 1) if each]
            raise ValueError(
                f"num={self.num} makes num - degree = {self.num_intervals} intervals, not a multiple of {factor}; "
                f"use {' or '.join(map(str, fits))}"
            )
        return self._on(self.breaks[::factor])

    def _on(self, breaks: tuple[float, ...]) -> Splines:
        count = len(breaks) - 1
        return Splines(count + self.degree, self.degree, "uniform" if self.knots == "uniform" else breaks)

    def insertion(self, fine: Splines) -> Tensor:
        """Matrix (M of fine, M) that makes of coefficients here those of the same function there (knot insertion).

        Raises `ValueError` if the degrees differ, or a knot here is none there.
        """
        import numpy as np
        import torch

        if fine.degree != self.degree:
            raise ValueError(f"fine degree={fine.degree} must be {self.degree}, as here; use refine()")
        lost = [knot for knot in self.breaks if not any(isclose(knot, other, abs_tol=1e-12) for other in fine.breaks)]
        if lost:
            raise ValueError(f"knots={lost[0]} is no knot of the fine splines, so functions are lost; use refine()")
        # At these places, one for each function (Greville's), the fine functions make a matrix of good condition.
        knots = fine._all_knots
        places: Any = sum(knots[k : k + fine.num] for k in range(1, fine.degree + 1)) / max(1, fine.degree)
        if fine.degree == 0:
            places = (knots[:-1] + knots[1:]) / 2
        found = np.linalg.solve(fine.matrix(places).numpy(), self.matrix(places).numpy())
        return torch.from_numpy(found)


def combined(numbers: Tensor, values: Tensor, coefficients: Tensor) -> Tensor:
    """Rows (n, p) from the numbers and values of `band` and the coefficients (M, p).

    A row has the same bits whatever others there are: its products are added one after the other.
    """
    found = coefficients[numbers[:, 0]] * values[:, :1]
    for k in range(1, numbers.shape[1]):
        found += coefficients[numbers[:, k]] * values[:, k, None]
    return found


def _uniform(count: int) -> tuple[float, ...]:
    return tuple(k / count for k in range(count + 1))


_AT_ONCE = 1 << 17  # numbers that are multiplied before they are summed: 1 MB in double precision


@dataclass(frozen=True)
class SplineLayers:
    """theta_n = sum_j B_j(t_n) c_j for the layers n owned here, and the transposed map of their gradients.

    Parameters
    ----------
    splines : Splines
    grid : LayerGrid
        t_n is the middle of step n.
    partition : Partition
        Owners of the layers.
    comm : Communicator
    """

    splines: Splines
    grid: LayerGrid
    partition: Partition
    comm: Communicator

    @property
    def root(self) -> int:
        """Owner of the first layer, where gradients are summed."""
        return self.partition.first_owner

    @cached_property
    def _band(self) -> tuple[Tensor, Tensor]:
        rank = self.comm.rank
        return self.splines.band(self.grid.middles(self.partition.first(rank), self.partition.count(rank)))

    def _first(self, layer: int) -> int:
        """Number of the first function that is not zero at a layer."""
        return int(self.splines.band(self.grid.middles(layer, 1))[0][0, 0])

    @cached_property
    def _first_ahead(self) -> int:
        return self._first(self.partition.bounds[self.comm.rank + 1])

    def layers(self, coefficients: Tensor) -> Tensor:
        """Weights (n, p) of the layers owned here from all coefficients (M, p); sends no message."""
        return combined(*self._here(coefficients), coefficients)

    def sums(self, gradient: Tensor) -> Tensor | None:
        """Gradient (M, p) of the coefficients from those of the layers owned here (n, p).

        It is on the owner of the first layer, None elsewhere. Sums go from the last layer to the first, from rank to
        rank, so that the bits do not depend on the number of ranks. A rank passes on the sums of the functions that are
        not zero at its layers or behind them.
        """
        partition, rank = self.partition, self.comm.rank
        count = partition.count(rank)
        if not count:
            return None
        numbers, values = self._here(gradient)
        found = gradient.new_zeros((self.splines.num, gradient.shape[1]))
        ahead, behind = (partition.neighbor(rank, direction) for direction in (+1, -1))
        if ahead is not None:
            self.comm.recv(found[self._first_ahead :], ahead)
        portion = max(1, _AT_ONCE // max(1, values.shape[1] * gradient.shape[1]))
        for last in range(count, 0, -portion):
            rows = slice(max(0, last - portion), last)
            products = gradient[rows, None] * values[rows, :, None]
            # One row after the other, in this order.
            found.index_add_(0, numbers[rows].flip(0).flatten(), products.flip(0).flatten(0, 1))
        if behind is None:
            return found
        self.comm.isend(found[int(numbers[0, 0]) :], behind)()
        return None

    def _here(self, like: Tensor) -> tuple[Tensor, Tensor]:
        numbers, values = self._band
        return numbers.to(like.device), values.to(like)
