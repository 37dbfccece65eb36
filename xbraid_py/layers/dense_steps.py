"""The steps of dense residual layers, by the kernels.

Shape letters: `n` rows (layers) owned here, `m` of them stepped at once, `S` shape of a state,
`p` parameters of a layer. Row i of a propagator is its layer i.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from xbraid_py import kernels
from xbraid_py.comm.partition import Partition
from xbraid_py.layers.dense import DenseLayer
from xbraid_py.layers.rows import coarse_rows, rows_of

ALL = slice(None)


@dataclass(frozen=True)
class ResidualSteps:
    """The steps u + h F(u, theta_i) of consecutive layers i.

    Parameters
    ----------
    block : DenseLayer
        F.
    theta : (n parts, p) tensor
        Weights, a row for each part of each step.
    h : float or (n parts,) tensor
        Step size; of each row, where they differ.
    scheme : {"euler", "midpoint"}
        Forward Euler (paper 001, eq. 6), or the explicit midpoint rule
        u + h F(u + h/2 F(u)), of second order: a better stand-in for several Euler steps.
    parts : int
        A step is that many smaller ones of size h, each with a row of theta of its own.
    """

    block: DenseLayer
    theta: Tensor
    h: float | Tensor
    scheme: str = "euler"
    parts: int = 1

    @property
    def _how(self) -> dict:
        return {"h": self.h, "scheme": self.scheme}

    def value(self, u: Tensor, rows: slice = ALL) -> Tensor:
        """States u (m, *S) one step on."""
        return kernels.step(self.block, self.theta[rows], u, h=rows_of(self.h, rows), scheme=self.scheme)

    def vjp(self, u: Tensor, v: Tensor, rows: slice = ALL, with_gradient: bool = False) -> tuple[Tensor, Tensor | None]:
        """Transposed Jacobians of the steps at u (m, *S) applied to v (m, *S), and to the weights (m, p)."""
        theta = self.theta[rows]
        gradient = torch.empty_like(theta) if with_gradient else None
        how = {"h": rows_of(self.h, rows), "scheme": self.scheme}
        return kernels.adjoint(self.block, theta, u, v, gradient=gradient, **how), gradient

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
        """One step for every `cfactor` steps, as long as these together, made in `parts` parts.

        `weights` is "inject" (those of the first layer of each part, as published codes do) or
        "average" (their mean over the time of the part).
        """
        length = cfactor * self.parts // parts
        if length == 1:
            return replace(self, parts=parts)
        theta, h = coarse_rows(self.theta, self.h, length, weights)
        return replace(self, theta=theta, h=h, scheme=scheme, parts=parts)

    def redistribute(self, comm, source: Partition, target: Partition) -> Self:
        """The steps of the rows that `target` gives to this rank."""
        source, target = source.refine(self.parts), target.refine(self.parts)
        theta = comm.redistribute(self.theta.contiguous(), source, target)
        h = comm.redistribute(self.h, source, target) if isinstance(self.h, Tensor) else self.h
        return replace(self, theta=theta, h=h)

    @property
    def cost(self) -> float:
        """Evaluations of F in one step."""
        return self.parts * (1.0 if self.scheme == "euler" else 2.0)
