"""The whole network over a communicator: classification o layers o opening.

Shape letters: `N` layers, `n` of them owned here, `F` features, `C` width, `B` batch, `p` parameters of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

import numpy as np
import torch
from torch import Tensor

from xbraid_py.comm import Communicator, ProcessGrid, as_communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.tree import TreeSum, nodes_between
from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.layers.parameters import Layout, Stack
from xbraid_py.layers.splines import SplineLayers, Splines
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.mgrit.pipeline import follow
from xbraid_py.problem.options import InitialScales

PREDICT_CHUNK = 1024  # samples that travel through the ranks together


@dataclass(frozen=True)
class DenseResNet:
    """u_0 = opening(y), u_{n+1} = u_n + h F(u_n, theta_n), logits = classification(u_N).

    Parameters
    ----------
    opening, block, classification : DenseLayer
        (F to C), F itself (C to C) and (C to classes).
    grid : LayerGrid
        The N layers.
    partition : Partition
        Owners of the weights of the layers. The opening layer's belong to the owner of the first, the classification
        layer's to the owner of the last one.
    comm : Communicator, mpi4py.MPI.Comm, ProcessGroup or None
        None for a serial run.
    dtype : torch.dtype
        Of weights and states.
    splines : Splines, optional
        The residual layers' weights are such functions of the depth, whose coefficients all belong to the owner of the
        first layer; free weights if not given.
    replicas : ProcessGrid, optional
        Replicas of `comm` that share the samples; those with the same layers are neighbors, and share these layers'
        weights. Each rank propagates through all layers of its `stage`.
    stages : Partition, optional
        Which layers these are, on the ranks of a replica. Those of the weights, if there are no replicas.
    """

    opening: DenseLayer
    block: DenseLayer
    classification: DenseLayer
    grid: LayerGrid
    partition: Partition
    comm: Communicator
    dtype: torch.dtype = torch.float64
    splines: Splines | None = None
    replicas: ProcessGrid | None = None
    stages: Partition | None = None

    def __post_init__(self):
        object.__setattr__(self, "comm", as_communicator(self.comm))

    @cached_property
    def stage(self) -> DenseResNet:
        """The free network of this replica, on its ranks: the layers that are propagated through here.

        Itself, if there are neither replicas nor splines.
        """
        if self.replicas is None:
            return self.free
        own = {"comm": self.replicas.layers, "partition": self.stages, "replicas": None, "stages": None}
        return replace(self.free, **own)

    def gather(self, x: Tensor) -> Tensor:
        """Flat vector of `stage` from those of the free network here and on the replicas; collective."""
        return x if self.replicas is None else self.replicas.data.allgather(x, self._shares)

    def reduce(self, sums: TreeSum) -> Tensor:
        """The sum of flat vectors of `stage` over all replicas, the part of it that is owned here; collective.

        Parameters
        ----------
        sums : TreeSum
            Over all portions of the samples, those that are propagated here added.
        """
        if self.replicas is None:
            return sums.result()
        data, shares = self.replicas.data, self._shares
        portions = Partition.balanced(sums.total, self.replicas.replicas)
        nodes = torch.stack([value for _, _, value in sums.nodes()])
        pieces = nodes.split(shares, 1)
        others = [rank for rank in range(data.size) if rank != data.rank]
        places = [nodes_between(sums.total, *portions.bounds[rank : rank + 2]) for rank in range(data.size)]
        arriving = {rank: data.irecv(nodes.new_empty((len(places[rank]), shares[data.rank])), rank) for rank in others}
        sent = [data.isend(pieces[rank].contiguous(), rank) for rank in others]
        total = TreeSum(sums.total)
        for rank in range(data.size):
            found = pieces[rank] if rank == data.rank else arriving[rank]()
            for (level, index), value in zip(places[rank], found, strict=True):
                total.add(index, value, level)
        for wait in sent:
            wait()
        return total.result()

    @cached_property
    def _shares(self) -> list[int]:
        """Numbers of the stage's flat vector that each of its replicas owns."""
        assert self.replicas is not None
        first = self.comm.rank - self.replicas.replica
        assert self.replicas is not None
        ranks = range(first, first + self.replicas.replicas)
        return [self.free.layout_of(rank).size for rank in ranks]

    @property
    def is_first(self) -> bool:
        """Whether the opening layer is here."""
        return self.partition.first_owner == self.comm.rank

    @property
    def is_last(self) -> bool:
        """Whether the classification layer is here."""
        return self.last_rank == self.comm.rank

    @property
    def last_rank(self) -> int:
        """Owner of the last layer and of the classification layer."""
        return self.partition.last_owner

    @cached_property
    def layout(self) -> Layout:
        """How the weights owned here, or the coefficients of those of the layers, lie in one flat vector."""
        return self.layout_of(self.comm.rank)

    def layout_of(self, rank: int) -> Layout:
        """The layout on a rank."""
        total = self.grid.num_layers
        is_first, is_last = rank == self.partition.first_owner, rank == self.last_rank
        first, count = self.partition.first(rank), self.partition.count(rank)
        if self.splines is not None:
            total = self.splines.num
            first, count = (0, total) if is_first else (total, 0)
        layers = Stack("layers", self.block.shapes, total, first, count)
        return Layout(
            (
                Stack("opening", self.opening.shapes, 1, 0 if is_first else 1, int(is_first)),
                layers,
                Stack("classification", self.classification.shapes, 1, 0 if is_last else 1, int(is_last)),
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
        assert self.splines is not None
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

        The samples go through the ranks in portions, so that all ranks are busy once the first has passed; replicas
        share them out.
        """
        if self.replicas is not None:
            shares = Partition.balanced(features.shape[1], self.replicas.replicas)
            first, stop = shares.bounds[self.replicas.replica :][:2]
            own = self.stage.predict(self.gather(self.expand(x)), features[:, first:stop])
            return self.replicas.data.allgather(own, shares.counts)
        network, x, classes = self.free, self.expand(x), []
        steps, count = network.steps(x), self.partition.count(self.comm.rank)
        follow(
            self.comm,
            self.partition,
            +1,
            features.split(PREDICT_CHUNK, 1),
            begin=lambda portion: network.open(x, portion)[None],
            template=lambda portion: x.new_empty((1, self.block.inputs, portion.shape[1])),
            through=lambda portion, u: steps.relax(u, count, None, None),
            end=lambda portion, u: classes.append(network.classify(x, u[0]).max(0).indices),
        )
        return self.comm.bcast(torch.cat(classes) if classes else None, self.last_rank)
