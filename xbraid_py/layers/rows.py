"""Weights and sizes of consecutive steps, of coarse steps that stand for several of them, and of their halves.

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


def halved_rows(theta: Tensor, h: float | Tensor, halves: Tensor | None = None) -> tuple[Tensor, float | Tensor]:
    """Weights and sizes of steps half as long, two for each row.

    Parameters
    ----------
    theta : (n, p) tensor
    h : float or (n,) tensor
    halves : (2 n, p) tensor, optional
        Their weights; both have those of the whole if nothing is given.

    Raises
    ------
    ValueError
        If `halves` has another shape.
    """
    rows, size = theta.shape
    if halves is None:
        halves = theta.repeat_interleave(2, 0)
    elif halves.shape != (2 * rows, size):
        shape = tuple(halves.shape)
        raise ValueError(f"halves.shape={shape} must be {(2 * rows, size)}, two rows for each of the steps")
    return halves, h.repeat_interleave(2) / 2 if isinstance(h, Tensor) else h / 2
