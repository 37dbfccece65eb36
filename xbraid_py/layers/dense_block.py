"""The dense block sigma(W u + b) as a torch module; layer-parallel stacks step through it with the native kernels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xbraid_py.kernels.activation import activation
from xbraid_py.layers.dense import DenseLayer


class DenseBlock(nn.Module):
    """sigma(W u + b) on the last axis of u (*, width).

    Parameters
    ----------
    width : int
    activation : str
        One of `kernels.activation.ACTIVATIONS`.
    scale : float
        Standard deviation of the initial weights is scale / sqrt(width); the bias starts at zero.
    """

    def __init__(self, width: int, activation: str = "smooth_relu", scale: float = 1.0):
        super().__init__()
        self.layer = DenseLayer(width, width, activation)
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight, std=scale / width**0.5)

    def forward(self, u: Tensor) -> Tensor:
        """u (*, width) to (*, width)."""
        return activation(self.layer.activation).value(nn.functional.linear(u, self.weight, self.bias))

    def extra_repr(self) -> str:
        return f"{self.layer.inputs}, activation={self.layer.activation!r}"
