"""Pictures of a run, drawn from its records: accuracy over work, convergence, class map."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

logger = logging.getLogger(__name__)

# Figures are objects of their own, without pyplot: no global state, and no display is looked for.
_DPI = 150
_RED = "#c1272d"  # the non-nested run, as in the paper's figure 4
_STATE, _ADJOINT, _GREY = "#0072b2", "#e69f00", "0.55"


def read_metrics(path: str | os.PathLike) -> tuple[dict, list[dict]]:
    """Records of a run.

    A last line that breaks off, as a killed run leaves it, is ignored with a warning in the log.

    Parameters
    ----------
    path : path-like
        A `metrics.jsonl`: a header, then one JSON object a line.

    Returns
    -------
    header, rows : dict, list of dict
        The first line (configuration, versions, ranks), and the others in their order.

    Raises
    ------
    OSError
        If the file cannot be read.
    ValueError
        If a line is no JSON object or the first one is no header, with the number of the line.
    """
    text = Path(path).read_bytes().decode(errors="replace")
    *lines, rest = text.split("\n")
    records = [_record(path, number, line) for number, line in enumerate(lines, start=1)]
    if rest:
        try:
            records.append(_record(path, len(lines) + 1, rest))
        except ValueError:
            logger.warning("%s, line %d breaks off and is ignored", path, len(lines) + 1)
    if not records or records[0].get("kind") != "header":
        raise ValueError(f'{path}, line 1: no header; a record of a run starts with {{"kind": "header", ...}}')
    return records[0], records[1:]


def _record(path, number: int, line: str) -> dict:
    try:
        record, flaw = json.loads(line), "no JSON object"
    except json.JSONDecodeError as error:
        record, flaw = None, error.msg
    if not isinstance(record, dict):
        good = 'a good line is {"kind": "update", ...}'
        raise ValueError(f"{path}, line {number}: found {line[:60]!r}: {flaw}; {good}")
    return record


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
    runs = dict(_runs(rows))
    if "non-nested" in runs:
        spent, number = runs["non-nested"][-1]["seconds"], len(runs["non-nested"])
    else:
        nested = runs.get("nested", [])
        number = sum(row["level"] == 0 for row in nested)
        before = [0.0] + [row["seconds"] for row in nested if row["level"] > 0]
        spent = nested[-1]["seconds"] - before[-1] if number else 0.0
    if spent <= 0:
        return None
    return [row["seconds"] * number / spent for row in _updates(rows)]


def accuracy_over_work(rows: Sequence[dict], path: str | os.PathLike) -> None:
    """Picture of the validation accuracy over work units (the paper's figure 4).

    One line for every level of the nesting, coloured by depth, and a red one for the non-nested run, if
    there is one: on the left over measured work units (`wall_work_units`), on the right over counted ones.

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
    updates = _updates(rows)
    works = [("work units, counted", [row["work"] for row in updates])]
    wall = wall_work_units(updates)
    if wall:
        works.insert(0, ("work units, wall-clock time", wall))
    figure = Figure(figsize=(4.6 * len(works) + 0.4, 3.8), layout="constrained")
    panels = figure.subplots(1, len(works), sharey=True, squeeze=False)[0]
    for axes, (label, work) in zip(panels, works, strict=True):
        for run, entries in _runs([row | {"work": units} for row, units in zip(updates, work, strict=True)]):
            _draw_accuracy(axes, run, entries)
        _clean(axes, label)
        axes.set_xlim(left=0)
    panels[0].set(ylabel="validation accuracy (%)", ylim=(None, 100))
    if panels[0].lines:
        panels[0].legend(loc="lower right", frameon=False)
    else:
        _note(panels[0], "validation accuracy was not evaluated")
    _save(figure, path)


def _draw_accuracy(axes: Axes, run: str, entries: list[dict]) -> None:
    last: list[tuple[float, float]] = []
    for (num_layers, section), colour in _coloured(run, entries):
        points = [(row["work"], 100 * row["val_accuracy"]) for row in section if row["val_accuracy"] is not None]
        if points:
            # From the last point of the level before, so that the run is one line.
            _line(axes, last + points, colour, f"{num_layers} layers" + ", non-nested" * (run == "non-nested"))
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
    runs = list(_runs(rows))
    figure = Figure(figsize=((8.0, 10.0)[len(runs) - 1], 5.2), layout="constrained")
    panels = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False)
    for (upper, lower), (run, entries) in zip(panels.T, runs, strict=True):
        for (num_layers, section), colour in _coloured(run, entries):
            _draw_positive(upper, section, "objective", colour, f"{num_layers} layers")
        for axes in (upper, lower):
            axes.set_yscale("log")
            _clean(axes, "update" if axes is lower else "")
            for _, section in list(_sections(entries))[1:]:
                axes.axvline(section[0]["update"] - 0.5, color=_GREY, linewidth=0.8, linestyle=":", zorder=0)
        # Objectives span few decades: ticks at 1, 2 and 5, written as plain numbers.
        upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        upper.yaxis.set_major_formatter("{x:g}")
        upper.yaxis.set_minor_formatter(NullFormatter())
        _draw_positive(lower, entries, "state_residual", _STATE, "states")
        _draw_positive(lower, entries, "adjoint_residual", _ADJOINT, "adjoints")
        if len(runs) > 1:
            upper.set_title(run)
        upper.legend(loc="upper right", frameon=False)
        if lower.get_legend_handles_labels()[0]:
            # Above the panel: residuals fill it from top to bottom.
            lower.legend(loc="lower right", bbox_to_anchor=(1, 0.98), frameon=False, ncols=2)
        else:
            _note(lower, "no residual above 0 was recorded")
    panels[0, 0].set_ylabel("objective")
    panels[1, 0].set_ylabel("relative residual")
    _save(figure, path)


