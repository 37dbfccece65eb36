"""Objectives: value and gradient of a network on data, with respect to the weights that a rank owns.

Shape letters: `F` features, `C` width, `B` batch, `p` parameters of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Protocol

import torch
from torch import Tensor

from xbraid_py.mgrit import Solver
from xbraid_py.network import ResidualNetwork
from xbraid_py.propagator import Adjoint, Forward


@dataclass(frozen=True)
class Evaluation:
    """The objective at one point.

    Attributes
    ----------
    value, loss : float
        With and without regularisation.
    accuracy : float
        Share of the samples that are classified rightly.
    residual : float
        Relative residual of the state solve.
    """

    value: float
    loss: float
    accuracy: float
    residual: float


class Objective(Protocol):
    """What an optimiser knows of the problem."""

    def evaluate(self, x: Tensor, max_iter: int | None = None) -> Evaluation:
        """The objective at the flat vector x."""

    def gradient(self, x: Tensor, max_iter: int | None = None) -> Tensor:
        """The gradient at x, where `evaluate` has been called last."""

    def dot(self, a: Tensor, b: Tensor) -> float:
        """Dot product over all ranks."""


@dataclass(frozen=True)
class Regularization:
    """gamma_tik/2 sum |theta_n|^2 + gamma_ddt/2 sum |(theta_n - theta_{n-1})/h|^2 (design, 4.1).

    Parameters
    ----------
    tikhonov
        gamma_tik, of the opening and the residual layers.
    ddt
        gamma_ddt, smoothness of the residual layers' weights in depth.
    classification
        gamma of the classification layer's Tikhonov term.
    measure
        "sum": plain sums over the layers; "integral": a factor h in front of the residual layers' terms,
        which makes the functional independent of the depth.
    """

    tikhonov: float = 1e-5
    ddt: float = 1e-5
    classification: float = 1e-5
    measure: str = "integral"

    def __post_init__(self):
        for name in ("tikhonov", "ddt", "classification"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be at least 0 and finite; use 1e-6")
        if self.measure not in ("sum", "integral"):
            raise ValueError(f"measure={self.measure!r} must be sum or integral; use integral")

    def terms(self, network: ResidualNetwork, x: Tensor) -> tuple[Tensor, Tensor]:
        """One summand for each row of weights owned here, and the gradient, a flat vector."""
        layout, h = network.layout, network.grid.h
        rows, gradient = layout.rows(x), torch.zeros_like(x)
        out = layout.rows(gradient)
        factor = h if self.measure == "integral" else 1.0
        weights = {
            "opening": self.tikhonov,
            "layers": self.tikhonov * factor,
            "classification": self.classification,
        }
        sums = {}
        for name, gamma in weights.items():
            sums[name] = gamma / 2 * rows[name].square().sum(1)
            out[name].add_(rows[name], alpha=gamma)
        if self.ddt and len(rows["layers"]):
            # theta_n - theta_{n-1} of the rows owned here, and of the first one behind them.
            theta, comm, partition = rows["layers"], network.comm, network.partition
            before = comm.shift(theta[-1:], partition, +1)
            after = comm.shift(theta[:1], partition, -1)
            gamma = self.ddt * factor / h**2
            joined = torch.cat([part for part in (before, theta, after) if part is not None])
            jumps = joined.diff(dim=0)
            own = jumps if after is None else jumps[:-1]
            first = 1 if before is None else 0
            sums["layers"][first:] += gamma / 2 * own.square().sum(1)
            out["layers"][first:].add_(own, alpha=gamma)
            following = jumps if before is None else jumps[1:]
            out["layers"][: len(following)].sub_(following, alpha=gamma)
        return torch.cat(list(sums.values())), gradient


class NetworkObjective:
    """Mean cross entropy of a network on data, plus regularisation; states and adjoints by MGRIT.

    Each state solve starts from the C-points of the last one that gave a finite loss, each adjoint solve
    from those of the last adjoint solve: the one-shot method (paper 001, section 2.1).

    Parameters
    ----------
    network : ResidualNetwork
    features : (F, B) tensor
        The values are only read on the owner of the first layer.
    labels : (B,) int64 tensor
        The values are only read on the owner of the last layer.
    regularization : Regularization
    forward, adjoint : Solver
        For states and adjoints, on hierarchies with the network's partition.

    Attributes
    ----------
    work : float
        Evaluations of a layer so far, on all ranks, states and adjoints.
    evaluations : int
        State solves so far.
    adjoint_residual : float
        Relative residual of the last adjoint solve.
    """

    def __init__(
        self,
        network: ResidualNetwork,
        features: Tensor,
        labels: Tensor,
        regularization: Regularization,
        forward: Solver,
        adjoint: Solver,
    ):
        for solver in (forward, adjoint):
            if solver.hierarchy.partition != network.partition:
                raise ValueError("the solvers' hierarchies and the network must share one partition of the layers")
        self.network, self.features, self.labels = network, features, labels
        self.regularization, self.forward, self.adjoint = regularization, forward, adjoint
        self.work, self.evaluations, self.adjoint_residual = 0.0, 0, 0.0
        self.points: Tensor | None = None
        self.adjoint_points: Tensor | None = None
        shape = (network.block.inputs, features.shape[1])
        self._states = torch.empty((network.partition.count(network.comm.rank), *shape), dtype=network.dtype)
        self._template = torch.empty(1, dtype=network.dtype).expand(shape)  # one number stands for a state
        self._end: Tensor | None = None
        self._regularization_gradient: Tensor | None = None

    def dot(self, a: Tensor, b: Tensor) -> float:
        return self.network.dot(a, b)

    def evaluate(self, x: Tensor, max_iter: int | None = None) -> Evaluation:
        network = self.network
        start = network.open(x, self.features) if network.is_first else None
        propagator = Forward(network.steps(x), self._states, self._template)
        solution = self.forward.solve(propagator, start, self.points, max_iter)
        self._end = solution.end
        loss = right = None
        if network.is_last:
            logits = network.classify(x, solution.end)
            loss = float(torch.nn.functional.cross_entropy(logits.T, self.labels))
            right = int((logits.argmax(0) == self.labels).sum())
        loss, right = network.comm.bcast((loss, right), network.last_rank)
        terms, self._regularization_gradient = self.regularization.terms(network, x)
        value = loss + float(network.comm.ordered_sum(terms, network.row_counts))
        self.work += solution.work
        self.evaluations += 1
        if isfinite(value):
            self.points = solution.points
        return Evaluation(value, loss, right / len(self.labels), solution.residual)

    def gradient(self, x: Tensor, max_iter: int | None = None) -> Tensor:
        network = self.network
        rows = network.layout.rows(x)
        gradient = network.layout.zeros()
        out = network.layout.rows(gradient)
        start = None
        if network.is_last:
            logits = network.classify(x, self._end)
            # d(mean cross entropy)/d(logits) = (softmax - one-hot) / B
            slope = torch.softmax(logits, 0)
            slope[self.labels, torch.arange(len(self.labels))] -= 1.0
            slope /= len(self.labels)
            back, own = network.classification.vjp(rows["classification"], self._end[None], slope[None], True)
            start = back[0]
            out["classification"].copy_(own)
        propagator = Adjoint(network.steps(x), self._states, out["layers"])
        solution = self.adjoint.solve(propagator, start, self.adjoint_points, max_iter)
        if network.is_first:
            _, own = network.opening.vjp(rows["opening"], self.features[None], solution.end[None], True)
            out["opening"].copy_(own)
        self.work += solution.work
        self.adjoint_points, self.adjoint_residual = solution.points, solution.residual
        return gradient.add_(self._regularization_gradient)
