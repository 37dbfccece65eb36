"""Small blocks of all kinds for tests of stacks, and the literal reference: a loop over modules, one for each layer.

Shape letters: `N` layers, `B` batch, `C` width or channels, `L` length of a sequence, `S` shape of a state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import reference as ref
import torch
from torch import Tensor, nn

import xbraid_py.nn
from xbraid_py import MGRIT, GradientControl, LayerParallel
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.transformer import DecoderBlock

C, L, B = 4, 3, 6
# Only what the solver itself finds: no exact gradient in its place, no tightening.
UNCHECKED = GradientControl(check=0, adapt=False)
# All exact for up to 6 intervals, without ever looking at a residual.
SOLVES = {
    "exact": MGRIT(max_levels=1),
    "lagged": MGRIT(cfactor=2, max_levels=2, max_iter=5, tol=0.0),
    "one-shot 3": MGRIT(cfactor=3, max_levels=2, min_coarse=1, max_iter=4, tol=0.0),
    "one-shot parts": MGRIT(cfactor=4, max_levels=2, min_coarse=1, max_iter=3, tol=0.0),
    "V": MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=3, tol=0.0),
    "V 3 levels": MGRIT(cycle="V", cfactor=2, max_levels=3, min_coarse=1, max_iter=10, tol=0.0, nrelax=0),
    "F": MGRIT(cycle="F", cfactor=2, max_levels=3, min_coarse=1, max_iter=5, tol=0.0, coarse_step="euler"),
}


class Mlp(nn.Module):
    """Two linear layers behind a LayerNorm; u (*, C)."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.LayerNorm(C), nn.Linear(C, 2 * C), nn.GELU(), nn.Linear(2 * C, C))

    def forward(self, u):
        return self.net(u)


class Convolution(nn.Module):
    """A convolution behind a GroupNorm; u (B, channels, H, W)."""

    def __init__(self, channels: int = C):
        super().__init__()
        self.norm, self.convolution = nn.GroupNorm(2, channels), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, u):
        return torch.tanh(self.convolution(self.norm(u)))


class Attention(nn.Module):
    """Two heads of causal attention behind a LayerNorm; u (B, L, C)."""

    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(C), nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C)

    def forward(self, u):
        heads = [part.unflatten(-1, (2, -1)).transpose(-2, -3) for part in self.qkv(self.norm(u)).chunk(3, -1)]
        mixed = nn.functional.scaled_dot_product_attention(*heads, is_causal=True)
        return self.out(mixed.transpose(-2, -3).flatten(-2))


class LibraryAttention(nn.Module):
    """The same by `nn.MultiheadAttention`."""

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(C), nn.MultiheadAttention(C, 2, dropout, batch_first=True)

    def forward(self, u):
        x = self.norm(u)
        return self.attention(x, x, x, need_weights=False)[0]


class Tied(nn.Module):
    """One matrix in two places, and a factor that is a single number; u (*, C)."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(C, C), nn.Linear(C, C)
        self.second.weight = self.first.weight
        self.factor = nn.Parameter(torch.rand(()) + 0.5)

    def forward(self, u):
        return self.factor * self.second(torch.tanh(self.first(u)))


class FrozenBatchNorm(nn.Module):
    """A linear layer behind a BatchNorm with frozen statistics, others in every layer; u (B, C)."""

    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(C), nn.Linear(C, C)
        nn.init.uniform_(self.norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(self.norm.running_var, 0.5, 2.0)
        self.eval()

    def forward(self, u):
        return torch.tanh(self.linear(self.norm(u)))


class Dropped(nn.Module):
    """Two linear layers with dropout that depends on the layer and the update alone; u (*, C)."""

    def __init__(self, p: float = 0.5, dropout: type = xbraid_py.nn.Dropout):
        super().__init__()
        self.first, self.second = nn.Linear(C, 2 * C), nn.Linear(2 * C, C)
        self.inside, self.outside = dropout(p), dropout(p)

    def forward(self, u):
        return self.outside(self.second(self.inside(torch.tanh(self.first(u)))))


@dataclass(frozen=True)
class Case:
    """A kind of block, and the shape (*S) of its states."""

    make: Callable[[], nn.Module]
    shape: tuple[int, ...]

    def block(self) -> nn.Module:
        """One, in double precision."""
        return self.make().double()

    def stack(self, comm=None, num_layers: int = 12, T: float = 2.0, solve: str = "V", **options) -> LayerParallel:
        """A stack of them."""
        defaults = {"mgrit": SOLVES[solve], "accuracy": UNCHECKED, "vmap": False}
        return LayerParallel(self.block, num_layers, T, comm, **{**defaults, **options})

    def input(self, seed: int = 1, batch: int = B) -> Tensor:
        """A state of `batch` samples, the same on every rank."""
        return ref.random(batch, *self.shape[1:], seed=seed)


CASES = {
    "dense": Case(lambda: xbraid_py.DenseBlock(C, "tanh", 2.0), (B, C)),
    "dense sequences": Case(lambda: xbraid_py.DenseBlock(C), (B, L, C)),
    "mlp": Case(Mlp, (B, C)),
    "convolution": Case(Convolution, (B, C, 5, 4)),
    "attention": Case(Attention, (B, L, C)),
    "library attention": Case(LibraryAttention, (B, L, C)),
    "tied": Case(Tied, (B, C)),
    "frozen": Case(FrozenBatchNorm, (B, C)),
    "dropout": Case(Dropped, (B, C)),
    "decoder": Case(lambda: DecoderBlock(C, 2), (B, L, C)),
}


def linear(inputs: int, outputs: int, seed: int) -> nn.Linear:
    """A linear layer in double precision, the same on every rank: threads share torch's random numbers."""
    with own_random_numbers(seed):
        return nn.Linear(inputs, outputs).double()


