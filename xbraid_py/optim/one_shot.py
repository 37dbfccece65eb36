"""One-shot optimization: a few solver iterations for each update of the weights, warm-started."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, sqrt

from torch import Tensor

from xbraid_py.comm.agreement import RunError
from xbraid_py.optim.line_search import FixedStep, Trial
from xbraid_py.optim.objective import Evaluation, Objective
from xbraid_py.optim.options import OneShotOptions
from xbraid_py.optim.quasi_newton import QuasiNewton


@dataclass(frozen=True)
class Update:
    """The state before an update.

    Attributes
    ----------
    number : int
        Updates made so far on this level.
    evaluation : Evaluation
        The objective there.
    grad_norm : float
        2-norm of the gradient there.
    step, backtracks : float, int
        Of the line search that led there; 0 at the start.
    """

    number: int
    evaluation: Evaluation
    grad_norm: float
    step: float
    backtracks: int


class OneShot:
    """Minimizes an objective from one point; `run` makes the updates.

    Parameters
    ----------
    objective : Objective
    options : OneShotOptions
    x : Tensor
        The weights to start from.

    Attributes
    ----------
    x, gradient : Tensor
        The current weights, and the gradient there (None until it has been asked for).
    evaluation : Evaluation
        The objective there.
    quasi_newton : QuasiNewton
        The pairs of earlier updates.
    note : str or None
        What a user should know of the last update: the line search had to start again, say.
    """

    def __init__(self, objective: Objective, options: OneShotOptions, x: Tensor):
        self.objective, self.options, self.x = objective, options, x
        self.quasi_newton = QuasiNewton(options.method, objective.dots, options.memory, options.curvature_check)
        self.number = 0
        self.gradient: Tensor | None = None
        self.evaluation: Evaluation | None = None
        self.step, self.backtracks = 0.0, 0
        self.note: str | None = None
        self._search = options.line_search if options.fixed_step is None else FixedStep(options.fixed_step)

    def run(self, num_updates: int) -> Iterator[Update]:
        """Make updates until there are `num_updates`; yields the state before each.

        At a yield, `x`, `gradient`, `evaluation`, `number` and the pairs are all that the rest of the run
        depends on, besides the objective's own warm start. Ends early where the gradient is small enough, or
        where a line search fails even from a more accurate gradient.

        Raises
        ------
        RunError
            If the objective or its gradient is not finite.
        """
        if self.evaluation is None:
            self.evaluation = self._evaluate(self._iterations)
        while self.number < num_updates:
            if self.gradient is None:
                self.gradient = self.objective.gradient(self.x, self._iterations)
            norm = self._finite_norm(self.gradient)
            yield Update(self.number, self.evaluation, norm, self.step, self.backtracks)
            if norm <= self.options.gtol:
                return
            trial = self._line_search(self.evaluation, self.gradient)
            if trial is None:
                return
            previous = self.gradient
            last = trial.x - self.x
            self.x, self.evaluation = trial.x, trial.evaluation
            self.step, self.backtracks = trial.step, trial.backtracks
            self._require_finite(self.evaluation.value, "objective")
            self.number += 1
            self.gradient = None
            if self.number < num_updates:
                self.gradient = self.objective.gradient(self.x, self._iterations)
                self.quasi_newton.add(last, self.gradient - previous, self.gradient)

    def _line_search(self, evaluation: Evaluation, gradient: Tensor) -> Trial | None:
        """A line search; where it fails, another one along an accurate gradient."""
        self.note = None
        for is_second in (False, True):
            if is_second:
                # The direction may be bad because the pairs are, or because the solves were too inexact.
                self.note = f"update {self.number}: no descent along the direction; the line search starts again"
                self.quasi_newton.restart()
                self.evaluation = evaluation = self._evaluate(self.options.boost_iter, error=0.0)
                self.gradient = gradient = self.objective.gradient(self.x, self.options.boost_iter, exact=True)
                self._finite_norm(gradient)
            direction, slope = self.quasi_newton.direction(gradient)
            trial = self._search.search(
                self.x,
                evaluation.value,
                direction,
                slope,
                lambda x, error: self.objective.evaluate(x, self._iterations, error),
            )
            if trial is not None:
                return trial
        self.note = f"update {self.number}: no descent along the gradient either; this level ends here"
        return None

    def _evaluate(self, max_iter: int | None, error: float | None = None) -> Evaluation:
        found = self.objective.evaluate(self.x, max_iter, error)
        self._require_finite(found.value, "objective")
        return found

    def _finite_norm(self, gradient: Tensor) -> float:
        norm = sqrt(self.quasi_newton.observe(gradient))
        self._require_finite(norm, "norm of the gradient")
        return norm

    @property
    def _iterations(self) -> int | None:
        return self.options.boost_iter if self.number < self.options.boost_updates else None

    def _require_finite(self, value: float, what: str) -> None:
        if not isfinite(value):
            raise RunError(
                f"the {what} is {value} at update {self.number}: it must be finite. The last checkpoint holds the "
                f"weights before; start with smaller weights (initial.layers=1e-2) or a shorter time (network.T=1.0)"
            )
