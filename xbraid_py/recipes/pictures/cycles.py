"""Curves of multilevel minimization: objective and validation accuracy over cycles (paper 000, figures 4 and 5)."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from xbraid_py.recipes.pictures.style import clean, save

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
