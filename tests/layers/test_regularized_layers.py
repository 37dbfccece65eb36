"""Dropout, GroupNorm, LayerNorm and moving statistics in one block, against a literal loop that draws its own masks.

Shape letters: `N` layers, `B` samples, `C` channels.
"""

from __future__ import annotations

import pytest
import torch
from blocks import SOLVES, B, C, Case, distance, gradients, loss_of
from torch import Tensor, nn

import xbraid_py.nn
from xbraid_py import MGRIT, GradientControl

N, T, P, SEED = 9, 2.0, 0.4, 5
SHAPE = (B, C, 4, 3)
KEPT = {"first": 0, "second": 1}  # numbers of the dropouts


class Regularized(nn.Module):
    """Two convolutions; a norm of each kind, two places of dropout."""

    def __init__(self, moving: bool = False):
        super().__init__()
        self.group, self.layer = nn.GroupNorm(2, C), nn.LayerNorm(SHAPE[1:])
        self.batch = xbraid_py.nn.MovingBatchNorm2d(C) if moving else nn.Identity()
        self.one, self.two = (nn.Conv2d(C, C, 3, padding=1) for _ in range(2))
        self.first, self.second = xbraid_py.nn.Dropout(P), xbraid_py.nn.Dropout(P)
        for norm in (self.group, self.layer):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.uniform_(norm.bias, -0.5, 0.5)

    def forward(self, u):
        return self.second(self.two(self.batch(self.layer(self.first(torch.tanh(self.one(self.group(u))))))))


CASES = {moving: Case(lambda moving=moving: Regularized(moving), SHAPE) for moving in (False, True)}


def mask(draw: int, layer: int, number: int) -> Tensor:
    """Of one place of one layer in one update: a generator for each."""
    generator = torch.Generator().manual_seed(hash((SEED, draw, layer, number)) & (2**63 - 1))
    return (torch.rand(SHAPE, generator=generator, dtype=torch.float32) >= P).double() / (1.0 - P)


def literal(weights: dict[str, Tensor], u: Tensor, draw: int) -> Tensor:
    """u_N of the block without statistics, by formulas."""
    for n in range(N):
        row = {name.removeprefix("layers."): value[n] for name, value in weights.items()}
        x = _standard(u.unflatten(1, (2, -1)), (2, 3, 4)).flatten(1, 2)
        x = x * row["group.weight"].view(1, C, 1, 1) + row["group.bias"].view(1, C, 1, 1)
        x = torch.tanh(nn.functional.conv2d(x, row["one.weight"], row["one.bias"], padding=1))
        x = _standard(x * mask(draw, n, KEPT["first"]), (1, 2, 3)) * row["layer.weight"] + row["layer.bias"]
        x = nn.functional.conv2d(x, row["two.weight"], row["two.bias"], padding=1)
        u = u + T / N * x * mask(draw, n, KEPT["second"])
    return u


def _standard(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    return (x - x.mean(axes, keepdim=True)) / (x.var(axes, correction=0, keepdim=True) + 1e-5).sqrt()


def updates(stack, case: Case, count: int = 3) -> list[dict]:
    """Outputs and gradients; the weights stay."""
    record = []
    for update in range(count):
        stack.zero_grad()
        u = case.input(update).requires_grad_()
        output = stack(u)
        loss_of(output).backward()
        found = {f"layers.{name}": value for name, value in gradients(stack).items()}
        record.append({"output": output.detach(), "input": u.grad, "weights": found})
    return record


@pytest.mark.parametrize(
    ("solve", "recompute", "vmap"),
    [
        ("exact", False, False),
        ("V", False, False),
        ("V", True, True),
        ("one-shot 3", "states", False),
        ("F 3 levels", False, False),
    ],
)
def test_masks_are_those_of_layer_and_update_alone(spmd, solve, recompute, vmap):
    """Three updates, each with masks of its own; asked to be vmap, a random block goes one layer after the other."""
    case = CASES[False]
    mgrit = {"F 3 levels": MGRIT(cycle="F", cfactor=3, max_levels=3, min_coarse=1, max_iter=3, tol=0.0)} | SOLVES

    def body(comm):
        stack = case.stack(comm, N, T, mgrit=mgrit[solve], recompute=recompute, vmap=vmap, seed=SEED)
        state = {name: value.clone() for name, value in stack.state_dict().items()}
        return state, updates(stack, case)

    results = spmd(body)
    weights = {name: value.clone().requires_grad_() for name, value in results[0][0].items()}
    exact = []
    for update in range(3):
        u = case.input(update).requires_grad_()
        output = literal(weights, u, update + 1)
        loss_of(output).backward()
        slopes = {name: value.grad.clone() for name, value in weights.items()}
        exact.append({"output": output.detach(), "input": u.grad, "weights": slopes})
        for value in weights.values():
            value.grad = None
    for _, found in results:
        for mine, wanted in zip(found, exact, strict=True):
            assert all(distance(mine[key], wanted[key]) < 1e-10 for key in wanted)


@pytest.mark.ranks(2, 3, 5)
@pytest.mark.parametrize("vmap", [False, True])
def test_one_seed_is_one_network_on_any_number_of_ranks(spmd, vmap):
    """All regularizations at once, far from converged, with exact gradients beside: bitwise."""
    case = CASES[True]
    rough = MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=1)

    def body(comm):
        options = {"mgrit": rough, "accuracy": GradientControl(check=2, adapt=False), "vmap": vmap, "seed": SEED}
        stack = case.stack(comm, N, T, **options)
        return updates(stack, case), stack.state_dict()

    serial, weights = body(None)
    for found, state in spmd(body):
        for mine, wanted in zip(found, serial, strict=True):
            assert mine["output"].equal(wanted["output"]) and mine["input"].equal(wanted["input"])
            assert all(mine["weights"][name].equal(value) for name, value in wanted["weights"].items())
        assert all(state[name].equal(value) for name, value in weights.items())


@pytest.mark.ranks(1, 3)
def test_masks_of_layers_updates_and_seeds_differ(spmd):
    """Seen from outside: equal weights in all layers, and outputs that differ with the seed and the update."""
    case = CASES[False]

    def body(comm):
        found = []
        for seed in (SEED, SEED + 1):
            stack = case.stack(comm, N, T, "V", seed=seed)
            stack.load_state_dict(case.stack(comm, N, T, "V", seed=SEED).state_dict())
            with torch.no_grad():
                found += [stack(case.input()) for _ in range(2)]
                found.append(stack.eval()(case.input()))
        return found

    for a, b, plain, c, d, other in spmd(body):
        assert plain.equal(other), "none in evaluation mode"
        outputs = [a, b, c, d, plain]
        assert all(distance(x, y) > 1e-3 for i, x in enumerate(outputs) for y in outputs[i + 1 :])
