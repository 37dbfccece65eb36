"""Programs of one's own on several ranks: what ends the job when a rank fails, leaves, or makes another call."""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
import traceback
from types import TracebackType
from typing import NoReturn

from xbraid_py.comm import watchdog
from xbraid_py.comm.agreement import END, CallError, agree, met
from xbraid_py.comm.base import Communicator
from xbraid_py.comm.ending import end_job, wait_for_rank_0

PATIENCE = "XBRAID_PATIENCE"  # a variable of the environment: seconds that a rank waits for another

_is_led = False
_guarded: list[_Guard] = []


def leave_to_driver() -> None:
    """This process is guarded by `xbraid_py.run.launch`, which knows more of it."""
    global _is_led
    _is_led = True


def guarded(comm: Communicator) -> Communicator:
    """The same communicator, whose ranks are looked after from now on, if nobody does it yet; collective.

    * An exception that ends one rank ends the job, with its traceback. (Other ranks would wait for it for ever.)
    * A rank that comes to the end of the program while others go on, with calls for all ranks, ends it too.
    * A rank that waits for another for longer than the environment variable XBRAID_PATIENCE says, in seconds (300
      without), says where all are.
    """
    if _is_led or _guarded or comm.size == 1 or threading.current_thread() is not threading.main_thread():
        return comm
    line = comm.line()
    if line is not None:
        _guarded.append(_Guard(comm, line))
    return comm


def patience() -> float:
    """Seconds that a rank waits for another.

    Raises
    ------
    ValueError
        If the environment says something else than a number above 0.
    """
    text = os.environ.get(PATIENCE, "")
    try:
        found = float(text) if text else watchdog.PATIENCE
    except ValueError:
        found = 0.0
    if not found > 0.0:
        raise ValueError(f"{PATIENCE}={text} must be seconds above 0, or inf; use 300")
    return found


class _Guard:
    """What looks after the ranks of one communicator."""

    def __init__(self, comm: Communicator, line: watchdog.Line):
        self.comm = comm
        self._before = sys.excepthook
        sys.excepthook = self._uncaught
        self._watchdog = watchdog.Watchdog(line, patience(), self._give_up, PATIENCE)
        atexit.register(self._leave)

    def _uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        wait_for_rank_0(self.comm.rank)
        if self.comm.misses_a_rank(error):
            self._end(f"rank {self.comm.rank} of {self.comm.size}: another rank is gone ({error})")
        if self._before is not sys.__excepthook__:
            self._before(kind, error, trace)
            self._end("")
        text = "".join(traceback.format_exception(kind, error, trace))
        self._end(f"rank {self.comm.rank} of {self.comm.size}:\n{text}", 130 if kind is KeyboardInterrupt else 1)

    def _give_up(self, text: str) -> None:
        self._end(f"error: {text}")

    def _leave(self) -> None:
        # Others may work on for as long as they like, while this rank waits here.
        self._watchdog.stop()
        try:
            for comm in met():
                agree(comm, None, "", call=END)
        except CallError as error:
            # Those in other calls say so by a traceback, which tells where.
            time.sleep(3.0)
            self._end(f"error: {error}")

    def _end(self, text: str, status: int = 1) -> NoReturn:
        end_job(self.comm, status, text)
