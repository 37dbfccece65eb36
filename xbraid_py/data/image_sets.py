"""Sets of images by name, whole, or the first of them in a seeded order."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import lru_cache

import torch

from xbraid_py.data.cifar import load_cifar10, load_cifar100
from xbraid_py.data.images import Images, ImageSets
from xbraid_py.data.stl10 import load_stl10

# Subsets are the same in all runs, whatever their seeds: they stand for a smaller set.
_SUBSET_SEED = 0


def load_images(name: str, folder: str | os.PathLike | None = None) -> ImageSets:
    """The data set of that name.

    Parameters
    ----------
    name : str
        `cifar10`, `cifar100` (with its 100 fine classes) or `stl10`.
    folder : path-like, optional
        Folder of its files, see `load_cifar10`, `load_cifar100` and `load_stl10`.

    Raises
    ------
    FileNotFoundError
        If training or test images are missing, with where they come from and how to name the folder.
    ValueError
        If there is no data set of that name, or for a damaged file, with its name.
    """
    readers = {"cifar10": load_cifar10, "cifar100": load_cifar100, "stl10": load_stl10}
    if name not in readers:
        raise ValueError(f"name={name!r} is none of {', '.join(readers)}; use 'cifar10'")
    return readers[name](folder)


@dataclass(frozen=True, eq=False)
class ImageSplit:
    """Images for training and test.

    Attributes
    ----------
    train, test : Images
    num_classes : int
    said : str
        Which files were found, in words.
    """

    train: Images
    test: Images
    num_classes: int
    said: str


def load_split(
    name: str, train_images: int = 0, test_images: int = 0, data_dir: str | os.PathLike | None = None
) -> ImageSplit:
    """Read a set of images; sends no message.

    Parameters
    ----------
    name : str
        See `load_images`.
    train_images, test_images : int
        Take only so many; 0 takes all. The same ones in every run.
    data_dir : path-like, optional
        Folder of the files, by default the usual one.

    Raises
    ------
    OSError
        If a file that is needed is missing.
    ValueError
        If a file is damaged, or there are not so many images.
    """
    sets = _loaded(name, None if data_dir is None else os.fspath(data_dir))
    found = f"{name}: found {', '.join(sets.found)}" + ("" if sets.complete else "; the set is incomplete")
    train, test = _first(sets.train, train_images, "train_images"), _first(sets.test, test_images, "test_images")
    said = f"{found}; {train.num_samples} images for training, {test.num_samples} for test"
    return ImageSplit(train, test, sets.num_classes, said)


def _first(images: Images, count: int, option: str) -> Images:
    if not 0 <= count <= images.num_samples:
        raise ValueError(
            f"{option}={count} must lie in 0 .. {images.num_samples}, the images that were found; use 0 for all of them"
        )
    if not count:
        return images
    random = torch.Generator().manual_seed(_SUBSET_SEED)
    return images.rows(torch.randperm(images.num_samples, generator=random)[:count])


@lru_cache(maxsize=1)
def _loaded(name: str, folder: str | None) -> ImageSets:
    """The last set is kept: the next run of a process often has the same."""
    return load_images(name, folder)
