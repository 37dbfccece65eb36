"""What data sets share: labeled points in memory, a seeded order of minibatches, files and their readers, and checks.

Shape letters: `F` features, `B` samples. Features lie outermost and samples last, as in the states (C, B).
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import logging
import math
import operator
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
import torch
from platformdirs import user_data_path


@dataclass(frozen=True, eq=False)
class Dataset:
    """Samples with one class each.

    Parameters
    ----------
    features : torch.Tensor
        Shape (F, B), floating point.
    labels : torch.Tensor
        Shape (B,), int64, values 0 .. num_classes - 1.
    num_classes : int
        Number of classes, at least 2; not every class needs a sample.

    Raises
    ------
    TypeError
        If features are not a floating-point tensor or labels not an int64 tensor.
    ValueError
        If the shapes do not fit each other or a label is outside 0 .. num_classes - 1.
    """

    features: torch.Tensor
    labels: torch.Tensor
    num_classes: int

    def __post_init__(self):
        if not (isinstance(self.features, torch.Tensor) and self.features.is_floating_point()):
            raise TypeError(f"features is {kind_of(self.features)}, must be a floating-point tensor of shape (F, B)")
        if not (isinstance(self.labels, torch.Tensor) and self.labels.dtype == torch.int64):
            raise TypeError(f"labels is {kind_of(self.labels)}, must be an int64 tensor of shape (B,)")
        if self.features.ndim != 2 or 0 in self.features.shape:
            raise ValueError(
                f"features.shape={tuple(self.features.shape)} must be (F, B), features first, at least one of each; "
                f"use (2, 5000)"
            )
        if self.labels.shape != self.features.shape[1:]:
            raise ValueError(
                f"labels.shape={tuple(self.labels.shape)} must hold one label for each of the "
                f"{self.features.shape[1]} columns of features; use ({self.features.shape[1]},)"
            )
        if self.num_classes < 2:
            raise ValueError(f"num_classes={self.num_classes} must be at least 2; use 5")
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= self.num_classes:
            raise ValueError(
                f"labels holds values from {low} to {high}, must lie in 0 .. num_classes - 1 = {self.num_classes - 1}"
            )

    @property
    def num_features(self) -> int:
        """F."""
        return self.features.shape[0]

    @property
    def num_samples(self) -> int:
        """B."""
        return self.features.shape[1]


def kind_of(value: object) -> str:
    """What a wrong argument is, for the message: the dtype of a tensor, otherwise the type."""
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


@dataclass(frozen=True)
class Batches:
    """A seeded order of minibatches: every epoch a new permutation of all samples.

    The permutation depends on the seed and the number of the epoch only. So it is the same on every rank without a
    message, and a run that goes on in the middle of an epoch finds its place by `epoch(number)[done:]`.

    Parameters
    ----------
    num_samples : int
        Number of samples, at least 1.
    batch_size : int
        Samples in a minibatch, at least 1.
    seed : int
        Seed of all permutations, not negative.
    drop_last : bool
        Leave out the last minibatch of an epoch if it is incomplete; by default so, as sizes that change are not
        worth their trouble in training. False is for evaluation: every sample comes exactly once.

    Raises
    ------
    TypeError
        If a number is not an integer or `drop_last` no bool.
    ValueError
        If a number is too small, or not one complete minibatch is left.
    """

    num_samples: int
    batch_size: int
    seed: int = 0
    drop_last: bool = True

    def __post_init__(self):
        whole_number("num_samples", self.num_samples, 1, 60000)
        whole_number("batch_size", self.batch_size, 1, 100)
        whole_number("seed", self.seed, 0, 0)
        if not isinstance(self.drop_last, bool):
            raise TypeError(f"drop_last={self.drop_last!r} must be True or False; use True")
        if self.drop_last and self.batch_size > self.num_samples:
            raise ValueError(
                f"batch_size={self.batch_size} is more than num_samples={self.num_samples}, and drop_last=True leaves "
                f"no minibatch; use at most {self.num_samples}, or drop_last=False"
            )

    def __len__(self) -> int:
        """Minibatches in an epoch."""
        complete, rest = divmod(self.num_samples, self.batch_size)
        return complete + (rest > 0 and not self.drop_last)

    def epoch(self, number: int) -> tuple[torch.Tensor, ...]:
        """Minibatches of an epoch, counted from 0: indices of samples, int64 of shape (batch_size,).

        There are as many as `len` says; the last one is shorter if it is incomplete and kept.
        """
        random = np.random.default_rng((self.seed, whole_number("number", number, 0, 0)))
        order = torch.from_numpy(random.permutation(self.num_samples).astype(np.int64))
        return order.split(self.batch_size)[: len(self)]


def whole_number(name: str, value: int, least: int, example: int) -> int:
    """`value` as an int, if it is an integer of at least `least`, numpy's included, and no bool.

    Raises `TypeError` or `ValueError` otherwise, by the name of the caller's argument, with an example that works.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}={value!r} must be an integer; use {example}")
    if value < least:
        raise ValueError(f"{name}={value} must be at least {least}; use {example}")
    return operator.index(value)