def _draw_positive(axes: Axes, entries: list[dict], field: str, colour, label: str) -> None:
    if points := [(row["update"], row[field]) for row in entries if (row[field] or 0) > 0]:
        _line(axes, points, colour, label)


def class_map(predicted, true, names: Sequence[str], path: str | os.PathLike) -> None:
    """Picture of the learned classes over the square [-3, 3]^2 beside the true ones.

    For the peaks problem both belong to the points `mesh(n)` of `data.peaks`, in its order and reshaped to (n, n).

    Parameters
    ----------
    predicted, true : array_like of int, shape (n, n)
        Class at every point of a regular grid, both ends included: row i holds y_i, column j holds x_j.
    names : sequence of str
        Names of the classes 0, 1, ... for the legend.
    path : path-like
        The PNG to write, its folder included.

    Raises
    ------
    TypeError
        If the classes are no integers.
    ValueError
        If an array is not square, they differ in shape, or a class has no name.
    """
    maps = {"true": np.asarray(true), "predicted": np.asarray(predicted)}
    size = len(maps["true"])
    for name, values in maps.items():
        if not np.issubdtype(values.dtype, np.integer):
            raise TypeError(f"{name} is of type {values.dtype}, must hold integers 0 .. {len(names) - 1}")
        if values.shape != (size, size) or size < 2:
            raise ValueError(f"{name}.shape={values.shape} must be square and the same for both; use (200, 200)")
        if values.min() < 0 or values.max() >= len(names):
            raise ValueError(f"{name} holds {values.min()} .. {values.max()}, must lie in 0 .. {len(names) - 1}")
    figure = Figure(figsize=(9.0, 5.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    # Each value fills the square around its point, so the outermost reach half a spacing beyond 3.
    end = 3 + 3 / (size - 1)
    # Lightness alone tells the colours apart; for bands of height it rises with them.
    look = {"extent": (-end, end, -end, end), "origin": "lower", "interpolation": "nearest"}
    look |= {"cmap": colormaps["viridis"].resampled(len(names)), "vmin": -0.5, "vmax": len(names) - 0.5}
    agreement = f"learned classes: {100 * np.mean(maps['predicted'] == maps['true']):.1f} % agree"
    for axes, values, title in zip(panels, maps.values(), ("true classes", agreement), strict=True):
        axes.imshow(values, **look)
        axes.set(title=title, xlabel="x", xticks=range(-3, 4))
    panels[0].set_ylabel("y")
    handles = [Patch(color=look["cmap"](k), label=name) for k, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False, title="class")
    _save(figure, path)


def _updates(rows: Sequence[dict]) -> list[dict]:
    return [row for row in rows if row.get("kind") == "update"]


def _runs(rows: Sequence[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Updates of every run there is, the nested one first."""
    updates = _updates(rows)
    if not updates:
        raise ValueError('rows holds no update; pictures need at least one row with "kind": "update"')
    for run in ("nested", "non-nested"):
        if entries := [row for row in updates if row["run"] == run]:
            yield run, entries


def _sections(entries: list[dict]) -> Iterator[tuple[int, list[dict]]]:
    """Updates of one level of the nesting after the other: number of layers, rows."""
    for level in sorted({row["level"] for row in entries}, reverse=True):
        section = [row for row in entries if row["level"] == level]
        yield section[0]["num_layers"], section


def _coloured(run: str, entries: list[dict]):
    """The sections of a run with a colour each: darker the deeper, and red for the non-nested run."""
    sections = list(_sections(entries))
    shades = colormaps["YlGnBu"](np.linspace(0.45, 0.95, len(sections)) if len(sections) > 1 else [0.85])
    return zip(sections, [_RED] * len(sections) if run == "non-nested" else shades, strict=True)


def _line(axes: Axes, points: list[tuple[float, float]], colour, label: str) -> None:
    marker = "o" if len(points) == 1 else None
    axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.6, marker=marker, markersize=4)


def _clean(axes: Axes, xlabel: str) -> None:
    axes.set_xlabel(xlabel)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _note(axes: Axes, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GREY)


def _save(figure: Figure, path: str | os.PathLike) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=_DPI, format="png")
