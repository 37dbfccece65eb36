"""The peaks classification problem: five bands of height of a function on the square [-3, 3]^2.

Shape letters: `B` samples. Features are (x, y), shape (2, B); the class is the band that holds f(x, y).
"""

from __future__ import annotations

import os
from functools import cache

import numpy as np
import torch

from xbraid_py.data.dataset import (
    Dataset,
    check_dtype,
    equal_share,
    find_files,
    read_features,
    read_labels,
    whole_number,
)

NUM_CLASSES = 5
GRID_SIZE = 256

ORIGIN = "the folder examples/peaks of https://github.com/steffi7574/LayerParallelLearning"
# The published files in the order they are read, each with its SHA-256.
PUBLISHED = {
    "features_training.dat": "7d3ab3a8512ae2606961324534a932a3ac6bc0b521c7c2245b2a3a36672d0485",
    "labels_training.dat": "a07e89f267d3205ad3fdfe785c2a5c72211458f9fb6574783a2e2b543f0b0208",
    "features_validation.dat": "4e1cbdd51ddda9a6cb5eae87832ed77b0d0c218bec90776791da91e910067daa",
    "labels_validation.dat": "8c201a5d2f96dd503873a2b22c8d3aae19348079b5bed2aad795d0802e080114",
}


def peaks_function(x, y) -> np.ndarray:
    """MATLAB's `peaks` at the points (x, y), of any shapes that broadcast: three hills and three hollows; float64."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    return (
        3 * (1 - x) ** 2 * np.exp(-(x**2) - (y + 1) ** 2)
        - 10 * (x / 5 - x**3 - y**5) * np.exp(-(x**2) - y**2)
        - np.exp(-((x + 1) ** 2) - y**2) / 3
    )


@cache
def band_edges() -> tuple[float, ...]:
    """Six heights that bound the five bands: equally spaced from minimum to maximum over the grid."""
    x, y = mesh(GRID_SIZE).numpy()
    heights = peaks_function(x, y)
    return tuple(np.linspace(heights.min(), heights.max(), NUM_CLASSES + 1).tolist())


def class_of(x, y) -> np.ndarray:
    """True class of the points (x, y), of any shapes that broadcast: 0 for the lowest band, 4 for the highest; int64.

    A point on the edge of two bands belongs to the upper one. Between grid points the function passes its extrema over
    the grid a little; such points belong to the lowest or highest band.
    """
    return np.digitize(peaks_function(x, y), band_edges()[1:-1]).astype(np.int64)


def class_names() -> list[str]:
    """Number and heights of every class, as in "0: -6.5 to -3.6", for legends."""
    edges = [f"{edge:.1f}" for edge in band_edges()]
    return [f"{k}: {edges[k]} to {edges[k + 1]}" for k in range(NUM_CLASSES)]


def mesh(resolution: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Points (2, resolution**2) of a regular grid of [-3, 3]^2, both ends included, x running fastest.

    What belongs to the points becomes a picture, rows from y = -3 upwards, by `reshape(resolution, resolution)`. Raises
    `ValueError` for a resolution below 2.
    """
    if resolution < 2:
        raise ValueError(f"resolution={resolution} must be at least 2; use 200")
    line = np.linspace(-3, 3, resolution)
    x, y = np.meshgrid(line, line)
    return torch.from_numpy(np.stack([x.ravel(), y.ravel()])).to(dtype)


