"""Propagators that are wrong in one way each, by what is wrong, and the check of `check_propagator` that is to say so.

Shape letters: `n` rows (steps), `B` samples.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import reference as ref
import torch

from xbraid_py import Adjoint, Forward, ResidualSteps
from xbraid_py.layers.dense import DenseLayer

n, B = 8, 5


def dense(activation: str = "tanh", rows: int = n, dtype=torch.float64, **options) -> ResidualSteps:
    layer = DenseLayer(4, 4, activation)
    theta = ref.smooth_weights(rows, layer.num_parameters, 0.8, seed=3, rough=0.2).to(dtype)
    return ResidualSteps(layer, theta, **({"h": 0.1} | options))


class Own:
    """A propagator with nothing but what the protocol asks for."""

    def __init__(self, kept):
        self._kept = kept
        self.direction, self.cost, self.transfer = kept.direction, kept.cost, None

    def step(self, x):
        return self._kept.step(x)

    def relax(self, points, cfactor, tau=None, record=False, inputs=None):
        return self._kept.relax(points, cfactor, tau, record, inputs)

    def correct(self, before, after, coarse):
        pass

    def coarsen(self, cfactor, weights, scheme, parts):
        return Own(self._kept.coarsen(cfactor, weights, scheme, parts))

    def redistribute(self, comm, source, target):
        return Own(self._kept.redistribute(comm, source, target))

    def empty(self, num_rows):
        return self._kept.empty(num_rows)


@dataclass(frozen=True)
class Wrong(Forward):
    """Forward steps that are wrong in one way."""

    kind: str = ""

    def __post_init__(self):
        object.__setattr__(self, "seen", [])
        if self.kind == "direction":
            object.__setattr__(self, "direction", -1)

    @property
    def cost(self) -> float:
        return 0.0 if self.kind == "cost" else super().cost

    def step(self, x):
        found = super().step(x)
        if self.kind == "type":
            return found.float()
        if self.kind == "shape":
            return found.flatten(1)
        if self.kind == "overwrites":
            x.copy_(found)
        if self.kind == "view":
            return x.copy_(found)[:]
        if self.kind == "noise":
            return found + 1e-9 * torch.rand(())
        if self.kind == "memory":
            self.seen.append(x.clone())
            return found + (1e-3 * self.seen[-2] if len(self.seen) > 1 else 0.0)
        if self.kind == "rows":
            return found - 1e-3 * x.mean(0)
        if self.kind == "nan" and len(x):
            found[0, 0, 0] = torch.nan
        if self.kind == "no rows" and not len(x):
            return found.new_zeros((1, *found.shape[1:]))
        return found

    def relax(self, points, cfactor, tau=None, record=False, inputs=None):
        points = points.clone()
        if self.kind == "last row":
            rows = replace(self.steps, theta=self.steps.theta.roll(-1, 0))
            return rows.relax(points, cfactor, tau, self.states if record else inputs)
        found = super().relax(points, cfactor, tau, record, inputs)
        if self.kind == "tau" and tau is not None:
            found -= tau[cfactor - 1 :: cfactor]
        if self.kind == "inputs" and inputs is not None:
            inputs[cfactor - 1 :: cfactor] = found
        if self.kind == "recorded" and record:
            self.states[:-1] = self.states[1:].clone()
        return found

    def coarsen(self, cfactor, weights, scheme, parts=1):
        found = super().coarsen(cfactor, weights, scheme, parts)
        if self.kind == "coarse rows":
            return Wrong(found.steps, None, self.template, kind="shape")
        if self.kind == "coarse size":
            return replace(found, steps=replace(found.steps, h=self.steps.h))
        if self.kind == "coarse sign":
            return replace(found, steps=replace(found.steps, h=-found.steps.h))
        if self.kind == "coarse cost":
            return Wrong(found.steps, None, self.template, kind="cost")
        return found

    def redistribute(self, comm, source, target):
        if self.kind == "handed over":
            return replace(self, steps=replace(self.steps, theta=self.steps.theta[: target.count(comm.rank)]))
        return super().redistribute(comm, source, target)


@dataclass(frozen=True)
class WrongSteps(ResidualSteps):
    """Steps with an adjoint that is wrong in one way."""

    kind: str = ""

    def relax_adjoint(self, states, points, cfactor, tau, inputs, gradient):
        right = super().relax_adjoint
        if self.kind == "constant":
            tau = 1e-3 + (points.new_zeros(len(points) * cfactor, *points.shape[1:]) if tau is None else tau)
        if self.kind == "accumulates" and gradient is not None:
            before = gradient.clone()
            found = right(states, points, cfactor, tau, inputs, gradient)
            gradient += before
            return found
        found = right(states, points, cfactor, tau, inputs, gradient)
        if self.kind in ("sign", "gradient"):
            # The gradient of one sign, the adjoint of the other.
            other = replace(self, h=-self.h, kind="")
            if self.kind == "gradient":
                none = (None, None) if inputs is None else (None, inputs.clone())
                other.relax_adjoint(states, points, cfactor, *none, gradient)
                return found
            return other.relax_adjoint(states, points, cfactor, tau, inputs, None)
        return found


@dataclass(frozen=True)
class WrongAdjoint(Adjoint):
    """Adjoints that are wrong in one way."""

    kind: str = ""

    def step(self, x):
        return self.relax(x, 1)

    def relax(self, points, cfactor, tau=None, record=False, inputs=None):
        if self.kind == "clamped":
            v, length = points, cfactor * self.steps.parts
            for j in reversed(range(length)):
                rows = slice(j, None, length)
                if inputs is not None:
                    inputs[rows] = v
                one = replace(self.steps, theta=self.steps.theta[rows])
                v = one.relax_adjoint(self.states[rows], v.clamp(-0.5, 0.5), 1, None, None, None)
                v = v if tau is None else v + tau[rows]
            return v
        if self.kind == "forwards" and cfactor > 1:
            rows = self.steps.theta.unflatten(0, (-1, cfactor)).flip(1).flatten(0, 1)
            return replace(self.steps, theta=rows).relax_adjoint(self.states, points, cfactor, tau, inputs, None)
        return super().relax(points, cfactor, tau, record, inputs)


def broken() -> dict[str, tuple[Forward, Adjoint]]:
    """By what is wrong: forward steps and adjoints, linearized at the same states."""
    steps, states = dense(), ref.random(n, 4, B, seed=1)
    forward = Forward(steps, torch.empty_like(states), states[0])
    adjoint = Adjoint(steps, states, torch.empty_like(steps.theta))
    found = {}
    for kind in [kind for kind in FAILS if FAILS[kind].startswith("forward")]:
        found[kind] = Wrong(steps, torch.empty_like(states), states[0], kind=kind), adjoint
    for kind in ("constant", "sign", "gradient", "accumulates"):
        own = WrongSteps(steps.block, steps.theta, steps.h, kind=kind)
        found[kind] = forward, replace(adjoint, steps=own)
    for kind in ("clamped", "forwards"):
        found[kind] = forward, WrongAdjoint(steps, states, torch.empty_like(steps.theta), kind=kind)
    found["other states"] = forward, replace(adjoint, states=states + 0.1)
    found["way"] = forward, forward
    return found


FAILS = {
    "direction": "forward: shapes and types",
    "cost": "forward: shapes and types",
    "type": "forward: shapes and types",
    "shape": "forward: shapes and types",
    "overwrites": "forward: arguments kept",
    "view": "forward: arguments kept",
    "noise": "forward: the same twice",
    "memory": "forward: the same twice",
    "rows": "forward: rows apart",
    "nan": "forward: rows apart",
    "last row": "forward: relax",
    "tau": "forward: relax with tau",
    "inputs": "forward: inputs",
    "recorded": "forward: recorded states",
    "coarse rows": "forward: coarse propagator",
    "coarse cost": "forward: coarse propagator",
    "coarse sign": "forward: coarse step",
    "coarse size": "forward: coarse step with h halved",
    "handed over": "forward: redistribute",
    "no rows": "forward: ranks without rows",
    "way": "adjoint: shapes and types",
    "forwards": "adjoint: relax",
    "clamped": "adjoint: linear",
    "constant": "adjoint: linear",
    "sign": "adjoint: transposed Jacobian",
    "other states": "adjoint: transposed Jacobian",
    "gradient": "adjoint: gradient of the weights",
    "accumulates": "adjoint: gradient of the weights",
}
