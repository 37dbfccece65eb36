"""Stacks of blocks that exist: their weights, what they may differ in, patterns of several kinds, any names."""

from __future__ import annotations

import copy
from functools import partial

import numpy as np
import pytest
import reference as ref
import torch
from blocks import SOLVES, UNCHECKED, B, C, L, distance, gradients, loop_gradients, loss_of, reduced
from torch import nn

from xbraid_py import MGRIT, LayerParallel, PipelineParallel, Splines, broadcast_loss, to_sequential
from xbraid_py.layers.module_block import own_random_numbers

RANKS = pytest.mark.ranks(1, 2, 3)
PIPELINE = MGRIT(cycle="pipeline", portions=3)


class Scale:
    """A function with a state, and no dict of attributes."""

    __slots__ = ("block", "by")

    def __init__(self, by: float):
        self.by = by


class Block(nn.Module):
    """A small residual block, with an attribute, a buffer beside the weights and a number of its layer."""

    def __init__(self, layer_idx: int = 0, width: int = 2 * C, gain: float = 0.25, shift: float = 0.0):
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(C, width), nn.Linear(width, C), nn.LayerNorm(C)
        self.layer_idx, self.gain = layer_idx, gain
        # Alike in all blocks, and others in each.
        self.act, self.scale_by, self.array = partial(torch.clamp, min=0), Scale(1.0), np.zeros(2)
        self.itself, self.scale_by.block = [self], self
        self.configuration = {"heads": (2, [3]), "act": lambda u: u * gain}
        self.register_buffer("shift", torch.full((C,), shift))

    def forward(self, u):
        return u + self.gain * self.down(torch.tanh(self.up(self.norm(u) + self.shift)))


class Tuple(Block):
    def forward(self, u):
        return super().forward(u), "attention"


class Counting(Block):
    """Its number counts."""

    def forward(self, u):
        return super().forward(u) / (1.0 + self.layer_idx)


def made(count: int, make=Block, seed: int = 5) -> nn.ModuleList:
    """Blocks, the same on every rank."""
    with own_random_numbers(seed):
        return nn.ModuleList(make(n) for n in range(count)).double()


def input_of() -> torch.Tensor:
    return ref.random(B, L, C, seed=1)


def plain(blocks, u) -> dict:
    blocks = copy.deepcopy(blocks).requires_grad_()
    u = u.clone().requires_grad_()
    x = u
    for block in blocks:
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
    loss_of(x).backward()
    return {"output": x.detach(), "input": u.grad, "blocks": blocks}


def solved(stack) -> dict:
    u = input_of().requires_grad_()
    output = stack(u)
    loss_of(output).backward()
    found = {"output": output.detach(), "input": u.grad}
    with torch.no_grad():
        return found | {"inference": stack.eval()(input_of())}


def same(found, exact) -> None:
    for key, wanted in (("output", "output"), ("inference", "output"), ("input", "input")):
        assert distance(found[key], exact[wanted]) < 1e-12, key


@RANKS
@pytest.mark.parametrize("make", [Block, Tuple])
@pytest.mark.parametrize("solve", ["exact", "V", "pipeline"])
def test_the_stack_is_the_loop_over_the_blocks(spmd, make, solve):
    mgrit = SOLVES.get(solve, PIPELINE)
    returns = 0 if make is Tuple else None

    def body(comm):
        blocks = made(9, make)
        before = copy.deepcopy(blocks.state_dict())
        stack = LayerParallel.from_blocks(blocks, comm, returns=returns, mgrit=mgrit, accuracy=UNCHECKED)
        found = solved(stack) | {"weights": gradients(stack), "state": stack.state_dict()}
        assert all(torch.equal(before[key], value) for key, value in blocks.state_dict().items()), "copies were taken"
        return found

    exact = plain(made(9, make), input_of())
    for found in spmd(body):
        same(found, exact)
        assert distance(found["weights"], loop_gradients(exact["blocks"])) < 1e-12
        assert torch.equal(found["state"]["layers.up.weight"][7], made(9, make)[7].up.weight)


