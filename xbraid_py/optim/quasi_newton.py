"""Directions of descent from the pairs (s, y) of earlier updates: L-BFGS, BFGS, steepest descent."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor


class QuasiNewton:
    """The inverse Hessian as a product of rank-two updates, never as a matrix.

    L-BFGS keeps the last `memory` pairs and starts each product from H0 = s'y / y'y of the newest pair
    (Nocedal and Wright, Numerical Optimization, algorithm 7.4 and eq. 7.20). BFGS is the same product over
    all pairs with the H0 of the first one (their eq. 6.20): the matrix of the dense BFGS update, applied
    without storing it. Without pairs the direction is the gradient: steepest descent.

    Parameters
    ----------
    method : {"lbfgs", "bfgs", "steepest"}
    dot : callable
        Dot product of two vectors over all ranks.
    memory : int
        Pairs that L-BFGS keeps.
    curvature_check : bool
        Leave out pairs with s'y <= 1e-10 |s| |y|, which would make the product indefinite. Off, every pair is
        taken as it is, as some published codes do.

    Attributes
    ----------
    s, y : list of Tensor
        The pairs, oldest first.
    """

    def __init__(
        self,
        method: str,
        dot: Callable[[Tensor, Tensor], float],
        memory: int = 10,
        curvature_check: bool = True,
    ):
        self.method, self.dot, self.memory, self.curvature_check = method, dot, memory, curvature_check
        self.s: list[Tensor] = []
        self.y: list[Tensor] = []
        self._rho: list[float] = []
        self._h0: list[float] = []

    def clear(self) -> None:
        """Forget all pairs."""
        for pairs in (self.s, self.y, self._rho, self._h0):
            pairs.clear()

    def add(self, s: Tensor, y: Tensor) -> None:
        """Take in the change s of the weights and y of the gradient of an update."""
        if self.method == "steepest":
            return
        sy, yy = self.dot(s, y), self.dot(y, y)
        if self.curvature_check and not sy > 1e-10 * (self.dot(s, s) * yy) ** 0.5:
            return
        if sy == 0.0 or yy == 0.0:
            return
        if self.method == "lbfgs" and len(self.s) == self.memory:
            for pairs in (self.s, self.y, self._rho, self._h0):
                del pairs[0]
        self._append(s, y, sy, yy)

    def _append(self, s: Tensor, y: Tensor, sy: float, yy: float) -> None:
        self.s.append(s)
        self.y.append(y)
        self._rho.append(1.0 / sy)
        self._h0.append(sy / yy)

    def restore(self, s: list[Tensor], y: list[Tensor]) -> None:
        """Take over the pairs of an earlier run, oldest first."""
        self.clear()
        for pair in zip(s, y, strict=True):
            self._append(*pair, self.dot(*pair), self.dot(pair[1], pair[1]))

    def direction(self, gradient: Tensor) -> Tensor:
        """H g, the direction to go against."""
        q = gradient.clone()
        alphas = []
        for s, y, rho in zip(reversed(self.s), reversed(self.y), reversed(self._rho), strict=True):
            alphas.append(rho * self.dot(s, q))
            q.sub_(y, alpha=alphas[-1])
        if self._h0:
            q.mul_(self._h0[-1] if self.method == "lbfgs" else self._h0[0])
        for s, y, rho, alpha in zip(self.s, self.y, self._rho, reversed(alphas), strict=True):
            q.add_(s, alpha=alpha - rho * self.dot(y, q))
        return q
