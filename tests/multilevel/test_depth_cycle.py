"""MG/OPT in depth over stacks: against a literal V-cycle, its coarse objective, any number of ranks, and its limits.

Shape letters: `N` layers.
"""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch
from blocks import CASES, UNCHECKED, B, C, distance, linear, loss_of
from blocks import reduced as message_of
from processes import PROJECT
from torch import nn
from torch.func import functional_call

from xbraid_py import (
    MGRIT,
    DepthCycle,
    LayerGrid,
    LayerParallel,
    PipelineParallel,
    ProcessGrid,
    Splines,
    as_communicator,
    load_checkpoint,
    save_checkpoint,
)
from xbraid_py.optim.levels import Point

EXACT = {"mgrit": MGRIT(max_levels=1), "accuracy": UNCHECKED}
T, RATE = 2.0, 0.05


def network(comm, num_layers=8, kind="mlp", **options) -> nn.Sequential:
    """Opening, layers and head, in double precision."""
    stack = CASES[kind].stack(comm, num_layers, T, **{**EXACT, **options})
    return nn.Sequential(linear(C, C, 1), stack, linear(C, 2, 2))


def batch_loss(model: nn.Module, update: int) -> torch.Tensor:
    return loss_of(model(CASES["mlp"].input(update)), update) / B


# The reference: weights are a dict of tensors, of the layers (N, *shape); everything else is spelled out.


def reference_loss(x: dict, update: int, kind: str = "mlp") -> torch.Tensor:
    block = CASES[kind].block()
    names = [name for name, _ in block.named_parameters()]
    N = len(x[f"1.layers.{names[0]}"])
    u = CASES["mlp"].input(update) @ x["0.weight"].T + x["0.bias"]
    for n in range(N):
        u = u + T / N * functional_call(block, {name: x[f"1.layers.{name}"][n] for name in names}, u)
    return loss_of(u @ x["2.weight"].T + x["2.bias"], update) / B


def reference_gradient(x: dict, update: int) -> dict:
    leaves = {name: value.clone().requires_grad_() for name, value in x.items()}
    reference_loss(leaves, update).backward()
    return {name: value.grad for name, value in leaves.items()}


