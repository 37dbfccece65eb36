"""Stacks under `torch.autocast`: those of the same blocks in a loop, whoever evaluates them, forwards or backwards.

Shape letters: `N` layers.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from blocks import CASES, UNCHECKED, C, Case, Mlp, distance, gradients, loop_gradients, loss_of, unstacked
from existing import Decoder, decoder_inputs, input_of
from torch import nn

from xbraid_py import MGRIT, LayerParallel, ParallelGRU, PipelineParallel
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.layers.trees import flatten

N, T = 9, 2.0
SHORT = torch.bfloat16
EXACT = {
    "exact": {"mgrit": MGRIT(max_levels=1)},
    "recompute": {"mgrit": MGRIT(max_levels=1), "recompute": True},
    "states": {"mgrit": MGRIT(max_levels=1), "recompute": "states"},
    "windows": {"mgrit": MGRIT(max_levels=1), "windows": 3},
    "pipeline": {"mgrit": MGRIT(cycle="pipeline", portions=1)},
    "V": {"mgrit": MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=3, tol=0.0)},
    "V, recompute": {
        "mgrit": MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=3, tol=0.0),
        "recompute": True,
    },
    "V, vmap asked for": {
        "mgrit": MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=3, tol=0.0),
        "vmap": True,
    },
}
# Where the network is that of the loop, bit by bit; elsewhere states differ by roundings, and these by a bit of SHORT.
BITWISE = ("exact", "recompute", "states", "windows", "pipeline")


def stack_of(case: Case, comm, **options) -> LayerParallel:
    return LayerParallel(case.make, N, T, comm, **{"accuracy": UNCHECKED, "vmap": False, **options})


class Inside(nn.Module):
    """A block that casts by itself."""

    def __init__(self):
        super().__init__()
        self.net = Mlp()

    def forward(self, u):
        with torch.autocast("cpu", SHORT):
            return self.net(u)


class Kinds(nn.Module):
    """Notes what its matrix product is made in."""

    seen: list = []

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u):
        end = self.linear(u)
        Kinds.seen.append((end.dtype, u.dtype))
        return torch.tanh(end)


def looped(state, case: Case, u, casts: bool, inner: bool = False):
    """Output and gradients; `inner`: of what is within the blocks that cast by themselves."""
    modules = unstacked(state, case).float()
    end = u
    for module in modules:
        with torch.autocast("cpu", SHORT, enabled=casts):
            change = (module.net if inner else module)(end)
        end = end + T / N * change.float()
    loss_of(end).backward()
    return end.detach(), loop_gradients(modules)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("how", EXACT)
@pytest.mark.parametrize("name", ["mlp", "attention", "convolution", "inside"])
def test_blocks_are_cast_as_in_a_loop(spmd, name, how):
    case = Case(Inside, CASES["mlp"].shape) if name == "inside" else CASES[name]
    u = case.input().float()

    def body(comm):
        stack = stack_of(case, comm, **EXACT[how])
        v = u.clone().requires_grad_()
        with torch.autocast("cpu", SHORT, enabled=name != "inside"):
            output = stack(v)
        loss_of(output).backward()
        assert output.dtype == v.grad.dtype == torch.float32
        return stack.state_dict(), output.detach(), gradients(stack), v.grad

    results = spmd(body)
    state = results[0][0]
    v = u.clone().requires_grad_()
    wanted, slopes = looped(state, case, v, name != "inside")
    plain, _ = looped(state, case, u, False, name == "inside")
    bound = 1e-6 if how in BITWISE else 0.05
    for _, output, found, of_u in results:
        assert distance(output, wanted) < bound and distance(found, slopes) < bound and distance(of_u, v.grad) < bound
    assert distance(wanted, plain) > 1e-5, "the cast makes a difference"


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("around", [False, True])
@pytest.mark.parametrize("how", EXACT)
def test_every_evaluation_is_made_in_the_type_of_the_forward_pass(spmd, how, around):
    """Also if the backward pass is made under another autocast, or none."""
    case = Case(Kinds, (6, C))

    def body(comm):
        stack = stack_of(case, comm, **EXACT[how])
        u = case.input().float()
        stack(u)
        comm.barrier()
        Kinds.seen = []
        comm.barrier()
        with torch.autocast("cpu", SHORT, enabled=not around):
            output = stack(u)
        with torch.autocast("cpu", SHORT, enabled=around):
            loss_of(output).backward()
        comm.barrier()
        return set(Kinds.seen)

    kinds = {(torch.float32 if around else SHORT, torch.float32)}
    assert all(seen == kinds for seen in spmd(body))


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("recompute", [False, True])
def test_modules_one_behind_the_other(spmd, recompute):
    """The state between modules may be short; an evaluation again is cast as the first one."""

    def body(comm):
        with own_random_numbers(3):
            made = [nn.Linear(C, 8), nn.Tanh(), nn.Linear(8, C), Mlp()]
        plain = nn.Sequential(*copy.deepcopy(made))
        model = PipelineParallel(made, comm, portions=1, recompute=recompute)
        u = CASES["mlp"].input().float()
        with torch.autocast("cpu", SHORT):
            outputs = model(u), plain(u)
        for output in outputs:
            loss_of(output.float()).backward()
        slopes = [p.grad for number in model.layers for p in plain[int(number)].parameters()]
        pairs = [outputs, *zip((p.grad for p in model.parameters()), slopes, strict=True)]
        return [distance(a.detach().float(), b.detach().float()) for a, b in pairs]

    assert all(max(found) < 1e-6 for found in spmd(body))


# ---- Trees, further inputs and times


@dataclass
class Pair:
    x: torch.Tensor
    y: torch.Tensor


class Shortened(nn.Module):
    """Two tensors, of which the second one comes out as short as the cast leaves it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(C, C), nn.Linear(C, C)

    def move(self, x, y):
        return x + torch.tanh(self.a(y))[:, None] / 8, self.b(torch.tanh(y) + x.mean(1))


