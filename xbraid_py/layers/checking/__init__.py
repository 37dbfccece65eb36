"""A self-test of propagators: what `MGRIT` counts on, tried with states and reported in plain words.

Shape letters: `n` rows (steps), `c` of them in an interval, `S` shape of a state.
"""

from __future__ import annotations

from dataclasses import is_dataclass, replace

import torch
from torch import Tensor

from xbraid_py.comm.partition import require_multiple
from xbraid_py.layers.checking import rules
from xbraid_py.layers.checking.report import Check, PropagatorReport, Subject, examine
from xbraid_py.layers.dense import ResidualSteps
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.mgrit.protocols import Propagator, Steps

__all__ = ["Check", "PropagatorReport", "check_propagator"]

_SAMPLES = 5


def check_propagator(
    forward: Propagator | Steps,
    adjoint: Propagator | None = None,
    *,
    states: Tensor | None = None,
    cfactor: int = 2,
    seed: int = 0,
    tolerance: float | None = None,
) -> PropagatorReport:
    """Try whether a propagator, and its adjoint, are what the solver takes them for.

    Of each propagator: direction, shapes and types; arguments are kept; the same result twice; rows do not mix;
    `relax` is c calls of `step`, with tau and without, and writes the inputs of the steps; recorded states;
    `coarsen`; `redistribute`, ranks without rows included. Of the adjoint: it is linear; it is the transposed Jacobian
    of the step, against central differences of decreasing length; so is the recorded gradient of the weights.

    Parameters
    ----------
    forward : Propagator or Steps
        All of its rows are here: no messages are sent. Of steps, as `ResidualSteps`, both propagators are made.
    adjoint : Propagator, optional
        Linearized at `states`.
    states : (n, *S) tensor, optional
        Inputs of the steps. If not given, those of `adjoint`, or random ones where their shape is known: that of
        `forward.template`, or of a few samples for dense layers.
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
        If c is no divisor of n, or it cannot be told what the states look like.
    TypeError
        If `forward` is neither a propagator nor steps.

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
    generator = torch.Generator().manual_seed(seed)
    of_steps = isinstance(forward, Steps)
    if not of_steps and not isinstance(forward, Propagator):
        raise TypeError(
            f"forward={type(forward).__name__} lacks something that every propagator has, or all steps have; add what "
            f"it lacks of xbraid_py.mgrit.Propagator or of xbraid_py.mgrit.Steps"
        )
    if of_steps:
        if adjoint is not None:
            raise ValueError("adjoint must be None beside steps, which have one of their own; use Forward(steps, ...)")
        x = _states_of_steps(forward, states, generator)
    else:
        x = _states_of(forward, adjoint, states, generator)
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"states={tuple(x.shape)} {x.dtype} must be numbers (n, *S); use torch.randn(8, 4, 5)")
    if cfactor < 1:
        raise ValueError(f"cfactor={cfactor} must be at least 1; use 2")
    if not len(x):
        raise ValueError(f"states.shape={tuple(x.shape)} has no rows; use a propagator with some layers")
    require_multiple("len(states)", len(x), cfactor, "cfactor")
    if of_steps:
        forward, adjoint, x = _propagators(forward, x, cfactor)
    if tolerance is None:
        tolerance = 1e4 * torch.finfo(x.dtype).eps

    def subject(propagator, x, direction):
        return Subject(propagator, x, cfactor, tolerance, direction, generator)

    kind = type(forward.steps if of_steps else forward).__name__
    of_forward, held = subject(forward, x, +1), set()
    checks, left_out = examine("forward", rules.RULES, of_forward, held)
    if adjoint is not None and held.issuperset((*rules.FIRST, "rows apart")):
        of_adjoint = subject(adjoint, torch.empty_like(x), -1)
        of_adjoint.x = of_adjoint.random(x)
        backwards: set[str] = set()
        both = rules.Pair(of_forward, of_adjoint)
        for some, what in ((rules.BACKWARD_RULES, of_adjoint), (rules.PAIR_RULES, both)):
            more, without = examine("adjoint", some, what, backwards)
            checks, left_out = checks + more, left_out + without
    elif adjoint is not None:
        left_out.append(("adjoint: all", "the steps have to be right first"))
    name = f"check_propagator({kind}), {len(x)} rows of states {tuple(x.shape[1:])} {str(x.dtype).split('.')[-1]}"
    return PropagatorReport(name, tuple(checks), tuple(left_out))


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
