"""Blocks with parts and weights of any name, also of those that are a stack's own."""

from __future__ import annotations

import pytest
import reference as ref
import torch
from blocks import B, C, L, distance, gradients, loss_of
from torch import nn

import xbraid_py.nn
from xbraid_py import MGRIT, LayerParallel

RANKS = pytest.mark.ranks(1, 2, 3)


def input_of() -> torch.Tensor:
    return ref.random(B, L, C, seed=1)


class Names(nn.Module):
    """Parts and weights whose names are those of attributes of a stack's own."""

    def __init__(self, moving: bool = False):
        super().__init__()
        self.block = nn.Sequential(xbraid_py.nn.MovingBatchNorm1d(C) if moving else nn.Identity(), nn.Linear(C, C))
        self.partition, self.splines = nn.Linear(C, C), nn.Linear(C, C)
        for name in ("comm", "device", "dtype", "tensors", "divided", "gathered", "statistics", "layers", "windows"):
            self.register_parameter(name, nn.Parameter(torch.rand(C)))

    def forward(self, u):
        u = self.splines(torch.tanh(self.partition(torch.tanh(self.block(u)))))
        return u * self.comm * self.device * self.dtype + self.tensors * self.divided * self.gathered + self.statistics


@RANKS
@pytest.mark.parametrize("windows", [1, 2])
def test_parts_of_any_name(spmd, windows):
    def body(comm):
        stack = LayerParallel(
            lambda: Names().double(), 6, comm=comm, mgrit=MGRIT(max_levels=1), windows=windows, form="increment"
        )
        u = input_of().requires_grad_()
        output = stack(u)
        loss_of(output).backward()
        state = stack.state_dict()
        again = LayerParallel(lambda: Names().double(), 6, comm=comm, seed=1, mgrit=MGRIT(max_levels=1))
        again.load_state_dict(state)
        with torch.no_grad():
            return output.detach(), gradients(stack), state, again.eval()(input_of())

    results = spmd(body)
    state, modules, x = results[0][2], [], input_of()
    for n in range(6):
        modules.append(Names().double())
        modules[n].load_state_dict({key.removeprefix("layers."): value[n] for key, value in state.items()})
        x = x + 1.0 / 6 * modules[n](x)
    loss_of(x).backward()
    for output, weights, _, again in results:
        assert distance(output, x) < 1e-13 and distance(again, x) < 1e-13
        for name, p in modules[3].named_parameters():
            if p.grad is not None:
                assert distance(weights[name][3], p.grad) < 1e-12


@RANKS
def test_norms_below_a_part_of_such_a_name(spmd):
    def body(comm):
        stack = LayerParallel(lambda: Names(True).double(), 4, comm=comm, form="increment")
        stack(input_of().flatten(0, 1))
        return stack.state_dict()["layers.block.0.running_mean"]

    for means in spmd(body):
        assert means.any(1).all(), "they have moved"
