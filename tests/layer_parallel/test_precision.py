"""Stacks under `torch.autocast`: those of the same blocks in a loop, whoever evaluates them, forwards or backwards.

Shape letters: `N` layers.
"""

from __future__ import annotations

import copy

import pytest
import torch
from blocks import CASES, UNCHECKED, C, Case, Mlp, distance, gradients, loop_gradients, loss_of, unstacked
from torch import nn

from xbraid_py import MGRIT, LayerParallel, ParallelGRU, PipelineParallel
from xbraid_py.layers.module_block import own_random_numbers

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