@RANKS
@pytest.mark.parametrize("kind", [nn.ModuleList, list, tuple, nn.Sequential])
def test_any_list_of_blocks(spmd, kind):
    blocks = made(6)
    given = nn.Sequential(*blocks) if kind is nn.Sequential else kind(blocks)

    def body(comm):
        return solved(LayerParallel.from_blocks(given, comm, mgrit=SOLVES["exact"]))

    exact = plain(blocks, input_of())
    for found in spmd(body):
        same(found, exact)


@RANKS
def test_increments_that_exist_and_windows(spmd):
    class Increment(Block):
        def forward(self, u):
            return super().forward(u) - u

    def body(comm):
        blocks = made(8, Increment)
        stack = LayerParallel.from_blocks(
            blocks, comm, form="increment", T=2.0, windows=2, mgrit=MGRIT(cfactor=2, max_iter=5, tol=0.0)
        )
        return solved(stack)

    blocks, x = made(8, Increment), input_of()
    for block in blocks:
        x = x + 2.0 / 8 * block(x)
    for found in spmd(body):
        assert distance(found["output"], x.detach()) < 1e-12


# ---- In what blocks may differ


def changed(number: int, change) -> nn.ModuleList:
    blocks = made(6)
    change(blocks[number])
    return blocks


def frozen(block) -> None:
    block.up.weight.requires_grad_(False)


DIFFERENT = {
    "attribute": (lambda b: setattr(b, "gain", 0.5), "blocks[0] and blocks[4] differ: gain is 0.25 and 0.5"),
    "attribute of a part": (lambda b: setattr(b.norm, "eps", 0.1), "differ: norm.eps is 1e-05 and 0.1"),
    "further attribute": (lambda b: setattr(b, "scale", 2), "differ: scale is missing and 2"),
    "function": (lambda b: setattr(b, "act", partial(torch.clamp, min=1)), "differ: act is functools.partial"),
    "object": (lambda b: setattr(b, "scale_by", Scale(2.0)), "differ: scale_by is "),
    "array": (lambda b: setattr(b, "array", np.ones(2)), "differ: array is array([0., 0.]) and array([1., 1.])"),
    "buffer": (lambda b: b.shift.fill_(1.0), "the buffer shift is [0.0, 0.0, 0.0, 0.0] and [1.0, 1.0, 1.0, 1.0]"),
    "width": (lambda b: setattr(b, "up", nn.Linear(C, C).double()), "differ: shape of up.weight is (8, 4) and (4, 4)"),
    "class": (lambda b: setattr(b, "norm", nn.Identity()), "differ: norm.class is LayerNorm and Identity"),
    "frozen": (frozen, "differ: requires_grad of up.weight is True and False"),
    "type": (lambda b: b.float(), "differ: dtype of shift is torch.float64 and torch.float32"),
    "mode": (lambda b: b.eval(), "differ: training is True and False"),
}


@RANKS
@pytest.mark.parametrize("what", DIFFERENT)
def test_what_differs_is_named(spmd, what):
    change, message = DIFFERENT[what]

    def body(comm):
        return reduced(comm, lambda: LayerParallel.from_blocks(changed(4, change), comm))

    for error in spmd(body):
        assert message in error and "mgrit=MGRIT(cycle='pipeline')" in error


