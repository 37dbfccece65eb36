"""STL-10: photographs of 96 x 96 pixels in 10 classes, from the files of the binary version.

`train_X.bin` and `test_X.bin` hold the images one after another, all red values, all green and all blue ones, each
column by column; `train_y.bin` and `test_y.bin` one byte an image, the class from 1. Shape letters: `B` samples.
"""

from __future__ import annotations

import os
from pathlib import Path

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

SIZE = 96
NUM_CLASSES = 10
STL10 = Published(
    title="STL-10",
    name="stl10",
    unpacked="stl10_binary",
    origin="https://cs.stanford.edu/~acoates/stl10 (the binary files)",
    num_train=5000,
    num_test=8000,
)
# The published files with their MD5; a SHA-256 of them is not known here.
DIGESTS = {
    "train_X.bin": "918c2871b30a85fa023e0c44e0bee87f",
    "train_y.bin": "5a34089d4802c674881badbb80307741",
    "test_X.bin": "7f263ba9f9e0b06b93213547f721ac82",
    "test_y.bin": "36f9794fa4beb8a2c72628de14fa638e",
}
NAMES_FILE = "class_names.txt"


def load_stl10(folder: str | os.PathLike | None = None) -> ImageSets:
    """The labeled images of STL-10; the unlabeled ones are not read.

    Contents other than the published ones are only reported by a warning in the log, as long as the files are sound;
    there may be fewer images, or more.

    Parameters
    ----------
    folder : path-like, optional
        Folder of the files, or the one in which the published archive was unpacked; by default `stl10` in the folder
        that the variable XBRAID_DATA names, or the archive's own folder beside or in that; without the variable, see
        `data_folder`.

    Returns
    -------
    ImageSets
        Pixels of shape (B, 3, 96, 96), rows first as in every other set, 5,000 and 8,000 images if complete; labels
        from 0. `names` is empty without `class_names.txt`.

    Raises
    ------
    FileNotFoundError
        If one of the four files is missing, with where it comes from and how to name the folder.
    ValueError
        For a damaged file: empty, cut off within an image, other numbers of images and labels, a label outside
        1 .. 10, another number of names.
    """
    places = STL10.places(folder)
    home = next((place for place in places if any((place / name).is_file() for name in DIGESTS)), None)
    absent = [name for name in DIGESTS if home is None or not (home / name).is_file()]
    if absent:
        raise STL10.missing(" and ".join(absent), [home] if home else places)
    train, test = (_read(home / f"{part}_X.bin", home / f"{part}_y.bin") for part in ("train", "test"))
    names = read_names(home / NAMES_FILE, NUM_CLASSES)
    words = [
        found_words("training", train, STL10.num_train, [home / "train_X.bin", home / "train_y.bin"]),
        found_words("test", test, STL10.num_test, [home / "test_X.bin", home / "test_y.bin"]),
    ]
    found, complete = STL10.report(home, train, test, words, [*DIGESTS, NAMES_FILE])
    return ImageSets(train, test, NUM_CLASSES, names, found, complete)


def _read(images: Path, classes: Path) -> Images:
    pixels = read_records(images, 3 * SIZE * SIZE, DIGESTS[images.name])
    labels = read_records(classes, 1, DIGESTS[classes.name])[:, 0]
    if len(pixels) != len(labels):
        raise ValueError(
            f"{images} holds {len(pixels)} images but {classes} holds {len(labels)} labels; entry k of both belongs to "
            f"the same image"
        )
    check_labels(classes, labels, 1, NUM_CLASSES)
    # Stored column by column, so that the first axis within a color runs along the rows.
    upright = torch.from_numpy(pixels).view(-1, 3, SIZE, SIZE).transpose(2, 3).contiguous()
    return Images(upright, torch.from_numpy(labels).long() - 1)
