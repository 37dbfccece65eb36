"""Pictures of multi-level residual networks: errors over epochs and over seconds (paper 003, figure 6)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from studies.multi_level.tables import CURVE
from studies.rows import Row
from xbraid_py.recipes.pictures.style import ADJOINT, GRAY, RED, STATE, clean, legend, line, note, save

_COLORS = {"multilevel": STATE, "last": RED, "first": ADJOINT}
_OVER = {"epoch": "epochs", "seconds": "seconds of training", "block_evaluations": "block evaluations"}


def figure6(
    rows: Sequence[Row], path: str | os.PathLike, over: Sequence[str] = ("epoch", "seconds"), log: bool = False
) -> None:
    """Picture of training (dotted) and test errors of the models; lines are means over the runs of a model.

    Vertical lines are where cycles begin.

    Parameters
    ----------
    rows : sequence of Row
        Runs with "settings", that differ in "model" and "seed", and a "result" with a "curve" of `CURVE`.
    path : path-like
        The PNG to write, its folder included.
    over : sequence of str
        Field of the horizontal axis of each panel: epoch, seconds, block_evaluations.
    log : bool
        Errors on a logarithmic scale.

    Raises
    ------
    ValueError
        If there is no finished run.
    """
    curves: dict[str, list[list[dict]]] = {}
    for row in rows:
        if "result" in row:
            points = [dict(zip(CURVE, point, strict=True)) for point in row["result"]["curve"]]
            curves.setdefault(row["settings"]["model"], []).append(points)
    if not curves:
        raise ValueError("rows holds no finished run; pictures need at least one")
    figure = Figure(figsize=(4.8 * len(over), 3.8), layout="constrained")
    panels = figure.subplots(1, len(over), sharey=True, squeeze=False)[0]
    for axes, field in zip(panels, over, strict=True):
        for model, runs in curves.items():
            _draw(axes, mean_curve(runs), field, model)
        clean(axes, _OVER[field])
        if field == "epoch":
            cycles = next(iter(curves.values()))[0]
            for before, after in zip(cycles, cycles[1:], strict=False):
                if after["cycle"] != before["cycle"]:
                    axes.axvline(before["epoch"], color=GRAY, linewidth=0.7, linestyle="--")
        if log:
            axes.set_yscale("log")
    panels[0].set_ylabel("error, %")
    legend(panels[0])
    save(figure, path)


def mean_curve(runs: Sequence[Sequence[Mapping]]) -> list[dict]:
    """Means over runs, epoch by epoch as far as all of them have come; None where one of them has no number."""
    found = []
    for points in zip(*runs, strict=False):
        columns = {name: [point[name] for point in points] for name in CURVE}
        found.append({name: None if None in values else fmean(values) for name, values in columns.items()})
    return found


def _draw(axes: Axes, curve: Sequence[Mapping], field: str, model: str) -> None:
    for name, label, style in (("train_error", "train", ":"), ("val_error", "test", "-")):
        points = [(point[field], 100 * point[name]) for point in curve if point[name] is not None]
        if not points:
            note(axes, f"{model}: no {label} error")
            continue
        line(axes, points, _COLORS.get(model, "k"), f"{model}, {label}")
        axes.lines[-1].set_linestyle(style)
