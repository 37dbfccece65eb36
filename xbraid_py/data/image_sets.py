"""CIFAR-10, CIFAR-100 and STL-10 from the files of their binary versions, whole, or the first in a seeded order.

A record of CIFAR is one byte for the class, or two for the coarse and the fine class, and then 3072 bytes: all red
values, all green and all blue ones, row by row. Of STL-10, `train_X.bin` and `test_X.bin` hold the images alone, each
color column by column; `train_y.bin` and `test_y.bin` one byte an image, the class from 1.

A set may lie there in part. What is missing is said, in the result and by a warning in the log; only a set without any
training or without any test images is refused. Contents other than the published ones are only reported by a warning,
as long as the files are sound. Shape letters: `B` samples.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from xbraid_py.data.dataset import data_folder, ways
from xbraid_py.data.images import Images, ImageSets

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Published:
    """An image set as it was published: its name in words, and that of its folder in `XBRAID_DATA`; the folder that
    the archive unpacks to; where it officially comes from; numbers of images.
    """

    title: str
    name: str
    unpacked: str
    origin: str
    num_train: int
    num_test: int

    def places(self, folder: str | os.PathLike | None = None) -> list[Path]:
        """Folders where the files may lie, the likeliest first: see `load_images`."""
        home = data_folder(self.name, folder)
        places = [home, home / self.unpacked]
        return places if folder is not None else [*places, home.parent / self.unpacked]

    def missing(self, what: str, places: Sequence[Path]) -> FileNotFoundError:
        """The error for files that are necessary and not there."""
        return FileNotFoundError(
            f"{self.title} needs {what}, not found in {' or '.join(map(str, places))}. It comes from {self.origin}. "
            f"{ways(self.name)}"
        )

    def sets(
        self, home: Path, parts: Sequence[tuple[str, Images, Sequence[Path]]], num_classes: int, files: Sequence[str]
    ) -> ImageSets:
        """The set as it was found, after a warning in the log if it is not whole.

        Parameters
        ----------
        home : Path
            Folder of the files.
        parts : two tuples of str, Images and sequence of Path
            Training and test: what was found in words, the images, and their files.
        num_classes : int
        files : sequence of str
            Names of the published files, of which the missing ones are told; the last holds the names of the classes.
        """
        names = _read_names(home / files[-1], num_classes)
        found = [
            f"{what} ({images.num_samples:,} of {number:,} images): {', '.join(path.name for path in paths)}"
            for (what, images, paths), number in zip(parts, (self.num_train, self.num_test), strict=True)
        ]
        absent = [name for name in files if not (home / name).is_file()]
        if absent:
            found.append("missing: " + ", ".join(absent))
        train, test = (images for _, images, _ in parts)
        complete = (train.num_samples, test.num_samples) == (self.num_train, self.num_test)
        if not complete:
            logger.warning("%s in %s is not the whole published set: %s", self.title, home, "; ".join(found))
        return ImageSets(train, test, num_classes, names, tuple(found), complete)


CIFAR10 = Published(
    title="CIFAR-10",
    name="cifar10",
    unpacked="cifar-10-batches-bin",
    origin="https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)",
    num_train=50000,
    num_test=10000,
)
CIFAR100 = replace(CIFAR10, title="CIFAR-100", name="cifar100", unpacked="cifar-100-binary")
STL10 = Published(
    title="STL-10",
    name="stl10",
    unpacked="stl10_binary",
    origin="https://cs.stanford.edu/~acoates/stl10 (the binary files)",
    num_train=5000,
    num_test=8000,
)

# The published files of CIFAR-10 with their SHA-256 and those of STL-10 with their MD5; others are not known here.
TRAIN_BATCHES = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
}
TEST_BATCH = {"test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"}
STL10_FILES = {
    "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "train_y.bin": "5a34089d4802c674881badbb80307741",
    "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
}
CIFAR10_FILES = {**TRAIN_BATCHES, **TEST_BATCH}
DIGESTS = {**CIFAR10_FILES, **STL10_FILES}
NUM_CLASSES, NUM_COARSE, NUM_FINE = 10, 20, 100  # of CIFAR-10 and STL-10, and both of CIFAR-100
# Subsets are the same in all runs, whatever their seeds: they stand for a smaller set.
_SUBSET_SEED = 0


def load_cifar10(folder: str | os.PathLike | None = None) -> ImageSets:
    """CIFAR-10, or as much of it as there is: at least one of the five training batches, and the test batch.

    Parameters, results and errors are those of `load_images`.
    """
    places = CIFAR10.places(folder)
    home = next((place for place in places if _existing(place, CIFAR10_FILES)), None)
    train_paths, test_paths = _existing(home, TRAIN_BATCHES), _existing(home, TEST_BATCH)
    if not (train_paths and test_paths):
        batches = [] if train_paths else [f"one or more of {', '.join(TRAIN_BATCHES)}"]
        wanted = " and ".join([*batches, *({} if test_paths else TEST_BATCH)])
        raise CIFAR10.missing(wanted, [home] if home else places)
    assert home is not None
    bytes_ahead = (("label", NUM_CLASSES),)
    what = f"{len(train_paths)} of {len(TRAIN_BATCHES)} training batches"
    parts = [
        (word, _read_cifar(paths, bytes_ahead, 0), paths)
        for word, paths in ((what, train_paths), ("test batch", test_paths))
    ]
    return CIFAR10.sets(home, parts, NUM_CLASSES, [*CIFAR10_FILES, "batches.meta.txt"])


def load_cifar100(folder: str | os.PathLike | None = None, fine: bool = True) -> ImageSets:
    """CIFAR-100, or a part of it, with the 100 fine classes or (not `fine`) the 20 coarse ones.

    The images are those of `train.bin` and `test.bin`, or else of all files `cifar100_train*.bin` and
    `cifar100_test*.bin` of the same format, in the order of their names. For the rest see `load_images`.

    Raises
    ------
    TypeError
        If `fine` is no bool.
    """
    if not isinstance(fine, bool):
        raise TypeError(f"fine={fine!r} must be True or False; use True")
    places = CIFAR100.places(folder)
    home = next((place for place in places if _parts(place, "train") or _parts(place, "test")), None)
    paths = {part: _parts(home, part) for part in ("train", "test")}
    if not all(paths.values()):
        wanted = " and ".join(f"{part}.bin or cifar100_{part}*.bin" for part in paths if not paths[part])
        raise CIFAR100.missing(wanted, [home] if home else places)
    bytes_ahead = (("coarse label", NUM_COARSE), ("fine label", NUM_FINE))
    parts = [
        (word, _read_cifar(paths[part], bytes_ahead, int(fine)), paths[part])
        for word, part in (("training", "train"), ("test", "test"))
    ]
    assert home is not None
    num_classes, names_file = (NUM_FINE, "fine_label_names.txt") if fine else (NUM_COARSE, "coarse_label_names.txt")
    return CIFAR100.sets(home, parts, num_classes, ["train.bin", "test.bin", names_file])


def load_stl10(folder: str | os.PathLike | None = None) -> ImageSets:
    """The labeled images of STL-10, of all four files; the unlabeled ones are not read.

    Parameters, results and errors are those of `load_images`; the rows of the pixels come first as in every other set,
    and labels count from 0.
    """
    places = STL10.places(folder)
    home = next((place for place in places if _existing(place, STL10_FILES)), None)
    absent = [name for name in STL10_FILES if not _existing(home, [name])]
    if absent:
        raise STL10.missing(" and ".join(absent), [home] if home else places)
    parts = []
    for word, part in (("training", "train"), ("test", "test")):
        assert home is not None
        paths = home / f"{part}_X.bin", home / f"{part}_y.bin"
        parts.append((word, _read_stl10(*paths), paths))
    return STL10.sets(home, parts, NUM_CLASSES, [*STL10_FILES, "class_names.txt"])


def load_images(name: str, folder: str | os.PathLike | None = None) -> ImageSets:
    """The data set of that name.

    Parameters
    ----------
    name : str
        `cifar10`, `cifar100` (with its 100 fine classes) or `stl10`.
    folder : path-like, optional
        Folder of its files, or the one in which the published archive was unpacked; by default the one called `name`
        in the folder that the variable XBRAID_DATA names, or the archive's own folder beside or in that; without the
        variable, see `data_folder`.

    Returns
    -------
    ImageSets
        Pixels (B, 3, 32, 32), of STL-10 (B, 3, 96, 96); 50,000 and 10,000 images, or 5,000 and 8,000, if complete.
        `names` is empty without the file of the names.

    Raises
    ------
    FileNotFoundError
        If training or test images are missing, with where they come from and how to name the folder.
    ValueError
        If there is no data set of that name, or for a damaged file, with its name: empty, cut off within a record, a
        label out of its range, other numbers of images and labels, another number of names.
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
    name, data_dir
        See `load_images`.
    train_images, test_images : int
        Take only so many; 0 takes all. The same ones in every run.

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


