"""The record of a run, `metrics.jsonl`: a header and one JSON object per weight update; and how files are replaced.

Whoever looks at a file, and a crash, find the old one or the new one, but of a record that is appended to.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import glob
import importlib.metadata
import json
import math
import os
import platform
import secrets
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from xbraid_py.run.documents import complete_lines, load_json, open_regular
from xbraid_py.run.programs import name_of

if TYPE_CHECKING:
    from xbraid_py.comm import Communicator


class MetricsWriter:
    """Writes the record on rank 0; on other ranks it does nothing, and it never sends a message.

    A context manager. Each line goes to the operating system whole and at once, so that a killed run leaves at most one
    incomplete line. Numbers that JSON lacks (NaN, infinities) become null.

    The first line is a header: `{"kind": "header", "driver": ..., "configuration": ..., "versions": ..., "ranks": ...,
    "host": ..., "date": ...}`. Where lines are appended to a record that has one, a line of the same content and the
    kind "resume" says that the run went on, on which ranks and versions.

    Parameters
    ----------
    path : path-like
        The file; its folder is made if there is none.
    comm : Communicator
    header : mapping
        The configuration, as JSON-able values (paths are written as text).
    append : bool
        Go on with an existing record (see `truncate_after`) instead of replacing it.
    mpi_library : str, optional
        What the MPI library says of its version, for the header.
    driver : path-like, optional
        The program that takes this configuration, for the header; this one by default. Of the programs that come
        with the library the header has the name, of others the path.

    Raises
    ------
    TypeError, OSError
        On rank 0, if a value is none that JSON has, or the file cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        comm: Communicator,
        header: Mapping[str, Any],
        append: bool = False,
        mpi_library: str | None = None,
        driver: str | os.PathLike | None = None,
    ):
        self.path = Path(path)
        self._append = append
        self._is_writer = comm.rank == 0
        self._ranks = comm.size
        self._header = header
        self._mpi_library = mpi_library
        self._driver = driver or sys.argv[0]
        self._file = None

    def __enter__(self) -> Self:
        if self._is_writer:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            goes_on = self._append and self.path.exists() and self.path.stat().st_size > 0
            # Unbuffered, so that a line is one write, and nothing of it is written again after an error.
            handle = open_own(self.path, os.O_WRONLY | os.O_CREAT | (os.O_APPEND if goes_on else os.O_TRUNC))
            self._file = open(handle, "ab" if goes_on else "wb", buffering=0)
            self.write({"kind": "resume" if goes_on else "header", **self._about()})
        return self

    def __exit__(self, *exception) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Append one object. Zero-dimensional arrays and tensors are numbers, others lists."""
        if not self._is_writer:
            return
        if self._file is None:
            raise ValueError(f"the record {self.path} is not open; write inside `with MetricsWriter(...) as record:`")
        line = json.dumps(_plain(row), allow_nan=False).encode("ascii") + b"\n"
        if os.fstat(self._file.fileno()).st_nlink == 0:
            # Every further line would go into a file that nobody can open any more.
            raise FileNotFoundError(errno.ENOENT, f"the record {self.path} has been removed under the run")
        if self._file.write(line) != len(line):
            raise OSError(errno.ENOSPC, f"record {self.path} not written: {os.strerror(errno.ENOSPC)}")

    def _about(self) -> dict[str, Any]:
        from xbraid_py.kernels import BACKEND  # loads torch, which whoever reads a record needs not

        host = {
            "machine": platform.machine(),
            "system": platform.system(),
            "cpus": os.cpu_count(),
            "python": platform.python_version(),
            "mpi": self._mpi_library,
            "kernels": BACKEND,
        }
        return {
            "driver": name_of(self._driver),
            "configuration": self._header,
            "versions": library_versions(),
            "ranks": self._ranks,
            "host": host,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }


def _plain(value: Any) -> Any:
    """`value` in terms of JSON; whatever else is in it is left for `json.dumps` to refuse."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):  # arrays and tensors
        return _plain(value.tolist())
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return value


