"""Replacing a file so that whoever looks at it, and a crash, find the old one or the new one; versions of libraries."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(temporary: Path, path: Path) -> None:
    """Give a complete temporary file its final name in the same folder, durably.

    A crash at any moment leaves either the previous file or the new one, never a part of one.

    Raises
    ------
    OSError
        If the disk refuses; the previous file is then intact unless only the last sync of the folder failed.
    """
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def replacing(path: Path, durable: bool = False) -> Iterator[Path]:
    """A name beside `path` to write a file under, which takes the place of `path` at once when the block is left.

    If the block raises, `path` is as it was, and nothing is left.

    Parameters
    ----------
    path : Path
    durable : bool
        Wait for the disk, see `publish`.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        if durable:
            publish(temporary, path)
        else:
            os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def library_versions() -> dict[str, str | None]:
    """Versions of python and of the libraries a result depends on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("xbraid_py", "torch", "numpy", "h5py", "mpi4py"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