def _existing(home: Path | None, names: Iterable[str]) -> list[Path]:
    return [home / name for name in names if (home / name).is_file()] if home else []


def _parts(home: Path | None, part: str) -> list[Path]:
    """Files of the training or test images of CIFAR-100: the published one, or else the others."""
    if home is None:
        return []
    return _existing(home, [f"{part}.bin"]) or sorted(home.glob(f"cifar100_{part}*.bin"))


def _read_cifar(paths: Sequence[Path], bytes_ahead: Sequence[tuple[str, int]], column: int) -> Images:
    """Images of some files.

    `bytes_ahead` says of each byte ahead of the pixels what it is and how many values it has, `column` which of them is
    the label.
    """
    head, size = len(bytes_ahead), 32
    pixels, labels = [], []
    for path in paths:
        records = _read_records(path, head + 3 * size * size)
        for place, (word, number) in enumerate(bytes_ahead):
            _check_labels(path, records[:, place], 0, number - 1, word)
        pixels.append(records[:, head:])
        labels.append(records[:, column])
    # Joined and copied once: the records are not kept.
    joined = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, size, size)
    return Images(joined, torch.from_numpy(np.concatenate(labels)).long())


def _read_stl10(images: Path, classes: Path) -> Images:
    size = 96
    pixels, labels = _read_records(images, 3 * size * size), _read_records(classes, 1)[:, 0]
    if len(pixels) != len(labels):
        raise ValueError(
            f"{images} holds {len(pixels)} images but {classes} holds {len(labels)} labels; entry k of both belongs to "
            f"the same image"
        )
    _check_labels(classes, labels, 1, NUM_CLASSES)
    # Stored column by column, so that the first axis within a color runs along the rows.
    upright = torch.from_numpy(pixels).view(-1, 3, size, size).transpose(2, 3).contiguous()
    return Images(upright, torch.from_numpy(labels).long() - 1)


