"""Propagators: one layer step for all owned intervals at once, forwards and backwards.

Shape letters: `n` rows (layers) owned here, `m` of them stepped at once, `S` shape of a state,
`p` parameters of a layer.
Row i of a propagator is its layer i; a step on rows `slice(j, None, c)` advances all intervals of c layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

from torch import Tensor

from xbraid_py.grid import Partition


class Propagator(Protocol):
    """What MGRIT knows of the equation it solves."""

    direction: int
    """+1 if row i is followed by row i + 1, -1 if by row i - 1."""

    cost: float
    """Work of one step in evaluations of a layer."""

    def step(self, x: Tensor, rows: slice) -> Tensor:
        """States x (m, *S) at the beginning of these rows, one step on; a new tensor."""

    def record(self, x: Tensor, rows: slice) -> Tensor:
        """The same, and keep what the solve is for: the states, or the gradient."""

    def coarsen(self, cfactor: int, weights: str, scheme: str) -> Propagator:
        """The propagator that makes one step for `cfactor` steps of this one."""

    def redistribute(self, comm, source: Partition, target: Partition) -> Propagator:
        """This propagator with its rows handed to other ranks."""

    def empty(self, num_rows: int) -> Tensor:
        """Uninitialised states (num_rows, *S)."""


@dataclass(frozen=True)
class ResidualSteps:
    """The steps u + h F(u, theta_i) of consecutive layers i.

    Parameters
    ----------
    block : object
        F, with `forward(theta, u)` and `vjp(theta, u, v, with_gradient)`, such as `networks.dense.DenseLayer`.
    theta : (n, p) tensor
        Weights, a row for each layer.
    h : float
        Step size.
    scheme : {"euler", "midpoint"}
        Forward Euler (paper 001, eq. 6), or the explicit midpoint rule
        u + h F(u + h/2 F(u)), of second order: a better stand-in for several Euler steps.
    """

    block: object
    theta: Tensor
    h: float
    scheme: str = "euler"

    def value(self, u: Tensor, rows: slice) -> Tensor:
        """States u (m, *S) one step on."""
        theta = self.theta[rows]
        middle = u
        if self.scheme == "midpoint":
            middle = self.block.forward(theta, u).mul_(self.h / 2).add_(u)
        return self.block.forward(theta, middle).mul_(self.h).add_(u)

    def vjp(self, u: Tensor, v: Tensor, rows: slice, with_gradient: bool = False) -> tuple[Tensor, Tensor | None]:
        """Transposed Jacobians of the steps at u (m, *S) applied to v (m, *S), and to the weights (m, p)."""
        theta, h = self.theta[rows], self.h
        if self.scheme == "euler":
            back, gradient = self.block.vjp(theta, u, v, with_gradient)
            return back.mul_(h).add_(v), gradient.mul_(h) if with_gradient else None
        middle = self.block.forward(theta, u).mul_(h / 2).add_(u)
        inner, gradient = self.block.vjp(theta, middle, v, with_gradient)
        inner.mul_(h)
        outer, first = self.block.vjp(theta, u, inner, with_gradient)
        if with_gradient:
            gradient = gradient.mul_(h).add_(first, alpha=h / 2)
        return outer.mul_(h / 2).add_(inner).add_(v), gradient

    def coarsen(self, cfactor: int, weights: str, scheme: str) -> ResidualSteps:
        """One step of size `cfactor * h` for every `cfactor` steps.

        `weights` is "inject" (those of the first layer of each interval, as published codes do) or
        "average" (their mean over the interval).
        """
        coarse = self.theta[::cfactor]
        if weights == "average":
            # One slice after the other: the order of summation must not depend on the number of rows.
            coarse = coarse.clone()
            for j in range(1, cfactor):
                coarse += self.theta[j::cfactor]
            coarse /= cfactor
        return replace(self, theta=coarse, h=cfactor * self.h, scheme=scheme)

    def redistribute(self, comm, source: Partition, target: Partition) -> Self:
        """The steps of the rows that `target` gives to this rank."""
        return replace(self, theta=comm.redistribute(self.theta.contiguous(), source, target))

    @property
    def cost(self) -> float:
        """Evaluations of F in one step."""
        return 1.0 if self.scheme == "euler" else 2.0


@dataclass(frozen=True)
class Forward:
    """The states: u_{i+1} = step_i(u_i).

    Parameters
    ----------
    steps : ResidualSteps
        The layers owned here.
    states : (n, *S) tensor
        Recorded states are written here: row i holds the input of layer i. May be None where nothing is recorded.
    template : (*S) tensor
        Any tensor with the shape and type of a state.
    """

    steps: ResidualSteps
    states: Tensor | None
    template: Tensor
    direction = +1

    @property
    def cost(self) -> float:
        return self.steps.cost

    def step(self, x: Tensor, rows: slice) -> Tensor:
        return self.steps.value(x, rows)

    def record(self, x: Tensor, rows: slice) -> Tensor:
        self.states[rows] = x
        return self.steps.value(x, rows)

    def coarsen(self, cfactor: int, weights: str, scheme: str) -> Forward:
        return Forward(self.steps.coarsen(cfactor, weights, scheme), None, self.template)

    def redistribute(self, comm, source: Partition, target: Partition) -> Forward:
        return Forward(self.steps.redistribute(comm, source, target), None, self.template)

    def empty(self, num_rows: int) -> Tensor:
        return self.template.new_empty((num_rows, *self.template.shape))


@dataclass(frozen=True)
class Adjoint:
    """The adjoints, backwards: v_i = (d step_i / du)^T v_{i+1}, linearised at the recorded states.

    Parameters
    ----------
    steps : ResidualSteps
        The layers owned here.
    states : (n, *S) tensor
        Row i holds the input of layer i.
    gradient : (n, p) tensor or None
        `record` writes the gradient of the weights here, a row for each layer.
    """

    steps: ResidualSteps
    states: Tensor
    gradient: Tensor | None
    direction = -1

    @property
    def cost(self) -> float:
        # A vector-Jacobian product evaluates the layer again and multiplies by its transpose.
        return 2.0 * self.steps.cost

    def step(self, x: Tensor, rows: slice) -> Tensor:
        return self.steps.vjp(self.states[rows], x, rows)[0]

    def record(self, x: Tensor, rows: slice) -> Tensor:
        back, gradient = self.steps.vjp(self.states[rows], x, rows, with_gradient=True)
        self.gradient[rows] = gradient
        return back

    def coarsen(self, cfactor: int, weights: str, scheme: str) -> Adjoint:
        # The coarse states are the fine ones at the C-points: injection in depth.
        return Adjoint(self.steps.coarsen(cfactor, weights, scheme), self.states[::cfactor], None)

    def redistribute(self, comm, source: Partition, target: Partition) -> Adjoint:
        steps = self.steps.redistribute(comm, source, target)
        return Adjoint(steps, comm.redistribute(self.states.contiguous(), source, target), None)

    def empty(self, num_rows: int) -> Tensor:
        return self.states.new_empty((num_rows, *self.states.shape[1:]))
