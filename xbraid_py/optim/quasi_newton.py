"""Directions of descent from the pairs (s, y) of earlier updates: L-BFGS, BFGS, steepest descent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from xbraid_py import kernels

Dots = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]


class QuasiNewton:
    """The inverse Hessian as a product of rank-two updates, never as a matrix.

    L-BFGS keeps the last `memory` pairs and starts each product from H0 = s'y / y'y of the newest pair
    (Nocedal and Wright, Numerical Optimization, algorithm 7.4 and eq. 7.20). BFGS is the same product over
    all pairs with the H0 of the first one (their eq. 6.20): the matrix of the dense BFGS update, applied
    without storing it. Without pairs the direction is the gradient: steepest descent.

    A direction is a combination of the pairs and the gradient, and its coefficients need nothing but the dot
    products between these. So a new pair and a new gradient cost one message each, however many pairs there are.

    Parameters
    ----------
    method : {"lbfgs", "bfgs", "steepest"}
    dots : callable
        Dot products over all ranks of each of some vectors with each of others: a matrix, one message.
    memory : int
        Pairs that L-BFGS keeps.
    curvature_check : bool
        Leave out pairs with s'y <= 1e-10 |s| |y|, which would make the product indefinite. Off, every pair is
        taken as it is, as some published codes do.

    Attributes
    ----------
    s, y : list of Tensor
        The pairs, oldest first.
    scale : float
        Length of a direction without pairs, over that of the gradient.
    """

    def __init__(self, method: str, dots: Dots, memory: int = 10, curvature_check: bool = True):
        self.method, self.dots, self.memory, self.curvature_check = method, dots, memory, curvature_check
        self.clear()

    def restart(self) -> None:
        """Forget all pairs but the scale |s'y| / y'y of the newest one.

        Where the curvature is negative no product of pairs is a descent, but the next step along the gradient should
        still be as long as the change of the gradient in the last one allows.
        """
        scale = abs(float(self._sy[-1, -1] / self._yy[-1, -1])) if self.s else self.scale
        self.clear()
        self.scale = scale

    def clear(self) -> None:
        """Forget all pairs, and the scale."""
        self.scale = 1.0
        self.s: list[Tensor] = []
        self.y: list[Tensor] = []
        # Dot products of all s with all y, and of all y with all y.
        self._sy = self._yy = np.empty((0, 0))
        self._gradient: Tensor | None = None

    def add(self, s: Tensor, y: Tensor, gradient: Tensor | None = None) -> None:
        """Take in the change s of the weights and y of the gradient of an update.

        With the gradient that the next direction is for, its products come in the same message; see `observe`.
        """
        if self.method == "steepest":
            return
        count = len(self.s)
        own = [s, y] if gradient is None else [s, y, gradient]
        found = _array(self.dots(own, [*self.s, s, *self.y, *own[1:]]))
        products, of_gradient = found[:2, : 2 * count + 2], found[2:]
        ss, (sy, yy) = products[0, count], products[:, -1]
        is_good = not self.curvature_check or sy > 1e-10 * (ss * yy) ** 0.5
        is_taken = is_good and sy != 0.0 and yy != 0.0
        kept = slice(count + is_taken)
        self._gradient = None
        if gradient is not None:
            row = of_gradient[0]
            self._gradient, self._gg = gradient, float(row[-1])
            self._sg, self._yg = row[: count + 1][kept], row[count + 1 : 2 * count + 2][kept]
        if not is_taken:
            return
        self._append(s, y, products)
        if self.method == "lbfgs" and len(self.s) > self.memory:
            del self.s[0], self.y[0]
            self._sy, self._yy = self._sy[1:, 1:], self._yy[1:, 1:]
            if gradient is not None:
                self._sg, self._yg = self._sg[1:], self._yg[1:]

    def restore(self, s: list[Tensor], y: list[Tensor]) -> None:
        """Take over the pairs of an earlier run, oldest first."""
        self.clear()
        # Pair by pair, as they came: many products at once may differ from these in their last bit.
        for pair in zip(s, y, strict=True):
            self._append(*pair, _array(self.dots([*pair], [*self.s, pair[0], *self.y, pair[1]])))

    def _append(self, s: Tensor, y: Tensor, products: np.ndarray) -> None:
        """Keep a pair with its dot products (2, 2 k + 2) with all s, its own, all y, its own."""
        count = len(self.s)
        (sy, yy), with_y = products[:, -1], products[:, count + 1 : -1]
        self._sy = _bordered(self._sy, row=with_y[0], column=products[1, :count], corner=sy)
        self._yy = _bordered(self._yy, row=with_y[1], column=with_y[1], corner=yy)
        self.s.append(s)
        self.y.append(y)

    def observe(self, gradient: Tensor) -> float:
        """Take in the gradient that the next direction is for; its squared 2-norm."""
        if gradient is not self._gradient:
            found = _array(self.dots([gradient], [*self.s, *self.y, gradient]))[0]
            self._gradient = gradient
            self._sg, self._yg = found[: len(self.s)], found[len(self.s) : -1]
            self._gg = float(found[-1])
        return self._gg

    def direction(self, gradient: Tensor) -> tuple[Tensor, float]:
        """H g, the direction to go against, and its slope g'H g."""
        self.observe(gradient)
        count = len(self.s)
        of_s, of_y, of_g = np.zeros(count), np.zeros(count), 1.0 if count else self.scale
        alphas = np.zeros(count)
        rho = 1.0 / self._sy.diagonal()
        # The two loops of algorithm 7.4, on the coefficients of q and then r.
        for i in reversed(range(count)):
            alphas[i] = rho[i] * (of_g * self._sg[i] + self._sy[i] @ of_y)
            of_y[i] -= alphas[i]
        if count:
            first = -1 if self.method == "lbfgs" else 0
            h0 = self._sy[first, first] / self._yy[first, first]
            of_y, of_g = h0 * of_y, h0 * of_g
        for i in range(count):
            beta = rho[i] * (of_g * self._yg[i] + self._yy[i] @ of_y + of_s @ self._sy[:, i])
            of_s[i] += alphas[i] - beta
        found = kernels.combine([float(of_g), *of_s.tolist(), *of_y.tolist()], [gradient, *self.s, *self.y])
        return found, float(of_g * self._gg + self._sg @ of_s + self._yg @ of_y)


def _array(products: Tensor) -> np.ndarray:
    return products.to(torch.float64).numpy()


def _bordered(matrix: np.ndarray, row: np.ndarray, column: np.ndarray, corner: float) -> np.ndarray:
    """A matrix with one more row and column."""
    return np.block([[matrix, column[:, None]], [row[None], np.array([[corner]])]])
