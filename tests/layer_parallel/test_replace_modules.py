"""Torch's dropout, stochastic depth and batch normalization, and what takes their places.

Shape letters: `N` layers, `B` batch, `L` length, `C` width.
"""

from __future__ import annotations

import pytest
import torch
from blocks import B, C, Case, L, distance, gradients, loop, loop_gradients, loss_of, two_calls, unstacked
from torch import nn

import xbraid_py.nn as xnn
from xbraid_py import LayerParallel, parallelize, replace_modules
from xbraid_py.layers.module_block import own_random_numbers

N, T, SEED = 9, 2.0, 3


class StochasticDepth(nn.Module):
    """As libraries have it, with what they call it."""

    def __init__(self, p, mode="row"):
        super().__init__()
        self.p, self.mode = p, mode

    def forward(self, u):
        return u


class Block(nn.Module):
    """All that is replaced; u (B, L, C)."""

    def __init__(self, rate=0.25):
        super().__init__()
        self.norm = nn.BatchNorm1d(L)
        self.attention = nn.MultiheadAttention(C, 2, dropout=0.3, batch_first=True)
        self.drop, self.path = nn.Dropout(0.2), StochasticDepth(rate) if rate else nn.Identity()

    def forward(self, u):
        x = self.norm(u)
        return self.path(self.drop(self.attention(x, x, x, need_weights=False)[0]))


def test_names_weights_statistics_and_modes_stay():
    with own_random_numbers(0):
        block = Block()
    block.norm.running_mean.fill_(0.5)
    block.norm.weight.requires_grad_(False)
    block.drop.eval()
    tensors = {name: id(tensor) for name, tensor in [*block.named_parameters(), *block.named_buffers()]}
    state = {name: value.clone() for name, value in block.state_dict().items()}
    assert replace_modules(block) is block
    kinds = [type(part) for part in (block.norm, block.attention, block.drop, block.path)]
    assert kinds == [xnn.MovingBatchNorm1d, xnn.MultiheadAttention, xnn.Dropout, xnn.DropPath]
    assert (block.attention.p, block.drop.p, block.path.p) == (0.3, 0.2, 0.25)
    assert not block.drop.training and block.path.training
    assert {name: id(tensor) for name, tensor in [*block.named_parameters(), *block.named_buffers()]} == tensors
    assert all(torch.equal(block.state_dict()[name], value) for name, value in state.items())
    assert not block.norm.weight.requires_grad


def test_a_module_that_is_replaced_itself():
    assert type(replace_modules(nn.Dropout(0.5))) is xnn.Dropout
    assert type(replace_modules(nn.BatchNorm2d(3))) is xnn.MovingBatchNorm2d


@pytest.mark.parametrize(
    "part", [nn.BatchNorm1d(3, track_running_stats=False), StochasticDepth(0.2, "batch"), nn.Dropout2d(0.1)]
)
def test_what_has_nothing_of_the_kind_stays(part):
    assert replace_modules(nn.Sequential(part))[0] is part


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("solve", ["exact", "V"])
def test_a_block_that_was_refused_is_a_layer(spmd, solve):
    case = Case(lambda: replace_modules(Block()), (B, L, C))

    def body(comm):
        stack = case.stack(comm, N, T, solve, seed=SEED)
        found = two_calls(stack, case)
        with torch.no_grad():
            return found, stack.state_dict(), stack.eval()(case.input())

    exact = body(None)[0]
    for found, state, evaluated in spmd(body):
        for mine, wanted in zip(found, exact, strict=True):
            assert distance(mine[0], wanted[0]) < 1e-9 and distance(mine[1], wanted[1]) < 1e-9
        assert distance(found[0][0], found[1][0]) > 1e-3, "another update has other masks"
        modules = unstacked(state, case).eval()
        assert distance(evaluated, loop(modules, case.input(), T).detach()) < 1e-10


@pytest.mark.ranks(1, 2)
def test_masks_of_attention_are_those_of_layer_and_update(spmd):
    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = replace_modules(nn.MultiheadAttention(C, 2, dropout=0.3, batch_first=True))

        def forward(self, u):
            return self.attention(u, u, u, need_weights=False)[0]

    case = Case(Attending, (B, L, C))

    def body(comm):
        stack = case.stack(comm, N, T, seed=SEED)
        output = stack(case.input())
        loss_of(output).backward()
        return output.detach(), gradients(stack), stack.state_dict()

    for output, slopes, state in spmd(body):
        modules = unstacked(state, case).train()
        u = case.input()
        for n, module in enumerate(modules):
            with own_random_numbers(hash((SEED, 1, n, 0)) & (2**63 - 1)):
                u = u + T / N * module(u)
        loss_of(u).backward()
        assert distance(output, u.detach()) < 1e-10
        assert distance(slopes, loop_gradients(modules)) < 1e-10


@pytest.mark.ranks(1, 2)
def test_a_model_whose_first_rate_is_none(spmd):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(0.1 * n) for n in range(6))

        def forward(self, u):
            for block in self.blocks:
                u = u + block(u)
            return u

    def body(comm):
        with own_random_numbers(1):
            model = replace_modules(Model())
        part = parallelize(model, comm, form="increment").blocks[0]
        rates = part.stack.windows[0].block.rates_of(part.stack.windows[0].block.module.path)
        return model(torch.ones(B, L, C)).shape, list(rates)

    for shape, rates in spmd(body):
        assert shape == (B, L, C) and rates == pytest.approx([0.1 * n for n in range(6)])


def test_dropout_of_attention_is_refused_without():
    stack = LayerParallel(lambda: nn.TransformerEncoderLayer(C, 2, 8, 0.2, batch_first=True), 4, form="map")
    with pytest.raises(ValueError, match="as xbraid_py.replace_modules"):
        stack(torch.ones(B, L, C))
    made = LayerParallel(
        lambda: replace_modules(nn.TransformerEncoderLayer(C, 2, 8, 0.2, batch_first=True)), 4, form="map"
    )
    loss_of(made(torch.ones(B, L, C))).backward()