@RANKS
@pytest.mark.parametrize("mgrit", [PIPELINE, MGRIT(max_levels=1)])
@pytest.mark.parametrize("make", [Block, Tuple])
def test_unlike_blocks_where_nothing_is_coarsened(spmd, mgrit, make):
    def unlike() -> nn.ModuleList:
        blocks = made(5, make)
        blocks[1].gain, blocks[3].shift[0] = 0.5, 2.0
        return blocks

    returns = 0 if make is Tuple else None

    def body(comm):
        stack = LayerParallel.from_blocks(unlike(), comm, returns=returns, mgrit=mgrit, output="all")
        assert isinstance(stack, PipelineParallel)
        return solved(stack) | {
            "weights": {name: p.grad for name, p in stack.named_parameters()},
            "wrong": reduced(
                comm,
                lambda: LayerParallel.from_blocks(unlike(), comm, mgrit=mgrit, accuracy=UNCHECKED, returns=returns),
            ),
        }

    exact = plain(unlike(), input_of())
    prefix = "" if returns is None else "block."
    wanted = {
        f"layers.{n}.{prefix}{name}": p.grad
        for n, block in enumerate(exact["blocks"])
        for name, p in block.named_parameters()
    }
    results = spmd(body)
    merged = {name: each for found in results for name, each in found["weights"].items()}
    assert len(merged) in (len(wanted), len(results[0]["weights"]))
    for found in results:
        same(found, exact)
        assert all(distance(each, wanted[name]) < 1e-12 for name, each in found["weights"].items())
        assert "accuracy is an option of like blocks" in found["wrong"]


@RANKS
@pytest.mark.parametrize("mgrit", [SOLVES["V"], PIPELINE, SOLVES["exact"]])
def test_numbers_of_layers_that_do_not_count(spmd, mgrit):
    def body(comm):
        return solved(LayerParallel.from_blocks(made(9), comm, mgrit=mgrit, accuracy=UNCHECKED))

    exact = plain(made(9), input_of())
    for found in spmd(body):
        same(found, exact)


@RANKS
def test_numbers_of_layers_that_count(spmd):
    def body(comm):
        stack = LayerParallel.from_blocks(made(6, Counting), comm)
        return reduced(comm, lambda: stack(input_of()))

    for error in spmd(body):
        assert "layer_idx is 0 in blocks[0] and 1 in blocks[1], and changes what a block gives" in error
        assert "PipelineParallel(blocks)" in error


@RANKS
def test_one_module_for_all_layers(spmd):
    def body(comm):
        block = made(1)[0]
        halves = made(4)
        halves[2].up.weight = halves[1].up.weight
        return (
            reduced(comm, lambda: LayerParallel.from_blocks([block] * 4, comm)),
            reduced(comm, lambda: LayerParallel.from_blocks(halves, comm)),
        )

    for whole, part in spmd(body):
        assert "blocks[0] and blocks[1] are the same module" in whole and "splines=Splines(1, 0)" in whole
        assert "blocks[1] and blocks[2] share their weight up.weight" in part


@RANKS
def test_the_way_out_for_one_module_in_all_layers(spmd):
    """What the message names: splines of one coefficient are one set of weights."""

    def body(comm):
        block = made(1)[0]
        stack = LayerParallel(
            lambda: copy.deepcopy(block),
            6,
            comm=comm,
            form="map",
            mgrit=SOLVES["V 3 levels"],
            splines=Splines(1, 0),
            accuracy=UNCHECKED,
        )
        found = solved(stack)
        return found | {"weights": {name.removeprefix("layers."): p.grad[0] for name, p in stack.named_parameters()}}

    block, x = made(1)[0], input_of()
    for _ in range(6):
        x = block(x)
    loss_of(x).backward()
    for found in spmd(body):
        assert distance(found["output"], x.detach()) < 1e-12
        assert distance(found["weights"], {name: p.grad for name, p in block.named_parameters()}) < 1e-12


# ---- Patterns


