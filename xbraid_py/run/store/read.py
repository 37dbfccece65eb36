"""The reading half of checkpoints: their file format, errors, verification, and the newest good one of a folder."""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import stat
import struct
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Self

import h5py
import numpy as np
import torch
from h5py import h5l, h5o  # pyright: ignore[reportAttributeAccessIssue]  # compiled

from xbraid_py.run.store.tables import NOWHERE, check_object

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
CHUNK_BYTES = 2**18  # the unit of a checksum, and of reading
PIECE_BYTES = 8 * 2**20  # moved at a time: bounds the memory of a writing rank and of `verify`
# What a file may hold, far above what any run writes: all of it is looked at before any of it is read.
META_BYTES, META_DEPTH = 2**24, 50
NAMES, NAME_LETTERS, NAME_PARTS = 4000, 500, 16
# What h5py raises for a damaged file depends on the byte that is damaged.
_UNREADABLE = (OSError, KeyError, ValueError, TypeError, RuntimeError, OverflowError)
_FILE_NAME = re.compile(r"update_([0-9]{6,})\.h5")
# First bytes: signature, version, bytes of an address and of a length, flags, begin of the file, extension, end, root.
_SUPERBLOCK = struct.Struct("<8sBBBBQQQQ")
_CHECKPOINTS_HAVE = (b"\x89HDF\r\n\x1a\n", 3, 8, 8, 0, 0, NOWHERE)
_CHECKSUM_BYTES = 4
_FEWEST_BYTES = CHUNK_BYTES // 64  # of a chunk, where an array has several
_HOLES = 1000  # a file that is so many times larger than what the disk has of it
_STORED_AS = {dtype.name: h5py.h5t.py_create(dtype, logical=True) for dtype in DTYPES.values()}

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


def _check_file(path: Path) -> int:
    """Refuse, before HDF5 opens it, what is no regular file, and one with parts that checkpoints do not have.

    Those parts (a user block, an extension with drivers, caches and shared messages) are read as a file is opened.
    A link is followed: what it leads to has to stand the same tests. Returns where the first group is.
    """
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise _error(path, "is a folder, a pipe or a device, not a file")
    # What nobody has written reads as zeros, whose checksum is zero, so that a few bytes pass for any number of them.
    if status.st_size > _HOLES * 512 * status.st_blocks > 0:
        raise _error(path, f"damaged: of its {status.st_size} bytes the disk holds next to none")
    with open(path, "rb") as file:
        head = file.read(_SUPERBLOCK.size)
        if len(head) == _SUPERBLOCK.size:
            *found, _, root = _SUPERBLOCK.unpack(head)
            if (*found,) == _CHECKPOINTS_HAVE:
                check_object(file, root)
                return root
    raise _error(path, "truncated, damaged or no HDF5 file of a checkpoint's layout")


def _attribute(file: h5py.File, name: str, kind: int) -> Any:
    """The value of an attribute of a file; None unless it is one of an HDF5 class, of a few bytes that lie in it."""
    if not h5py.h5a.exists(file.id, name.encode()):
        return None
    item = h5py.h5a.open(file.id, name.encode())
    held = item.get_type()
    if held.get_class() != kind or held.get_size() > 64 or item.get_space().get_simple_extent_type() != h5py.h5s.SCALAR:
        return None
    if kind != h5py.h5t.STRING:
        return file.attrs[name]
    value: Any = file.attrs[name]
    return None if held.is_variable_str() else value.decode("ascii", "replace")


