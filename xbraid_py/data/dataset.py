"""A labeled data set, and what is common to reading one from files: the folder, checksums, text rows.

Shape letters: `F` features, `B` samples. Features lie outermost and samples last, as in the states (C, B).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

# Where data sets lie if nothing else is said: beside the project.
_DEFAULT_ROOT = Path(__file__).resolve().parents[2] / ".." / "shared" / "data"


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
            raise TypeError(f"features is {_kind(self.features)}, must be a floating-point tensor of shape (F, B)")
        if not (isinstance(self.labels, torch.Tensor) and self.labels.dtype == torch.int64):
            raise TypeError(f"labels is {_kind(self.labels)}, must be an int64 tensor of shape (B,)")
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


def _kind(value) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__


def data_folder(name: str, folder: str | os.PathLike | None = None) -> Path:
    """Folder of the data set `name`: `folder`, else `$XBRAID_DATA/name`, else `../shared/data/name`.

    The last is relative to the project's root. Whether the folder exists is not checked.
    """
    if folder is not None:
        return Path(folder).expanduser()
    root = os.environ.get("XBRAID_DATA")
    return (Path(root).expanduser() if root else _DEFAULT_ROOT) / name


def find_files(name: str, names: Mapping[str, str], origin: str, folder: str | os.PathLike | None = None) -> list[Path]:
    """Paths of the files of a data set.

    A file of other contents than the published one is reported by a warning in the log, not refused:
    own files of the same format are welcome.

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
            raise FileNotFoundError(
                f"{path} not found. It comes from {origin}. Name the folder that holds {path.name} with "
                f"--data_dir, or the folder that holds {name}/ with the variable XBRAID_DATA."
            )
    for path, published in zip(paths, names.values(), strict=True):
        if hashlib.sha256(path.read_bytes()).hexdigest() != published:
            logger.warning("%s is not the published file (its SHA-256 differs)", path)
    return paths


def read_features(path: str | os.PathLike, num_features: int | None = None) -> torch.Tensor:
    """Features from a text file: one sample a line, numbers separated by blanks.

    Parameters
    ----------
    path : path-like
        The file.
    num_features : int, optional
        Numbers a line must hold; by default as many as the first line does.

    Returns
    -------
    torch.Tensor
        Shape (F, B), float64.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        For a row of another length, a word that is no finite number, or a file without rows; with the line.
    """
    rows = [row for _, _, row in _rows(Path(path), num_features, lambda columns: "0.5 " * (columns - 1) + "-1.25")]
    return torch.tensor(rows, dtype=torch.float64).T.contiguous()


def read_labels(path: str | os.PathLike, num_classes: int | None = None) -> tuple[torch.Tensor, int]:
    """Classes from a text file of one-hot rows: a single 1, at the class, and otherwise 0.

    Parameters
    ----------
    path : path-like
        The file.
    num_classes : int, optional
        Numbers a line must hold; by default as many as the first line does.

    Returns
    -------
    labels : torch.Tensor
        Shape (B,), int64.
    num_classes : int
        Length of the rows.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        As in `read_features`, and for a row that is not one-hot.
    """
    labels = []
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
    try:
        return float(word)
    except ValueError:
        return math.nan


def _row_error(path: Path | str | os.PathLike, number: int, line: str, rule: str, example: str) -> ValueError:
    return ValueError(f"{path}, line {number}: found {_cut(line)}: {rule}; a good row is '{example}'")


def _cut(text: str, length: int = 60) -> str:
    return repr(text if len(text) <= length else text[:length] + "...")
