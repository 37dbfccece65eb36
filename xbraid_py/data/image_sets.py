"""Which sets of images there are, by name."""

from __future__ import annotations

import os

from xbraid_py.data.cifar import load_cifar10, load_cifar100
from xbraid_py.data.images import ImageSets
from xbraid_py.data.stl10 import load_stl10


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
