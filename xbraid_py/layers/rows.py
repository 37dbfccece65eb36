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


def sums(rows: Tensor, length: int) -> Tensor:
    """Sums (n / length, ...) of every `length` of rows (n, ...).

    One slice after the other: the order of summation must not depend on the number of rows.
    """
    found = rows[::length].clone()
    for j in range(1, length):
        found += rows[j::length]
    return found


def coarse_rows(theta: Tensor, h: float | Tensor, length: int, weights: str) -> tuple[Tensor, float | Tensor]:
    """Weights and sizes of steps that stand for `length` rows each.

    Parameters
    ----------
    theta : (n, ...) tensor
    h : float or (n,) tensor
    length : int
    weights : {"inject", "average"}
        Those of the first row, or the mean over the time of the rows.

    Returns
    -------
    (n / length, ...) tensor
    float or (n / length,) tensor
    """
    size = sums(h, length) if isinstance(h, Tensor) else length * h
    if weights == "inject":
        return theta[::length], size
    if not isinstance(h, Tensor):
        return sums(theta, length).div_(length), size
    # Steps that pad a sequence have size 0, and so may all of a coarse one.
    whole = size.clamp_min(torch.finfo(size.dtype).tiny)
    shares = [(h[j::length] / whole).view(-1, *(1,) * (theta.dim() - 1)) for j in range(length)]
    coarse = theta[::length] * shares[0]
    for j in range(1, length):
        coarse.addcmul_(theta[j::length], shares[j])
    return coarse, size
