"""One run of the study of multi-level residual networks as plain numbers and words, for other processes and records."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from studies.multi_level.tables import result_of
from xbraid_py.data.image_subsets import load_samples
from xbraid_py.recipes.images import ImageOptions, numbers_of


@dataclass(frozen=True, kw_only=True)
class Case(ImageOptions):
    """One run of the study; by default the paper's ResNet-50-i on CIFAR-10.

    Parameters
    ----------
    model
        First, last or multilevel, see `plan`.
    seed
        Of weights, order and augmentation of the images.
    """

    model: str = "multilevel"
    seed: int = 0

    def __post_init__(self):
        super().__post_init__()
        _ = self.levels(self.model)


def train(settings: Mapping[str, Any], data_dir: str | os.PathLike | None = None) -> dict:
    """Run a `Case`, given as a mapping.

    Parameters
    ----------
    settings : mapping
    data_dir : path-like, optional
        Folder of the images, by default the usual one.

    Returns
    -------
    dict
        See `result_of`.

    Raises
    ------
    RunError
        If the loss is not finite.
    """
    # JSON has lists for tuples.
    case = Case(**{name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()})
    samples = load_samples(case.data, case.train_images, case.test_images, data_dir)
    training = case.make(case.model, case.seed, samples)
    return result_of([numbers_of(record) for record in training.run(case.validate_every)])
