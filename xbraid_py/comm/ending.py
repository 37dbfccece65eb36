"""How one process ends the whole job at once, with its last words."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from typing import NoReturn

from xbraid_py.comm.base import Communicator


def say(text: str) -> None:
    """Print to stderr, in one piece so that ranks do not mix; a reader that has gone is no error."""
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    with contextlib.suppress(OSError):
        # What was given, or read, may hold letters that a terminal would obey.
        shown = (
            letter if letter.isprintable() or letter in "\n\t" else ascii(letter)[1:-1] for letter in text.rstrip()
        )
        sys.stderr.write("".join(shown) + "\n")
        sys.stderr.flush()


def end_job(comm: Communicator | None, status: int, text: str) -> NoReturn:
    """End all ranks with an exit status, after a text if there is any; without a communicator this process alone."""
    if text:
        say(text)
        # A launcher may drop what it has not yet read from a rank when the abort reaches it.
        time.sleep(0.4)
    # A last resort, should the messages be stuck themselves: the launcher notices the death of a rank.
    signal.alarm(5)
    if comm:
        comm.abort(status)
    os._exit(status)


def wait_for_rank_0(rank: int) -> None:
    """Where all ranks fail alike, rank 0 ends the others before they repeat the same traceback."""
    time.sleep(min(1.0 + 0.2 * rank, 3.0) if rank else 0.0)
