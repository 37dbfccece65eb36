"""Labeled images of three colors as whole sets, and what the readers of CIFAR and STL-10 share.

A set may lie there in part. What is missing is said, in the result and by a warning in the log; only a set without
any training or without any test images is refused.

Shape letters: `B` samples, `H W` pixels. Samples lie outermost, as torch's image layers have them.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xbraid_py.data.files import data_folder, ways

logger = logging.getLogger(__name__)

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
        """Some of the images, in the order of `chosen`.

        Parameters
        ----------
        chosen : slice or torch.Tensor
            A slice gives a view of the same memory; an index tensor, of shape (b,), int64, gives a copy.

        Raises
        ------
        TypeError
            If `chosen` is neither.
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


@dataclass(frozen=True, kw_only=True)
class Published:
    """An image set as it was published.

    Parameters
    ----------
    title : str
        Its name in words.
    name : str
        Name of its folder in `XBRAID_DATA`.
    unpacked : str
        Folder that the published archive unpacks to.
    origin : str
        Where it officially comes from.
    num_train, num_test : int
        Numbers of images.
    """

    title: str
    name: str
    unpacked: str
    origin: str
    num_train: int
    num_test: int

    def places(self, folder: str | os.PathLike | None = None) -> list[Path]:
        """Folders where the files may lie, the likeliest first: see `load_cifar10`."""
        home = data_folder(self.name, folder)
        places = [home, home / self.unpacked]
        return places if folder is not None else [*places, home.parent / self.unpacked]

    def missing(self, what: str, places: Sequence[Path]) -> FileNotFoundError:
        """The error for files that are necessary and not there."""
        return FileNotFoundError(
            f"{self.title} needs {what}, not found in {' or '.join(map(str, places))}. It comes from {self.origin}. "
            f"{ways(self.name)}"
        )

    def report(
        self, home: Path, train: Images, test: Images, words: Sequence[str], files: Sequence[str]
    ) -> tuple[tuple[str, ...], bool]:
        """`found` and `complete` of `ImageSets`, after a warning in the log if this is not the whole set.

        Parameters
        ----------
        home : Path
            Folder of the files.
        train, test : Images
            What they hold.
        words : sequence of str
            What was found, in words.
        files : sequence of str
            Names of the published files, of which the missing ones are told.
        """
        absent = [name for name in files if not (home / name).is_file()]
        found = (*words, *(["missing: " + ", ".join(absent)] if absent else []))
        complete = (train.num_samples, test.num_samples) == (self.num_train, self.num_test)
        if not complete:
            logger.warning("%s in %s is not the whole published set: %s", self.title, home, "; ".join(found))
        return found, complete


def found_words(what: str, images: Images, published: int, paths: Sequence[Path]) -> str:
    """One entry of `ImageSets.found`."""
    names = ", ".join(path.name for path in paths)
    return f"{what} ({images.num_samples:,} of {published:,} images): {names}"


def read_records(path: Path, size: int, digest: str | None) -> np.ndarray:
    """Records of one length, one after another.

    Parameters
    ----------
    path : Path
        The file.
    size : int
        Bytes in a record.
    digest : str or None
        SHA-256 or MD5 of the published file, in hexadecimal digits. Another one is reported by a warning in the log,
        not refused: own files of the same format are welcome. Where None is known, the log says the file's SHA-256.

    Returns
    -------
    numpy.ndarray
        Shape (B, size), uint8, B at least 1, writable.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is empty or ends within a record.
    """
    values = np.fromfile(path, np.uint8)
    if len(values) == 0 or len(values) % size:
        fault = "is empty" if len(values) == 0 else f"ends within a record: it has {len(values)} bytes"
        raise ValueError(
            f"{path} {fault}; it must hold a multiple of {size} bytes, such as {10000 * size} for 10,000 images"
        )
    if digest is None:
        logger.info("%s: SHA-256 %s, not compared: that of the file as published is not known here", path, _sha(values))
    elif digest != (_sha(values) if len(digest) == 64 else hashlib.md5(values, usedforsecurity=False).hexdigest()):
        checksum = "SHA-256" if len(digest) == 64 else "MD5"
        logger.warning("%s does not hold the published values (its %s differs)", path, checksum)
    return values.reshape(-1, size)


def _sha(values: np.ndarray) -> str:
    return hashlib.sha256(values).hexdigest()


def check_labels(path: Path, labels: np.ndarray, least: int, most: int, word: str = "label") -> None:
    """Raise ValueError unless all labels of a file lie in `least` .. `most`."""
    wrong = ((labels < least) | (labels > most)).nonzero()[0]
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{path} holds the {word} {labels[row]} at record {row}, must lie in {least} .. {most}")


def read_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """Names of the classes, one a line; () without the file.

    Raises
    ------
    ValueError
        If there is another number of them.
    """
    if not path.is_file():
        return ()
    lines = path.read_bytes().decode(errors="replace").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != num_classes:
        raise ValueError(f"{path} holds {len(names)} names of classes, must hold {num_classes}, one a line")
    return names
