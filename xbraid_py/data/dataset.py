"""A labeled data set in memory, a seeded order of its minibatches, and the check of whole numbers.

Shape letters: `F` features, `B` samples. Features lie outermost and samples last, as in the states (C, B).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples with one class each.

    Parameters
    ----------
    features : torch.Tensor
        Shape (F, B), floating point.
    labels : torch.Tensor
        Shape (B,), int64, values 0 .. num_classes - 1.
    num_classes : int
        Number of classes, at least 2; not every class needs a sample.

    Raises
    ------
    TypeError
        If features are not a floating-point tensor or labels not an int64 tensor.
    ValueError
        If the shapes do not fit each other or a label is outside 0 .. num_classes - 1.
    """

    features: torch.Tensor
    labels: torch.Tensor
    num_classes: int

    def __post_init__(self):
        if not (isinstance(self.features, torch.Tensor) and self.features.is_floating_point()):
            raise TypeError(f"features is {_kind(self.features)}, must be a floating-point tensor of shape (F, B)")
        if not (isinstance(self.labels, torch.Tensor) and self.labels.dtype == torch.int64):
            raise TypeError(f"labels is {_kind(self.labels)}, must be an int64 tensor of shape (B,)")
        if self.features.ndim != 2 or 0 in self.features.shape:
            raise ValueError(
                f"features.shape={tuple(self.features.shape)} must be (F, B), features first, at least one of each; "
                f"use (2, 5000)"
            )
        if self.labels.shape != self.features.shape[1:]:
            raise ValueError(
                f"labels.shape={tuple(self.labels.shape)} must hold one label for each of the "
                f"{self.features.shape[1]} columns of features; use ({self.features.shape[1]},)"
            )
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes} must be at least 2; use 5")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"labels holds values from {low} to {high}, must lie in 0 .. num_classes - 1 = {self.num_classes - 1}"
            )

    @property
    def num_features(self) -> int:
        """F."""
        return self.features.shape[0]

    @property
    def num_samples(self) -> int:
        """B."""
        return self.features.shape[1]


def _kind(value) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


@dataclass(frozen=True)
class Batches:
    """A seeded order of minibatches: every epoch a new permutation of all samples.

    The permutation depends on the seed and the number of the epoch only. So it is the same on every rank without a
    message, and a run that goes on in the middle of an epoch finds its place by `epoch(number)[done:]`.

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


def whole_number(name: str, value: int, least: int, example: int) -> int:
    """`value` as an int, if it is an integer of at least `least`.

    Parameters
    ----------
    name : str
        What the caller's argument is called, for the message.
    value : int
        The argument; numpy's integers too, no bool.
    least : int
        Smallest value allowed.
    example : int
        A value that works, for the message.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is too small.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r} must be an integer; use {example}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}; use {example}")
    return operator.index(value)
