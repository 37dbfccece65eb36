"""Curves of runs of every kind: accuracies, errors, objectives and residuals over updates, work and time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from xbraid_py.recipes.pictures.style import ADJOINT, GRAY, RED, STATE, clean, legend, line, note, save, scale


def accuracy_over_work(rows: Sequence[dict], path: str | os.PathLike, unit: float | None = None) -> None:
    """Picture of the validation accuracy over work units (the paper's figure 4).

    One line for every level of the nesting, colored by depth, and a red one for the non-nested run, if there is one: on
    the left over measured work units (`wall_work_units`), on the right over counted ones.

    Parameters
    ----------
    rows : sequence of dict
        Records of a run, or of a nested and a non-nested one; `ValueError` if there is no update among them.
    path : path-like
        The PNG to write, its folder included.
    unit : float, optional
        Seconds of a measured work unit, for rows that are not all updates of a run.
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
        legend(panels[0])
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

    One column of panels for every run, with a thin line where the network was refined; arguments as of
    `accuracy_over_work`.
    """
    runs = list(runs_of(rows))
    figure = Figure(figsize=((8.0, 10.0)[len(runs) - 1], 5.2), layout="constrained")
    panels = figure.subplots(2, len(runs), sharex="col", sharey="row", squeeze=False)
    for (upper, lower), (run, entries) in zip(panels.T, runs, strict=True):
        for (num_layers, section), color in _colored(run, entries):
            _draw_positive(upper, section, "objective", color, f"{num_layers} layers")
        for axes in (upper, lower):
            clean(axes, "update" if axes is lower else "")
            axes.locator_params(axis="x", integer=True)
            for _, section in list(sections_of(entries))[1:]:
                axes.axvline(section[0]["update"] - 0.5, color=GRAY, linewidth=0.8, linestyle=":", zorder=0)
        scale(upper, [row["objective"] for row in entries])
        _draw_positive(lower, entries, "state_residual", STATE, "states")
        _draw_positive(lower, entries, "adjoint_residual", ADJOINT, "adjoints")
        if len(runs) > 1:
            upper.set_title(run, pad=20 + 18 * -(-len(upper.lines) // 3))  # above the legend
        legend(upper)
        residuals = [value for each in lower.lines for value in each.get_ydata()]
        scale(lower, [value for value in residuals if value > 0])
        if lower.get_legend_handles_labels()[0]:
            legend(lower)
        else:
            lower.set_yticks([])
            note(lower, "the states are exact: no residual above 0 was recorded")
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
    """Measured work after every update, in the order of the rows, in the paper's unit (paper 001, section 3).

    The unit is the average wall-clock time of an update of the non-nested run; without such a run, that of an update on
    the finest level (0) of the nested one. `seconds` of a row counts the training time of its own run, from its start
    to the end of the update. None if no update can serve as the unit; `ValueError` if there is none.
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


def updates_of(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
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
        Rows of each run (at least one) by its name for the legend, with `loss`, `val_accuracy` and what `over` names.
    path : path-like
        The PNG to write, its folder included.
    over : {"cycle", "work", "seconds"}
        The horizontal axis; `ValueError` for another word.
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
    legend(left)
    save(figure, path)


def picture(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Training on minibatches over the updates of a record, as a PNG: a panel for each quantity that there is.

    Losses of minibatches and of validations; accuracies; the error of gradients, estimated at every update and measured
    at some.
    """
    updates = updates_of(rows)

    def of(name: str, factor: float = 1.0) -> list[tuple[float, float]]:
        return [(row["update"], factor * row[name]) for row in updates if row.get(name) is not None]

    solved = [(row["update"], stack) for row in updates for stack in row.get("stacks") or [row]]
    errors = {
        measured: [(n, each["gradient_error"]) for n, each in solved if _has_error(each, measured)]
        for measured in (False, True)
    }
    panels = [
        (
            "loss",
            [(of("loss"), STATE, "of a minibatch, training"), (of("val_loss"), RED, "of all samples, validation")],
        ),
        (
            "accuracy (%)",
            [(of("train_accuracy", 100), STATE, "training"), (of("val_accuracy", 100), RED, "validation")],
        ),
        ("gradient error,\nrelative", [(errors[False], GRAY, "estimated"), (errors[True], ADJOINT, "measured")]),
    ]
    panels = [(title, [curve for curve in curves if curve[0]]) for title, curves in panels]
    panels = [(title, curves) for title, curves in panels if curves]
    figure = Figure(figsize=(7.0, 0.8 + 2.2 * len(panels)), layout="constrained")
    for axes, (title, curves) in zip(
        figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0], panels, strict=True
    ):
        for points, color, label in curves:
            if "error" in title:
                axes.plot(*zip(*points, strict=True), "o", color=color, markersize=3, label=label)
            else:
                line(axes, points, color, label)
        clean(axes, "update" if (title, curves) == panels[-1] else "")
        axes.set_ylabel(title)
        axes.locator_params(axis="x", integer=True)
        scale(axes, [value for points, _, _ in curves for _, value in points])
        legend(axes)
    save(figure, path)


def _has_error(solved: Mapping[str, Any], measured: bool) -> bool:
    return bool(solved.get("gradient_error")) and bool(solved.get("measured")) is measured


_CURVES = (
    ("loss", "loss", STATE, "-", 1),
    ("val_loss", "validation loss", RED, "-", 1),
    ("train_error", "error", STATE, ":", 100),
    ("val_error", "validation error", RED, ":", 100),
)


def over_epochs(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Picture of losses (solid lines, left axis) and shares of wrong answers (dotted lines, right axis) over epochs.

    Vertical lines are where cycles begin, with the blocks of their networks. Rows are updates of a run, at least one,
    with "epoch", "cycle", "blocks", and as far as they have them "loss", "train_error", "val_loss", "val_error"; the
    PNG `path` is written, its folder included.
    """
    if not rows:
        raise ValueError("rows holds no epoch; a picture needs at least one")
    figure = Figure(figsize=(6.0, 3.8), layout="constrained")
    left = figure.subplots()
    right = left.twinx()
    for name, label, color, style, factor in _CURVES:
        axes = right if name.endswith("error") else left
        points = [(row["epoch"], factor * row[name]) for row in rows if row.get(name) is not None]
        if points:
            line(axes, points, color, label)
            axes.lines[-1].set(linestyle=style)
    begins = [rows[0], *(row for before, row in zip(rows, rows[1:], strict=False) if row["cycle"] != before["cycle"])]
    for row in begins:
        left.axvline(row["epoch"] - 1, color=GRAY, linewidth=0.7, linestyle="--")
        blocks = "-".join(map(str, row["blocks"]))
        left.annotate(
            blocks,
            (row["epoch"] - 1, 1.0),
            xycoords=("data", "axes fraction"),
            color=GRAY,
            va="top",
            xytext=(3, -1),
            textcoords="offset points",
        )
    clean(left, "epochs")
    left.locator_params(axis="x", integer=True)
    left.set_ylabel("loss (solid)")
    right.set(ylabel="error, % (dotted)", ylim=(0, None))
    right.spines["top"].set_visible(False)
    legend(left, right)
    save(figure, path)


_PANELS = (("l2", "L2: mean square error"), ("linf", "L∞: largest error"))


def over_work(
    runs: Mapping[str, Sequence[dict]],
    path: str | os.PathLike,
    over: str = "work",
    lines: Sequence[tuple[str, str, str]] = (("val", "-", "validation"), ("train", ":", "training")),
    window: int = 1,
) -> None:
    """Picture of the errors L2 (left) and Linf (right) over work units.

    Parameters
    ----------
    runs : mapping of str to sequence of dict
        Rows of each run by its name for the legend, with errors such as `val_l2` and `train_linf`.
    path : path-like
        The PNG to write, its folder included.
    over : str
        Field of the horizontal axis: work, work_without_tau or counted_work.
    lines : sequence of (samples, style, name)
        Which errors, such as `("aux_val", "--", "auxiliary")`; those of which all values are None are left out.
    window : int
        Points of the moving mean.

    Raises
    ------
    ValueError
        If there is no run.
    """
    if not runs:
        raise ValueError("runs holds no run; pictures need at least one")
    entries = len(runs) * len(lines)
    figure = Figure(figsize=(9.0, 3.4 + 0.09 * entries), layout="constrained")
    shades = colormaps["viridis"](np.linspace(0.0, 0.85, len(runs)))
    panels = figure.subplots(1, 2)
    for axes, (norm, title) in zip(panels, _PANELS, strict=True):
        for (name, rows), color in zip(runs.items(), shades, strict=True):
            for samples, style, kind in lines:
                known = [(row[over], row[f"{samples}_{norm}"]) for row in rows if row[f"{samples}_{norm}"] is not None]
                if known:
                    work, values = zip(*known, strict=True)
                    line(axes, list(zip(work, smoothed(values, window), strict=True)), color, f"{name} {kind}".strip())
                    axes.lines[-1].set(linestyle=style)
        clean(axes, "work units" + " without tau" * (over == "work_without_tau"))
        scale(axes, [value for each in axes.lines for value in each.get_ydata()])
        axes.set_title(title)
    # Below the panels: in them there is no room for many long names.
    handles, labels = panels[-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize="small", ncols=2)
    save(figure, path)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def fields(exact, learned, path: str | os.PathLike) -> None:
    """Picture of a solution on a square, (n, n) with rows y, of what a network makes of it, and of the difference.

    The PNG `path` is written, its folder included. Raises `ValueError` if they are not square and of one shape.
    """
    exact, learned = np.asarray(exact, dtype=float), np.asarray(learned, dtype=float)
    if exact.ndim != 2 or exact.shape[0] != exact.shape[1] or exact.shape != learned.shape:
        raise ValueError(
            f"exact.shape={exact.shape} and learned.shape={learned.shape} must be square and the same; use (32, 32)"
        )
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    low, high = min(exact.min(), learned.min()), max(exact.max(), learned.max())
    largest = float(np.abs(learned - exact).max()) or 1.0
    panels = (
        (exact, "exact", {"vmin": low, "vmax": high, "cmap": "viridis"}),
        (learned, "learned", {"vmin": low, "vmax": high, "cmap": "viridis"}),
        (learned - exact, "difference", {"vmin": -largest, "vmax": largest, "cmap": "RdBu_r"}),
    )
    for axes, (values, title, look) in zip(figure.subplots(1, 3), panels, strict=True):
        image = axes.imshow(values, origin="lower", extent=(0, 1, 0, 1), **look)
        axes.set(title=title, xlabel="x", xticks=(0, 1), yticks=(0, 1))
        figure.colorbar(image, ax=axes, shrink=0.85)
    save(figure, path)