class AsTuple(Shortened):
    def forward(self, state):
        return self.move(*state)


class AsPair(Shortened):
    """Both come out short."""

    def forward(self, state):
        return Pair(self.a(torch.tanh(state.x) + state.y[:, None]), self.b(torch.tanh(state.y) + state.x.mean(1)))


class AtTime(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u, t):
        return u + torch.tanh(self.linear(u)) * (1.0 + t) / 8


class Short(nn.Module):
    """Gives what the cast leaves: nothing else holds it to the type of the state."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u, memory):
        return self.linear(torch.tanh(u) + memory.mean(1, keepdim=True))


def decoder_case():
    (memory,), named = decoder_inputs(False)
    named = {"mask": named["mask"], "tables": (named["tables"][0].float(),), "scale": 2.0}
    asked = [memory.float().requires_grad_(), named["tables"][0].requires_grad_()]
    return input_of().float().requires_grad_(), (asked[0],), named, asked


def pair_case(kind=tuple):
    x, y = input_of().float().requires_grad_(), input_of()[:, 0].float().requires_grad_()
    return ((x, y) if kind is tuple else kind(x, y)), (), {}, [x, y]


def short_case():
    memory = input_of().float().requires_grad_()
    return input_of().float().requires_grad_(), (memory,), {}, [memory]


# What makes a block, a state with further inputs and what of it gets gradients, and the loss of the end.
MORE = {
    "further inputs": (Decoder, decoder_case, loss_of),
    "a tuple": (AsTuple, pair_case, lambda s: loss_of(s[0]) + loss_of(s[1], 8)),
    "a dataclass": (AsPair, lambda: pair_case(Pair), lambda s: loss_of(s.x) + loss_of(s.y, 8)),
    "the time": (AtTime, lambda: (input_of().float().requires_grad_(), (), {}, []), loss_of),
    "a short end": (Short, short_case, loss_of),
}
MODULES = {"modules": (1, False), "modules, recompute": (1, True), "modules, 3 portions": (3, False)}


def as_floats(state):
    """The state in the type of the weights, as a stack has it between its layers."""
    leaves, structure = flatten(state)
    return structure.build([leaf.float() for leaf in leaves])


def blocks_of(make, unlike: bool) -> nn.ModuleList:
    with own_random_numbers(3):
        found = nn.ModuleList(make() for _ in range(N))
    if unlike:
        found[4].number = 3  # an attribute is enough
    return found


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("how", [*EXACT, *MODULES])
@pytest.mark.parametrize("name", MORE)
def test_trees_further_inputs_and_times_are_cast_as_in_a_loop(spmd, name, how):
    make, case, loss = MORE[name]
    modules, options = how in MODULES, {"accuracy": UNCHECKED} | EXACT.get(how, {})
    if modules:
        portions, recompute = MODULES[how]
        options = {"mgrit": MGRIT(cycle="pipeline", portions=portions), "recompute": recompute}

    def body(comm):
        model = LayerParallel.from_blocks(blocks_of(make, modules), comm, T=T, **options)
        assert isinstance(model, PipelineParallel) == modules
        u, inputs, named, asked = case()
        with torch.autocast("cpu", SHORT):
            output = model(u, *inputs, **named)
        with torch.autocast("cpu", SHORT, enabled=how in ("recompute", "modules, recompute")):  # which changes nothing
            loss(as_floats(output)).backward()
        assert modules or {leaf.dtype for leaf in flatten(output)[0]} == {torch.float32}
        slopes = [p.grad for p in model.parameters()] if modules else gradients(model)
        numbers = model.own_layers if modules else None
        return [leaf.detach().float() for leaf in flatten(output)[0]], slopes, numbers, [each.grad for each in asked]

    def looped(casts: bool):
        blocks = blocks_of(make, modules)
        u, inputs, named, asked = case()
        end = u
        with torch.autocast("cpu", SHORT, enabled=casts):
            for n, block in enumerate(blocks):
                end = block(end, *inputs, **named, **({"t": n * T / N} if name == "the time" else {}))
                end = end if modules else as_floats(end)
        loss(as_floats(end)).backward()
        return [leaf.detach().float() for leaf in flatten(end)[0]], blocks, [each.grad for each in asked]

    ends, blocks, backs = looped(True)
    plain, _, _ = looped(False)
    # Gradients of the weights are short for each portion.
    bound = 2e-6 if how in BITWISE or (modules and portions == 1) else 0.05
    for found, slopes, numbers, asked in spmd(body):
        wanted = (
            loop_gradients(blocks) if numbers is None else [p.grad for n in numbers for p in blocks[n].parameters()]
        )
        assert all(distance(a, b) < bound for a, b in zip(found, ends, strict=True))
        assert all(distance(a, b) < bound for a, b in zip(asked, backs, strict=True))
        if numbers is None:
            assert distance(slopes, wanted) < bound
        else:
            assert all(distance(a, b) < bound for a, b in zip(slopes, wanted, strict=True))
    assert max(distance(a, b) for a, b in zip(ends, plain, strict=True)) > 1e-5, "the cast makes a difference"


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("kind", [LayerParallel, PipelineParallel])
def test_short_states_and_inputs_from_around(spmd, kind):
    """What comes out of a linear layer under an autocast, on ranks of which some have no layer."""

    def case():
        with own_random_numbers(5):
            opening = nn.Linear(C, C)
        return opening, input_of().float()

    def blocks():
        with own_random_numbers(3):
            return [Short(), Short()]

    def body(comm):
        opening, x = case()
        if kind is LayerParallel:
            model = LayerParallel.from_blocks(blocks(), comm, mgrit=MGRIT(max_levels=1))
        else:
            model = PipelineParallel(blocks(), comm, portions=1)
        with torch.autocast("cpu", SHORT):
            u = opening(x)
            assert u.dtype == SHORT
            output = model(u, u * 2)
        loss_of(output.float()).backward()
        return output.detach().float(), opening.weight.grad

    opening, x = case()
    with torch.autocast("cpu", SHORT):
        u = opening(x)
        memory, end = u * 2, u
        for block in blocks():
            end = block(end, memory)
    loss_of(end.float()).backward()
    for found, slope in spmd(body):
        assert distance(found, end.detach().float()) < 2e-2 and distance(slope, opening.weight.grad) < 2e-2


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("recompute", [False, True])
def test_modules_with_and_without_a_cast_in_turn(spmd, recompute):
    """Each call is cast as it was made, whatever the one before was like, and whatever is on in the backward pass."""
    case = Case(Kinds, (6, C))

    def body(comm):
        with own_random_numbers(3):
            made = [Kinds() for _ in range(4)]
        model = PipelineParallel(made, comm, portions=2, recompute=recompute)
        u = case.input().float()
        found = []
        for casts in (False, True, False):
            comm.barrier()
            Kinds.seen = []
            comm.barrier()
            with torch.autocast("cpu", SHORT, enabled=casts):
                output = model(u)
            with torch.autocast("cpu", SHORT, enabled=not casts):
                loss_of(output.float()).backward()
            comm.barrier()
            found.append({dtype for dtype, _ in Kinds.seen})
            comm.barrier()
        return found

    assert all(found == [{torch.float32}, {SHORT}, {torch.float32}] for found in spmd(body))


@pytest.mark.ranks(1, 3)
def test_a_recurrent_network_casts_nothing(spmd):
    """Called with what an autocast has made shorter, and gone back through under it: as without."""

    def body(comm):
        model = ParallelGRU(3, C, comm=comm, windows=2)
        x = torch.randn(9, 2, 3, generator=torch.Generator().manual_seed(1)).to(SHORT)
        found = []
        for cast in (False, True):
            model.zero_grad()
            with torch.autocast("cpu", SHORT, enabled=cast):
                output, end = model(x if cast else x.float())
                (loss_of(output.float()) + end.sum()).backward()
            found.append([output.detach(), end.detach(), *(p.grad.clone() for p in model.parameters())])
        return [torch.equal(a, b) for a, b in zip(*found, strict=True)]

    assert all(all(same) for same in spmd(body))
