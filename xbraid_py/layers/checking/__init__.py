"""A self-test of propagators: what `MGRIT` counts on, tried with states and reported in plain words.

Shape letters: `n` rows (steps), `c` of them in an interval, `S` shape of a state.
"""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor

from xbraid_py.comm.partition import require_multiple
from xbraid_py.layers.checking import rules
from xbraid_py.layers.checking.methods import are_steps
from xbraid_py.layers.checking.report import Check, Found, PropagatorReport, Subject, attempt, examine
from xbraid_py.layers.dense import ResidualSteps
from xbraid_py.layers.time_steps import TimeStepper, TimeSteps, inner
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.mgrit.protocols import Propagator, Steps

__all__ = ["Check", "PropagatorReport", "check_propagator"]

_SAMPLES = 5


def check_propagator(
    forward: Propagator | Steps | TimeStepper,
    adjoint: Propagator | None = None,
    *,
    states: Any = None,
    t: Any = None,
    cfactor: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
) -> PropagatorReport:
    """Try whether a propagator, and its adjoint, are what the solver takes them for.

    Of each propagator: its methods; direction, shapes and types; arguments are kept; the same result twice; rows do not
    mix; `relax` is c calls of `step`, with tau and without, and writes the inputs of the steps; recorded states;
    `coarsen`; `redistribute`, ranks without rows included. Of the adjoint: it is linear; it is the transposed Jacobian
    of the step, against central differences of decreasing length; so is the recorded gradient of the weights. What is
    missing, or raises, is a check that has failed.

    Parameters
    ----------
    forward : Propagator, Steps or TimeStepper
        All of its rows are here: no messages are sent. Of steps, as `ResidualSteps`, both propagators are made, and of
        a `TimeStepper` on tensors; on arrays the one that goes forwards.
    adjoint : Propagator, optional
        Linearized at `states`.
    states : (n, *S) tensor, or array for a `TimeStepper` on arrays, optional
        Inputs of the steps. If not given, those of `adjoint`, or random ones where their shape is known: that of
        `forward.template`, or of a few samples for dense layers.
    t : (n + 1,) tensor or sequence of float
        Times of a `TimeStepper`.
    cfactor : int
        c, a divisor of n.
    seed : int
        Of all random numbers.
    tolerance : float, optional
        Of differences by rounding, relative to the largest number in sight; 10,000 times the rounding error of the
        states' type if not given. Coarse steps and difference quotients have bounds of their own.

    Returns
    -------
    PropagatorReport
        `print` shows all checks with what was measured; `require()` raises if one has failed.

    Raises
    ------
    ValueError
        If c is no divisor of n, or it cannot be told what the states, or the times, look like.

    Notes
    -----
    What is recorded (`states`, `gradient`) is put back afterwards, but graphs that a propagator keeps are those of the
    check. Nothing is known of weights outside of `steps.theta`, of recorded states that are not in an attribute
    `states`, and of `correct`, which only makes a gradient better.

    Examples
    --------
    An equation of one's own, u' = -a u with another rate a in each layer, solved by implicit Euler steps: the step
    divides by 1 + h a, and so does its adjoint.

    >>> from dataclasses import dataclass, replace
    >>> import torch
    >>> from xbraid_py import check_propagator
    >>> @dataclass(frozen=True)
    ... class Decay:
    ...     theta: torch.Tensor  # (n, 1), the rates
    ...     h: float
    ...     parts: int = 1
    ...     cost = 1.0
    ...
    ...     def relax(self, points, cfactor, tau, inputs, record=False):
    ...         u = points
    ...         for j in range(cfactor):
    ...             rows = slice(j, None, cfactor)  # row j of all intervals at once
    ...             if inputs is not None:
    ...                 inputs[rows] = u
    ...             u = u / (1 + self.h * self.theta[rows])
    ...             if tau is not None:
    ...                 u = u + tau[rows]
    ...         return u
    ...
    ...     def relax_adjoint(self, states, points, cfactor, tau, inputs, gradient):
    ...         v = points
    ...         for j in reversed(range(cfactor)):
    ...             rows = slice(j, None, cfactor)
    ...             if inputs is not None:
    ...                 inputs[rows] = v
    ...             divisor = 1 + self.h * self.theta[rows]
    ...             if gradient is not None:
    ...                 gradient[rows] = -self.h * (v * states[rows] / divisor**2).sum(1, keepdim=True)
    ...             v = v / divisor
    ...             if tau is not None:
    ...                 v = v + tau[rows]
    ...         return v
    ...
    ...     def coarsen(self, cfactor, weights, scheme, parts=1):
    ...         rates = self.theta.unflatten(0, (-1, cfactor)).mean(1)
    ...         return replace(self, theta=rates, h=cfactor * self.h)
    ...
    ...     def halved(self):  # only for the check that coarse steps are of the right order
    ...         return replace(self, theta=self.theta.repeat_interleave(2, 0), h=self.h / 2)
    ...
    ...     def redistribute(self, comm, source, target):
    ...         return replace(self, theta=comm.redistribute(self.theta, source, target))
    >>> rates = torch.linspace(0.5, 2.0, 8, dtype=torch.float64)[:, None]
    >>> report = check_propagator(Decay(rates, 0.1), states=torch.randn(8, 3, dtype=torch.float64))
    >>> report.passed
    True
    >>> report.require()  # in a test: raises with what failed, what it means and where to look

    Let the adjoint forget a layer, or divide by 1 - h a, and `print(report)` says so:
    "adjoint: transposed Jacobian: the adjoint is not the transposed Jacobian of the step: ...".
    """
    generator, kind = torch.Generator().manual_seed(seed), type(forward).__name__
    if (adjoint is not None) and (isinstance(forward, TimeStepper) or are_steps(forward)):
        raise ValueError("adjoint must be None beside steps, which have one of their own; use Forward(steps, ...)")
    if isinstance(forward, TimeStepper):
        forward, adjoint, states = _of_stepper(forward, states, t)
    of_steps, held, backwards = are_steps(forward), set(), set()
    checks, _ = examine("forward", (rules.METHODS,), forward, held)
    if adjoint is not None:
        checks += examine("adjoint", (rules.METHODS,), adjoint, backwards)[0]
    if not all(check.passed for check in checks):
        left_out = (("all others", "the methods have to be there first"),)
        return PropagatorReport(f"check_propagator({kind})", tuple(checks), left_out)
    if of_steps:
        x = _states_of_steps(cast(Steps, forward), states, generator)
    else:
        x = _states_of(forward, adjoint, states, generator)
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"states={tuple(x.shape)} {x.dtype} must be numbers (n, *S); use torch.randn(8, 4, 5)")
    if cfactor < 1:
        raise ValueError(f"cfactor={cfactor} must be at least 1; use 2")
    if not len(x):
        raise ValueError(f"states.shape={tuple(x.shape)} has no rows; use a propagator with some layers")
    require_multiple("len(states)", len(x), cfactor, "cfactor")
    name = f"check_propagator({kind}), {len(x)} rows of states {tuple(x.shape[1:])} {str(x.dtype).split('.')[-1]}"
    if of_steps:
        made = attempt(_propagators, forward, x, cfactor)
        if isinstance(made, Found):
            meaning = "relax(points, cfactor, None, inputs, True) must take states through all steps of the intervals"
            checks.append(Check("forward: relax", made.measured, made.bound, False, made.note, meaning))
            return PropagatorReport(name, tuple(checks), (("all others", "relax has to run first"),))
        forward, adjoint, x = made
        checks += examine("adjoint", (rules.METHODS,), adjoint, backwards)[0]
    if tolerance is None:
        tolerance = 1e4 * torch.finfo(x.dtype).eps

    def subject(propagator, x, direction):
        return Subject(propagator, x, cfactor, tolerance, direction, generator)

    of_forward = subject(forward, x, +1)
    more, left_out = examine("forward", rules.RULES, of_forward, held)
    checks += more
    if adjoint is not None and held.issuperset((*rules.FIRST, "rows apart")):
        of_adjoint = subject(adjoint, torch.empty_like(x), -1)
        of_adjoint.x = of_adjoint.random(x)
        both = rules.Pair(of_forward, of_adjoint)
        for some, what in ((rules.BACKWARD_RULES, of_adjoint), (rules.PAIR_RULES, both)):
            more, without = examine("adjoint", some, what, backwards)
            checks, left_out = checks + more, left_out + without
    elif adjoint is not None:
        left_out.append(("adjoint: all", "the steps have to be right first"))
    return PropagatorReport(name, tuple(checks), tuple(left_out))


