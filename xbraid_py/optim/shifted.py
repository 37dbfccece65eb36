"""The objective of a coarse level: its own one plus the coupling term <dg, x>."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from torch import Tensor

from xbraid_py.optim.objective import Evaluation, Objective


class ShiftedObjective:
    """H(x) = L(x) + <shift, x> (paper 000, eq. 9).

    Parameters
    ----------
    objective : Objective
        L.
    shift : Tensor
        dg, a flat vector as x.
    """

    def __init__(self, objective: Objective, shift: Tensor):
        self.objective, self.shift = objective, shift

    def shifted(self, x: Tensor, evaluation: Evaluation) -> Evaluation:
        """What an evaluation of L at x says of H; loss and accuracy remain those of L."""
        coupling = float(self.dots([self.shift], [x])[0, 0])
        return replace(evaluation, value=evaluation.value + coupling)

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        """H at x; see `Objective`."""
        return self.shifted(x, self.objective.evaluate(x, max_iter, error))

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        """The gradient of H at x, where `evaluate` has been called last."""
        return self.objective.gradient(x, max_iter, exact) + self.shift

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Dot products over all ranks; see `Objective`."""
        return self.objective.dots(a, b)
