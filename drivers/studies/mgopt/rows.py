"""Rows of the study of MG/OPT in depth: where runs reach a goal, and speed-ups seed by seed.

A row has "settings" (`studies.mgopt.case.runs`), and a "result" with a "curve" of points (`CURVE`), or a "failure".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean
from typing import Any

from studies.rows import Row
from studies.statistics import Summary

# What a point of a curve consists of.
CURVE = ("cycle", "work", "counted_work", "seconds", "loss", "train_accuracy", "val_accuracy")
Point = dict[str, float]
MINIBATCHES = 60  # of 1,000 images, in an epoch of MNIST


def words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all levels by their own names alone; "search" is the line search on the coarse correction."""
    mgopt, optim = settings["mgopt"], settings["mgopt"]["optim"]
    alone = {"method": optim["method"][0], "learning_rate": optim["learning_rate"][0], "search": mgopt["line_search"]}
    return {**settings, **mgopt, **optim, **alone}


def groups(rows: Sequence[Row], *names: str) -> dict[tuple, list[Row]]:
    """The rows by the settings of these names, in the order of their first appearance."""
    found: dict[tuple, list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row["settings"][name] for name in names), []).append(row)
    return found


def points(row: Row) -> list[Point]:
    """The curve of a run; empty for one that failed."""
    return [dict(zip(CURVE, point, strict=True)) for point in row.get("result", {"curve": []})["curve"]]


def at_goal(row: Row, goal: float | None = None) -> Point | None:
    """Where a run first has a validation accuracy, that of its settings if nothing is given; None if it never has."""
    goal = row["settings"]["goal"] if goal is None else goal
    return next((point for point in points(row) if point["val_accuracy"] >= goal), None)


def reached(rows: Sequence[Row], goal: float | None = None) -> dict[int, Point]:
    """By seed, for the runs that reach the goal: where."""
    found = {row["settings"]["seed"]: at_goal(row, goal) for row in rows}
    return {seed: point for seed, point in found.items() if point is not None}


def best(row: Row) -> float:
    """The highest validation accuracy of a run; 0 for one that failed."""
    return max((point["val_accuracy"] for point in points(row)), default=0.0)


def merit(rows: Sequence[Row]) -> tuple[int, float, float]:
    """How good a choice is, the larger the better: runs that reach the goal, then little work, then accuracy."""
    found = reached(rows)
    spent = mean(point["work"] for point in found.values()) if found else 0.0
    return len(found), -spent, mean(best(row) for row in rows)


def ratios(base: dict[int, Point], other: dict[int, Point], field: str) -> list[float]:
    """Of a field of the points of two methods, the first over the second, for each seed that both have reached."""
    return [base[seed][field] / other[seed][field] for seed in base if seed in other and other[seed][field] > 0]


def speedup(base: dict[int, Point], other: dict[int, Point], field: str) -> str:
    """Ratio of the means over the seeds that both have reached, and its range seed by seed."""
    each = ratios(base, other, field)
    if not each:
        return ""
    common = [seed for seed in base if seed in other and other[seed][field] > 0]
    whole = sum(base[seed][field] for seed in common) / sum(other[seed][field] for seed in common)
    return f"{whole:.2f} ({min(each):.2f} to {max(each):.2f})"


def spread(found: dict[int, Point], field: str, digits: int = 1) -> str:
    """Mean and standard deviation of a field."""
    if not found:
        return ""
    summary = Summary.of([point[field] for point in found.values()])
    return f"{summary.mean:.{digits}f} ± {summary.deviation:.{digits}f}"
