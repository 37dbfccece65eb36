"""Weights of layers from spline coefficients, and back the gradients of the coefficients, over the ranks.

Shape letters: `M` coefficients of a weight, `n` layers owned here, `d` degree, `p` parameters of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layers.splines import Splines, combined
from xbraid_py.mgrit.grid import LayerGrid

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
        return self.partition.owner(0)

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