class Other(nn.Module):
    """Another kind of block."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u):
        return u - torch.sigmoid(self.linear(u)) / 8


@RANKS
@pytest.mark.parametrize("solve", ["V", "pipeline", "exact"])
def test_kinds_in_turn_are_one_layer(spmd, solve):
    def alternating() -> nn.ModuleList:
        with own_random_numbers(3):
            return nn.ModuleList(Other() if n % 3 == 2 else Block(n) for n in range(27)).double()

    def body(comm):
        stack = LayerParallel.from_blocks(
            alternating(), comm, mgrit=SOLVES.get(solve, PIPELINE), accuracy=UNCHECKED, vmap=False
        )
        assert stack.period == 3 and stack.grid.num_layers == 9 and stack.form == "map"
        found = solved(stack) | {"weights": gradients(stack)}
        # Of an increment the pattern makes the steps.
        steps = LayerParallel.from_blocks(alternating(), comm, form="increment", T=2.0, mgrit=MGRIT(max_levels=1))
        with torch.no_grad():
            return found | {"increments": steps.eval()(input_of())}

    exact = plain(alternating(), input_of())
    x = input_of()
    for block in alternating():
        x = x + 2.0 / 27 * block(x)
    for found in spmd(body):
        same(found, exact)
        assert distance(found["increments"], x) < 1e-12
        for n, block in enumerate(exact["blocks"]):
            for name, p in block.named_parameters():
                assert distance(found["weights"][f"blocks.{n % 3}.{name}"][n // 3], p.grad) < 1e-11


# ---- Plain modules again, and outputs on one rank


@RANKS
@pytest.mark.parametrize("make", [Block, Tuple])
@pytest.mark.parametrize("period", [1, 3])
def test_plain_modules_again(spmd, make, period):
    def alternating() -> nn.ModuleList:
        with own_random_numbers(3):
            return nn.ModuleList(make(n, C if period == 3 and n % 3 == 0 else 2 * C) for n in range(9)).double()

    def body(comm):
        stack = LayerParallel.from_blocks(alternating(), comm, returns=0 if make is Tuple else None)
        assert stack.period == period
        module = to_sequential(stack)
        return module(input_of()).detach()

    exact = plain(alternating(), input_of())
    for found in spmd(body):
        assert torch.equal(found, exact["output"])


@RANKS
def test_the_output_on_the_last_rank_alone(spmd):
    def body(comm):
        stack = LayerParallel.from_blocks(made(9), comm, mgrit=SOLVES["V"], accuracy=UNCHECKED, output="last")
        loss = broadcast_loss(loss_of(stack(input_of())), stack.comm, stack.last_rank)
        loss.backward()
        return loss.item(), gradients(stack)

    exact = plain(made(9), input_of())
    for loss, weights in spmd(body):
        assert loss == pytest.approx(loss_of(exact["output"]).item(), rel=1e-12)
        assert distance(weights, loop_gradients(exact["blocks"])) < 1e-12


def test_options_that_blocks_which_exist_do_not_have():
    with pytest.raises(ValueError, match="leave splines out"):
        LayerParallel.from_blocks(made(6), splines=Splines(3, 1))
    with pytest.raises(ValueError, match="form='sum' must be increment"):
        LayerParallel.from_blocks(made(6), form="sum")


class Timed(Other):
    def forward(self, u, t):
        return super().forward(u) * (1.0 + t / 8)


class TimeFirst(Other):
    def forward(self, t, u):
        return super().forward(u) * (1.0 - t / 8)


@RANKS
@pytest.mark.parametrize("form", ["map", "increment"])
@pytest.mark.parametrize("solve", ["V", "pipeline", "unlike"])
def test_blocks_of_several_kinds_have_times(spmd, solve, form):
    T = 1.5

    def timed() -> nn.ModuleList:
        with own_random_numbers(3):
            kinds = [(Timed, Block, TimeFirst)[n % 3]() for n in range(27)]
            if solve == "unlike":
                kinds[4].up, kinds[4].down = nn.Linear(C, 5), nn.Linear(5, C)
        return nn.ModuleList(kinds).double()

    def body(comm):
        mgrit = SOLVES.get(solve, PIPELINE)
        options = {} if solve == "unlike" else {"accuracy": UNCHECKED, "vmap": False}
        stack = LayerParallel.from_blocks(timed(), comm, form=form, T=T, mgrit=mgrit, **options)
        assert isinstance(stack, PipelineParallel) == (solve == "unlike")
        found = solved(stack)
        return found if solve == "unlike" else found | {"module": to_sequential(stack.train())(input_of()).detach()}

    u = input_of().requires_grad_()
    x = u
    for n, block in enumerate(timed()):
        t = n * T / 27
        end = block(x, t) if n % 3 == 0 else block(x) if n % 3 == 1 else block(t, x)
        x = end if form == "map" else x + T / 27 * end
    loss_of(x).backward()
    for found in spmd(body):
        same(found, {"output": x.detach(), "input": u.grad})
        assert distance(found.get("module", x.detach()), x.detach()) < 1e-14


# ---- What is no list of blocks


WRONG = {
    "a block": (lambda: made(1)[0], "blocks=Block must be several modules"),
    "a function": (lambda: Block, "blocks=type must be an nn.ModuleList"),
    "nothing": (list, "blocks=[] must be at least one module"),
    "no module": (lambda: [made(1)[0], torch.tanh], "blocks[1]=builtin_function_or_method must be an nn.Module"),
}


@RANKS
@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_list_of_blocks(spmd, what):
    make, message = WRONG[what]
    for error in spmd(lambda comm: reduced(comm, lambda: LayerParallel.from_blocks(make(), comm))):
        assert error.startswith("TypeError") and message in error


@RANKS
@pytest.mark.parametrize("kind", [list, nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_a_list_in_the_place_of_a_function(spmd, kind):
    for error in spmd(lambda comm: reduced(comm, lambda: LayerParallel(kind(made(4)), 4, comm=comm))):
        assert error.startswith("TypeError") and "LayerParallel.from_blocks(blocks, comm)" in error


@RANKS
def test_functions_that_hand_out_blocks_which_exist(spmd):
    def body(comm):
        blocks, again = made(4), iter(made(4))
        handed = iter(made(5))
        shared = nn.Linear(C, C).double()
        return (
            reduced(comm, lambda: LayerParallel(lambda: next(iter(blocks)), 4, comm=comm, form="map")),
            reduced(comm, lambda: LayerParallel(lambda: next(again), 4, comm=comm, form="map")),
            reduced(comm, lambda: LayerParallel(lambda: next(handed), 4, comm=comm, form="map")),
            reduced(comm, lambda: LayerParallel(lambda: nn.Sequential(shared), 4, comm=comm)),
        )

    for first, ended, handed, shared in spmd(body):
        for error in (first, ended, handed, shared):
            assert error.startswith("ValueError") and "LayerParallel.from_blocks(blocks, comm)" in error
        assert "that it has given before" in first and "that it has given before" in shared
        assert "other weights for layer 0" in handed


@RANKS
def test_copies_of_one_block_are_fine(spmd):
    def body(comm):
        block = made(1)[0]
        return solved(LayerParallel(lambda: copy.deepcopy(block), 4, comm=comm, form="map", mgrit=SOLVES["exact"]))

    block, x = made(1)[0], input_of()
    for _ in range(4):
        x = block(x)
    for found in spmd(body):
        assert distance(found["output"], x.detach()) < 1e-13


@RANKS
def test_returns_is_checked(spmd):
    def body(comm):
        untold, wrong = (LayerParallel.from_blocks(made(4, Tuple), comm, returns=returns) for returns in (None, 5))
        return reduced(comm, lambda: untold(input_of())), reduced(comm, lambda: wrong(input_of()))

    for untold, wrong in spmd(body):
        assert (
            "makes tuple of a state" in untold and "use returns=0 if its first entry is the one that counts" in untold
        )
        assert "returns=5: block=Tuple gives nothing of that number or name" in wrong
