"""Tables of multi-level residual networks: test errors, training times and what is saved (paper 003, tables 3 and 4).

A row has "settings" (data, model, blocks, epochs, wide, filters, seed and so on) and a "result" (see `result_of`), or a
"failure".
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from studies.rows import Row, table
from studies.statistics import Summary

# What a point of a curve consists of: one for each epoch. The images of the validations are the test images.
CURVE = (
    "epoch",
    "cycle",
    "learning_rate",
    "loss",
    "train_error",
    "val_loss",
    "val_error",
    "seconds",
    "block_evaluations",
)
_WIDTHS = {(16, 32, 64): "", (32, 64, 128): "W"}
_TITLES = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "stl10": "STL-10"}
# Test error in per cent and minutes on a GTX 1080, from tables 3 and 4, by data set in the order of `_TITLES`.
PAPER = {
    "ResNet-14": ((9.75, 38), (33.34, 38), (27.78, 33)),
    "ResNet-50": ((7.58, 114), (28.64, 115), (25.95, 114)),
    "ResNet-50-i": ((7.10, 67), (28.71, 68), (25.98, 68)),
    "ResNet-32": ((7.74, 76), (29.96, 74), (26.02, 71)),
    "ResNet-122": ((6.47, 266), (26.74, 266), (25.16, 266)),
    "ResNet-122-i": ((6.56, 154), (26.81, 154), (24.36, 162)),
    "WResNet-14": ((7.38, 51), (27.92, 51), (24.58, 63)),
    "WResNet-50": ((5.87, 174), (24.49, 173), (23.82, 222)),
    "WResNet-50-i": ((5.95, 101), (24.92, 101), (22.82, 131)),
    "WResNet-32": ((6.29, 111), (25.32, 111), (23.51, 136)),
    "WResNet-122": ((5.38, 406), (23.11, 406), (22.00, 516)),
    "WResNet-122-i": ((5.46, 239), (23.04, 237), (22.65, 307)),
}
_HEAD = (
    "Model",
    "# Blocks",
    "Data",
    "Runs",
    "Test error, %",
    "Paper",
    "Time",
    "Paper",
    "Time saved, %",
    "Block evaluations saved, %",
    "Paper, time saved, %",
)


def result_of(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The result of a run from its epochs, mappings with the names of `CURVE`; without a validation, those of it lack.

    Returns
    -------
    dict
        "val_error" at the end, "best_val_error", "train_error" of the last epoch, "seconds" of training,
        "block_evaluations", and the "curve", lists of numbers in the order of `CURVE`.
    """
    if not points:
        raise ValueError("points holds no epoch; a run has at least one")
    tested = [point["val_error"] for point in points if point.get("val_error") is not None]
    last = points[-1]
    return {
        "val_error": tested[-1] if tested else None,
        "best_val_error": min(tested, default=None),
        "train_error": last["train_error"],
        "seconds": last["seconds"],
        "block_evaluations": last["block_evaluations"],
        "curve": [[_rounded(point.get(name)) for name in CURVE] for point in points],
    }


def name_of(settings: Mapping[str, Any]) -> str:
    """What the paper calls a model: ResNet-50-i for one that grows to 8-8-8 blocks; other filters are added."""
    last = _blocks(settings)[-1]
    filters = settings.get("filters") or ((32, 64, 128) if settings.get("wide") else (16, 32, 64))
    prefix = _WIDTHS.get(tuple(filters))
    # Two convolutions a block, the first one and the linear map.
    name = f"{prefix or ''}ResNet-{2 * sum(last) + 2}" + "-i" * (settings["model"] == "multilevel")
    return name if prefix is not None else f"{name} ({'-'.join(map(str, filters))})"


