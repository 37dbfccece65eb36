"""The whole network over a communicator: classification o layers o opening.

Shape letters: `N` layers, `n` of them owned here, `F` features, `C` width, `B` batch, `p` parameters of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.layers.parameters import Layout, Stack
from xbraid_py.layers.splines import SplineLayers, Splines
from xbraid_py.mgrit.grid import LayerGrid

PREDICT_CHUNK = 1024  # samples that travel through the ranks together


@dataclass(frozen=True)
class InitialScales:
    """Size of the initial weights.

    Parameters
    ----------
    opening, layers, classification
        Of the three stacks; 0 starts a stack at zero.
    distribution
        Normal: matrices with this standard deviation, biases zero. Uniform and positive: matrices and biases uniform
        between minus and plus this, or between 0 and this.
    """

    opening: float = 1.0
    layers: float = 1e-1
    classification: float = 5e-2
    distribution: Literal["normal", "uniform", "positive"] = "normal"

    def __post_init__(self):
        if self.distribution not in ("normal", "uniform", "positive"):
            raise ValueError(f"distribution={self.distribution!r} must be normal, uniform or positive; use normal")
        for name in ("opening", "layers", "classification"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be at least 0 and finite; use {getattr(InitialScales, name)}")


@dataclass(frozen=True)
class DenseResNet:
    """u_0 = opening(y), u_{n+1} = u_n + h F(u_n, theta_n), logits = classification(u_N) (design, 4.1).

    Parameters
    ----------
    opening, block, classification : DenseLayer
        (F to C), F itself (C to C) and (C to classes).
    grid : LayerGrid
        The N layers.
    partition : Partition
        Owners of the layers. The opening layer belongs to the owner of the first, the classification layer
        to the owner of the last one.
    comm : Communicator or mpi4py.MPI.Comm or None
        None for a serial run.
    dtype : torch.dtype
        Of weights and states.
    splines : Splines, optional
        The residual layers' weights are such functions of the depth, whose coefficients all belong to the owner of the
        first layer; free weights if not given.
    """

    opening: DenseLayer
    block: DenseLayer
    classification: DenseLayer
    grid: LayerGrid
    partition: Partition
    comm: Communicator
    dtype: torch.dtype = torch.float64
    splines: Splines | None = None

    def __post_init__(self):
        object.__setattr__(self, "comm", as_communicator(self.comm))

    @property
    def is_first(self) -> bool:
        """Whether the opening layer is here."""
        return self.partition.owner(0) == self.comm.rank

    @property
    def is_last(self) -> bool:
        """Whether the classification layer is here."""
        return self.last_rank == self.comm.rank

    @property
    def last_rank(self) -> int:
        """Owner of the last layer and of the classification layer."""
        return self.partition.owner(self.grid.num_layers - 1)

    @cached_property
    def layout(self) -> Layout:
        """How the weights owned here, or the coefficients of those of the layers, lie in one flat vector."""
        rank, total = self.comm.rank, self.grid.num_layers
        first, count = self.partition.first(rank), self.partition.count(rank)
        if self.splines is not None:
            total = self.splines.num
            first, count = (0, total) if self.is_first else (total, 0)
        layers = Stack("layers", self.block.shapes, total, first, count)
        return Layout(
            (
                Stack("opening", self.opening.shapes, 1, 0 if self.is_first else 1, int(self.is_first)),
                layers,
                Stack("classification", self.classification.shapes, 1, 0 if self.is_last else 1, int(self.is_last)),
            ),
            self.dtype,
            dealt=self.splines is None,
        )

    @property
    def free(self) -> DenseResNet:
        """The same network with free weights: itself, if there are no splines."""
        return self if self.splines is None else self._free

    @cached_property
    def _free(self) -> DenseResNet:
        return replace(self, splines=None)

    def expand(self, x: Tensor) -> Tensor:
        """Flat vector of the free network with these weights: x itself, if there are no splines; else collective."""
        if self.splines is None:
            return x
        found = self.free.layout.zeros()
        rows, out = self.layout.rows(x), self.free.layout.rows(found)
        coefficients = rows["layers"]
        if not self.is_first:
            coefficients = x.new_empty((self.splines.num, coefficients.shape[1]))
        out["layers"].copy_(self._spline_layers.layers(self.comm.broadcast(coefficients, self._spline_layers.root)))
        for end in ("opening", "classification"):
            out[end].copy_(rows[end])
        return found

    def contract(self, gradient: Tensor) -> Tensor:
        """The transposed map: a gradient here from that of the free network (itself, without splines)."""
        if self.splines is None:
            return gradient
        found = self.layout.zeros()
        rows, out = self.free.layout.rows(gradient), self.layout.rows(found)
        sums = self._spline_layers.sums(rows["layers"])
        if sums is not None:
            out["layers"].copy_(sums)
        for end in ("opening", "classification"):
            out[end].copy_(rows[end])
        return found

    @cached_property
    def _spline_layers(self) -> SplineLayers:
        return SplineLayers(self.splines, self.grid, self.partition, self.comm)

    @cached_property
    def sizes(self) -> float | Tensor:
        """Step size of the layers, or of each of those owned here (n,) on a grid that is not uniform."""
        if self.grid.is_uniform:
            return self.grid.h
        rank = self.comm.rank
        return torch.tensor(self.grid.sizes(self.partition.first(rank), self.partition.count(rank)), dtype=self.dtype)

    def initial(self, scales: InitialScales, seed: int) -> Tensor:
        """Random weights: those of a layer depend on the seed and on the layer, not on the number of ranks.

        A row of spline coefficients is drawn as the weights of a layer are.
        """
        flat = self.layout.zeros()
        rows = self.layout.rows(flat)
        for number, stack in enumerate(self.layout.stacks):
            scale = getattr(scales, stack.name)
            size = prod(stack.shapes["weight"])
            for i in range(stack.count):
                rng = np.random.default_rng([seed, number, stack.first + i])
                if scales.distribution == "normal":
                    rows[stack.name][i, :size] = torch.from_numpy(scale * rng.standard_normal(size))
                else:
                    row, least = rows[stack.name][i], 0.0 if scales.distribution == "positive" else -1.0
                    row.copy_(torch.from_numpy(scale * rng.uniform(least, 1.0, len(row))))
        return flat

    def steps(self, x: Tensor) -> ResidualSteps:
        """The residual layers owned here, with the weights in the flat vector `x`; collective with splines."""
        return ResidualSteps(self.block, self.free.layout.rows(self.expand(x))["layers"], self.sizes)

    def open(self, x: Tensor, features: Tensor) -> Tensor:
        """u_0 (C, B) of features (F, B); on the owner of the first layer."""
        return self.opening.forward(self.layout.rows(x)["opening"], features[None])[0]

    def classify(self, x: Tensor, u: Tensor) -> Tensor:
        """Logits (classes, B) of u_N (C, B); on the owner of the last layer."""
        return self.classification.forward(self.layout.rows(x)["classification"], u[None])[0]

    def predict(self, x: Tensor, features: Tensor) -> Tensor:
        """Classes (B,) of features (F, B), exactly propagated, on every rank.

        The samples go through the ranks in portions, so that all ranks are busy once the first has passed.
        """
        template = torch.empty((self.block.inputs, 0), dtype=self.dtype)
        steps = self.steps(x)
        rank, count = self.comm.rank, self.partition.count(self.comm.rank)
        ahead = self.partition.neighbor(rank, +1) if count else None
        behind = self.partition.neighbor(rank, -1) if count else None
        classes, waits = [], []
        for first in range(0, features.shape[1], PREDICT_CHUNK) if count else ():
            portion = features[:, first : first + PREDICT_CHUNK]
            if behind is None:
                u = self.open(x, portion)[None]
            else:
                u = self.comm.recv(template.new_empty((1, self.block.inputs, portion.shape[1])), behind)
            u = steps.relax(u, count, None, None)
            if ahead is None:
                classes.append(self.classify(x, u[0]).max(0).indices)
            else:
                waits.append(self.comm.isend(u, ahead))
        for wait in waits:
            wait()
        return self.comm.bcast(torch.cat(classes) if classes else None, self.last_rank)
