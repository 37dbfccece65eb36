"""Recurrent networks parallel over the sequence, against loops over time and torch.nn.GRU, on any number of ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sequence_cases import CONVERGED, EXACT, B, D, F, H, L, distance, drawn, made, slopes_of, slow_gru, wanted_of

from xbraid_py import MGRIT, ParallelGRU
from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layer_parallel.sequence.plan import SequencePlan, padded
from xbraid_py.layer_parallel.sequence.window import chained_sum
from xbraid_py.layers.gated import KINDS

# ---- Equal to the loop


@pytest.mark.parametrize("cycle", CONVERGED)
@pytest.mark.parametrize("kind", KINDS)
def test_converged_solves_are_the_loop(spmd, cycle, kind):
    dt = 1.0 if kind == "plain" else 0.8

    def body(comm):
        model = made(comm, mgrit=CONVERGED[cycle], kind=kind, dt=dt)
        found = [slopes_of(model, tuple(model.parameters()), length) for length in (L, 2)]
        wanted = [wanted_of(model.state_dict(), length, kind, dt) for length in (L, 2)]
        return max(map(distance, found, wanted)), model.record.forward_residuals

    assert max(error for error, _ in spmd(body)) < EXACT


@pytest.mark.parametrize("windows", [2, 3, 50])
def test_windows_change_nothing(spmd, windows):
    def body(comm):
        model = made(comm, windows=windows, kind="implicit")
        found = slopes_of(model, tuple(model.parameters()), L)
        return distance(found, wanted_of(model.state_dict(), L, "implicit")), model.plan(L).num_windows

    results = spmd(body)
    assert max(error for error, _ in results) < EXACT
    assert results[0][1] == min(windows, L)


def test_the_same_bits_on_any_number_of_ranks(spmd):
    # With a fixed number of iterations as well: intervals are the same, whoever owns them.
    def body(comm):
        found = []
        for mgrit in (MGRIT(intervals=4, max_iter=1), MGRIT(cycle="V", max_iter=1), MGRIT(max_levels=1)):
            model = made(comm, mgrit=mgrit, windows=2)
            found += slopes_of(model, tuple(model.parameters()), L)
        return [t.numpy().copy() for t in found]

    serial = body(SerialCommunicator())
    for rank in spmd(body):
        assert all(np.array_equal(a, b) for a, b in zip(rank, serial, strict=True))


@pytest.mark.parametrize("bias", [True, False])
def test_state_dict_goes_to_torch_and_back(bias):
    torch_gru = torch.nn.GRU(F, H, D, bias=bias, dtype=torch.float64, batch_first=True)
    model = made(bias=bias, batch_first=True, seed=7)
    assert list(model.state_dict()) == list(torch_gru.state_dict())
    torch_gru.load_state_dict(model.state_dict())
    x, found = drawn(B, L, F), []
    for module in (model, torch_gru):
        output, end = module(x)
        gradients = torch.autograd.grad(output.square().sum() + end.sum(), tuple(module.parameters()))
        found.append([output, end, *gradients])
    assert distance(*found) < EXACT
    model.load_state_dict(torch.nn.GRU(F, H, D, bias=bias).state_dict())


def test_initial_weights_are_alike_on_all_ranks_and_those_of_the_seed(spmd):
    def body(comm):
        return [made(comm, seed=seed).weight_hh_l1.detach().numpy().copy() for seed in (0, 0, 1)]

    results = spmd(body)
    for first, again, other in results:
        assert np.array_equal(first, results[0][0]) and np.array_equal(first, again)
        assert not np.array_equal(first, other)


# ---- What comes out


@pytest.mark.parametrize("windows", [1, 3])
def test_each_rank_may_have_its_own_steps(spmd, windows):
    def body(comm):
        whole, own = made(comm, windows=windows), made(comm, windows=windows, output="own")
        weights = tuple(own.parameters())
        slope, x = drawn(L, B, H, seed=3), drawn(L, B, F, seed=1).requires_grad_()
        steps = own.own_steps(L)
        output, end = own(x)
        assert not end.requires_grad
        # The loss is the sum of what the ranks make of their steps.
        found = torch.autograd.grad((output * slope[steps]).sum(), (x, *weights))
        everything, _ = whole(x)
        wanted = torch.autograd.grad((everything * slope).sum(), (x, *whole.parameters()))
        same = all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
        return same and torch.equal(output, everything[steps]), steps.tolist()

    results = spmd(body)
    assert all(same for same, _ in results)
    assert sorted(step for _, steps in results for step in steps) == list(range(L))


def test_only_the_last_states(spmd):
    def body(comm):
        model = made(comm, output="last")
        output, end = model(drawn(L, B, F, seed=1))
        gradients = torch.autograd.grad(end.square().sum(), tuple(model.parameters()))
        weights = [t.detach().clone().requires_grad_() for t in model.state_dict().values()]
        slow_end = slow_gru(weights, drawn(L, B, F, seed=1), torch.zeros(D, B, H, dtype=torch.float64))[1]
        wanted = torch.autograd.grad(slow_end.square().sum(), weights)
        return output is None, distance([end, *gradients], [slow_end, *wanted])

    assert all(nothing and error < EXACT for nothing, error in spmd(body))


def test_evaluation_without_gradients_is_exact(spmd):
    def body(comm):
        model = made(comm, mgrit=MGRIT(intervals=4, max_iter=1, tol=1.0), windows=2).eval()
        x, h_0 = drawn(L, B, F), drawn(D, B, H)
        with torch.no_grad():
            found = model(x, h_0)
            wanted = slow_gru(list(model.state_dict().values()), x, h_0)
        with_error = model(x, h_0)[0].detach()
        return distance(found, wanted), distance([with_error], [wanted[0]])

    for exact, iterated in spmd(body):
        assert exact < 1e-14 < iterated


def test_an_optimizer_does_the_same_on_every_rank(spmd):
    def body(comm):
        model = ParallelGRU(F, H, comm=comm, mgrit=MGRIT(intervals=4), output="last", dtype=torch.float64)
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-2)
        losses = []
        for update in range(20):
            x = drawn(L, B, F, seed=update % 2)
            optimizer.zero_grad()
            loss = (model(x)[1][0] - x.mean(0).repeat(1, 2)[:, :H]).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses, model.weight_hh_l0.detach().numpy().copy()

    results = spmd(body)
    losses = results[0][0]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    assert all(other == losses and np.array_equal(weights, results[0][1]) for other, weights in results)


def test_frozen_weights_and_a_slope_of_one_output_only():
    model = made()
    model.weight_ih_l0.requires_grad_(False)
    model(drawn(L, B, F))[1].sum().backward()
    assert model.weight_ih_l0.grad is None and model.weight_hh_l0.grad.abs().sum() > 0


# ---- How the solver gets there


def test_composed_coarse_steps_converge_where_euler_steps_of_a_plain_unit_do_not():
    def error(kind, coarse, iterations):
        options = MGRIT(cycle="V", cfactor=8, max_levels=2, max_iter=iterations, nrelax=0)
        model = ParallelGRU(F, 16, mgrit=options, kind=kind, coarse=coarse, output="last", dtype=torch.float64)
        exact = model.state_dict()
        x = torch.sin(torch.linspace(0, 20, 256, dtype=torch.float64))[:, None, None] * drawn(1, B, F)
        found = model(x)[1].detach()
        reference = ParallelGRU(F, 16, mgrit=MGRIT(max_levels=1), kind=kind, output="last", dtype=torch.float64)
        reference.load_state_dict(exact)
        wanted = reference(x)[1].detach()
        return float((found - wanted).norm() / wanted.norm())

    factor = {
        (kind, coarse): (error(kind, coarse, 4) / error(kind, coarse, 1)) ** (1 / 3)
        for kind in KINDS
        for coarse in ("compose", "euler")
    }
    # Moon and Cyr: the implicit unit is stable on coarse grids, the plain one is not.
    assert factor["plain", "euler"] > 1
    assert factor["implicit", "euler"] < 0.7
    assert factor["implicit", "compose"] < 0.5 and factor["plain", "compose"] < 0.6


def test_records_say_what_the_solves_did():
    model = made(mgrit=MGRIT(intervals=4, tol=1e-6), windows=2)
    output, _ = model(drawn(L, B, F))
    assert len(model.record.forward_sweeps) == 2 * D and model.record.adjoint_sweeps == ()
    assert 0 < max(model.record.forward_residuals) <= 1e-6
    output.sum().backward()
    assert len(model.record.adjoint_residuals) == 2 * D and min(model.record.adjoint_sweeps) >= 1
    assert "cfactor" in model.table(L)


@pytest.mark.parametrize(
    ("options", "length", "found"),
    [
        (MGRIT(), 28, (28, 2)),
        (MGRIT(), 61, (64, 2)),
        (MGRIT(), 8, (8, 1)),
        (MGRIT(intervals=64), 1021, (1024, 3)),
        (MGRIT(cycle="V"), 61, (64, 3)),
        (MGRIT(cycle="V"), 28, (28, 2)),
        (MGRIT(cycle="V", cfactor=(8, 2), max_levels=9, min_coarse=2), 50, (64, 4)),
        (MGRIT(max_levels=1), 61, (61, 1)),
    ],
)
def test_padding_is_the_least_that_fits(options, length, found):
    assert padded(options, length) == found
    plan = SequencePlan.make(options, options, length, 1, 1.0, SerialCommunicator())
    assert len(plan.solvers.hierarchy.levels) == found[1]


def test_owners_of_a_hundred_thousand_steps():
    plan = SequencePlan.make(MGRIT(intervals=64), MGRIT(intervals=64), 99_991, 3, 1.0, SerialCommunicator())
    assert sum(plan.count(window) for window in range(plan.num_windows)) == 99_991
    assert [i for window in range(plan.num_windows) for i in plan.own(window, 0)] == list(range(99_991))


def test_chained_sums_are_those_of_the_rows_in_their_order(spmd):
    def body(comm):
        rows = drawn(7, 3, 2) * 10.0 ** drawn(7, 3, 2, seed=1)
        found = []
        for partition in (Partition.balanced(7, comm.size), Partition((0,) + (7,) * comm.size)):
            own = slice(partition.first(comm.rank), partition.first(comm.rank) + partition.count(comm.rank))
            found.append(chained_sum(rows[own], partition, comm))
        total = torch.zeros(3, 2, dtype=torch.float64)
        for row in rows:
            total += row
        return all(torch.equal(each, total) for each in found)

    assert all(spmd(body))
