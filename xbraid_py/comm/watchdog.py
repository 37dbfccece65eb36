"""Who waits for whom: a rank that waits too long for others says where all of them are, and ends the job."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

PATIENCE = 300.0  # seconds
_TICK = 1.0  # seconds between two looks; a rank hears of a question after as many
_PACKAGE = Path(__file__).resolve().parents[1]

# The ranks that this process waits for at present, in a tuple that is made anew for every wait.
_awaited: tuple[tuple[int, ...]] | None = None


# The call for all ranks that this process has come to last, as the user knows it.
_call = ""


def enter(call: str) -> None:
    """This process is in a call for all ranks."""
    global _call
    _call = call


def begin(ranks: tuple[int, ...]) -> None:
    """This process waits for one of these ranks, or for all of them, from now on."""
    global _awaited
    _awaited = (ranks,)


def end() -> None:
    """It waits no longer."""
    global _awaited
    _awaited = None


class Line(Protocol):
    """Messages beside those of the work, from any thread.

    Attributes
    ----------
    rank, size : int
    """

    rank: int
    size: int

    def send(self, word: str, dest: int) -> None:
        """Send without waiting for anybody."""
        ...

    def poll(self) -> list[tuple[int, str]]:
        """What has come: who sent it, and what."""
        ...

    def meet(self, seconds: float) -> bool:
        """Whether all ranks come here within so many seconds."""
        ...


class Watchdog:
    """A thread that looks after the waits of this process, and answers those of others.

    Time counts only while this thread runs: a job that was stopped as a whole and goes on has waited for nobody.

    Parameters
    ----------
    line : Line
    patience : float
        Seconds after which a wait is given up; infinity never.
    give_up : callable
        `give_up(text)` ends the job; it is called on one rank, in this thread.
    option : str
        What sets the patience, for the message.
    """

    def __init__(self, line: Line, patience: float, give_up: Callable[[str], Any], option: str = "--patience"):
        self.line, self.patience, self._give_up, self._option = line, patience, give_up, option
        self._watched = threading.main_thread()
        self._answers: dict[int, str] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A wait for all ranks, of any other kind."""
        begin(tuple(range(self.line.size)))
        try:
            yield
        finally:
            end()

    def stop(self) -> None:
        """Look no longer; comes back when the thread sends no more messages."""
        self._over.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        tick = min(_TICK, self.patience / 4)
        seen, waited, before = None, 0.0, time.monotonic()
        while not self._over.wait(tick):
            now = time.monotonic()
            passed, before = min(now - before, 2 * tick), now
            # A lower rank that asks gives up for all, if nothing comes.
            is_asked = self._listen() < self.line.rank
            waited = waited + passed if seen is not None and _awaited is seen and not is_asked else 0.0
            seen = _awaited
            if waited > self.patience:
                self._ask()
                waited = 0.0

    def _listen(self) -> int:
        """Read what has come and answer; the lowest rank that has asked."""
        asking = self.line.size
        for source, word in self.line.poll():
            if word == "?":
                asking = min(asking, source)
                self.line.send(self._state(), source)
            else:
                self._answers[source] = word
        return asking

    def _ask(self) -> None:
        """Ask all ranks where they are; of several that ask it is the lowest one that gives up."""
        self._answers = {self.line.rank: self._state()}
        others = [rank for rank in range(self.line.size) if rank != self.line.rank]
        for rank in others:
            self.line.send("?", rank)
        until = time.monotonic() + 3 * _TICK
        while time.monotonic() < until and len(self._answers) <= len(others):
            if self._listen() < self.line.rank:
                return
            time.sleep(0.05)
        if _awaited is None:  # it came at last
            return
        states = [f"rank {r}: {self._answers.get(r, 'does not answer')}" for r in range(self.line.size)]
        self._give_up(f"no message for {self.patience:g} seconds ({self._option})\n" + "\n".join(states))

    def _state(self) -> str:
        """What this process does, and where."""
        awaited, frame = _awaited, sys._current_frames().get(self._watched.ident or 0)
        does = "works" if awaited is None else f"waits for {_ranks_in_words(awaited[0], self.line)}"
        return f"{does}, in {_place(frame)}" + (f"; its last call for all ranks is {_call}" if _call else "")


def _ranks_in_words(ranks: tuple[int, ...], line: Line) -> str:
    others = [rank for rank in ranks if rank != line.rank]
    if len(others) == line.size - 1 > 1:
        return "all others"
    return f"rank{'s' * (len(others) > 1)} {', '.join(map(str, others))}"


def _place(frame: FrameType | None) -> str:
    """File, line and function of what is being done, outside of this folder."""
    inner = frame
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_ours = path.is_relative_to(_PACKAGE) or frame.f_globals.get("__name__") == "__main__"
        if is_ours and path.parent != _PACKAGE / "comm":
            break
        frame = frame.f_back
    frame = frame or inner
    if frame is None:
        return "no function"
    path = frame.f_code.co_filename
    shown = os.path.relpath(path, _PACKAGE.parent) if path.startswith(str(_PACKAGE)) else path
    return f"{shown}, line {frame.f_lineno}, {frame.f_code.co_name}"
