"""Objectives: value and gradient of a network on data, with respect to the weights that a rank owns.

Shape letters: `F` features, `C` width, `B` batch, `p` parameters of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from xbraid_py import kernels
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.tree import TreeSum
from xbraid_py.mgrit import Solver
from xbraid_py.mgrit.equations import Adjoint, AdjointTrajectory, Forward
from xbraid_py.optim.objective import Evaluation
from xbraid_py.problem.exact import ExactPropagation
from xbraid_py.problem.network import DenseResNet
from xbraid_py.problem.regularization import Regularization

_VECTOR = 8  # samples that a kernel takes at once


class _Value:
    """Monitor of a state solve: loss, samples classified rightly, error of the loss, regularization.

    The error is taken to be what the last correction has changed: the corrected loss is better than that.
    """

    def __init__(self, objective: NetworkObjective, portion: _Portion, x: Tensor, terms: Tensor, error: float | None):
        self.objective, self.portion, self.x, self.terms = objective, portion, x, terms
        self.error = None if error is None else error * portion.share

    def measure(self, end: Tensor | None, before: Tensor | None) -> Tensor:
        columns = self.terms.new_zeros((len(self.terms), 4))
        columns[:, 3] = self.terms
        if end is not None:
            loss, columns[-1, 1] = self.objective.loss(self.x, self.portion, end, self.portion.slope)
            columns[-1, 0] = loss
            if before is not None and self.error is not None:
                columns[-1, 2] = abs(self.objective.loss(self.x, self.portion, before)[0] - loss)
        return columns

    def suffices(self, sums: Tensor) -> bool:
        return self.error is None or float(sums[2]) <= self.error


@dataclass(eq=False)
class _Portion:
    """Samples that are propagated together, and what the last solves on them have left.

    Attributes
    ----------
    index : int
        Its number among all portions.
    features : (F, b) tensor
    labels : (b,) tensor
    share : float
        Of all samples, b / B.
    states : (n, C, b) tensor
        Inputs of the layers that are propagated through here.
    slope : (classes, b) tensor
        Softmax less one-hot of the last state solve, on the owner of the last layer.
    warm, adjoint_warm : tuple of Tensor or None
        What the next solves start from.
    end : Tensor or None
        Output (C, b) of the last layer, on its owner.
    """

    index: int
    features: Tensor
    labels: Tensor
    share: float
    states: Tensor
    slope: Tensor
    warm: tuple[Tensor, ...] | None = None
    adjoint_warm: tuple[Tensor, ...] | None = None
    end: Tensor | None = None


class NetworkObjective:
    """Mean cross entropy of a network on data, plus regularization; states and adjoints by a pipeline or by MGRIT.

    With MGRIT each state solve starts from the last one that gave a finite loss, each adjoint solve from the last
    adjoint solve: the one-shot method (paper 001, section 2.1). The samples go in portions, each solved for itself, and
    replicas of the network share these out: sums over portions are the same bits on any number of ranks.

    Parameters
    ----------
    network : DenseResNet
    features : (F, B) tensor
        The values are only read on the owners of the first layer.
    labels : (B,) int64 tensor
        The values are only read on the owners of the last layer.
    regularization : Regularization
    forward, adjoint : Solver
        For states and adjoints, on hierarchies with the partition of the network's stages.

    Attributes
    ----------
    work : float
        Evaluations of a layer on all samples so far, on all ranks, states and adjoints.
    evaluations, gradients : int
        State and adjoint solves so far.
    sweeps, adjoint_sweeps : int
        Relaxations of the finest level in them, of the first portion here.
    adjoint_residual : float
        Relative residual of the last adjoint solve.
    residuals, adjoint_residuals : list of float
        Relative residuals of the last solves, iteration by iteration, of the first portion here; see
        `Solution.residuals`.

    Raises
    ------
    ValueError
        If the solvers are made for other layers, or there are fewer portions than replicas.
    """

    shift = None

    def __init__(
        self,
        network: DenseResNet,
        features: Tensor,
        labels: Tensor,
        regularization: Regularization,
        forward: Solver,
        adjoint: Solver,
    ):
        for solver in (forward, adjoint):
            if solver.hierarchy.partition != network.stage.partition:
                raise ValueError("the solvers' hierarchies and the network must share one partition of the layers")
        self.network, self.regularization, self.forward, self.adjoint = network, regularization, forward, adjoint
        self.work, self.adjoint_residual = 0.0, 0.0
        self.residuals: list[float] = []
        self.adjoint_residuals: list[float] = []
        self.evaluations = self.gradients = self.sweeps = self.adjoint_sweeps = 0
        self.is_exact = forward.options.cycle == "pipeline"
        self._exact: ExactPropagation | None = None
        # Blocks of layers, in which sums over layers are made: the same on any number of ranks.
        self._blocks = network.partition.coarsen(forward.hierarchy.block)
        self._portions: list[_Portion] = []
        self._regularization_gradient: Tensor | None = None
        self.use(features, labels)

    def use(self, features: Tensor, labels: Tensor) -> None:
        """Exchange the samples. The next solves start afresh; with as many samples as before no memory is taken.

        Raises
        ------
        ValueError
            If there is not one label for each sample, or no portion for some replica.
        """
        network, samples = self.network, features.shape[1]
        if labels.shape != (samples,):
            raise ValueError(
                f"labels.shape={tuple(labels.shape)} must be ({samples},), one for each column of features"
            )
        self.features, self.labels, self._x = features, labels, None
        self._count = self.forward.options.portions_of(samples)
        first, stop = 0, self._count
        if network.replicas is not None:
            grid = network.replicas
            if grid.replicas > self._count:
                raise ValueError(
                    f"replicas={grid.replicas} are more than the {self._count} portion(s) of {samples} samples; "
                    f"use at most {self._count} replicas"
                )
            first, stop = Partition.balanced(self._count, grid.replicas).bounds[grid.replica :][:2]
        bounds, stage, kept = _bounds(samples, self._count), network.stage, self._portions
        self._portions = []
        for index in range(first, stop):
            here, size = slice(bounds[index], bounds[index + 1]), bounds[index + 1] - bounds[index]
            old = kept[index - first] if index - first < len(kept) else None
            if old is not None and old.states.shape[2] == size:
                states, slope = old.states, old.slope
            else:
                layers = stage.partition.count(stage.comm.rank)
                states = torch.empty((layers, stage.block.inputs, size), dtype=network.dtype)
                slope = torch.empty((stage.classification.outputs, size), dtype=network.dtype)
            own = features[:, here] if self._count == 1 else features[:, here].contiguous()
            self._portions.append(_Portion(index, own, labels[here], size / samples, states, slope))
        if self.is_exact:
            if self._exact is None or self._exact.samples != samples:
                self._exact = ExactPropagation(stage, samples)
            each = [(p.index, p.features, p.labels, p.states, p.slope) for p in self._portions]
            self._exact.use(each)

    @property
    def states(self) -> Tensor:
        """Inputs (n, C, B) of the layers owned here, as the last state solve has left them; without replicas."""
        return self._joined([portion.states for portion in self._portions])

    @property
    def warm(self) -> tuple[Tensor, ...] | None:
        """What the next state solves start from: arrays (K, C, B) of all levels but the coarsest, of all samples.

        Each rank of a replica has the rows of its intervals, and every replica the same. Collective with replicas.
        """
        return self._gathered([portion.warm for portion in self._portions])

    @warm.setter
    def warm(self, value: tuple[Tensor, ...] | None) -> None:
        for portion, own in zip(self._portions, self._dealt(value), strict=True):
            portion.warm = own

    @property
    def adjoint_warm(self) -> tuple[Tensor, ...] | None:
        """The same of the adjoint solves."""
        return self._gathered([portion.adjoint_warm for portion in self._portions])

    @adjoint_warm.setter
    def adjoint_warm(self, value: tuple[Tensor, ...] | None) -> None:
        for portion, own in zip(self._portions, self._dealt(value), strict=True):
            portion.adjoint_warm = own

    def _gathered(self, warm: list[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
        if not warm[0]:
            return warm[0]
        levels = tuple(self._joined(list(rows)) for rows in zip(*warm, strict=True))
        grid = self.network.replicas
        if grid is None:
            return levels
        # Samples in front, so that those of the replicas are rows of one array.
        counts = self._samples_of_replicas()
        found = (grid.data.allgather(rows.movedim(-1, 0).contiguous(), counts) for rows in levels)
        return tuple(rows.movedim(0, -1).contiguous() for rows in found)

    def _dealt(self, value: tuple[Tensor, ...] | None) -> list[tuple[Tensor, ...] | None]:
        if not value or len(self._portions) == 1 == self._count:
            return [value] * len(self._portions)
        bounds = _bounds(len(self.labels), self._count)
        return [
            tuple(rows[..., bounds[each.index] : bounds[each.index + 1]].contiguous() for rows in value)
            for each in self._portions
        ]

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return parts[0] if len(parts) == 1 else torch.cat(parts, -1)

    def _samples_of_replicas(self) -> list[int]:
        bounds = _bounds(len(self.labels), self._count)
        assert self.network.replicas is not None
        ends = Partition.balanced(self._count, self.network.replicas.replicas).bounds
        return [bounds[b] - bounds[a] for a, b in pairwise(ends)]

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        # One summand for each block: it has the same rows on any number of ranks.
        rows = self.network.layout.dots(a, b, self._blocks.count(self.network.comm.rank))
        return self.network.comm.ordered_sum(rows.permute(2, 0, 1).contiguous(), self._blocks.counts)

    def loss(self, x: Tensor, portion: _Portion, u: Tensor, slope: Tensor | None = None) -> tuple[float, int]:
        """What a portion with the outputs u (C, b) adds to the mean cross entropy, and samples classified rightly."""
        stage = self.network.stage
        row = stage.layout.rows(x)["classification"]
        total, right = kernels.cross_entropy(stage.classification, row, u[None], portion.labels, slope=slope)
        return total / len(self.labels), right

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        # From here on the weights are those of the layers; without splines x and the network themselves.
        network, x = self.network.free, self.network.expand(x)
        self._x = network.gather(x)
        whole = self._x if network.comm.size > 1 == network.stage.comm.size else None
        terms, self._regularization_gradient = self.regularization.terms(
            network, x, self._blocks.count(network.comm.rank), whole
        )
        self.evaluations += 1
        if self.is_exact:
            assert self._exact is not None
            total, right, regularization = self._sums(terms, self._exact.forward(self._x))
            loss, residual = total / len(self.labels), 0.0
            self.work += network.grid.num_layers
        else:
            loss, right, regularization, residual = self._solve(terms, max_iter, error)
        return Evaluation(loss + regularization, loss, right / len(self.labels), residual)

    def _sums(self, terms: Tensor, numbers: Tensor) -> list[float]:
        """Sums over all portions of two numbers each, and over the terms of all blocks; one message."""
        comm, own = self.network.comm, torch.cat([terms.double(), numbers.flatten()])
        if comm.size == 1:
            rows = [own]
        else:
            counts = self._numbers_of_ranks()
            rows = comm.allgather(own, counts).split(counts)
        blocks = self._blocks.counts
        of_terms = torch.cat([row[:count] for row, count in zip(rows, blocks, strict=True)])
        of_portions = torch.cat([row[count:] for row, count in zip(rows, blocks, strict=True)]).view(-1, 2)
        return [*of_portions.cumsum(0)[-1].tolist(), float(of_terms.cumsum(0)[-1])]

    def _numbers_of_ranks(self) -> list[int]:
        """Numbers that each rank has for `_sums`."""
        grid, comm = self.network.replicas, self.network.comm
        replicas = 1 if grid is None else grid.replicas
        portions = Partition.balanced(self._count, replicas).counts
        last = self.network.stage.last_rank
        return [
            self._blocks.count(rank) + (2 * portions[rank % replicas] if rank // replicas == last else 0)
            for rank in range(comm.size)
        ]

    def _template(self, portion: _Portion) -> Tensor:
        return portion.states.new_empty((1, *portion.states.shape[1:]))

    def _solve(self, terms: Tensor, max_iter: int | None, error: float | None) -> tuple[float, float, float, float]:
        """Loss, samples classified rightly, regularization and relative residual: by MGRIT, portion after portion."""
        network, x = self.network, self._x
        assert x is not None
        stage, intervals = network.stage, self.forward.hierarchy.intervals.count(network.stage.comm.rank)
        solutions, numbers = [], []
        for portion in self._portions:
            # Without replicas the terms of regularization are summed by the way.
            by_the_way = network.replicas is None and not solutions
            own = terms if by_the_way else terms.new_zeros(intervals)
            monitor = _Value(self, portion, x, own, error)
            propagator = Forward(stage.steps(x), portion.states, self._template(portion)[0])
            start = stage.open(x, portion.features) if stage.is_first else None
            solution = self.forward.solve(
                propagator, start, portion.warm, max_iter=max_iter, exact=error == 0.0, monitor=monitor
            )
            portion.end = solution.end
            solutions.append(solution)
            loss, right, _, regularization = solution.measured.tolist()
            numbers.append((loss, right, solution.work * portion.share, solution.residual, regularization))
        self.residuals = solutions[0].residuals
        self.sweeps += solutions[0].sweeps
        numbers = self._of_all_portions(numbers)
        loss, right, work, _, regularization = (sum(column) for column in zip(*numbers, strict=True))
        if network.replicas is not None:
            regularization = float(network.comm.ordered_sum(terms[:, None], self._blocks.counts))
        self.work += work
        for portion, solution in zip(self._portions, solutions, strict=True):
            if isfinite(loss + regularization):
                portion.warm = solution.warm
            elif solution.warm is portion.warm:
                portion.warm = None  # it has been overwritten
        return loss, right, regularization, max(row[3] for row in numbers)

    def _of_all_portions(self, rows: list[tuple[float, ...]]) -> Sequence[Sequence[float]]:
        """Rows of numbers of all portions, in their order, from those of the portions here."""
        grid = self.network.replicas
        if grid is None:
            return rows
        counts = Partition.balanced(self._count, grid.replicas).counts
        return grid.data.allgather(torch.tensor(rows, dtype=torch.float64), counts).tolist()

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        sums = TreeSum(self._count)
        self.gradients += 1
        if self.is_exact:
            assert self._exact is not None
            self._exact.backward(sums)
            self.work += 2.0 * self.network.grid.num_layers
        else:
            self._solve_back(sums, max_iter, exact)
        assert self._regularization_gradient is not None
        found = self.network.free.reduce(sums) + self._regularization_gradient
        return self.network.contract(found)

    def _solve_back(self, sums: TreeSum, max_iter: int | None, exact: bool) -> None:
        """The gradients of the portions, by MGRIT."""
        stage, x = self.network.stage, self._x
        assert x is not None
        rows, numbers = stage.layout.rows(x), []
        for portion in self._portions:
            gradient = stage.layout.zeros()
            start = self._at_end(portion, rows, gradient) if stage.is_last else None
            propagator = Adjoint(stage.steps(x), portion.states, stage.layout.rows(gradient)["layers"])
            solution = self.adjoint.solve(propagator, start, portion.adjoint_warm, max_iter=max_iter, exact=exact)
            if stage.is_first:
                assert solution.end is not None
                self._at_start(portion, rows, solution.end, gradient)
            if not numbers:
                self.adjoint_residuals = solution.residuals
                self.adjoint_sweeps += solution.sweeps
            portion.adjoint_warm = solution.warm
            numbers.append((solution.work * portion.share, solution.residual))
            sums.add(portion.index, gradient, take=True)
        numbers = self._of_all_portions(numbers)
        self.work += sum(work for work, _ in numbers)
        self.adjoint_residual = max(residual for _, residual in numbers)

    def adjoints(self, x: Tensor) -> Tensor:
        """d(loss)/d(u_{n+1}) behind each layer owned here (n, C, B), at x, where `evaluate` has been called last.

        Without replicas.
        """
        assert self._x is not None
        stage, x, found = self.network.stage, self._x, []
        for portion in self._portions:
            if self.is_exact:
                assert self._exact is not None
                portion.end = self._exact.portions[portion.index].end[0]
            start = self._at_end(portion, stage.layout.rows(x)) if stage.is_last else None
            propagator = AdjointTrajectory(stage.steps(x), portion.states, None, kept=torch.empty_like(portion.states))
            solution = self.adjoint.solve(propagator, start, portion.adjoint_warm)
            self.work += solution.work * portion.share
            portion.adjoint_warm = solution.warm
            self.adjoint_residual = solution.residual
            found.append(propagator.kept)
        return self._joined(found)

    def _at_end(self, portion: _Portion, rows: dict[str, Tensor], gradient: Tensor | None = None) -> Tensor:
        """d(loss)/d(u_N) (C, b) of a portion; the classification layer's gradient is written. On the last rank."""
        # d(mean cross entropy)/d(logits) = (softmax - one-hot) / B
        own = None if gradient is None else self.network.stage.layout.rows(gradient)["classification"]
        how: dict[str, Any] = {"h": 1.0 / len(self.labels), "residual": False, "gradient": own}
        layer, slope = self.network.classification, portion.slope
        assert portion.end is not None and slope is not None
        found = kernels.adjoint(layer, rows["classification"], portion.end[None], slope[None], **how)
        assert found is not None
        return found[0]

    def _at_start(self, portion: _Portion, rows: dict[str, Tensor], v: Tensor, gradient: Tensor) -> None:
        """Write the opening layer's gradient, from d(loss)/d(u_0) (C, b); on the first rank."""
        layer = self.network.opening
        _, own = layer.vjp(rows["opening"], portion.features[None], v[None], True, back=False)
        assert own is not None
        self.network.stage.layout.rows(gradient)["opening"].copy_(own)


def _bounds(samples: int, portions: int) -> tuple[int, ...]:
    """Where the portions of so many samples begin and end: in whole vectors of the kernels, if there are enough."""
    vectors = -(-samples // _VECTOR)
    if portions == 1 or vectors < portions:
        return Partition.balanced(samples, portions).bounds
    return tuple(min(bound, samples) for bound in Partition.balanced(vectors, portions).refine(_VECTOR).bounds)
