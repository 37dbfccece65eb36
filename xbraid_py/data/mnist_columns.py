"""Digits as columns of features, for networks without convolutions: scaled, centered, in batches.

Shape letters: `F` = 784 features, `B` samples.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xbraid_py.data.mnist import MEAN, STANDARD_DEVIATION, Mnist

SCALINGS = ("centered", "unit", "standard")


class Columns:
    """Images of one half of a data set, converted when they are asked for.

    Parameters
    ----------
    images : (n, 28, 28) uint8 tensor
    labels : (n,) int64 tensor
    center : (784,) tensor
        Is subtracted from the pixels divided by `spread`.
    spread : float
    dtype : torch.dtype
    """

    def __init__(self, images: Tensor, labels: Tensor, center: Tensor, spread: float, dtype: torch.dtype):
        self.labels, self._pixels = labels, images.flatten(1)
        self._center, self._factor, self._dtype = center.to(dtype), 1.0 / spread, dtype

    def __len__(self) -> int:
        """Samples."""
        return len(self.labels)

    def samples(self, which: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Features (784, B) and labels (B,) of some samples; all if nothing is said."""
        pixels = self._pixels[which].to(self._dtype).mul_(self._factor).sub_(self._center)
        return pixels.T.contiguous(), self.labels[which]

    def portions(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """All samples in their order, at most so many together, as evenly as can be."""
        count = -(-len(self) // size)
        return [self.samples(which) for which in torch.arange(len(self)).tensor_split(count)]


def columns(
    data: Mnist,
    scaling: str = "centered",
    dtype: torch.dtype = torch.float64,
    num_train: int | None = None,
    num_test: int | None = None,
) -> tuple[Columns, Columns]:
    """Training and test images as columns.

    Parameters
    ----------
    data : Mnist
    scaling : {"centered", "unit", "standard"}
        Pixels in [0, 1] less the mean of each over all training images (paper 000, section 4); pixels in [0, 1]; or of
        mean 0 and standard deviation 1 over all pixels of all training images.
    dtype : torch.dtype
        Of the features.
    num_train, num_test : int, optional
        Take only the first so many.

    Raises
    ------
    ValueError
        If `scaling` is no such word, or there are not so many images.
    """
    if scaling not in SCALINGS:
        raise ValueError(f"scaling={scaling!r} must be {' or '.join(SCALINGS)}; use centered")
    halves = []
    for name, number, images, labels in (
        ("num_train", num_train, data.train_images, data.train_labels),
        ("num_test", num_test, data.test_images, data.test_labels),
    ):
        if number is not None and not 1 <= number <= len(images):
            raise ValueError(f"{name}={number} must lie in 1 .. {len(images)}, the images there are; use {len(images)}")
        halves.append((images[:number], labels[:number]))
    center, spread = torch.zeros(data.train_images[0].numel(), dtype=torch.float64), 255.0
    if scaling == "centered":
        # Sums of bytes: exact, and without a copy of all images as floating-point numbers.
        center = data.train_images.flatten(1).sum(0, dtype=torch.int64) / (255.0 * len(data.train_images))
    elif scaling == "standard":
        center, spread = center + MEAN / STANDARD_DEVIATION, 255.0 * STANDARD_DEVIATION
    return tuple(Columns(*half, center, spread, dtype) for half in halves)
