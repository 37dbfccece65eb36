"""Signals that ask a run to stop: noted by each process, and agreed upon by all ranks between two updates.

SIGTERM and SIGUSR1, sent to any rank or to all of them, are noted here by the handlers that `xbraid_py.run.launch`
installs. A run asks `stop_agreed` once after every update, and never in the middle of one.
"""

from __future__ import annotations

import signal

import torch

from xbraid_py.comm import Communicator

# Exit statuses: EX_TEMPFAIL, "come back later", and that of a process ended by SIGTERM.
STOPPED, TERMINATED = 75, 128 + signal.SIGTERM
ASKING = (signal.SIGTERM, signal.SIGUSR1)

_noted = 0


class Stopped(Exception):
    """A run ends in order before its end, because it was asked to; all ranks raise it together.

    `xbraid_py.run.launch` prints its message on rank 0 and ends all ranks with status 75.
    """


def note(number: int, frame: object = None) -> None:
    """Note a signal; a signal handler. A later signal replaces an earlier one.

    Parameters
    ----------
    number : int
        Of the signal, from 1 to 64.
    frame : object, optional
        Ignored.
    """
    global _noted
    _noted = int(number)


def forget() -> None:
    """Forget what was noted: a new run begins in this process."""
    note(0)


def noted() -> int:
    """Number of the signal that this process was sent; 0 if there is none. No message."""
    return _noted


def install() -> None:
    """Note SIGTERM and SIGUSR1 from now on; only from the main thread of a program."""
    forget()
    for number in ASKING:
        signal.signal(number, note)


def stop_agreed(comm: Communicator, own: int | None = None) -> int:
    """The largest number that any rank has noted, on all of them; collective, one byte from each rank.

    Parameters
    ----------
    comm : Communicator
    own : int, optional
        What this rank says, from 0 to 255; by default the signal that it was sent.

    Returns
    -------
    int
        0 if no rank has anything to say.
    """
    said = torch.tensor([noted() if own is None else own], dtype=torch.uint8)
    return int(comm.allgather(said, [1] * comm.size).max())
