"""Portions of a batch that follow each other through the ranks: exact, and the same bits on any number of ranks.

Shape letters: `N` layers, `M` portions, `B` batch.
"""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, C, Case, Convolution, Dropped, distance, gradients, loop, loop_gradients, loss_of, unstacked
from blocks import reduced as message_of
from image_networks import network, random
from normed import SHAPES, Normed, batch, case_of, equal, reference, train
from sequence_cases import EXACT, D, F, H, drawn, made, slopes_of, wanted_of
from sequence_cases import B as SEQUENCES
from sequence_cases import distance as farthest
from torch import nn

import xbraid_py
from xbraid_py import (
    MGRIT,
    LayerGrid,
    LayerParallel,
    PipelineParallel,
    Splines,
    broadcast_loss,
    clip_grad_norm_,
    parallel_stages,
)
from xbraid_py.layer_parallel.modules import _dealt_out

T, B = 2.0, 7
ALL = {**CASES, "moving": Case(Normed, SHAPES[1])}
ONE = MGRIT(max_levels=1)


def pipeline(portions: int | None = None) -> MGRIT:
    return MGRIT(cycle="pipeline", portions=portions)


def results(stack, u, loss=loss_of, updates: int = 1) -> dict:
    """Output, gradients and state of the last of some calls, and the output in evaluation."""
    for _ in range(updates):
        stack.zero_grad()
        u = u.detach().clone().requires_grad_()
        output = stack(u)
        loss(output).backward()
    found = {"output": output.detach(), "input": u.grad, "weights": gradients(stack)}
    found["state"] = {name: value.clone() for name, value in stack.state_dict().items()}
    with torch.no_grad():
        found["inference"] = stack.eval()(u.detach())
    return found


def of_loop(state, case, u) -> dict:
    """The same of a plain loop over modules."""
    modules = unstacked(state, case)
    u = u.clone().requires_grad_()
    output = loop(modules, u, T)
    loss_of(output).backward()
    return {"output": output.detach(), "input": u.grad, "weights": loop_gradients(modules)}


def same_bits(a, b) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_bits(a[key], b[key]) for key in a)
    return torch.equal(a, b)


ONE_PORTION, THREE = pipeline(1), pipeline(3)

# ---- Stacks of layers of one kind


@pytest.mark.parametrize(
    ("block", "portions", "options"),
    [
        ("dense", 3, {}),
        ("dense", 2, {"windows": 2}),
        ("dense sequences", 4, {"recompute": "states"}),
        ("mlp", None, {}),
        ("mlp", 7, {"windows": 3, "recompute": True}),
        ("convolution", 3, {}),
        ("convolution", 4, {"recompute": True}),
        ("convolution", 5, {"recompute": "states"}),
        ("convolution", 50, {"recompute": "all"}),
        ("attention", 2, {"windows": 2}),
        ("library attention", 3, {"vmap": True}),
        ("tied", 4, {}),
        ("frozen", 3, {"recompute": "states"}),
    ],
)
def test_a_stack_is_the_plain_loop(spmd, block, portions, options):
    case = ALL[block]

    def stack(comm):
        return case.stack(comm, 7, T, mgrit=pipeline(portions), **options)

    serial = results(stack(None), case.input(batch=B))
    exact = of_loop(serial["state"], case, case.input(batch=B))
    for found in spmd(lambda comm: results(stack(comm), case.input(batch=B))):
        assert same_bits(found, serial)
    for key, value in exact.items():
        assert distance(serial[key], value) < 1e-12, key
    assert distance(serial["inference"], exact["output"]) < 1e-12


@pytest.mark.parametrize("block", ["dense", "convolution", "dropout", "moving"])
def test_one_portion_has_the_bits_of_sequential_propagation(spmd, block):
    case = ALL[block]

    def body(comm, mgrit=ONE_PORTION):
        return results(case.stack(comm, 5, T, mgrit=mgrit), case.input(), updates=2)

    exact = body(None, ONE)
    for found in spmd(body):
        exact["inference"] = found["inference"]  # in other portions
        assert same_bits(found, exact)


@pytest.mark.parametrize("recompute", [False, "all"])
def test_dropout_is_one_network_for_each_portion(spmd, recompute):
    """The same bits on any number of ranks, with graphs kept or made again; portions do not share their masks."""
    case = ALL["dropout"]

    def body(comm, how=recompute):
        return results(case.stack(comm, 5, T, mgrit=pipeline(3), recompute=how), case.input(batch=B), updates=2)

    serial = body(None, True)
    assert all(same_bits(found, serial) for found in spmd(body))
    one_sample = case.input(batch=1).expand(6, -1).contiguous()
    first, second = case.stack(None, 5, T, mgrit=pipeline(2))(one_sample).detach().split(3)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("dims", "momentum", "recompute"), [(1, 0.3, False), (2, None, False), (2, 0.3, "states")])
