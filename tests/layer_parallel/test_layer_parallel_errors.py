"""Stacks that are used wrongly: one message on every rank, at once, and never a hang."""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, SOLVES, C, Case, Dropped, LibraryAttention, loss_of, reduced
from torch import nn

from xbraid_py import MGRIT, LayerParallel

THREE = pytest.mark.ranks(1, 3)
SEVERAL = pytest.mark.ranks(2, 3)
MLP = CASES["mlp"]


class Odd(nn.Module):
    """Does with its input what it is told."""

    def __init__(self, what):
        super().__init__()
        self.linear, self.what = nn.Linear(C, C), what

    def forward(self, u):
        return self.what(self.linear, u)


def odd(what) -> Case:
    return Case(lambda: Odd(what), (6, C))


class Growing(nn.Module):
    """Another width in every block."""

    made = 0

    def __init__(self):
        super().__init__()
        Growing.made += 1
        self.linear = nn.Linear(C, C + Growing.made)


class Statistics(nn.Module):
    """A BatchNorm in a block."""

    def __init__(self, **options):
        super().__init__()
        self.linear, self.norm = nn.Linear(C, C), nn.BatchNorm1d(C, **options)

    def forward(self, u):
        return self.norm(self.linear(u))


def mixed() -> nn.Module:
    return nn.Sequential(nn.Linear(C, C).double(), nn.Linear(C, C).float())


def everywhere(spmd, call) -> str:
    """The message of the error of `call(comm)`, which is the same on all ranks."""
    messages = spmd(lambda comm: reduced(comm, lambda: call(comm)))
    assert len(set(messages)) == 1 and messages[0] is not None, messages
    return messages[0]


BLOCKS = {
    "shape": (odd(lambda f, u: f(u)[:, :2]), "block=Odd makes (6, 2) torch.float64 of a state (6, 4) torch.float64"),
    "one sample": (odd(lambda f, u: f(u).mean(0)), "block=Odd makes (4,) torch.float64 of a state (6, 4)"),
    "type": (odd(lambda f, u: f(u).float()), "block=Odd makes (6, 4) torch.float32 of a state (6, 4) torch.float64"),
    "pair": (odd(lambda f, u: (f(u), u)), "block=Odd makes tuple of a state"),
    "in place": (odd(lambda f, u: f(u.mul_(2.0))), "block=Odd overwrites its input; use a form not in place"),
    "in place, relu": (odd(lambda f, u: f(torch.relu_(u))), "overwrites its input"),
    "random": (odd(lambda f, u: f(u) * torch.rand(())), "gives two results for one state"),
    "dropout inside": (
        Case(lambda: LibraryAttention(0.5), (6, 3, C)),
        "use xbraid_py.nn.MultiheadAttention, as xbraid_py.replace_modules",
    ),
    "dropout": (Case(lambda: Dropped(0.3, nn.Dropout), (6, C)), "use xbraid_py.nn.Dropout(0.3)"),
    "batch norm": (Case(Statistics, (6, C)), "BatchNorm1d (norm) with statistics of the batch"),
    "batch norm without statistics": (
        Case(lambda: Statistics(track_running_stats=False).eval(), (6, C)),
        "use GroupNorm or LayerNorm, or freeze it: eval() before the block is handed over",
    ),
}


@THREE
@pytest.mark.parametrize("which", BLOCKS)
def test_blocks_that_are_no_layers(spmd, which):
    case, message = BLOCKS[which]
    found = everywhere(spmd, lambda comm: case.stack(comm, 9)(case.input()))
    assert found.startswith("ValueError: block") and message in found


@pytest.mark.parametrize("name", ["GroupNorm", "LayerNorm"])
def test_what_to_take_for_a_batch_norm_is_named(name):
    with pytest.raises(ValueError, match=name):
        BLOCKS["batch norm"][0].stack(None, 9)(MLP.input())


@THREE
def test_dropout_that_does_nothing_is_accepted(spmd):
    none, some = (Case(lambda p=p: Dropped(p, nn.Dropout), (6, C)) for p in (0.0, 0.5))

    def body(comm):
        loss_of(none.stack(comm, 9)(none.input())).backward()
        stack = some.stack(comm, 9).eval()
        loss_of(stack(some.input())).backward()
        return reduced(comm, lambda: stack.train()(some.input()))

    # As soon as it would draw a mask it is refused, in a stack that has been in use.
    assert all("use xbraid_py.nn.Dropout(0.5)" in message for message in spmd(body))


