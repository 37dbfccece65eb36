"""What a report draws of records: training and validation together, and each quantity; and how these are called."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from xbraid_py.cli.reader import Points, Run, printable
from xbraid_py.recipes.pictures.style import clean, legend, scale
from xbraid_py.run.record import number, scalars

# Colors that any kind of sight tells apart, and dashes, so that a curve on top of an equal one hides it not.
_COLORS = ("#0072b2", "#c1272d", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#000000")
_DASHES = ("-", "--", ":", "-.")
# Quantities that say where in the run a row is, how it was looked at, or that only grow.
_NOT_DRAWN = ("level", "num_layers", "seconds", "work", "evaluations", "update", "epoch", "cycle", "sweeps", "total")
_FIRST = ("objective", "loss", "val_accuracy", "val_loss", "train_accuracy", "grad_norm")
_WORDS = {
    "loss": "training loss",
    "grad_norm": "norm of the gradient",
    "num_layers": "layers",
    "state_residual": "residual of the states",
    "adjoint_residual": "residual of the adjoints",
}
_PREFIXES = {"val": "validation", "train": "training", "aux": "auxiliary"}
_DPI, _CURVES = 120, 20
_LARGEST = 1e100  # of what can be drawn: the differences of larger numbers overflow
MOST = 16

_OVER = {"update": "updates", "work": "work units", "seconds": "seconds"}
# Panels of the overview: title, factor, quantities with dash and name.
_OVERVIEW = (
    ("loss", 1, (("objective", "-", "objective"), ("loss", "--", "training"), ("val_loss", ":", "validation"))),
    ("accuracy (%)", 100, (("train_accuracy", "--", "training"), ("val_accuracy", "-", "validation"))),
    ("error, mean square", 1, (("train_l2", "--", "training"), ("val_l2", "-", "validation"))),
    ("wrong answers (%)", 100, (("train_error", "--", "training"), ("val_error", "-", "validation"))),
)


def named(column: str) -> str:
    """A quantity in words: `stacks.0.gradient_error` is the gradient error of stack 1."""
    *groups, last = column.split(".")
    first, _, rest = last.partition("_")
    words = _WORDS.get(last) or (f"{_PREFIXES[first]} {rest}" if rest and first in _PREFIXES else last)
    of = [name if at is None else f"{re.sub('s$', '', name)} {int(at) + 1}" for name, at in _pairs(groups)]
    return " of ".join([words, *reversed(of)]).replace("_", " ")


def _pairs(groups: Sequence[str]) -> list[tuple[str, str | None]]:
    found: list[tuple[str, str | None]] = []
    for word in groups:
        if word.isdecimal() and len(word) < 7 and found and found[-1][1] is None:
            found[-1] = found[-1][0], word
        else:
            found.append((word, None))
    return found


def quantities(runs: Sequence[Run]) -> list[str]:
    """Columns worth a picture: common to all runs, with two points or more that are not all the same."""
    common = [name for name in runs[0].columns if all(name in run.columns for run in runs)]
    changing = [
        name
        for name in common
        if name.rpartition(".")[2] not in _NOT_DRAWN and any(_changes(run, name) for run in runs)
    ]
    return sorted(changing, key=lambda name: _FIRST.index(name) if name in _FIRST else len(_FIRST))


def _changes(run: Run, name: str) -> bool:
    return any(len(set(values.values())) > 1 for values in run.columns[name].values())


def draw(runs: Sequence[Run], labels: Sequence[str], column: str) -> bytes:
    """The PNG of a column over the updates: a curve for each run, and for each run in its record."""
    several = len({name for run in runs for name in run.columns[column]}) > 1
    curves = [
        (" ".join(filter(None, (label if len(runs) > 1 else "", name if several else ""))), points)
        for run, label in zip(runs, labels, strict=True)
        for name, points in _drawable(run.curves(column))
    ][:_CURVES]
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axes = figure.subplots()
    for index, (label, points) in enumerate(curves):
        axes.plot(
            *zip(*points, strict=True),
            label=_literal(label),
            color=_COLORS[index % len(_COLORS)],
            linestyle=_DASHES[index % len(_DASHES)],
            linewidth=1.5,
            marker="o" if len(points) <= 12 else None,
            markersize=4,
        )
    scale(axes, [value for _, points in curves for _, value in points])
    if len(runs) == 1:
        _mark_refinements(axes, runs[0], "update")
    axes.locator_params(axis="x", integer=True)
    clean(axes, "update")
    axes.set_ylabel(_literal(named(column)))
    if len(curves) > 1:
        legend(axes)
    return _png(figure)


def overview(runs: Sequence[Run], labels: Sequence[str]) -> bytes | None:
    """The PNG of losses and accuracies of training and validation, over updates, work and seconds.

    Of one run the colors are depths, and dotted lines are where it was refined; of several they are the runs. None if
    there is nothing to draw.
    """
    panels = [panel for panel in _OVERVIEW if any(name in run.columns for run in runs for name, *_ in panel[2])]
    over = ["update", *(name for name in ("work", "seconds") if all(name in run.columns for run in runs))]
    if not panels or all(len(run.rows) < 2 for run in runs):
        return None
    figure = Figure(figsize=(3.7 * len(over) + 0.6, 2.7 * len(panels) + 0.5), layout="constrained")
    grid = figure.subplots(len(panels), len(over), sharex="col", sharey="row", squeeze=False)
    colors = {name: color for name, color in _colors(runs, labels)}
    dashes: dict[str, Any] = {}
    for line_of_panels, (title, factor, curves) in zip(grid, panels, strict=True):
        drawn: list[float] = []
        for axes, where in zip(line_of_panels, over, strict=True):
            for run, label in zip(runs, labels, strict=True):
                for key, dash, name in curves:
                    for part, points in _sections(run, label, len(runs) > 1, where, key, factor):
                        few = "o" if len(points) <= 12 else None
                        style = {"linestyle": dash, "linewidth": 1.4, "marker": few, "markersize": 3}
                        axes.plot(*zip(*points, strict=True), color=colors[part], **style)
                        drawn += [value for _, value in points]
                        dashes[name] = dash
            clean(axes, _OVER[where] if title == panels[-1][0] else "")
            if len(runs) == 1:
                _mark_refinements(axes, runs[0], where)
        scale(line_of_panels[0], drawn)
        line_of_panels[0].set_ylabel(title)
    if not dashes:
        return None
    keys = [Line2D([], [], color=color, linewidth=3, label=_literal(name)) for name, color in colors.items()]
    keys = keys if len(keys) > 1 else []
    keys += [Line2D([], [], color="0.2", linestyle=dash, label=name) for name, dash in dashes.items()]
    figure.legend(handles=keys, loc="outside lower center", ncols=4, frameon=False)
    return _png(figure)


def _colors(runs: Sequence[Run], labels: Sequence[str]) -> list[tuple[str, Any]]:
    if len(runs) > 1:
        return [(label, _COLORS[at % len(_COLORS)]) for at, label in enumerate(labels)]
    depths = list(dict.fromkeys(_depth(row) for row in runs[0].rows if "update" in row))
    return [
        (depth, colormaps["YlGnBu"](0.45 + 0.5 * at / max(1, len(depths) - 1)) if len(depths) > 1 else _COLORS[0])
        for at, depth in enumerate(depths)
    ]


def _depth(row) -> str:
    count = number(row.get("num_layers"))
    return "" if count is None else f"{count:.0f} layers"


def _sections(run: Run, label: str, by_run: bool, where: str, key: str, factor: float) -> Iterator[tuple[str, Points]]:
    """Parts of a curve of one color each, with what names the color; a part begins where the one before ended."""
    parts: list[tuple[tuple[str, str], Points]] = []
    for row in run.rows:
        values = scalars(row) | {"update": number(row.get("update"))}
        x, y = values.get(where), values.get(key)
        if x is None or y is None or max(abs(x), abs(y)) > _LARGEST:
            continue
        name = str(row.get("run") or ""), label if by_run else _depth(row)
        if not parts or parts[-1][0] != name:
            parts.append((name, parts[-1][1][-1:] if parts and parts[-1][0][0] == name[0] else []))
        parts[-1][1].append((x, factor * y))
    yield from ((name, points) for (_, name), points in parts)


def refinements(run: Run) -> list[tuple[dict, float]]:
    """Rows at which a run has another number of layers than before, and that number."""
    found = []
    rows = [row for row in run.rows if number(row.get("num_layers")) is not None]
    for before, row in zip(rows, rows[1:], strict=False):
        if row["num_layers"] != before["num_layers"] and row.get("run") == before.get("run"):
            found.append((row, float(row["num_layers"])))
    return found


def _mark_refinements(axes: Axes, run: Run, where: str) -> None:
    for row, layers in refinements(run)[:_CURVES]:
        at = number(row.get(where))
        if at is not None and abs(at) < _LARGEST:
            axes.axvline(at, color="0.5", linewidth=0.9, linestyle=":", zorder=0)
            place = {"xycoords": ("data", "axes fraction"), "xytext": (2, -8), "textcoords": "offset points"}
            axes.annotate(f"{layers:.0f}", (at, 1.0), color="0.35", fontsize="small", **place)


def _drawable(curves: dict[str, Points]) -> Iterator[tuple[str, Points]]:
    for name, points in curves.items():
        if kept := [point for point in points if max(map(abs, point)) < _LARGEST]:
            yield name, kept


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=_DPI, format="png")
    return stream.getvalue()


def _literal(text: str) -> str:
    """Text in which matplotlib sees no formula; it leaves out labels that begin with an underscore."""
    return printable(text)[:60].replace("$", r"\$").lstrip("_") or " "
