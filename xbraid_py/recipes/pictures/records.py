"""Records of runs, as pictures need them: rows, runs, levels, measured work units."""

from __future__ import annotations

from collections.abc import Iterator, Sequence


def wall_work_units(rows: Sequence[dict]) -> list[float] | None:
    """Measured work after every update, in the paper's unit (paper 001, section 3).

    The unit is the average wall-clock time of an update of the non-nested run; without such a run, that of
    an update on the finest level (0) of the nested one.

    Parameters
    ----------
    rows : sequence of dict
        Records; those that are no updates are left out. `seconds` counts the training time of its own
        run, from its start to the end of the update.

    Returns
    -------
    list of float or None
        One number for every update, in the order of the rows; None if no update can serve as the unit.

    Raises
    ------
    ValueError
        If there is no update among the rows.
    """
    runs = dict(runs_of(rows))
    if "non-nested" in runs:
        spent, number = runs["non-nested"][-1]["seconds"], len(runs["non-nested"])
    else:
        nested = runs.get("nested", [])
        number = sum(row["level"] == 0 for row in nested)
        before = [0.0] + [row["seconds"] for row in nested if row["level"] > 0]
        spent = nested[-1]["seconds"] - before[-1] if number else 0.0
    if spent <= 0:
        return None
    return [row["seconds"] * number / spent for row in updates_of(rows)]


def updates_of(rows: Sequence[dict]) -> list[dict]:
    """The rows that are updates."""
    return [row for row in rows if row.get("kind") == "update"]


def runs_of(rows: Sequence[dict]) -> Iterator[tuple[str, list[dict]]]:
    """Updates of every run there is, the nested one first."""
    updates = updates_of(rows)
    if not updates:
        raise ValueError('rows holds no update; pictures need at least one row with "kind": "update"')
    for run in ("nested", "non-nested"):
        if entries := [row for row in updates if row["run"] == run]:
            yield run, entries


def sections_of(entries: list[dict]) -> Iterator[tuple[int, list[dict]]]:
    """Updates of one level of the nesting after the other: number of layers, rows."""
    for level in sorted({row["level"] for row in entries}, reverse=True):
        section = [row for row in entries if row["level"] == level]
        yield section[0]["num_layers"], section
