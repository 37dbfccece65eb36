"""Random numbers of torch's own within a layer, and rates of stochastic depth that differ by layer.

Shape letters: `N` layers, `B` batch, `L` length, `C` width.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from blocks import B, C, Case, L, distance, gradients, loop_gradients, loss_of, two_calls, unstacked
from blocks import reduced as message_of
from torch import nn

import xbraid_py.nn
from xbraid_py import MGRIT, LayerParallel, parallelize, to_sequential
from xbraid_py.layers.module_block import own_random_numbers

N, T, SEED = 9, 2.0, 5


class Functional(nn.Module):
    """Dropout by a function, of an input and of weights of attention; u (B, L, C)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u):
        x = nn.functional.dropout(self.linear(u), 0.4, self.training)
        return nn.functional.scaled_dot_product_attention(x, x, x, dropout_p=0.3 if self.training else 0.0)


class DropPath(nn.Module):
    """As libraries have it."""

    def __init__(self, drop_prob=0.3):
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, u):
        if not self.drop_prob or not self.training:
            return u
        kept = torch.empty(len(u), *(1,) * (u.dim() - 1), dtype=u.dtype).bernoulli_(1.0 - self.drop_prob)
        return u * kept / (1.0 - self.drop_prob)


class Branch(nn.Module):
    """A branch that some samples leave out; u (B, L, C)."""

    def __init__(self, drop):
        super().__init__()
        self.linear, self.drop = nn.Linear(C, C), drop

    def forward(self, u):
        return self.drop(torch.tanh(self.linear(u)))


RANDOM = {
    "functions": (Functional, "increment"),
    "attention": (lambda: nn.TransformerEncoderLayer(C, 2, 8, 0.2, batch_first=True), "map"),
    "modules": (lambda: nn.Sequential(nn.Linear(C, C), nn.Dropout(0.3), nn.Tanh()), "increment"),
    "stochastic depth": (lambda: Branch(DropPath()), "increment"),
}


def literal(modules, u, form: str, draw: int):
    """u_N layer after layer, torch's generator started anew for each."""
    for n, module in enumerate(modules):
        with own_random_numbers(hash((SEED, draw, n)) & (2**63 - 1)):
            end = module(u)
        u = end if form == "map" else u + T / N * end
    return u


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("which", RANDOM)
@pytest.mark.parametrize(("solve", "recompute"), [("exact", False), ("V", True), ("one-shot 3", False)])
def test_all_evaluations_of_a_layer_draw_the_same(spmd, which, solve, recompute):
    make, form = RANDOM[which]
    case = Case(make, (B, L, C))

    def body(comm):
        stack = case.stack(comm, N, T, solve, seed=SEED, recompute=recompute, form=form, torch_random=True)
        found = two_calls(stack, case)
        with torch.no_grad():
            return found, stack.state_dict(), stack.eval()(case.input())

    for found, state, evaluated in spmd(body):
        modules = unstacked(state, case).train()
        for update, (output, slopes) in enumerate(found):
            modules.zero_grad()
            wanted = literal(modules, case.input(), form, update + 1)
            loss_of(wanted).backward()
            assert distance(output, wanted.detach()) < 1e-10
            assert distance(slopes, loop_gradients(modules)) < 1e-10
        assert distance(found[0][0], found[1][0]) > 1e-3, "another update draws other numbers"
        assert distance(evaluated, literal(modules.eval(), case.input(), form, 0).detach()) < 1e-10


@pytest.mark.ranks(1, 2)
def test_numbers_drawn_outside_go_on_as_if_nothing_had_happened(spmd):
    case = Case(Functional, (B, L, C))

    def body(comm):
        stack = case.stack(comm, N, T, seed=SEED, torch_random=True)
        loss_of(stack(case.input())).backward()

    before = torch.get_rng_state()
    spmd(body)
    assert torch.equal(before, torch.get_rng_state())


# ---- Rates by layer