def equal_share(name: str, number: int, num_classes: int) -> int:
    """Samples of each class, of so many; ValueError if the argument `name` is not a multiple of the classes."""
    share, extra = divmod(number, num_classes)
    if extra:
        fits = f"{number - extra} or {number - extra + num_classes}"
        raise ValueError(f"{name}={number} is not a multiple of the {num_classes} classes; use {fits}")
    return share


def check_dtype(dtype: torch.dtype, example: str = "torch.float32") -> None:
    """TypeError unless `dtype` is a floating-point type; `example` is one that works."""
    if not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"dtype={dtype} is no floating-point type; use {example}")


logger = logging.getLogger(__name__)

# Third byte of an idx file: the type of the values.
_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_GZIP = b"\x1f\x8b"
# How much is unpacked: images and fields take a tenth when packed, zeros a thousandth.
_LEAST_UNPACKED, _MOST_PACKING = 2**24, 20


def data_folder(name: str, folder: str | os.PathLike | None = None) -> Path:
    """Folder of the data set `name`: `folder`, else `$XBRAID_DATA/name`, else `name` in the user's folder for our data.

    The last lies where the system keeps such folders, `~/.local/share/xbraid_py` on Linux. Whether it exists is not
    checked.
    """
    if folder is not None:
        return Path(folder).expanduser()
    root = os.environ.get("XBRAID_DATA")
    return Path(root).expanduser() / name if root else _default(name)


def ways(name: str) -> str:
    """How to say where a data set lies, for errors about missing files."""
    return (
        f"Name the folder of the files with --data_dir FOLDER, or the folder that holds {name}/ with the variable "
        f"XBRAID_DATA; without both it is looked for in {_default(name)}."
    )


def _default(name: str) -> Path:
    return user_data_path("xbraid_py", appauthor=False) / name


def find_files(name: str, names: Mapping[str, str], origin: str, folder: str | os.PathLike | None = None) -> list[Path]:
    """Paths of the files of a data set; contents other than the published ones are only a warning in the log.

    Parameters
    ----------
    name : str
        Name of the data set, which is the name of its folder in `XBRAID_DATA`.
    names : mapping of str to str
        File names, each with the SHA-256 of the published file.
    origin : str
        Where the files officially come from.
    folder : path-like, optional
        See `data_folder`.

    Raises
    ------
    FileNotFoundError
        If one is missing, with the way to get it.
    """
    paths = [data_folder(name, folder) / file for file in names]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path} not found. It comes from {origin}. {ways(name)}")
    for path, published in zip(paths, names.values(), strict=True):
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != published:
            logger.warning("%s is not the published file (its SHA-256 differs)", path)
    return paths


def read_features(path: str | os.PathLike, num_features: int | None = None) -> torch.Tensor:
    """Features (F, B), float64, from a text file: one sample a line, numbers separated by blanks.

    Every line holds `num_features` numbers, by default as many as the first. Raises `OSError` if the file cannot be
    read, and `ValueError`, with the line, for a row of another length, a word that is no finite number, or a file
    without rows.
    """
    rows = [row for _, _, row in _rows(Path(path), num_features, lambda columns: "0.5 " * (columns - 1) + "-1.25")]
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


def read_labels(path: str | os.PathLike, num_classes: int | None = None) -> tuple[torch.Tensor, int]:
    """Classes (B,), int64, and the length of the rows, from a text file of one-hot rows: a single 1, at the class.

    Every line holds `num_classes` numbers, by default as many as the first. Raises what `read_features` does, and
    `ValueError` for a row that is not one-hot.
    """
    labels, row = [], []
    for number, line, row in _rows(Path(path), num_classes, _one_hot_example):
        if sorted(row) != [0.0] * (len(row) - 1) + [1.0]:
            raise _row_error(path, number, line, "not one-hot (a single 1, otherwise 0)", _one_hot_example(len(row)))
        labels.append(row.index(1.0))
    return torch.tensor(labels), len(row)


def _one_hot_example(columns: int) -> str:
    return " ".join(["0", "1", "0", "0", "0", *["0"] * (columns - 5)][:columns])


