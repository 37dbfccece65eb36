"""Blocks with a batch normalization that moves, and the literal reference: a loop over layers with autograd.

Shape letters: `N` layers, `B` samples, `C` channels.
"""

from __future__ import annotations

import torch
from blocks import B, C, Case, distance, gradients, loss_of
from torch import Tensor, nn
from torch.nn import functional

import xbraid_py.nn
from xbraid_py import LayerParallel

N, T, MOMENTUM, EPS = 9, 2.0, 0.3, 1e-3
MAPS = {1: functional.linear, 2: functional.conv2d, 3: functional.conv3d}
SHAPES = {1: (B, C), 2: (B, C, 4, 3), 3: (B, C, 2, 3, 2)}


class Normed(nn.Module):
    """A linear map or a convolution behind a batch normalization."""

    def __init__(self, dims: int = 1, momentum: float | None = MOMENTUM, norm: type | None = None, **options):
        super().__init__()
        norm = norm or getattr(xbraid_py.nn, f"MovingBatchNorm{dims}d")
        self.norm = norm(C, EPS, momentum, **options)
        convolution = {2: nn.Conv2d, 3: nn.Conv3d}.get(dims)
        self.map = convolution(C, C, 3, padding=1) if convolution else nn.Linear(C, C)
        if self.norm.affine:
            nn.init.uniform_(self.norm.weight, 0.5, 1.5)
            nn.init.uniform_(self.norm.bias, -0.5, 0.5)

    def forward(self, u):
        return torch.tanh(self.map(self.norm(u)))


def case_of(dims: int = 1, **options) -> Case:
    return Case(lambda: Normed(dims, **options), SHAPES[dims])


class Literal:
    """N layers as tensors: weights with gradients by autograd, statistics as the rule says."""

    def __init__(self, state: dict[str, Tensor], dims: int, momentum: float | None = MOMENTUM):
        self.dims, self.momentum = dims, momentum
        self.weights = {k: v.clone().requires_grad_() for k, v in state.items() if not _is_statistic(k)}
        self.mean, self.variance = (state[f"layers.norm.running_{what}"].clone() for what in ("mean", "var"))
        self.batches = int(state["layers.norm.num_batches_tracked"][0])

    def propagate(self, u: Tensor, moves: bool = True) -> Tensor:
        """u_N; in an update the statistics are moved behind it."""
        axes = [axis for axis in range(u.dim()) if axis != 1]
        count = u.numel() // C
        means, variances = [], []
        shape = (1, C, *(1,) * (u.dim() - 2))
        for n in range(N):
            x = u.detach()
            means.append(x.sum(axes) / count)
            variances.append(((x - means[n].view(shape)) ** 2).sum(axes) / (count - 1))
            if moves and self.batches == 0:
                self.mean[n], self.variance[n] = means[n], variances[n]
            u = u + T / N * self.field(n, u, shape)
        if moves:
            self.batches += 1
            share = self.momentum or 1.0 / self.batches
            self.mean = (1.0 - share) * self.mean + share * torch.stack(means)
            self.variance = (1.0 - share) * self.variance + share * torch.stack(variances)
        return u

    def field(self, n: int, u: Tensor, shape: tuple[int, ...]) -> Tensor:
        row = {key.removeprefix("layers."): value[n] for key, value in self.weights.items()}
        x = (u - self.mean[n].view(shape)) / (self.variance[n].view(shape) + EPS).sqrt()
        if "norm.weight" in row:
            x = x * row["norm.weight"].view(shape) + row["norm.bias"].view(shape)
        options = {} if self.dims == 1 else {"padding": 1}
        return torch.tanh(MAPS[self.dims](x, row["map.weight"], row["map.bias"], **options))

    def state(self) -> dict[str, Tensor]:
        statistics = {"running_mean": self.mean, "running_var": self.variance}
        found = {k: v.detach().clone() for k, v in self.weights.items()}
        return found | {f"layers.norm.{key}": value.clone() for key, value in statistics.items()}


def _is_statistic(name: str) -> bool:
    return name.endswith(("running_mean", "running_var", "num_batches_tracked"))


def batch(case: Case, update: int) -> Tensor:
    """Inputs whose mean and scale change from update to update."""
    return (1.0 + update) * case.input(update) + 0.5 * update


def train(model, call, case: Case, updates: int = 3, parameters=None) -> list[dict]:
    """Output, gradients and state of each update of SGD with momentum."""
    parameters = list(model.parameters()) if parameters is None else parameters
    optimizer = torch.optim.SGD(parameters, 0.2, momentum=0.9)
    record = []
    for update in range(updates):
        optimizer.zero_grad()
        u = batch(case, update).requires_grad_()
        output = call(u)
        loss_of(output).backward()
        found = {"output": output.detach(), "input": u.grad}
        if isinstance(model, LayerParallel):
            found["weights"] = {f"layers.{name}": value for name, value in gradients(model).items()}
        else:
            found["weights"] = {name: p.grad.clone() for name, p in model.weights.items()}
        optimizer.step()
        state = model.state() if not isinstance(model, LayerParallel) else model.state_dict()
        found["state"] = {name: value.clone() for name, value in state.items()}
        record.append(found)
    return record


def trained(stack: LayerParallel, case: Case, updates: int = 3) -> tuple[dict, list[dict]]:
    start = {name: value.clone() for name, value in stack.state_dict().items()}
    return start, train(stack, stack, case, updates)


def reference(start: dict, case: Case, dims: int, momentum: float | None = MOMENTUM, updates: int = 3) -> list[dict]:
    literal = Literal(start, dims, momentum)
    return train(literal, literal.propagate, case, updates, list(literal.weights.values()))


def equal(found: list[dict], exact: list[dict], bound: float = 1e-10) -> None:
    for update, (mine, wanted) in enumerate(zip(found, exact, strict=True)):
        for key in ("output", "input", "weights"):
            assert distance(mine[key], wanted[key]) < bound, (update, key)
        counts = mine["state"]["layers.norm.num_batches_tracked"]
        assert counts.tolist() == [update + 1] * N
        for name, value in wanted["state"].items():
            assert distance(mine["state"][name], value) < bound, (update, name)
