"""Portions of a batch that follow each other through the ranks: exact, and the same bits on any number of ranks.

Shape letters: `N` layers, `M` portions, `B` batch.
"""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, C, Case, distance, gradients, loop, loop_gradients, loss_of, unstacked
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
    Splines,
    broadcast_loss,
    parallel_stages,
)

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
