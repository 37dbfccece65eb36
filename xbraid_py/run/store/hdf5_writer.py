"""An HDF5 file that appears under its name complete or not at all, whatever the disk does."""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from xbraid_py.comm import Communicator
from xbraid_py.run.record import publish
from xbraid_py.run.store.read import CHUNK_BYTES, FORMAT, FORMAT_NUMBER, META

_AHEAD_BYTES = 2**23  # after which the disk is told to begin


def new_file(path: Path) -> io.FileIO:
    """A new file to write and read, in place of one or of a link that is there: what a link leads to stays as it is."""
    path.unlink(missing_ok=True)
    return open(path, "x+b", buffering=0)


class _Disk:
    """A file that keeps its first error to itself and from then on only pretends to write.

    HDF5 does not survive a write that fails: it cannot close its file any more, and crashes the process when
    that ends. So it is never told; whoever uses this asks `failure`.
    """

    def __init__(self, path: Path):
        self.failure: OSError | None = None
        self._raw = new_file(path)
        self._waiting = 0

    def _attempt(self, action, *args):
        if self.failure is None:
            try:
                return action(*args)
            except OSError as error:
                self.failure = error
        return 0

    def _write_all(self, view: memoryview) -> None:
        self._waiting += len(view)
        while view:
            view = view[self._raw.write(view) :]
        if self._waiting >= _AHEAD_BYTES and hasattr(os, "posix_fadvise"):
            # Linux then begins to write without waiting for it, so that less is left for the sync at the end.
            end = self._raw.tell()
            os.posix_fadvise(self._raw.fileno(), max(0, end - self._waiting), self._waiting, os.POSIX_FADV_DONTNEED)
            self._waiting = 0

    # What HDF5 calls; it wants `read` or `readinto`, and h5py knows a file by its `read`.
    def read(self, size: int = -1) -> bytes:
        return self._attempt(self._raw.read, size) or b""

    def write(self, data) -> int:
        self._attempt(self._write_all, memoryview(data))
        return len(data)

    def readinto(self, buffer) -> int:
        return self._attempt(self._raw.readinto, buffer)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._attempt(self._raw.seek, offset, whence)

    def truncate(self, size: int) -> int:
        return self._attempt(self._raw.truncate, size)

    def flush(self) -> None:
        pass  # nothing is buffered here, and the sync comes at the end

    def tell(self) -> int:
        return self._attempt(self._raw.tell)

    def close(self) -> None:
        try:
            self._raw.close()
        except OSError as error:
            self.failure = self.failure or error


