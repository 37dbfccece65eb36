"""A linear map W u without bias or activation: the opening operator Q of paper 000.

Shape letters: `n` layers evaluated at once, `I` inputs, `O` outputs, `B` batch, `p` parameters of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LinearMap:
    """W u (paper 000, section 2.1.1: y_0 = Q x), with the methods of `DenseLayer`.

    Parameters
    ----------
    inputs, outputs : int
        Widths I and O.
    """

    inputs: int
    outputs: int

    def __post_init__(self):
        if min(self.inputs, self.outputs) < 1:
            raise ValueError(f"inputs={self.inputs} and outputs={self.outputs} must be at least 1; use 3")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the named parameters of one layer."""
        return {"weight": (self.outputs, self.inputs)}

    @property
    def num_parameters(self) -> int:
        """Length p of a row of weights."""
        return self.outputs * self.inputs

    def forward(self, theta: Tensor, u: Tensor) -> Tensor:
        """W u of n layers: theta (n, p), u (n, I, B) to (n, O, B)."""
        return torch.matmul(theta.unflatten(1, (self.outputs, self.inputs)), u)

    def vjp(
        self, theta: Tensor, u: Tensor, v: Tensor, with_gradient: bool, back: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Transposed Jacobians applied to v (n, O, B).

        Returns
        -------
        (n, I, B) tensor or None
            The product with respect to u, unless `back` is False.
        (n, p) tensor or None
            The product with respect to the weights, summed over the samples, if asked for.
        """
        weight = theta.unflatten(1, (self.outputs, self.inputs))
        product = torch.matmul(weight.transpose(1, 2), v) if back else None
        return product, torch.matmul(v, u.transpose(1, 2)).flatten(1) if with_gradient else None
