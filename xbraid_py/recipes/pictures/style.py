"""What all pictures share: colors, axes, the file."""

from __future__ import annotations

import os
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Figures are objects of their own, without pyplot: no global state, and no display is looked for.
DPI = 150
RED = "#c1272d"  # the non-nested run, as in the paper's figure 4
STATE, ADJOINT, GRAY = "#0072b2", "#e69f00", "0.55"


def line(axes: Axes, points: list[tuple[float, float]], color, label: str) -> None:
    """A line through points; a dot where there is only one."""
    marker = "o" if len(points) == 1 else None
    axes.plot(*zip(*points, strict=True), color=color, label=label, linewidth=1.6, marker=marker, markersize=4)


def clean(axes: Axes, xlabel: str) -> None:
    """Grid and label of an axis, without a frame."""
    axes.set_xlabel(xlabel)
    axes.grid(color="0.9", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def note(axes: Axes, text: str) -> None:
    """A word in the middle of an empty panel."""
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=GRAY)


def save(figure: Figure, path: str | os.PathLike) -> None:
    """Write a PNG; its folder is made if there is none."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, format="png")
