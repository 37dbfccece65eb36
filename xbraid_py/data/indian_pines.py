"""Indian Pines: land cover of 145 x 145 pixels from their spectra, 200 bands, 16 classes.

The scene of an airborne spectrometer over farmland in Indiana (Baumgardner, Biehl and Landgrebe 2015,
doi:10.4231/R7RX991C). It has 220 bands; the public array, read here, is without the 20 bands in which water vapour
absorbs the light. 10,249 of its 21,025 pixels are labeled.

Shape letters: `F` bands, `B` pixels, `P` pixels of the whole scene, row after row.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from scipy.io import loadmat
from scipy.io.matlab import MatReadError
from torch import Tensor

from xbraid_py.data.dataset import Dataset, check_packing, data_folder, find_files, whole_number

CUBE, TRUTH = "Indian_pines_corrected.mat", "Indian_pines_gt.mat"
FILES = {
    CUBE: "3247388728a9a618c1c22011458fae48b8e729119d5e84502f06c86296b17d44",
    TRUTH: "65c4687a8ab04f6da4789799bc3bc4f6e88bccac3ed6a2e6ae367e5e6b9e429c",
}
# A published split of the labeled pixels (numbers from 1, in column-major order), and where in the scene they lie.
SPLIT_TRAIN, SPLIT_VALIDATION, SPLIT_PLACES = "id_training.dat", "id_validation.dat", "idmap_color_to_global.dat"
SPLIT_FILES = {
    SPLIT_TRAIN: "a5a39e259371434ead4bf6515ffd09406db9e81018d9495aa276661e74301f40",
    SPLIT_VALIDATION: "f5f240ebc9e5b4bfbb8917fc59d12eb65ab9718c350e1440fad29e3031389453",
    SPLIT_PLACES: "5656c906c24fd315ec4d8635f06184b118eb240ce5389746c7705fbca56e6dee",
}
ORIGIN = (
    f"https://doi.org/10.4231/R7RX991C (the corrected scene, {CUBE} and {TRUTH}; the Python package tensorly holds it "
    f"as well: install it, and give --source tensorly)"
)
SPLIT_ORIGIN = (
    f"the authors of a published split of the scene ({', '.join(SPLIT_FILES)}); --split random needs no files"
)
NAMES = (
    "Alfalfa",
    "Corn-notill",
    "Corn-mintill",
    "Corn",
    "Grass-pasture",
    "Grass-trees",
    "Grass-pasture-mowed",
    "Hay-windrowed",
    "Oats",
    "Soybean-notill",
    "Soybean-mintill",
    "Soybean-clean",
    "Wheat",
    "Woods",
    "Buildings-grass-trees-drives",
    "Stone-steel-towers",
)
_SOURCES, _SPLITS = ("auto", "files", "tensorly"), ("random", "published")


@dataclass(frozen=True, eq=False)
class Scene:
    """The scene, standardized, and a split of its labeled pixels.

    Attributes
    ----------
    pixels : (F, P) tensor
        Every band less its mean and over its standard deviation, both over the training pixels alone.
    truth : (rows, columns) int64 tensor
        Class of every pixel, -1 where it has no label.
    train, validation : Dataset
        The pixels of the split: features (F, B), labels (B,).
    train_places : (B,) int64 tensor
        Where in the scene the training pixels lie, 0 .. P - 1.
    """

    pixels: Tensor
    truth: Tensor
    train: Dataset
    validation: Dataset
    train_places: Tensor


def load(
    folder: str | os.PathLike | None = None,
    *,
    source: Literal["auto", "files", "tensorly"] = "auto",
    split: Literal["random", "published"] = "random",
    num_train: int = 1000,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
) -> Scene:
    """Read the scene and split its labeled pixels.

    Parameters
    ----------
    folder : path-like, optional
        Holds the two MAT files; see `data_folder`.
    source : {"auto", "files", "tensorly"}
        From the files, or from the copy in the package tensorly; auto takes the files if they are there or a folder is
        given, and otherwise the package if it is installed.
    split : {"random", "published"}
        `num_train` pixels drawn at random, of every class in proportion but one at least, and all others for
        validation; or the 4,000 and 2,000 pixels of a published split, whose three files lie in the folder.
    num_train : int
        Of the random split.
    seed : int
        Of the random split.
    dtype : torch.dtype

    Raises
    ------
    FileNotFoundError
        If a file is missing, with the ways to get it.
    ValueError
        For a file without the array, arrays that are no scene, cube and ground truth of different sizes, a class with
        too few pixels, a split that does not fit the scene, an option that is not one of those above, or the source
        tensorly where it is not installed.
    TypeError
        If `num_train` or `seed` is no integer.
    """
    num_train, seed = whole_number("num_train", num_train, 1, 1000), whole_number("seed", seed, 0, 0)
    for name, value, choices in (("source", source, _SOURCES), ("split", split, _SPLITS)):
        if value not in choices:
            raise ValueError(f"{name}={value!r} must be one of {', '.join(choices)}; use {choices[0]}")
    cube, truth, where = _read(folder, source)
    rows, columns, bands = cube.shape
    spectra = cube.reshape(rows * columns, bands).astype(np.float64)
    classes = truth.reshape(-1).astype(np.int64) - 1
    if split == "published":
        train, validation = _published(folder, truth)
    else:
        train, validation = stratified(classes, num_train, seed)
    pixels = torch.from_numpy(_standardized(spectra, train, where)).to(dtype)
    num_classes = int(classes.max()) + 1

    def part(places: np.ndarray) -> Dataset:
        chosen = torch.from_numpy(places)
        return Dataset(pixels[:, chosen].contiguous(), torch.from_numpy(classes[places]), num_classes)

    labels = torch.from_numpy(classes.reshape(truth.shape))
    return Scene(pixels, labels, part(train), part(validation), torch.from_numpy(train))


def names(num_classes: int) -> list[str]:
    """Names of the classes; plain numbers where there are others than the scene's 16."""
    return list(NAMES) if num_classes == len(NAMES) else [f"class {k + 1}" for k in range(num_classes)]


