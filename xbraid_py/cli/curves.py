"""Curves in a terminal, drawn with the dots of braille letters."""

from __future__ import annotations

import math
from collections.abc import Sequence

from xbraid_py.cli.reader import Points

# A braille letter has 2 x 4 dots; these are their bits, row by row from the top.
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
_BLANK = 0x2800
_LOG_FROM = 20.0  # ratio of the largest to the smallest value from which powers of ten are even steps


def uses_log(values: Sequence[float]) -> bool:
    """Whether values are better seen on a logarithmic scale, on which zeros are left out."""
    positive = [value for value in values if value > 0]
    return bool(positive) and min(values) >= 0 and max(positive) > _LOG_FROM * min(positive)


def draw(curves: Sequence[Points], width: int, height: int, ascii_only: bool = False) -> list[str]:
    """Curves over common axes.

    Parameters
    ----------
    curves : sequence of list of (x, y)
        At least one point in all; those of a curve by x, all numbers finite.
    width, height : int
        In letters, of the whole: labels at the left and below included.
    ascii_only : bool
        Without braille, for terminals that do not have it.

    Returns
    -------
    list of str
        `height` lines.
    """
    log = uses_log([y for curve in curves for _, y in curve])
    scaled = [[(x, math.log10(y) if log else y) for x, y in curve if y > 0 or not log] for curve in curves]
    xs, ys = ([point[axis] for curve in scaled for point in curve] for axis in (0, 1))
    top, bottom = (f"{10**y if log else y:.3g}" for y in (max(ys), min(ys)))
    margin = max(len(top), len(bottom)) + 1
    columns, rows = max(4, width - margin), max(2, height - 1)
    across, down = (1, 1) if ascii_only else (2, 4)
    lit: set[tuple[int, int]] = set()
    for curve in scaled:
        dots = [
            (_place(x, min(xs), max(xs), columns * across), rows * down - 1 - _place(y, min(ys), max(ys), rows * down))
            for x, y in curve
        ]
        for start, end in zip(dots, dots[1:] or dots, strict=False):
            lit |= _between(start, end)
    lines = []
    for row in range(rows):
        label = top if row == 0 else bottom if row == rows - 1 else ""
        cells = (_letter(lit, row, column, ascii_only) for column in range(columns))
        lines.append(f"{label:>{margin - 1}} " + "".join(cells))
    left, right = f"{min(xs):g}", f"{max(xs):g}"
    lines.append(" " * margin + left + f"{right:>{max(len(right) + 1, columns - len(left))}}")
    return lines


def _place(value: float, low: float, high: float, count: int) -> int:
    """Number of the dot, from 0 to count - 1; the middle if all values are the same."""
    # Halves, since the difference of two large numbers may be infinite.
    share = (value / 2 - low / 2) / (high / 2 - low / 2) if high / 2 > low / 2 else 0.5
    return min(count - 1, round(share * (count - 1)))


def _between(start: tuple[int, int], end: tuple[int, int]) -> set[tuple[int, int]]:
    steps = max(abs(end[0] - start[0]), abs(end[1] - start[1]), 1)
    return {
        tuple(round(a + (b - a) * step / steps) for a, b in zip(start, end, strict=True)) for step in range(steps + 1)
    }


def _letter(lit: set[tuple[int, int]], row: int, column: int, ascii_only: bool) -> str:
    if ascii_only:
        return "*" if (column, row) in lit else " "
    bits = sum(
        bit
        for down, pair in enumerate(_DOTS)
        for across, bit in enumerate(pair)
        if (2 * column + across, 4 * row + down) in lit
    )
    return chr(_BLANK + bits) if bits else " "
