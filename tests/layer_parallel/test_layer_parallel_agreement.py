"""Ranks that call a stack in different ways, and ranks without layers."""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, UNCHECKED, C, Case, Convolution, loss_of, reduced

import xbraid_py
from xbraid_py import MGRIT

SEVERAL = pytest.mark.ranks(2, 3)
MLP = CASES["mlp"]


def odd_one(comm) -> bool:
    return comm.rank == comm.size - 1


# Calls of a stack in which the last rank does something else than the others.
def shape(comm):
    MLP.stack(comm, 9)(MLP.input(batch=5 if odd_one(comm) else 6))


def kind(comm):
    u = MLP.input()
    MLP.stack(comm, 9)(u.float() if odd_one(comm) else u)


def mode(comm):
    MLP.stack(comm, 9).train(not odd_one(comm))(MLP.input())


def without_gradient(comm):
    with torch.set_grad_enabled(not odd_one(comm)):
        MLP.stack(comm, 9)(MLP.input())


def differentiable_input(comm):
    loss_of(MLP.stack(comm, 9)(MLP.input().requires_grad_(odd_one(comm)))).backward()


def layers(comm):
    MLP.stack(comm, 12 if odd_one(comm) else 9)


def options(comm):
    MLP.stack(comm, 9, solve="exact" if odd_one(comm) else "V")


def seed(comm):
    MLP.stack(comm, 9, seed=int(odd_one(comm)))


def recompute(comm):
    MLP.stack(comm, 9, recompute=odd_one(comm))


MISMATCHES = [shape, kind, mode, without_gradient, differentiable_input, layers, options, seed, recompute]


@SEVERAL
@pytest.mark.parametrize("call", MISMATCHES)
def test_ranks_that_do_not_agree(spmd, call):
    messages = spmd(lambda comm: reduced(comm, lambda: call(comm)))
    last = len(messages) - 1
    for message in messages:
        assert message.startswith("ValueError") and f"on rank {last}" in message
        assert "the same" in message


@SEVERAL
def test_a_stack_works_on_after_an_error(spmd):
    def body(comm):
        stack = MLP.stack(comm, 9)
        for u in (MLP.input(batch=5 + odd_one(comm)), MLP.input().float(), MLP.input()[:, :2]):
            assert reduced(comm, lambda u=u: stack(u)) is not None
        loss_of(stack(MLP.input())).backward()
        return stack.record.update

    assert set(spmd(body)) == {1}


@SEVERAL
def test_ranks_without_layers_take_part_in_everything(spmd):
    """Two intervals; the ranks behind have nothing, not even rows in the state."""
    case = Case(Convolution, (2, C, 3, 3))

    def body(comm):
        stack = case.stack(comm, 2, mgrit=MGRIT(cycle="V", cfactor=2, min_coarse=1, max_levels=2), accuracy=UNCHECKED)
        optimizer = torch.optim.Adam(stack.parameters(), 0.1)
        before = stack.state_dict()["layers.convolution.weight"].clone()
        loss_of(stack(case.input(batch=2))).backward()
        norm = xbraid_py.clip_grad_norm_(stack, 1.0)
        optimizer.step()
        return len(stack.own_layers), norm, (stack.state_dict()["layers.convolution.weight"] != before).any().item()

    results = spmd(body)
    assert [own for own, _, _ in results] == [2] + [0] * (len(results) - 1)
    assert len({norm for _, norm, _ in results}) == 1 and all(moved for _, _, moved in results)
