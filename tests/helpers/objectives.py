"""Small objectives with known minima for the tests of optimizers, and dense matrices of quasi-Newton updates."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xbraid_py.comm import Communicator, SerialCommunicator
from xbraid_py.comm.partition import Partition
from xbraid_py.optim.objective import Evaluation


def numbers(*shape: int, seed: int) -> Tensor:
    """Normally distributed numbers, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def evaluation(value: float) -> Evaluation:
    """An evaluation of which only the value matters."""
    return Evaluation(value, value, 0.0, 0.0)


def plain_dots(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.stack([left @ right for right in b]) for left in a])


def dense_inverse(pairs: Sequence[tuple[Tensor, Tensor]], h0: float) -> Tensor:
    """Inverse Hessian of the BFGS update, as a matrix, from `h0` times the identity (Nocedal and Wright, eq. 6.17)."""
    identity = torch.eye(len(pairs[0][0]), dtype=pairs[0][0].dtype)
    H = h0 * identity
    for s, y in pairs:
        rho = 1.0 / (s @ y)
        H = (identity - rho * torch.outer(s, y)) @ H @ (identity - rho * torch.outer(y, s)) + rho * torch.outer(s, s)
    return H


class Valleys:
    """Sum over rows (a, b) of (1 - a)^2 + steepness (b - a^2)^2: one Rosenbrock valley a row, minimum at (1, 1).

    Rows are dealt out to ranks, and all sums are over rows in their order.
    `calls` says what was asked for, at which point, and with how many iterations.
    """

    shift = None

    def __init__(self, rows: int, comm: Communicator | None = None):
        self.rows, self.comm = rows, comm or SerialCommunicator()
        partition = Partition.balanced(rows, self.comm.size)
        self.counts = partition.counts
        first = partition.first(self.comm.rank)
        self._own = slice(first, first + partition.count(self.comm.rank))
        self.calls: list[tuple[str, Tensor, int | None]] = []

    @property
    def start(self) -> Tensor:
        """A point on the far side of every valley, the rows owned here."""
        rows = torch.tensor([[-1.2, 1.0]], dtype=torch.float64) + 0.1 * numbers(self.rows, 2, seed=5)
        return rows[self._own].flatten()

    @property
    def _steepness(self) -> Tensor:
        return torch.linspace(10, 40, self.rows, dtype=torch.float64)[self._own]

    def value_at(self, x: Tensor) -> float:
        a, b = x.view(-1, 2).unbind(1)
        return float(self.comm.ordered_sum((1 - a) ** 2 + self._steepness * (b - a**2) ** 2, self.counts))

    def gradient_at(self, x: Tensor) -> Tensor:
        a, b = x.view(-1, 2).unbind(1)
        k = self._steepness
        return torch.stack([-2 * (1 - a) - 4 * k * a * (b - a**2), 2 * k * (b - a**2)], 1).flatten()

    def evaluate(self, x: Tensor, max_iter: int | None = None, error: float | None = None) -> Evaluation:
        self.calls.append(("evaluate", x.clone(), max_iter))
        return evaluation(self.value_at(x))

    def gradient(self, x: Tensor, max_iter: int | None = None, exact: bool = False) -> Tensor:
        self.calls.append(("gradient", x.clone(), max_iter))
        return self.gradient_at(x)

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
        rows = [(left * right).view(-1, 2).sum(1) for left in a for right in b]
        return self.comm.ordered_sum(torch.stack(rows, 1), self.counts).view(len(a), len(b))
