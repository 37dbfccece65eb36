"""The picture of a run on minibatches, from its record."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and validations over the updates, and below them the estimated error of the gradients, as a PNG.

    Parameters
    ----------
    rows : sequence of mapping
        A record, as `xbraid_py.run.record.read` gives it.
    path : Path
        The file; its folder is made if there is none.
    """
    from matplotlib.figure import Figure  # takes its time to load: on one rank only

    updates = [row for row in rows if row["kind"] == "update"]
    at = [row["update"] for row in updates]
    figure = Figure(figsize=(7.0, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    upper.plot(at, [row["loss"] for row in updates], color="#0072b2", linewidth=0.9, label="loss of a minibatch")
    upper.set(ylabel="loss", yscale="log")
    for name, title, color in (("val_accuracy", "accuracy", "#c1272d"), ("val_loss", "loss", "#009e73")):
        points = [(row["update"], row[name]) for row in updates if row.get(name) is not None]
        if not points:
            continue
        # Losses share the axis of the loss; accuracies have their own on the right.
        axes = upper if title == "loss" else upper.twinx()
        axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, label=f"validation {title}")
        if axes is not upper:
            axes.set_ylabel(f"validation {title}", color=color)
            axes.set_ylim(top=1.0)
    upper.legend(loc="upper right", frameon=False)
    solved = [(row["update"], stack) for row in updates for stack in row["stacks"]]
    for measured, marker, label in ((False, ".", "estimated"), (True, "o", "measured")):
        points = [(n, s["gradient_error"]) for n, s in solved if s["measured"] is measured and s["gradient_error"]]
        if points:
            lower.plot(*zip(*points, strict=True), marker, color="#e69f00" if measured else "0.5", label=label)
            lower.set_yscale("log")
    if lower.lines:
        lower.legend(loc="upper right", frameon=False)
    lower.set(xlabel="update", ylabel="gradient error")
    for axes in (upper, lower):
        axes.grid(color="0.9", linewidth=0.7)
        axes.spines["top"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