def _rows(path: Path, columns: int | None, example) -> Iterator[tuple[int, str, list[float]]]:
    """Line number, text and numbers of every row; `example(columns)` is a good row."""
    # A file that is no text at all is to fail at its first row, like any other bad row.
    lines = path.read_bytes().decode(errors="replace").rstrip().splitlines()
    if not lines:
        raise ValueError(f"{path} has no rows; each line is one sample, as in '{example(columns or 2)}'")
    for number, line in enumerate(lines, start=1):
        words = line.split()
        columns = columns or len(words) or 2
        row = [_number(word) for word in words]
        for word, value in zip(words, row, strict=True):
            if not math.isfinite(value):
                raise _row_error(path, number, line, f"{_cut(word)} is not a finite number", example(columns))
        if len(row) != columns:
            rule = f"{len(row)} number(s) where every row holds {columns}"
            raise _row_error(path, number, line, rule, example(columns))
        yield number, line, row


def _number(word: str) -> float:
    if not word.isascii() or "_" in word:  # Python reads digits of all scripts, and 1_000
        return math.nan
    try:
        return float(word)
    except ValueError:
        return math.nan


def _row_error(path: Path | str | os.PathLike, number: int, line: str, rule: str, example: str) -> ValueError:
    return ValueError(f"{path}, line {number}: found {_cut(line)}: {rule}; a good row is '{example}'")


def _cut(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """Values of an idx file, plain or packed with gzip whatever its name.

    That is two zero bytes, a byte for the type, a byte for the number of axes, the length of every axis as a big-endian
    32-bit number, and then the values, big-endian, the last axis running fastest.

    Returns
    -------
    numpy.ndarray
        Writable, in the byte order of this machine, of the type and shape that the file states: uint8, int8, int16,
        int32, float32 or float64.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        For a wrong magic number, a file that is too short or too long for its shape, damaged packing, or more axes or
        values than numpy can hold; with the name of the file.
    """
    path = Path(path)
    with path.open("rb") as file, contextlib.ExitStack() as stack:
        is_packed, packed = file.read(2) == _GZIP, os.fstat(file.fileno()).st_size
        file.seek(0)
        stream = cast(BinaryIO, stack.enter_context(gzip.open(file)) if is_packed else file)
        try:
            return _read_idx(path, stream, packed, is_packed)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is damaged, gzip says: {error}; get it anew") from error


def _read_idx(path: Path, stream: BinaryIO, packed: int, is_packed: bool) -> np.ndarray:
    head = stream.read(4)
    if len(head) < 4 or head[:2] != b"\0\0" or head[2] not in _TYPES:
        codes = ", ".join(f"{code:02x}" for code in _TYPES)
        raise ValueError(
            f"{path} begins with the bytes '{head.hex(' ')}', which is no magic number of an idx file (00 00, one "
            f"of {codes}, the number of axes); images of unsigned bytes begin with '00 00 08 03'"
        )
    lengths, start = stream.read(4 * head[3]), 4 + 4 * head[3]
    if len(lengths) < start - 4:
        raise ValueError(
            f"{path} is truncated: {head[3]} axes need a header of {start} bytes, it has {len(lengths) + 4}"
        )
    shape = tuple(int.from_bytes(lengths[at : at + 4], "big") for at in range(0, start - 4, 4))
    kind = np.dtype(_TYPES[head[2]])
    # In Python's integers: the product of damaged lengths may pass any fixed width.
    size = start + math.prod(shape) * kind.itemsize
    if is_packed:
        check_packing(path, size, packed)
    # No more than is wanted is unpacked, and of a plain file no more than is there is asked for.
    values = stream.read(size - start) if is_packed or packed == size else b""
    surplus = stream.read(1) if is_packed else b""
    found = start + len(values) + len(surplus) if is_packed else packed
    if found != size:
        fault = "is truncated" if found < size else "has surplus bytes"
        has = "more" if surplus else found
        raise ValueError(f"{path} {fault}: {kind.name} of shape {shape} needs {size} bytes, it has {has}")
    try:
        return np.frombuffer(values, dtype=kind).reshape(shape).astype(kind.newbyteorder("="))
    except ValueError as error:
        raise ValueError(f"{path} has a shape that numpy cannot hold, {head[3]} axes: {error}") from error


def check_packing(path: Path, unpacked: int, packed: int) -> None:
    """ValueError if a file, by its own word, holds so much more than it has bytes as no measured data do."""
    most = max(_LEAST_UNPACKED, _MOST_PACKING * packed)
    if unpacked > most:
        raise ValueError(
            f"{path} has {packed:,} bytes and claims {unpacked:,} when unpacked, more than the {most:,} that are "
            f"unpacked of such a file; get it anew, or unpack it"
        )
