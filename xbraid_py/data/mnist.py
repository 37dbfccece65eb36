"""The handwritten digits of MNIST, and a seeded order of minibatches.

Shape letters: `B` samples, `H W` pixels. Samples lie outermost, as torch's image layers have them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from xbraid_py.data.dataset import data_folder
from xbraid_py.data.files import read_idx, whole_number

logger = logging.getLogger(__name__)

NUM_CLASSES = 10
IMAGE_SHAPE = (28, 28)
# Mean and standard deviation of all training pixels, black being 0 and white 1.
MEAN, STANDARD_DEVIATION = 0.1307, 0.3081

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

    The four files may be packed with gzip (`train-images-idx3-ubyte.gz`) or not, and may have a dot in their
    names (`train-images.idx3-ubyte`). Contents other than the published ones are only reported by a warning in the
    log, as long as the files are sound; there may be fewer images, or more.

    Parameters
    ----------
    folder : path-like, optional
        Folder of the four files; by default `mnist` in the folder that the variable XBRAID_DATA names, or that folder
        itself; without the variable, `mnist` in `../shared/data` seen from the project's root.

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
                f"{name}, or {_dotted(name)}, each also with .gz, not found in {places}. "
                f"It comes from {ORIGIN}. Name the folder that holds it with --data_dir FOLDER, or the folder that "
                f"holds mnist/ with the variable XBRAID_DATA."
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
    """Images with one channel, of mean 0 and standard deviation 1 over all training pixels.

    Parameters
    ----------
    images : torch.Tensor
        Shape (B, H, W), uint8.
    dtype : torch.dtype
        Floating-point type of the result.

    Returns
    -------
    torch.Tensor
        Shape (B, 1, H, W), on the device of `images`.

    Raises
    ------
    TypeError
        If `images` is no uint8 tensor or `dtype` is no floating-point type.
    ValueError
        If `images` has another number of axes.
    """
    if not (isinstance(images, torch.Tensor) and images.dtype == torch.uint8):
        found = images.dtype if isinstance(images, torch.Tensor) else type(images).__name__
        raise TypeError(f"images is {found}, must be a uint8 tensor of shape (B, H, W); use Mnist.train_images")
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype} is no floating-point type; use torch.float32")
    if images.ndim != 3:
        raise ValueError(f"images.shape={tuple(images.shape)} must be (B, H, W); use (100, 28, 28)")
    return ((images.to(dtype) / 255 - MEAN) / STANDARD_DEVIATION).unsqueeze(1)


@dataclass(frozen=True)
class Batches:
    """A seeded order of minibatches: every epoch a new permutation of all samples.

    The permutation depends on the seed and the number of the epoch only. So it is the same on every rank without a
    message, and a run that goes on in the middle of an epoch finds its place by `epoch(number)[done:]`. Of a data
    set of any kind, not of MNIST alone.

    Parameters
    ----------
    num_samples : int
        Number of samples, at least 1.
    batch_size : int
        Samples in a minibatch, at least 1.
    seed : int
        Seed of all permutations, not negative.
    drop_last : bool
        Leave out the last minibatch of an epoch if it is incomplete; by default so, as sizes that change are not
        worth their trouble in training. False is for evaluation: every sample comes exactly once.

    Raises
    ------
    TypeError
        If a number is not an integer or `drop_last` no bool.
    ValueError
        If a number is too small, or not one complete minibatch is left.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    drop_last: bool = True

    def __post_init__(self):
        whole_number("num_samples", self.num_samples, 1, 60000)
        whole_number("batch_size", self.batch_size, 1, 100)
        whole_number("seed", self.seed, 0, 0)
        if not isinstance(self.drop_last, bool):
            raise TypeError(f"drop_last={self.drop_last!r} must be True or False; use True")
        if self.drop_last and self.batch_size > self.num_samples:
            raise ValueError(
                f"batch_size={self.batch_size} is more than num_samples={self.num_samples}, and drop_last=True leaves "
                f"no minibatch; use at most {self.num_samples}, or drop_last=False"
            )

    def __len__(self) -> int:
        """Minibatches in an epoch."""
        complete, rest = divmod(self.num_samples, self.batch_size)
        return complete + (rest > 0 and not self.drop_last)

    def epoch(self, number: int) -> tuple[torch.Tensor, ...]:
        """Minibatches of an epoch.

        Parameters
        ----------
        number : int
            Number of the epoch, from 0.

        Returns
        -------
        tuple of torch.Tensor
            As many as `len` says; each int64 of shape (batch_size,), the last one shorter if it is incomplete and
            kept: indices of samples.
        """
        random = np.random.default_rng((self.seed, whole_number("number", number, 0, 0)))
        order = torch.from_numpy(random.permutation(self.num_samples).astype(np.int64))
        return order.split(self.batch_size)[: len(self)]