def _read_records(path: Path, size: int) -> np.ndarray:
    """Records of `size` bytes, one after another, (B, size), uint8, B at least 1, writable."""
    values = np.fromfile(path, np.uint8)
    if len(values) == 0 or len(values) % size:
        fault = "is empty" if len(values) == 0 else f"ends within a record: it has {len(values)} bytes"
        raise ValueError(
            f"{path} {fault}; it must hold a multiple of {size} bytes, such as {10000 * size} for 10,000 images"
        )
    known = DIGESTS.get(path.name)
    checksum = "MD5" if known and len(known) == 32 else "SHA-256"
    found = hashlib.new(checksum.replace("-", ""), values.data, usedforsecurity=False).hexdigest()
    if known is None:
        logger.info("%s: SHA-256 %s, not compared: that of the file as published is not known here", path, found)
    elif found != known:
        logger.warning("%s does not hold the published values (its %s differs)", path, checksum)
    return values.reshape(-1, size)


def _check_labels(path: Path, labels: np.ndarray, least: int, most: int, word: str = "label") -> None:
    """Raise ValueError unless all labels of a file lie in `least` .. `most`."""
    wrong = ((labels < least) | (labels > most)).nonzero()[0]
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(f"{path} holds the {word} {labels[row]} at record {row}, must lie in {least} .. {most}")


def _read_names(path: Path, num_classes: int) -> tuple[str, ...]:
    """Names of the classes, one a line; () without the file."""
    if not path.is_file():
        return ()
    lines = path.read_bytes().decode(errors="replace").splitlines()
    names = tuple(line.strip() for line in lines if line.strip())
    if len(names) != num_classes:
        raise ValueError(f"{path} holds {len(names)} names of classes, must hold {num_classes}, one a line")
    return names