def matrix(N: int, interpolation: str) -> torch.Tensor:
    """I (N, N/2), entry by entry (paper 001, eq. 8)."""
    found = torch.zeros(N, N // 2, dtype=torch.float64)
    for k in range(N // 2):
        found[2 * k, k] = 1
        for column in (k, k) if interpolation == "constant" else (k, min(k + 1, N // 2 - 1)):
            found[2 * k + 1, column] += 0.5
    return found


def moved(x: dict, how: torch.Tensor) -> dict:
    return {name: torch.einsum("kn,n...->k...", how, v) if name.startswith("1.") else v for name, v in x.items()}


def restricted(x: dict, restriction: str, interpolation: str) -> dict:
    N = len(next(v for name, v in x.items() if name.startswith("1.")))
    if restriction == "transpose":
        return moved(x, matrix(N, interpolation).T)
    first = torch.tensor([1.0, 0.0] if restriction == "inject" else [0.5, 0.5], dtype=torch.float64)
    return moved(x, torch.kron(torch.eye(N // 2, dtype=torch.float64), first[None]))


def plus(x: dict, factor: float, y: dict) -> dict:
    return {name: x[name] + factor * y[name] for name in x}


def reference_cycle(x: dict, steps: list, update: int, restriction: str, interpolation: str, shift=None) -> dict:
    """Algorithm 1 of the paper with gradient descent (algorithm 2); `shift` is dg."""

    def gradient(y: dict) -> dict:
        found = reference_gradient(y, update)
        return found if shift is None else plus(found, 1.0, shift)

    (before, behind), *below = steps
    for _ in range(before):
        x = plus(x, -RATE, gradient(x))
    if below:
        N = len(next(v for name, v in x.items() if name.startswith("1.")))
        start = restricted(x, restriction, interpolation)
        dg = plus(moved(gradient(x), matrix(N, interpolation).T), -1.0, reference_gradient(start, update))  # eq. 9
        end = reference_cycle(start, below, update, restriction, interpolation, dg)
        x = plus(x, 1.0, moved(plus(end, -1.0, start), matrix(N, interpolation)))
    for _ in range(behind):
        x = plus(x, -RATE, gradient(x))
    return x


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize(
    "schedule, interpolation, restriction",
    [
        ("[(1), {2}]", "constant", "transpose"),
        ("[(1), 1, {2}]", "constant", "inject"),
        ("[0/1, 2/1, {1}]", "linear", "average"),
    ],
)
def test_cycles_are_the_papers_spelled_out(spmd, schedule, interpolation, restriction):
    def body(comm):
        model = network(comm)
        cycle = DepthCycle(model, schedule=schedule, interpolation=interpolation, restriction=restriction)
        optimizer = torch.optim.SGD(cycle.parameters(), RATE)
        states, losses = [model.state_dict()], []
        states[0] = {name: value.clone() for name, value in states[0].items()}
        for update in range(2):
            losses.append(cycle.step(optimizer, partial(batch_loss, update=update)))
            states.append({name: value.clone() for name, value in model.state_dict().items()})
        return states, losses, cycle.work, cycle.schedule

    for states, losses, work, steps in spmd(body):
        pairs = [*zip(steps.pre, steps.post, strict=True), (steps.coarse, 0)]
        for update in range(2):
            wanted = reference_cycle(states[update], pairs, update, restriction, interpolation)
            change = plus(wanted, -1.0, states[update])
            assert distance(plus(states[update + 1], -1.0, states[update]), change) < 1e-11
            assert losses[update] == pytest.approx(float(reference_loss(states[update], update)), rel=1e-12)
        assert work == pytest.approx(2 * steps.work())  # eq. 10


@pytest.mark.ranks(1, 3)
def test_the_coarse_objective_and_its_gradient(spmd):
    """H against its words, its gradient against differences of H, and both gradients where the coarse level begins."""

    def body(comm):
        cycle = DepthCycle(network(comm), levels=2, restriction="average")
        method = cycle._cycle
        fine, coarse = method.objectives
        for each in (fine, coarse):
            each.use(partial(batch_loss, update=3))
        x = fine.layout.vector()
        point = Point(x).complete(fine)
        objective, start = method.coupled(0, point)
        again = Point(start.x).complete(objective)
        g = method.transfers[0].restrict_gradient(point.gradient)
        y = start.x + 0.1 * torch.sin(7.0 * start.x)
        slopes = []
        for step in (1e-3, 1e-5):
            d = torch.cos(5.0 * start.x)
            ahead, behind = (objective.evaluate(y + s * d).value for s in (step, -step))
            objective.evaluate(y)
            slopes.append((ahead - behind) / (2 * step) - float(objective.dots([objective.gradient(y)], [d])))
        state = {name: v.clone() for name, v in cycle.models[0].state_dict().items()}
        coarse.load(y)
        at_y = {name: v.clone() for name, v in cycle.models[1].state_dict().items()}
        return float((again.gradient - g).abs().max()), slopes, objective.evaluate(y).value, state, at_y

    for difference, slopes, value, state, at_y in spmd(body):
        assert difference < 1e-14
        assert abs(slopes[0]) < 1e-3 and abs(slopes[1]) < 1e-8
        begin = restricted(state, "average", "constant")
        dg = plus(moved(reference_gradient(state, 3), matrix(8, "constant").T), -1.0, reference_gradient(begin, 3))
        wanted = float(reference_loss(at_y, 3)) + sum(float((dg[name] * at_y[name]).sum()) for name in dg)
        assert value == pytest.approx(wanted, rel=1e-12)


OPTIMIZERS = {
    "momentum": lambda cycle: torch.optim.SGD(cycle.parameters(), 0.05, momentum=0.9),
    "adam": lambda cycle: torch.optim.AdamW(cycle.parameters(), 0.01),
}
KINDS = {
    "plain": (8, {}),
    "pipeline": (8, {"mgrit": MGRIT(cycle="pipeline", portions=2)}),
    "windows": (8, {"windows": 2}),
    "ends": (12, {"serial_ends": (2, 2)}),
    "lengths": (LayerGrid.of_lengths((1, 3, 1, 1, 2, 2, 4, 1), T), {}),
}


def trained(comm, make, updates=3, num_layers=8, options=None, **how):
    model = network(comm, num_layers, **(options or {}))
    cycle = DepthCycle(model, levels=how.pop("levels", 3), **how)
    optimizer = make(cycle)
    losses = [cycle.step(optimizer, partial(batch_loss, update=update)) for update in range(updates)]
    return losses, {name: value.clone() for name, value in model.state_dict().items()}, cycle.work


@pytest.mark.ranks(2, 3)
@pytest.mark.parametrize("which, kind", [("momentum", "plain"), *(("adam", kind) for kind in KINDS)])
def test_the_same_bits_on_any_number_of_ranks(spmd, which, kind):
    num_layers, options = KINDS[kind]
    how = {"levels": 2 if kind == "ends" else 3, "interpolation": "linear", "line_search": True, "clip": 0.5}
    alone = trained(None, OPTIMIZERS[which], num_layers=num_layers, options=options, **how)
    found = spmd(lambda comm: trained(comm, OPTIMIZERS[which], num_layers=num_layers, options=options, **how))
    for losses, state, work in found:
        assert losses == alone[0] and work == alone[2]
        assert all(torch.equal(state[name], alone[1][name]) for name in alone[1])


@pytest.mark.ranks(1, 2)
def test_inexact_solves_come_near(spmd):
    solver = {"mgrit": MGRIT(cycle="V", cfactor=2, max_levels=2, min_coarse=1, tol=1e-9, max_iter=8)}
    exact = trained(None, OPTIMIZERS["momentum"], num_layers=16, levels=2)
    found = spmd(lambda comm: trained(comm, OPTIMIZERS["momentum"], num_layers=16, options=solver, levels=2))
    for losses, state, _ in found:
        assert losses == pytest.approx(exact[0], rel=1e-5) and distance(state, exact[1]) < 1e-4


@pytest.mark.ranks(1, 2)
def test_replicas(spmd):
    """Two replicas with half of the samples each: what one network does with all of them."""

    def body(comm):
        grid = ProcessGrid(comm, comm.size)
        cycle = DepthCycle(network(grid.layers), levels=2, grid=grid, line_search=True)
        optimizer = torch.optim.SGD(cycle.parameters(), 0.05)
        u = CASES["mlp"].input()

        def loss(model):
            return model(grid.shard(u)).square().mean()

        return [cycle.step(optimizer, loss) for _ in range(3)]

    wanted = None
    for losses in [body(as_communicator(None)), *spmd(body)]:
        wanted = wanted or losses
        assert losses == pytest.approx(wanted, rel=1e-12) and losses[2] < losses[0]


def test_the_correction_is_no_longer_than_the_minibatch_bears():
    """A coarse rate far too large: added as it is the correction does harm, by the line search none."""

    def loss(model):
        return model(CASES["mlp"].input()).square().mean()

    found = {}
    for line_search in (False, True):
        model = network(None)
        cycle = DepthCycle(model, schedule="[(1), {1}]", line_search=line_search)
        rates = zip(cycle.models, (1e-3, 30.0), strict=True)
        optimizer = torch.optim.SGD([{"params": each.parameters(), "lr": rate} for each, rate in rates])
        before = cycle.step(optimizer, loss)
        found[line_search] = float(loss(model).detach()) - before, cycle.work
    assert found[False][0] > 0.1 and found[True][0] < 0.0
    assert found[False][1] == cycle.schedule.work() < found[True][1]  # trials cost thirds of a gradient


def test_without_coupling_and_correction():
    model = network(None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cycle = DepthCycle(model, schedule="[(0), {1}]", correction=0.0)
    cycle.step(torch.optim.SGD(cycle.parameters(), RATE), partial(batch_loss, update=0))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    cycle = DepthCycle(model, schedule="[(0), {1}]", coupling=0.0)
    cycle.step(torch.optim.SGD(cycle.parameters(), RATE), partial(batch_loss, update=0))
    coarse = plus(restricted(before, "inject", "constant"), 0.0, restricted(before, "inject", "constant"))
    change = {name: -RATE * value for name, value in reference_gradient(coarse, 0).items()}
    wanted = plus(before, 1.0, moved(change, matrix(8, "constant")))
    assert distance(model.state_dict(), wanted) < 1e-13


def test_frozen_weights_stay():
    model = network(None)
    model[0].requires_grad_(False)
    model[1].layers.get_parameter("net.1.weight").requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    cycle = DepthCycle(model)
    optimizer = torch.optim.SGD([p for p in cycle.parameters() if p.requires_grad], RATE)
    cycle.step(optimizer, partial(batch_loss, update=0))
    same = [name for name, value in model.state_dict().items() if torch.equal(before[name], value)]
    assert same == ["0.weight", "0.bias", "1.layers.net.1.weight"]


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("which", OPTIMIZERS)
def test_a_training_goes_on_from_a_checkpoint(spmd, shared_tmp_path, which):
    path = shared_tmp_path / "cycle.h5"

    def body(comm):
        found = []
        for stops in (False, True):
            cycle = DepthCycle(network(comm), levels=2)
            optimizer = OPTIMIZERS[which](cycle)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            losses = []
            for update in range(4):
                losses.append(cycle.step(optimizer, partial(batch_loss, update=update)))
                schedule.step()
                if stops and update == 1:
                    save_checkpoint(path, cycle, optimizer, scheduler=schedule)
                    cycle = DepthCycle(network(comm, seed=5), levels=2)
                    optimizer = OPTIMIZERS[which](cycle)
                    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
                    load_checkpoint(path, cycle, optimizer, scheduler=schedule)
            found.append((losses, cycle.work, {name: v.clone() for name, v in cycle.models[0].state_dict().items()}))
        return found

    for (losses, work, state), (again, same, resumed) in spmd(body):
        assert losses == again and work == same > 0
        assert all(torch.equal(state[name], resumed[name]) for name in state)


@pytest.mark.ranks(1, 2)
def test_what_is_refused(spmd):
    def body(comm):
        model = network(comm)
        stack = partial(CASES["mlp"].stack, **EXACT)
        maps = LayerParallel(lambda: nn.Linear(4, 4), 8, comm=comm, form="map", **EXACT)
        pipeline = PipelineParallel([linear(4, 4, n) for n in range(4)], comm)
        cycle = DepthCycle(network(comm), levels=2)
        made = [
            lambda: DepthCycle(nn.Linear(2, 2)),
            lambda: DepthCycle(maps),
            lambda: DepthCycle(nn.Sequential(stack(comm, 8), pipeline)),
            lambda: DepthCycle(stack(comm, 8, splines=Splines(4))),
            lambda: DepthCycle(stack(comm, 8, output="last")),
            lambda: DepthCycle(nn.Sequential(stack(comm, 8), nn.Linear(4, 4))),
            lambda: DepthCycle(stack(comm, 6, windows=2), levels=2),
            lambda: DepthCycle(stack(comm, 8, serial_ends=(1, 2)), levels=2),
            lambda: DepthCycle(model, levels=5),
            lambda: DepthCycle(model, levels=0),
            lambda: DepthCycle(model, clip=-1.0),
            lambda: DepthCycle(model, schedule="1, 2"),
            lambda: DepthCycle(model, restriction="sum"),
            lambda: DepthCycle(model, correction=2.0),
            lambda: cycle.step(torch.optim.SGD(cycle.models[0].parameters(), 0.1), partial(batch_loss, update=0)),
        ]
        return [message_of(comm, call) for call in made]

    words = (
        "holds no LayerParallel",
        "form='map'",
        "PipelineParallel",
        "splines in depth have no coarser level",
        'output="last"',
        "weights of 2 types",
        "windows=2, serial_ends=(0, 0) of num_layers=6 would cut 3 and 6 layers at other places",
        "serial_ends=(1, 2) of num_layers=8 would cut 4 and 8 layers at other places",
        "num_layers=8 is not a multiple of 2^(levels - 1)=16; use 16",
        "levels=0 must be at least 1",
        "clip=-1.0 must be positive",
        "schedule='1, 2'",
        "restriction='sum'",
        "correction=2.0 must lie in [0, 1]",
        "has not all weights of level 1; make it of cycle.parameters()",
    )
    for found in spmd(body):
        assert len(found) == len(words)
        assert all(message is not None and word in message for word, message in zip(words, found, strict=True)), found


def test_the_code_of_the_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (PROJECT / "docs" / "pytorch.md").read_text()
    names = {}
    for block in re.findall(r"^```python\n(.*?)^```", page, re.M | re.S):
        exec(compile(block, "pytorch.md", "exec"), names)
    assert names["model"][1].grid.num_layers == 64 and len(names["cycle"].models) == 3
    assert names["losses"][-1] < names["losses"][0] and (tmp_path / "runs" / "cycle.h5").exists()
    assert re.fullmatch(r"\d+ gradients' worth of work: the loss fell from 0\.\d+ to 0\.\d+\n", capsys.readouterr().out)
