"""Further inputs and states of several tensors for modules of all kinds, against the plain loop over the modules."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import reference as ref
import torch
from blocks import B, C, L, distance, loss_of, reduced
from existing import Decoder, decoder_inputs, input_of
from torch import nn

from xbraid_py import MGRIT, LayerParallel, PipelineParallel, broadcast_loss
from xbraid_py import nn as xnn
from xbraid_py.layers.module_block import own_random_numbers

RANKS = pytest.mark.ranks(1, 2, 3)


class Widened(Decoder):
    """With a perceptron of any width behind the attention."""

    def __init__(self, width: int):
        super().__init__()
        self.up, self.down = nn.Linear(C, width), nn.Linear(width, C)

    def forward(self, u, memory, **named):
        u = super().forward(u, memory, **named)
        return u + self.down(torch.tanh(self.up(u))) / 4


class WithMore(Widened):
    def forward(self, u, memory, **named):
        return "weights", super().forward(u, memory, **named)


def unlike(kind=Widened) -> list[nn.Module]:
    with own_random_numbers(3):
        return [kind(width).double() for width in (3, 5, 8, 2, 6)]


def gathered(model: PipelineParallel) -> dict[str, torch.Tensor]:
    """Gradients of all modules by their names; collective."""
    parts = model.comm.bcast(model.comm.gather({name: p.grad.clone() for name, p in model.layers.named_parameters()}))
    return {name: value for part in parts for name, value in part.items()}


def named_tensors(inputs: tuple, named: dict) -> dict[str, torch.Tensor]:
    return {"memory": inputs[0], "table": named["tables"][0], "gain": named["option"]["gain"]}


WAYS = {
    "one portion": lambda comm: PipelineParallel(unlike(), comm, portions=1),
    "3 portions": lambda comm: PipelineParallel(unlike(), comm, portions=3),
    "recompute": lambda comm: PipelineParallel(unlike(), comm, portions=3, recompute=True),
    "from_blocks": lambda comm: LayerParallel.from_blocks(unlike(), comm, mgrit=MGRIT(cycle="pipeline", portions=6)),
    "returns": lambda comm: LayerParallel.from_blocks(
        unlike(WithMore), comm, returns=1, mgrit=MGRIT(cycle="pipeline", portions=2)
    ),
}


@RANKS
@pytest.mark.parametrize("way", WAYS)
def test_further_inputs_and_their_gradients(spmd, way):
    def body(comm):
        model = WAYS[way](comm)
        inputs, named = decoder_inputs(True)
        u = input_of().requires_grad_()
        output = model(u, *inputs, **named)
        loss_of(output).backward(retain_graph=True)
        first = inputs[0].grad.clone()
        loss_of(output).backward()
        assert distance(inputs[0].grad, 2 * first) < 1e-14
        found = {name: tensor.grad / 2 for name, tensor in named_tensors(inputs, named).items()}
        found |= {"output": output.detach(), "input": u.grad / 2}
        found |= {name.replace(".block", ""): each / 2 for name, each in gathered(model).items()}
        with torch.no_grad():
            return found | {"inference": model.eval()(u, *inputs, **named)}

    inputs, named = decoder_inputs(True)
    u = input_of().requires_grad_()
    x, blocks = u, nn.ModuleList(unlike())
    for block in blocks:
        x = block(x, *inputs, **named)
    loss_of(x).backward()
    exact = {name: tensor.grad for name, tensor in named_tensors(inputs, named).items()}
    exact |= {"output": x.detach(), "inference": x.detach(), "input": u.grad}
    exact |= {name: p.grad for name, p in blocks.named_parameters()}
    alone = body(None)
    for found in spmd(body):
        assert found.keys() == exact.keys()
        assert max(distance(found[name], exact[name]) for name in exact) < 1e-11
        assert [name for name in exact if not torch.equal(found[name], alone[name])] == []


@RANKS
def test_gradients_of_further_inputs_alone(spmd):
    """Frozen modules behind an encoder that is trained, and the output on one rank."""

    def body(comm):
        model = PipelineParallel(unlike(), comm, portions=2, output="last").requires_grad_(False)
        inputs, named = decoder_inputs(True)
        output = model(input_of(), *inputs, **named)
        broadcast_loss(loss_of(output), comm, model.last_rank).backward()
        return inputs[0].grad

    inputs, named = decoder_inputs(True)
    x = input_of()
    for block in unlike():
        x = block(x, *inputs, **named)
    loss_of(x).backward()
    for found in spmd(body):
        assert distance(found, inputs[0].grad) < 1e-11


@RANKS
def test_further_inputs_of_another_type(spmd):
    """Unlike those of a stack, whose layers have one: the memory in float32, whose gradient is too."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(C, C)

        def forward(self, u, memory):
            return u + torch.tanh(self.linear(u) + memory.double())

    def made():
        with own_random_numbers(1):
            return [Mixed().double() for _ in range(4)]

    def memory_of():
        return ref.random(B, 1, C, seed=5).float().requires_grad_()

    def body(comm):
        memory = memory_of()
        loss_of(PipelineParallel(made(), comm, portions=3)(input_of(), memory)).backward()
        return memory.grad

    memory, x = memory_of(), input_of()
    for module in made():
        x = module(x, memory)
    loss_of(x).backward()
    results = spmd(body)
    assert all(torch.equal(found, results[0]) and found.dtype == torch.float32 for found in results)
    assert distance(results[0], memory.grad) < 1e-6


