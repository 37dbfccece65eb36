"""Samples in portions whose states are not kept: the mean of a network's objective over all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xbraid_py.optim.objective import Evaluation
from xbraid_py.problem.network import DenseResNet
from xbraid_py.problem.objective import NetworkObjective

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
    work : float
        Evaluations of a layer on all samples so far, on all ranks.

    Raises
    ------
    ValueError
        If there is no portion.
    """

    shift = None
    warm = adjoint_warm = None  # the solves of each portion start afresh

    def __init__(self, objective: NetworkObjective, portions: Sequence[Samples]):
        if not portions:
            raise ValueError("portions is empty; use at least one")
        self.objective, self.portions = objective, tuple(portions)
        samples = sum(len(labels) for _, labels in portions)
        self._shares = [len(labels) / samples for _, labels in portions]
        self._gradient: Tensor | None = None
        self.evaluations = self.gradients = 0
        self.work = 0.0

    @property
    def network(self) -> DenseResNet:
        """The network."""
        return self.objective.network

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        """The objective at x; see `Objective`."""
        found, residual = torch.zeros(3, dtype=torch.float64), 0.0
        total = self.network.layout.zeros()
        self.objective.work = 0.0
        for (features, labels), share in zip(self.portions, self._shares, strict=True):
            self.objective.use(features, labels)
            part = self.objective.evaluate(x, max_iter, error)
            found += share * torch.tensor([part.value, part.loss, part.accuracy], dtype=torch.float64)
            residual = max(residual, part.residual)
            total.add_(self.objective.gradient(x, max_iter, error == 0.0), alpha=share)
        self._gradient = total
        self.work += self.objective.work / len(self.portions)
        self.evaluations += 1
        value, loss, accuracy = found.tolist()
        return Evaluation(value, loss, accuracy, residual)

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        """The gradient at x, as the last `evaluate` has found it."""
        self.gradients += 1
        assert self._gradient is not None
        return self._gradient.clone()

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Dot products over all ranks; see `Objective`."""
        return self.objective.dots(a, b)
