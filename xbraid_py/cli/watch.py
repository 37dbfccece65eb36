"""`xbraid-py watch DIR`: a run while it goes on, as a live table and curves in the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from xbraid_py.cli.reader import Points, Run, RunReader, command_parser
from xbraid_py.cli.status import (
    COLORS,
    OVER,
    STALE,
    Summary,
    check_stale,
    console,
    duration,
    printable,
    progress,
    shown,
    summarize,
)
from xbraid_py.run.record import number, scalars

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
_EPILOG = "Ends with the run, with the exit status of `xbraid-py status`; with Ctrl-C, exit status 130."


def main(words: Sequence[str]) -> int:
    """Show a run until it is over."""
    parser = command_parser("watch", "DIR [--once] [--every SECONDS]", "A run while it goes on.", _EPILOG)
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
        if all(len(points) < 2 for points in curves):
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
    """Curves over common axes.

    Parameters
    ----------
    curves : sequence of list of (x, y)
        At least one point in all; those of a curve by x, all numbers finite.
    width, height : int
        In letters, of the whole: labels at the left and below included.
    ascii_only : bool
        Without braille, for terminals that do not have it.

    Returns
    -------
    list of str
        `height` lines.
    """
    log = uses_log([y for curve in curves for _, y in curve])
    scaled = [[(x, math.log10(y) if log else y) for x, y in curve if y > 0 or not log] for curve in curves]
    xs, ys = ([point[axis] for curve in scaled for point in curve] for axis in (0, 1))
    top, bottom = (f"{10**y if log else y:.3g}" for y in (max(ys), min(ys)))
    margin = max(len(top), len(bottom)) + 1
    columns, rows = max(4, width - margin), max(2, height - 1)
    across, down = (1, 1) if ascii_only else (2, 4)
    lit: set[tuple[int, int]] = set()
    for curve in scaled:
        dots = [
            (_place(x, min(xs), max(xs), columns * across), rows * down - 1 - _place(y, min(ys), max(ys), rows * down))
            for x, y in curve
        ]
        for start, end in zip(dots, dots[1:] or dots, strict=False):
            lit |= _between(start, end)
    lines = []
    for row in range(rows):
        label = top if row == 0 else bottom if row == rows - 1 else ""
        cells = (_letter(lit, row, column, ascii_only) for column in range(columns))
        lines.append(f"{label:>{margin - 1}} " + "".join(cells))
    left, right = f"{min(xs):g}", f"{max(xs):g}"
    lines.append(" " * margin + left + f"{right:>{max(len(right) + 1, columns - len(left))}}")
    return lines


def _place(value: float, low: float, high: float, count: int) -> int:
    """Number of the dot, from 0 to count - 1; the middle if all values are the same."""
    # Halves, since the difference of two large numbers may be infinite.
    share = (value / 2 - low / 2) / (high / 2 - low / 2) if high / 2 > low / 2 else 0.5
    return min(count - 1, round(share * (count - 1)))


def _between(start: tuple[int, int], end: tuple[int, int]) -> set[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return {
        tuple(round(a + (b - a) * step / steps) for a, b in zip(start, end, strict=True)) for step in range(steps + 1)
    }


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
