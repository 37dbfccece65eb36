"""`xbraid-py status DIR...`: what runs are doing, a line each."""

from __future__ import annotations

import datetime
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xbraid_py.cli.reader import NoRun, Run, command_parser, read_run
from xbraid_py.run.record import number

COLORS = {"running": "green", "finished": "green", "failed": "red", "stale": "yellow", "stopped": "yellow"}
_EPILOG = (
    "Exit status: 0 for runs that are under way, stopped or finished; 1 if one has failed; 3 if one is stale; "
    "2 if a folder holds no run."
)


def main(words: Sequence[str]) -> int:
    """Print a line for each run; the exit status of the worst."""
    parser = command_parser("status", "DIR... [--stale SECONDS]", "What runs are doing, a line each.", _EPILOG)
    parser.add_argument("DIR", nargs="+", type=Path, help="Folders of runs.")
    parser.add_argument("--stale", type=float, default=STALE, help="Seconds without a sign of life (%(default)g).")
    options = parser.parse_args(words)
    check_stale(options.stale)
    runs: list[tuple[Run, Summary]] = []
    errors = []
    for folder in options.DIR:
        try:
            run = read_run(folder)
        except NoRun as error:
            errors.append(str(error))
        else:
            runs.append((run, summarize(run, options.stale)))
    if runs:
        console().print(table(runs))
    for message in errors:
        print(f"error: {message}", file=sys.stderr)
    return worst([summary.exit_status for _, summary in runs] + [EXIT_NO_RUN] * bool(errors))


def check_stale(seconds: float) -> None:
    """Raise a ValueError unless it is a time."""
    if not seconds > 0:
        raise ValueError(f"stale={seconds} must be positive; use --stale={STALE:g}")


def console() -> Console:
    """The standard output: as wide as it is, or without an end where it is no terminal."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=1000)


def table(runs: Sequence[tuple[Run, Summary]]) -> Table:
    """Runs in lines."""
    found = Table(box=None, pad_edge=False)
    for title in ("run", "state", "update", "objective", "accuracy", "left", "last sign", "ranks", "says"):
        found.add_column(title, justify="right" if title not in ("run", "state", "says") else "left", no_wrap=True)
    for run, summary in runs:
        says = "; ".join(filter(None, (summary.message, *run.flaws)))
        cells = (
            printable(run.path),
            Text(summary.state, style=COLORS.get(summary.state, "")),
            progress(summary),
            shown(summary.objective),
            shown(summary.accuracy, percent=True),
            duration(summary.seconds_left),
            f"{duration(summary.age)} ago" if summary.age is not None else "-",
            shown(summary.ranks),
            says,
        )
        found.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
    return found


STALE = 60.0  # seconds without a sign of life
STATES = ("starting", "running", "stopped", "finished", "failed")
UNDER_WAY, OVER = ("starting", "running"), ("stopped", "finished", "failed")
EXIT_FAILED, EXIT_NO_RUN, EXIT_STALE = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A run in a few numbers; None is what is not known.

    Attributes
    ----------
    state : str
        One of `STATES`, or "stale": under way by its own word, but without a sign of life for too long.
    update, total : int or None
        Updates made, and to be made.
    objective, accuracy : float or None
        The last ones.
    age : float or None
        Seconds since the last sign of life.
    seconds_left : float or None
    ranks : int or None
    host : str
    message : str
        What the run says, or else how its state was found out.
    """

    state: str
    update: int | None
    total: int | None
    objective: float | None
    accuracy: float | None
    age: float | None
    seconds_left: float | None
    ranks: int | None
    host: str
    message: str

    @property
    def exit_status(self) -> int:
        """0; 1 for a run that has failed; 3 for a stale one."""
        return {"failed": EXIT_FAILED, "stale": EXIT_STALE}.get(self.state, 0)


def summarize(run: Run, stale: float = STALE, now: float | None = None) -> Summary:
    """A run in a few numbers: those of `status.json`, and those of the record where it says nothing.

    Parameters
    ----------
    run : Run
    stale : float
        Seconds without a sign of life after which a run under way is called stale.
    now : float, optional
        The time, in seconds since 1970.
    """
    said, last = run.status, run.rows[-1] if run.rows else {}
    state, message = said.get("state"), said.get("message")
    if state not in STATES:
        # Without its own word, the record tells whether it came to its end.
        state = "finished" if last.get("final") is True else "running" if run.rows or run.header else "starting"
        message = "judged by its files"
    # Clocks of nodes differ: the latest of all signs is taken, and one from the future is from now.
    signs = [sign for sign in (_seconds(said.get("updated")), run.status_time, run.record_time) if sign is not None]
    age = max(0.0, (time.time() if now is None else now) - max(signs)) if signs else None
    if state in UNDER_WAY and (age is None or age > stale):
        state = "stale"
    return Summary(
        state=state,
        update=_whole(said.get("update"), last.get("update")),
        total=_whole(said.get("total")),
        objective=_first(said.get("objective"), _last(run, "objective", "loss")),
        accuracy=_first(said.get("accuracy"), _last(run, "val_accuracy")),
        age=age,
        seconds_left=_first(said.get("seconds_left")),
        ranks=_whole(said.get("ranks"), run.about.get("ranks")),
        host=printable(said.get("host_kind") or _host(run)),
        message=printable(message or ""),
    )


def worst(statuses: Iterable[int]) -> int:
    """The exit status for several runs: no run, failed, stale, or 0."""
    order = (0, EXIT_STALE, EXIT_FAILED, EXIT_NO_RUN)
    return max(statuses, key=order.index, default=0)


def _last(run: Run, *names: str) -> float | None:
    """The last value of the first of these columns that there is."""
    for name in names:
        for values in reversed(run.columns.get(name, {}).values()):
            return next(reversed(values.values()))
    return None


def _first(*candidates: Any) -> float | None:
    return next((found for value in candidates if (found := number(value)) is not None), None)


def _whole(*candidates: Any) -> int | None:
    found = _first(*candidates)
    return None if found is None else int(found)


def _host(run: Run) -> str:
    host = run.about.get("host")
    if not isinstance(host, dict):
        return ""
    return " ".join(str(host[name]) for name in ("machine", "system") if host.get(name))


def _seconds(text: Any) -> float | None:
    """A time in ISO form as seconds since 1970; None if it is none."""
    try:
        found = datetime.datetime.fromisoformat(text)
        return (found if found.tzinfo else found.replace(tzinfo=datetime.UTC)).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def printable(text: Any) -> str:
    """Text in one line that a terminal shows and does not obey."""
    return "".join(letter if letter.isprintable() else " " for letter in str(text)).strip()


def shown(value: float | None, percent: bool = False) -> str:
    """A number in a few letters; a dash for None."""
    if value is None:
        return "-"
    if percent:
        return f"{100 * value:.2f} %"
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else f"{value:.5g}"


def duration(seconds: float | None) -> str:
    """Seconds in words: 42 s, 3 min, 5 h 10 min, 2 d 4 h."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, hours = divmod(int(seconds) // 60, 60)[::-1]
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours == 0:
        return f"{minutes} min"
    return f"{hours} h {minutes} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def progress(summary: Summary) -> str:
    """Updates made, of how many if that is known."""
    made = "-" if summary.update is None else str(summary.update)
    return made if summary.total is None else f"{made} / {summary.total}"
