"""Curves of a run: accuracy over work, objective and residuals over updates."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from xbraid_py.recipes.pictures.style import ADJOINT, GRAY, RED, STATE, clean, line, note, save


def accuracy_over_work(rows: Sequence[dict], path: str | os.PathLike, unit: float | None = None) -> None:
    """Picture of the validation accuracy over work units (the paper's figure 4).

    One line for every level of the nesting, colored by depth, and a red one for the non-nested run, if
    there is one: on the left over measured work units (`wall_work_units`), on the right over counted ones.

    Parameters
    ----------
    rows : sequence of dict
        Records of a run, or of a nested and a non-nested one.
    path : path-like
        The PNG to write, its folder included.
    unit : float, optional
        Seconds of a measured work unit, for rows that are not all updates of a run.

    Raises
    ------
    ValueError
        If there is no update among the rows.
    """
    updates = updates_of(rows)
    works = [("work units, counted", [row["work"] for row in updates])]
    wall = wall_work_units(updates) if unit is None else [row["seconds"] / unit for row in updates]
    if wall:
        works.insert(0, ("work units, wall-clock time", wall))
    figure = Figure(figsize=(4.6 * len(works) + 0.4, 3.8), layout="constrained")
    panels = figure.subplots(1, len(works), sharey=True, squeeze=False)[0]
    for axes, (label, work) in zip(panels, works, strict=True):
        for run, entries in runs_of([row | {"work": units} for row, units in zip(updates, work, strict=True)]):
            _draw_accuracy(axes, run, entries)
        clean(axes, label)
        axes.set_xlim(left=0)
    panels[0].set(ylabel="validation accuracy (%)", ylim=(None, 100))
    if panels[0].lines:
        panels[0].legend(loc="lower right", frameon=False)
    else:
        note(panels[0], "validation accuracy was not evaluated")
    save(figure, path)


def _draw_accuracy(axes: Axes, run: str, entries: list[dict]) -> None:
    last: list[tuple[float, float]] = []
    for (num_layers, section), color in _colored(run, entries):
        points = [(row["work"], 100 * row["val_accuracy"]) for row in section if row.get("val_accuracy") is not None]
        if points:
            # From the last point of the level before, so that the run is one line.
            line(axes, last + points, color, f"{num_layers} layers" + ", non-nested" * (run == "non-nested"))
            last = points[-1:]


def convergence(rows: Sequence[dict], path: str | os.PathLike) -> None:
    """Picture of the objective, and of the residuals of states and adjoints, over the updates.

    One column of panels for every run, with a thin line where the network was refined.

    Parameters
    ----------
    rows : sequence of dict
        Records of a run, or of a nested and a non-nested one.
    path : path-like
        The PNG to write, its folder included.

    Raises
    ------
    ValueError
        If there is no update among the rows.
    """
    runs = list(runs_of(rows))
    figure = Figure(figsize=((8.0, 10.0)[len(runs) - 1], 5.2), layout="constrained")
    panels = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False)
    for (upper, lower), (run, entries) in zip(panels.T, runs, strict=True):
        for (num_layers, section), color in _colored(run, entries):
            _draw_positive(upper, section, "objective", color, f"{num_layers} layers")
        for axes in (upper, lower):
            axes.set_yscale("log")
            clean(axes, "update" if axes is lower else "")
            for _, section in list(sections_of(entries))[1:]:
                axes.axvline(section[0]["update"] - 0.5, color=GRAY, linewidth=0.8, linestyle=":", zorder=0)
        # Objectives span few decades: ticks at 1, 2 and 5, written as plain numbers.
        upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        upper.yaxis.set_major_formatter("{x:g}")
        upper.yaxis.set_minor_formatter(NullFormatter())
        _draw_positive(lower, entries, "state_residual", STATE, "states")
        _draw_positive(lower, entries, "adjoint_residual", ADJOINT, "adjoints")
        if len(runs) > 1:
            upper.set_title(run)
        upper.legend(loc="upper right", frameon=False)
        if lower.get_legend_handles_labels()[0]:
            # Above the panel: residuals fill it from top to bottom.
            lower.legend(loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, ncols=2)
        else:
            note(lower, "no residual above 0 was recorded")
    panels[0, 0].set_ylabel("objective")
    panels[1, 0].set_ylabel("relative residual")
    save(figure, path)


def _draw_positive(axes: Axes, entries: list[dict], field: str, color, label: str) -> None:
    if points := [(row["update"], row[field]) for row in entries if (row[field] or 0) > 0]:
        line(axes, points, color, label)


def _colored(run: str, entries: list[dict]):
    """The sections of a run with a color each: darker the deeper, and red for the non-nested run."""
    sections = list(sections_of(entries))
    colors = [RED] * len(sections) if run == "non-nested" else depth_colors(len(sections))
    return zip(sections, colors, strict=True)


def depth_colors(count: int) -> np.ndarray:
    """Colors of so many depths, darker the deeper."""
    return colormaps["YlGnBu"](np.linspace(0.45, 0.95, count) if count > 1 else [0.85])


def wall_work_units(rows: Sequence[dict]) -> list[float] | None:
    """Measured work after every update, in the paper's unit (paper 001, section 3).

    The unit is the average wall-clock time of an update of the non-nested run; without such a run, that of
    an update on the finest level (0) of the nested one.

    Parameters
    ----------
    rows : sequence of dict
        Records; those that are no updates are left out. `seconds` counts the training time of its own
        run, from its start to the end of the update.

    Returns
    -------
    list of float or None
        One number for every update, in the order of the rows; None if no update can serve as the unit.

    Raises
    ------
    ValueError
        If there is no update among the rows.
    """
    runs = dict(runs_of(rows))
    if "non-nested" in runs:
        spent, number = runs["non-nested"][-1]["seconds"], len(runs["non-nested"])
    else:
        nested = runs.get("nested", [])
        number = sum(row["level"] == 0 for row in nested)
        before = [0.0] + [row["seconds"] for row in nested if row["level"] > 0]
        spent = nested[-1]["seconds"] - before[-1] if number else 0.0
    if spent <= 0:
        return None
    return [row["seconds"] * number / spent for row in updates_of(rows)]


def updates_of(rows: Sequence[dict]) -> list[dict]:
    """The rows that are updates."""
    return [row for row in rows if row.get("kind") == "update"]


def runs_of(rows: Sequence[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Updates of every run there is, the nested one first."""
    updates = updates_of(rows)
    if not updates:
        raise ValueError('rows holds no update; pictures need at least one row with "kind": "update"')
    for run in ("nested", "non-nested"):
        if entries := [row for row in updates if row["run"] == run]:
            yield run, entries


def sections_of(entries: list[dict]) -> Iterator[tuple[int, list[dict]]]:
    """Updates of one level of the nesting after the other: number of layers, rows."""
    for level in sorted({row["level"] for row in entries}, reverse=True):
        section = [row for row in entries if row["level"] == level]
        yield section[0]["num_layers"], section


AXES = {"cycle": "V-cycles", "work": "work units", "seconds": "seconds"}


def over_cycles(runs: Mapping[str, Sequence[dict]], path: str | os.PathLike, over: str = "cycle") -> None:
    """Picture of the loss (solid lines, left axis) and of the validation accuracy (dashed lines, right axis).

    Parameters
    ----------
    runs : mapping of str to sequence of dict
        Rows of each run by its name for the legend, with `loss`, `val_accuracy` and what `over` names.
    path : path-like
        The PNG to write, its folder included.
    over : {"cycle", "work", "seconds"}
        The horizontal axis.

    Raises
    ------
    ValueError
        If there is no run, or `over` is no such word.
    """
    if not runs:
        raise ValueError("runs holds no run; pictures need at least one")
    if over not in AXES:
        raise ValueError(f"over={over!r} must be one of {', '.join(AXES)}; use cycle")
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(runs)))
    for (name, rows), color in zip(runs.items(), shades, strict=True):
        where = [row[over] for row in rows]
        left.plot(where, [row["loss"] for row in rows], color=color, linewidth=1.4, label=name)
        right.plot(where, [100 * row["val_accuracy"] for row in rows], "--", color=color, linewidth=1.1)
    clean(left, AXES[over])
    if over == "cycle" or any(row[over] > 0 for rows in runs.values() for row in rows):
        left.set_xscale("symlog", linthresh=1.0)
        left.xaxis.set_major_formatter("{x:g}")
    left.set_xlim(left=0)
    left.set_ylabel("loss (solid)")
    right.set(ylabel="validation accuracy, % (dashed)", ylim=(None, 101))
    right.spines["top"].set_visible(False)
    left.legend(frameon=False, fontsize="small", loc="center right")
    save(figure, path)
