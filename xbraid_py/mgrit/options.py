"""The options of a solve."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class _Cycle:
    """What a cycle takes where nothing is given."""

    max_levels: int
    max_iter: int
    tol: float
    adjoint_tol: float
    coarse_step: str
    coarse_parts: int


_CLASSICAL = _Cycle(3, 2, 0.0, 0.0, "midpoint", 1)
_CYCLES = {
    "lagged": _Cycle(99, 10, 1e-2, 5e-2, "euler", 2),
    "pipeline": _Cycle(1, 1, 0.0, 0.0, "euler", 1),
    "V": _CLASSICAL,
    "F": _CLASSICAL,
}
_PORTIONS, _LEAST_SAMPLES = 8, 8  # of a pipeline: portions at most, and samples in each at least
_SHORT = 32  # steps of a coarse level that are few enough to be made one after the other


@dataclass(frozen=True, kw_only=True)
class MGRIT:
    """Options of multigrid reduction in time with FAS (paper 001, section 2.1).

    Where a default is "the cycle's", it is, for the lagged cycle and for V- and F-cycles: `intervals` intervals or a
    cfactor of 4; as many levels as leave at most 32 sequential steps, or 3; at most 10 iterations, or 2; a tolerance of
    1e-2 for states and 5e-2 for adjoints, or none; coarse steps of 2 Euler parts, or a midpoint step.

    Parameters
    ----------
    cycle
        Lagged: one relaxation of the fine level an iteration, between two sweeps of the coarse one that carry
        the correction of the last solve. V or F: the classical cycles. Pipeline: no coarse level at all; portions of
        the samples follow each other through the layers of the ranks, which is exact.
    portions
        Portions of the samples that are propagated one after the other; their sums are made in one fixed tree, so
        that the result is the same on any number of ranks and of replicas. Where it is not given: with a pipeline the
        greatest power of two up to 8 that leaves 8 samples in each, with the other cycles one.
    intervals
        Intervals of the finest level where no cfactor is given, with the lagged cycle; fewer where this does not
        divide the number of layers, and none where they would be no longer than the parts of a coarse step.
    cfactor
        Coarsening factor: every cfactor-th point of a level is a point of the next. One number, or one
        for each coarsening, the finest first; the last one serves all further levels. The cycle's if not given.
    max_levels
        Number of levels at most; 1 propagates sequentially, one layer after the other. The cycle's if not given.
    min_coarse
        A level with fewer steps than this is not made.
    nrelax
        CF-relaxations after the F-relaxation of V- and F-cycles: 0 is F-, 1 is FCF-relaxation.
    nrelax0
        The same on the finest level; as nrelax if not given.
    max_iter
        Iterations (cycles) at most; the cycle's if not given.
    c_weight
        Weight w of C-relaxation in V- and F-cycles: a C-point becomes (1 - w) times itself plus w times the end of the
        interval before it. Between 0 and 2; 1 is plain C-relaxation.
    start
        Where V- and F-cycles begin: with the states of the coarsest level on all others, or with full multigrid, a
        V-cycle on each level on the way to the finest one.
    tol
        Stop when the relative residual, the norm of the residual over that of the states at the C-points, is at most
        this (with the lagged cycle: the relative change by the last correction). The cycle's if not given.
    atol
        Stop also when the norm of the residual itself is at most this. If tol and atol are 0, all max_iter iterations
        are made.
    norm
        1-, 2- or maximum norm of all numbers of all states at the C-points.
    coarse_weights
        Weights of a coarse step: those of the first layer of the interval (inject) or their mean (average).
    coarse_step
        Scheme of a coarse step: forward Euler, or the explicit midpoint rule. The cycle's if not given.
    coarse_parts
        Parts of a coarse step, each with the weights of its own stretch of layers, at least two of them; fewer where
        this does not divide the coarsening factor. The cycle's if not given.
    """

    cycle: Literal["lagged", "pipeline", "V", "F"] = "lagged"
    portions: int | None = None
    intervals: int = 8
    cfactor: int | tuple[int, ...] | None = None
    max_levels: int | None = None
    min_coarse: int = 4
    nrelax: int = 1
    nrelax0: int | None = None
    max_iter: int | None = None
    c_weight: float = 1.0
    start: Literal["coarsest", "full"] = "coarsest"
    tol: float | None = None
    atol: float = 0.0
    norm: Literal[1, 2, "max"] = 2
    coarse_weights: Literal["average", "inject"] = "average"
    coarse_step: Literal["midpoint", "euler"] | None = None
    coarse_parts: int | None = None

    def __post_init__(self):
        if self.cfactor is not None:
            factors = self.cfactor if isinstance(self.cfactor, tuple) else (self.cfactor,)
            if not factors or min(factors) < 2:
                raise ValueError(f"cfactor={self.cfactor} must be at least 2 on every level; use 4")
        for name, words in (
            ("cycle", ("lagged", "pipeline", "V", "F")),
            ("coarse_weights", ("average", "inject")),
            ("coarse_step", ("midpoint", "euler")),
            ("start", ("coarsest", "full")),
            ("norm", (2, 1, "max")),
        ):
            if getattr(self, name) not in (*words, None):
                rule = " or ".join(map(str, words))
                raise ValueError(f"{name}={getattr(self, name)!r} must be {rule}; use {words[0]}")
        least_iter = int(self.cycle == "lagged")
        least = {"intervals": 2, "max_levels": 1, "min_coarse": 1, "nrelax": 0, "nrelax0": 0, "coarse_parts": 1}
        least["portions"] = 1
        for name, bound in {**least, "max_iter": least_iter}.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name}={value} must be at least {bound}; use {max(bound, 1)}")
        if not 0.0 < self.c_weight < 2.0:
            raise ValueError(f"c_weight={self.c_weight} must lie between 0 and 2; use 1.0")
        if self.cycle == "pipeline" and (self.max_levels or 1) > 1:
            raise ValueError(f"max_levels={self.max_levels}: cycle='pipeline' has one level; leave it out")
        if self.cycle == "lagged" and (self.c_weight != 1.0 or self.start != "coarsest"):
            given = f"c_weight={self.c_weight}" if self.c_weight != 1.0 else f"start={self.start!r}"
            raise ValueError(f"{given} is for V- and F-cycles; cycle='lagged' has no C-relaxation: use cycle='V'")
        if not 0.0 <= self.atol < float("inf"):
            raise ValueError(f"atol={self.atol} must be at least 0 and finite; use 1e-8, or 0 to ask for none")
        if self.tol is not None and not 0.0 <= self.tol < float("inf"):
            raise ValueError(
                f"tol={self.tol} must be at least 0 and finite; use 1e-6, or 0 for a fixed number of iterations"
            )

    def for_adjoint(self, max_iter: int | None = None, tol: float | None = None) -> MGRIT:
        """The same for adjoints: with a tolerance of its own, and what else is given."""
        own = tol if tol is not None else self.tol
        return replace(
            self,
            max_iter=self.max_iter if max_iter is None else max_iter,
            tol=_CYCLES[self.cycle].adjoint_tol if own is None else own,
        )

    @property
    def iterations(self) -> int:
        """`max_iter`, or the cycle's."""
        return _CYCLES[self.cycle].max_iter if self.max_iter is None else self.max_iter

    @property
    def tolerance(self) -> float:
        """`tol`, or the cycle's."""
        return _CYCLES[self.cycle].tol if self.tol is None else self.tol

    def portions_of(self, samples: int) -> int:
        """Portions of so many samples: `portions`, at most one for each sample, or by the rule."""
        if self.portions is not None:
            return max(1, min(self.portions, samples))
        portions = 1
        while self.cycle == "pipeline" and portions < _PORTIONS and samples >= 2 * portions * _LEAST_SAMPLES:
            portions *= 2
        return portions

    def cfactor_of(self, level: int, steps: int) -> int | None:
        """Coarsening factor from `level`, which has so many steps, to the next; None if there is to be no next one."""
        is_one_shot = self.cycle == "lagged"
        if level + 1 >= (self.max_levels or _CYCLES[self.cycle].max_levels):
            return None
        if is_one_shot and self.max_levels is None and level > 0 and steps <= _SHORT:
            return None
        if self.cfactor is None and is_one_shot and level == 0:
            factor = steps // _divisor(steps, self.intervals)
            # Coarse steps whose parts are the fine steps would save nothing.
            return factor if self._wanted_parts < factor < steps else None
        if self.cfactor is None:
            return 4
        return self.cfactor if isinstance(self.cfactor, int) else self.cfactor[min(level, len(self.cfactor) - 1)]

    def parts(self, cfactor: int) -> int:
        """Parts of a coarse step that stands for so many steps."""
        return _divisor(cfactor, min(self._wanted_parts, cfactor // 2))

    @property
    def _wanted_parts(self) -> int:
        return self.coarse_parts or _CYCLES[self.cycle].coarse_parts

    @property
    def scheme(self) -> str:
        """`coarse_step`, or the cycle's."""
        return self.coarse_step or _CYCLES[self.cycle].coarse_step

    def nrelax_of(self, level: int) -> int:
        """CF-relaxations on `level`."""
        return self.nrelax0 if level == 0 and self.nrelax0 is not None else self.nrelax


def _divisor(number: int, most: int) -> int:
    """The greatest divisor of a number that is not above `most`."""
    return max(divisor for divisor in range(1, min(most, number) + 1) if number % divisor == 0)
