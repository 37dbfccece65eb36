"""Propagators: one layer step for all owned intervals at once, forwards and backwards.

Shape letters: `n` rows (layers) owned here, `m` of them stepped at once, `S` shape of a state,
`p` parameters of a layer. Row i of a propagator is its layer i.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

from xbraid_py import kernels
from xbraid_py.grid import Partition
from xbraid_py.networks.dense import DenseLayer

ALL = slice(None)


class Propagator(Protocol):
    """What MGRIT knows of the equation it solves."""

    direction: int
    """+1 if row i is followed by row i + 1, -1 if by row i - 1."""

    cost: float
    """Work of one step in evaluations of a layer."""

    def step(self, x: Tensor) -> Tensor:
        """States x (n, *S), one before each row, one step on; a new tensor."""

    def relax(
        self,
        points: Tensor,
        cfactor: int,
        tau: Tensor | None = None,
        record: bool = False,
        inputs: Tensor | None = None,
    ) -> Tensor:
        """From the beginnings of the intervals of c rows (n / c, *S) to their ends, in the direction of propagation.

        tau (n, *S) is added to each step. With `record`, keep what the solve is for: the states, or the gradient.
        The input of each step is written to `inputs` (n, *S), if it is given. Returns a new tensor.
        """

    def correct(self, before: Tensor, after: Tensor, coarse: Propagator) -> None:
        """Correct what was recorded, to first order, for C-points (n / c, *S) that have been moved since.

        `coarse` makes one step for each interval.
        """

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int) -> Propagator:
        """The propagator that makes one step, of several parts, for `cfactor` steps of this one."""

    def redistribute(self, comm, source: Partition, target: Partition) -> Propagator:
        """This propagator with its rows handed to other ranks."""

    def empty(self, num_rows: int) -> Tensor:
        """Uninitialised states (num_rows, *S)."""


class Steps(Protocol):
    """What propagators know of consecutive layers: `ResidualSteps` of dense ones, `ModuleSteps` of any others."""

    theta: Tensor
    parts: int

    @property
    def cost(self) -> float: ...

    def relax(self, points, cfactor, tau, inputs, record=False) -> Tensor: ...

    def relax_adjoint(self, states, points, cfactor, tau, inputs, gradient) -> Tensor: ...

    def coarsen(self, cfactor, weights, scheme, parts=1) -> Steps: ...

    def redistribute(self, comm, source, target) -> Steps: ...


@dataclass(frozen=True)
class ResidualSteps:
    """The steps u + h F(u, theta_i) of consecutive layers i.

    Parameters
    ----------
    block : DenseLayer
        F.
    theta : (n parts, p) tensor
        Weights, a row for each part of each step.
    h : float
        Step size.
    scheme : {"euler", "midpoint"}
        Forward Euler (paper 001, eq. 6), or the explicit midpoint rule
        u + h F(u + h/2 F(u)), of second order: a better stand-in for several Euler steps.
    parts : int
        A step is that many smaller ones of size h, each with a row of theta of its own.
    """

    block: DenseLayer
    theta: Tensor
    h: float
    scheme: str = "euler"
    parts: int = 1

    @property
    def _how(self) -> dict:
        return {"h": self.h, "scheme": self.scheme}

    def value(self, u: Tensor, rows: slice = ALL) -> Tensor:
        """States u (m, *S) one step on."""
        return kernels.step(self.block, self.theta[rows], u, **self._how)

    def vjp(self, u: Tensor, v: Tensor, rows: slice = ALL, with_gradient: bool = False) -> tuple[Tensor, Tensor | None]:
        """Transposed Jacobians of the steps at u (m, *S) applied to v (m, *S), and to the weights (m, p)."""
        theta = self.theta[rows]
        gradient = torch.empty_like(theta) if with_gradient else None
        return kernels.adjoint(self.block, theta, u, v, gradient=gradient, **self._how), gradient

    def relax(
        self, points: Tensor, cfactor: int, tau: Tensor | None, inputs: Tensor | None, record: bool = False
    ) -> Tensor:
        """`cfactor` steps from the beginning of each interval; see `kernels.relax`. `record` needs nothing done."""
        options = {"parts": self.parts, "tau": tau, "inputs": inputs, **self._how}
        return kernels.relax(self.block, self.theta, points, cfactor, **options)

    def relax_adjoint(
        self,
        states: Tensor,
        points: Tensor,
        cfactor: int,
        tau: Tensor | None,
        inputs: Tensor | None,
        gradient: Tensor | None,
    ) -> Tensor:
        """The same backwards, at the given states; see `kernels.relax_adjoint`."""
        options = {"parts": self.parts, "tau": tau, "inputs": inputs, "gradient": gradient, **self._how}
        return kernels.relax_adjoint(self.block, self.theta, states, points, cfactor, **options)

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int = 1) -> ResidualSteps:
        """One step of size `cfactor * h` for every `cfactor` steps, made in `parts` parts.

        `weights` is "inject" (those of the first layer of each part, as published codes do) or
        "average" (their mean over the part).
        """
        length = cfactor * self.parts // parts
        if length == 1:
            return replace(self, parts=parts)
        coarse = self.theta[::length]
        if weights == "average":
            # One slice after the other: the order of summation must not depend on the number of rows.
            coarse = coarse.clone()
            for j in range(1, length):
                coarse += self.theta[j::length]
            coarse /= length
        return replace(self, theta=coarse, h=length * self.h, scheme=scheme, parts=parts)

    def redistribute(self, comm, source: Partition, target: Partition) -> Self:
        """The steps of the rows that `target` gives to this rank."""
        source, target = source.refine(self.parts), target.refine(self.parts)
        return replace(self, theta=comm.redistribute(self.theta.contiguous(), source, target))

    @property
    def cost(self) -> float:
        """Evaluations of F in one step."""
        return self.parts * (1.0 if self.scheme == "euler" else 2.0)


@dataclass(frozen=True)
class Forward:
    """The states: u_{i+1} = step_i(u_i).

    Parameters
    ----------
    steps : Steps
        The layers owned here.
    states : (n, *S) tensor or None
        Recorded states are written here: row i holds the input of layer i. None where nobody asks for them.
    template : (*S) tensor
        Any tensor with the shape and type of a state.
    """

    steps: Steps
    states: Tensor | None
    template: Tensor
    direction = +1

    @property
    def cost(self) -> float:
        return self.steps.cost

    def step(self, x: Tensor) -> Tensor:
        return self.steps.relax(x, 1, None, None)

    def relax(self, points, cfactor, tau=None, record=False, inputs=None) -> Tensor:
        return self.steps.relax(points, cfactor, tau, self.states if record else inputs, record)

    def correct(self, before: Tensor, after: Tensor, coarse: Forward) -> None:
        # The states stay as they are: to correct them would cost as much as another relaxation.
        pass

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int = 1) -> Forward:
        return Forward(self.steps.coarsen(cfactor, weights, scheme, parts), None, self.template)

    def redistribute(self, comm, source: Partition, target: Partition) -> Forward:
        return Forward(self.steps.redistribute(comm, source, target), None, self.template)

    def empty(self, num_rows: int) -> Tensor:
        return self.template.new_empty((num_rows, *self.template.shape))


@dataclass(frozen=True)
class Adjoint:
    """The adjoints, backwards: v_i = (d step_i / du)^T v_{i+1}, linearised at the recorded states.

    Parameters
    ----------
    steps : Steps
        The layers owned here.
    states : (n, *S) tensor
        Row i holds the input of layer i.
    gradient : (n, p) tensor or None
        A recorded relaxation writes the gradient of the weights here, a row for each layer.
    """

    steps: Steps
    states: Tensor
    gradient: Tensor | None
    direction = -1

    @property
    def cost(self) -> float:
        # A vector-Jacobian product evaluates the layer again and multiplies by its transpose.
        return 2.0 * self.steps.cost

    def step(self, x: Tensor) -> Tensor:
        return self.steps.relax_adjoint(self.states, x, 1, None, None, None)

    def relax(self, points, cfactor, tau=None, record=False, inputs=None) -> Tensor:
        return self.steps.relax_adjoint(self.states, points, cfactor, tau, inputs, self.gradient if record else None)

    def correct(self, before: Tensor, after: Tensor, coarse: Adjoint) -> None:
        # The gradient is linear in the adjoints: what the change adds to it, by coarse steps, goes in equal shares
        # to the layers that a part of a coarse step stands for.
        added = torch.empty_like(coarse.steps.theta)
        coarse.steps.relax_adjoint(coarse.states, after - before, 1, None, None, added)
        if len(added):
            length = len(self.gradient) // len(added)
            self.gradient.unflatten(0, (-1, length)).add_(added.div_(length)[:, None])

    def coarsen(self, cfactor: int, weights: str, scheme: str, parts: int = 1) -> Adjoint:
        # The coarse states are the fine ones where the parts of the steps begin: injection in depth.
        length = cfactor * self.steps.parts // parts
        return Adjoint(self.steps.coarsen(cfactor, weights, scheme, parts), self.states[::length], None)

    def redistribute(self, comm, source: Partition, target: Partition) -> Adjoint:
        steps, parts = self.steps.redistribute(comm, source, target), self.steps.parts
        states = comm.redistribute(self.states.contiguous(), source.refine(parts), target.refine(parts))
        return Adjoint(steps, states, None)

    def empty(self, num_rows: int) -> Tensor:
        return self.states.new_empty((num_rows, *self.states.shape[1:]))