# ---- States of several tensors


@dataclass
class Sentence:
    x: torch.Tensor
    tokens: torch.Tensor
    mask: torch.Tensor


class Embed(nn.Module):
    """From tokens and a tensor to three things, of them one of the caller."""

    def __init__(self):
        super().__init__()
        self.table, self.to_short = nn.Embedding(7, C), nn.Linear(C, 3)

    def forward(self, given):
        tokens, x = given
        x = x + self.table(tokens)
        return {"short": self.to_short(x).float(), "x": x, "rest": [tokens, tokens > 2]}


class Mix(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, C)

    def forward(self, state, scale=None):
        tokens, mask = state["rest"]
        x = state["x"] + torch.tanh(self.linear(state["short"].double())) * mask[..., None]
        return Sentence(x if scale is None else x * scale, tokens, mask)


class Write(nn.Module):
    """Writes to what it is given, has no weights, and hands on what needs no gradient."""

    def forward(self, state, scale=None):
        state.x.mul_(0.5)
        return state


class Look(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.linear = nn.Embedding(7, C), nn.Linear(C, C)

    def forward(self, state, scale=None):
        x = torch.tanh(self.linear(state.x) + self.table(state.tokens))
        return x.mean(1), x, state.tokens


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, 2)

    def forward(self, state, scale=None):
        return self.linear(state[0])


def sentence_modules(with_head: bool) -> list[nn.Module]:
    with own_random_numbers(4):
        return [each().double() for each in (Embed, Mix, Write, Look, *([Head] if with_head else []))]


