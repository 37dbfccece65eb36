"""A small scene in the form of Indian Pines, its files and those of a split; and the scene itself."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy.io import savemat

from xbraid_py.data import indian_pines


def scene(rows: int = 20, columns: int = 17, bands: int = 6, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Cube (rows, columns, bands), uint16, and ground truth (rows, columns), uint8.

    Stripes of 4 classes, of which the last is small. Some pixels have no label. A class shows in all bands, so that it
    can be learned.
    """
    random = np.random.default_rng(seed)
    truth = np.repeat([1, 2, 3, 2, 1, 4], -(-columns // 6))[:columns] * np.ones((rows, 1), dtype=int)
    truth[random.random((rows, columns)) < 0.3] = 0
    truth[rows // 4 :][truth[rows // 4 :] == 4] = 0
    spectra = 2000 + 1500 * random.random((5, bands))
    cube = spectra[truth] + 60 * random.standard_normal((rows, columns, bands))
    return cube.round().astype(np.uint16), truth.astype(np.uint8)


def write(folder: Path, cube: np.ndarray, truth: np.ndarray, compressed: bool = True) -> Path:
    """The two MAT files of a scene; returns their folder."""
    for name, array, file in (
        ("indian_pines_corrected", cube, indian_pines.CUBE),
        ("indian_pines_gt", truth, indian_pines.TRUTH),
    ):
        savemat(folder / file, {name: array}, do_compression=compressed)
    return folder


def column_major(truth: np.ndarray) -> list[int]:
    """Numbers of the labeled pixels, from 1 on, counted down the columns, one pixel after the other."""
    rows, columns = truth.shape
    return [1 + row + column * rows for column in range(columns) for row in range(rows) if truth[row, column] > 0]


def write_split(folder: Path, truth: np.ndarray, num_train: int, num_validation: int, shuffled: bool = False) -> None:
    """The three files of a split, both parts drawn at random; places in their order or in any other."""
    random = np.random.default_rng(1)
    places = column_major(truth)
    if shuffled:
        random.shuffle(places)
    numbers = 1 + random.permutation(len(places))
    parts = numbers[:num_train], numbers[num_train : num_train + num_validation], places
    for name, values in zip(indian_pines.SPLIT_FILES, parts, strict=True):
        (folder / name).write_text("".join(f"{value}\n" for value in values))


def classes_of(counts: list[int], unlabeled: int, seed: int) -> np.ndarray:
    """So many pixels of each class, and of none (-1), in any order."""
    classes = np.repeat(np.arange(-1, len(counts)), [unlabeled, *counts])
    return np.random.default_rng(seed).permutation(classes)


def real(**options) -> indian_pines.Scene:
    """The scene itself; without its files the test is skipped."""
    try:
        return indian_pines.load(source="files", **options)
    except FileNotFoundError as missing:
        pytest.skip(f"INDIAN PINES FILES NOT FOUND: {missing}")
