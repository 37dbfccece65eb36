"""Rows of the study of multilevel training in width: best errors at equal work, and ratios seed by seed.

A row has "settings" (`studies.width.case.runs`), and a "result" with a "curve" of points (`CURVE`), or a "failure".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from studies.rows import Row
from studies.statistics import Summary
from xbraid_py.recipes.options.width import ERRORS
from xbraid_py.run.options import flat

# What a point of a curve consists of.
CURVE = ("cycle", "work", "work_without_tau", "counted_work", "seconds", "loss", *ERRORS)
COUNTINGS = ("work", "work_without_tau", "counted_work")
Point = dict[str, float | None]


def words(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of all groups by their own names alone: no two groups have a name in common."""
    return {name.rpartition(".")[2]: value for name, value in flat(settings).items()}


def points(row: Row) -> list[Point]:
    """The curve of a run; empty for one that failed."""
    return [dict(zip(CURVE, point, strict=True)) for point in row.get("result", {"curve": []})["curve"]]


def judged(row: Row, budget: float, counting: str = "work") -> list[Point]:
    """The points that count at so many work units: the last before each `validate_every` of them, and before their end.

    So all methods are given equally many chances, however they count.
    """
    every, curve, found = row["settings"]["validate_every"], points(row), []
    for number in range(1, math.ceil(budget / every - 1e-9) + 1):
        before = [point for point in curve if point[counting] <= min(number * every, budget) + 1e-6]
        if before and (not found or before[-1] is not found[-1]):
            found.append(before[-1])
    return found


def best(row: Row, name: str, budget: float, counting: str = "work") -> float:
    """The least error of a run within so many work units; infinite for one that failed."""
    values = [point[name] for point in judged(row, budget, counting) if point[name] is not None]
    return min(values, default=math.inf)


def merit(rows: Sequence[Row], budget: float) -> float:
    """How bad a choice is: the median of the best validation errors L2; infinite if a run has failed."""
    values = [best(row, "val_l2", budget) for row in rows]
    return median(values) if values and max(values) < math.inf else math.inf


@dataclass(frozen=True)
class Ratio:
    """A method over a base, seed by seed.

    Attributes
    ----------
    mean, low, high : float
        Geometric mean, and limits of its 95 % confidence interval.
    wins, count : int
        Seeds with a ratio below 1, and seeds of both.
    """

    mean: float
    low: float
    high: float
    wins: int
    count: int

    def __str__(self):
        interval = f" ({self.low:.3g} to {self.high:.3g})" if self.count > 1 else ""
        return f"{self.mean:.3g}{interval}, {self.wins} of {self.count}"

    @property
    def verdict(self) -> str:
        """Wins, loses, or undecided: by the interval."""
        if self.count > 1 and self.high < 1:
            return "wins"
        return "loses" if self.count > 1 and self.low > 1 else "undecided"


def ratios(base: Sequence[Row], other: Sequence[Row], name: str, budget: float, counting: str = "work") -> list[float]:
    """Best errors of the second over those of the first, for each seed of which neither has failed."""
    theirs = {row["settings"]["seed"]: best(row, name, budget, counting) for row in base}
    found = []
    for row in other:
        below, above = theirs.get(row["settings"]["seed"], math.inf), best(row, name, budget, counting)
        if 0 < below < math.inf and 0 < above < math.inf:
            found.append(above / below)
    return found


def ratio(base: Sequence[Row], other: Sequence[Row], name: str, budget: float, counting: str = "work") -> Ratio | None:
    """The same as one number; None without a seed."""
    each = ratios(base, other, name, budget, counting)
    if not each:
        return None
    summary = Summary.of([math.log(value) for value in each])
    limits = (math.exp(value) for value in (summary.mean, summary.low, summary.high))
    return Ratio(*limits, sum(value < 1 for value in each), len(each))
