"""Curves of training over epochs, in cycles of the learning rate."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure

from xbraid_py.recipes.pictures.style import GRAY, RED, STATE, clean, line, save

_CURVES = (
    ("loss", "loss", STATE, "-", 1),
    ("val_loss", "validation loss", RED, "-", 1),
    ("train_error", "error", STATE, ":", 100),
    ("val_error", "validation error", RED, ":", 100),
)


def over_epochs(rows: Sequence[Mapping[str, Any]], path: str | os.PathLike) -> None:
    """Picture of losses (solid lines, left axis) and shares of wrong answers (dotted lines, right axis) over epochs.

    Vertical lines are where cycles begin, with the blocks of their networks.

    Parameters
    ----------
    rows : sequence of mapping
        Updates of a run, with "epoch", "cycle", "blocks", and as far as they have them the numbers of the curves:
        "loss", "train_error", "val_loss", "val_error".
    path : path-like
        The PNG to write, its folder included.

    Raises
    ------
    ValueError
        If there is no row.
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
            axes.lines[-1].set_linestyle(style)
    begins = [rows[0], *(row for before, row in zip(rows, rows[1:], strict=False) if row["cycle"] != before["cycle"])]
    for row in begins:
        left.axvline(row["epoch"] - 1, color=GRAY, linewidth=0.7, linestyle="--")
        blocks = "-".join(map(str, row["blocks"]))
        left.annotate(blocks, (row["epoch"] - 1, 1.0), xycoords=("data", "axes fraction"), color=GRAY, va="bottom")
    clean(left, "epochs")
    left.xaxis.get_major_locator().set_params(integer=True)
    left.set_ylabel("loss (solid)")
    right.set(ylabel="error, % (dotted)", ylim=(0, None))
    right.spines["top"].set_visible(False)
    lines = [*left.lines, *right.lines]
    named = {each.get_label(): each for each in lines if not str(each.get_label()).startswith("_")}
    right.legend(named.values(), named.keys(), fontsize="x-small")  # the axes that are drawn last
    save(figure, path)
