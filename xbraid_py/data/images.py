"""Labeled images of three colors: whole sets, every image standardized, and crops and flips at random.

Shape letters: `B` samples, `C` channels, `H W` pixels. Samples lie outermost, as torch's image layers have them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xbraid_py.data.dataset import check_dtype, whole_number

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
        """Some of the images, in that order: a slice gives a view, an int64 tensor of shape (b,) a copy; else
        `TypeError`.
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


# SplitMix64: G. L. Steele, D. Lea, C. H. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014, with the
# multipliers and shifts of S. Vigna's splitmix64.c, https://prng.di.unimi.it.
_STEP = 0x9E3779B97F4A7C15
_MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31
_WORD = 2**64


def standardize(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images (B, C, H, W), uint8, each by itself brought to mean 0 and standard deviation 1 over all its numbers.

    As TensorFlow's `per_image_standardization` does, the deviation that is divided by is at least 1/sqrt(C H W), so
    that an image of one color becomes 0. Mean and deviation come from whole numbers: they do not depend on the other
    images of the batch, on threads, or on the device.

    Raises
    ------
    TypeError
        If `pixels` is no uint8 tensor or `dtype` is no floating-point type.
    ValueError
        If `pixels` has another number of axes, or no pixels.
    """
    check_pixels(pixels)
    check_dtype(dtype)
    size = pixels.shape[1:].numel()
    # The narrow integer is much faster; it holds the sum of the squares of up to 33025 pixels.
    whole = torch.int32 if size * 255**2 < 2**31 else torch.int64
    values = pixels.flatten(1).to(whole)
    total = values.sum(1, dtype=whole).long()
    squares = (values * values).sum(1, dtype=whole).long()
    deviation = (size * squares - total * total).double().sqrt() / size
    # Half the digits of a half type would go in the subtraction.
    wide = torch.promote_types(dtype, torch.float32)
    mean, deviation = (
        number.to(wide).view(-1, 1, 1, 1) for number in (total.double() / size, deviation.clamp(min=size**-0.5))
    )
    return pixels.to(wide).sub_(mean).div_(deviation).to(dtype)


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Random crops and flips: padded with zeros, cropped to the old size at a random place, mirrored or not.

    What happens to an image depends on the seed, the epoch and the image's index in its set, and on nothing else: not
    on the batch it is in or the rank that holds it. All places of the crop are equally likely, and both directions.

    Parameters
    ----------
    pad : int
        Zeros on each side; 4 for CIFAR, 12 for STL-10 (paper 003, appendix A).
    flip : bool
        Whether left and right are exchanged in one half of the images. The places of the crops do not depend on it.
    seed : int
        0 .. 2**64 - 1.

    Raises
    ------
    TypeError
        If `pad` or `seed` is no integer or `flip` no bool.
    ValueError
        If `pad` is negative or `seed` is out of its range.
    """

    pad: int = 4
    flip: bool = True
    seed: int = 0

    def __post_init__(self):
        whole_number("pad", self.pad, 0, 4)
        whole_number("seed", self.seed, 0, 0)
        if self.seed >= _WORD:
            raise ValueError(f"seed={self.seed} must be below 2**64; use 0")
        if not isinstance(self.flip, bool):
            raise TypeError(f"flip={self.flip!r} must be True or False; use True")

    def __call__(self, pixels: Tensor, indices: Tensor, epoch: int) -> Tensor:
        """Images as they are trained on in one epoch, counted from 0.

        Parameters
        ----------
        pixels : torch.Tensor
            Shape (B, C, H, W), uint8.
        indices : torch.Tensor
            Shape (B,), int64, not negative: index of each image in the whole set. Best on the CPU.
        epoch : int

        Returns
        -------
        torch.Tensor
            As `pixels`, in new memory.

        Raises
        ------
        TypeError, ValueError
            If an argument is of another type or shape, or negative, or `pad` is as large as the images.
        """
        check_pixels(pixels)
        num_samples, _, height, width = pixels.shape
        if not (isinstance(indices, Tensor) and indices.dtype == torch.int64):
            raise TypeError(f"indices is {kind(indices)}, must be an int64 tensor of shape (B,); use torch.arange(B)")
        if indices.shape != (num_samples,):
            raise ValueError(
                f"indices.shape={tuple(indices.shape)} must hold one index for each of the {num_samples} images; use "
                f"({num_samples},)"
            )
        if num_samples and indices.min() < 0:
            raise ValueError(f"indices holds {indices.min()}, must hold no negative index; use torch.arange(B)")
        if self.pad >= min(height, width):
            raise ValueError(f"pad={self.pad} must be smaller than images of {height} x {width} pixels; use 4")
        rows, columns, mirrored = self._drawn(indices.cpu(), whole_number("epoch", epoch, 0, 0))
        padded = functional.pad(pixels, (self.pad,) * 4)
        # All crops as views of the padded images, (B, C, places, places, H, W); one of each image is copied.
        crops = padded.unfold(2, height, 1).unfold(3, width, 1)
        device = pixels.device
        chosen = crops[torch.arange(num_samples, device=device), :, rows.to(device), columns.to(device)]
        if self.flip:
            # These alone: much faster than to mirror all and choose.
            images = mirrored.nonzero()[:, 0].to(device)
            chosen[images] = chosen[images].flip(-1)
        return chosen

    def _drawn(self, indices: Tensor, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
        """First row and first column of each crop in the padded image, and whether it is mirrored."""
        epochs = random_bits(self.seed, np.array([epoch % _WORD], np.uint64))
        bits = random_bits(int(epochs[0]), indices.numpy().astype(np.uint64))
        places = np.uint64(2 * self.pad + 1)
        # Three separate parts of the 64 bits: 24 for each place, as a fraction in 0 .. 1, and the lowest one.
        fractions = bits >> np.uint64(40), bits >> np.uint64(16) & np.uint64(2**24 - 1)
        rows, columns = (torch.from_numpy((part * places >> np.uint64(24)).astype(np.int64)) for part in fractions)
        return rows, columns, torch.from_numpy((bits & np.uint64(1)).astype(bool))


def random_bits(seed: int, numbers: np.ndarray) -> np.ndarray:
    """The numbers at those places, from 0, of the stream that SplitMix64 gives for a seed; uint64."""
    # Products and sums of arrays wrap around at 2**64, which is what is meant.
    state = (numbers + np.uint64(1)) * np.uint64(_STEP) + np.uint64(seed)
    for multiplier, shift in zip(_MULTIPLIERS, _SHIFTS, strict=False):
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(multiplier)
    return state ^ (state >> np.uint64(_SHIFTS[-1]))
