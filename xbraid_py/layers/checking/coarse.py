"""Checks of coarse propagators, each row of which stands for an interval of rows.

Shape letters: `n` rows (steps), `m` intervals of `c` rows, `S` shape of a state.
"""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from math import log2

from torch import Tensor

from xbraid_py.layers.checking.report import Found, faults
from xbraid_py.layers.checking.subject import Subject, bad_cost, differs
from xbraid_py.layers.richardson import halved
from xbraid_py.mgrit.equations import Forward

COARSE_BOUND = 1.5  # no step at all is wrong by 1, one into the opposite direction by 2
HALVED_BOUND = 0.35  # 1/4 in the limit; 1/2 where the two are steps of different equations


def rows(given: Subject) -> Found:
    """Direction, cost and shapes of coarse propagators."""
    c, m, found = given.cfactor, len(given.x) // given.cfactor, []
    for weights in ("average", "inject"):
        for scheme in ("euler", "midpoint"):
            coarse, name = given.propagator.coarsen(c, weights, scheme, 1), f"coarsen({c}, {weights!r}, {scheme!r}, 1)"
            if coarse.direction != given.direction:
                found.append(f"{name}.direction={coarse.direction!r} instead of {given.direction:+d}")
            found += bad_cost(f"{name}.cost", coarse.cost)
            start = _to_coarse(coarse, given.points(c))
            found += differs(f"{name}.step", coarse.step(start), start.shape, start)
            if m % c == 0:
                coarser = coarse.coarsen(c, weights, scheme, 1)
                start = _to_coarse(coarser, start[::c])
                found += differs(f"{name}.coarsen(...).step", coarser.step(start), start.shape, start)
    return faults(found)


def _to_coarse(coarse, states: Tensor) -> Tensor:
    """States as they are on the coarse level, if they are others there."""
    transfer = getattr(coarse, "transfer", None)
    return states.clone() if transfer is None else transfer.restrict(states)


def _coarse_error(propagator, points: Tensor, c: int) -> tuple[float, float]:
    """How far one coarse step is from the c steps it stands for, and what these change; 2-norms."""
    coarse = propagator.coarsen(c, "average", "euler", 1)
    ends, start = _to_coarse(coarse, propagator.relax(points.clone(), c)), _to_coarse(coarse, points)
    error = (coarse.step(start.clone()) - ends).double().norm()
    return float(error), float((ends - start).double().norm())


def _rounding(given: Subject) -> float:
    return given.tolerance * float(given.x.double().norm())


def one_step(given: Subject) -> Found:
    """One coarse step instead of c steps, in units of what these change."""
    error, change = _coarse_error(given.propagator, given.points(given.cfactor), given.cfactor)
    rounding = _rounding(given)
    return Found(0.0 if error <= rounding else error / max(change, rounding), COARSE_BOUND)


def halved_steps(given: Subject) -> Found | str:
    """Both halves of a row have the same weights: what a coarse step for the two is wrong by is of second order."""
    propagator = given.propagator
    steps = getattr(propagator, "steps", None)
    named = {each.name for each in fields(steps)} if is_dataclass(steps) else set()
    if not isinstance(propagator, Forward) or not {"h", "theta"} <= named or steps.theta.dim() != 2:
        return "only steps with a size `h` and rows `theta` (n, p) can be cut in two"
    if any(transfer is not None for transfer in propagator.transfers):
        return "coarse states are others"
    errors, points, steps = [], given.x, halved(steps)
    for _ in range(2):
        steps, points = halved(steps), points.repeat_interleave(2, 0)
        error, _ = _coarse_error(replace(propagator, steps=steps, states=None), points, 2)
        errors.append(error / len(points) ** 0.5)
    if errors[1] <= _rounding(given):
        return "the coarse step is exact"
    return Found(errors[1] / errors[0], HALVED_BOUND, f"it falls with order {log2(errors[0] / errors[1]):.1f}")