def _standardized(spectra: np.ndarray, train: np.ndarray, where: str) -> np.ndarray:
    """All spectra (P, F) by the statistics of the training pixels, (F, P): outermost the bands, as in the states."""
    chosen = spectra[train]
    # Not by the deviation, which rounding may keep from 0.
    same = chosen.min(0) == chosen.max(0)
    if same.any():
        raise ValueError(
            f"{where}: band {int(np.argmax(same)) + 1} of {len(same)} is the same at all {len(train)} training pixels; "
            f"leave such bands out, or use more pixels (num_train)"
        )
    with np.errstate(all="ignore"):
        scale = chosen.std(0)
        pixels = (spectra - chosen.mean(0)) / scale
    if not (np.all(np.isfinite(scale)) and np.all(np.isfinite(pixels))):
        raise ValueError(f"{where} holds numbers too large or too small to be standardized; use 1e-100 to 1e100")
    return np.ascontiguousarray(pixels.T)


def stratified(classes: np.ndarray, num_train: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Places (B,) of training and of validation pixels, in ascending order, drawn class by class.

    Every class gives training pixels in proportion to its size, rounded by largest remainders, but at least one, and
    keeps at least one for validation. `classes` (P,) are -1 for pixels without a label.

    Raises
    ------
    ValueError
        If a class has fewer than two pixels, or `num_train` leaves a class without a pixel in one of the parts.
    """
    counts = np.bincount(classes[classes >= 0])
    if not len(counts) or counts.min() < 2:
        short = int(np.argmin(counts)) if len(counts) else 0
        have = int(counts[short]) if len(counts) else 0
        raise ValueError(
            f"class {short + 1} of the ground truth has {have} pixel(s), too few for a split; it needs at least 2"
        )
    if not len(counts) <= num_train <= counts.sum() - len(counts):
        raise ValueError(
            f"num_train={num_train} must leave each of the {len(counts)} classes a pixel for training and one for "
            f"validation; use {len(counts)} to {counts.sum() - len(counts)}"
        )
    shares = _shares(counts, num_train)
    rng = np.random.default_rng([seed, len(counts)])
    chosen = [
        rng.permutation(np.flatnonzero(classes == number))[:share] for number, share in enumerate(shares.tolist())
    ]
    train = np.sort(np.concatenate(chosen))
    rest = np.ones(len(classes), dtype=bool)
    rest[train] = False
    return train, np.flatnonzero(rest & (classes >= 0))


def _shares(counts: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers in proportion to `counts`, at least 1 and less than the count, with this sum."""
    exact = counts * (total / counts.sum())
    shares = np.clip(np.floor(exact).astype(np.int64), 1, counts - 1)
    while (missing := total - shares.sum()) != 0:
        # Where the share is furthest from what it should be, among those that may still move; ties to the first.
        step = 1 if missing > 0 else -1
        movable = shares < counts - 1 if step > 0 else shares > 1
        shares[np.argmax(np.where(movable, step * (exact - shares), -np.inf))] += step
    return shares


def _read(folder, source: str) -> tuple[np.ndarray, np.ndarray, str]:
    """Cube (rows, columns, F), ground truth (rows, columns) with 0 for no label, and what to call them in messages."""
    there = all((data_folder("indian_pines", folder) / name).is_file() for name in FILES)
    if source == "tensorly" or (source == "auto" and folder is None and not there and _has_tensorly()):
        try:
            from tensorly.datasets import load_indian_pines  # pyright: ignore[reportMissingImports]  # an extra
        except ImportError as error:
            raise ValueError(f"source=tensorly: {error}; install tensorly (pip install), or use files") from error
        found = load_indian_pines()
        cube, truth, where = np.asarray(found.tensor), np.asarray(found.ticks[0]), "the scene in tensorly"
    else:
        cube_path, truth_path = find_files("indian_pines", FILES, ORIGIN, folder)
        cube = read_array(cube_path, "indian_pines_corrected")
        truth = read_array(truth_path, "indian_pines_gt")
        where = str(cube_path)
    if cube.ndim != 3 or 0 in cube.shape or cube.dtype.kind not in "uif":
        raise ValueError(
            f"{where} holds {cube.dtype} of shape {cube.shape}; a scene is (rows, columns, bands) of numbers"
        )
    if truth.shape != cube.shape[:2] or truth.dtype.kind not in "uif":
        raise ValueError(
            f"{where} has {cube.shape[0]} x {cube.shape[1]} pixels, but its ground truth is {truth.dtype} of shape "
            f"{truth.shape}; use the two files of one scene"
        )
    if not np.all(np.isfinite(cube)):
        raise ValueError(f"{where} holds numbers that are not finite")
    if not np.all((truth >= 0) & (truth == np.floor(truth)) & (truth <= 255)) or truth.max() < 2:
        raise ValueError(
            f"the ground truth of {where} must hold whole numbers, 0 for no label and classes from 1 to 255, 2 at least"
        )
    return cube, truth, where


def _has_tensorly() -> bool:
    from importlib.util import find_spec

    return find_spec("tensorly") is not None


def _published(folder, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    paths = find_files("indian_pines", SPLIT_FILES, SPLIT_ORIGIN, folder)
    labeled = np.flatnonzero(truth.reshape(-1, order="F")) + 1
    train, validation, places = (_numbers(path) for path in paths)
    if not np.array_equal(np.sort(places), labeled):
        raise ValueError(f"{paths[2]} does not name the labeled pixels of this ground truth; use those of one scene")
    parts = []
    for path, rows in zip(paths, (train, validation), strict=False):
        if len(set(rows.tolist())) != len(rows) or rows.max() > len(places):
            raise ValueError(f"{path} must hold different numbers from 1 to {len(places)}")
        # From the column-major place in the scene, counted from 1, to the row-major one, counted from 0.
        column, row = np.divmod(places[rows - 1] - 1, truth.shape[0])
        parts.append(np.sort(row * truth.shape[1] + column))
    if np.intersect1d(*parts).size:
        raise ValueError(f"{paths[0]} and {paths[1]} have pixels in common; a split has none")
    missing = set(np.unique(truth[truth > 0]).tolist()) - set(truth.reshape(-1)[parts[0]].tolist())
    if missing:
        raise ValueError(f"{paths[0]} has no pixel of class {sorted(missing)[0]:g}; training needs one of each")
    return parts[0], parts[1]


def _numbers(path: Path) -> np.ndarray:
    """Whole numbers from 1 on, separated by blanks or line ends."""
    words = path.read_bytes().decode(errors="replace").split()
    if not words:
        raise ValueError(f"{path} is empty; it holds whole numbers from 1 on")
    for number, word in enumerate(words, start=1):
        if not (word.isascii() and word.isdigit() and len(word) < 10 and int(word) > 0):
            raise ValueError(f"{path}, number {number}: found {word[:20]!r}; it holds whole numbers from 1 on")
    return np.array([int(word) for word in words])


_HEADER, _MATRIX, _COMPRESSED, _COMPLEX = 128, 14, 15, 0x0800
# By code: the type of the values, and the class of the array, which may be written in a smaller type.
_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}
_CLASSES = {6: "f8", 7: "f4", 8: "i1", 9: "u1", 10: "i2", 11: "u2", 12: "i4", 13: "u4", 14: "i8", 15: "u8"}
# What a damaged file raises depends on the byte that is damaged.
_DAMAGED = (
    KeyError,
    MatReadError,
    MemoryError,
    OSError,
    OverflowError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)


def read_array(path: str | os.PathLike, name: str) -> np.ndarray:
    """The array `name` of a MAT file of version 5; real numbers, any number of axes.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If it is no such file, damaged, too large, or has no array of numbers of that name.
    """
    raw = Path(path).read_bytes()
    try:
        found = list(_names(Path(path), raw))
        value = loadmat(io.BytesIO(raw), variable_names=[name])[name] if found.count(name) == 1 else None
    except _DAMAGED as error:
        raise ValueError(
            f"{path} is no MAT file of version 5 with arrays of real numbers, or damaged: {error}; get it anew, or "
            f"save it with -v7 or by scipy.io.savemat"
        ) from error
    if value is None:
        raise ValueError(f"{path} holds the arrays {found[:5]}; one must be {name}")
    return value


def _names(path: Path, raw: bytes) -> Iterator[str]:
    """Names of the arrays of a file, each of which is of real numbers."""
    order = {b"\0\1IM": "<", b"\1\0MI": ">"}.get(raw[_HEADER - 4 : _HEADER])
    if order is None or 0 in raw[:4]:
        raise ValueError("no header of version 5 (7.3 is HDF5)")
    at, unpacked = _HEADER, 0
    while at < len(raw):
        kind, data, _ = _element(raw, at, order)
        at += 8 + len(data)  # nothing is padded between arrays: within one, the parts are
        if kind == _COMPRESSED:
            inner = zlib.decompressobj()
            head = inner.decompress(data, 8)
            size = 8 + sum(struct.unpack(f"{order}4xI", head))
            unpacked += size
            check_packing(path, unpacked, len(raw))
            data = head + inner.decompress(inner.unconsumed_tail, size - 7)
            if not inner.eof or len(data) != size:
                raise ValueError("compressed data break off, or are more than they say")
            kind, data, _ = _element(data, 0, order)
        if kind != _MATRIX:
            raise ValueError(f"an element of type {kind} where an array is expected")
        yield _name(data, order)


def _element(raw: bytes, at: int, order: str) -> tuple[int, bytes, int]:
    """Type and data of the element at a place, and the place behind it; up to 4 bytes of data stand in its head."""
    (word,) = struct.unpack_from(f"{order}I", raw, at)
    kind, size, start = word & 0xFFFF, word >> 16, at + 4
    if not size:
        (size,), start = struct.unpack_from(f"{order}I", raw, at + 4), at + 8
    if start + size > len(raw):
        raise ValueError("an element is longer than the file")
    return kind, raw[start : start + size], at + 8 if start < at + 8 else start + size + -size % 8


def _name(data: bytes, order: str) -> str:
    """Name of an array whose class and type of values are numbers, and fit."""
    at, parts = 0, []
    while at < len(data):
        kind, part, at = _element(data, at, order)
        parts.append((kind, part))
    flags = struct.unpack_from(f"{order}I", parts[0][1])[0] if parts else 0
    kind = parts[-1][0] if len(parts) == 4 else 0
    if flags & 0xFF not in _CLASSES or flags & _COMPLEX or kind not in _TYPES:
        raise ValueError("an array that is not of real numbers")
    own, written = np.dtype(_CLASSES[flags & 0xFF]), np.dtype(_TYPES[kind])
    if not (written == own or (written.itemsize < own.itemsize and np.can_cast(written, own))):
        raise ValueError(f"an array of {own} written as {written}")
    return parts[2][1].decode("ascii", errors="replace")