def _spans(array: h5py.h5d.DatasetID, item_bytes: int, room: int) -> list[tuple[int, int]] | None:
    """First byte and bytes of each chunk of an array; None unless it lies in `room` bytes of a file as writers lay it.

    So all of it is stored, in chunks of whole rows, with a checksum that is looked at and no other filter, and each of
    its full length: HDF5 reads past the end of a shorter one. Virtual arrays and arrays in other files have no
    checksums, what is not stored would read as zeros, and other filters may be code from elsewhere, which HDF5 loads
    when it is asked for the data.
    """
    made, shape, limits = array.get_create_plist(), array.shape, array.get_space().get_simple_extent_dims(1)
    if not math.prod(shape):
        return [] if made.get_layout() == h5py.h5d.CONTIGUOUS and not made.get_external_count() else None
    if made.get_layout() != h5py.h5d.CHUNKED or made.get_nfilters() != 1 or limits != shape:
        return None
    rows, *trailing = made.get_chunk()
    size = rows * math.prod(trailing) * item_bytes
    if made.get_filter(0)[:3] != (h5py.h5z.FILTER_FLETCHER32, 0, ()) or (*trailing,) != shape[1:]:
        return None
    count = -(-shape[0] // rows)
    if rows > shape[0] or (rows > 1 and size > CHUNK_BYTES) or (count > 1 and size < _FEWEST_BYTES):
        return None
    size += _CHECKSUM_BYTES
    if count * size > room:
        return None
    found = _chunks(array, count)
    if any(each.filter_mask or each.size != size for each in found):
        return None
    places = sorted(each.chunk_offset for each in found)
    expected = [(number * rows, *(0 for _ in trailing)) for number in range(count)]
    return [(each.byte_offset, size) for each in found] if places == expected else None


def _chunks(array: h5py.h5d.DatasetID, count: int) -> list[h5py.h5d.StoreInfo]:
    """What HDF5 has written down of the chunks of an array, and of one more than `count` at most."""
    if not hasattr(array, "chunk_iter"):  # older releases of HDF5, which count anew for every chunk
        return [array.get_chunk_info(number) for number in range(min(array.get_num_chunks(), count + 1))]
    return _at_most(count, array.chunk_iter)


def _at_most(count: int, walk: Callable) -> list:
    """What HDF5 hands to a function on a walk that may lead it round in a circle, and one more than `count` at most."""
    found: list = []

    def look(each: Any) -> bool | None:
        found.append(each)
        return len(found) > count or None  # anything but None ends the walk

    walk(look)
    return found


def _is_flat(document: Any) -> bool:
    """Whether JSON is nested no deeper than a run nests it; what follows may recurse."""
    level = [document]
    for _ in range(META_DEPTH):
        level = [child for item in level if isinstance(item, dict | list) for child in _children(item)]
        if not level:
            return True
    return False


def _children(item: dict | list) -> Iterable[Any]:
    return item.values() if isinstance(item, dict) else item


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

    def __init__(self, path: Path, file: h5py.File, root: int):
        self.path = path
        self._file: Any = file
        self._held: dict[str, tuple[tuple[int, ...], str]] = {}
        kind = _attribute(file, "format", h5py.h5t.STRING)
        number = _attribute(file, "format_number", h5py.h5t.INTEGER)
        if kind != FORMAT:
            raise _error(path, f"no {FORMAT}: its format is {kind!r}")
        if number != FORMAT_NUMBER:
            raise _error(path, f"its format_number={number} is not {FORMAT_NUMBER}, the one this version reads")
        with open(path, "rb") as raw:
            self._look(raw, root)
        if META not in file:
            raise _error(path, "damaged: it has no meta data")
        document = json.loads(self._file[META][0].decode("ascii"))
        self.meta: dict[str, Any] = document["meta"]
        self.versions: dict[str, str | None] = document["versions"]
        if not isinstance(self.meta, dict) or not isinstance(self.versions, dict) or not _is_flat(document):
            raise _error(path, "damaged: its meta data are no names and values")
        # Files of before say nothing of it. Of what they say of later ones, `verify` looks at the fingerprints.
        self._fingerprints: dict[str, int] | None = None
        if "arrays" in document:
            said = {name: (tuple(shape), dtype) for name, (shape, dtype, _) in document["arrays"].items()}
            if said != {name: (shape, dtype) for name, (shape, dtype) in self._held.items()}:
                raise _error(path, "damaged: it does not hold the arrays that were written")
            self._fingerprints = {name: number for name, (_, _, number) in document["arrays"].items()}

    def _look(self, raw: BinaryIO, root: int) -> None:
        """Find the arrays, and refuse a file that holds anything else, or anything that it would not be good to read.

        Whoever makes a file gives its tables their right checksums too, so nothing that they say is believed.
        """
        size = self.path.stat().st_size
        spans: list[tuple[int, int]] = []
        waiting, seen, left = [("", h5py.h5g.open(self._file.id, b"/"))], {root}, size
        while waiting:
            where, group = waiting.pop()
            count = group.get_num_objs()
            if len(seen) + count > NAMES:
                raise _error(self.path, f"damaged: it holds more than {NAMES} names")
            # In the order they lie in: to sort them HDF5 would make a table of as many as are said to be there.
            keys = _at_most(count, lambda look, group=group: group.links.iterate(look, order=h5py.h5.ITER_NATIVE))
            if len(keys) != count:
                raise _error(self.path, f"damaged: a group of it has not the {count} names that it says")
            for key in keys:
                name = where + self._checked_name(key)
                # Links of other kinds lead into other files, or nowhere.
                link = group.links.get_info(key)
                if link.type != h5l.TYPE_HARD:
                    raise _error(self.path, f"{name!r} in it is a link, which this format has not")
                if link.u in seen:
                    raise _error(self.path, f"{name!r} in it is a second name, which this format has not")
                seen.add(link.u)
                check_object(raw, link.u)
                item = h5o.open(group, key)
                if name == META or not isinstance(item, h5py.h5g.GroupID):
                    stored = self._stored(name, item, left)
                    left -= sum(length for _, length in stored)
                    spans += stored
                elif name.count("/") + 1 < NAME_PARTS:
                    waiting.append((f"{name}/", item))
                else:
                    raise _error(self.path, f"damaged: its names have more than {NAME_PARTS} parts")
        end = 0
        for first, length in sorted(spans):
            if first < end:
                raise _error(self.path, "damaged: its data lie one on the other")
            end = first + length
        if end > size:
            raise _error(self.path, "truncated or damaged: its data lie beyond its end")

    def _checked_name(self, key: bytes) -> str:
        name = key.decode()
        if len(name) > NAME_LETTERS or not name.isprintable() or "/" in name or name in ("", "."):
            raise _error(self.path, "damaged: it holds a name that no array has")
        return name

    def _stored(self, name: str, item: h5py.h5d.DatasetID, room: int) -> list[tuple[int, int]]:
        """Take an array, or the meta data, into the names; where their chunks lie, within so many bytes."""
        spans, held = None, item.get_type() if isinstance(item, h5py.h5d.DatasetID) else None
        if held is None or item.get_space().get_simple_extent_type() != h5py.h5s.SIMPLE:
            pass
        elif name == META:
            if held.get_class() == h5py.h5t.STRING and not held.is_variable_str() and item.shape == (1,):
                spans = _spans(item, held.get_size(), min(room, META_BYTES))
        elif (dtype := next((name for name, known in _STORED_AS.items() if held.equal(known)), None)) and item.shape:
            spans = _spans(item, held.get_size(), room)
            self._held[name] = item.shape, dtype
        if spans is None:
            raise _error(self.path, f"damaged: {name!r} is not an array of this format, stored whole with checksums")
        return spans

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; tensors already read stay valid."""
        self._file.close()

    def names(self) -> tuple[str, ...]:
        """Names of the arrays, sorted."""
        return tuple(sorted(self._held))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a global array, rows first; raises `CheckpointError` if there is none of that name."""
        if name not in self._held:
            raise _error(self.path, f"holds no {name!r}, but {', '.join(self.names()) or 'no array at all'}")
        return self._held[name][0]

    def total(self, name: str) -> int:
        """Rows of a global array; raises `CheckpointError` if there is none of that name."""
        return self.shape(name)[0]

    def rows(self, name: str, first: int = 0, count: int | None = None) -> torch.Tensor:
        """Rows `first` to `first + count` of a global array, by default all from `first` on, on the CPU, as they were
        saved.

        Raises `CheckpointError` if there is no such array, it has no such rows, or their checksums fail.
        """
        total = self.total(name)
        count = total - first if count is None else count
        if not 0 <= first <= first + count <= total:
            raise _error(self.path, f"{name!r} has {total} rows, not first={first} and count={count}")
        with _reading(self.path, f"the data of {name!r} are damaged, their checksum fails"):
            values = self._file[name][first : first + count]
            if values.dtype == bool and (values.view(np.uint8) > 1).any():
                raise _error(self.path, f"the data of {name!r} are damaged: they are neither true nor false")
        rows = torch.from_numpy(values)
        if count == total and self._fingerprints is not None:
            self._compare(name, fingerprint(rows, 0))
        return rows

    def check(self, name: str) -> None:
        """Read all of an array, a piece at a time; raises `CheckpointError` if any of it is damaged."""
        total, *trailing = self.shape(name)
        row_bytes = np.dtype(self._held[name][1]).itemsize * math.prod(trailing)
        number = 0
        for part in pieces(total, row_bytes):
            number += fingerprint(self.rows(name, part.start, part.stop - part.start), part.start)
        if self._fingerprints is not None:
            self._compare(name, number % 2**64)

    def _compare(self, name: str, number: int) -> None:
        assert self._fingerprints is not None
        if number != self._fingerprints[name]:
            raise _error(self.path, f"the data of {name!r} are damaged: they are not those that were written")


def load(path: str | os.PathLike) -> Checkpoint:
    """Open a checkpoint for reading; `with load(path) as checkpoint: ...`.

    Raises `CheckpointError` if it is missing, truncated, damaged, of another kind, or of a newer format.
    """
    path = Path(path)
    with _reading(path, "truncated, damaged or no HDF5 file"), contextlib.ExitStack() as stack:
        root = _check_file(path)
        # No lock: a file under its final name never changes, and many network file systems have none.
        file = stack.enter_context(h5py.File(path, "r", locking=False))
        checkpoint = Checkpoint(path, file, root)
        stack.pop_all()
        return checkpoint


def verify(path: str | os.PathLike) -> None:
    """Read all of a checkpoint, a piece at a time; raises `CheckpointError` if any of it is damaged."""
    with load(path) as checkpoint:
        for name in checkpoint.names():
            checkpoint.check(name)


def fingerprint(rows: torch.Tensor, first: int) -> int:
    """A number of the bits of rows `first` and following of an array; that of all is the sum of those of its parts.

    Modulo 2**64, and with the number of the row in it. Unlike the checksum of a chunk it tells apart, among others,
    zeros that were written from zeros where nothing was, and rows of one chunk from those of another.
    """
    if not rows.numel():
        return 0
    whole = {8: torch.int64, 4: torch.int32, 1: torch.uint8}[rows.element_size()]
    sums = rows.detach().view(whole).reshape(len(rows), -1).sum(1, dtype=torch.int64)
    numbers = torch.arange(first + 1, first + 1 + len(rows), device=rows.device)
    return int((sums * numbers).sum()) % 2**64


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