def test_statistics_of_a_batch_from_those_of_its_portions(spmd, dims, momentum, recompute):
    """Against the literal loop; 6 samples in at most 3 portions: the variance of one value is none."""
    case = case_of(dims, momentum=momentum)

    def body(comm):
        stack = case.stack(comm, 9, T, mgrit=pipeline(5), recompute=recompute)
        start = {name: value.clone() for name, value in stack.state_dict().items()}
        return start, train(stack, stack, case)

    found = spmd(body)
    equal(found[0][1], reference(found[0][0], case, dims, momentum), 1e-12)
    assert all(same_bits(a, b) for _, record in found for a, b in zip(record, found[0][1], strict=True))
    assert batch(case, 0).shape[0] == 6


@pytest.mark.parametrize("recompute", [False, "states"])
def test_output_on_the_last_rank_alone(spmd, recompute):
    case = CASES["convolution"]

    def body(comm):
        stack = case.stack(comm, 6, T, mgrit=pipeline(3), output="last", recompute=recompute)
        found = results(stack, case.input(batch=B), lambda out: broadcast_loss(loss_of(out), comm, stack.last_rank))
        return found, stack.first_rank, stack.last_rank

    results_of_all = spmd(body)
    exact = of_loop(results_of_all[0][0]["state"], case, case.input(batch=B))
    for rank, (found, first, last) in enumerate(results_of_all):
        assert distance(found["weights"], exact["weights"]) < 1e-12
        for key, owner in (("output", last), ("inference", last), ("input", first)):
            value = exact["output" if key == "inference" else key]
            assert distance(found[key], value) < 1e-12 if rank == owner else not found[key].any(), key


def test_splines_and_grids_of_several_lengths(spmd):
    case, grid = CASES["mlp"], LayerGrid(6, T, (1, 2, 3, 1, 1, 2))

    def body(comm, mgrit=THREE):
        found = []
        for layers, options in ((grid, {}), (grid, {"windows": 2}), (6, {"splines": Splines(4, 2)})):
            stack = LayerParallel(case.block, layers, T, comm, mgrit=mgrit, **options)
            u = case.input(batch=B).requires_grad_()
            output = stack(u)
            loss_of(output).backward()
            if "splines" in options:
                weights = {name: p.grad for name, p in stack.layers.named_parameters()}
            else:
                weights = gradients(stack)
            found.append({"output": output.detach(), "input": u.grad, "weights": weights})
        return found

    exact, serial = body(None, ONE), body(None)
    for found in spmd(body):
        assert all(map(same_bits, found, serial))
    for mine, wanted in zip(serial, exact, strict=True):
        assert all(distance(mine[key], wanted[key]) < 1e-12 for key in wanted)


@pytest.mark.parametrize("recompute", [False, "states"])
def test_a_graph_that_is_kept_gives_the_same_again(spmd, recompute):
    case = CASES["convolution"]

    def body(comm):
        stack = case.stack(comm, 5, T, mgrit=pipeline(3), recompute=recompute)
        u = case.input(batch=B).requires_grad_()
        loss = loss_of(stack(u))
        loss.backward(retain_graph=True)
        once = gradients(stack)
        loss.backward()
        return distance(gradients(stack), {name: 2.0 * value for name, value in once.items()})

    assert max(spmd(body)) < 1e-14


def test_what_the_record_says(spmd):
    def body(comm):
        stack = CASES["mlp"].stack(comm, 5, T, mgrit=pipeline(2), accuracy=xbraid_py.GradientControl(check=1))
        for _ in range(2):
            loss_of(stack(CASES["mlp"].input())).backward()
        return stack.record

    for record in spmd(body):
        assert (record.update, record.mode, record.level, record.gradient_error) == (2, "exact", 0, 0.0)
        assert (record.iterations, record.adjoint_iterations, record.measured) == (1, 1, False)


def test_a_rank_makes_graphs_of_few_portions_at_a_time(spmd):
    """With only the input kept: as many as there are ranks from it on; and all of them otherwise."""
    case = CASES["convolution"]

    def body(comm):
        most = {}
        for recompute in (False, "states"):
            stack = case.stack(comm, 10, T, mgrit=pipeline(7), recompute=recompute)
            runs = []
            window = stack.windows[0]
            propagation = window.propagation
            window.propagation = lambda *args, made=propagation, runs=runs: runs.append(made(*args)) or runs[-1]
            output = stack(case.input(batch=B))
            held = []
            run = runs[0]
            backward = run._backward
            run._backward = lambda *args, run=run, back=backward, held=held: held.append(len(run._kept)) or back(*args)
            loss_of(output).backward()
            most[recompute] = max(held)
        return most

    found = spmd(body)
    for rank, most in enumerate(found):
        assert most == {False: 7, "states": len(found) - rank}


class _Mixing(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u):
        return self.linear(u - u.mean(0))


