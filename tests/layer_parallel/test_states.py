"""States of several tensors, times of layers and inference mode, against the plain loop over the blocks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import reference as ref
import torch
from blocks import SOLVES, B, C, L, distance, gradients, loss_of, reduced
from existing import LAYERS, Decoder, decoder_inputs, input_of, made, plain, stack_of
from torch import nn

from xbraid_py import LayerParallel, to_sequential

RANKS = pytest.mark.ranks(1, 2, 3)


# ---- States of several tensors


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class Coupled(nn.Module):
    """Two tensors of other shapes, each moved by the other."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)

    def move(self, x, y):
        return x + torch.tanh(self.a(y))[:, None] / 8, y - torch.tanh(self.b(x)).mean(1) / 8


class CoupledTuple(Coupled):
    def forward(self, state):
        return self.move(*state)


class CoupledDict(Coupled):
    def forward(self, state, shift=0.0):
        x, y = self.move(state["x"], state["y"])
        return {"x": x + shift, "y": y.view(len(y), -1)}


class CoupledPair(Coupled):
    def forward(self, state):
        return Pair(*self.move(state.x, state.y))


class CoupledAndMore(Coupled):
    def forward(self, state):
        return self.move(*state), "weights of the attention"


STATES = {
    "tuple": (CoupledTuple, lambda x, y: (x, y), lambda s: s, {}),
    "dict": (CoupledDict, lambda x, y: {"x": x, "y": y}, lambda s: (s["x"], s["y"]), {}),
    "dataclass": (CoupledPair, Pair, lambda s: (s.x, s.y), {}),
    "tuple in a tuple": (CoupledAndMore, lambda x, y: (x, y), lambda s: s, {"returns": 0}),
}


@RANKS
@pytest.mark.parametrize("way", ["exact", "pipeline", "V", "V, batched", "lagged"])
@pytest.mark.parametrize("kind", STATES)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_states_of_several_tensors(spmd, kind, way):
    make, join, split, options = STATES[kind]

    def start():
        return ref.random(B, L, C, seed=1).requires_grad_(), ref.random(B, C, seed=2).requires_grad_()

    def loss(state):
        x, y = split(state)
        return loss_of(x) + loss_of(y, 8)

    def body(comm):
        stack = stack_of(comm, make, way, **options)
        x, y = start()
        output = stack(join(x, y))
        assert type(output) is type(join(x, y))
        loss(output).backward()
        with torch.no_grad():
            inference = split(stack.eval()(join(x, y)))
        return [each.detach() for each in split(output)], [x.grad, y.grad], gradients(stack), list(inference)

    x, y = start()
    state, blocks = join(x, y), made(LAYERS.get(way, 9), make)
    for block in blocks:
        state = block(state)[0] if options else block(state)
    loss(state).backward()
    for output, backs, weights, inference in spmd(body):
        for found, again, exact in zip(output, inference, split(state), strict=True):
            assert distance(found, exact.detach()) < 1e-12 and distance(again, exact.detach()) < 1e-12
        assert distance(backs[0], x.grad) < 1e-12 and distance(backs[1], y.grad) < 1e-12
        assert distance(weights["a.weight"][4], blocks[4].a.weight.grad) < 1e-12


@RANKS
def test_states_that_are_none(spmd):
    x, y = ref.random(B, C, seed=1), ref.random(B, C, seed=2)

    def body(comm):
        stack = stack_of(comm, CoupledTuple, "V")
        single = stack_of(comm, CoupledDict, "V")
        states = ((x, y.float()), (x, y[:2]), (x, "y"), ())
        found = [reduced(comm, lambda s=s: stack(s)) for s in states]
        return [*found, reduced(comm, lambda: single((ref.random(B, L, C, seed=1), y)))]

    parts = ("one dtype", "2 and 6 samples", "or a tree of such tensors", "or a tree of such tensors", "")
    for errors in spmd(body):
        for error, part in zip(errors, parts, strict=True):
            assert error is not None and part in error


@RANKS
def test_a_block_that_changes_the_structure_of_its_state(spmd):
    class Lost(Coupled):
        def forward(self, state):
            return [*self.move(*state)]

    class Other(Coupled):
        def forward(self, state):
            x, y = self.move(*state)
            return x, x

    def body(comm):
        state = (ref.random(B, L, C, seed=1), ref.random(B, C, seed=2))
        return [reduced(comm, lambda k=k: stack_of(comm, k, "V")(state)) for k in (Lost, Other)]

    for lost, other in spmd(body):
        assert "it must keep the structure" in lost and "it must keep shapes" in other


# ---- Times


class Timed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u, t):
        return torch.tanh(self.linear(u)) * (1.0 + t)


class TimeFirst(Timed):
    def forward(self, t, u):
        return super().forward(u, t)


class TimeNamed(Timed):
    def forward(self, u, scale=1.0, *, t=100.0):
        return scale * super().forward(u, t)


@RANKS
@pytest.mark.parametrize("make", [Timed, TimeFirst, TimeNamed])
@pytest.mark.parametrize("way", ["exact", "pipeline", "V", "windows", "lagged"])
def test_blocks_that_depend_on_the_time(spmd, make, way):
    count, T = LAYERS.get(way, 9), 1.5

    def body(comm):
        stack = stack_of(comm, make, way, form="increment", T=T)
        u = input_of().requires_grad_()
        output = stack(u)
        loss_of(output).backward()
        return output.detach(), u.grad, to_sequential(stack)(u).detach()

    u = input_of().requires_grad_()
    x = u
    for n, block in enumerate(made(count, make)):
        x = x + T / count * block(
            *((n * T / count, x) if make is TimeFirst else (x,)), **({} if make is TimeFirst else {"t": n * T / count})
        )
    loss_of(x).backward()
    for output, back, module in spmd(body):
        assert distance(output, x.detach()) < 1e-12 and distance(back, u.grad) < 1e-12
        assert distance(module, x.detach()) < 1e-14


# ---- Inference mode


@RANKS
@pytest.mark.parametrize("training", [False, True])
def test_inference_mode(spmd, training):
    def body(comm):
        stack = stack_of(comm, Decoder, "V").train(training)
        inputs, named = decoder_inputs(False)
        simple = LayerParallel(lambda: nn.Linear(C, C).double(), 6, comm=comm, mgrit=SOLVES["exact"]).train(training)
        with torch.inference_mode():
            found = stack(input_of(), *inputs, **named), simple(ref.random(32, C, seed=1))
        state = simple.state_dict()
        # And what comes after is as always.
        loss_of(simple(ref.random(32, C, seed=1))).backward()
        return [each.clone() for each in found], state

    inputs, named = decoder_inputs(False)
    exact = plain(9, Decoder, input_of(), inputs, named)
    for (found, simple), state in spmd(body):
        assert distance(found, exact["output"].detach()) < 1e-12
        x = ref.random(32, C, seed=1)
        for n in range(6):
            x = x + nn.functional.linear(x, state["layers.weight"][n], state["layers.bias"][n]) / 6
        assert distance(simple, x) < 1e-12
