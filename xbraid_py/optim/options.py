"""Options of the one-shot optimizer; torch is not loaded for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xbraid_py.optim.line_search import Armijo


@dataclass(frozen=True, kw_only=True)
class OneShotOptions:
    """Options of the one-shot optimizer.

    Parameters
    ----------
    method
        L-BFGS, BFGS or steepest descent.
    memory
        Pairs that L-BFGS keeps.
    curvature_check
        Leave out pairs without positive curvature.
    fixed_step
        A fixed step size instead of the line search.
    line_search
        Armijo backtracking.
    boost_updates
        During this many updates after a start or a refinement ...
    boost_iter
        ... each solve makes up to this many MGRIT iterations (paper 001, section 2.2: 10 for the first 3).
    gtol
        Stop a level when the norm of the gradient is at most this.
    """

    method: Literal["lbfgs", "bfgs", "steepest"] = "lbfgs"
    memory: int = 10
    curvature_check: bool = True
    fixed_step: float | None = None
    line_search: Armijo = Armijo()
    boost_updates: int = 3
    boost_iter: int = 10
    gtol: float = 0.0

    def __post_init__(self):
        if self.method not in ("lbfgs", "bfgs", "steepest"):
            raise ValueError(f"method={self.method!r} must be lbfgs, bfgs or steepest; use lbfgs")
        for name, least in (("memory", 1), ("boost_updates", 0), ("boost_iter", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}; use 10")
        if not 0.0 <= self.gtol < float("inf"):
            raise ValueError(f"gtol={self.gtol} must be at least 0; use 1e-9")
        if self.fixed_step is not None and not 0.0 < self.fixed_step < float("inf"):
            raise ValueError(f"fixed_step={self.fixed_step} must be positive and finite; use 0.1")
