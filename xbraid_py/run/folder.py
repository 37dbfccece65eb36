"""The folder of a run: its lock, configuration, record, log and status, and what is done after every update."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import signal
import sys
import weakref
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.run.record import MetricsWriter, open_own, remove_left_over, replacing
from xbraid_py.run.signals import STATUS, RunStatus, Stopped, mark_ended, stop_agreed

# What a run leaves in its folder, and what makes room for the next one.
CONFIG, METRICS, LOG, CHECKPOINTS = "config.yaml", "metrics.jsonl", "log.txt", "checkpoints"
LEFT = (CONFIG, METRICS, LOG, STATUS, CHECKPOINTS, "figures", "tensorboard")
_FAILED = 255  # beyond the numbers of signals

_log = logging.getLogger(__name__)
_under_way: weakref.WeakSet[RunFolder] = weakref.WeakSet()


class RunFolder:
    """The folder of a run, for all ranks of it; made by `claim`. Only rank 0 writes.

    The engine claims it in the set-up of a job, keeps it open while it runs, and calls `update` after every update.

    Attributes
    ----------
    path : Path
    comm : Communicator
    checkpoints, figures, metrics : Path
        Two folders and the record in it.
    """

    def __init__(self, path: Path, comm: Communicator, lock: RunLock | None):
        self.path, self.comm = path, comm
        self.checkpoints, self.figures, self.metrics = path / CHECKPOINTS, path / "figures", path / METRICS
        self._lock = lock
        self._status: RunStatus | None = None
        self._record: MetricsWriter | None = None
        self._handler: _LogFile | None = None
        self._failure: OSError | None = None
        self._update, self._signal = 0, 0

    @contextlib.contextmanager
    def open(
        self,
        configuration: Mapping[str, Any],
        total: int | None = None,
        done: int = 0,
        append: bool = False,
        driver: str | os.PathLike | None = None,
    ) -> Iterator[None]:
        """A run in this folder from its start to its end; collective at the start. Releases the folder at the end.

        Writes `config.yaml`, opens the record and the log, and keeps `status.json` up to date: "finished" after the
        block, "stopped" if it is left by `Stopped` or by Ctrl-C, "failed" if by anything else.

        Parameters
        ----------
        configuration : mapping
            The options, JSON-able (`xbraid_py.run.options.to_dict`).
        total, done : int, optional
            Updates in all, if that is known, and before this start.
        append : bool
            Go on with the record that is there.
        driver : path-like, optional
            The program that takes this configuration; this one by default.

        Raises
        ------
        RunError
            On all ranks, if the folder cannot be written.
        """
        with contextlib.ExitStack() as stack:
            stack.callback(self.release)
            if self.comm.rank == 0:
                with self.guarded():
                    self._start(stack, configuration, total, done, append, driver or sys.argv[0])
            _under_way.add(self)
            stack.callback(_under_way.discard, self)
            self._agree()
            try:
                yield
                # The last rows may have failed: everyone is told before the run is called finished.
                self._agree()
            except Stopped as stop:
                self._end("stopped", str(stop))
                raise
            except KeyboardInterrupt:
                self._end("stopped", "interrupted")
                raise
            except RunError as error:
                self._end("failed", str(error))
                raise
            except BaseException as error:
                # Whatever it is, it goes on its way. It may have met this rank alone.
                text = f"rank {self.comm.rank}: {type(error).__name__}: {error}"
                self._end("failed", text)
                mark_ended(self.path, "failed", text)
                raise
            self._end("finished", "")

    def _start(self, stack, configuration, total, done, append, driver) -> None:
        self.path.mkdir(parents=True, exist_ok=True)
        for name in (CONFIG, METRICS, STATUS):
            remove_left_over(self.path / name)
        text = yaml.safe_dump(dict(configuration), sort_keys=False)
        with replacing(self.path / CONFIG) as temporary:
            words = f"# python {driver} --config {self.path / CONFIG}"
            # Behind a line break in a name there would be an option.
            words = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in words)
            temporary.write_text(f"{words}\n{text}", encoding="utf-8")
        self._handler = _LogFile(self.path / LOG)
        stack.callback(self._close_log)
        logging.getLogger("xbraid_py").addHandler(self._handler)
        record = MetricsWriter(self.metrics, self.comm, configuration, append=append, driver=driver)
        self._record = stack.enter_context(record)
        stack.callback(setattr, self, "_record", None)
        self._status = RunStatus(self.path, self.comm.size, total, done)
        self._status.change("starting")
        self.log(f"{'goes on' if append else 'starts'} on {self.comm.size} rank(s): {' '.join(sys.argv)}")

    def write(self, row: Mapping[str, Any]) -> None:
        """Append an object to the record; if that fails, the next `update` says so on all ranks. No message."""
        if self._record is not None and self._failure is None:
            with self.guarded():
                self._record.write(row)

    def log(self, text: str) -> None:
        """Append text to `log.txt`, and not to the screen. No message."""
        if self._handler is not None:
            self._handler.emit(_log.makeRecord(_log.name, logging.INFO, "", 0, text, (), None))

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """What one rank alone does: an `OSError` of it becomes a `RunError` of all ranks at the next `update`."""
        try:
            yield
        except OSError as error:
            self._failure = self._failure or error

    def update(self, number: int, objective: float | None = None, accuracy: float | None = None) -> bool:
        """The end of update `number`; whether a signal has asked the run to stop. Collective: one byte from each rank.

        Objective and accuracy are for the status; what is None stays as it was. If the run is to stop, which all ranks
        are told alike, write a checkpoint, and `raise folder.stopped(path)`.

        Raises
        ------
        RunError
            On all ranks, if something that rank 0 had to write could not be written.
        """
        if self._status is not None:
            self._status.update(number, objective, accuracy)
        self._update = number
        self._signal = self._agree()
        return bool(self._signal)

    def stopped(self, path: Path) -> Stopped:
        """What to raise on all ranks, once the checkpoint `path` of the last `update` is there."""
        why = f" by {signal.Signals(self._signal).name}" if self._signal else ""
        return Stopped(f"stopped{why} after update {self._update}; --resume auto goes on from {path}")

    def release(self) -> None:
        """Let other jobs use the folder."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def _agree(self) -> int:
        """The signal that a rank was sent, if any; raises on all ranks if one has failed."""
        found = stop_agreed(self.comm, _FAILED if self._failure else None)
        if found == _FAILED:
            failure, self._failure = self._failure, None
            said = self.comm.first_error(str(failure) if failure else None)
            assert said is not None
            rank, text = said
            raise RunError(f"rank {rank} cannot write to {self.path}: {text}; make room, or give another --out")
        return found

    def _end(self, state: str, message: str) -> None:
        self.log(message if state == "stopped" else f"{state}{message and ': '}{message}")
        if self._status is not None:
            self._status.change(state, message)

    def _close_log(self) -> None:
        assert self._handler is not None
        logging.getLogger("xbraid_py").removeHandler(self._handler)
        self._handler.close()
        self._handler = None


