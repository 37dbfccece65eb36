"""Regularization of the weights: Tikhonov, and smoothness in depth.

Shape letters: `n` layers owned here, `p` parameters of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from xbraid_py.problem.network import DenseResNet


@dataclass(frozen=True)
class Regularization:
    """gamma_tik/2 sum |theta_n|^2 + gamma_ddt/2 sum |(theta_n - theta_{n-1})/h|^2.

    Where the layers have different sizes, h of a jump is the distance between the middles of the two layers.

    Parameters
    ----------
    tikhonov
        gamma_tik, of the residual layers, and of the opening layer if nothing else is given for it.
    ddt
        gamma_ddt, smoothness of the residual layers' weights in depth.
    classification
        gamma of the classification layer's Tikhonov term.
    measure
        "sum": plain sums over the layers; "integral": a factor h in front of the residual layers' terms (that of the
        layer, or of the jump), which makes the functional independent of the depth.
    opening
        gamma of the opening layer's Tikhonov term; as tikhonov if not given.
    """

    tikhonov: float = 1e-5
    ddt: float = 1e-5
    classification: float = 1e-5
    measure: str = "integral"
    opening: float | None = None

    def __post_init__(self):
        for name in ("tikhonov", "ddt", "classification", "opening"):
            value = getattr(self, name)
            if value is not None and not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be at least 0 and finite; use 1e-6")
        if self.measure not in ("sum", "integral"):
            raise ValueError(f"measure={self.measure!r} must be sum or integral; use integral")

    def terms(
        self, network: DenseResNet, x: Tensor, intervals: int, stage: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """One summand for each of the `intervals` of layers owned here, and the gradient, a flat vector.

        Opening and classification belong to the first and the last interval. `stage` is the flat vector of
        `network.stage`, if all layers are in it: then the neighbors' weights take no message.
        """
        import torch  # not for the options

        layout, comm, partition = network.layout, network.comm, network.partition
        rows, gradient = layout.rows(x), torch.empty_like(x)
        out = layout.rows(gradient)
        theta = rows["layers"]
        smooth = bool(self.ddt) and len(theta) > 0
        edges = []
        # The neighbors' weights travel while the terms without them are summed.
        if smooth and stage is not None:
            every, (first, last) = network.stage.layout.rows(stage)["layers"], partition.bounds[comm.rank :][:2]
            sides = every[first - 1 : first] if first else None, every[last : last + 1] if last < len(every) else None
            edges = [lambda side=side: side for side in sides]
        elif smooth:
            edges = [comm.begin_shift(edge, partition, to) for edge, to in ((theta[-1:], +1), (theta[:1], -1))]
        torch.mul(rows["opening"], self.tikhonov if self.opening is None else self.opening, out=out["opening"])
        torch.mul(rows["classification"], self.classification, out=out["classification"])
        torch.mul(theta, self._of_layers(network), out=out["layers"])
        found = layout.dots([x], [gradient], intervals)[0, 0].div_(2)
        if smooth:
            before, after = (finish() for finish in edges)
            gamma = self._of_jumps(network)
            # theta_n - theta_{n-1} of the rows owned here and of the one behind them; 0 at both ends of the network.
            ends = (theta[:1] if before is None else before, theta, theta[-1:] if after is None else after)
            jumps = torch.cat(ends).diff(dim=0)
            if isinstance(gamma, float | int):
                found.add_(jumps[:-1].square().view(intervals, -1).sum(1), alpha=gamma / 2)
                out["layers"].sub_(jumps.diff(dim=0), alpha=gamma)
            else:
                weighted = jumps * gamma[:, None]
                found.add_((jumps * weighted)[:-1].view(intervals, -1).sum(1), alpha=0.5)
                out["layers"].sub_(weighted.diff(dim=0))
        return found, gradient

    def _of_layers(self, network: DenseResNet) -> float | Tensor:
        """Factor of |theta_n|^2 / 2: of all layers, or of those owned here (n, 1)."""
        if self.measure == "sum":
            return self.tikhonov
        sizes = network.sizes
        return self.tikhonov * (sizes if isinstance(sizes, float | int) else sizes[:, None])

    def _of_jumps(self, network: DenseResNet) -> float | Tensor:
        """Factor of |theta_n - theta_{n-1}|^2 / 2: of all jumps, or of those before the n layers owned here and behind.

        What it is at the ends of the network does not matter: there is no jump.
        """
        import torch

        grid, rank = network.grid, network.comm.rank
        if grid.is_uniform:
            factor = grid.h if self.measure == "integral" else 1.0
            return self.ddt * factor / grid.h**2
        first, last = network.partition.bounds[rank : rank + 2]
        low, high = max(first - 1, 0), min(last + 1, grid.num_layers)
        sizes = grid.sizes(low, high - low)
        sizes = sizes[:1] * (first == 0) + sizes + sizes[-1:] * (last == grid.num_layers)
        h = [(a + b) / 2 for a, b in pairwise(sizes)]
        return torch.tensor(
            [self.ddt / (each if self.measure == "integral" else each**2) for each in h], dtype=network.dtype
        )