def generate(
    num_train: int = 5000,
    num_val: int = 5000,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    balanced: bool = False,
) -> tuple[Dataset, Dataset]:
    """Points drawn from the 256x256 grid, for training and for validation.

    Training points are drawn equally from the classes, without replacement, and shuffled. Validation points
    are drawn uniformly from the grid points that training does not contain, so their classes are as frequent
    as their bands are wide, or (`balanced`) equally from the classes as well, as the published ones are. Who
    says the class of the widest band everywhere is right in 77 % of the former and 20 % of the latter. The
    same arguments give the same points on every rank, without a message; the training points do not depend
    on the validation points.

    Parameters
    ----------
    num_train : int
        Training points, a multiple of 5, at most 8990 (the smallest class has 1798 grid points).
    num_val : int
        Validation points, at least 1, at most the 65536 - num_train that are left.
    seed : int
        Seed of the draw, not negative.
    dtype : torch.dtype
        Floating-point type of the features.
    balanced : bool
        Draw the validation points, a multiple of 5, equally from the classes.

    Returns
    -------
    train, validation : Dataset
        Features of shapes (2, num_train) and (2, num_val).

    Raises
    ------
    TypeError
        If a number is not an integer or `dtype` is no floating-point type.
    ValueError
        If a number is no multiple of 5 where it has to be, is too small, or there are too few grid points.
    """
    num_train = whole_number("num_train", num_train, NUM_CLASSES, 5000)
    num_val = whole_number("num_val", num_val, 1, 5000)
    seed = whole_number("seed", seed, 0, 0)
    check_dtype(dtype, "torch.float64")
    share = equal_share("num_train", num_train, NUM_CLASSES)
    points = mesh(GRID_SIZE)
    classes = class_of(*points.numpy())
    sizes = np.bincount(classes, minlength=NUM_CLASSES)
    if share > sizes.min():
        raise ValueError(
            f"num_train={num_train} needs {share} points of class {sizes.argmin()}, of which the grid has "
            f"{sizes.min()}; use at most {NUM_CLASSES * sizes.min()}"
        )
    if num_train + num_val > classes.size:
        raise ValueError(
            f"num_val={num_val} is more than the {classes.size - num_train} grid points that "
            f"num_train={num_train} leaves; use at most {classes.size - num_train}"
        )

    random = np.random.default_rng(seed)
    drawn = [random.choice(np.flatnonzero(classes == k), share, replace=False) for k in range(NUM_CLASSES)]
    train = random.permutation(np.concatenate(drawn))
    rest = np.setdiff1d(np.arange(classes.size), train)
    if balanced:
        share = equal_share("num_val", num_val, NUM_CLASSES)
        left = [rest[classes[rest] == k] for k in range(NUM_CLASSES)]
        if share > min(map(len, left)):
            raise ValueError(
                f"num_val={num_val} needs {share} points of each class, and num_train={num_train} leaves "
                f"{min(map(len, left))} of one; use at most {NUM_CLASSES * min(map(len, left))}"
            )
        validation = np.concatenate([random.choice(places, share, replace=False) for places in left])
    else:
        validation = random.choice(rest, num_val, replace=False)

    def pick(rows: np.ndarray) -> Dataset:
        return Dataset(points[:, rows].to(dtype), torch.from_numpy(classes[rows]), NUM_CLASSES)

    return pick(train), pick(validation)


def load(
    folder: str | os.PathLike | None = None,
    num_train: int | None = None,
    num_val: int | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[Dataset, Dataset]:
    """The published points, or own ones in files of the same names and format.

    The published files hold 5000 points for training and 200 for validation, sorted by class; 72 of the 200 are
    training points as well, so the accuracy on them flatters. Contents other than the published ones are only reported
    by a warning in the log, as long as every row is good.

    Parameters
    ----------
    folder : path-like, optional
        Folder of the four files, see `data_folder`.
    num_train, num_val : int, optional
        Take only so many points, the first ones of every class in equal numbers; by default all.
    dtype : torch.dtype
        Floating-point type of the features, which are (2, B).

    Raises
    ------
    FileNotFoundError
        If a file is missing, with where it comes from.
    ValueError
        For a bad row, with its line; for files of different lengths; for more points than there are.
    """
    paths = find_files("peaks", PUBLISHED, ORIGIN, folder)
    parts = []
    for name, number, features_path, labels_path in zip(
        ("num_train", "num_val"), (num_train, num_val), paths[::2], paths[1::2], strict=True
    ):
        features = read_features(features_path, 2)
        labels, _ = read_labels(labels_path, NUM_CLASSES)
        if len(labels) != features.shape[1]:
            raise ValueError(
                f"{features_path} has {features.shape[1]} rows but {labels_path} has {len(labels)}; "
                f"row k of both belongs to the same point"
            )
        rows = slice(None) if number is None else _first_of_classes(name, number, labels)
        parts.append(Dataset(features[:, rows].to(dtype), labels[rows], NUM_CLASSES))
    return parts[0], parts[1]


def _first_of_classes(name: str, number: int, labels: torch.Tensor) -> torch.Tensor:
    """Rows of the first `number / 5` samples of every class, in the order of the file."""
    share, extra = divmod(whole_number(name, number, NUM_CLASSES, NUM_CLASSES), NUM_CLASSES)
    available = int(torch.bincount(labels, minlength=NUM_CLASSES).min())
    if extra or share > available:
        raise ValueError(
            f"{name}={number} must be a multiple of the {NUM_CLASSES} classes, and no class gives more than the "
            f"{available} points that the smallest one has; use {NUM_CLASSES * min(share, available)}"
        )
    rows = [torch.nonzero(labels == k).flatten()[:share] for k in range(NUM_CLASSES)]
    return torch.cat(rows).sort().values
