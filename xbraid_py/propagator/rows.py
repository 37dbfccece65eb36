"""Weights and sizes of consecutive steps, and of coarse steps that stand for several of them.

Shape letters: `n` rows (layers) owned here, `m` of them stepped at once, `S` shape of a state,
`p` parameters of a layer. Row i of a propagator is its layer i.
"""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(h: float | Tensor, rows: slice) -> float | Tensor:
    """Sizes of some steps: the one that all of them have, or theirs."""
    return h[rows] if isinstance(h, Tensor) else h


def coarse_rows(theta: Tensor, h: float | Tensor, length: int, weights: str) -> tuple[Tensor, float | Tensor]:
    """Weights and sizes of steps that stand for `length` rows each.

    Parameters
    ----------
    theta : (n, p) tensor
    h : float or (n,) tensor
    length : int
    weights : {"inject", "average"}
        Those of the first row, or the mean over the time of the rows.

    Returns
    -------
    (n / length, p) tensor
    float or (n / length,) tensor
    """
    # One slice after the other: the order of summation must not depend on the number of rows.
    size: float | Tensor = length * h
    if isinstance(h, Tensor):
        size = h[::length].clone()
        for j in range(1, length):
            size += h[j::length]
    coarse = theta[::length]
    if weights == "average" and isinstance(h, Tensor):
        coarse = coarse * h[::length, None]
        for j in range(1, length):
            coarse += theta[j::length] * h[j::length, None]
        # Steps that pad a sequence have size 0, and so may all of a coarse one.
        coarse /= size[:, None].clamp_min(torch.finfo(size.dtype).tiny)
    elif weights == "average":
        coarse = coarse.clone()
        for j in range(1, length):
            coarse += theta[j::length]
        coarse /= length
    return coarse, size
