"""A run and who looks at it from outside: signals ask it to stop, and `status.json` says what it is doing.

SIGTERM, SIGUSR1 and SIGHUP (a closed terminal), sent to any rank or to all of them, are noted here by the handlers that
`xbraid_py.run.launch` installs. A run asks `stop_agreed` once after every update, and never in the middle of one.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import platform
import signal
import stat
import time
from collections import deque
from pathlib import Path
from typing import Any

from xbraid_py.comm import Communicator
from xbraid_py.run.documents import load_json, read_regular
from xbraid_py.run.record import replacing

# Exit statuses: EX_TEMPFAIL, "come back later", and that of a process ended by SIGTERM.
STOPPED, TERMINATED = 75, 128 + signal.SIGTERM
ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

_noted = 0


class Stopped(Exception):
    """A run ends in order before its end, because it was asked to; all ranks raise it together.

    `xbraid_py.run.launch` prints its message on rank 0 and ends all ranks with status 75.
    """


def note(number: int, frame: object = None) -> None:
    """Note a signal, 1 to 64; a signal handler. A later signal replaces an earlier one."""
    global _noted
    _noted = int(number)
    if number == signal.SIGHUP:
        _leave_terminal()


def _leave_terminal() -> None:
    """What is printed from now on to a terminal that is closed goes nowhere, instead of raising an error."""
    for stream in (1, 2):
        with contextlib.suppress(OSError):
            if stat.S_ISCHR(os.fstat(stream).st_mode) and not os.isatty(stream):
                nothing = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nothing, stream)
                os.close(nothing)


def forget() -> None:
    """Forget what was noted: a new run begins in this process."""
    note(0)


def noted() -> int:
    """Number of the signal that this process was sent; 0 if there is none. No message."""
    return _noted


def install() -> None:
    """Note the signals that ask from now on; only from the main thread of a program.

    What is ignored already, as SIGHUP is under `nohup`, stays so. To be called before MPI is loaded.
    """
    forget()
    # UCX, by which MPICH may send its messages, otherwise takes SIGHUP for itself, to print all it does.
    os.environ.setdefault("UCX_DEBUG_SIGNO", "0")
    for number in ASKING:
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, note)


def stop_agreed(comm: Communicator, own: int | None = None) -> int:
    """The largest number that any rank has to say, on all of them, 0 if there is none; collective, one byte from each
    rank.

    A rank says `own`, from 0 to 255; by default the signal that it was sent.
    """
    import torch

    said = torch.tensor([noted() if own is None else own], dtype=torch.uint8)
    return int(comm.allgather(said, [1] * comm.size).max())


log = logging.getLogger(__name__)

STATUS = "status.json"
STATES = ("starting", "running", "stopped", "finished", "failed")
OVER = STATES[2:]
_SECONDS = 1.0  # between two writings while nothing but numbers changes
_WINDOW = 50  # updates over which the time left is estimated


class RunStatus:
    """Writes `status.json`: at most once a second, and at every change of the state.

    The object has the keys "state" ("starting", "running", "stopped", "finished" or "failed"), "update" (int), "total"
    (int or null), "objective", "accuracy" (a fraction), "seconds_left" (float or null), "started", "updated" (ISO time,
    UTC), "ranks" (int), "host_kind" (str), "pid" (int, of rank 0) and "message" (str). It is replaced at once, never
    half written; one that cannot be written is a warning, once: the run goes on.

    Parameters
    ----------
    folder : Path
    ranks : int
    total : int or None
        Updates in all, if that is known.
    done : int
        Updates before this start.
    """

    def __init__(self, folder: Path, ranks: int, total: int | None, done: int = 0):
        self.path = Path(folder) / STATUS
        now = _now()
        self._fields: dict[str, Any] = {
            "state": "starting",
            "update": done,
            "total": total,
            "objective": None,
            "accuracy": None,
            "started": now,
            "updated": now,
            "seconds_left": None,
            "ranks": ranks,
            "host_kind": host_kind(),
            "pid": os.getpid(),
            "message": "",
        }
        self._written_at = -math.inf
        self._times: deque[tuple[float, int]] = deque(maxlen=_WINDOW)
        self._has_warned = False

    def change(self, state: str, message: str = "") -> None:
        """Another state, written now."""
        if state not in STATES:
            raise ValueError(f"state={state!r} must be one of {', '.join(STATES)}; use running")
        self._fields |= {"state": state, "message": message}
        if state in OVER:
            self._fields["seconds_left"] = 0.0 if state == "finished" else None
        self._write()

    def update(self, number: int, objective: float | None = None, accuracy: float | None = None) -> None:
        """An update is done, of so many so far, those before a resumption included; the state is running.

        What is None stays as it was; infinity and NaN are written as null.
        """
        self._times.append((time.monotonic(), number))
        for name, value in (("objective", objective), ("accuracy", accuracy)):
            if value is not None:
                self._fields[name] = float(value) if math.isfinite(value) else None
        self._fields |= {"update": int(number), "seconds_left": self._seconds_left(number)}
        if self._fields["state"] != "running":
            self.change("running")
        elif time.monotonic() - self._written_at >= _SECONDS:
            self._write()

    def _seconds_left(self, number: int) -> float | None:
        (first_time, first), (last_time, last) = self._times[0], self._times[-1]
        if self._fields["total"] is None or last <= first:
            return None
        return max(0, self._fields["total"] - number) * (last_time - first_time) / (last - first)

    def _write(self) -> None:
        self._fields["updated"] = _now()
        self._written_at = time.monotonic()
        try:
            _replace(self.path, self._fields)
        except OSError as error:
            if not self._has_warned:
                log.warning("%s not written: %s; the run goes on", self.path, error)
            self._has_warned = True


def mark_ended(folder: Path, state: str, message: str, even_if_over: bool = False) -> None:
    """Set state and message in the status of a run that is under way, from whichever process ends it.

    As far as possible: what cannot be read or written is left alone.
    """
    fields = _said(folder)
    if fields and (even_if_over or fields.get("state") not in OVER):
        fields |= {"state": state, "message": message, "updated": _now(), "seconds_left": None}
        with contextlib.suppress(OSError, ValueError):
            _replace(Path(folder) / STATUS, fields)


def state_said(folder: Path) -> str | None:
    """The state that the status of a run names; None if there is none."""
    return _said(folder).get("state")


def _said(folder: Path) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        fields = load_json(read_regular(Path(folder) / STATUS))
        return fields if isinstance(fields, dict) else {}
    return {}


def _replace(path: Path, fields: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="ascii")


def host_kind() -> str:
    """What machine this is, without its name, such as `x86_64 Linux, 2 cpus`."""
    return f"{platform.machine()} {platform.system()}, {os.cpu_count()} cpus"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
