"""Looking at runs: `status`, a line each, and `watch`, one while it goes on, as a live table and curves."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import math
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from xbraid_py.cli.reader import NoRun, Points, Run, RunReader, command_parser, printable, read_run
from xbraid_py.run.documents import complete_lines, load_json, open_regular, read_regular
from xbraid_py.run.record import number, scalars

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
        if (folder / STUDIES).is_file():
            state, says = study(folder)
            console().print(
                Text.assemble(f"{printable(folder)}  ", Text(state, style=COLORS.get(state, "")), f"  {says}")
            )
            continue
        try:
            run = read_run(folder)
        except NoRun as error:
            errors.append(str(error))
        else:
            runs.append((run, summarize(run, options.stale)))
    if runs:
        console().print(table(runs))
    for message in errors:
        print(f"error: {printable(message)}", file=sys.stderr)
    return worst([summary.exit_status for _, summary in runs] + [EXIT_NO_RUN] * bool(errors))


STUDIES = "runs.jsonl"  # of a study: a line for every run that is over


def study(folder: Path) -> tuple[str, str]:
    """State of a study, and how many runs it has made and has to make, as far as it says so."""
    over = failed = 0
    with contextlib.suppress(OSError), open_regular(folder / STUDIES) as stream:
        for line, _ in complete_lines(stream, 1 << 22):
            over += 1
            failed += b'"failure":' in line
    try:
        left = max(0, int(load_json(read_regular(folder / "study.json"))["runs"]) - over)
    except (OSError, ValueError, KeyError, TypeError):
        left = None
    says = f"{over + (left or 0)} runs" + f", {left} to do" * (left is not None) + f", {failed} failed" * bool(failed)
    if is_locked(folder / "lock"):
        return "running", says
    return ("finished" if left == 0 else "stopped"), says


def is_locked(path: Path) -> bool:
    """Whether a process of this machine holds the lock of a run or a study."""
    try:
        with open_regular(path, follow=False) as stream:
            fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


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

    Without a sign of life for `stale` seconds a run under way is called stale; `now` is the time, in seconds since
    1970.
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


# What is looked at first, by the ends of the names; three of them are drawn.
_CURVES = (
    ("objective", "loss"),
    ("val_accuracy", "val_loss", "val_l2", "accuracy"),
    ("gradient_error", "grad_norm", "state_residual", "residual"),
)
_TABLE = (
    "update", "num_layers", "objective", "loss", "grad_norm", "train_accuracy", "val_accuracy", "val_loss", "val_l2",
    "gradient_error", "learning_rate", "state_residual", "adjoint_residual", "seconds",
)  # fmt: skip
_ROWS, _CURVE_LINES = 6, 8


def watch(words: Sequence[str]) -> int:
    """Show a run until it is over."""
    epilog = "Ends with the run, with the exit status of `xbraid-py status`; with Ctrl-C, exit status 130."
    parser = command_parser("watch", "DIR [--once] [--every SECONDS]", "A run while it goes on.", epilog)
    parser.add_argument("DIR", type=Path, help="Folder of the run.")
    parser.add_argument("--once", action="store_true", help="Show it as it is now, and end.")
    parser.add_argument("--every", type=float, default=1.0, help="Seconds between two looks (%(default)g).")
    parser.add_argument("--stale", type=float, default=STALE, help="Seconds without a sign of life (%(default)g).")
    options = parser.parse_args(words)
    check_stale(options.stale)
    if not 0.1 <= options.every <= 3600:
        raise ValueError(f"every={options.every} must be a number of seconds from 0.1 to 3600; use --every=1")
    reader, screen = RunReader(options.DIR), console()
    run = reader.read()
    summary = summarize(run, options.stale)
    if options.once:
        screen.print(frame(run, summary, screen))
    elif screen.is_terminal:
        with Live(frame(run, summary, screen), console=screen, auto_refresh=False) as live:
            while summary.state not in OVER:
                time.sleep(options.every)
                run = reader.read()
                summary = summarize(run, options.stale)
                live.update(frame(run, summary, screen), refresh=True)
    else:
        summary = _print_lines(reader, summary, options, screen)
    return summary.exit_status


def _print_lines(reader: RunReader, summary: Summary, options, screen: Console) -> Summary:
    """For a file or a pipe: a line whenever something has changed."""
    said = None
    while True:
        parts = [summary.state, f"update {progress(summary)}", f"objective {shown(summary.objective)}"]
        parts += [f"accuracy {shown(summary.accuracy, percent=True)}"] * (summary.accuracy is not None)
        line = ", ".join(parts + [summary.message] * bool(summary.message))
        if line != said:
            screen.print(Text(line))
        said = line
        if summary.state in OVER:
            return summary
        time.sleep(options.every)
        summary = summarize(reader.read(), options.stale)


def frame(run: Run, summary: Summary, screen: Console) -> Group:
    """What is shown of a run: its state, its last rows, its curves, and what is missing."""
    width = min(screen.width, 100)
    state = Text(summary.state, style=f"bold {COLORS.get(summary.state, '')}")
    words = [f"update {progress(summary)}", f"objective {shown(summary.objective)}"]
    words += [f"accuracy {shown(summary.accuracy, percent=True)}"] * (summary.accuracy is not None)
    words += [f"{duration(summary.seconds_left)} left"] * (summary.seconds_left is not None)
    words += [f"last sign {duration(summary.age)} ago"] * (summary.age is not None)
    words += [f"{summary.ranks} ranks" if summary.ranks != 1 else "1 rank"] * (summary.ranks is not None)
    parts = [Text.assemble(Text(f"{printable(run.path)}  "), state, Text("  " + ", ".join(words)))]
    parts += [Text(summary.message)] * bool(summary.message)
    if run.rows:
        parts += [Text(), _last_rows(run, width)]
    for title, curves in _curves(run):
        encoding = screen.encoding.lower()
        parts += [Text(), Text(title, style="bold")]
        parts += [Text(line) for line in draw(curves, width, _CURVE_LINES, not encoding.startswith("utf"))]
    parts += [Text()] + [Text(f"{flaw}", style="dim") for flaw in run.flaws] if run.flaws else []
    return Group(*parts)


def _last_rows(run: Run, width: int) -> Table:
    rows = [(row, scalars(row) | {"update": number(row.get("update"))}) for row in run.rows[-_ROWS:]]
    there = list(dict.fromkeys(name for _, values in rows for name in values))
    names = list(dict.fromkeys(name for wanted in _TABLE for name in there if _ends(name, wanted)))
    names = names[: max(2, width // 12)]
    several = len({printable(row.get("run")) for row in run.rows}) > 1
    found = Table(box=None, pad_edge=False)
    for title in ["run"] * several + [name.rpartition(".")[2].replace("_", " ") for name in names]:
        found.add_column(Text(printable(title)), justify="right", overflow="fold")
    for row, values in rows:
        cells = [printable(row.get("run", ""))] * several + [shown(values.get(name)) for name in names]
        found.add_row(*map(Text, cells))
    return found


def _curves(run: Run) -> list[tuple[str, list]]:
    """Up to three panels: a title, and the curves of the runs in the record."""
    panels = []
    for wanted in _CURVES:
        name = next((name for end in wanted for name in run.columns if _ends(name, end)), None)
        found = run.curves(name) if name else {}
        curves = list(found.values())
        if name is None or all(len(points) < 2 for points in curves):
            continue
        log = " (logarithmic)" if uses_log([y for curve in curves for _, y in curve]) else ""
        names = ", ".join(filter(None, found))
        panels.append((printable(f"{name.replace('_', ' ')}{log} over updates" + f": {names}" * bool(names)), curves))
    return panels


def _ends(name: str, end: str) -> bool:
    return name == end or name.endswith((f".{end}", f"_{end}")) and end != "update"


# A braille letter has 2 x 4 dots; these are their bits, row by row from the top.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800
_LOG_FROM = 20.0  # ratio of the largest to the smallest value from which powers of ten are even steps


def uses_log(values: Sequence[float]) -> bool:
    """Whether values are better seen on a logarithmic scale, on which zeros are left out."""
    positive = [value for value in values if value > 0]
    return bool(positive) and min(values) >= 0 and max(positive) > _LOG_FROM * min(positive)


def draw(curves: Sequence[Points], width: int, height: int, ascii_only: bool = False) -> list[str]:
    """Curves over common axes, in `height` lines of `width` letters, labels at the left and below included.

    Each is a list of (x, y), by x, all numbers finite, and there is at least one point in all. With `ascii_only` there
    is no braille, for terminals that do not have it.
    """
    log = uses_log([y for curve in curves for _, y in curve])
    scaled = [[(x, math.log10(y) if log else y) for x, y in curve if y > 0 or not log] for curve in curves]
    xs, ys = ([point[axis] for curve in scaled for point in curve] for axis in (0, 1))
    (left, right), (low, high) = (min(xs), max(xs)), (min(ys), max(ys))
    top, bottom = (f"{10**y if log else y:.3g}" for y in (high, low))
    margin = max(len(top), len(bottom)) + 1
    columns, rows = max(4, width - margin), max(2, height - 1)
    across, down = (1, 1) if ascii_only else (2, 4)
    lit: set[tuple[int, int]] = set()
    for curve in scaled:
        dots = [
            (_place(x, left, right, columns * across), rows * down - 1 - _place(y, low, high, rows * down))
            for x, y in curve
        ]
        for start, end in zip(dots, dots[1:] or dots, strict=False):
            lit |= _between(start, end)
    lines = []
    for row in range(rows):
        label = top if row == 0 else bottom if row == rows - 1 else ""
        cells = (_letter(lit, row, column, ascii_only) for column in range(columns))
        lines.append(f"{label:>{margin - 1}} " + "".join(cells))
    first, last = f"{left:g}", f"{right:g}"
    lines.append(" " * margin + first + f"{last:>{max(len(last) + 1, columns - len(first))}}")
    return lines


def _place(value: float, low: float, high: float, count: int) -> int:
    """Number of the dot, from 0 to count - 1; the middle if all values are the same."""
    # Halves, since the difference of two large numbers may be infinite.
    share = (value / 2 - low / 2) / (high / 2 - low / 2) if high / 2 > low / 2 else 0.5
    return min(count - 1, round(share * (count - 1)))


def _between(start: tuple[int, int], end: tuple[int, int]) -> set[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    (x, y), (to_x, to_y) = start, end
    return {(round(x + (to_x - x) * step / steps), round(y + (to_y - y) * step / steps)) for step in range(steps + 1)}


def _letter(lit: set[tuple[int, int]], row: int, column: int, ascii_only: bool) -> str:
    if ascii_only:
        return "*" if (column, row) in lit else " "
    bits = sum(
        bit
        for down, pair in enumerate(_DOTS)
        for across, bit in enumerate(pair)
        if (2 * column + across, 4 * row + down) in lit
    )
    return chr(_BLANK + bits) if bits else " "
