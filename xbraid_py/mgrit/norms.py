"""How large a residual is, in which norm, and when it is small enough.

Shape letters: `K` intervals owned here, `S` shape of a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt

import torch
from torch import Tensor

from xbraid_py import kernels
from xbraid_py.comm import Communicator


@dataclass(frozen=True)
class Size:
    """Norm of a residual.

    Attributes
    ----------
    absolute : float
    relative : float
        Over the norm of the states at the C-points.
    """

    absolute: float
    relative: float


@dataclass(frozen=True)
class Stop:
    """When a solve is good enough: by the relative size of the residual, or by the size itself.

    Parameters
    ----------
    tol, atol : float
        Bounds of them; 0 asks for nothing.
    """

    tol: float
    atol: float = 0.0

    @property
    def watches(self) -> bool:
        """Whether anything is asked for."""
        return self.tol > 0.0 or self.atol > 0.0

    def met(self, size: Size) -> bool:
        """Whether a residual of that size ends the solve."""
        return size.relative <= self.tol or size.absolute <= self.atol


@dataclass(frozen=True)
class Norm:
    """The 1-, 2- or maximum norm of all numbers of all states at C-points.

    Parameters
    ----------
    kind : {1, 2, "max"}
    """

    kind: int | str

    def of_intervals(self, residual_of: Tensor, points: Tensor) -> Tensor:
        """Shares (K, 2) of each interval in the norms of `residual_of - points` and of `points`, both (K, *S).

        Sums of squares, sums of absolute values, or the largest of them.
        """
        if self.kind == 2:
            return kernels.distances(points, residual_of)
        return self._shares(residual_of - points, points)

    def moved(self, points: Tensor, change: Tensor) -> Tensor:
        """Add a change to points, both (K, *S): shares (K, 2) in the norms of the change and of what they become."""
        if self.kind == 2:
            return kernels.move(points, change)
        return self._shares(change, points.add_(change))

    def _shares(self, residual: Tensor, points: Tensor) -> Tensor:
        both = torch.stack([residual, points], 1).abs().flatten(2)
        if self.kind == 1:
            return both.sum(2)
        return both.amax(2) if both.shape[2] else both.new_zeros(both.shape[:2])

    def joined(self, a: Tensor, b: Tensor) -> Tensor:
        """The share of two parts from the shares of each."""
        return torch.maximum(a, b) if self.kind == "max" else a + b

    def over_ranks(self, shares: Tensor, counts: tuple[int, ...], comm: Communicator) -> Tensor:
        """Shares (m,) of all intervals together from those of each one, (K, m); collective."""
        if self.kind != "max":
            return comm.ordered_sum(shares, counts)
        found = comm.allgather(shares, counts)
        return found.amax(0) if len(found) else found.sum(0)

    def of_sums(self, sums: Tensor) -> list[Size]:
        """Norms from the shares of all intervals together, two numbers (residual, state) for each residual."""
        numbers, tiny = sums.tolist(), torch.finfo(sums.dtype).tiny
        pairs = [(r, r / max(s, tiny)) for r, s in zip(numbers[::2], numbers[1::2], strict=True)]
        return [Size(*map(sqrt, pair)) if self.kind == 2 else Size(*pair) for pair in pairs]