# Bytes of a line, which are some hundreds as a rule, and of what is held of a record that is looked at: parsed it takes
# ten times as much.
_MOST_LINE, MOST_READ = 2**22, 2**24
_MOST_CURVES = 20_000


class RecordReader:
    """Reads a record again and again, of it what is new; a resumed run may replace it by a shorter one.

    Parameters
    ----------
    path : path-like
    most : int, optional
        Of a longer record only the first line and the end, half as many bytes, are read.

    Attributes
    ----------
    header : dict
        The header; empty if there is none.
    resumes, rows : list of dict
        What the record says of continuations, and all other objects.
    columns : dict of str to dict of str to dict of float to float
        The numbers of the rows by their names (`scalars`); for each of the runs in the record ("" where rows name none)
        the values by updates. Rows without a number of an update count from 0. Of several values for one update the
        last holds; beyond 20,000 of them further ones are left out.
    damaged : list of int
        Numbers, from 1, of lines that are no JSON objects, among those that are read.
    skipped : int
        Bytes that are not read, of a record that is too long.
    """

    def __init__(self, path: str | os.PathLike, most: int | None = MOST_READ):
        self.path = Path(path)
        self._most = most
        self._reset(None)

    def _reset(self, file: int | None) -> None:
        self._file, self._offset, self._lines = file, 0, 0
        self.header: dict[str, Any] = {}
        self.resumes: list[dict[str, Any]] = []
        self.rows: list[dict[str, Any]] = []
        self.columns: dict[str, dict[str, dict[float, float]]] = {}
        self.damaged: list[int] = []
        self.skipped = self._curves = 0

    def read(self) -> None:
        """Take in what is new; a line that breaks off may yet be completed, and is left for the next time.

        Raises `OSError` if the file cannot be read, or is no regular one; of one that is gone nothing is known any
        more.
        """
        try:
            with open_regular(self.path) as stream:
                info = os.fstat(stream.fileno())
                if info.st_ino != self._file or info.st_size < self._offset:
                    self._reset(info.st_ino)
                if self._most is not None and info.st_size - self.skipped > self._most:
                    self._reset(info.st_ino)
                    self._skip(stream, info.st_size - self._most // 2)
                stream.seek(self._offset)
                for line, size in complete_lines(stream, _MOST_LINE):
                    self._offset += size
                    self._lines += 1
                    self._take(line)
        except FileNotFoundError:
            self._reset(None)
            raise

    def _skip(self, stream: BinaryIO, place: int) -> None:
        """Take the first line, and go on with the one that begins after a place."""
        self._take(stream.readline(_MOST_LINE))
        self._lines, first = 1, stream.tell()
        stream.seek(place)
        assert self._most is not None
        rest = self._most // 2
        self._offset = place + len(stream.readline(rest))
        self.skipped = self._offset - first

    def _take(self, line: bytes) -> None:
        row = _object(line)
        if row is None:
            self.damaged.append(self._lines)
        elif row.get("kind") == "header":
            self.header = row
        elif row.get("kind") == "resume":
            self.resumes.append(row)
        else:
            update = number(row.get("update"))
            at = len(self.rows) if update is None else update
            name = row["run"] if isinstance(row.get("run"), str) else ""
            for column, value in scalars(row).items():
                curves = self.columns.get(column, {})
                if name not in curves:
                    if self._curves == _MOST_CURVES:
                        continue
                    self._curves += 1
                    curves = self.columns.setdefault(column, curves)
                curves.setdefault(name, {})[at] = value
            self.rows.append(row)


def _object(line: bytes) -> dict[str, Any] | None:
    try:
        row = load_json(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read(path: str | os.PathLike) -> list[dict[str, Any]]:
    """All objects of a record, the header first; an incomplete last line, as a killed run leaves it, is left out.

    Raises
    ------
    ValueError
        If the file does not begin with a header, or another line than the last is damaged.
    OSError
        If it cannot be read, or is no regular file.
    """
    return [row for _, row in _lines(Path(path))]


def _lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Complete lines, with their line ends, and what they say."""
    with open_regular(path) as stream:
        for number, (line, _) in enumerate(complete_lines(stream, _MOST_LINE), 1):
            row = _object(line)
            if row is None:
                raise ValueError(
                    f"record {path}: line {number} is no JSON object; remove the line, or give another file"
                )
            if number == 1 and row.get("kind") != "header":
                raise ValueError(
                    f"record {path}: the first line is no header; give a metrics.jsonl that a run has written"
                )
            yield line, row


def truncate_after(path: str | os.PathLike, update: int, run: str | None = None) -> int:
    """Drop the rows that a run resumed at `update` writes again, and an incomplete last line; the number of rows
    dropped.

    One rank calls this, before it appends. Rows whose "update" is this or more go, of `run` only if it is given; a
    missing record is left missing. The file is replaced at once, never left half written.

    Raises
    ------
    ValueError
        If the file is no record, or a line before the last is damaged.
    OSError
        If the file cannot be replaced.
    """
    path = Path(path)
    if not path.exists():
        return 0
    dropped = 0
    with replacing(path, durable=True) as temporary, temporary.open("wb") as kept:
        for line, row in _lines(path):
            if _is_repeated(row, update, run):
                dropped += 1
            else:
                kept.write(line)
    return dropped


def _is_repeated(row: Mapping[str, Any], update: int, run: str | None) -> bool:
    number = row.get("update")
    return isinstance(number, int | float) and number >= update and (run is None or row.get("run") == run)


# What says of a row which one it is, and so is no quantity of its own.
_PLACES = ("kind", "run", "update")


def number(value: Any) -> float | None:
    """`value` as a float, or None unless it is a finite number (and no truth value)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:  # an int of hundreds of digits
        return None
    return found if math.isfinite(found) else None


def scalars(row: Mapping[str, Any]) -> dict[str, float]:
    """The quantities of a row of a record that are finite numbers, but for "update", which says where the row belongs.

    Groups of quantities, and lists of groups, give longer names: `{"stacks": [{"residual": 0.1}]}` holds
    "stacks.0.residual".
    """
    return dict(_scalars(row, "", 0))


def _scalars(row: Mapping[str, Any], prefix: str, depth: int) -> Iterator[tuple[str, float]]:
    for name, value in row.items():
        groups = {f"{name}": value}
        if isinstance(value, list):
            groups = {f"{name}.{index}": item for index, item in enumerate(value) if isinstance(item, Mapping)}
        for key, item in groups.items():
            if isinstance(item, Mapping) and depth < 3:
                yield from _scalars(item, f"{prefix}{key}.", depth + 1)
            elif (prefix or name not in _PLACES) and (found := number(item)) is not None:
                yield f"{prefix}{key}", found


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete temporary file its final name in the same folder, durably.

    A crash at any moment leaves either the previous file or the new one, never a part of one. Raises `OSError` if the
    disk refuses; the previous file is then intact unless only the last sync of the folder failed.
    """
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


def open_own(path: str | os.PathLike, flags: int) -> int:
    """`os.open` of a file of a run to write to: in a folder that others can write to, it may be a link to elsewhere.

    Raises `OSError`, without waiting, if it is a link, a pipe or a device.
    """
    refused = OSError(errno.ELOOP, f"{path} is no regular file, but a link, a pipe or a device")
    try:
        handle = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENXIO):  # a link; a pipe that nobody reads
            raise refused from error
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise refused
    return handle


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file under, which takes the place of `path` at once when the block is left.

    If the block raises, `path` is as it was, and nothing is left. With `durable` it waits for the disk, see `publish`.
    What a killed process leaves is for `remove_left_over`.
    """
    # A name that nobody can have put a link under.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    os.close(open_own(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    try:
        yield temporary
        if durable:
            publish(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_left_over(path: Path) -> None:
    """Remove what killed processes have left where they were replacing a file."""
    for each in path.parent.glob(f".{glob.escape(path.name)}.{16 * '[0-9a-f]'}.tmp"):
        each.unlink(missing_ok=True)


def library_versions() -> dict[str, str | None]:
    """Versions of python and of the libraries a result depends on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("xbraid_py", "torch", "numpy", "h5py", "mpi4py"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
