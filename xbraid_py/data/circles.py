"""Co-centric circles: a ring around a disc, two classes in the square [-3, 3]^2 (paper 000, eq. 11).

Shape letters: `B` samples. Features are (x, y), shape (2, B); class 1 is the ring 2 <= |(x, y)| < 3.
"""

from __future__ import annotations

import numpy as np
import torch

from xbraid_py.data.dataset import Dataset, check_dtype, equal_share, whole_number

NUM_CLASSES = 2
INNER, OUTER = 2.0, 3.0  # radii of the ring
SAMPLINGS = ("balanced", "square")


def class_of(x, y) -> np.ndarray:
    """Class of the points (x, y), of any shapes that broadcast, by eq. 11: 1 in the ring, 0 elsewhere; int64."""
    radius = np.hypot(x, y)
    return ((radius >= INNER) & (radius < OUTER)).astype(np.int64)


def generate(
    num_train: int = 2000,
    num_val: int = 1000,
    seed: int = 0,
    sampling: str = "balanced",
    dtype: torch.dtype = torch.float64,
) -> tuple[Dataset, Dataset]:
    """Points for training and for validation, drawn alike; paper 000 leaves open how.

    The same arguments give the same points on every rank, without a message; the training points do not depend on
    `num_val`.

    Parameters
    ----------
    num_train, num_val : int
        Points, at least 2; even numbers with the balanced sampling.
    seed : int
        Not negative.
    sampling : {"balanced", "square"}
        As many points of each class, uniform in the unit disc (class 0) and in the ring (class 1), which leaves a gap
        between the classes; or uniform in the whole square, with the class of eq. 11.
    dtype : torch.dtype
        Floating-point type of the features.

    Returns
    -------
    train, validation : Dataset
        Features of shapes (2, num_train) and (2, num_val).

    Raises
    ------
    TypeError, ValueError
        If a number is no integer, too small, or odd with the balanced sampling; for another word or dtype.
    """
    if sampling not in SAMPLINGS:
        raise ValueError(f"sampling={sampling!r} must be {' or '.join(SAMPLINGS)}; use balanced")
    sizes = []
    for name, value, good in (("num_train", num_train, 2000), ("num_val", num_val, 1000)):
        sizes.append(whole_number(name, value, NUM_CLASSES, good))
        if sampling == "balanced":
            equal_share(name, value, NUM_CLASSES)
    seed = whole_number("seed", seed, 0, 0)
    check_dtype(dtype, "torch.float64")
    draw = _balanced if sampling == "balanced" else _square
    # A generator for each set: the training points are the same whatever num_val is.
    train, val = (draw(np.random.default_rng([seed, part]), sizes[part], dtype) for part in (0, 1))
    return train, val


def _balanced(random: np.random.Generator, number: int, dtype: torch.dtype) -> Dataset:
    labels = random.permutation(np.arange(number) % NUM_CLASSES)
    low, high = np.where(labels, INNER, 0.0), np.where(labels, OUTER, 1.0)
    # The area within a radius grows as its square: uniform squares make uniform points. 3 itself is left out.
    radius = np.sqrt(low**2 + (high**2 - low**2) * random.random(number))
    angle = random.uniform(0.0, 2 * np.pi, number)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)])
    return Dataset(torch.from_numpy(points).to(dtype), torch.from_numpy(labels), NUM_CLASSES)


def _square(random: np.random.Generator, number: int, dtype: torch.dtype) -> Dataset:
    points = random.uniform(-OUTER, OUTER, (2, number))
    return Dataset(torch.from_numpy(points).to(dtype), torch.from_numpy(class_of(*points)), NUM_CLASSES)
