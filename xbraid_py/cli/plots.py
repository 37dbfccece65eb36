"""Pictures for the page of a report: every quantity over the updates, of one run or of several."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from xbraid_py.cli.curves import uses_log
from xbraid_py.cli.reader import Points, Run
from xbraid_py.cli.summary import printable

# Colors that any kind of sight tells apart, and dashes, so that a curve on top of an equal one hides it not.
_COLORS = ("#0072b2", "#c1272d", "#009e73", "#e69f00", "#56b4e9", "#cc79a7", "#000000")
_DASHES = ("-", "--", ":", "-.")
# Quantities that say where in the run a row is, or that only grow.
_NOT_DRAWN = ("level", "num_layers", "seconds", "work", "evaluations")
_FIRST = ("objective", "loss", "val_accuracy", "test_accuracy", "test_loss", "train_accuracy", "grad_norm")
_DPI = 120
_LARGEST = 1e100  # of what can be drawn: the differences of larger numbers overflow
MOST = 16


def quantities(runs: Sequence[Run]) -> list[str]:
    """Columns worth a picture: common to all runs, with two points or more that are not all the same."""
    common = [name for name in runs[0].columns if all(name in run.columns for run in runs)]
    changing = [name for name in common if name not in _NOT_DRAWN and any(_changes(run, name) for run in runs)]
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
    ]
    figure = Figure(figsize=(5.6, 3.5), layout="constrained")
    axes = figure.subplots()
    for index, (label, points) in enumerate(curves):
        axes.plot(
            *zip(*points, strict=True),
            label=_literal(label),
            color=_COLORS[index % len(_COLORS)],
            linestyle=_DASHES[index % len(_DASHES)],
            linewidth=1.5,
            marker="o" if len(points) < 8 else None,
            markersize=4,
        )
    if uses_log([value for _, points in curves for _, value in points]):
        axes.set_yscale("log", nonpositive="mask")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="update", ylabel=_literal(column.replace("_", " ")))
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(frameon=False, fontsize="small")
    stream = io.BytesIO()
    figure.savefig(stream, dpi=_DPI, format="png")
    return stream.getvalue()


def _drawable(curves: dict[str, Points]) -> Iterator[tuple[str, Points]]:
    for name, points in curves.items():
        if kept := [point for point in points if max(map(abs, point)) < _LARGEST]:
            yield name, kept


def _literal(text: str) -> str:
    """Text in which matplotlib sees no formula; it leaves out labels that begin with an underscore."""
    return printable(text)[:60].replace("$", r"\$").lstrip("_") or " "
