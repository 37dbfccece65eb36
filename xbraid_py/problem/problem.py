"""A classification problem at any depth: the network, its solvers and its objective for a number of layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from xbraid_py.comm import Communicator, ProcessGrid, as_communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.replicas import divisors
from xbraid_py.layers.dense import DenseLayer, LinearMap
from xbraid_py.mgrit import MGRIT, Hierarchy, Solver
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.problem.network import DenseResNet
from xbraid_py.problem.objective import NetworkObjective
from xbraid_py.problem.options import DenseResNetOptions, InitialScales
from xbraid_py.problem.regularization import Regularization


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
    comm : Communicator, mpi4py.MPI.Comm, ProcessGroup or None
        None for a serial run.
    dtype : torch.dtype
    ranks : int, optional
        So many of them own layers, the first ones; all if not given.
    replicas : int
        So many copies of the network share the samples and the weights, each on as many ranks; divides their number.
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
    replicas: int = 1

    def __post_init__(self):
        object.__setattr__(self, "comm", as_communicator(self.comm))
        if self.replicas != 1 and self.ranks is not None:
            raise ValueError(f"replicas={self.replicas} with ranks={self.ranks}: replicas are made of all ranks; use 1")
        if self.replicas < 1 or self.comm.size % self.replicas:
            use = divisors(self.comm.size)
            raise ValueError(f"replicas={self.replicas} does not divide the {self.comm.size} rank(s); use {use}")
        portions = self.forward.portions_of(self.features.shape[1])
        if self.replicas > portions:
            raise ValueError(
                f"replicas={self.replicas} are more than the portions={portions} of the {self.features.shape[1]} "
                f"samples; use at most {portions} replicas, or portions={self.replicas}"
            )

    @property
    def process_grid(self) -> ProcessGrid | None:
        """The replicas, if there are any; collective at first."""
        if self.replicas == 1:
            return None
        # Kept with the communicator: problems of several depths have the same.
        kept = vars(self.comm).setdefault("_process_grids", {})
        if self.replicas not in kept:
            kept[self.replicas] = ProcessGrid(self.comm, self.replicas, "replicas")
        return kept[self.replicas]

    @property
    def stage_rank(self) -> int:
        """This rank's number among those of its replica."""
        return self.comm.rank // self.replicas

    def grid(self, depth: int | LayerGrid) -> LayerGrid:
        """The grid with so many equal layers; one that is given is taken as it is."""
        return depth if isinstance(depth, LayerGrid) else LayerGrid(depth, self.architecture.T)

    def hierarchies(self, depth: int | LayerGrid) -> tuple[Hierarchy, Hierarchy]:
        """Levels of the state and of the adjoint solves at a depth, a number of layers or a grid."""
        grid = self.grid(depth)
        forward, adjoint = (
            Hierarchy.plan(each, grid, self.comm.size // self.replicas, self.ranks)
            for each in (self.forward, self.adjoint)
        )
        if forward.levels[0].cfactor != adjoint.levels[0].cfactor:
            raise ValueError(
                f"adjoint.cfactor={self.adjoint.cfactor} must begin with the same coarsening factor as "
                f"mgrit.cfactor={self.forward.cfactor}, and both or neither have max_levels=1"
            )
        return forward, adjoint

    def network(self, depth: int | LayerGrid) -> DenseResNet:
        """The network with so many residual layers, or those of a grid."""
        shape, hierarchy = self.architecture, self.hierarchies(depth)[0]
        owners = stages = hierarchy.partition
        if self.replicas > 1:
            owners = _shared(hierarchy.blocks, self.replicas).refine(hierarchy.block)
        return DenseResNet(
            DenseLayer(self.features.shape[0], shape.width, shape.activation, shape.bias),
            DenseLayer(shape.width, shape.width, shape.activation, shape.bias),
            DenseLayer(shape.width, self.num_classes, "identity"),
            self.grid(depth),
            owners,
            self.comm,
            self.dtype,
            shape.splines,
            self.process_grid,
            None if self.replicas == 1 else stages,
        )

    def objective(self, depth: int | LayerGrid) -> NetworkObjective:
        """The objective of that network on the training data."""
        forward, adjoint = self.hierarchies(depth)
        network = self.network(depth)
        return NetworkObjective(
            network,
            self.features.to(self.dtype),
            self.labels,
            self.regularization,
            Solver(self.forward, forward, network.stage.comm),
            Solver(self.adjoint, adjoint, network.stage.comm),
        )

    def work_unit(self, depth: int | LayerGrid) -> float:
        """Evaluations of a layer in one update at this depth: one state and one adjoint solve, warm-started.

        An adjoint step counts for two: it evaluates the layer again and multiplies by its transpose.
        """
        forward, adjoint = self.hierarchies(depth)
        return forward.solve_work(self.forward) + 2.0 * adjoint.solve_work(self.adjoint)


def _shared(rows: Partition, replicas: int) -> Partition:
    """What each rank owns if so many ranks that follow each other share what one owns in `rows`."""
    bounds = [0]
    for rank, count in enumerate(rows.counts):
        bounds += [rows.first(rank) + end for end in Partition.balanced(count, replicas).bounds[1:]]
    return Partition(tuple(bounds))


@dataclass(frozen=True, kw_only=True)
class PerceptronProblem(Problem):
    """A problem whose opening is y_0 = Q x with a Q that is learnt (paper 000, section 2.1.1); see `Problem`."""

    def network(self, depth: int | LayerGrid) -> DenseResNet:
        """The network with so many residual layers."""
        return replace(super().network(depth), opening=LinearMap(self.features.shape[0], self.architecture.width))


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