MAKING = {
    "a module": (
        lambda comm: LayerParallel(nn.Linear(C, C), 8, 1.0, comm),
        "TypeError: block=Linear must be a function",
    ),
    "no function": (lambda comm: LayerParallel(3, 8, 1.0, comm), "TypeError: block=int must be a function"),
    "makes no module": (lambda comm: LayerParallel(lambda: 3, 8, 1.0, comm), "block() made int; it must make an nn"),
    "no weights": (lambda comm: LayerParallel(nn.Tanh, 8, 1.0, comm), "block=Tanh has no weights"),
    "two types": (lambda comm: LayerParallel(mixed, 8, 1.0, comm), "mixes ['torch.float32', 'torch.float64']"),
    "other weights": (lambda comm: LayerParallel(Growing, 8, 1.0, comm), "block() made other weights for layer"),
    "layers": (lambda comm: LayerParallel(MLP.block, 0, 1.0, comm), "num_layers=0 must be at least 1; use 64"),
    "time": (lambda comm: LayerParallel(MLP.block, 8, -1.0, comm), "T=-1.0 must be positive and finite; use 5.0"),
    "cfactor": (
        lambda comm: LayerParallel(MLP.block, 32, 1.0, comm, mgrit=MGRIT(cycle="V", cfactor=3)),
        "ValueError: num_layers=32 is not a multiple of cfactor=3; use 30 or 33",
    ),
    "adjoint": (
        lambda comm: LayerParallel(
            MLP.block, 32, 1.0, comm, mgrit=MGRIT(cycle="V", cfactor=4), adjoint=MGRIT(cycle="V", cfactor=2)
        ),
        "ValueError: cfactor=2 of adjoint makes other intervals than cfactor=4 of mgrit",
    ),
    "output": (
        lambda comm: MLP.stack(comm, 9, output="first"),
        "ValueError: output='first' must be all or last; use all",
    ),
}


@THREE
@pytest.mark.parametrize("what", MAKING)
def test_stacks_that_cannot_be_made(spmd, what):
    call, message = MAKING[what]
    # The number of the layer, and the count of blocks made in this process, differ between ranks.
    if what == "other weights":
        assert all(message in found for found in spmd(lambda comm: reduced(comm, lambda: call(comm))))
    else:
        assert message in everywhere(spmd, call)


@SEVERAL
def test_a_block_that_fails_for_the_layers_of_one_rank(spmd):
    """The layers of the last rank cannot be made."""

    def body(comm):
        number = iter(range(100))

        def make():
            return nn.Linear(C, C if comm.rank < comm.size - 1 or next(number) == 0 else C + 1)

        return reduced(comm, lambda: LayerParallel(make, 9 * comm.size, 1.0, comm, mgrit=SOLVES["V"]))

    messages = spmd(body)
    assert len(set(messages)) == 1 and "made other weights for layer" in messages[0]


INPUTS = {
    "type": (lambda: MLP.input().float(), "u is torch.float32 on cpu, the weights are torch.float64 on cpu; use u.to("),
    "no axis": (lambda: torch.zeros((), dtype=torch.float64), "must be a tensor whose first axis is the samples"),
    "no tensor": (lambda: [1.0, 2.0], "u=list must be a tensor whose first axis is the samples"),
}


@THREE
@pytest.mark.parametrize("what", INPUTS)
def test_inputs_that_are_no_states(spmd, what):
    make, message = INPUTS[what]
    found = everywhere(spmd, lambda comm: MLP.stack(comm, 9)(make()))
    assert found.startswith("ValueError") and message in found


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("wrong", [{"num_layers": 0}, {"output": "first"}, {"block": None}, {"T": -1.0}])
def test_what_is_wrong_on_one_rank_is_said_on_all(spmd, wrong):
    def body(comm):
        given = {"block": lambda: nn.Linear(2, 2), "num_layers": 8, "T": 1.0}
        return reduced(comm, lambda: LayerParallel(**(given | wrong if comm.rank == 1 else given), comm=comm))

    (name,) = wrong
    for message in spmd(body):
        assert name in message
