"""Export of what takes further inputs, states of several tensors, and of modules of all kinds: plain modules again."""

from __future__ import annotations

import pickle

import pytest
import reference as ref
import torch
from blocks import SOLVES, UNCHECKED, B, C, L, distance, loss_of, reduced
from existing import Decoder, decoder_inputs, input_of, stack_of
from torch import nn

from xbraid_py import MGRIT, LayerParallel, PipelineParallel, to_sequential
from xbraid_py.layers.module_block import own_random_numbers

RANKS = pytest.mark.ranks(1, 2, 3)


class Coupled(nn.Module):
    """An increment of two tensors, of the second of two things that it gives, at its time."""

    def __init__(self, width: int = C):
        super().__init__()
        self.up, self.down = nn.Linear(C, width), nn.Linear(width, C)

    def forward(self, state, t):
        change = self.down(torch.tanh(self.up(state["x"]))) * (1.0 + t)
        return None, {"x": change, "y": -change.mean(1)}


class Pooled(nn.Module):
    """Changes the structure of its state."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, 2)

    def forward(self, u, *inputs, **named):
        return {"mean": self.linear(u.mean(1)), "all": u}


@RANKS
@pytest.mark.parametrize("way", ["exact", "windows", "pipeline"])
def test_a_stack_with_further_inputs(spmd, way):
    def body(comm):
        stack = stack_of(comm, Decoder, way)
        inputs, named = decoder_inputs(False)
        return to_sequential(stack)(input_of(), *inputs, **named).detach(), stack(input_of(), *inputs, **named).detach()

    for plain, wanted in spmd(body):
        assert distance(plain, wanted) < 1e-12


@RANKS
@pytest.mark.parametrize("unlike", [False, True])
def test_increments_of_several_tensors(spmd, unlike):
    def body(comm):
        with own_random_numbers(2):
            blocks = [Coupled(C + n if unlike else C).double() for n in range(9)]
        options = {"mgrit": MGRIT(cycle="pipeline")} if unlike else {"mgrit": SOLVES["V"], "accuracy": UNCHECKED}
        stack = LayerParallel.from_blocks(blocks, comm, form="increment", returns=1, T=1.5, **options)
        assert isinstance(stack, PipelineParallel) == unlike
        state = {"x": ref.random(B, L, C, seed=1), "y": ref.random(B, C, seed=2)}
        return [(plain.detach(), stack(state)[key].detach()) for key, plain in to_sequential(stack)(state).items()]

    for pairs in spmd(body):
        assert len(pairs) == 2 and all(distance(*pair) < 1e-12 for pair in pairs)


@RANKS
def test_modules_of_all_kinds(spmd):
    """On every rank all of them, trained as they are, within a model of the caller."""

    class Model(nn.Module):
        def __init__(self, comm):
            super().__init__()
            with own_random_numbers(2):
                self.opening, modules = (
                    nn.Linear(C, C).double(),
                    [Decoder().double(), Decoder().double().eval(), Pooled()],
                )
            modules[0].q.requires_grad_(False)
            self.body = PipelineParallel([*modules[:2], modules[2].double()], comm, portions=2)

        def forward(self, u, *inputs, **named):
            return self.body(self.opening(u), *inputs, **named)["mean"]

    def body(comm):
        model = Model(comm)
        inputs, named = decoder_inputs(False)
        loss_of(model(input_of(), *inputs, **named)).backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * (0.0 if p.grad is None else p.grad)
        plain = to_sequential(model)
        assert type(plain) is Model and isinstance(plain.body, nn.Sequential)
        assert [part.training for part in plain.body] == [True, False, True]
        assert [p.requires_grad for p in plain.body[0].q.parameters()] == [False, False]
        assert not {id(p) for p in plain.parameters()} & {id(p) for p in model.parameters()}
        found = pickle.loads(pickle.dumps(plain.body))(plain.opening(input_of()), *inputs, **named)
        state = {name.replace("body.layers", "body"): value for name, value in model.state_dict().items()}
        assert state.keys() == plain.state_dict().keys()
        assert all(torch.equal(value, plain.state_dict()[name]) for name, value in state.items())
        return found["mean"].detach(), model(input_of(), *inputs, **named).detach()

    for plain, wanted in spmd(body):
        assert distance(plain, wanted) < 1e-12


@RANKS
def test_modules_that_no_other_rank_can_get(spmd):
    def body(comm):
        module = nn.Linear(C, C)
        module.function = lambda u: u
        model = PipelineParallel([nn.Tanh(), nn.Tanh(), module], comm)
        return reduced(comm, lambda: to_sequential(model))

    results = spmd(body)
    for found in results:
        if len(results) == 1:
            assert found is None
        else:
            assert "module 2 (Linear) cannot be pickled, so that no other rank gets it" in found
            assert "load the state_dict() into modules that are made anew" in found
