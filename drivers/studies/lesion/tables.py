"""Tables of lesions and norms of residual networks (paper 003, sections 3.2 and 3.3), and how norms fall with depth.

A row has "settings" (blocks, step_size, data, filters, model, seed and so on) and a "result": "accuracy", "norms",
"left_out", "random" and "shuffled", see `studies.lesion.lesion.measure`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from studies.rows import Row, table
from studies.statistics import Summary

# What networks may differ in besides blocks and step size; named where they do.
_ALSO = ("data", "filters", "model", "norm")
_WORDS = """\
Norms are means over the test images. G = h F is a residual module's output, Y its input, d the number of blocks. A late
block lies in the second half of its stage. Drops are the test accuracy of the whole network less that of the network
without one block, in percentage points; the claim is that the mean of their sizes is less for late blocks than for
transitions. Blocks left out at random, and shuffled ones, are no transitions.
"""


def fit_power(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """Least-squares fit of `values = factor * sizes ** slope` in logarithms.

    Returns
    -------
    slope, factor : float

    Raises
    ------
    ValueError
        If there are fewer than two different sizes, other numbers of values, or a number is not positive and finite.
    """
    if len(sizes) != len(values) or len(set(sizes)) < 2:
        raise ValueError(f"sizes={list(sizes)} must hold at least two different numbers, one for each of the values")
    for name, numbers in (("sizes", sizes), ("values", values)):
        if not all(0.0 < number < math.inf for number in numbers):
            raise ValueError(f"{name}={list(numbers)} must be positive and finite; leave the others out")
    slope, level = np.polyfit(np.log(sizes), np.log(values), 1)
    return float(slope), float(np.exp(level))


def networks(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each network, those that differ in the seed together, by a name that tells it from the others."""
    rows = list(rows)
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(", ".join([_shape(row), *_extras(row, rows)]), []).append(row)
    return found


