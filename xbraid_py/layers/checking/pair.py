"""What holds for an adjoint propagator together with the steps whose transposed Jacobians it applies.

Shape letters: `n` rows (steps), `m` intervals of `c` rows, `S` shape of a state, `p` parameters of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from math import log
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from xbraid_py.layers.checking.report import Found, Rule
from xbraid_py.layers.checking.subject import Subject, distance, worst
from xbraid_py.layers.module_steps import ModuleSteps
from xbraid_py.mgrit.protocols import Steps

PAIRS = 3
TINY = torch.finfo(torch.float64).tiny
RATIO = 4
LENGTHS = (64, 16, 4, 1, 1 / 4, 1 / 16)  # of the differences, in cube roots of the rounding error
BOUND = 1e3  # in the power 2/3 of it, which central differences can reach


@runtime_checkable
class OfSteps(Protocol):
    """A propagator that shows its steps."""

    steps: Steps


@runtime_checkable
class WithGradient(Protocol):
    """An adjoint that shows where it leaves the gradient of the weights."""

    gradient: Tensor | None


@dataclass
class Pair:
    """An adjoint, with states v behind each row, and the forward propagator at the states of its linearization."""

    forward: Subject
    adjoint: Subject

    @property
    def bound(self) -> float:
        """Of errors of central differences of these numbers."""
        return BOUND * torch.finfo(self.forward.x.dtype).eps ** (2 / 3)


def _linear(pair: Pair) -> Found:
    """A (a v + b w) = a A v + b A w, and A 0 = 0; by step and by relax."""
    given, figures = pair.adjoint, []
    for c in (0, given.cfactor):

        def back(v, c=c):
            return given.relax(v, c) if c else given.step(v)

        v = given.points(c) if c else given.x
        w = given.random(v)
        for a, b in ((1.7, -0.6), (-1.0, 0.0), (1e-3, 300.0)):
            figures.append(distance(back(a * v + b * w), a * back(v) + b * back(w)))
        figures.append(float(back(torch.zeros_like(v)).double().abs().max()))
    return Found(worst(figures), given.tolerance)


def _products(a: Tensor, b: Tensor) -> Tensor:
    """Inner products (n,) of rows, in double precision."""
    return (a.double() * b.double()).flatten(1).sum(1)


def _lengths(a: Tensor) -> Tensor:
    return _products(a, a).sqrt()


def _size(a: Tensor) -> float:
    """Root mean square, or 1 of zeros."""
    return float(a.double().square().mean().sqrt()) or 1.0


def _taylor(shifted: Callable[[float], Tensor], v: Tensor, products: Tensor) -> Tensor:
    """For each length (rows of the result) and each row, how far <v, J w> is from the products, relative to |v| |J w|.

    shifted(eps) are the results (n, *S) of the steps with what they depend on shifted by eps w.
    """
    cube_root = torch.finfo(v.dtype).eps ** (1 / 3)
    # The rounding of the results counts as well: a derivative may be small beside them.
    floor, found = 0.01 * _lengths(shifted(0.0)), []
    for length in LENGTHS:
        eps = cube_root * length
        slope = (shifted(eps).double() - shifted(-eps).double()) / (2 * eps)
        scale = _lengths(v) * (_lengths(slope) + floor)
        errors = (_products(v, slope) - products).abs() / scale.clamp_min(TINY)
        found.append(errors)
    return torch.stack(found)


def _best(pair: Pair, errors: list[Tensor]) -> Found:
    """The worst row, and how fast errors fall with the length at first.

    A corner of an activation between two states spoils some lengths and directions, not all: of the directions each
    row has the median, of the lengths the best.
    """
    measured = float(torch.stack([each.min(0).values for each in errors]).median(0).values.max())
    first, second = (worst([float(each[i].max()) for each in errors]) for i in (0, 1))
    order = log(max(first, TINY) / max(second, TINY), RATIO)
    note = f"the error falls with order {round(order, 1) + 0.0:.1f} in the length of the difference"  # never -0.0
    return Found(measured, pair.bound, note)


def _transposed(pair: Pair) -> Found:
    """<v, J w> by central differences of the step, against <A v, w>."""
    given, x, errors = pair.adjoint, pair.forward.x, []
    for _ in range(PAIRS):
        v, w = given.random(x), _size(x) * given.random(x)
        products = _products(given.step(v), w)
        errors.append(_taylor(lambda eps, w=w: pair.forward.step(x + eps * w), v, products))
    return _best(pair, errors)


def _weights(pair: Pair) -> tuple[Steps, Tensor] | str:
    """The steps whose weights can be changed, and where a recorded relaxation leaves their gradient."""
    forward, adjoint = pair.forward.propagator, pair.adjoint.propagator
    if not isinstance(adjoint, WithGradient) or adjoint.gradient is None:
        return "the adjoint has no attribute `gradient`"
    if not isinstance(forward, OfSteps) or not is_dataclass(forward) or not is_dataclass(forward.steps):
        return "the steps are no dataclass with weights `theta`, so they cannot be tried with others"
    return forward.steps, adjoint.gradient


def _direction(given: Subject, steps) -> Tensor:
    """Random changes of the weights, of their size; none of numbers that have no derivative."""
    change = _size(steps.theta) * given.random(steps.theta)
    if isinstance(steps, ModuleSteps):
        for column, kind in zip(steps.block.split(change), steps.block.columns, strict=True):
            if not kind.is_parameter:
                column.zero_()
    return change


def _gradient(pair: Pair) -> Found | str:
    """<v, d step / d theta w> by central differences, against <gradient, w>."""
    there = _weights(pair)
    if isinstance(there, str):
        return there
    (steps, gradient), given, x = there, pair.adjoint, pair.forward.x
    before, errors, again = gradient.clone(), [], 0.0
    for _ in range(PAIRS):
        points, v = given.random(given.points(given.cfactor)), torch.empty_like(x)
        w = _direction(given, steps)
        # With inputs, which say what goes through each layer, and without, where kept graphs may serve instead.
        found = []
        for inputs in (v, None):
            gradient.fill_(torch.nan)
            given.propagator.relax(points.clone(), given.cfactor, None, True, inputs)
            found.append(gradient.clone())
            if gradient.isnan().any():
                gradient.copy_(before)
                return Found(float("nan"), pair.bound, "not all of it is written, or it is added to what was there")
        again = worst([again, distance(found[1], found[0])])
        products = _products(found[0], w).view(len(x), -1).sum(1)  # all parts of a step

        def shifted(eps, w=w):
            other = replace(steps, theta=steps.theta + eps * w)
            return replace(pair.forward.propagator, steps=other).step(x.clone())

        errors.append(_taylor(shifted, v, products))
    gradient.copy_(before)
    best = _best(pair, errors)
    if not again <= given.tolerance:
        return Found(again, given.tolerance, "with `inputs` and without them it is another")
    return best


RULES = (
    Rule(
        "linear",
        _linear,
        "the adjoint is not linear in v: A(a v + b w) is not a A v + b A w, or A 0 is not 0; look for an activation, "
        "a clamp or a constant on the way back, and for step sizes that depend on v",
        ("relax",),
    ),
    Rule(
        "transposed Jacobian",
        _transposed,
        "the adjoint is not the transposed Jacobian of the step: <A v, w> is not <v, J w>, with J w by central "
        "differences of step, however small they are; look for a missing transpose or sign, for h, for the part of "
        "the state that is passed on unchanged, and whether the adjoint is linearized at the states given here",
        ("linear",),
    ),
    Rule(
        "gradient of the weights",
        _gradient,
        "what a recorded relaxation leaves in `gradient` is not the derivative of <v, step> by the weights, with v the "
        "adjoint behind each layer; look at h, at the order of the weights in a row, and whether it is written anew "
        "and not added up",
        ("transposed Jacobian",),
    ),
)
