"""A classification problem at any depth: the network, its solvers and its objective for a number of layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.layers.dense import DenseLayer, LinearMap
from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit import MGRIT, Hierarchy, Solver
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.problem.network import DenseResNet, InitialScales
from xbraid_py.problem.objective import NetworkObjective
from xbraid_py.problem.regularization import Regularization


@dataclass(frozen=True, kw_only=True)
class DenseResNetOptions:
    """A dense residual network, but for its depth (design, 4.1).

    Parameters
    ----------
    width
        Channels C of the residual layers.
    T
        Final time; a layer is a step of size T / num_layers.
    activation
        Of opening and residual layers: smooth_relu, relu or tanh.
    bias
        One bias for each channel (vector), or one number for a layer (scalar).
    splines
        The weights of the residual layers are such functions of the depth: splines.num functions of splines.degree 0 to
        3, splines.knots uniform, centered or a list from 0 to 1. Each layer has weights of its own if not given.
    """

    width: int = 8
    T: float = 5.0
    activation: str = "smooth_relu"
    bias: str = "vector"
    splines: Splines | None = None

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1; use 8")
        LayerGrid(1, self.T)
        DenseLayer(1, self.width, self.activation, self.bias)


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Training data, architecture and solvers; `objective(num_layers)` puts them together.

    Parameters
    ----------
    features : (F, B) tensor
    labels : (B,) int64 tensor
    num_classes : int
    architecture : DenseResNetOptions
    regularization : Regularization
    forward, adjoint : MGRIT
        Of states and adjoints; their coarsening factor from the finest level must be the same.
    comm : Communicator or mpi4py.MPI.Comm or None
        None for a serial run.
    dtype : torch.dtype
    ranks : int, optional
        So many of them own layers, the first ones; all if not given.
    """

    features: Tensor
    labels: Tensor
    num_classes: int
    architecture: DenseResNetOptions
    regularization: Regularization
    forward: MGRIT
    adjoint: MGRIT
    comm: Communicator
    dtype: torch.dtype = torch.float64
    ranks: int | None = None

    def __post_init__(self):
        object.__setattr__(self, "comm", as_communicator(self.comm))

    def grid(self, depth: int | LayerGrid) -> LayerGrid:
        """The grid with so many equal layers; one that is given is taken as it is."""
        return depth if isinstance(depth, LayerGrid) else LayerGrid(depth, self.architecture.T)

    def hierarchies(self, depth: int | LayerGrid) -> tuple[Hierarchy, Hierarchy]:
        """Levels of the state and of the adjoint solves at a depth, a number of layers or a grid."""
        grid = self.grid(depth)
        forward, adjoint = (
            Hierarchy.plan(each, grid, self.comm.size, self.ranks) for each in (self.forward, self.adjoint)
        )
        if forward.levels[0].cfactor != adjoint.levels[0].cfactor:
            raise ValueError(
                f"adjoint.cfactor={self.adjoint.cfactor} must begin with the same coarsening factor as "
                f"mgrit.cfactor={self.forward.cfactor}, and both or neither have max_levels=1"
            )
        return forward, adjoint

    def network(self, depth: int | LayerGrid) -> DenseResNet:
        """The network with so many residual layers, or those of a grid."""
        shape = self.architecture
        return DenseResNet(
            DenseLayer(self.features.shape[0], shape.width, shape.activation, shape.bias),
            DenseLayer(shape.width, shape.width, shape.activation, shape.bias),
            DenseLayer(shape.width, self.num_classes, "identity"),
            self.grid(depth),
            self.hierarchies(depth)[0].partition,
            self.comm,
            self.dtype,
            shape.splines,
        )

    def objective(self, depth: int | LayerGrid) -> NetworkObjective:
        """The objective of that network on the training data."""
        forward, adjoint = self.hierarchies(depth)
        return NetworkObjective(
            self.network(depth),
            self.features.to(self.dtype),
            self.labels,
            self.regularization,
            Solver(self.forward, forward, self.comm),
            Solver(self.adjoint, adjoint, self.comm),
        )

    def work_unit(self, depth: int | LayerGrid) -> float:
        """Evaluations of a layer in one update at this depth: one state and one adjoint solve, warm-started.

        An adjoint step counts for two: it evaluates the layer again and multiplies by its transpose.
        """
        forward, adjoint = self.hierarchies(depth)
        return forward.solve_work(self.forward) + 2.0 * adjoint.solve_work(self.adjoint)


@dataclass(frozen=True, kw_only=True)
class PerceptronProblem(Problem):
    """A problem whose opening is y_0 = Q x with a Q that is learnt (paper 000, section 2.1.1); see `Problem`."""

    def network(self, num_layers: int) -> DenseResNet:
        """The network with so many residual layers."""
        return replace(super().network(num_layers), opening=LinearMap(self.features.shape[0], self.architecture.width))


def perceptron_weights(network: DenseResNet, seed: int, scale: float = 1.0) -> Tensor:
    """Random initial weights: of residual layers normal, of opening and classification Glorot-uniform; biases 0.

    Parameters
    ----------
    network : DenseResNet
    seed : int
    scale : float
        Standard deviation of the weights of the residual layers.

    Returns
    -------
    Tensor
        Flat vector; a weight does not depend on the number of ranks.
    """
    flat = network.initial(InitialScales(opening=0.0, layers=scale, classification=0.0), seed)
    named = network.layout.named(flat)
    for number, name in enumerate(("opening.weight", "classification.weight")):
        weight = named[name]  # (1, O, I) where it is owned, else (0, O, I)
        bound = sqrt(6.0 / (weight.shape[1] + weight.shape[2]))
        rng = np.random.default_rng([seed, 3, number])
        drawn = torch.from_numpy(rng.uniform(-bound, bound, tuple(weight.shape[1:])))
        weight.copy_(drawn.to(weight.dtype).expand_as(weight))
    return flat
