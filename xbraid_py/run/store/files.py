"""What checkpoints and the record share: replacing a file so that a crash leaves the old or the new, and versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
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


def library_versions() -> dict[str, str | None]:
    """Versions of python and of the libraries a result depends on; None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("xbraid_py", "torch", "numpy", "h5py", "mpi4py"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
