"""What the readers of image sets share: the folder, records of bytes, labels, names of classes, and the report.

A set may lie there in part. What is missing is said, in the result and by a warning in the log; only a set without
any training or without any test images is refused.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from xbraid_py.data.dataset import data_folder
from xbraid_py.data.images import Images

logger = logging.getLogger(__name__)


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
            f"Name the folder that holds its files with --data_dir FOLDER, or the folder that holds {self.name}/ with "
            f"the variable XBRAID_DATA."
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
