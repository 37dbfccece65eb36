"""How far to go against a direction: Armijo backtracking, or a fixed step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from xbraid_py.optim.objective import Evaluation


@dataclass(frozen=True)
class Trial:
    """The accepted trial of a line search: the point, what was evaluated there, the step, trials before it."""

    x: Tensor
    evaluation: Evaluation
    step: float
    backtracks: int


@dataclass(frozen=True)
class Armijo:
    """Backtracking: steps 1, 1/2, 1/4 ... until J(x - a d) <= J(x) - decrease * a * g'd.

    A trial with a value that is not finite is rejected like one that does not go down far enough.

    Parameters
    ----------
    decrease
        Share of the decrease predicted by the gradient that is asked for.
    factor
        By which a rejected step is multiplied.
    max_backtracks
        Rejected trials at most.
    resolution
        An inexact objective may be wrong by this share of the decrease that the gradient predicts for the trial.
    """

    decrease: float = 1e-4
    factor: float = 0.5
    max_backtracks: int = 15
    resolution: float = 0.3

    def __post_init__(self):
        if not 0.0 < self.decrease < 1.0:
            raise ValueError(f"decrease={self.decrease} must be between 0 and 1; use 1e-4")
        if not 0.0 < self.factor < 1.0:
            raise ValueError(f"factor={self.factor} must be between 0 and 1; use 0.5")
        if not 0.0 < self.resolution < float("inf"):
            raise ValueError(f"resolution={self.resolution} must be positive and finite; use 0.3")
        if self.max_backtracks < 0:
            raise ValueError(f"max_backtracks={self.max_backtracks} must be at least 0; use 15")

    def search(
        self,
        x: Tensor,
        value: float,
        direction: Tensor,
        slope: float,
        evaluate: Callable[[Tensor, float | None], Evaluation],
    ) -> Trial | None:
        """The first trial that goes down far enough; None if none does, or if `direction` is no descent.

        `slope` is g'd, positive for a direction of descent; `evaluate` costs one state solve a trial; it
        is also told how wrong the objective may be.
        """
        if not slope > 0.0:
            return None
        step = 1.0
        for backtracks in range(self.max_backtracks + 1):
            trial = x.sub(direction, alpha=step)
            evaluation = evaluate(trial, self.resolution * step * slope)
            if isfinite(evaluation.value) and evaluation.value <= value - self.decrease * step * slope:
                return Trial(trial, evaluation, step, backtracks)
            step *= self.factor
        return None


@dataclass(frozen=True)
class FixedStep:
    """The same step in every update, whatever the objective does."""

    step: float = 0.1

    def __post_init__(self):
        if not 0.0 < self.step < float("inf"):
            raise ValueError(f"step={self.step} must be positive and finite; use 0.1")

    def search(self, x, value, direction, slope, evaluate) -> Trial:
        """The only trial."""
        trial = x.sub(direction, alpha=self.step)
        return Trial(trial, evaluate(trial, None), self.step, 0)