def checked(shape: tuple[int, ...], dtype: np.dtype) -> dict:
    """Chunks and checksums of an array, as `create_dataset` wants them; none for an array without elements."""
    if not math.prod(shape):
        return {}
    rows = max(1, min(shape[0], CHUNK_BYTES // (math.prod(shape[1:]) * dtype.itemsize)))
    return {"chunks": (rows, *shape[1:]), "fletcher32": True}


def write_head(file: h5py.File, text: str) -> tuple[h5py.Dataset, np.ndarray]:
    """Write the format into a new file, and add the array for the JSON text `text` (ASCII); the array, and its content.

    Fixed-length strings: others lie in a heap without checksums, where one wrong bit makes HDF5 loop for ever.
    """
    file.attrs["format"] = np.bytes_(FORMAT)
    file.attrs["format_number"] = FORMAT_NUMBER
    content = np.array([text.encode("ascii")])
    return file.create_dataset(META, content.shape, content.dtype, chunks=(1,), fletcher32=True), content


def make_folder(folder: Path) -> None:
    """Make a folder and those above it; `OSError` if something of that name is no folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from error


class HDF5Writer:
    """Writes `path` through a temporary file beside it; used by one rank.

    After a first `OSError` every further call does nothing, and `failure` holds it.

    Attributes
    ----------
    failure : OSError or None
    """

    def __init__(self, path: Path):
        self.path = path
        self.failure: OSError | None = None
        self._temporary = path.with_name(path.name + ".tmp")
        self._disk: _Disk | None = None
        self._file: Any = None  # an h5py.File once it is open

    def open(self, text: str) -> None:
        """Make the folder and the temporary file, and store the JSON text `text` (ASCII) in it."""
        self._attempt(self._open, text)

    def add(self, name: str, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Add an array, to be filled by `put`."""
        self._attempt(lambda: self._file.create_dataset(name, shape, dtype, **checked(shape, dtype)))

    def put(self, name: str, first: int, block: np.ndarray) -> None:
        """Write rows `first` and following of an array."""
        self._attempt(lambda: self._file[name].__setitem__(slice(first, first + len(block)), block))

    def finish(self) -> None:
        """Close the file and give it its name, durably."""
        self._attempt(self._close)
        self._attempt(lambda: publish(self._temporary, self.path))

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        with contextlib.suppress(OSError):
            self._close()
        with contextlib.suppress(OSError):
            self._temporary.unlink(missing_ok=True)

    def _attempt(self, action, *args) -> None:
        if self.failure is None:
            try:
                action(*args)
                if self._disk is not None and self._disk.failure is not None:
                    raise self._disk.failure
            except OSError as error:
                self.failure = error

    def _open(self, text: str) -> None:
        make_folder(self.path.parent)
        self._disk = _Disk(self._temporary)
        # The newer file layout has checksums in its own tables too.
        self._file = h5py.File(self._disk, "w", libver=("v110", "v110"))
        head, content = write_head(self._file, text)
        head[...] = content

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            assert self._disk is not None
            self._disk.close()
            self._file = None


SPARE_BYTES = 2**20  # for the file's own tables


def writes_together(comm: Communicator) -> bool:
    """Whether checkpoints are written by all ranks of `comm` together; the same on all of them.

    So it is where h5py knows MPI and the ranks are MPI's, unless the environment says `XBRAID_PARALLEL_HDF5=0`.
    """
    return (
        comm.size > 1
        and hasattr(comm, "mpi")
        and h5py.get_config().mpi
        and os.environ.get("XBRAID_PARALLEL_HDF5", "1") != "0"
    )


class ParallelWriter:
    """Writes `path` through a temporary file beside it; all ranks make the same calls.

    After every call the ranks agree whether it has failed on any of them. If so, every further call does nothing, and
    `failure` holds the error of the lowest such rank.

    Attributes
    ----------
    failure : OSError or None
        The same on all ranks.
    """

    def __init__(self, path: Path, comm: Communicator):
        self.path, self.comm = path, comm
        self.failure: OSError | None = None
        self._temporary = path.with_name(path.name + ".tmp")
        self._file: Any = None  # an h5py.File once it is open

    def open(self, text: str, num_bytes: int) -> None:
        """Make the folder and the file with the JSON text `text` (ASCII), if there is room for so many bytes."""
        if self.comm.rank == 0:
            self._together(self._make_room, num_bytes + SPARE_BYTES)
        else:
            self._together(lambda: None)
        self._together(self._open, text)

    def put(self, name: str, total: int, first: int, rows: np.ndarray) -> None:
        """Add an array of `total` rows, of which this rank writes `rows` from row `first` on (perhaps none)."""
        self._together(self._put, name, total, first, rows)

    def finish(self) -> None:
        """Close the file and give it its name, durably."""
        self._together(self._close)
        if self.comm.rank == 0:
            self._together(publish, self._temporary, self.path)
        else:
            self._together(lambda: None)

    def discard(self) -> None:
        """Remove the temporary file, if it is still there."""
        with contextlib.suppress(OSError):
            self._close()
        if self.comm.rank == 0:
            with contextlib.suppress(OSError):
                self._temporary.unlink(missing_ok=True)

    def _together(self, action, *args) -> None:
        if self.failure is not None:
            return
        own = None
        try:
            action(*args)
        except OSError as error:
            own = error
        except (RuntimeError, ValueError) as error:
            # What h5py makes of some errors of MPI-IO.
            own = OSError(str(error))
        said = self.comm.bcast(self.comm.gather(None if own is None else own.args))
        self.failure = next((OSError(*args) for args in said if args is not None), None)

    def _make_room(self, num_bytes: int) -> None:
        # A rank that fails inside a collective write leaves the others waiting, so a full disk is found out before.
        make_folder(self.path.parent)
        with new_file(self._temporary) as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)

    def _open(self, text: str) -> None:
        self._file = h5py.File(self._temporary, "w", libver=("v110", "v110"), driver="mpio", comm=self.comm.mpi)  # pyright: ignore[reportAttributeAccessIssue]
        head, content = write_head(self._file, text)
        _write_together(head, 0, content if self.comm.rank == 0 else content[:0])

    def _put(self, name: str, total: int, first: int, rows: np.ndarray) -> None:
        shape = (total, *rows.shape[1:])
        assert self._file is not None
        data = self._file.create_dataset(name, shape, rows.dtype, **checked(shape, rows.dtype))
        if data.size:
            _write_together(data, first, rows)

    def _close(self) -> None:
        if self._file is not None:
            self._file.flush()  # with MPI-IO this waits for the disk on every node
            self._file.close()
            self._file = None


def _write_together(data: h5py.Dataset, first: int, rows: np.ndarray) -> None:
    """Write rows from row `first` on, every rank its own; ranks without rows take part, which h5py would not let them.

    Chunks with checksums can only be written so: a chunk may hold rows of several ranks.
    """
    target = data.id.get_space()
    # An empty selection needs a space and a buffer with elements all the same.
    held = rows if rows.size else np.empty((1, *rows.shape[1:]), rows.dtype)
    source = h5py.h5s.create_simple(held.shape)
    if rows.size:
        target.select_hyperslab((first, *(0 for _ in rows.shape[1:])), rows.shape)
    else:
        target.select_none()
        source.select_none()
    collective = h5py.h5p.create(h5py.h5p.DATASET_XFER)
    collective.set_dxpl_mpio(h5py.h5fd.MPIO_COLLECTIVE)
    data.id.write(source, target, held, dxpl=collective)
