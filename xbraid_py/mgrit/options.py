"""The options of a solve."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class MGRIT:
    """Options of multigrid reduction in time with FAS (paper 001, section 2.1; design, 4.2 and 4.3).

    Parameters
    ----------
    cfactor
        Coarsening factor: every cfactor-th point of a level is a point of the next. One number, or one
        for each coarsening, the finest first; the last one serves all further levels.
    max_levels
        Number of levels at most; 1 propagates sequentially, one layer after the other.
    min_coarse
        A level with fewer steps than this is not made.
    nrelax
        CF-relaxations after the F-relaxation: 0 is F-, 1 is FCF-relaxation.
    nrelax0
        The same on the finest level; as nrelax if not given.
    max_iter
        Iterations (cycles) at most.
    tol
        Stop when the relative residual, the 2-norm of the residual over that of the states at the C-points,
        is at most this; 0 makes all max_iter iterations.
    cycle
        V- or F-cycles.
    coarse_weights
        Weights of a coarse step: those of the first layer of the interval (inject) or their mean (average).
    coarse_step
        Scheme of a coarse step: forward Euler, or the explicit midpoint rule.
    """

    cfactor: int | tuple[int, ...] = 4
    max_levels: int = 3
    min_coarse: int = 4
    nrelax: int = 1
    nrelax0: int | None = None
    max_iter: int = 2
    tol: float = 0.0
    cycle: Literal["V", "F"] = "V"
    coarse_weights: Literal["average", "inject"] = "average"
    coarse_step: Literal["midpoint", "euler"] = "midpoint"

    def __post_init__(self):
        factors = self.cfactor if isinstance(self.cfactor, tuple) else (self.cfactor,)
        if not factors or min(factors) < 2:
            raise ValueError(f"cfactor={self.cfactor} must be at least 2 on every level; use 4")
        for name, least in (("max_levels", 1), ("min_coarse", 1), ("nrelax", 0), ("nrelax0", 0), ("max_iter", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}; use {max(least, 1)}")
        if not 0.0 <= self.tol < float("inf"):
            raise ValueError(f"tol={self.tol} must be at least 0; use 1e-6, or 0 for a fixed number of iterations")
        for name, words in (
            ("cycle", ("V", "F")),
            ("coarse_weights", ("average", "inject")),
            ("coarse_step", ("midpoint", "euler")),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)!r} must be {words[0]} or {words[1]}; use {words[0]}")

    def cfactor_of(self, level: int) -> int:
        """Coarsening factor from `level` to the next."""
        if isinstance(self.cfactor, int):
            return self.cfactor
        return self.cfactor[min(level, len(self.cfactor) - 1)]

    def nrelax_of(self, level: int) -> int:
        """CF-relaxations on `level`."""
        return self.nrelax0 if level == 0 and self.nrelax0 is not None else self.nrelax
