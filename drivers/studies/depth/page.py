"""The page of the study of training loops over depth, from the rows of its runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from studies.depth.options import BATCHES, RATES, VALUES
from studies.rows import Row, table, where
from studies.statistics import Summary
from studies.study import PAGE

_TITLES = {
    "digits": "MNIST, convolutional layers",
    "batches": "MNIST, convolutional layers, larger minibatches",
    "text": "Text of Python's manual, a transformer",
}
_NAMES = {"adam": "AdamW", "sgd": "gradient descent"}
_LOOPS = {"plain": "all layers from the start", "nested": "nested iteration"}
# What is shown of a value, and the factor that makes it so: per cent, or nats a character.
_ACCURACY = ("test accuracy, %", 100.0, 2)
_SHOWN = {"digits": _ACCURACY, "batches": _ACCURACY, "text": ("validation loss, nats", 1.0, 3)}
_WORK, _UPDATES, _SECONDS, _VALUE = range(4)


def write(parts: Mapping[str, Sequence[Row]], out: Path) -> None:
    """Write `study.md`.

    Parameters
    ----------
    parts : mapping of str to sequence of dict
        Rows of the parts "tuning" and "compared", as `studies.study.Study.run` yields them.
    out : Path
    """
    rows = [row for each in parts.values() for row in each]
    failed = sum("failure" in row for row in rows)
    said = [f"{len(rows)} runs, {failed} failed. ± is a standard deviation, in brackets is a 95 % interval."]
    compared = parts.get("compared", ())
    for problem, title in _TITLES.items():
        for optimizer, name in _NAMES.items():
            chosen = where(compared, problem=problem, optimizer=optimizer)
            if chosen:
                said += [f"## {title}, {name}", _sizes(chosen[0]), _compared(chosen)]
                tuning = where(parts.get("tuning", ()), problem=problem, optimizer=optimizer)
                said += [_by_rate(tuning)] if tuning else []
    out.mkdir(parents=True, exist_ok=True)
    (out / PAGE).write_text("\n\n".join(part for part in said if part) + "\n", encoding="utf-8")


def cases(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The runs of each loop, by its name; those that failed are left out."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(name_of(row), []).extend([row] if "result" in row else [])
    return found


def name_of(row: Row) -> str:
    """How a loop is called."""
    settings = row["settings"]
    name = _LOOPS.get(settings["loop"], f"MG/OPT {settings['loop']}")
    return name + ", line search" * settings["line_search"]


def differences(rows: Sequence[Row], base: Sequence[Row], value: str) -> list[float]:
    """Of the value at the end, seed by seed."""
    others = {row["settings"]["seed"]: row["result"][value] for row in base}
    pairs = [(row["result"][value], others.get(row["settings"]["seed"])) for row in rows]
    return [ours - theirs for ours, theirs in pairs if theirs is not None]


def _sizes(row: Row) -> str:
    settings = row["settings"]
    return (
        f"{settings['num_layers']} layers, {settings['work']:g} work units (gradients of all layers, on a minibatch of "
        f"{BATCHES[settings['problem']]}). Seconds are those of a core on updates; other programs ran beside it. "
        f"The last column is of the last validation in the mean time of the plain loop, and five percent more."
    )


def _compared(rows: Sequence[Row]) -> str:
    problem = rows[0]["settings"]["problem"]
    (value, _), (shown, factor, digits) = VALUES[problem], _SHOWN[problem]
    loops = cases(rows)
    plain = loops["all layers from the start"]
    lines = []
    for name, found in loops.items():
        if not found:
            lines.append([name, "", "", "", "failed", "", "", "", ""])
            continue
        ends = Summary.of([factor * row["result"][value] for row in found])
        half = fmean(factor * row["result"]["curve"][_middle(row)][_VALUE] for row in found)
        apart = ""
        if found is not plain and (pairs := differences(found, plain, value)):
            apart = Summary.of([factor * each for each in pairs])
            apart = f"{apart.mean:+.{digits}f} ({apart.low:+.{digits}f} to {apart.high:+.{digits}f})"
        seconds = fmean(row["result"]["seconds"] for row in found)
        allowed = fmean(row["result"]["seconds"] for row in plain) if plain else float("nan")
        within = [factor * each for row in found if (each := _within(row, 1.05 * allowed)) is not None]
        lines.append(
            [
                name,
                f"{found[0]['settings']['learning_rate']:g}",
                f"{fmean(row['result']['updates'] for row in found):.0f}",
                f"{half:.{digits}f}",
                f"{ends.mean:.{digits}f} ± {ends.deviation:.{digits}f} ({len(found)})",
                apart,
                f"{seconds:.1f}",
                f"{seconds / allowed:.2f}",
                f"{fmean(within):.{digits}f}" if len(within) == len(found) else "",
            ]
        )
    head = (
        "loop",
        "rate",
        "updates or cycles",
        f"{shown}, at half of the work",
        "at the end (runs)",
        "less the plain loop",
        "seconds",
        "times the plain loop's",
        "in the plain loop's seconds",
    )
    return table(head, lines)


def _within(row: Row, seconds: float) -> float | None:
    """The value of the last validation of a run within so many seconds."""
    return next((point[_VALUE] for point in reversed(row["result"]["curve"]) if point[_SECONDS] <= seconds), None)


def _middle(row: Row) -> int:
    """The point of a curve at half of the work."""
    curve, work = row["result"]["curve"], row["settings"]["work"]
    return min(range(len(curve)), key=lambda number: abs(curve[number][_WORK] - work / 2))


def _by_rate(rows: Sequence[Row]) -> str:
    """The value at the end by loop and rate, of the runs that rates were chosen by."""
    problem, optimizer = (rows[0]["settings"][name] for name in ("problem", "optimizer"))
    (value, _), (shown, factor, digits) = VALUES[problem], _SHOWN[problem]
    rates = RATES[problem, optimizer]
    found = {(name_of(row), row["settings"]["learning_rate"]): row.get("result") for row in rows}
    lines = [
        [name, *(f"{factor * end[value]:.{digits}f}" if (end := found.get((name, rate))) else "" for rate in rates)]
        for name in dict.fromkeys(name for name, _ in found)
    ]
    return (
        f"{shown.capitalize()}, on another seed after a third of the work, by rate; the best ones were chosen.\n\n"
        + (table(["loop", *(f"{rate:g}" for rate in rates)], lines))
    )
