"""The handwritten digits of MNIST: as images, as columns of features, and as sequences.

Shape letters: `B` samples, `H W` pixels, `F` features, `L` steps. Samples lie outermost, as torch's image layers have
them, but in columns.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xbraid_py.data.dataset import check_dtype, data_folder, kind_of, read_idx, ways

logger = logging.getLogger(__name__)

NUM_CLASSES = 10
IMAGE_SHAPE = (28, 28)
# Mean and standard deviation of all training pixels, black being 0 and white 1.
MEAN, STANDARD_DEVIATION = 0.1307, 0.3081
SCALINGS = ("centered", "unit", "standard")
ORDERS = {"rows": 28, "columns": 28, "pixels": 1}
"""How an image is read as a sequence, and the features F of a step."""

ORIGIN = "http://yann.lecun.com/exdb/mnist"
# The published files, each with the SHA-256 of its values, which packing and header do not change.
PUBLISHED = {
    "train-images-idx3-ubyte": "741c988805d008ac6e4c904b69001ba184c24b2c540a4ef403f4c71b676cf757",
    "train-labels-idx1-ubyte": "1feba77c54802fa5339a11837ea4b2866434b83314ec45192930f1df69120c13",
    "t10k-images-idx3-ubyte": "6d87418db22cc8025d05968bec9bd5c3932904b23485740db143a061a2c9d161",
    "t10k-labels-idx1-ubyte": "ddeff807876a9661a1110d45c266c86239a3a1b7d37da0c3716a7a683c852ff5",
}


@dataclass(frozen=True, eq=False)
class Mnist:
    """Images of digits and what they show, as they lie in the files.

    Parameters
    ----------
    train_images, test_images : torch.Tensor
        Shapes (60000, 28, 28) and (10000, 28, 28) for the published files, uint8: 0 is the background, 255 the ink.
    train_labels, test_labels : torch.Tensor
        Shapes (60000,) and (10000,), int64, values 0 .. 9.
    """

    train_images: torch.Tensor
    train_labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor


def load(folder: str | os.PathLike | None = None) -> Mnist:
    """The published images and labels, or own ones in files of the same names and format.

    The four files may be packed with gzip (`train-images-idx3-ubyte.gz`) or not, and may have a dot in their names
    (`train-images.idx3-ubyte`). Contents other than the published ones are only reported by a warning in the log, as
    long as the files are sound; there may be fewer images, or more.

    Parameters
    ----------
    folder : path-like, optional
        See `data_folder`; without it, the folder that XBRAID_DATA names may hold the files itself.

    Raises
    ------
    FileNotFoundError
        If a file is missing, with where it comes from and how to name the folder.
    ValueError
        For a damaged file, other images than 28 x 28 unsigned bytes, numbers of images and labels that differ, or a
        label above 9; with the name of the file.
    """
    folders = [data_folder("mnist", folder)]
    root = os.environ.get("XBRAID_DATA")
    if folder is None and root:
        folders.append(Path(root).expanduser())
    # All files from one folder: sets that are mixed would be wrong without a word.
    home = next((place for place in folders if any(_path(place, name) for name in PUBLISHED)), None)
    values, paths = [], []
    for name, published in PUBLISHED.items():
        path = home and _path(home, name)
        if path is None:
            places = home or " or ".join(map(str, folders))
            raise FileNotFoundError(
                f"{name}, or {_dotted(name)}, each also with .gz, not found in {places}. It comes from {ORIGIN}. "
                f"{ways('mnist')}"
            )
        paths.append(path)
        values.append(read_idx(path))
        _check_shape(path, values[-1], IMAGE_SHAPE if "idx3" in name else ())
        if hashlib.sha256(values[-1]).hexdigest() != published:
            logger.warning("%s does not hold the published values (their SHA-256 differs)", path)
    for images, labels in ((0, 1), (2, 3)):
        _check_labels(paths[images], len(values[images]), paths[labels], values[labels])
    train_images, train_labels, test_images, test_labels = map(torch.from_numpy, values)
    return Mnist(train_images, train_labels.long(), test_images, test_labels.long())


def _dotted(name: str) -> str:
    return name.replace("-idx", ".idx")


def _path(folder: Path, name: str) -> Path | None:
    """The file as it is spelt and packed in the folder, or None."""
    spellings = (folder / f"{stem}{packed}" for stem in (name, _dotted(name)) for packed in ("", ".gz"))
    return next((path for path in spellings if path.is_file()), None)


def _check_shape(path: Path, values: np.ndarray, sample: tuple[int, ...]) -> None:
    if values.dtype != np.uint8 or values.ndim == 0 or values.shape[1:] != sample or len(values) == 0:
        shape = ", ".join(["n", *map(str, sample)]) + ("" if sample else ",")
        raise ValueError(
            f"{path} holds {values.dtype} of shape {values.shape}, must hold uint8 of shape ({shape}), n at least 1"
        )


def _check_labels(images: Path, num_images: int, path: Path, labels: np.ndarray) -> None:
    if len(labels) != num_images:
        raise ValueError(
            f"{images} holds {num_images} images but {path} holds {len(labels)} labels; entry k of both belongs to the "
            f"same digit"
        )
    if labels.max() >= NUM_CLASSES:
        row = int(labels.argmax())
        raise ValueError(f"{path} holds the label {labels[row]} at entry {row}, labels must lie in 0 .. 9")


def standardized(images: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Images (B, H, W), uint8, as (B, 1, H, W) of mean 0 and standard deviation 1 over all training pixels.

    Raises
    ------
    TypeError
        If `images` is no uint8 tensor or `dtype` is no floating-point type.
    ValueError
        If `images` has another number of axes.
    """
    if not (isinstance(images, torch.Tensor) and images.dtype == torch.uint8):
        raise TypeError(
            f"images is {kind_of(images)}, must be a uint8 tensor of shape (B, H, W); use Mnist.train_images"
        )
    check_dtype(dtype)
    if images.ndim != 3:
        raise ValueError(f"images.shape={tuple(images.shape)} must be (B, H, W); use (100, 28, 28)")
    return ((images.to(dtype) / 255 - MEAN) / STANDARD_DEVIATION).unsqueeze(1)


class Columns:
    """Images of one half of a data set as columns of 784 features, (pixels / spread - center), converted when asked
    for.

    Images are (n, 28, 28) uint8, labels (n,) int64, and the center is (784,).
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, center: torch.Tensor, spread: float, dtype: torch.dtype
    ):
        self.labels, self._pixels = labels, images.flatten(1)
        self._center, self._factor, self._dtype = center.to(dtype), 1.0 / spread, dtype

    def __len__(self) -> int:
        """Samples."""
        return len(self.labels)

    def samples(self, which: torch.Tensor | slice = slice(None)) -> tuple[torch.Tensor, torch.Tensor]:
        """Features (784, B) and labels (B,) of some samples; all if nothing is said."""
        pixels = self._pixels[which].to(self._dtype).mul_(self._factor).sub_(self._center)
        return pixels.T.contiguous(), self.labels[which]

    def portions(self, size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
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
    train, test = (Columns(images, labels, center, spread, dtype) for images, labels in halves)
    return train, test


def sequences(
    images: torch.Tensor, order: str = "rows", length: int | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
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
