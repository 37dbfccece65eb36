"""What is done to images ahead of training: standardized one by one, and cropped and flipped at random.

Shape letters: `B` samples, `C` channels, `H W` pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from xbraid_py.data.dataset import whole_number
from xbraid_py.data.images import check_pixels, kind

# SplitMix64: G. L. Steele, D. Lea, C. H. Flood, Fast splittable pseudorandom number generators, OOPSLA 2014, with the
# multipliers and shifts of S. Vigna's splitmix64.c, https://prng.di.unimi.it.
_STEP = 0x9E3779B97F4A7C15
_MULTIPLIERS = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_SHIFTS = 30, 27, 31
_WORD = 2**64


def standardize(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Every image by itself brought to mean 0 and standard deviation 1, over all its numbers.

    As TensorFlow's `per_image_standardization` does, the deviation that is divided by is at least 1/sqrt(C H W), so
    that an image of one color becomes 0. Mean and deviation come from whole numbers: they do not depend on the other
    images of the batch, on threads, or on the device.

    Parameters
    ----------
    pixels : torch.Tensor
        Shape (B, C, H, W), uint8.
    dtype : torch.dtype
        Floating-point type of the result.

    Returns
    -------
    torch.Tensor
        Shape (B, C, H, W), on the device of `pixels`.

    Raises
    ------
    TypeError
        If `pixels` is no uint8 tensor or `dtype` is no floating-point type.
    ValueError
        If `pixels` has another number of axes, or no pixels.
    """
    check_pixels(pixels)
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype} is no floating-point type; use torch.float32")
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
        """Images as they are trained on in one epoch.

        Parameters
        ----------
        pixels : torch.Tensor
            Shape (B, C, H, W), uint8.
        indices : torch.Tensor
            Shape (B,), int64, not negative: index of each image in the whole set. Best on the CPU.
        epoch : int
            Number of the epoch, from 0.

        Returns
        -------
        torch.Tensor
            Shape (B, C, H, W), uint8, on the device of `pixels`; new memory.

        Raises
        ------
        TypeError
            If `pixels` is no uint8 tensor, `indices` no int64 tensor or `epoch` no integer.
        ValueError
            If the shapes do not fit each other, an index or `epoch` is negative, or `pad` is as large as the images.
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
