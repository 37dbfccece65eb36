"""What an optimizer knows of a problem: a value, a gradient, how good the solves are; and that of a coarse level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """The objective at one point.

    Attributes
    ----------
    value, loss : float
        With and without regularization.
    accuracy : float
        Share of the samples that are classified rightly.
    residual : float
        Relative residual of the state solve.
    """

    value: float
    loss: float
    accuracy: float
    residual: float


class Objective(Protocol):
    """What an optimizer knows of the problem.

    Attributes
    ----------
    shift : Tensor or None
        What the gradient has of a coupling term, on a coarse level.
    """

    @property
    def shift(self) -> Tensor | None: ...

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        """The objective at the flat vector x.

        Solvers make up to `max_iter` iterations if their options ask for fewer, and until the value is wrong by no more
        than `error`, as far as they can tell; 0 asks for all iterations.
        """
        ...

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        """The gradient at x, where `evaluate` has been called last; with all iterations if `exact`."""
        ...

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Dot products over all ranks of each of some flat vectors with each of others, (len(a), len(b))."""
        ...


class ShiftedObjective:
    """The objective of a coarse level and its coupling term: H(x) = L(x) + <shift, x> (paper 000, eq. 9).

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
