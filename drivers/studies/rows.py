"""Rows of a study, looked at from several sides: chosen by settings, paired by seed, over work units; and tables.

Runs are of two kinds, "nested" and "non-nested", and have a curve of points (level, num_layers, update, work, seconds,
accuracy).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

Row = dict[str, Any]


def end_of(rows: Sequence[Row]) -> dict[str, Any]:
    """What the rows of a nested iteration say at its end (`xbraid_py.run.engine.rows_of`)."""
    last = rows[-1]
    names = ("val_accuracy", "train_accuracy", "objective", "evaluations", "work", "seconds")
    return {"updates": last["update"], **{name: last[name] for name in names}}


def curve_of(rows: Iterable[Row]) -> list[list[float]]:
    """The curve of a nested iteration: a point for each of its validations."""
    validated = (row for row in rows if "val_accuracy" in row)
    names = ("work", "seconds", "val_accuracy")
    return [
        [row["level"], row["num_layers"], row["update"], *(round(row[name], 4) for name in names)] for row in validated
    ]


def where(rows: Iterable[Row], **wanted: Any) -> list[Row]:
    """The rows with these settings."""
    return [row for row in rows if all(row["settings"].get(name) == value for name, value in wanted.items())]


def accuracies(rows: Iterable[Row]) -> list[float]:
    """Validation accuracies at the ends of runs, in per cent."""
    return [100 * row["result"]["val_accuracy"] for row in rows]


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown: the first column to the left, all others to the right."""
    rows = [head, ["---"] + ["---:"] * (len(head) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def paired(rows: Sequence[Row], value: Callable[[Row], float]) -> list[float]:
    """Nested less non-nested of the same settings, seed by seed."""

    def of(run: str) -> dict:
        chosen = where(rows, run=run)
        return {tuple((n, str(v)) for n, v in sorted(r["settings"].items()) if n != "run"): value(r) for r in chosen}

    nested, other = of("nested"), of("non-nested")
    return [nested[name] - other[name] for name in nested if name in other]


def work_unit(rows: Sequence[Row]) -> float:
    """Seconds of a work unit: mean time of a non-nested update (paper 001, section 3)."""
    chosen = where(rows, run="non-nested")
    return sum(row["result"]["seconds"] for row in chosen) / max(1, sum(row["result"]["updates"] for row in chosen))


WORK, SECONDS = 3, 4  # places in a point of a curve


def accuracy_at(row: Row, units: float, unit: float, place: int = SECONDS) -> float:
    """Accuracy in per cent that a run has after so many work units, each of `unit` seconds or counted units."""
    reached = [point for point in row["result"]["curve"] if point[place] / unit <= units]
    return 100 * reached[-1][5] if reached else 0.0
