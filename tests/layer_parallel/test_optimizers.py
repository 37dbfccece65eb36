"""Optimizers that look at whole parameters, or at all of them: layer by layer, or refused.

Shape letters: `N` layers, `C` width.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from blocks import CASES, UNCHECKED, C, distance, linear, loss_of
from blocks import reduced as message_of
from torch import nn

from xbraid_py import MGRIT, LayerParallel, Splines, clip_grad_norm_, layer_views, param_groups
from xbraid_py.layers.module_block import own_random_numbers

N, T = 6, 2.0
EXACT = {"mgrit": MGRIT(max_levels=1), "accuracy": UNCHECKED}


class Matrix(nn.Module):
    """One matrix, since some optimizers take nothing else; u (B, C)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C, bias=False)

    def forward(self, u):
        return torch.tanh(self.linear(u))


def plain_of(stack) -> nn.ModuleList:
    modules = nn.ModuleList(Matrix().double() for _ in range(N))
    rows = stack.state_dict()["layers.linear.weight"]
    with torch.no_grad():
        for module, row in zip(modules, rows, strict=True):
            module.linear.weight.copy_(row)
    return modules


def clip(modules: nn.ModuleList) -> None:
    """As `torch.nn.utils.clip_grad_norm_`, without what it adds to the norm."""
    gradients = [p.grad for p in modules.parameters()]
    norm = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    for gradient in gradients:
        gradient.mul_(min(1.0, 0.5 / norm))


def train(model, parameters, make, clip, updates: int = 4) -> None:
    optimizer = make(parameters)
    for update in range(updates):
        optimizer.zero_grad()
        for part in (0, 1):  # gradients of two batches add up
            loss_of(model(CASES["mlp"].input(2 * update + part))).backward()
        clip(model)
        optimizer.step()


OPTIMIZERS = {
    "Muon": lambda p: torch.optim.Muon(p, lr=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.05),
}


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("which", OPTIMIZERS)
@pytest.mark.parametrize("set_to_none", [True, False])
def test_views_are_trained_as_the_layers_of_a_plain_network(spmd, which, set_to_none):
    make = OPTIMIZERS[which]

    def without(p):
        optimizer = make(p)
        zero = optimizer.zero_grad
        optimizer.zero_grad = lambda: zero(set_to_none=set_to_none)
        return optimizer

    def body(comm):
        stack = LayerParallel(lambda: Matrix().double(), N, T, comm, **EXACT)
        plain = plain_of(stack)
        train(stack, layer_views(stack), without, lambda model: clip_grad_norm_(model, 0.5))
        return stack.state_dict()["layers.linear.weight"], plain

    for found, plain in spmd(body):

        def loop(u, plain=plain):
            for module in plain:
                u = u + T / N * module(u)
            return u

        train(loop, list(plain.parameters()), make, lambda _, p=plain: clip(p))
        assert distance(found, torch.stack([module.linear.weight.detach() for module in plain])) < 1e-10


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("which", ["Adafactor", "LAMB"])
def test_whole_parameters_of_stacks_are_refused(spmd, which):
    kinds = {"Adafactor": torch.optim.Adafactor, "LAMB": type("LAMB", (torch.optim.SGD,), {})}

    def body(comm):
        stack = CASES["mlp"].stack(comm, 9)
        optimizer = kinds[which](stack.parameters(), lr=0.1)
        loss_of(stack(CASES["mlp"].input())).backward()
        return message_of(comm, optimizer.step)

    for message in spmd(body):
        assert message.startswith(f"RuntimeError: optimizer={which} looks at whole parameters")
        assert f"use {which}(xbraid_py.layer_views(model))" in message


@pytest.mark.ranks(1, 2, 3)
def test_an_optimizer_of_dot_products_is_refused_on_several_ranks(spmd):
    def body(comm):
        stack = CASES["mlp"].stack(comm, 9, **EXACT)
        optimizer = torch.optim.LBFGS(stack.parameters())

        def closure():
            optimizer.zero_grad()
            loss = loss_of(stack(CASES["mlp"].input()))
            loss.backward()
            return loss

        return message_of(comm, lambda: optimizer.step(closure)), comm.size

    for message, size in spmd(body):
        assert message is None if size == 1 else "dot products of all weights" in message


def test_splines_have_no_views():
    with pytest.raises(ValueError, match="splines belong to no layer"):
        layer_views(CASES["mlp"].stack(None, 9, splines=Splines(4)))


def test_what_lies_around_a_stack_stays_as_it_is():
    with own_random_numbers(0):
        model = nn.Sequential(nn.Linear(C, C), CASES["mlp"].stack(None, 3), nn.Linear(C, 2))
    views = layer_views(model)
    around = [*model[0].parameters(), *model[2].parameters()]
    assert [id(p) for p in views[:2] + views[-2:]] == [id(p) for p in around]
    assert len(views) == 4 + 3 * len(list(model[1].parameters()))


@pytest.mark.ranks(1)  # threads would share what catches warnings
def test_stacked_biases_among_those_that_decay_are_named(spmd):
    """Groups by the number of axes, as for a model without stacks."""

    def body(comm):
        model = nn.Sequential(CASES["mlp"].stack(comm, 9), linear(C, 2, 1))
        parameters = list(model.parameters())
        groups = [[p for p in parameters if p.dim() >= 2], [p for p in parameters if p.dim() < 2]]
        decays = [{"params": groups[0], "weight_decay": 0.1}, {"params": groups[1], "weight_decay": 0.0}]
        said = []
        for made in (decays, param_groups(model, weight_decay=0.1), parameters):
            optimizer = torch.optim.AdamW(made, 1e-3)
            loss_of(model(CASES["mlp"].input())).backward()
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                optimizer.step()
                optimizer.step()
            said.append([str(each.message) for each in found if "weight decay" in str(each.message)])
        return said

    for by_axes, by_layer, all_alike in spmd(body):
        assert len(by_axes) == 1 and "4 stacked biases or norms" in by_axes[0] and "param_groups" in by_axes[0]
        assert by_layer == all_alike == []
