"""Literal, slow references: one layer, one interval, one rank after the other, with torch autograd for every slope.

Shape letters: `N` layers, `C` width, `B` batch, `F` features, `p` parameters of a layer, `c` coarsening factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

ETA = 0.1


def smooth_relu(x: Tensor) -> Tensor:
    """The smoothed ReLU as section 4.1 of the design writes it, branch by branch."""
    corner = x**2 / (4 * ETA) + x / 2 + ETA / 4
    return torch.where(x.abs() < ETA, corner, torch.where(x >= ETA, x, torch.zeros_like(x)))


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "smooth_relu": smooth_relu,
    "relu": lambda x: torch.where(x > 0, x, torch.zeros_like(x)),
    "tanh": lambda x: (x.exp() - (-x).exp()) / (x.exp() + (-x).exp()),
    "identity": lambda x: x + 0.0,
}


def random(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    """Normally distributed numbers, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def smooth_weights(num_layers: int, size: int, scale: float, seed: int, rough: float = 0.0) -> Tensor:
    """Rows (N, p) that change smoothly with depth, plus independent noise of size `rough`."""
    t = (torch.arange(num_layers, dtype=torch.float64)[:, None] + 0.5) / num_layers
    a, b = random(2, size, seed=seed)
    noise = random(num_layers, size, seed=seed + 1)
    return scale * (a * torch.cos(3.0 * t) + b * torch.sin(2.0 * t) + rough * noise)


def dense(row: Tensor, u: Tensor, outputs: int, activation: str) -> Tensor:
    """sigma(W u + b) of one layer: row (p,), u (I, B) to (outputs, B); the bias may be one number."""
    inputs = u.shape[0]
    weight = row[: outputs * inputs].reshape(outputs, inputs)
    return ACTIVATIONS[activation](weight @ u + row[outputs * inputs :][:, None])


def step(row: Tensor, u: Tensor, h: float, activation: str, scheme: str = "euler") -> Tensor:
    """One layer: forward Euler, or the explicit midpoint rule."""
    if scheme == "midpoint":
        return u + h * dense(row, u + h / 2 * dense(row, u, len(u), activation), len(u), activation)
    return u + h * dense(row, u, len(u), activation)


@dataclass(frozen=True, eq=False)
class Chain:
    """Weights of N residual layers, a first state (C, B) and a last adjoint (C, B)."""

    theta: Tensor
    h: float
    activation: str
    u0: Tensor
    vN: Tensor
    scheme: str = "euler"

    @cached_property
    def solved(self) -> tuple[Tensor, Tensor, Tensor]:
        """States (N + 1, C, B), adjoints (N + 1, C, B) and gradient (N, p), all by autograd."""
        theta = self.theta.clone().requires_grad_()
        states = [self.u0.clone().requires_grad_()]
        for row in theta:
            states.append(step(row, states[-1], self.h, self.activation, self.scheme))
        gradient, *adjoints = torch.autograd.grad((states[-1] * self.vN).sum(), [theta, *states])
        return torch.stack(states).detach(), torch.stack(adjoints), gradient

    def coarsen(self, cfactor: int, weights: str, scheme: str) -> Chain:
        """One long layer for each interval of `cfactor` layers."""
        rows = []
        for k in range(0, len(self.theta), cfactor):
            interval = list(self.theta[k : k + cfactor])
            rows.append(interval[0] if weights == "inject" else sum(interval) / cfactor)
        return Chain(torch.stack(rows), self.h * cfactor, self.activation, self.u0, self.vN, scheme)

    def forward_steps(self) -> list[Callable[[Tensor], Tensor]]:
        """The step of every layer, from the first to the last."""
        return [lambda u, row=row: step(row, u, self.h, self.activation, self.scheme) for row in self.theta]

    def adjoint_steps(self, states: Sequence[Tensor]) -> list[Callable[[Tensor], Tensor]]:
        """The transposed Jacobian of every layer, from the last to the first, at given inputs of the layers."""

        def transposed(v, row, u):
            u = u.clone().requires_grad_()
            return torch.autograd.grad(step(row, u, self.h, self.activation, self.scheme), u, v)[0]

        pairs = list(zip(self.theta, states, strict=True))[::-1]
        return [lambda v, row=row, u=u: transposed(v, row, u) for row, u in pairs]


