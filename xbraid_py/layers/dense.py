"""Dense layers sigma(W u + b), many of them at once, with their vector-Jacobian products.

Shape letters: `n` layers evaluated at once, `I` inputs, `O` outputs, `B` batch, `p` parameters of a layer.
Features come before samples, so that one layer is one small matrix times a wide one.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from xbraid_py import kernels
from xbraid_py.kernels import fallback
from xbraid_py.kernels.activation import activation


@dataclass(frozen=True)
class DenseLayer:
    """sigma(W u + b): the opening, the residual block F (paper 001, eq. 3) and the classification alike.

    Parameters
    ----------
    inputs, outputs : int
        Widths I and O.
    activation : str
        One of `kernels.activation.ACTIVATIONS`.
    bias : {"vector", "scalar"}
        One bias for each output, or one number for all of them.
    """

    inputs: int
    outputs: int
    activation: str = "smooth_relu"
    bias: str = "vector"

    def __post_init__(self):
        activation(self.activation)
        if self.bias not in ("vector", "scalar"):
            raise ValueError(f"bias={self.bias!r} must be vector or scalar; use vector")
        if min(self.inputs, self.outputs) < 1:
            raise ValueError(f"inputs={self.inputs} and outputs={self.outputs} must be at least 1; use 8")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the named parameters of one layer, in the order in which a row of weights holds them."""
        return {"weight": (self.outputs, self.inputs), "bias": (self.outputs if self.bias == "vector" else 1,)}

    @property
    def num_parameters(self) -> int:
        """Length p of a row of weights."""
        return sum(prod(shape) for shape in self.shapes.values())

    def unpack(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Views of rows of weights (n, p): W (n, O, I) and b (n, O or 1, 1)."""
        return fallback.unpack(self, theta)

    def forward(self, theta: Tensor, u: Tensor) -> Tensor:
        """sigma(W u + b) of n layers: theta (n, p), u (n, I, B) to (n, O, B)."""
        return kernels.step(self, theta, u, residual=False)

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
        gradient = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device) if with_gradient else None
        return kernels.adjoint(self, theta, u, v, residual=False, gradient=gradient, back=back), gradient
