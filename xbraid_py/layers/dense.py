"""Dense layers: sigma(W u + b) and W u, many at once with their adjoints; as a torch module; the steps u + h F(u).

Shape letters: `n` layers evaluated at once or owned here, `m` of them stepped at once, `I` inputs, `O` outputs, `B`
batch, `S` shape of a state, `p` parameters of a layer. Features come before samples, so that one layer is one small
matrix times a wide one; only the module has them last, as torch's. Row i of steps is their layer i.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import prod
from typing import Self

import torch
from torch import Tensor, nn

from xbraid_py import kernels
from xbraid_py.comm.partition import Partition
from xbraid_py.kernels import fallback
from xbraid_py.kernels.activation import activation
from xbraid_py.layers.steps import coarse_rows, halved_rows, rows_of

ALL = slice(None)


@dataclass(frozen=True)
class DenseLayer:
    """sigma(W u + b): the opening, the residual block F (paper 001, eq. 3) and the classification alike.

    Parameters
    ----------
    inputs, outputs : int
        Widths I and O.
    activation : str
        One of `kernels.activation.ACTIVATIONS`.
    bias : {"vector", "scalar"}
        One bias for each output, or one number for all of them.
    """

    inputs: int
    outputs: int
    activation: str = "smooth_relu"
    bias: str = "vector"

    def __post_init__(self):
        activation(self.activation)
        if self.bias not in ("vector", "scalar"):
            raise ValueError(f"bias={self.bias!r} must be vector or scalar; use vector")
        if min(self.inputs, self.outputs) < 1:
            raise ValueError(f"inputs={self.inputs} and outputs={self.outputs} must be at least 1; use 8")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the named parameters of one layer, in the order in which a row of weights holds them."""
        return {"weight": (self.outputs, self.inputs), "bias": (self.outputs if self.bias == "vector" else 1,)}

    @property
    def num_parameters(self) -> int:
        """Length p of a row of weights."""
        return sum(prod(shape) for shape in self.shapes.values())

    def unpack(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """Views of rows of weights (n, p): W (n, O, I) and b (n, O or 1, 1)."""
        return fallback.unpack(self, theta)

    def forward(self, theta: Tensor, u: Tensor) -> Tensor:
        """sigma(W u + b) of n layers: theta (n, p), u (n, I, B) to (n, O, B)."""
        return kernels.step(self, theta, u, residual=False)

    def vjp(
        self, theta: Tensor, u: Tensor, v: Tensor, with_gradient: bool, back: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Transposed Jacobians applied to v (n, O, B).

        Returns
        -------
        (n, I, B) tensor or None
            The product with respect to u, unless `back` is False.
        (n, p) tensor or None
            The product with respect to the weights, summed over the samples, if asked for.
        """
        gradient = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device) if with_gradient else None
        return kernels.adjoint(self, theta, u, v, residual=False, gradient=gradient, back=back), gradient


@dataclass(frozen=True)
class LinearMap:
    """W u (paper 000, section 2.1.1: the opening y_0 = Q x), with the methods of `DenseLayer`.

    Parameters
    ----------
    inputs, outputs : int
        Widths I and O.
    """

    inputs: int
    outputs: int

    def __post_init__(self):
        if min(self.inputs, self.outputs) < 1:
            raise ValueError(f"inputs={self.inputs} and outputs={self.outputs} must be at least 1; use 3")

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the named parameters of one layer."""
        return {"weight": (self.outputs, self.inputs)}

    @property
    def num_parameters(self) -> int:
        """Length p of a row of weights."""
        return self.outputs * self.inputs

    def forward(self, theta: Tensor, u: Tensor) -> Tensor:
        """W u of n layers: theta (n, p), u (n, I, B) to (n, O, B)."""
        return torch.matmul(theta.unflatten(1, (self.outputs, self.inputs)), u)

    def vjp(
        self, theta: Tensor, u: Tensor, v: Tensor, with_gradient: bool, back: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Transposed Jacobians applied to v (n, O, B).

        Returns
        -------
        (n, I, B) tensor or None
            The product with respect to u, unless `back` is False.
        (n, p) tensor or None
            The product with respect to the weights, summed over the samples, if asked for.
        """
        weight = theta.unflatten(1, (self.outputs, self.inputs))
        product = torch.matmul(weight.transpose(1, 2), v) if back else None
        return product, torch.matmul(v, u.transpose(1, 2)).flatten(1) if with_gradient else None


class DenseBlock(nn.Module):
    """sigma(W u + b) on the last axis of u (*, width); layer-parallel stacks step through it by the kernels.

    Parameters
    ----------
    width : int
    activation : str
        One of `kernels.activation.ACTIVATIONS`.
    scale : float
        Standard deviation of the initial weights is scale / sqrt(width); the bias starts at zero.
    """

    def __init__(self, width: int, activation: str = "smooth_relu", scale: float = 1.0):
        super().__init__()
        self.layer = DenseLayer(width, width, activation)
        self.weight = nn.Parameter(torch.empty(width, width))
        self.bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.weight, std=scale / width**0.5)

    def forward(self, u: Tensor) -> Tensor:
        """u (*, width) to (*, width)."""
        return activation(self.layer.activation).value(nn.functional.linear(u, self.weight, self.bias))

    def extra_repr(self) -> str:
        return f"{self.layer.inputs}, activation={self.layer.activation!r}"


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
        product = kernels.adjoint(self.block, theta, u, v, gradient=gradient, **how)
        assert product is not None
        return product, gradient

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

    def halved(self, halves: Tensor | None = None) -> Self:
        """Steps of which two, half as long, stand for each of these; see `steps.Halvable`."""
        theta, h = halved_rows(self.theta, self.h, halves)
        return replace(self, theta=theta, h=h)

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