def saved(rows: Sequence[Row], field: str = "seconds") -> dict[str, list[float]]:
    """Shares of a field of the results that models save against the model last, run by run with the same settings.

    Parameters
    ----------
    rows : sequence of Row
    field : str
        Seconds or block_evaluations.

    Returns
    -------
    dict of str to list of float
        By `group`, in the order of the rows; without an entry where there is no such run of the model last.
    """
    base = {_but_model(row): row["result"][field] for row in _good(rows) if row["settings"]["model"] == "last"}
    found: dict[str, list[float]] = {}
    for row in _good(rows):
        if row["settings"]["model"] != "last" and base.get(_but_model(row)):
            found.setdefault(group(row), []).append(1.0 - row["result"][field] / base[_but_model(row)])
    return found


def group(row: Row) -> str:
    """What the runs of a line of the table have in common: all settings but the seed."""
    return json.dumps({name: value for name, value in row["settings"].items() if name != "seed"}, sort_keys=True)


def page(rows: Sequence[Row]) -> str:
    """The table as Markdown, a line for each model, with what failed below it; means and standard deviations.

    The paper's figures stand beside models of the paper, whatever the images and epochs here.

    Raises
    ------
    ValueError
        If there is no row.
    """
    if not rows:
        raise ValueError("rows holds no run; a table needs at least one")
    seconds, work = saved(rows), saved(rows, "block_evaluations")
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(group(row), []).append(row)
    lines = []
    for key, runs in groups.items():
        settings, good = runs[0]["settings"], _good(runs)
        name, data = name_of(settings), settings["data"]
        blocks = ["-".join(map(str, each)) for each in _blocks(settings)]
        paper = _paper(name, data)
        base = _paper(name.removesuffix("-i"), data)
        errors = [row["result"]["val_error"] for row in good if row["result"]["val_error"] is not None]
        lines.append(
            (
                name,
                blocks[-1] if len(set(blocks)) == 1 else f"{blocks[0]} to {blocks[-1]}",
                _TITLES.get(data, data),
                str(len(good)),
                _spread([100 * error for error in errors], 2),
                f"{paper[0]:.2f}" if paper else "",
                _duration([row["result"]["seconds"] for row in good]),
                f"{paper[1]} min" if paper else "",
                _spread([100 * share for share in seconds.get(key, ())], 1),
                _spread([100 * share for share in work.get(key, ())], 1),
                f"{100 * (1 - paper[1] / base[1]):.0f}" if paper and base and name.endswith("-i") else "",
            )
        )
    failures = [
        f"{name_of(row['settings'])}, seed {row['settings']['seed']}: {row['failure']}"
        for row in rows
        if "failure" in row
    ]
    return "\n".join([table(_HEAD, lines), *(["", *failures] if failures else [])]) + "\n"


def _blocks(settings: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Of the first and of the last cycle."""
    first = tuple(settings["blocks"])
    last = tuple(count * 2 ** (len(settings["epochs"]) - 1) for count in first)
    return {"first": [first], "last": [last]}.get(settings["model"], [first, last])


def _but_model(row: Row) -> str:
    return json.dumps({name: value for name, value in row["settings"].items() if name != "model"}, sort_keys=True)


def _good(rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if "result" in row]


def _paper(name: str, data: str) -> tuple[float, int] | None:
    return dict(zip(_TITLES, PAPER.get(name, ()), strict=False)).get(data)


def _spread(values: Sequence[float], digits: int) -> str:
    if not values:
        return ""
    summary = Summary.of(values)
    return f"{summary.mean:.{digits}f}" + (f" ± {summary.deviation:.{digits}f}" if len(values) > 1 else "")


def _duration(seconds: Sequence[float]) -> str:
    if not seconds:
        return ""
    minutes = sum(seconds) / len(seconds) >= 120.0
    return _spread([each / 60 if minutes else each for each in seconds], 1) + (" min" if minutes else " s")


def _rounded(value: float | None) -> float | None:
    """Six digits are more than any table shows; whole numbers stay."""
    return float(f"{value:.6g}") if isinstance(value, float) else value
