"""`xbraid-py status DIR...`: what runs are doing, a line each."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from xbraid_py.cli.arguments import command_parser, parse
from xbraid_py.cli.reader import NoRun, Run, read_run
from xbraid_py.cli.summary import EXIT_NO_RUN, STALE, Summary, duration, printable, progress, shown, summarize, worst

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
    options = parse(parser, words)
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