def test_what_cannot_be_cut_in_portions_is_refused(spmd):
    def body(comm):
        case = Case(_Mixing, (6, C))
        V = MGRIT(cycle="V")
        return [
            message_of(comm, lambda: case.stack(comm, 4, T, mgrit=pipeline(2))(case.input())),
            message_of(comm, lambda: case.stack(comm, 4, T, mgrit=pipeline(1))(case.input())),
            message_of(comm, lambda: case.stack(comm, 4, T, mgrit=pipeline(2), adjoint=V)),
            message_of(comm, lambda: case.stack(comm, 4, T, mgrit=pipeline(2), adjoint=pipeline(3))),
            message_of(comm, lambda: case.stack(comm, 4, T, mgrit=MGRIT(cycle="V", portions=2))),
            message_of(comm, lambda: made(comm, mgrit=MGRIT(portions=2))),
        ]

    for mixed, whole, cycle, portions, of_others, of_gru in spmd(body):
        assert mixed.startswith("ValueError: block=_Mixing makes something else of some of the samples than of all")
        assert whole is None
        assert cycle.startswith("ValueError: cycle='V' of adjoint with cycle='pipeline' of mgrit")
        assert portions.startswith("ValueError: portions=3 of adjoint must be those of mgrit, portions=2")
        assert of_others.startswith("ValueError: portions=2 with cycle='V': a module solves for all samples at once")
        assert of_gru.startswith("ValueError: portions=2 with cycle='lagged'")


def test_stages_of_a_residual_network(spmd):
    images = random(B, 3, 8, 8)

    def gradients_of(net):
        logits = net(images)
        loss_of(logits).backward()
        return logits.detach()

    def body(comm):
        net = parallel_stages(network(3, norm="group", blocks=(4, 3, 2)), comm, mgrit=pipeline(3))
        return gradients_of(net), net.gradients()

    plain = network(3, norm="group", blocks=(4, 3, 2))
    logits = gradients_of(plain)
    wanted = {name: p.grad for name, p in plain.named_parameters()}
    results_of_all = spmd(body)
    for found, found_gradients in results_of_all:
        assert distance(found, logits) < 1e-12 and distance(found_gradients, wanted) < 1e-12
        assert same_bits(found_gradients, results_of_all[0][1])


# ---- Modules of any kind


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


def test_costs_are_dealt_out_as_evenly_as_can_be():
    def greatest(partition, costs):
        return max(sum(costs[a:b]) for a, b in zip(partition.bounds, partition.bounds[1:], strict=False))

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = torch.rand(8, generator=generator).mul(4).round().tolist()
        best = min(max(sum(costs[:a]), sum(costs[a:b]), sum(costs[b:])) for a in range(9) for b in range(a, 9))
        found = _dealt_out(8, costs, 3)
        assert found.num_ranks == 3 and found.num_rows == 8 and greatest(found, costs) == pytest.approx(best)
    assert _dealt_out(5, [0.1] * 5, 2).counts == (3, 2)
    assert _dealt_out(7, None, 3).counts == (3, 2, 2)
    assert _dealt_out(2, [1.0, 9.0], 3).counts == (1, 1, 0)


# ---- Recurrent networks, whose layers are the steps of a sequence


@pytest.mark.parametrize(
    ("kind", "portions", "windows", "length"),
    [("plain", 1, 1, 29), ("plain", 3, 2, 29), ("implicit", 2, 1, 80), ("implicit", 2, 3, 2), ("plain", None, 3, 7)],
)
def test_a_recurrent_network_is_the_loop(spmd, kind, portions, windows, length):
    dt = 1.0 if kind == "plain" else 0.8

    def body(comm):
        model = made(comm, mgrit=pipeline(portions), windows=windows, kind=kind, dt=dt)
        found = slopes_of(model, tuple(model.parameters()), length)
        record = model.record
        with torch.no_grad():
            found += model.eval()(drawn(length, SEQUENCES, F, seed=1), drawn(D, SEQUENCES, H, seed=2))
        return found, model.state_dict(), set(record.forward_sweeps + record.adjoint_sweeps)

    serial, state, _ = body(None)
    for found, _, sweeps in spmd(body):
        assert all(map(torch.equal, found, serial)) and sweeps == {1}
    wanted = wanted_of(state, length, kind, dt)
    assert farthest(serial, [*wanted, *wanted[:2]]) < EXACT


def test_a_recurrent_network_is_that_of_torch(spmd):
    def body(comm):
        model = made(comm, mgrit=pipeline(2), batch_first=True, output="own")
        x, steps = drawn(SEQUENCES, 11, F).requires_grad_(), model.own_steps(11)
        slope = drawn(SEQUENCES, 11, H, seed=3)
        output, _ = model(x)
        found = torch.autograd.grad((output * slope[:, steps]).sum(), (x, *model.parameters()))
        return found, model.state_dict()

    theirs = nn.GRU(F, H, D, batch_first=True, dtype=torch.float64)
    results_of_all = spmd(body)
    theirs.load_state_dict(results_of_all[0][1])
    x = drawn(SEQUENCES, 11, F).requires_grad_()
    wanted = torch.autograd.grad((theirs(x)[0] * drawn(SEQUENCES, 11, H, seed=3)).sum(), (x, *theirs.parameters()))
    for found, _ in results_of_all:
        assert farthest(found, wanted) < EXACT
