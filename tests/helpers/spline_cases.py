"""B-splines literally, by the recursion of Cox and de Boor, and splines that several tests use."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from xbraid_py.layers.splines import Splines

# Fewer functions than 16 layers, as many, and more; own knots.
CASES = {
    "constant": Splines(4, 0),
    "constant, as many as layers": Splines(16, 0),
    "linear": Splines(5, 1),
    "quadratic, own knots": Splines(5, 2, (0.0, 0.1, 0.3, 1.0)),
    "cubic": Splines(7, 3),
    "cubic, one interval": Splines(4, 3),
    "cubic, centered, as many as layers": Splines(16, 3, "centered"),
    "quadratic, more than layers": Splines(21, 2),
}


def basis(splines: Splines, j: int, t: float) -> float:
    """B_j(t), with the knots of the ends repeated."""
    d, breaks = splines.degree, splines.breaks
    knots = [0.0] * d + list(breaks) + [1.0] * d

    def value(i: int, degree: int) -> float:
        if degree == 0:
            last = knots[i + 1] == 1.0 and knots[i] < 1.0  # the last interval is closed
            return float(knots[i] <= t < knots[i + 1] or (last and t == 1.0))
        found = 0.0
        if knots[i + degree] > knots[i]:
            found += (t - knots[i]) / (knots[i + degree] - knots[i]) * value(i, degree - 1)
        if knots[i + degree + 1] > knots[i + 1]:
            found += (knots[i + degree + 1] - t) / (knots[i + degree + 1] - knots[i + 1]) * value(i + 1, degree - 1)
        return found

    return value(j, d)


def matrix(splines: Splines, times: Sequence[float]) -> torch.Tensor:
    """B_j(t) of all functions at all times, one after the other."""
    return torch.tensor([[basis(splines, j, t) for j in range(splines.num)] for t in times], dtype=torch.float64)


def middles(num_layers: int) -> list[float]:
    """The middles of equal layers."""
    return [(n + 0.5) / num_layers for n in range(num_layers)]