def mgrit(
    steps: Sequence[Sequence[Callable[[Tensor], Tensor]]],
    cfactors: Sequence[int],
    relaxations: Sequence[int],
    cycle: str,
    start: Tensor,
    iterations: int,
    *,
    weight: float = 1.0,
    full: bool = False,
    norm: int | str = 2,
    transfers: Sequence[tuple[Callable, Callable] | None] = (),
) -> tuple[list[Tensor], list[float], Tensor]:
    """Textbook FAS-MGRIT with full arrays of points: A(u)_i = u_i - Phi(u_{i-1}) = g_i on every level.

    Parameters
    ----------
    steps : for each level a list of functions, one a step
    cfactors, relaxations : one for each level but the coarsest
    weight : of C-relaxation
    full : make a V-cycle on each coarse level on the way to the first guess
    norm : of the residuals
    transfers : for each level but the coarsest the restriction of its states and its opposite, if they are coarsened

    Returns
    -------
    points : list of (K, C, B) tensors, the first K of the K + 1 C-points before the first and after each iteration
    residuals : list of float, norm of the residual at these points over that of their states
    end : the last step applied to what is left of it
    """

    def same(x):
        return x

    def transfer(level):
        return (transfers[level] if transfers else None) or (same, same)

    def residual(level, u, g, i):
        return g[i] - (u[i] - steps[level][i - 1](u[i - 1]))

    def f_relax(level, u, g):
        for i in range(1, len(u)):
            if i % cfactors[level]:
                u[i] = steps[level][i - 1](u[i - 1]) + g[i]

    def c_relax(level, u, g):
        for i in range(cfactors[level], len(u), cfactors[level]):
            u[i] = (1 - weight) * u[i] + weight * (steps[level][i - 1](u[i - 1]) + g[i])

    def solve(level, u, g):
        for i in range(1, len(u)):
            u[i] = steps[level][i - 1](u[i - 1]) + g[i]

    def one_cycle(level, u, g, kind):
        if level == len(cfactors):
            solve(level, u, g)
            return
        c = cfactors[level]
        f_relax(level, u, g)
        for _ in range(relaxations[level]):
            c_relax(level, u, g)
            f_relax(level, u, g)
        restrict, interpolate = transfer(level)
        restricted = [restrict(each) for each in u[::c]]
        zero = [torch.zeros_like(restricted[0])] * len(restricted)
        coarse_g = [zero[0]]
        for k in range(1, len(restricted)):
            # A_H(R u) + R(g - A(u))
            coarse_g.append(restrict(residual(level, u, g, k * c)) - residual(level + 1, restricted, zero, k))
        v = list(restricted)
        if kind == "F":
            one_cycle(level + 1, v, coarse_g, "F")
        if kind == "V" or level + 1 < len(cfactors):
            one_cycle(level + 1, v, coarse_g, "V")
        for k in range(1, len(v)):
            u[k * c] = u[k * c] + interpolate(v[k] - restricted[k])
        f_relax(level, u, g)

    # The first guess: solve the coarsest level alone, and relax the others from there.
    starts = [start]
    for level in range(len(cfactors)):
        starts.append(transfer(level)[0](starts[-1]))
    grids = [[torch.zeros_like(first)] * (len(level) + 1) for first, level in zip(starts, steps, strict=True)]
    for level in reversed(range(len(steps))):
        none = [torch.zeros_like(starts[level])] * len(grids[level])
        if level == len(cfactors):
            grids[level][0] = starts[level]
            solve(level, grids[level], none)
            continue
        grids[level][:: cfactors[level]] = [transfer(level)[1](each) for each in grids[level + 1]]
        grids[level][0] = starts[level]
        f_relax(level, grids[level], none)
        if full and level > 0:
            one_cycle(level, grids[level], none, "V")
    u, g = grids[0], [torch.zeros_like(start)] * len(grids[0])
    points, residuals = [], []
    for iteration in range(iterations + 1):
        if iteration:
            one_cycle(0, u, g, cycle)
        inner = range(0, len(u) - 1, cfactors[0])
        points.append(torch.stack([u[i] for i in inner]))
        defects = torch.stack([residual(0, u, g, i) for i in inner[1:]]) if len(inner) > 1 else torch.zeros(1)
        order = float("inf") if norm == "max" else norm
        residuals.append(float(defects.flatten().norm(order) / points[-1].flatten().norm(order)))
    return points, residuals, steps[0][-1](u[-2])


def objective(named: dict[str, Tensor], features: Tensor, labels: Tensor, h: float, activation: str, gammas: dict):
    """Value, loss, accuracy, classes, states (N, C, B) and all gradients by autograd.

    `named` holds the parameters of the whole network, as `Layout.named` names them; `gammas` the fields of a
    `Regularization`.
    """
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in named.items()}
    u = ACTIVATIONS[activation](leaves["opening.weight"][0] @ features + leaves["opening.bias"][0][:, None])
    states = []
    for weight, bias in zip(leaves["layers.weight"], leaves["layers.bias"], strict=True):
        states.append(u.detach())
        u = u + h * ACTIVATIONS[activation](weight @ u + bias[:, None])
    logits = leaves["classification.weight"][0] @ u + leaves["classification.bias"][0][:, None]
    chosen = torch.stack([logits[label, sample] for sample, label in enumerate(labels.tolist())])
    loss = (logits.exp().sum(0).log() - chosen).mean()
    factor = h if gammas["measure"] == "integral" else 1.0
    value = loss
    for name, tensor in leaves.items():
        stack = name.split(".")[0]
        gamma = gammas["classification"] if stack == "classification" else gammas["tikhonov"]
        for n, row in enumerate(tensor):
            value = value + (factor if stack == "layers" else 1.0) * gamma / 2 * (row**2).sum()
            if stack == "layers" and n:
                value = value + factor * gammas["ddt"] / 2 * (((row - tensor[n - 1]) / h) ** 2).sum()
    gradients = dict(zip(leaves, torch.autograd.grad(value, list(leaves.values())), strict=True))
    classes = logits.argmax(0)
    accuracy = sum(int(a == b) for a, b in zip(classes, labels, strict=True)) / len(labels)
    return value.item(), loss.item(), accuracy, classes, torch.stack(states), gradients