def unstacked(state: dict[str, Tensor], case: Case, prefix: str = "layers.") -> nn.ModuleList:
    """One module for each layer, with the weights of a stack's state dict."""
    own = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    modules = nn.ModuleList()
    for n in range(len(next(iter(own.values())))):
        module = case.block()
        found = module.load_state_dict({key: value[n] for key, value in own.items()}, strict=False)
        assert not found.unexpected_keys
        modules.append(module)
    return modules


def loop(modules: nn.ModuleList, u: Tensor, T: float = 2.0) -> Tensor:
    """u_N of u_{n+1} = u_n + h F_n(u_n)."""
    h = T / len(modules)
    for module in modules:
        u = u + h * module(u)
    return u


def loss_of(output: Tensor, seed: int = 7) -> Tensor:
    """A scalar with a slope that depends on the output."""
    return (torch.sin(output) * ref.random(*output.shape, seed=seed).to(output.dtype)).sum()


def gradients(stack: LayerParallel) -> dict[str, Tensor]:
    """Gradients of all layers (N, *shape) on every rank, of a stack in any number of windows."""
    parts = [{name: w.layers.gathered(p.grad) for name, p in w.layers.named_parameters()} for w in stack.windows]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def loop_gradients(modules: nn.ModuleList) -> dict[str, Tensor]:
    """The same of the reference."""
    names = [name for name, _ in modules[0].named_parameters()]
    every = [dict(module.named_parameters()) for module in modules]
    return {name: torch.stack([parameters[name].grad for parameters in every]) for name in names}


def distance(found, wanted) -> float:
    """Greatest difference of tensors, or dicts of them, relative to the greatest entry of the second of each."""
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        return max(distance(found[name], wanted[name]) for name in wanted)
    assert found.shape == wanted.shape
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def reduced(comm, call: Callable[[], object]) -> str | None:
    """The message of the error of `call`, with its type; over MPI an error that leaves a body ends the job."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def copied(state) -> dict:
    return {name: value.clone() for name, value in state.items()}


def run_updates(model, case: Case, updates: int = 2) -> list:
    """Outputs, gradients and states of some updates."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    record = []
    for update in range(updates):
        optimizer.zero_grad()
        u = case.input(update).requires_grad_()
        output = model(u)
        loss_of(output).backward()
        found = {"output": output.detach(), "input": u.grad, "weights": gradients(model)}
        optimizer.step()
        record.append(found | {"state": copied(model.state_dict())})
    return record


def two_calls(stack: LayerParallel, case: Case) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """Output and gradients of two updates with the same input, as masks and statistics make them differ."""
    found = []
    for _ in range(2):
        stack.zero_grad()
        output = stack(case.input())
        loss_of(output).backward()
        found.append((output.detach(), gradients(stack)))
    return found


def are_the_same(found: list[dict], wanted: list[dict], bound: float = 1e-10) -> None:
    """Assert that updates are those of another stack, as `run_updates` has them."""
    for mine, other in zip(found, wanted, strict=True):
        assert all(distance(mine[key], other[key]) < bound for key in ("output", "input", "weights"))
        assert list(mine["state"]) == list(other["state"])
        assert all(distance(mine["state"][n].double(), v.double()) < bound for n, v in other["state"].items())
