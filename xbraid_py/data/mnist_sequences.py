"""Digits as sequences for recurrent networks: their rows, columns or pixels one after the other, of any length.

Shape letters: `B` samples, `L` steps, `F` features of a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xbraid_py.data.mnist import standardized

ORDERS = {"rows": 28, "columns": 28, "pixels": 1}
"""How an image is read, and the features F of a step."""


def sequences(
    images: Tensor, order: str = "rows", length: int | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Images as sequences: 28 rows or columns of 28 pixels, from top to bottom or left to right, or 784 pixels by rows.

    Parameters
    ----------
    images : (B, 28, 28) uint8 tensor
    order : {"rows", "columns", "pixels"}
    length : int, optional
        Steps L, at least 2: the sequence is read at as many equally distant times, between two steps of the image
        linearly interpolated. As many as it has if not given.
    dtype : torch.dtype

    Returns
    -------
    (B, L, F) tensor
        Of mean 0 and standard deviation 1 over the training images if they are not resampled.

    Raises
    ------
    ValueError
        If there is no such order, or the length is too small.
    TypeError
        If `images` is no uint8 tensor.
    """
    if order not in ORDERS:
        raise ValueError(f"order={order!r} must be {' or '.join(ORDERS)}; use rows")
    if length is not None and length < 2:
        raise ValueError(f"length={length} must be at least 2; use 128")
    found = standardized(images, dtype)[:, 0]
    if order == "columns":
        found = found.transpose(1, 2)
    elif order == "pixels":
        found = found.reshape(len(found), -1, 1)
    if length is not None and length != found.shape[1]:
        resampled = torch.nn.functional.interpolate(found.transpose(1, 2), length, mode="linear", align_corners=True)
        found = resampled.transpose(1, 2)
    return found.contiguous()
