"""The objective of a torch module: the mean loss over the samples in use, by autograd, on a flat vector of weights.

Shape letters: `B` samples.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.optim.objective import Evaluation

Samples = tuple[Tensor, Tensor]
# A mean over samples, of the module's output and what should come out.
Loss = Callable[[Tensor, Tensor], Tensor]


class ModuleObjective:
    """Mean loss of a module; see `Objective`.

    The module's parameters become views of the vectors that it is evaluated at, in the order of
    `module.parameters()`, so nothing is copied.

    Parameters
    ----------
    module : Module
        Without buffers that training changes.
    loss : callable
        `loss(module(inputs), targets)`, the mean over the samples.
    grid : ProcessGrid, optional
        Each replica takes its share of the samples; values and gradients are the means over all of them.

    Attributes
    ----------
    samples : int
        Samples in use, of all replicas.
    passes : int
        Samples that gradients were computed for so far.
    loss_before : float
        The loss where it was evaluated last.
    """

    def __init__(self, module: nn.Module, loss: Loss, grid: ProcessGrid | None = None):
        self.module, self.loss, self.grid = module, loss, grid
        self.samples = self.passes = 0
        self.loss_before = float("nan")
        self._parameters = list(module.parameters())
        self._shapes = [p.shape for p in self._parameters]
        self._sizes = [p.numel() for p in self._parameters]
        self._share: Samples | None = None
        self._value: Tensor | None = None

    @property
    def size(self) -> int:
        """Length of the flat vector."""
        return sum(self._sizes)

    def use(self, inputs: Tensor, targets: Tensor) -> None:
        """Take these samples (B, ...) from now on, the same on all ranks."""
        self.samples = len(inputs)
        self._share = self.grid.shard((inputs, targets)) if self.grid else (inputs, targets)

    def load(self, x: Tensor) -> nn.Module:
        """The module with the weights x, without a copy: as long as x stays as it is, and until the next call."""
        if x.shape != (self.size,):
            raise ValueError(f"x has the shape {tuple(x.shape)}, must be flat and of this module; use ({self.size},)")
        for parameter, part, shape in zip(self._parameters, x.split(self._sizes), self._shapes, strict=True):
            parameter.data = part.view(shape)
        return self.module

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        """The mean loss at x; the accuracy is not defined."""
        inputs, targets = self._share
        with torch.enable_grad():
            self._value = self.loss(self.load(x)(inputs), targets)
        value = float(self._value.detach())
        if self.grid:
            weighted = torch.tensor([[value * len(inputs), len(inputs)]], dtype=torch.float64)
            summed, count = self.grid.data.ordered_sum(weighted, [1] * self.grid.replicas).tolist()
            value = summed / count
        self.loss_before = value
        return Evaluation(value, value, float("nan"), 0.0)

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        """The gradient of the mean loss at x, where `evaluate` has been called last."""
        found = torch.zeros_like(x)
        for parameter, part, shape in zip(self._parameters, found.split(self._sizes), self._shapes, strict=True):
            parameter.grad = part.view(shape)
        self._value.backward()
        self._value = None
        if self.grid:
            self.grid.average_gradients(self._parameters, samples=len(self._share[0]))
        for parameter in self._parameters:
            parameter.grad = None
        self.passes += self.samples
        return found

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        """Dot products; every rank has whole vectors."""
        return torch.stack([torch.stack([torch.dot(u, v) for v in b]) for u in a])
