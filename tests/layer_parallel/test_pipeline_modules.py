"""Modules of any kind dealt out over the ranks: those of `torch.nn.Sequential`, the same bits on any number of ranks.

Shape letters: `B` batch.
"""

from __future__ import annotations

import pytest
import torch
from blocks import C, Convolution, Dropped, distance, loss_of
from blocks import reduced as message_of
from image_networks import random
from torch import nn

from xbraid_py import PipelineParallel, broadcast_loss, clip_grad_norm_
from xbraid_py.layer_parallel.modules import dealt_out

B = 7


def same_bits(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    return torch.equal(a, b)


def unlike() -> list:
    """Kinds and shapes that change; some write to their input, some have no weights."""

    def double(make):
        return lambda: make().double()

    return [
        double(lambda: nn.Conv2d(3, C, 3, padding=1)),
        nn.ReLU(inplace=True),
        double(lambda: Convolution(C)),
        double(lambda: nn.Conv2d(C, 6, 3, stride=2)),
        nn.ReLU(inplace=True),
        nn.Flatten(),
        double(lambda: nn.Linear(24, 5)),
        nn.Tanh(),
        double(lambda: nn.Linear(5, 2)),
    ]


def propagated(model: PipelineParallel, u, loss=loss_of) -> dict:
    u = u.clone().requires_grad_(u.is_floating_point())
    output = model(u)
    loss(output).backward()
    own = {f"layers.{name}": p.grad.clone() for name, p in model.layers.named_parameters()}
    parts = model.comm.bcast(model.comm.gather(own))
    found = {"output": output.detach(), "weights": {name: value for part in parts for name, value in part.items()}}
    found["state"] = {name: value.clone() for name, value in model.state_dict().items()}
    if u.grad is not None:
        found["input"] = u.grad
    with torch.no_grad():
        found["inference"] = model.eval()(u.detach())
    model.train()
    return found


def of_sequential(modules, state, u) -> dict:
    plain = nn.Sequential(*(each if isinstance(each, nn.Module) else each() for each in modules)).double()
    plain.load_state_dict({name.removeprefix("layers."): value for name, value in state.items()})
    u = u.clone().requires_grad_(u.is_floating_point())
    output = plain(u)
    loss_of(output).backward()
    found = {"output": output.detach(), "inference": output.detach()}
    found["weights"] = {f"layers.{name}": p.grad for name, p in plain.named_parameters()}
    return found | ({"input": u.grad} if u.grad is not None else {})


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("portions", "costs"), [(1, None), (3, None), (7, [1, 0, 4, 2, 0, 0, 1, 0, 1])])
def test_modules_are_those_of_a_sequential(spmd, portions, costs, recompute):
    u = random(B, 3, 6, 6)

    def body(comm):
        model = PipelineParallel(unlike(), comm, portions=portions, costs=costs, recompute=recompute)
        propagated(model, u)  # shapes are told in the first call alone
        model.zero_grad()
        return propagated(model, u)

    serial = body(None)
    assert all(same_bits(found, serial) for found in spmd(body))
    exact = of_sequential(unlike(), serial["state"], u)
    assert all(distance(serial[key], exact[key]) < 1e-12 for key in exact)


def test_numbers_of_tokens_go_in(spmd):
    tokens = torch.arange(12).reshape(6, 2) % 5
    modules = [lambda: nn.Embedding(5, 4).double(), nn.Flatten(), lambda: nn.Linear(8, 3).double()]

    def body(comm):
        return propagated(PipelineParallel(modules, comm, portions=2, output="all"), tokens)

    serial = body(None)
    assert all(same_bits(found, serial) for found in spmd(body))
    exact = of_sequential(modules, serial["state"], tokens)
    assert all(distance(serial[key], exact[key]) < 1e-12 for key in exact)


def test_training_modules(spmd):
    """Momentum, dropout, clipping, states that are loaded on another number of ranks, more ranks than modules."""
    u = random(6, C)

    def body(comm):
        modules = [lambda: Dropped().double(), lambda: nn.Linear(C, 3).double(), nn.Tanh()]
        model = PipelineParallel(modules, comm, portions=2, recompute=True)
        # A rank may have no weights, which torch's optimizers refuse.
        optimizer = torch.optim.SGD([{"params": list(model.parameters())}], 0.1, momentum=0.9)
        norms = []
        for _ in range(3):
            optimizer.zero_grad()
            loss_of(model(u)).backward()
            norms.append(clip_grad_norm_(model, 0.5))
            optimizer.step()
        state = {name: value.clone() for name, value in model.state_dict().items()}
        other = PipelineParallel(modules, comm, portions=2, seed=5)
        other.load_state_dict(state)
        with torch.no_grad():
            return {"state": state, "norms": torch.tensor(norms), "again": other.eval()(u), "here": model.eval()(u)}

    serial = body(None)
    assert same_bits(serial["again"], serial["here"])
    for found in spmd(body):
        assert same_bits(found, serial)


