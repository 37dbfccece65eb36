"""Calls of a stack in which the last rank does something else than the others."""

from __future__ import annotations

import torch
from blocks import CASES, loss_of

MLP = CASES["mlp"]


def odd_one(comm) -> bool:
    return comm.rank == comm.size - 1


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
