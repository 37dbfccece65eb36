"""Pictures of multilevel training in width: errors over work units, and a solution beside what was learned of it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from xbraid_py.recipes.pictures.style import clean, line, save

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
    for axes, (norm, title) in zip(figure.subplots(1, 2), _PANELS, strict=True):
        for (name, rows), color in zip(runs.items(), shades, strict=True):
            for samples, style, kind in lines:
                known = [(row[over], row[f"{samples}_{norm}"]) for row in rows if row[f"{samples}_{norm}"] is not None]
                if known:
                    work, values = zip(*known, strict=True)
                    line(axes, list(zip(work, smoothed(values, window), strict=True)), color, f"{name} {kind}".strip())
                    axes.lines[-1].set_linestyle(style)
        clean(axes, "work units" + " without tau" * (over == "work_without_tau"))
        axes.set_yscale("log")
        axes.set_title(title, fontsize="medium")
    # Below the panels: in them there is no room for many long names.
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize="x-small", ncols=2)
    save(figure, path)


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(np.asarray(values, dtype=float))])
    ends = np.arange(1, len(sums))
    starts = np.maximum(ends - window, 0)
    return ((sums[ends] - sums[starts]) / (ends - starts)).tolist()


def fields(exact, learned, path: str | os.PathLike) -> None:
    """Picture of a solution on a square, of what a network makes of it, and of the difference.

    Parameters
    ----------
    exact, learned : array_like, shape (n, n)
        Rows are y, columns x.
    path : path-like
        The PNG to write, its folder included.

    Raises
    ------
    ValueError
        If they are not square and of one shape.
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
