"""What holds for any propagator by itself, and for an adjoint with the steps whose transposed Jacobians it applies.

Shape letters: `n` rows (steps), `m` intervals of `c` rows, `S` shape of a state, `p` parameters of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, is_dataclass, replace
from math import log, log2
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from xbraid_py.layers.checking.methods import wrong_methods
from xbraid_py.layers.checking.report import Found, Rule, Subject, bad_cost, different, differs, distance, faults, worst
from xbraid_py.layers.module_steps import ModuleSteps
from xbraid_py.layers.steps import Halvable
from xbraid_py.mgrit.equations import Forward
from xbraid_py.mgrit.protocols import Steps

COARSE_BOUND = 1.5  # no step at all is wrong by 1, one into the opposite direction by 2
HALVED_BOUND = 0.35  # 1/4 in the limit; 1/2 where the two are steps of different equations


def _methods(given) -> Found:
    return faults(wrong_methods(given))


METHODS = Rule(
    "methods",
    _methods,
    "something that the solver uses is not there or cannot be called as it does; add what is named here",
)


def _shapes(given: Subject) -> Found:
    propagator, x, c = given.propagator, given.x, given.cfactor
    found = []
    if propagator.direction != given.direction:
        found.append(f"direction={propagator.direction!r} instead of {given.direction:+d}")
    found += bad_cost("cost", propagator.cost)
    found += differs("empty(3)", propagator.empty(3), (3, *x.shape[1:]), x)
    found += differs("step", given.step(x), x.shape, x)
    points = given.points(c)
    return faults(found + differs("relax", given.relax(points, c), points.shape, x))


def _kept(given: Subject) -> Found:
    """Arguments, and the states that a propagator holds, are as they were, and results are new tensors."""
    x, c, found = given.x.clone(), given.cfactor, []
    points, tau = given.points(c), given.random(x)
    arrays = {"x": x, "points": points, "tau": tau} | ({} if given.held is None else {"states": given.held})
    before = {name: array.clone() for name, array in arrays.items()}
    results = {"step": (given.propagator.step(x), x)}
    results["relax"] = (given.propagator.relax(points, c, tau), points)
    for name, array in arrays.items():
        if different(array, before[name]):
            found.append(f"{name} was overwritten")
    for name, (result, argument) in results.items():
        if result.untyped_storage().data_ptr() == argument.untyped_storage().data_ptr():
            found.append(f"{name} returns its argument, or a part of it")
    return faults(found)


def _determined(given: Subject) -> Found:
    """The same twice, also when something else was asked for in between."""
    c, points = given.cfactor, given.points(given.cfactor)
    first, ends = given.step(given.x), given.relax(points, c)
    first, ends = first.clone(), ends.clone()
    given.relax(given.random_points(c), c)
    given.step(given.random(given.x))
    count = different(given.step(given.x), first) + different(given.relax(points, c), ends)
    return Found(count + different(given.step(given.x), first), 0, f"{count} numbers differ" if count else "")


def _apart(given: Subject) -> Found:
    """What comes of a row must not change with the states of other rows."""
    n = len(given.x)
    whole, numbers, figures = given.step(given.x), torch.arange(n), [0.0]
    for bit in range((n - 1).bit_length()):  # any two rows differ in one of the bits of their numbers
        for value in (0, 1):
            mine = (((numbers >> bit) & 1) == value).to(given.x.device)
            x = given.x + given.random(given.x)
            x[mine] = given.x[mine]
            figures.append(distance(given.step(x)[mine], whole[mine]))
    return Found(worst(figures), given.tolerance)


def _relaxed(given: Subject) -> Found:
    """Intervals of one row, of c, and one of all rows."""
    figures = []
    for c in sorted({1, given.cfactor, len(given.x)}):
        points = given.random_points(c)
        figures.append(distance(given.relax(points, c), given.literal(points, c)[0]))
    return Found(worst(figures), given.tolerance)


def _corrected(given: Subject) -> Found:
    figures = []
    for c in sorted({1, given.cfactor, len(given.x)}):
        points, tau = given.random_points(c), 0.1 * given.random(given.x)
        figures.append(distance(given.relax(points, c, tau), given.literal(points, c, tau)[0]))
    return Found(worst(figures), given.tolerance)


def _inputs(given: Subject) -> Found:
    figures = []
    for c in sorted({1, given.cfactor, len(given.x)}):
        for tau in (None, 0.1 * given.random(given.x)):
            points, inputs = given.points(c), torch.full_like(given.x, torch.nan)
            given.relax(points, c, tau, inputs)
            figures.append(distance(inputs, given.literal(points, c, tau)[1]))
    return Found(worst(figures), given.tolerance)


def _recorded(given: Subject) -> Found | str:
    held, c = given.held, given.cfactor
    if held is None or held.shape != given.x.shape:
        return "the propagator has no attribute `states` with a row for each step"
    # From where the states may have come before: a propagator may keep more of the last recorded relaxation.
    points, before = given.points(c), held.clone()
    held.fill_(torch.nan)
    ends = given.propagator.relax(points.clone(), c, None, True).clone()
    expected, inputs = given.literal(points, c)
    found = worst([distance(held, inputs), distance(ends, expected)])
    held.copy_(before)
    return Found(found, given.tolerance)


def _coarse_rows(given: Subject) -> Found:
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
    return states.clone() if coarse.transfer is None else coarse.transfer.restrict(states)


def _coarse_error(propagator, points: Tensor, c: int) -> tuple[float, float]:
    """How far one coarse step is from the c steps it stands for, and what these change; 2-norms."""
    coarse = propagator.coarsen(c, "average", "euler", 1)
    ends, start = _to_coarse(coarse, propagator.relax(points.clone(), c)), _to_coarse(coarse, points)
    error = (coarse.step(start.clone()) - ends).double().norm()
    return float(error), float((ends - start).double().norm())


def _rounding(given: Subject) -> float:
    return given.tolerance * float(given.x.double().norm())


def _one_coarse_step(given: Subject) -> Found:
    """One coarse step instead of c steps, in units of what these change."""
    error, change = _coarse_error(given.propagator, given.points(given.cfactor), given.cfactor)
    rounding = _rounding(given)
    return Found(0.0 if error <= rounding else error / max(change, rounding), COARSE_BOUND)


def _halved_steps(given: Subject) -> Found | str:
    """Both halves of a row have the same weights: what a coarse step for the two is wrong by is of second order."""
    propagator = given.propagator
    if not isinstance(propagator, Forward) or not isinstance(propagator.steps, Halvable):
        return "only steps with a method `halved` can be cut in two"
    if any(transfer is not None for transfer in propagator.transfers):
        return "coarse states are others"
    errors, points, steps = [], given.x, propagator.steps.halved()
    for _ in range(2):
        steps, points = steps.halved(), points.repeat_interleave(2, 0)
        error, _ = _coarse_error(replace(propagator, steps=steps, states=None), points, 2)
        errors.append(error / len(points) ** 0.5)
    if errors[1] <= _rounding(given):
        return "the coarse step is exact"
    return Found(errors[1] / errors[0], HALVED_BOUND, f"it falls with order {log2(errors[0] / errors[1]):.1f}")


def _moved(given: Subject) -> Found:
    """Each rank steps its own rows: one row, some, and the rest."""
    n = len(given.x)
    bounds = tuple(sorted({0, min(1, n), (n + 1) // 2, n}))
    whole, figures = given.step(given.x), []
    for rank, (first, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
        rows = slice(first, end)
        figures.append(distance(given.part(rank, bounds).step(given.x[rows].clone()), whole[rows]))
    return Found(worst(figures), given.tolerance)


def _without_rows(given: Subject) -> Found:
    x, c, n = given.x, given.cfactor, len(given.x)
    nothing, none = given.part(1, (0, n, n)), x[:0]
    found = differs("step", nothing.step(none.clone()), none.shape, x)
    found += differs("relax", nothing.relax(none.clone(), c, none.clone(), False, none.clone()), none.shape, x)
    coarser = nothing.coarsen(c, "average", "euler", 1)
    empty = coarser.empty(0)
    return faults(found + differs("the coarse step", coarser.step(empty), empty.shape, x))


FIRST = ("shapes and types", "arguments kept", "the same twice")
RULES = (
    Rule(
        "shapes and types",
        _shapes,
        "the solver counts on the direction (+1 forwards, -1 for adjoints), on a cost, and on states (n, *S) of one "
        "shape and type; look at what is named here first",
    ),
    Rule(
        "arguments kept",
        _kept,
        "step and relax must return new tensors and leave their arguments and the recorded states as they are: the "
        "solver uses all of them again; look for operations in place (x += ..., x.add_(...)) and for views",
        FIRST[:1],
    ),
    Rule(
        "the same twice",
        _determined,
        "the same states give other results when they are stepped again: every sweep would solve another equation; "
        "look for random numbers (xbraid_py.nn.Dropout has a mask that stays), statistics that move, and caches",
        FIRST[:2],
    ),
    Rule(
        "rows apart",
        _apart,
        "what comes of a row changes with the states of other rows, but these are other times; look for a mean, a "
        "norm or a product over the first axis of x",
        FIRST,
    ),
    Rule(
        "relax",
        _relaxed,
        "relax(points, c) is not c calls of step: row i of step must be the layer that relax uses as row i, counted in "
        "the direction of propagation (adjoints begin at the last row of each interval)",
        (*FIRST, "rows apart"),
    ),
    Rule(
        "relax with tau",
        _corrected,
        "tau (n, *S) is to be added behind each step, its row i behind layer i; without it relax is right",
        (*FIRST, "relax"),
    ),
    Rule(
        "inputs",
        _inputs,
        "relax must write what goes into layer i to row i of `inputs`: not what comes out of it, and tau included",
        (*FIRST, "relax with tau"),
    ),
    Rule(
        "recorded states",
        _recorded,
        "relax with record=True must leave the input of layer i in row i of `states`, where the adjoint is taken, and "
        "return the same ends",
        (*FIRST, "inputs"),
    ),
    Rule(
        "coarse propagator",
        _coarse_rows,
        "coarsen(c, weights, scheme, parts) must give a propagator with the same direction, a cost, and one row for "
        "each interval of c rows, for all choices of weights and scheme, and again from a coarse one",
        (*FIRST, "relax"),
    ),
    Rule(
        "coarse step",
        _one_coarse_step,
        "one coarse step is far from the c steps it stands for, in units of what they change: the solver would "
        "converge slowly or not at all; look at the size c h of the coarse step and at its weights, or take a smaller "
        "cfactor or more layers",
        (*FIRST, "coarse propagator"),
    ),
    Rule(
        "coarse step with h halved",
        _halved_steps,
        "the distance of a coarse step from the two steps it stands for does not fall by a factor 4 with h halved, as "
        "that of two steps of one equation does: look at its size 2 h, and at its weights, which are theirs",
        (*FIRST, "coarse step"),
    ),
    Rule(
        "redistribute",
        _moved,
        "a propagator that got some of the rows by redistribute(comm, source, target) does not step these rows as the "
        "whole one does; look for what differs from layer to layer and was not handed over",
        (*FIRST, "rows apart"),
    ),
    Rule(
        "ranks without rows",
        _without_rows,
        "on more ranks than intervals some have no rows: step, relax and coarsen have to take tensors (0, *S)",
        (*FIRST, "coarse propagator", "redistribute"),
    ),
)
FORWARD_ONLY = ("recorded states", "coarse step with h halved")
BACKWARD_RULES = tuple(rule for rule in RULES if rule.name not in FORWARD_ONLY)


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
            other = replace(cast(Any, steps), theta=steps.theta + eps * w)
            return replace(cast(Any, pair.forward.propagator), steps=other).step(x.clone())

        errors.append(_taylor(shifted, v, products))
    gradient.copy_(before)
    best = _best(pair, errors)
    if not again <= given.tolerance:
        return Found(again, given.tolerance, "with `inputs` and without them it is another")
    return best


PAIR_RULES = (
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
