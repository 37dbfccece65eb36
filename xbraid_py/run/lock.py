"""The lock of a run's folder: an advisory lock on the file `lock` in it, which ends with its process."""

from __future__ import annotations

import datetime
import errno
import fcntl
import json
import logging
import os
import weakref
from pathlib import Path

log = logging.getLogger(__name__)

LOCK = "lock"
# A file system without locks says one of these.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


class RunLock:
    """The lock of a folder, held until `release`, or until nothing refers to this any more, or the process ends.

    Made by `take`. The file stays where it is, and refuses nobody: it is the lock on it that counts, and that is
    gone with the process, however it ends.
    """

    def __init__(self, handle: int):
        self._close = weakref.finalize(self, os.close, handle)

    def release(self) -> None:
        """Give the folder free; a second call does nothing."""
        self._close()


def take(folder: str | os.PathLike) -> RunLock:
    """Lock a folder, which is made if there is none; one rank of a job calls this.

    On a file system without locks a warning says so, and nothing is locked.

    Raises
    ------
    ValueError
        If another job has it.
    OSError
        If the folder cannot be made, or nothing can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        reason = os.strerror(error.errno)
        raise type(error)(error.errno, f"out={folder} cannot be written: {reason}; give another --out") from error
    lock = RunLock(handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ValueError(
            f"out={folder} is in use by another job{_holder(handle)}; wait for its end, stop it, or give another --out"
        ) from error
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("the file system of %s has no locks: see to it yourself that no two jobs use this folder", folder)
        return lock
    text = json.dumps({"pid": os.getpid(), "since": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")})
    # What it says is only for the message above, so a full disk does no harm here.
    try:
        os.ftruncate(handle, 0)
        os.pwrite(handle, text.encode("ascii"), 0)
    except OSError as error:
        log.debug("%s not filled: %s", LOCK, error)
    return lock


def _holder(handle: int) -> str:
    """Who has the lock, as far as the file says."""
    try:
        said = json.loads(os.pread(handle, 1000, 0))
        return f" (process {int(said['pid'])}, since {said['since']})"
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return ""
