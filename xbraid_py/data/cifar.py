"""CIFAR-10 and CIFAR-100: photographs of 32 x 32 pixels in 10 or 100 classes, from the files of the binary versions.

A record is one byte for the class, or two for the coarse and the fine class, and then 3072 bytes: all red values, all
green and all blue ones, row by row. Shape letters: `B` samples.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from xbraid_py.data.images import (
    Images,
    ImageSets,
    Published,
    check_labels,
    found_words,
    read_names,
    read_records,
)

SIZE = 32
PIXELS = 3 * SIZE * SIZE
_ORIGIN = "https://www.cs.toronto.edu/~kriz/cifar.html (the binary version)"

CIFAR10 = Published(
    title="CIFAR-10",
    name="cifar10",
    unpacked="cifar-10-batches-bin",
    origin=_ORIGIN,
    num_train=50000,
    num_test=10000,
)
CIFAR100 = Published(
    title="CIFAR-100",
    name="cifar100",
    unpacked="cifar-100-binary",
    origin=_ORIGIN,
    num_train=50000,
    num_test=10000,
)
NUM_CLASSES, NUM_COARSE, NUM_FINE = 10, 20, 100

# The published files of CIFAR-10 with their SHA-256; of CIFAR-100's none is known here.
TRAIN_BATCHES = {
    "data_batch_1.bin": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2.bin": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3.bin": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4.bin": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5.bin": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
}
TEST_BATCH = {"test_batch.bin": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b"}
DIGESTS = {**TRAIN_BATCHES, **TEST_BATCH}


def load_cifar10(folder: str | os.PathLike | None = None) -> ImageSets:
    """CIFAR-10, or as much of it as there is: at least one of the five training batches, and the test batch.

    Contents other than the published ones are only reported by a warning in the log, as long as the files are sound.

    Parameters
    ----------
    folder : path-like, optional
        Folder of the files, or the one in which the published archive was unpacked; by default `cifar10` in the folder
        that the variable XBRAID_DATA names, or the archive's own folder beside or in that; without the variable, see
        `data_folder`.

    Returns
    -------
    ImageSets
        Pixels of shape (B, 3, 32, 32), 50,000 and 10,000 images if complete. `names` is empty without
        `batches.meta.txt`.

    Raises
    ------
    FileNotFoundError
        If there is no training batch or no test batch, with where they come from and how to name the folder.
    ValueError
        For a damaged file: empty, cut off within a record, a label above 9, another number of names.
    """
    places = CIFAR10.places(folder)
    home = next((place for place in places if _existing(place, DIGESTS)), None)
    train_paths = _existing(home, TRAIN_BATCHES)
    test_paths = _existing(home, TEST_BATCH)
    if not (train_paths and test_paths):
        batches = [] if train_paths else [f"one or more of {', '.join(TRAIN_BATCHES)}"]
        wanted = " and ".join([*batches, *({} if test_paths else TEST_BATCH)])
        raise CIFAR10.missing(wanted, [home] if home else places)
    bytes_ahead = (("label", NUM_CLASSES),)
    train = _read(train_paths, bytes_ahead, 0)
    test = _read(test_paths, bytes_ahead, 0)
    names = read_names(home / "batches.meta.txt", NUM_CLASSES)
    what = f"{len(train_paths)} of {len(TRAIN_BATCHES)} training batches"
    words = [
        found_words(what, train, CIFAR10.num_train, train_paths),
        found_words("test batch", test, CIFAR10.num_test, test_paths),
    ]
    found, complete = CIFAR10.report(home, train, test, words, [*DIGESTS, "batches.meta.txt"])
    return ImageSets(train, test, NUM_CLASSES, names, found, complete)


def load_cifar100(folder: str | os.PathLike | None = None, fine: bool = True) -> ImageSets:
    """CIFAR-100, or a part of it.

    The images are those of `train.bin` and `test.bin`, or else of all files `cifar100_train*.bin` and
    `cifar100_test*.bin` of the same format, in the order of their names.

    Parameters
    ----------
    folder : path-like, optional
        As in `load_cifar10`, with `cifar100` for the name.
    fine : bool
        Whether labels are the 100 fine classes, or the 20 coarse ones.

    Returns
    -------
    ImageSets
        Pixels of shape (B, 3, 32, 32), 50,000 and 10,000 images if complete. `names` is empty without
        `fine_label_names.txt` or `coarse_label_names.txt`.

    Raises
    ------
    FileNotFoundError
        If training or test images are missing, with where they come from and how to name the folder.
    TypeError
        If `fine` is no bool.
    ValueError
        For a damaged file: empty, cut off within a record, a label too large, another number of names.
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
    train, test = (_read(paths[part], bytes_ahead, int(fine)) for part in paths)
    num_classes, names_file = (NUM_FINE, "fine_label_names.txt") if fine else (NUM_COARSE, "coarse_label_names.txt")
    names = read_names(home / names_file, num_classes)
    words = [
        found_words("training", train, CIFAR100.num_train, paths["train"]),
        found_words("test", test, CIFAR100.num_test, paths["test"]),
    ]
    found, complete = CIFAR100.report(home, train, test, words, ["train.bin", "test.bin", names_file])
    return ImageSets(train, test, num_classes, names, found, complete)


def _existing(home: Path | None, names: Iterable[str]) -> list[Path]:
    return [home / name for name in names if (home / name).is_file()] if home else []


def _parts(home: Path | None, part: str) -> list[Path]:
    """Files of the training or test images of CIFAR-100: the published one, or else the others."""
    if home is None:
        return []
    return _existing(home, [f"{part}.bin"]) or sorted(home.glob(f"cifar100_{part}*.bin"))


def _read(paths: Sequence[Path], bytes_ahead: Sequence[tuple[str, int]], column: int) -> Images:
    """Images of some files.

    `bytes_ahead` says of each byte ahead of the pixels what it is and how many values it has, `column` which of them is
    the label.
    """
    head = len(bytes_ahead)
    pixels, labels = [], []
    for path in paths:
        records = read_records(path, head + PIXELS, DIGESTS.get(path.name))
        for place, (word, number) in enumerate(bytes_ahead):
            check_labels(path, records[:, place], 0, number - 1, word)
        pixels.append(records[:, head:])
        labels.append(records[:, column])
    # Joined and copied once: the records are not kept.
    joined = torch.from_numpy(np.concatenate(pixels)).view(-1, 3, SIZE, SIZE)
    return Images(joined, torch.from_numpy(np.concatenate(labels)).long())
