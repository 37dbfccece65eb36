"""Pictures of norms and lesions of residual networks (paper 003, figures 3, 4 and 7).

Rows are those of `lesion_tables`. A line is of one network, and a mean over its seeds.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.lesion.tables import depth, fit_power, mean_norm, networks, series
from studies.rows import Row
from xbraid_py.recipes.pictures.style import ADJOINT, GRAY, RED, STATE, clean, legend, line, note, save

FIGURES = ("figure3.png", "figure4.png", "figure7.png", "lesion.png")


def write(rows: Sequence[Row], folder: str | os.PathLike) -> None:
    """Write all pictures, `FIGURES`.

    Raises
    ------
    ValueError
        If there is no row.
    """
    for name, draw in zip(FIGURES, (figure3, figure4, figure7, lesions), strict=True):
        draw(rows, Path(folder) / name)


def figure3(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Mean norm of the residual modules over the number of blocks, with a fit for each of `series`."""
    figure, axes = _one_panel()
    found = series(rows)
    for (name, members), color in zip(found.items(), _colors(len(found)), strict=True):
        sizes, values = [depth(row) for row in members], [mean_norm(row) for row in members]
        slope, factor = fit_power(sizes, values)
        axes.plot(sizes, values, "o", color=color, markersize=4)
        ends = (min(sizes), max(sizes))
        line(axes, [(d, factor * d**slope) for d in ends], color, f"{name}: slope {slope:.2f}")
    if found:
        _reciprocal(axes, rows)
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = sorted({depth(row) for row in rows})
        axes.set_xticks(sizes, map(str, sizes), minor=False)
        axes.set_xticks([], minor=True)
        legend(axes)
    else:
        note(axes, "no two depths of one h, or of one h d")
    clean(axes, "blocks d")
    axes.set_ylabel("mean norm of h F")
    save(figure, path)


def figure4(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Norms of the states Y and of the residual modules G over the blocks, a panel for each network.

    Vertical lines are where stages begin.
    """
    known = networks(_some(rows))
    columns = min(4, len(known))
    lines = -(-len(known) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * lines), layout="constrained")
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).flat
    for axes, (name, members) in zip(panels, known.items(), strict=False):
        norms = _mean_norms(members)
        for column, color, label in ((2, STATE, "input Y"), (3, RED, "output G")):
            line(axes, list(zip(range(len(norms)), norms[:, column], strict=True)), color, label)
        for block in np.flatnonzero((norms[:, 1] == 0) & (norms[:, 0] > 0)):
            axes.axvline(block, color=GRAY, linewidth=0.7, linestyle="--")
        axes.set_title(name, fontsize="medium")
        axes.set_yscale("log")
        clean(axes, "block")
    for axes in list(panels):
        axes.set_visible(False)
    figure.axes[0].set_ylabel("norm")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


def figure7(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Norms of F over the time t = h j of block j, for networks of one time span h d."""
    figure, axes = _one_panel()
    spans = {name: members for name, members in series(rows).items() if name.startswith("h d")}
    known = networks([row for members in spans.values() for row in members])
    for (name, members), color in zip(known.items(), _colors(len(known)), strict=True):
        norms, h = _mean_norms(members), members[0]["settings"]["step_size"]
        line(axes, [(h * j, residual / h) for j, residual in enumerate(norms[:, 3])], color, name)
    if known:
        legend(axes)
    else:
        note(axes, "no two depths of one h d")
    clean(axes, "time h j")
    axes.set_ylabel("norm of F")
    save(figure, path)


def lesions(rows: Sequence[Row], path: str | os.PathLike) -> None:
    """Accuracies without one block (transitions as squares), without several, and with shuffled blocks."""
    known = networks(_some(rows))
    figure = Figure(figsize=(12.0, 3.8), layout="constrained")
    one, several, mixed = figure.subplots(1, 3)
    for (name, members), color in zip(known.items(), _colors(len(known)), strict=True):
        results = [row["result"] for row in members]
        whole = float(np.mean([each["accuracy"] for each in results]))
        _left_out(one, members, whole, color, name)
        counts = {0: [each["accuracy"] for each in results]} | {
            int(count): [v for each in results for v in each["random"][count]] for count in results[0]["random"]
        }
        line(several, [(count, 100 * float(np.mean(values))) for count, values in counts.items()], color, name)
        low, high = ([100 * f(values) for values in counts.values()] for f in (min, max))
        several.fill_between(list(counts), low, high, color=color, alpha=0.12, linewidth=0)
        shuffled = [v for each in results for v in each["shuffled"]]
        mixed.plot([100 * whole] * len(shuffled), [100 * v for v in shuffled], "o", color=color, markersize=4)
    several.set_xscale("symlog", base=2, linthresh=1)
    counts = sorted({0} | {int(count) for row in rows for count in row["result"]["random"]})
    several.set_xticks(counts, map(str, counts))
    low, high = several.get_ylim()
    mixed.axline((high, high), slope=1, color=GRAY, linewidth=0.7, linestyle="--")
    clean(one, "place of the block left out, block / d")
    one.set_ylabel("accuracy lost, points")
    legend(one)
    clean(several, "blocks left out at random")
    several.set_ylabel("accuracy, %")
    clean(mixed, "accuracy of the whole network, %")
    mixed.set_ylabel("accuracy with shuffled blocks, %")
    save(figure, path)


def _left_out(axes: Axes, members: Sequence[Row], whole: float, color, name: str) -> None:
    left = np.mean([row["result"]["left_out"] for row in members], axis=0)
    places = members[0]["result"]["norms"]
    points = [(k / len(left), 100 * (whole - value)) for k, value in enumerate(left)]
    is_fixed = [s > 0 and j == 0 for s, j, *_ in places]
    line(axes, points, color, name)
    axes.lines[-1].set_linewidth(0.8)
    for fixed, marker in ((False, "."), (True, "s")):
        chosen = [point for point, each in zip(points, is_fixed, strict=True) if each == fixed]
        if chosen:
            axes.plot(*zip(*chosen, strict=True), marker, color=color, markersize=5)


def _reciprocal(axes: Axes, rows: Sequence[Row]) -> None:
    """A line of slope -1 to compare with."""
    first = min(rows, key=depth)
    ends = (depth(first), max(map(depth, rows)))
    level = mean_norm(first)
    axes.plot(ends, [level * ends[0] / d for d in ends], color=ADJOINT, linestyle=":", linewidth=1.2, label="1/d")


def _mean_norms(members: Sequence[Row]) -> np.ndarray:
    """(blocks, 4) means over seeds of what "norms" holds."""
    return np.mean([row["result"]["norms"] for row in members], axis=0)


def _colors(count: int) -> list:
    return list(mpl.colormaps["viridis"](np.linspace(0.0, 0.85, count)))


def _one_panel() -> tuple[Figure, Axes]:
    figure = Figure(figsize=(4.8, 3.8), layout="constrained")
    return figure, figure.subplots()


def _some(rows: Sequence[Row]) -> Sequence[Row]:
    if not rows:
        raise ValueError("rows holds no network; pictures need at least one")
    return rows
