"""An HDF5 file that all ranks write together, where h5py is built for parallel HDF5.

The file is the same as that of one writer: chunks with checksums, a temporary name until it is complete.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import h5py
import numpy as np

from xbraid_py.comm import Communicator
from xbraid_py.run.store.files import publish
from xbraid_py.run.store.hdf5_writer import checked, make_folder, write_head

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
        self._file: h5py.File | None = None

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
        handle = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        try:
            os.posix_fallocate(handle, 0, num_bytes)
        finally:
            os.close(handle)

    def _open(self, text: str) -> None:
        self._file = h5py.File(self._temporary, "w", libver=("v110", "v110"), driver="mpio", comm=self.comm.mpi)
        head, content = write_head(self._file, text)
        _write_together(head, 0, content if self.comm.rank == 0 else content[:0])

    def _put(self, name: str, total: int, first: int, rows: np.ndarray) -> None:
        shape = (total, *rows.shape[1:])
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
