"""The reading half of checkpoints: their file format, errors, verification, and the newest good one of a folder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import h5py
import numpy as np
import torch

FORMAT = "xbraid_py checkpoint"
FORMAT_NUMBER = 1
META = "meta"
BEST = "best.h5"
DTYPES = {
    torch.float64: np.dtype(np.float64),
    torch.float32: np.dtype(np.float32),
    torch.int64: np.dtype(np.int64),
    torch.uint8: np.dtype(np.uint8),
    torch.bool: np.dtype(np.bool_),
}
PIECE_BYTES = 8 * 2**20  # moved at a time: bounds the memory of a writing rank and of `verify`
# What h5py raises for a damaged file depends on the byte that is damaged.
_UNREADABLE = (OSError, KeyError, ValueError, TypeError, RuntimeError)
_FILE_NAME = re.compile(r"update_(\d{6,})\.h5")

log = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A checkpoint is missing, truncated, damaged, foreign, or does not hold what is asked of it.

    Attributes
    ----------
    reason : str
        File and reason, without what to do.
    """

    def __init__(self, message: str, reason: str | None = None):
        super().__init__(message)
        self.reason = reason or message


def _error(path: Path, what: str) -> CheckpointError:
    reason = f"checkpoint {path}: {what}"
    return CheckpointError(f"{reason}; give another file, or `--resume auto` for the newest good one", reason)


@contextlib.contextmanager
def _reading(path: Path, suspicion: str) -> Iterator[None]:
    """Turn whatever a bad file raises into one `CheckpointError`."""
    try:
        yield
    except CheckpointError:
        raise
    except _UNREADABLE as error:
        number = getattr(error, "errno", None)
        reason = os.strerror(number) if number else f"{suspicion} ({error})"
        raise _error(path, reason) from error


