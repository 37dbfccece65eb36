"""`status.json`: what a run is doing, for whoever looks at it from outside; replaced at once, never half written."""

from __future__ import annotations

import contextlib
import datetime
import json
import logging
import math
import os
import platform
import time
from collections import deque
from pathlib import Path
from typing import Any

from xbraid_py.run.store.files import replacing

log = logging.getLogger(__name__)

STATUS = "status.json"
STATES = ("starting", "running", "stopped", "finished", "failed")
OVER = STATES[2:]
_SECONDS = 1.0  # between two writings while nothing but numbers changes
_WINDOW = 50  # updates over which the time left is estimated


class RunStatus:
    """Writes `status.json`: at most once a second, and at every change of the state.

    The object has the keys "state" ("starting", "running", "stopped", "finished" or "failed"), "update" (int),
    "total" (int or null), "objective", "accuracy" (a fraction), "seconds_left" (float or null), "started", "updated"
    (ISO time, UTC), "ranks" (int), "host_kind" (str), "pid" (int, of rank 0) and "message" (str).

    A status that cannot be written is a warning, once: the run goes on.

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
        """An update is done; the state is running. What is None stays as it was.

        Parameters
        ----------
        number : int
            Updates so far, those before a resumption included.
        objective, accuracy : float, optional
            Infinity and NaN are written as null.
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
    path = Path(folder) / STATUS
    with contextlib.suppress(OSError, ValueError, RecursionError):
        fields = json.loads(path.read_bytes())
        if isinstance(fields, dict) and (even_if_over or fields.get("state") not in OVER):
            fields |= {"state": state, "message": message, "updated": _now(), "seconds_left": None}
            _replace(path, fields)


def _replace(path: Path, fields: dict[str, Any]) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="ascii")


def host_kind() -> str:
    """What machine this is, without its name, such as `x86_64 Linux, 2 cpus`."""
    return f"{platform.machine()} {platform.system()}, {os.cpu_count()} cpus"


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