class Noisy(nn.Module):
    """Dropout of three kinds that is torch's own."""

    def __init__(self):
        super().__init__()
        self.linear, self.dropout = nn.Linear(C, C), nn.Dropout(0.25)
        self.attention = nn.MultiheadAttention(C, 2, 0.25, batch_first=True)

    def forward(self, u):
        v = self.dropout(self.linear(u))
        v = v + self.attention(v, v, v, need_weights=False)[0]
        return u + nn.functional.dropout(v, 0.25, self.training)


def test_random_numbers_of_torch(spmd):
    """The same in every evaluation of a call, on any number of ranks; others for each module, portion and call."""
    u = random(6, 3, C)

    def body(comm):
        found = []
        for recompute in (False, True):
            model = PipelineParallel(
                [lambda: Noisy().double()] * 4, comm, portions=3, recompute=recompute, torch_random=True
            )
            for _ in range(2):
                model.zero_grad()
                found.append(propagated(model, u))
        return found

    alone = body(None)
    assert distance(alone[0]["output"], alone[1]["output"]) > 1e-2
    # Attention is another kernel where no graph is made.
    pairs = [(alone[call], alone[2 + call]) for call in (0, 1)]
    assert all(distance(a[key], b[key]) < 1e-12 for a, b in pairs for key in ("output", "input", "weights"))
    assert same_bits(alone[0]["inference"], alone[1]["inference"])
    for found in spmd(body):
        assert all(same_bits(a, b) for a, b in zip(found, alone, strict=True))


def test_random_numbers_of_torch_that_nobody_knows_of(spmd):
    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(C, C)

        def forward(self, u):
            return nn.functional.dropout(self.linear(u), 0.5, self.training)

    def body(comm):
        model = PipelineParallel([nn.Linear(C, C), nn.Linear(C, C), Hidden()], comm)
        return message_of(comm, lambda: model(torch.ones(4, C))), message_of(
            comm, lambda: model.eval()(torch.ones(4, C))
        )

    for training, evaluation in spmd(body):
        assert "module 2 (Hidden) draws random numbers of torch's own" in training and "torch_random=True" in training
        assert evaluation is None


def test_output_of_modules_on_the_last_rank_alone(spmd):
    u = random(B, 3, 6, 6)

    def body(comm):
        model = PipelineParallel(unlike(), comm, portions=2, output="last")
        found = propagated(model, u, lambda output: broadcast_loss(loss_of(output), comm, model.last_rank))
        return found, model.first_rank, model.last_rank

    results_of_all = spmd(body)
    exact = of_sequential(unlike(), results_of_all[0][0]["state"], u)
    for rank, (found, first, last) in enumerate(results_of_all):
        assert distance(found["weights"], exact["weights"]) < 1e-12
        for key, owner in (("output", last), ("inference", last), ("input", first)):
            assert distance(found[key], exact[key]) < 1e-12 if rank == owner else not found[key].any(), key


def test_modules_that_do_not_fit_are_refused(spmd):
    shared = nn.Linear(4, 4)

    def body(comm):
        def made(modules, **options):
            return lambda: PipelineParallel(modules, comm, **options)

        def called(modules, u, **options):
            return lambda: PipelineParallel(modules, comm, portions=2, **options)(u)

        u = torch.ones(4, 4)
        return [
            message_of(comm, call)
            for call in (
                made([]),
                made([3]),
                made([shared, nn.Tanh(), shared]),
                made([nn.Tanh()], costs=[1.0, 2.0]),
                made([nn.Tanh()], output="first"),
                called([nn.Linear(4, 4), nn.BatchNorm1d(4)], u),
                called([nn.Linear(4, 4), nn.Dropout(0.5)], u),
                called([nn.Linear(4, 4)], None),
                made([lambda: 3]),
            )
        ]

    for found in spmd(body):
        beginnings = (
            "ValueError: modules=[] must have at least one",
            "TypeError: modules[0]=3 must be a module",
            "ValueError: modules[2] shares a weight with modules[0]",
            "ValueError: costs=[1.0, 2.0] must be 1 numbers",
            "ValueError: output='first' must be all or last",
            "ValueError: module 1 has BatchNorm1d () with statistics of the batch",
            "ValueError: module 1 has Dropout (), whose masks depend on the number of ranks",
            "ValueError: u=NoneType must be a tensor",
        )
        assert all(text.startswith(start) for text, start in zip(found, beginnings, strict=False)), found
        assert "modules[0]() made int; it must make an nn.Module" in found[-1]


def test_costs_aredealt_out_as_evenly_as_can_be():
    def greatest(partition, costs):
        return max(sum(costs[a:b]) for a, b in zip(partition.bounds, partition.bounds[1:], strict=False))

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = torch.rand(8, generator=generator).mul(4).round().tolist()
        best = min(max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:])) for a in range(9) for b in range(a, 9))
        found = dealt_out(8, costs, 3)
        assert found.num_ranks == 3 and found.num_rows == 8 and greatest(found, costs) == pytest.approx(best)
    assert dealt_out(5, [0.1] * 5, 2).counts == (3, 2)
    assert dealt_out(7, None, 3).counts == (3, 2, 2)
    assert dealt_out(2, [1.0, 9.0], 3).counts == (1, 1, 0)
