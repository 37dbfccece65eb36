"""What all pictures share, colors, axes, the file; and maps of classes, over a square and over a scene of pixels."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

# Figures are objects of their own, without pyplot: no global state, and no display is looked for.
DPI = 150
RED = "#c1272d"  # the non-nested run, as in the paper's figure 4
_LOG_FROM = 20.0  # ratio of the largest to the smallest value from which powers of ten are even steps
STATE, ADJOINT, GRAY = "#0072b2", "#e69f00", "0.55"


def line(axes: Axes, points: list[tuple[float, float]], color, label: str) -> None:
    """A line through points, and dots where there are few."""
    marker = "o" if len(points) <= 12 else None
    axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.6, marker=marker, markersize=4)


def clean(axes: Axes, xlabel: str) -> None:
    """Grid and label of an axis, without a frame."""
    axes.set_xlabel(xlabel)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def scale(axes: Axes, values: Iterable[float]) -> None:
    """A logarithmic vertical axis where values span a factor of 20 or more, and ticks that are plain numbers.

    Zeros have no place on it, and are left out.
    """
    values = [value for value in values if np.isfinite(value)]
    positive = [value for value in values if value > 0]
    if not positive or min(values) < 0 or max(positive) < _LOG_FROM * min(positive):
        return
    axes.set_yscale("log", nonpositive="mask")
    decades = np.log10(max(positive) / min(positive))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,), numticks=8))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}".replace("e-0", "e-")))
    axes.yaxis.set_minor_formatter(NullFormatter())


def legend(axes: Axes, *more: Axes) -> None:
    """The legend of an axes, and of others on the same panel, above it: no curve runs through it."""
    named: dict[str, Any] = {}
    for each in (axes, *more):
        handles, labels = each.get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    if named:
        longest = max(len(label) for label in named)
        columns = 1 if longest > 34 else 2 if longest > 17 else 3
        place: dict[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0.0, 1.0), "ncols": columns}
        axes.legend([*named.values()], [*named], frameon=False, borderaxespad=0.2, **place)


def note(axes: Axes, text: str) -> None:
    """A word in the middle of an empty panel."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GRAY)


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a PNG; its folder is made if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")


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
    # Lightness alone tells the colors apart; for bands of height it rises with them.
    look = {"extent": (-end, end, -end, end), "origin": "lower", "interpolation": "nearest"}
    look |= {"cmap": colormaps["viridis"].resampled(len(names)), "vmin": -0.5, "vmax": len(names) - 0.5}
    agreement = f"learned classes: {100 * np.mean(maps['predicted'] == maps['true']):.1f} % agree"
    for axes, values, title in zip(panels, maps.values(), ("true classes", agreement), strict=True):
        axes.imshow(values, **look)
        axes.set(title=title, xlabel="x", xticks=range(-3, 4))
    panels[0].set_ylabel("y")
    handles = [Patch(color=look["cmap"](k), label=name) for k, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(names), frameon=False, title="class")
    save(figure, path)


def scene_map(predicted, true, names: Sequence[str], path: str | os.PathLike) -> None:
    """Picture of a classified scene beside its ground truth.

    Parameters
    ----------
    predicted : array_like of int, shape (rows, columns)
        Class of every pixel.
    true : array_like of int, the same shape
        The same, and -1 where a pixel has no label; such pixels are left white.
    names : sequence of str
        Names of the classes 0, 1, ... for the legend, 20 at most.
    path : path-like
        The PNG to write, its folder included.

    Raises
    ------
    TypeError
        If the classes are no integers.
    ValueError
        If the arrays differ in shape or are no images, or a class has no name.
    """
    predicted, true = np.asarray(predicted), np.asarray(true)
    for name, values, least in (("predicted", predicted, 0), ("true", true, -1)):
        if not np.issubdtype(values.dtype, np.integer):
            raise TypeError(f"{name} is of type {values.dtype}, must hold integers {least} .. {len(names) - 1}")
        if values.ndim != 2 or values.shape != predicted.shape or 0 in values.shape:
            raise ValueError(f"{name}.shape={values.shape} must be (rows, columns), the same for both; use (145, 145)")
        if values.min() < least or values.max() >= len(names):
            raise ValueError(
                f"{name} holds {values.min()} .. {values.max()}, must lie in {least} .. {len(names) - 1}, the names"
            )
    if len(names) > 20:
        raise ValueError(f"names has {len(names)} classes, more than colors; use at most 20")
    figure = Figure(figsize=(9.0, 6.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    colors = ListedColormap(colormaps["tab20"](range(len(names))))
    look = {"cmap": colors, "vmin": -0.5, "vmax": len(names) - 0.5, "interpolation": "nearest"}
    labeled = true >= 0
    share = np.mean(predicted[labeled] == true[labeled]) if labeled.any() else float("nan")
    panels[0].imshow(np.ma.masked_where(~labeled, true), **look)
    panels[0].set(title="ground truth", ylabel="row")
    panels[1].imshow(predicted, **look)
    panels[1].set(title=f"learned: {100 * share:.1f} % of the labeled pixels agree")
    for axes in panels:
        axes.set(xlabel="column")
    handles = [Patch(color=colors(k), label=name) for k, name in enumerate(names)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize="small")
    save(figure, path)