def rated(own: bool, rates=tuple(0.5 * n / (N - 1) for n in range(N))) -> nn.ModuleList:
    """Blocks whose rate grows with depth, the first one without."""
    kind = xbraid_py.nn.DropPath if own else DropPath
    drops = [kind(rate) if own or rate else nn.Identity() for rate in rates]
    with own_random_numbers(3):  # threads share torch's
        return nn.ModuleList(Branch(drop).double() for drop in drops)


class Model(nn.Module):
    """Blocks, and their sums."""

    def __init__(self, blocks):
        super().__init__()
        self.blocks = blocks

    def forward(self, u):
        for block in self.blocks:
            u = u + block(u)
        return u


def masked(blocks, u, draw: int, h: float):
    """u_N by formulas, the masks drawn here."""
    for n, block in enumerate(blocks):
        rate = getattr(block.drop, "p", getattr(block.drop, "drop_prob", 0.0))
        generator = torch.Generator().manual_seed(hash((SEED, draw, n, 0)) & (2**63 - 1))
        kept = torch.rand((len(u), 1, 1), generator=generator, dtype=torch.float32) >= rate
        u = u + h * torch.tanh(block.linear(u)) * kept / (1.0 - rate)
    return u


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("windows", [1, 3])
def test_each_layer_has_its_rate(spmd, windows):
    u = torch.linspace(-1, 1, B * L * C, dtype=torch.float64).view(B, L, C)

    def body(comm):
        stack = LayerParallel.from_blocks(
            rated(True),
            comm,
            form="increment",
            T=T,
            windows=windows,
            mgrit=MGRIT(cycle="V", cfactor=3, max_iter=4, tol=0.0),
            seed=SEED,
        )
        output = stack(u)
        loss_of(output).backward()
        back = to_sequential(stack)
        return output.detach(), gradients(stack), [step.block.drop.p for step in back]

    for output, slopes, rates in spmd(body):
        blocks = rated(True)
        wanted = masked(blocks, u, 1, T / N)
        loss_of(wanted).backward()
        assert distance(output, wanted.detach()) < 1e-10
        assert distance(slopes, loop_gradients(blocks)) < 1e-10
        assert rates == [block.drop.p for block in blocks]


@pytest.mark.ranks(1, 2)
def test_rates_of_another_library(spmd):
    u = torch.linspace(-1, 1, B * L * C, dtype=torch.float64).view(B, L, C)

    def body(comm):
        options = {"mgrit": MGRIT(cycle="V", cfactor=3, max_iter=4, tol=0.0), "seed": SEED}
        model = parallelize(Model(rated(False)), comm, form="increment", **options)
        output = model(u)
        loss_of(output).backward()
        kinds = [type(block.drop).__name__ for block in to_sequential(model).blocks]
        return output.detach(), kinds

    for output, kinds in spmd(body):
        assert distance(output, masked(rated(False), u, 1, 1.0).detach()) < 1e-10
        assert kinds == ["Identity", *["DropPath"] * (N - 1)]


# ---- What differs by layer, and is made by a function


class Scaled(nn.Module):
    """A number and a table beside the weights; u (B, L, C)."""

    def __init__(self, scale=1.0, row=0.0):
        super().__init__()
        self.linear, self.scale = nn.Linear(C, C), scale
        self.register_buffer("table", torch.full((C,), row))

    def forward(self, u):
        return self.scale * self.linear(u) + self.table


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (lambda numbers: Scaled(scale=next(numbers)), "scale is "),
        (lambda numbers: Scaled(row=float(next(numbers))), "the buffer table is "),
        (lambda numbers: Branch(xbraid_py.nn.Dropout(0.1 * (next(numbers) % 5))), "drop.p is "),
    ],
)
def test_functions_whose_blocks_differ_beside_their_weights_are_refused(spmd, make, what):
    def body(comm):
        numbers = itertools.count()
        return message_of(comm, lambda: LayerParallel(lambda: make(numbers), N, T, comm))

    for message in spmd(body):
        assert message.startswith("ValueError: block() made another block for layer") and what in message
        assert "use LayerParallel.from_blocks" in message