class _LogFile(logging.FileHandler):
    """Appends to a file; a disk that refuses is no reason to end a run, and shows up elsewhere."""

    def __init__(self, path: Path):
        super().__init__(path, mode="a", encoding="utf-8")
        self.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))

    def _open(self):
        return open(open_own(self.baseFilename, os.O_WRONLY | os.O_CREAT | os.O_APPEND), "a", encoding="utf-8")

    def handleError(self, record):
        pass

    def close(self):
        with contextlib.suppress(OSError):
            super().close()


def claim(out: str | os.PathLike, comm: Communicator) -> RunFolder:
    """Lock a folder for a run; for the set-up of a driver, on all ranks, without a message.

    Raises `ValueError` on rank 0 if another job has the folder, `OSError` if it cannot be written.
    """
    return RunFolder(Path(out), comm, take(out) if comm.rank == 0 else None)


def set_aside(out: Path, names: tuple[str, ...] = LEFT) -> Path | None:
    """Move files and folders of `out` into a new folder `earlier-N` of it; its path, None if there was nothing."""
    found = [name for name in names if os.path.lexists(out / name)]  # links that lead nowhere too
    if not found:
        return None
    aside = next(path for n in count(1) if not (path := out / f"earlier-{n}").exists())
    for name in found:
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).rename(aside / name)
    return aside


def last_words(message: str, state: str = "failed") -> None:
    """Leave in the status of runs under way that this process, one of their ranks, ends the job at once."""
    for folder in list(_under_way):
        mark_ended(folder.path, state, message)


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

    On a file system without locks a warning says so, and nothing is locked. Raises `ValueError` if another job has it,
    `OSError` if the folder cannot be made, or nothing can be written there.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = open_own(folder / LOCK, os.O_RDWR | os.O_CREAT)
    except OSError as error:
        reason = error.strerror
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
        if os.fstat(handle).st_nlink == 1:  # otherwise it is some other file as well
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
