"""Labeled images of three colors as whole sets, CIFAR-10, CIFAR-100 or STL-10, all read by `load_images`.

Shape letters: `B` samples, `H W` pixels. Samples lie outermost, as torch's image layers have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

CHANNELS = 3


@dataclass(frozen=True, eq=False)
class Images:
    """Images and the class of each.

    Parameters
    ----------
    pixels : torch.Tensor
        Shape (B, 3, H, W) with H = W, uint8; red, green and blue, the rows from top to bottom. B may be 0.
    labels : torch.Tensor
        Shape (B,), int64, numbers of the classes from 0.

    Raises
    ------
    TypeError
        If pixels are not a uint8 tensor or labels not an int64 tensor.
    ValueError
        If the shapes do not fit each other.
    """

    pixels: Tensor
    labels: Tensor

    def __post_init__(self):
        check_pixels(self.pixels)
        if not (isinstance(self.labels, Tensor) and self.labels.dtype == torch.int64):
            raise TypeError(f"labels is {kind(self.labels)}, must be an int64 tensor of shape (B,)")
        shape = tuple(self.pixels.shape)
        if shape[1] != CHANNELS or shape[2] != shape[3]:
            raise ValueError(f"pixels.shape={shape} must be (B, 3, H, H); use (100, 3, 32, 32)")
        if self.labels.shape != shape[:1]:
            raise ValueError(
                f"labels.shape={tuple(self.labels.shape)} must hold one label for each of the {shape[0]} images; "
                f"use ({shape[0]},)"
            )

    def rows(self, chosen: slice | Tensor) -> Images:
        """Some of the images, in the order of `chosen`.

        Parameters
        ----------
        chosen : slice or torch.Tensor
            A slice gives a view of the same memory; an index tensor, of shape (b,), int64, gives a copy.

        Raises
        ------
        TypeError
            If `chosen` is neither.
        """
        if not isinstance(chosen, slice):
            if not (isinstance(chosen, Tensor) and chosen.dtype == torch.int64 and chosen.ndim == 1):
                raise TypeError(f"chosen is {kind(chosen)}, must be a slice or an int64 tensor of shape (b,)")
        return Images(self.pixels[chosen], self.labels[chosen])

    @property
    def num_samples(self) -> int:
        """B."""
        return self.pixels.shape[0]

    @property
    def size(self) -> int:
        """H, the pixels along an edge."""
        return self.pixels.shape[2]


@dataclass(frozen=True, eq=False)
class ImageSets:
    """The two parts of a data set, and what was found of it.

    Parameters
    ----------
    train, test : Images
        Images of the same size, in the order of the files.
    num_classes : int
        Number of classes, at least 2; not every class needs an image.
    names : tuple of str
        Names of the classes in the order of their numbers, or () where the set has none.
    found : tuple of str
        Which files were found and which are missing, in words for a reader, as in `1 of 5 training batches (10,000 of
        50,000 images): data_batch_1.bin`.
    complete : bool
        Whether all images of the published set are there.

    Raises
    ------
    ValueError
        If the two parts differ in size, a label is outside 0 .. num_classes - 1, or the names are of another number.
    """

    train: Images
    test: Images
    num_classes: int
    names: tuple[str, ...]
    found: tuple[str, ...]
    complete: bool

    def __post_init__(self):
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes} must be at least 2; use 10")
        if self.train.size != self.test.size:
            raise ValueError(
                f"train.size={self.train.size} and test.size={self.test.size} must be the same; use 32 for both"
            )
        for part, labels in (("train", self.train.labels), ("test", self.test.labels)):
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_classes:
                raise ValueError(
                    f"{part}.labels holds values from {labels.min()} to {labels.max()}, must lie in "
                    f"0 .. num_classes - 1 = {self.num_classes - 1}"
                )
        if len(self.names) not in (0, self.num_classes):
            raise ValueError(
                f"names holds {len(self.names)} names, must hold one for each of num_classes={self.num_classes} "
                f"classes; use () if they have none"
            )


def check_pixels(pixels: Tensor) -> None:
    """Raise TypeError or ValueError unless `pixels` is a uint8 tensor of shape (B, C, H, W), of at least one pixel."""
    if not (isinstance(pixels, Tensor) and pixels.dtype == torch.uint8):
        raise TypeError(f"pixels is {kind(pixels)}, must be a uint8 tensor of shape (B, C, H, W); use Images.pixels")
    if pixels.ndim != 4 or 0 in pixels.shape[1:]:
        raise ValueError(f"pixels.shape={tuple(pixels.shape)} must be (B, C, H, W); use (100, 3, 32, 32)")


def kind(value: object) -> str:
    """What a wrong argument is, for the message: the type and the shape of a tensor, otherwise the type."""
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
