"""Convolutions for tests of coarse pixels.

Shape letters: `N` layers, `B` batch, `C` channels, `H`, `W`, `D` pixels.
"""

from __future__ import annotations

import reference as ref
import torch
from torch import nn

from xbraid_py.layers.module_block import ModuleBlock, own_random_numbers

N, B, C = 12, 2, 2
SIZES = {2: (6, 7), 3: (4, 5, 4)}  # odd numbers too
RESTRICT = {"states": "restrict"}


class Diffusing(nn.Module):
    """tanh of a convolution; u (B, C, X...)."""

    def __init__(self, dims: int):
        super().__init__()
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.convolution = kind(C, C, 3, padding=1, dtype=torch.float64)

    def forward(self, u):
        return torch.tanh(self.convolution(u))


def made(dims: int) -> tuple[ModuleBlock, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The block, weights of all layers, the first state and the last adjoint."""
    with own_random_numbers(dims):
        block = ModuleBlock(Diffusing(dims))
    theta = ref.smooth_weights(N, block.row_size, 0.3, seed=3)
    shape = (B, C, *SIZES[dims])
    return block, theta, ref.random(*shape, seed=1), ref.random(*shape, seed=2)