class Wrapped(nn.Module):
    """A module of one input, for a model with further ones."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, u, *inputs, **named):
        return self.module(u)


def sentences():
    tokens = torch.randint(7, (B, L), generator=torch.Generator().manual_seed(2))
    return tokens, ref.random(B, L, C, seed=1).requires_grad_(), ref.random(B, 1, 1, seed=3).requires_grad_()


def loss_of_all(output) -> torch.Tensor:
    return loss_of(output) if isinstance(output, torch.Tensor) else loss_of(output[0]) + loss_of(output[1], 8)


@RANKS
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("with_head", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_states_of_several_tensors(spmd, scaled, with_head, recompute):
    def modules():
        first, *others = sentence_modules(with_head)
        return [Wrapped(first) if scaled else first, *others]

    def body(comm):
        model = PipelineParallel(modules(), comm, portions=3, recompute=recompute)
        found = {}
        for _ in range(2):  # forms are told in the first call alone
            model.zero_grad()
            tokens, x, scale = sentences()
            output = model((tokens, x), **({"scale": scale} if scaled else {}))
            loss_of_all(output).backward()
            again = [x.grad, *([scale.grad] if scaled else []), *gathered(model).values()]
            assert all(torch.equal(a, b) for a, b in zip(again, found.get("gradients", again), strict=True))
            found = {"gradients": again}
        with torch.inference_mode():
            inference = model.eval()((tokens, x), **({"scale": scale} if scaled else {}))
        leaves = [output, inference] if with_head else [*output, *inference]
        return found | {"leaves": [leaf.detach() for leaf in leaves]}

    tokens, x, scale = sentences()
    plain = modules()
    state = (tokens, x)
    for module in plain:
        state = module(state, **({"scale": scale} if scaled else {}))
    loss_of_all(state).backward()
    exact = [x.grad, *([scale.grad] if scaled else [])]
    exact += [p.grad for module in plain for p in module.parameters()]
    leaves = [state] * 2 if with_head else [*state] * 2
    alone = body(None)
    for found in spmd(body):
        for kind, wanted in (("gradients", exact), ("leaves", leaves)):
            assert len(found[kind]) == len(wanted)
            for a, b, c in zip(found[kind], wanted, alone[kind], strict=True):
                assert torch.equal(a, c) and a.dtype == b.dtype
                assert a.dtype == torch.int64 or distance(a, b.detach()) < 1e-6


@RANKS
def test_steps_of_several_tensors_with_times(spmd):
    """Increments of trees by blocks that are unlike, one of several things that they return, at their time."""

    class Coupled(nn.Module):
        def __init__(self, width: int):
            super().__init__()
            self.up, self.down = nn.Linear(C, width), nn.Linear(width, C)

        def forward(self, t, state):
            change = self.down(torch.tanh(self.up(state["x"]))) * (1.0 + t)
            return "more", {"x": change, "y": -change.mean(1)}

    def blocks():
        with own_random_numbers(3):
            return [Coupled(width).double() for width in (3, 5, 2, 6)]

    def start():
        return ref.random(B, L, C, seed=1).requires_grad_(), ref.random(B, C, seed=2).requires_grad_()

    def body(comm):
        options = {"form": "increment", "returns": 1, "T": 1.5, "mgrit": MGRIT(cycle="pipeline", portions=3)}
        model = LayerParallel.from_blocks(blocks(), comm, **options)
        x, y = start()
        end = model({"x": x, "y": y})
        (loss_of(end["x"]) + loss_of(end["y"])).backward()
        return end["x"].detach(), end["y"].detach(), x.grad, y.grad

    x, y = start()
    a, b = x, y
    for n, block in enumerate(blocks()):
        change = block(n * 1.5 / 4, {"x": a, "y": b})[1]
        a, b = a + 1.5 / 4 * change["x"], b + 1.5 / 4 * change["y"]
    (loss_of(a) + loss_of(b)).backward()
    for found in spmd(body):
        for mine, exact in zip(found, (a, b, x.grad, y.grad), strict=True):
            assert distance(mine, exact.detach()) < 1e-12


@RANKS
def test_masks_of_dropout_with_further_inputs(spmd):
    """The same bits on any number of ranks in training, where a portion cannot be held against the batch."""

    class Dropping(Widened):
        def __init__(self, width: int):
            super().__init__(width)
            self.dropout = xnn.Dropout(0.5)

        def forward(self, u, memory, **named):
            return u + self.dropout(super().forward(u, memory, **named))

    def body(comm):
        model = PipelineParallel(unlike(Dropping), comm, portions=3)
        inputs, named = decoder_inputs(True)
        first, second = (model(input_of(), *inputs, **named) for _ in range(2))
        loss_of(second).backward()
        return first.detach(), second.detach(), inputs[0].grad

    alone = body(None)
    assert distance(alone[0], alone[1]) > 1e-2
    for found in spmd(body):
        assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


# ---- What is refused


class Tabled(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u, table):
        return u + torch.tanh(self.linear(u + table)) / 8


@RANKS
def test_a_table_with_as_many_rows_as_there_are_samples(spmd):
    # Of single samples a row of the table goes with each, and nothing fails.
    u, table = ref.random(B, B, C, seed=1), ref.random(B, C, seed=2)

    def made():
        with own_random_numbers(3):
            return [Tabled().double() for _ in range(4)]

    def body(comm):
        alone, some = (PipelineParallel(made(), comm, portions=portions) for portions in (B, 2))
        found = [reduced(comm, lambda m=m: m(u, table)) for m in (alone, some)]
        # And goes on.
        return found, [model(u, table[None]).detach() for model in (alone, some)]

    x = u
    for module in made():
        x = module(x, table)
    for (alone, some), outputs in spmd(body):
        assert "(Tabled) makes something else of some of the samples than of all" in alone
        assert "use table[None]); use portions=1" in alone
        assert "(Tabled) cannot be evaluated for some of the samples" in some
        assert "table[None]; or use portions=1" in some
        assert all(distance(output, x.detach()) < 1e-12 for output in outputs)


@RANKS
def test_an_error_of_one_module_is_that_of_all_ranks(spmd):
    """In the first call of a kind; other calls go on behind it."""

    class Picky(nn.Module):
        def __init__(self, error: Exception | None = None):
            super().__init__()
            self.linear, self.error = nn.Linear(C, C), error

        def forward(self, u, flags):
            if self.error is not None and len(u) == 2 and flags.any():
                raise self.error
            return self.linear(u)

    flags = torch.tensor([1, 0, 0, 0, 0])  # of the first of three portions, which another one of two samples follows

    def body(comm):
        found = []
        for place in range(3):
            for kind in (ValueError, TypeError, RuntimeError):
                with own_random_numbers(3):
                    modules = [Picky(kind(f"no {place}") if n == place else None).double() for n in range(3)]
                model = PipelineParallel(modules, comm, portions=3)
                u = ref.random(5, C, seed=1).requires_grad_()
                found.append(reduced(comm, lambda m=model, u=u: m(u, flags)))
                loss_of(model(u, 0 * flags)).backward()
                assert float(u.grad.norm()) > 0.0
        return found

    for found in spmd(body):
        assert all(f"no {place}" in found[3 * place + k] for place in range(3) for k in range(3))


@RANKS
def test_what_modules_cannot_be_given(spmd):
    class Lost(nn.Module):
        def forward(self, u):
            return u, None

    class Summed(nn.Module):
        def forward(self, u):
            return {"x": u, "all": u.sum(0)}

    class Nothing(nn.Module):
        def forward(self, u):
            return {}

    @dataclass
    class Inside:
        x: torch.Tensor

    class Local(nn.Module):
        def forward(self, u):
            return Inside(u) if isinstance(u, torch.Tensor) else u

    u = ref.random(4, C, seed=1)

    def body(comm):
        def called(modules, *inputs, **named):
            model = PipelineParallel([*modules, nn.Identity(), nn.Identity()], comm, portions=2)
            return reduced(comm, lambda: model(*inputs, **named))

        return [
            called([Tabled().double()], u, 1.0, shift=2),
            called([Lost()], u),
            called([Summed()], u),
            called([nn.Identity()], (u, 3)),
            called([nn.Identity()], (u, u[:2])),
            called([nn.Identity()], {"x": u + comm.rank, "y": u[:, : 2 + comm.rank]}),
            called([Local()], u),
            called([Nothing()], u),
        ]

    results = spmd(body)
    for found in results:
        assert (
            "module 0 (Tabled) cannot take the further inputs (got an unexpected keyword argument 'shift')" in found[0]
        )
        assert "use a module around it whose forward(u, *inputs, **named) leaves them out" in found[0]
        assert "module 0 (Lost) makes [(2, 4), 'NoneType'] of 2 samples" in found[1] and "a further input" in found[1]
        assert "module 0 (Summed) makes [(2, 4), (4,)] of 2 samples; they must stay on the first axis" in found[2]
        assert "u=tuple must be a tensor whose first axis is the samples, at least one, or a tree of such" in found[3]
        assert "u has tensors of 2 and 4 samples on their first axes" in found[4]
        assert "module 0 (Nothing) makes [] of 2 samples" in found[7]
        if len(results) == 1:
            assert found[5:7] == [None, None]
        else:
            assert "shape and mode of the input=" in found[5]
            assert "cannot go to the next rank" in found[6] and "defined at the top of a file" in found[6]


@RANKS
@pytest.mark.parametrize("what", ["state", "mask"])
def test_an_input_that_is_overwritten_before_it_is_read_again(spmd, what):
    def body(comm):
        found = []
        for recompute in (False, True):
            model = PipelineParallel(unlike(), comm, portions=2, recompute=recompute)
            inputs, named = decoder_inputs(False)
            u = input_of()
            output = model(u, *inputs, **named)
            (u if what == "state" else named["mask"]).zero_()
            found.append(reduced(comm, lambda end=output: loss_of(end).backward()))
        return found

    for kept, again in spmd(body):
        assert kept is None
        assert "overwritten by an operation in place" in again and "use a form not in place" in again
