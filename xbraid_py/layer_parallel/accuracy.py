"""How good the gradients of a stack are, and what is done about it.

Minibatch training starts every solve anew, on other samples, so errors of the solver are a bias of the gradient. What
the solver knows are its residuals; what counts is the gradient. Every so often the gradient of one update is computed
exactly as well: the ratio of its error to the residuals then turns the residuals of the following updates
into estimates of the gradient's error. An error far below the noise that the choice of the samples leaves in a gradient
is worth nothing: tolerances can be loosened until it comes near to that.
"""

from __future__ import annotations

import logging
import warnings
from collections import deque
from dataclasses import asdict, dataclass, field
from math import isnan
from statistics import median

log = logging.getLogger(__name__)

TIGHTER = 0.3  # tolerances after a tightening over those before
LOOSEN = 0.5  # share of the bound below which an error lets tolerances be loosened
_FLOOR = 1e-12  # residuals below this say nothing
_WEIGHED = 10  # updates whose sweeps say whether they pay


@dataclass(frozen=True, kw_only=True)
class GradientControl:
    """What is asked of the gradients of a stack's weights.

    Parameters
    ----------
    gradient_error
        Relative error (2-norm, of all weights of the stack) above which the solver is told to do more.
    check
        Updates between two exact gradients, to measure the error; the first update is one, and each after a change or
        after an estimate above `gradient_error`. 0: never, and the estimate is the sum of the residuals.
    adapt
        Do more when the error exceeds `gradient_error`; otherwise only say so.
    max_level
        Tightenings (one more iteration, tolerances times 0.3) before the stack propagates exactly, layer after layer.
    noise
        Share of the noise of a minibatch's gradient that its error may be, where this is more than `gradient_error`;
        0.25 is a good one. The noise, the standard deviation that other samples would bring about over the norm of the
        gradient, is estimated where the error is measured, from the exact gradient of the first half of the samples (of
        those that this stack gets: with R replicas take 1 / sqrt(R) of the share). The solver is told to do less, too:
        where a measured error is at most half of what it may be, a tightening is undone, or there is an iteration less
        and tolerances are divided by 0.3, up to `max_level` times. 0: tolerances are never loosened.
    """

    gradient_error: float = 0.1
    check: int = 100
    adapt: bool = True
    max_level: int = 4
    noise: float = 0.0

    def __post_init__(self):
        if not 0.0 < self.gradient_error < float("inf"):
            raise ValueError(f"gradient_error={self.gradient_error} must be positive and finite; use 0.1")
        for name, least in (("check", 0), ("max_level", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}; use {least or 0}")
        if not 0.0 <= self.noise < float("inf"):
            raise ValueError(f"noise={self.noise} must be at least 0 and finite; use 0.25, or 0 for gradient_error")
        if self.noise and not self.check:
            raise ValueError(f"noise={self.noise} with check=0: nothing would ever be measured; use check=100")


@dataclass(frozen=True)
class SolveRecord:
    """What the last forward and backward solve of a stack did.

    Attributes
    ----------
    update : int
        Number of the backward solve, from 1.
    mode : str
        "mgrit", or "exact": layer after layer.
    level : int
        Tightenings in force; where the noise of minibatches allows for less, minus the loosenings.
    iterations, adjoint_iterations : int
        Relaxations of the fine level, forwards and backwards.
    residual, adjoint_residual : float
        Relative residuals at the end, or the change by the last correction.
    gradient_error : float
        Estimate of the relative error of the gradient of the stack's weights, for the given gradient of its output; NaN
        if the solver has met NaN. Of exact propagation 0, whatever it has met.
    measured : bool
        Whether it is no estimate, but the error measured against the exact gradient (which was then used).
    event : str
        What was changed after this update; empty if nothing was.
    residuals, adjoint_residuals : tuple of float
        What they were after each iteration, with V- and F-cycles before the first one, too; empty where the propagation
        was exact.
    noise : float
        Relative noise of the minibatch, where it was last estimated; 0 if nobody asked for it.
    ranks : int
        That share the layers; not in `as_dict`.
    """

    update: int
    mode: str
    level: int
    iterations: int
    adjoint_iterations: int
    residual: float
    adjoint_residual: float
    gradient_error: float
    measured: bool
    event: str
    residuals: tuple[float, ...] = ()
    adjoint_residuals: tuple[float, ...] = ()
    noise: float = 0.0
    ranks: int = field(default=1, compare=False)

    @property
    def cannot_pay(self) -> bool:
        """Whether exact propagation on one rank is at least as fast, by the count of sweeps.

        On P ranks a sweep of the fine level takes 1 / P of a pass on one rank, coarse levels and messages not counted;
        so P sweeps forwards and P backwards take at least as long as an exact update.
        """
        return self.mode == "mgrit" and self.ranks > 1 and min(self.iterations, self.adjoint_iterations) >= self.ranks

    def as_dict(self) -> dict:
        """For a record of the run."""
        found = asdict(self)
        del found["ranks"]
        return found


class Controller:
    """Watches the error of the gradient and chooses how exactly the next update is solved.

    All ranks see the same numbers and take the same decisions; one of them, that with `tells`, logs events as warnings.
    """

    def __init__(self, accuracy: GradientControl, levels: bool, tells: bool = True):
        self.accuracy, self._tells = accuracy, tells
        self.update = 0
        self.level = 0
        # With a single level there is nothing but exact propagation.
        self.exact = not levels
        self._iterative = levels
        # Error of the gradient for one unit of residual: of the last measurement, and by the sweeps of the solves.
        # Solves that stop after fewer sweeps may leave a residual as small and an error ten times as large.
        self._ratio = 1.0
        self._ratios: dict[tuple[int, int], float] = {}
        self._due = False
        self.noise = 0.0
        # After a tightening nothing is loosened until the next regular measurement: it would go to and fro.
        self._tightened = False
        self._last: deque[SolveRecord] = deque(maxlen=_WEIGHED)
        self._has_warned = False

    @property
    def bound(self) -> float:
        """Error of the gradient above which the solver does more."""
        return max(self.accuracy.gradient_error, self.accuracy.noise * self.noise)

    @property
    def checks_now(self) -> bool:
        """Whether the next update measures the error of its gradient: now and then, after a change, on an alarm."""
        check = self.accuracy.check
        return self._iterative and check > 0 and (self._due or self.update % check == 0)

    def observe(
        self,
        residuals: float,
        measured: float | None,
        sweeps: tuple[int, int] = (0, 0),
        noise: float | None = None,
    ) -> tuple[float, str]:
        """Take in the residuals of an update and, where measured, the error of its gradient: estimate and event.

        `sweeps` are those of the two solves; `noise` is that of the minibatch, where it was estimated.
        """
        is_regular = self.accuracy.check > 0 and self.update % self.accuracy.check == 0
        self.update += 1
        self._due = False
        # NaN compares false.
        if noise is not None and 0.0 < noise < float("inf"):
            self.noise = noise
        if measured is not None:
            # NaN compares false: an error that is none changes nothing.
            if measured >= 0.0:
                self._ratio = self._ratios[sweeps] = measured / max(residuals, _FLOOR)
            estimate = measured
        elif self.exact:
            estimate = 0.0
        else:
            estimate = self._ratios.get(sweeps, self._ratio) * residuals
            accuracy = self.accuracy
            if accuracy.adapt and accuracy.check > 0 and estimate > self.bound:
                # An estimate raises the alarm; a measurement decides.
                self._due = True
                return estimate, ""
        level, exact = self.level, self.exact
        if is_regular:
            self._tightened = False
        event = self._decide(estimate, measured is not None) or self._loosen(measured, sweeps)
        if isnan(estimate):
            event = self._say("gradient error NaN: there are NaN or infinite numbers in the states or the adjoints")
        if level != self.level or (exact and not self.exact):
            self._due = True
        return estimate, event

    def weigh(self, record: SolveRecord) -> None:
        """Warn, once, where the last updates took so many sweeps that one rank would be at least as fast."""
        self._last.append(record)
        is_due = self._tells and not self._has_warned and len(self._last) == _WEIGHED
        if not is_due or not all(each.mode == "mgrit" for each in self._last):
            return
        forwards = median(each.iterations for each in self._last)
        back = median(each.adjoint_iterations for each in self._last)
        if min(forwards, back) >= record.ranks > 1:
            self._has_warned = True
            warnings.warn(
                f"{forwards:g} sweeps forwards and {back:g} back on {record.ranks} ranks, medians of {_WEIGHED} "
                f"updates: each takes at least 1/{record.ranks} of a pass on one rank, so exact propagation on one "
                f"rank is no slower; use MGRIT(cycle='pipeline'), which is exact, more ranks, or fewer sweeps "
                f"(max_iter, tol); stack.advise(batch) says what is fastest",
                stacklevel=2,
            )

    def _decide(self, estimate: float, measured: bool) -> str:
        accuracy = self.accuracy
        bound = self.bound
        if self.exact:
            if self._iterative and accuracy.adapt and measured and estimate <= bound / 2:
                self.exact = False
                return self._say(f"gradient error {estimate:.2g} by MGRIT: back to it")
            return ""
        if not estimate > bound:
            return ""
        if not accuracy.adapt:
            return self._say(f"gradient error {estimate:.2g} above {bound:.3g}")
        if self.level < accuracy.max_level:
            self.level += 1
            self._tightened = True
            return self._say(f"gradient error {estimate:.2g} above {bound:.3g}: {self._level_in_words()}")
        self.exact = True
        return self._say(f"gradient error {estimate:.2g} above {bound:.3g}: exact propagation")

    def _loosen(self, measured: float | None, sweeps: tuple[int, int]) -> str:
        accuracy = self.accuracy
        wanted = accuracy.noise > 0.0 and accuracy.adapt and self.noise > 0.0 and not self.exact
        if not wanted or measured is None or self._tightened or not measured <= LOOSEN * self.bound:
            return ""
        if self.level <= -accuracy.max_level or max(sweeps) <= 1:
            return ""
        self.level -= 1
        bound = f"{LOOSEN:g} of {self.bound:.2g}"
        return self._say(f"gradient error {measured:.2g} below {bound}: {self._level_in_words()}")

    def _level_in_words(self) -> str:
        return f"{self.level} tightening(s)" if self.level >= 0 else f"{-self.level} loosening(s)"

    def _say(self, event: str) -> str:
        log.log(logging.WARNING if self._tells else logging.DEBUG, "update %d: %s", self.update, event)
        return event

    def state(self) -> dict:
        """What a checkpoint keeps."""
        ratios = [[*sweeps, ratio] for sweeps, ratio in self._ratios.items()]
        kept = {"update": self.update, "level": self.level, "exact": self.exact, "due": self._due}
        kept |= {"noise": self.noise, "tightened": self._tightened}
        return {**kept, "ratio": self._ratio, "ratios": ratios}

    def restore(self, state: dict) -> None:
        """The opposite of `state`."""
        self.update, self.level = int(state["update"]), int(state["level"])
        self.exact, self._ratio = bool(state["exact"]) or not self._iterative, float(state["ratio"])
        self._ratios = {(int(a), int(b)): float(ratio) for a, b, ratio in state["ratios"]}
        self._due = bool(state["due"])
        # Checkpoints of earlier versions know nothing of noise.
        self.noise, self._tightened = float(state.get("noise", 0.0)), bool(state.get("tightened", False))
