"""Objectives: value and gradient of a network on data, with respect to the weights that a rank owns.

Shape letters: `F` features, `C` width, `B` batch, `p` parameters of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite

import torch
from torch import Tensor

from xbraid_py.mgrit import Solver
from xbraid_py.mgrit.equations import Adjoint, AdjointTrajectory, Forward
from xbraid_py.optim.objective import Evaluation
from xbraid_py.problem.network import DenseResNet
from xbraid_py.problem.regularization import Regularization


class _Value:
    """Monitor of a state solve: loss, samples classified rightly, error of the loss, regularization.

    The error is taken to be what the last correction has changed: the corrected loss is better than that.
    """

    def __init__(self, objective: NetworkObjective, x: Tensor, terms: Tensor, error: float | None):
        self.objective, self.x, self.terms, self.error = objective, x, terms, error
        self.logits: Tensor | None = None

    def measure(self, end: Tensor | None, before: Tensor | None) -> Tensor:
        columns = self.terms.new_zeros((len(self.terms), 4))
        columns[:, 3] = self.terms
        if end is not None:
            objective = self.objective
            self.logits = objective.network.free.classify(self.x, end)
            loss = objective.loss(self.logits)
            columns[-1, 0] = loss
            columns[-1, 1] = (self.logits.max(0).indices == objective.labels).sum()
            if before is not None and self.error is not None:
                columns[-1, 2] = (objective.loss(objective.network.free.classify(self.x, before)) - loss).abs()
        return columns

    def suffices(self, sums: Tensor) -> bool:
        return self.error is None or float(sums[2]) <= self.error


class NetworkObjective:
    """Mean cross entropy of a network on data, plus regularization; states and adjoints by MGRIT.

    Each state solve starts from the last one that gave a finite loss, each adjoint solve from the last adjoint solve:
    the one-shot method (paper 001, section 2.1).

    Parameters
    ----------
    network : DenseResNet
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
    evaluations, gradients : int
        State and adjoint solves so far.
    sweeps, adjoint_sweeps : int
        Relaxations of the finest level in them.
    warm, adjoint_warm : tuple of Tensor or None
        What the next solves start from.
    adjoint_residual : float
        Relative residual of the last adjoint solve.
    residuals, adjoint_residuals : list of float
        Relative residuals of the last solves, iteration by iteration; see `Solution.residuals`.
    """

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
            if solver.hierarchy.partition != network.partition:
                raise ValueError("the solvers' hierarchies and the network must share one partition of the layers")
        self.network, self.regularization, self.forward, self.adjoint = network, regularization, forward, adjoint
        self.work, self.adjoint_residual = 0.0, 0.0
        self.residuals: list[float] = []
        self.adjoint_residuals: list[float] = []
        self.evaluations = self.gradients = self.sweeps = self.adjoint_sweeps = 0
        self._one_hot = torch.empty(0, 0)
        self._regularization_gradient: Tensor | None = None
        self.use(features, labels)

    def use(self, features: Tensor, labels: Tensor) -> None:
        """Exchange the samples. The next solves start afresh; with as many samples as before no memory is taken.

        Raises
        ------
        ValueError
            If there is not one label for each sample.
        """
        network, samples = self.network, features.shape[1]
        if labels.shape != (samples,):
            raise ValueError(
                f"labels.shape={tuple(labels.shape)} must be ({samples},), one for each column of features"
            )
        self.features, self.labels = features, labels
        self.warm: tuple[Tensor, ...] | None = None
        self.adjoint_warm: tuple[Tensor, ...] | None = None
        self._expanded: Tensor | None = None
        self._end: Tensor | None = None
        self._logits: Tensor | None = None
        if self._one_hot.shape[1] != samples:
            shape = (network.block.inputs, samples)
            self._states = torch.empty((network.partition.count(network.comm.rank), *shape), dtype=network.dtype)
            self._template = torch.empty(1, dtype=network.dtype).expand(shape)  # one number stands for a state
            self._one_hot = torch.empty((network.classification.outputs, samples), dtype=network.dtype)
        self._one_hot.zero_()
        if network.is_last:
            self._one_hot[labels, torch.arange(samples)] = 1.0

    @property
    def states(self) -> Tensor:
        """Inputs (n, C, B) of the layers owned here, as the last state solve has left them."""
        return self._states

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        # One summand for each interval: it has the same rows on any number of ranks.
        intervals = self.forward.hierarchy.intervals
        count = intervals.count(self.network.comm.rank)
        rows = self.network.layout.dots(a, b, count).permute(2, 0, 1).contiguous()
        return self.network.comm.ordered_sum(rows, intervals.counts)

    def loss(self, logits: Tensor) -> Tensor:
        """Mean cross entropy of logits (classes, B); on the owner of the last layer.

        The library's function takes several times as long with the classes first.
        """
        return torch.log_softmax(logits, 0).flatten().dot(self._one_hot.flatten()) / -len(self.labels)

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        # From here on the weights are those of the layers; without splines x and the network themselves.
        network, x = self.network.free, self.network.expand(x)
        self._expanded = x
        start = network.open(x, self.features) if network.is_first else None
        intervals = self.forward.hierarchy.intervals.count(network.comm.rank)
        terms, self._regularization_gradient = self.regularization.terms(network, x, intervals)
        monitor = _Value(self, x, terms, error)
        propagator = Forward(network.steps(x), self._states, self._template)
        solution = self.forward.solve(
            propagator, start, self.warm, max_iter=max_iter, exact=error == 0.0, monitor=monitor
        )
        self._end, self._logits = solution.end, monitor.logits
        loss, right, _, regularization = solution.measured.tolist()
        value = loss + regularization
        self.work += solution.work
        self.residuals = solution.residuals
        self.evaluations += 1
        self.sweeps += solution.sweeps
        if isfinite(value):
            self.warm = solution.warm
        elif solution.warm is self.warm:
            self.warm = None  # it has been overwritten
        return Evaluation(value, loss, right / len(self.labels), solution.residual)

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        network, x = self.network.free, self._expanded
        rows = network.layout.rows(x)
        gradient = network.layout.zeros()
        out = network.layout.rows(gradient)
        start = None
        if network.is_last:
            start, own = self._at_end(rows["classification"])
            out["classification"].copy_(own)
        propagator = Adjoint(network.steps(x), self._states, out["layers"])
        solution = self.adjoint.solve(propagator, start, self.adjoint_warm, max_iter=max_iter, exact=exact)
        if network.is_first:
            _, own = network.opening.vjp(rows["opening"], self.features[None], solution.end[None], True, back=False)
            out["opening"].copy_(own)
        self.work += solution.work
        self.gradients += 1
        self.adjoint_sweeps += solution.sweeps
        self.adjoint_warm, self.adjoint_residual = solution.warm, solution.residual
        self.adjoint_residuals = solution.residuals
        return self.network.contract(gradient.add_(self._regularization_gradient))

    def adjoints(self, x: Tensor) -> Tensor:
        """d(loss)/d(u_{n+1}) behind each layer owned here (n, C, B), at x, where `evaluate` has been called last."""
        network, x = self.network.free, self._expanded
        start = None
        if network.is_last:
            start, _ = self._at_end(network.layout.rows(x)["classification"])
        propagator = AdjointTrajectory(network.steps(x), self._states, None, kept=torch.empty_like(self._states))
        solution = self.adjoint.solve(propagator, start, self.adjoint_warm)
        self.work += solution.work
        self.adjoint_warm, self.adjoint_residual = solution.warm, solution.residual
        return propagator.kept

    def _at_end(self, classification: Tensor) -> tuple[Tensor, Tensor]:
        """d(loss)/d(u_N) (C, B), and the gradient of the classification layer; on the owner of the last layer."""
        # d(mean cross entropy)/d(logits) = (softmax - one-hot) / B
        slope = torch.softmax(self._logits, 0).sub_(self._one_hot).div_(len(self.labels))
        back, own = self.network.classification.vjp(classification, self._end[None], slope[None], True)
        return back[0], own


# Inputs and targets of some samples as a network takes them: of a dense one features (F, B) and labels (B,).
Samples = tuple[Tensor, Tensor]


class PortionedObjective:
    """The mean over all samples of a network's objective, which holds the states of one portion at a time.

    `evaluate` makes the gradient of a portion as well, while its states are there: right for methods that want a
    gradient at every point, and dear for line searches with many trials.

    Parameters
    ----------
    objective : NetworkObjective
        Its samples are exchanged.
    portions : sequence of Samples

    Attributes
    ----------
    evaluations, gradients : int
        Of all samples, so far.

    Raises
    ------
    ValueError
        If there is no portion.
    """

    def __init__(self, objective: NetworkObjective, portions: Sequence[Samples]):
        if not portions:
            raise ValueError("portions is empty; use at least one")
        self.objective, self.portions = objective, tuple(portions)
        samples = sum(len(labels) for _, labels in portions)
        self._shares = [len(labels) / samples for _, labels in portions]
        self._gradient: Tensor | None = None
        self.evaluations = self.gradients = 0

    @property
    def network(self) -> DenseResNet:
        """The network."""
        return self.objective.network

    @property
    def work(self) -> float:
        """Evaluations of a layer on all samples so far, on all ranks."""
        return self.objective.work / len(self.portions)

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        """The objective at x; see `Objective`."""
        found, residual = torch.zeros(3, dtype=torch.float64), 0.0
        total = self.network.layout.zeros()
        for (features, labels), share in zip(self.portions, self._shares, strict=True):
            self.objective.use(features, labels)
            part = self.objective.evaluate(x, max_iter, error)
            found += share * torch.tensor([part.value, part.loss, part.accuracy], dtype=torch.float64)
            residual = max(residual, part.residual)
            total.add_(self.objective.gradient(x, max_iter, error == 0.0), alpha=share)
        self._gradient = total
        self.evaluations += 1
        return Evaluation(*found.tolist(), residual)

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        """The gradient at x, as the last `evaluate` has found it."""
        self.gradients += 1
        return self._gradient.clone()

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Dot products over all ranks; see `Objective`."""
        return self.objective.dots(a, b)