def _of_stepper(stepper: TimeStepper, states: Any, t: Any) -> tuple[Forward, Adjoint | None, Tensor]:
    """Propagators of a stepper, and the states as a tensor."""
    if states is None or t is None:
        raise ValueError(
            "states=None or t=None, but a TimeStepper says nothing of either; use states=torch.randn(8, *S) and "
            "t=torch.linspace(0, 1, 9)"
        )
    is_numpy = not isinstance(states, Tensor)
    x, times = torch.as_tensor(states).detach(), torch.as_tensor(t, dtype=torch.float64)
    if times.shape != (len(x) + 1,):
        raise ValueError(f"t has the shape {tuple(times.shape)} and must be {(len(x) + 1,)}, one more than states")
    functions, x = stepper.functions(x[0], is_numpy), x.view(-1, *inner(x.shape[1:]))
    steps = TimeSteps(functions, torch.stack([times[:-1], times[1:]], 1))
    return Forward(steps, torch.empty_like(x), x[0]), None if is_numpy else Adjoint(steps, x, None), x


def _states_of_steps(steps: Steps, states: Tensor | None, generator: torch.Generator) -> Tensor:
    if states is not None:
        return states.detach()
    if not isinstance(steps, ResidualSteps):
        raise ValueError("states=None, but the shape of a state is not known; use states=torch.randn(n, *S), n layers")
    return _random((len(steps.theta) // steps.parts, steps.block.inputs, _SAMPLES), steps.theta, generator)


def _states_of(forward, adjoint, states: Tensor | None, generator: torch.Generator) -> Tensor:
    """Inputs of the steps, at which the adjoint is linearized."""
    if states is not None:
        return states.detach()
    if isinstance(adjoint, Adjoint):
        return adjoint.states[:: adjoint.steps.parts].detach().clone()
    if not isinstance(forward, Forward) or adjoint is not None:
        raise ValueError(
            "states=None, but nothing says what the inputs of the steps are; use states=torch.randn(n, *S), n layers, "
            "and the states that the adjoint is linearized at"
        )
    steps = forward.steps
    return _random((len(steps.theta) // steps.parts, *forward.template.shape), forward.template, generator)


def _random(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like.device, like.dtype)


def _propagators(steps: Steps, x: Tensor, cfactor: int) -> tuple[Forward, Adjoint, Tensor]:
    """Both propagators, linearized at a trajectory through each interval, and the inputs of the steps on it."""
    parts, rows = steps.parts, steps
    if parts > 1:
        if not is_dataclass(steps):
            raise ValueError(f"parts={parts} of steps that are no dataclass; use parts=1, or give forward and adjoint")
        rows = replace(steps, parts=1)  # as steps of their own: the adjoint is taken at the input of each part
    states = x.new_empty((len(x) * parts, *x.shape[1:]))
    # Recorded: graphs that are kept belong to these states.
    rows.relax(x[::cfactor].clone(), cfactor * parts, None, states, True)
    forward = Forward(steps, torch.empty_like(x), x[0])
    return forward, Adjoint(steps, states, torch.empty_like(steps.theta)), states[::parts].clone()