def series(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of networks that differ in depth: of one step size h, and of one time span h d.

    Returns
    -------
    dict of str to list of Row
        Those of at least two depths, the shallowest first, by what they have in common.
    """
    rows = list(rows)
    found: dict[str, list[Row]] = {}
    for name in ("h", "h d"):
        for row in rows:
            value = row["settings"]["step_size"] * (depth(row) if name == "h d" else 1)
            found.setdefault(", ".join([f"{name} = {value:g}", *_extras(row, rows)]), []).append(row)
    return {
        name: sorted(members, key=depth) for name, members in found.items() if len({depth(row) for row in members}) > 1
    }


def depth(row: Row) -> int:
    """d, the number of blocks."""
    return sum(row["settings"]["blocks"])


def mean_norm(row: Row) -> float:
    """Mean norm of the residual modules G over the blocks (paper 003, figure 3)."""
    return fmean(residual for *_, residual in row["result"]["norms"])


def relative_norm(row: Row) -> float:
    """Mean over the blocks of the norm of G, in norms of Y."""
    return fmean(residual / state for *_, state, residual in row["result"]["norms"])


def drops(row: Row, which: str) -> list[float]:
    """Points of test accuracy that a network loses without a block, for each block of a kind.

    Parameters
    ----------
    row : Row
    which : {"transition", "late", "other"}
        Transitions, blocks in the second half of their stage, or the rest.
    """
    result, blocks = row["result"], row["settings"]["blocks"]
    pairs = zip(result["norms"], result["left_out"], strict=True)
    return [100 * (result["accuracy"] - left) for (s, j, *_), left in pairs if kind(s, j, blocks) == which]


def kind(stage: int, block: int, blocks: Sequence[int]) -> str:
    """Which of the kinds of `drops` a block is, stages and blocks counted from 0."""
    if stage > 0 and block == 0:
        return "transition"
    return "late" if block > 0 and 2 * block >= blocks[stage] else "other"


def claim_holds(row: Row) -> bool | None:
    """Whether leaving out a late block changes the accuracy by less than leaving out a transition, on average.

    None if there are none of either kind.
    """
    late, transition = drops(row, "late"), drops(row, "transition")
    if not late or not transition:
        return None
    return fmean(map(abs, late)) < fmean(map(abs, transition))


def page(rows: Sequence[Row]) -> str:
    """All tables as Markdown, a line for each network with means and standard deviations over its seeds.

    Raises
    ------
    ValueError
        If there is no row.
    """
    if not rows:
        raise ValueError("rows holds no network; tables need at least one")
    known = networks(rows)
    parts = [
        "# Norms and lesions of residual networks",
        _WORDS.rstrip(),
        "## Norms",
        table(
            ("Network", "d", "Runs", "Accuracy, %", "Mean of G", "Mean of F", "Mean of G/Y"),
            [
                (
                    name,
                    str(depth(members[0])),
                    str(len(members)),
                    _spread(100 * row["result"]["accuracy"] for row in members),
                    _spread((mean_norm(row) for row in members), 3),
                    _spread((mean_norm(row) / row["settings"]["step_size"] for row in members), 3),
                    _spread((relative_norm(row) for row in members), 4),
                )
                for name, members in known.items()
            ],
        ),
        "\n".join(slope_lines(rows)) or "There are no two networks of different depth and one h, or one h d: no slope.",
        "## One block left out",
        table(
            ("Network", "Accuracy, %", "Drop: transitions", "late blocks", "worst late", "other blocks", "Claim holds"),
            [_lesion_line(name, members) for name, members in known.items()],
        ),
        "## Several blocks left out at random, and all shuffled within their stages: accuracy, %",
        _random_table(known),
    ]
    return "\n\n".join(parts) + "\n"


def slope_lines(rows: Sequence[Row]) -> list[str]:
    """Slopes of the norms over the number of blocks, in words, one line for each of `series`."""
    lines = []
    for name, members in series(rows).items():
        sizes = [depth(row) for row in members]
        both = [fit_power(sizes, [value(row) for row in members])[0] for value in (mean_norm, relative_norm)]
        lines.append(
            f"* {name}, d = {', '.join(map(str, sorted(set(sizes))))}: the mean norm of G goes as d^{both[0]:.2f}, "
            f"that of G/Y as d^{both[1]:.2f} (1/d is d^-1)"
        )
    return lines


def _lesion_line(name: str, members: Sequence[Row]) -> tuple[str, ...]:
    found = {which: [drops(row, which) for row in members] for which in ("transition", "late", "other")}
    claims = [claim for row in members if (claim := claim_holds(row)) is not None]
    return (
        name,
        _spread(100 * row["result"]["accuracy"] for row in members),
        *(_spread(fmean(each) for each in found[which] if each) for which in ("transition", "late")),
        _spread(max(each) for each in found["late"] if each),
        _spread(fmean(each) for each in found["other"] if each),
        f"{sum(claims)} of {len(claims)}" if claims else "",
    )


def _random_table(known: dict[str, list[Row]]) -> str:
    counts = sorted({int(count) for members in known.values() for row in members for count in row["result"]["random"]})
    lines = []
    for name, members in known.items():
        results = [row["result"] for row in members]
        several = [[v for each in results for v in each["random"].get(str(count), ())] for count in counts]
        shuffled = [v for each in results for v in each["shuffled"]]
        whole = [each["accuracy"] for each in results]
        lines.append((name, *(_spread(100 * v for v in values) for values in (whole, *several, shuffled))))
    return table(("Network", "None", *map(str, counts), "Shuffled"), lines)


def _shape(row: Row) -> str:
    return f"{'-'.join(map(str, row['settings']['blocks']))}, h = {row['settings']['step_size']:g}"


def _extras(row: Row, rows: Sequence[Row]) -> list[str]:
    """Settings of a row, besides its shape, in which the rows differ."""
    varied = [name for name in _ALSO if len({str(each["settings"].get(name)) for each in rows}) > 1]
    return [_word(row["settings"].get(name)) for name in varied]


def _word(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _spread(values: Iterable[float], digits: int = 1) -> str:
    values = list(values)
    if not values:
        return ""
    summary = Summary.of(values)
    return f"{summary.mean:.{digits}f}" + (f" ± {summary.deviation:.{digits}f}" if len(values) > 1 else "")
