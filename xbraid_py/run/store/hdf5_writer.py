"""An HDF5 file that appears under its name complete or not at all, whatever the disk does."""

from __future__ import annotations

import contextlib
import errno
import math
import os
from pathlib import Path

import h5py
import numpy as np

from xbraid_py.run.store.files import publish
from xbraid_py.run.store.read import FORMAT, FORMAT_NUMBER, META

CHUNK_BYTES = 2**18  # the unit of a checksum, and of reading
_AHEAD_BYTES = 2**23  # after which the disk is told to begin


class _Disk:
    """A file that keeps its first error to itself and from then on only pretends to write.

    HDF5 does not survive a write that fails: it cannot close its file any more, and crashes the process when
    that ends. So it is never told; whoever uses this asks `failure`.
    """

    def __init__(self, path: Path):
        self.failure: OSError | None = None
        self._raw = open(path, "w+b", buffering=0)
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
        self._file: h5py.File | None = None

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
            self._disk.close()
            self._file = None