def pieces(count: int, row_bytes: int) -> Iterator[slice]:
    """Slices of `count` rows of at most `PIECE_BYTES`, but of one row at least; none where there are no bytes."""
    if row_bytes:
        step = max(1, PIECE_BYTES // row_bytes)
        for first in range(0, count, step):
            yield slice(first, min(first + step, count))


def _is_checked(array: h5py.Dataset) -> bool:
    """Whether an array lies in this file, all of it, with checksums and no other filter.

    Virtual arrays and arrays in other files have none. What is not stored would read as zeros, and other filters may
    be code from elsewhere, which HDF5 loads when it is asked for the data.
    """
    made = array.id.get_create_plist()
    if made.get_layout() != h5py.h5d.CHUNKED or made.get_nfilters() != 1:
        return False
    if made.get_filter(0)[0] != h5py.h5z.FILTER_FLETCHER32:
        return False
    chunks = math.prod(-(-size // step) for size, step in zip(array.shape, array.chunks, strict=True))
    return array.id.get_num_chunks() == chunks


class Checkpoint:
    """An open checkpoint; made by `load`, used on each rank for itself, without messages.

    Attributes
    ----------
    path : Path
    meta : dict
        What was handed to `save`, as JSON gives it back.
    versions : dict of str to str or None
        Versions of the libraries that wrote the file.
    """

    def __init__(self, path: Path, file: h5py.File):
        self.path = path
        self._file = file
        self._datasets: dict[str, h5py.Dataset] = {}
        kind, number = file.attrs.get("format"), file.attrs.get("format_number")
        if kind != FORMAT.encode():
            raise _error(path, f"no {FORMAT}: its format is {kind!r}")
        if number != FORMAT_NUMBER:
            raise _error(path, f"its format_number={number} is not {FORMAT_NUMBER}, the one this version reads")
        self._add("/", file)
        file.visititems(self._add)
        head = file[META]
        if head.dtype.kind != "S" or head.shape != (1,) or not _is_checked(head):
            raise _error(path, "damaged: its meta data have no checksum")
        document = json.loads(head[0])
        self.meta: dict[str, Any] = document["meta"]
        self.versions: dict[str, str | None] = document["versions"]
        if not isinstance(self.meta, dict) or not isinstance(self.versions, dict):
            raise _error(path, "damaged: its meta data are no names and values")

    def _add(self, name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Group):
            # Links of other kinds lead into other files, or nowhere.
            strange = [key for key in item if not isinstance(item.get(key, getlink=True), h5py.HardLink)]
            if strange:
                raise _error(self.path, f"{strange[0]!r} in it is a link, which this format has not")
        elif name != META:
            known = isinstance(item, h5py.Dataset) and item.dtype in DTYPES.values() and item.shape
            if not known or (item.size and not _is_checked(item)):
                raise _error(self.path, f"{name!r} is not an array of this format ({item.dtype}, no checksum)")
            self._datasets[name] = item

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors already read stay valid."""
        self._file.close()

    def names(self) -> tuple[str, ...]:
        """Names of the arrays, sorted."""
        return tuple(sorted(self._datasets))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a global array, rows first; raises `CheckpointError` if there is none of that name."""
        return self._dataset(name).shape

    def total(self, name: str) -> int:
        """Rows of a global array; raises `CheckpointError` if there is none of that name."""
        return self.shape(name)[0]

    def rows(self, name: str, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Rows `first` to `first + count` of a global array, by default all from `first` on, on the CPU, as they were
        saved.

        Raises `CheckpointError` if there is no such array, it has no such rows, or their checksums fail.
        """
        dataset = self._dataset(name)
        count = len(dataset) - first if count is None else count
        if not 0 <= first <= first + count <= len(dataset):
            raise _error(self.path, f"{name!r} has {len(dataset)} rows, not first={first} and count={count}")
        with _reading(self.path, f"the data of {name!r} are damaged, their checksum fails"):
            return torch.from_numpy(dataset[first : first + count])

    def _dataset(self, name: str) -> h5py.Dataset:
        if name not in self._datasets:
            raise _error(self.path, f"holds no {name!r}, but {', '.join(self.names()) or 'no array at all'}")
        return self._datasets[name]


def load(path: str | os.PathLike) -> Checkpoint:
    """Open a checkpoint for reading; `with load(path) as checkpoint: ...`.

    Raises `CheckpointError` if it is missing, truncated, damaged, of another kind, or of a newer format.
    """
    path = Path(path)
    with _reading(path, "truncated, damaged or no HDF5 file"), contextlib.ExitStack() as stack:
        # No lock: a file under its final name never changes, and many network file systems have none.
        file = stack.enter_context(h5py.File(path, "r", locking=False))
        checkpoint = Checkpoint(path, file)
        stack.pop_all()
        return checkpoint


def verify(path: str | os.PathLike) -> None:
    """Read all of a checkpoint, a piece at a time; raises `CheckpointError` if any of it is damaged."""
    with load(path) as checkpoint:
        for name in checkpoint.names():
            total, *trailing = checkpoint.shape(name)
            row_bytes = checkpoint.rows(name, 0, 0).element_size() * int(np.prod(trailing))
            for part in pieces(total, row_bytes):
                checkpoint.rows(name, part.start, part.stop - part.start)


def file_name(update: int) -> str:
    """Name of the checkpoint after weight update number `update`, such as update_000040.h5."""
    if update < 0:
        raise ValueError(f"update={update} must not be negative; use 0")
    return f"update_{update:06d}.h5"


def numbered(folder: str | os.PathLike) -> list[tuple[int, Path]]:
    """Update numbers and paths of the files in a folder that are named as `file_name` names them, the newest first."""
    folder = Path(folder)
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _FILE_NAME.fullmatch(path.name)
        if match:
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)


def newest_good(folder: str | os.PathLike) -> Path | None:
    """The checkpoint of the highest update number in a folder that `verify` accepts; None if there is none.

    Damaged ones are skipped with a warning in the log that names file and reason. Files under other names than
    `file_name` gives are none; only where all of them are damaged, a good `best.h5` is taken. It reads whole files.
    """
    paths = [path for _, path in numbered(folder)]
    best = Path(folder) / BEST
    for path in [*paths, *([best] if best.exists() else [])]:
        try:
            verify(path)
        except CheckpointError as error:
            log.warning("damaged, so the one before is taken: %s", error.reason)
        else:
            return path
    if paths:
        log.warning("no checkpoint in %s is good", folder)
    return None


def check_total(path: Path, found: int, expected: int) -> None:
    """Raise an error unless there are as many as expected."""
    if found != expected:
        raise no_state(path, f"{found} rows or vectors where this run has {expected}")


def no_state(path: Path, why: str = "") -> CheckpointError:
    """What to raise for a file that holds something else than the state of such a run."""
    why = why and f" ({why})"
    return CheckpointError(f"{path} holds no state of a training run{why}; give one of a run's checkpoints folder")


@contextlib.contextmanager
def restoring(path: Path) -> Iterator[None]:
    """Whatever a sound file of other content leads to becomes one error; damage has been found before."""
    try:
        yield
    except CheckpointError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise no_state(path, f"{type(error).__name__}: {error}") from error
