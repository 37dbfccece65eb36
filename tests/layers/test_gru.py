"""The cell of a gated unit and its steps along a sequence, against plain loops and autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gated_cells import COUNTS, B, H, M, check_cell, drawn

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layers.gated import GatedSteps, Sizes
from xbraid_py.layers.gru import GruCell
from xbraid_py.mgrit.equations import Adjoint, Forward

KINDS = ("plain", "implicit")


def slow_step(kind, h, a, weight, bias, size, count=1):
    """One step of all samples, as the equations stand there; `count` of them with the gates of the first."""
    g = h @ weight.T + (0 if bias is None else bias)
    a_r, a_z, a_n = a.chunk(3, -1)
    g_r, g_z, g_n = g.chunk(3, -1)
    r, z = torch.sigmoid(a_r + g_r), torch.sigmoid(a_z + g_z)
    n = torch.tanh(a_n + r * g_n)
    for _ in range(count):
        if kind == "plain":
            h = h + size / count * (1 - z) * (n - h)
        else:
            h = (h + size / count * (1 - z) * n) / (1 + size / count * (1 - z))
    return h


def steps_of(kind, n=M, coarse="compose", h=None, bias=True, sources=False):
    h = torch.full((n,), 0.7, dtype=torch.float64) if h is None else h
    return GatedSteps(
        GruCell(H, kind),
        drawn(n, B, 3 * H),
        drawn(3 * H, H),
        drawn(3 * H) if bias else None,
        h,
        coarse,
        sources=drawn(n, B, H) if sources else None,
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [None, COUNTS])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_step_and_its_jacobian_are_those_of_autograd(kind, counts, with_bias):
    check_cell(GruCell(H, kind), partial(slow_step, kind), 1, 3, counts, with_bias)


def test_plain_steps_of_size_one_are_those_of_torch():
    made = torch.nn.GRUCell(4, H, dtype=torch.float64)
    x, h = drawn(B, 4), drawn(B, H)
    with torch.no_grad():
        a = torch.addmm(made.bias_ih, x, made.weight_ih.T)[None]
        sizes = Sizes(torch.ones(1, dtype=torch.float64))
        found = GruCell(H).step(h[None], a, made.weight_hh, made.bias_hh, sizes)[0]
        assert torch.allclose(found, made(x, h), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [None, torch.zeros(M, dtype=torch.float64)])
def test_a_step_of_size_zero_changes_nothing(kind, counts):
    cell, h, a, weight = GruCell(H, kind), drawn(M, B, H), drawn(M, B, 3 * H), drawn(3 * H, H)
    sizes = Sizes(torch.zeros(M, dtype=torch.float64), counts)
    assert torch.equal(cell.step(h, a, weight, None, sizes), h)
    local, v = cell.linearize(h, a, weight, None, sizes), drawn(M, B, H)
    back, slopes = local.back(v, weight, slice(None))
    assert torch.equal(back, v) and not slopes.any()


def test_implicit_steps_are_stable_at_any_size_and_plain_ones_are_not():
    a, weight, h = drawn(1, B, 3 * H), drawn(3 * H, H), drawn(1, B, H)
    found = {}
    for kind in KINDS:
        x = h
        for _ in range(30):
            x = GruCell(H, kind).step(x, a, weight, None, Sizes(torch.full((1,), 50.0, dtype=torch.float64)))
        found[kind] = float(x.abs().max())
    # A convex combination of h and n, and |n| < 1.
    assert found["implicit"] <= max(1.0, float(h.abs().max()))
    assert found["plain"] > 1e6


def test_the_kinds_differ_by_the_square_of_the_step():
    a, weight, h = drawn(1, B, 3 * H), drawn(3 * H, H), drawn(1, B, H)

    def difference(size):
        sizes = Sizes(torch.full((1,), size, dtype=torch.float64))
        plain, implicit = (GruCell(H, kind).step(h, a, weight, None, sizes) for kind in KINDS)
        return float((plain - implicit).abs().max())

    ratio = difference(1e-3) / difference(5e-4)
    assert 3.9 < ratio < 4.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coarse", ["compose", "euler"])
@pytest.mark.parametrize("parts", [1, 2])
def test_sweeps_of_intervals_are_loops(kind, coarse, parts):
    fine = steps_of(kind, 24, coarse)
    steps = fine.coarsen(4, "average", "euler", parts)  # six steps
    points, tau = drawn(2, B, H), drawn(6, B, H)
    inputs = torch.empty(6, B, H, dtype=torch.float64)
    found = steps.relax(points, 3, tau, inputs)
    size, count = 0.7 * 4 / parts, 4 // parts if coarse == "compose" else 1
    for k in range(2):
        x = points[k]
        for step in range(3 * k, 3 * k + 3):
            assert torch.allclose(inputs[step], x, rtol=0, atol=1e-12)
            for row in range(step * parts, (step + 1) * parts):
                length = 4 // parts
                a = fine.theta[row * length : (row + 1) * length].mean(0)
                x = slow_step(kind, x, a, fine.weight, fine.bias, size, count)
            x = x + tau[step]
        assert torch.allclose(found[k], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("intervals", [1, 2, 6])
def test_adjoint_sweeps_are_those_of_autograd(kind, intervals):
    steps, points, v = steps_of(kind, sources=True), drawn(intervals, B, H), drawn(intervals, B, H)
    c = M // intervals
    states = torch.empty(M, B, H, dtype=torch.float64)
    steps.relax(points, c, None, states)
    gradient, inputs = torch.empty_like(steps.theta), torch.empty_like(states)
    found = steps.relax_adjoint(states, v, c, None, inputs, gradient)
    weight, bias, theta = (t.clone().requires_grad_() for t in (steps.weight, steps.bias, steps.theta))
    loss = 0
    leaves = points.clone().requires_grad_()
    for k in range(intervals):
        x = leaves[k]
        for i in range(k * c, (k + 1) * c):
            loss = loss + (x * steps.sources[i]).sum()
            x = slow_step(kind, x, theta[i], weight, bias, 0.7)
        loss = loss + (x * v[k]).sum()
    of_points, of_theta, of_weight, of_bias = torch.autograd.grad(loss, (leaves, theta, weight, bias))
    assert torch.allclose(found, of_points, rtol=0, atol=1e-11)
    assert torch.allclose(gradient, of_theta, rtol=0, atol=1e-11)
    slopes = steps.weight_slopes(states, gradient)
    assert torch.allclose(torch.einsum("ibg,ibh->gh", slopes, states), of_weight, rtol=0, atol=1e-11)
    assert torch.allclose(slopes.sum((0, 1)), of_bias, rtol=0, atol=1e-11)
    assert torch.equal(inputs[c - 1 :: c], v)


def test_states_that_have_changed_are_linearized_again():
    steps, states, v = steps_of("plain"), drawn(M, B, H), drawn(M, B, H)
    first = steps.relax_adjoint(states, v, 1)
    assert torch.equal(steps.relax_adjoint(states, v, 1), first)
    states += 1.0
    fresh = GatedSteps(steps.cell, steps.theta, steps.weight, steps.bias, steps.h)
    assert torch.equal(steps.relax_adjoint(states, v, 1), fresh.relax_adjoint(states, v, 1))
    assert not torch.equal(steps.relax_adjoint(states, v, 1), first)


def test_coarse_steps_do_not_count_those_of_size_zero():
    h = torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    steps = steps_of("implicit", h=h, sources=True)
    coarse = steps.coarsen(2, "average", "euler")
    assert coarse.h.tolist() == [2.0, 1.0, 0.0]
    assert coarse.counts.tolist() == [2.0, 1.0, 0.0]
    assert torch.allclose(coarse.theta[0], steps.theta[:2].mean(0)) and torch.equal(coarse.theta[1], steps.theta[2])
    assert torch.equal(coarse.sources, steps.sources[::2] + steps.sources[1::2])
    assert torch.equal(steps.coarsen(2, "inject", "euler").theta, steps.theta[::2])
    coarser = coarse.coarsen(3, "average", "euler")
    assert coarser.h.tolist() == [3.0] and coarser.counts.tolist() == [3.0]
    assert torch.allclose(coarser.theta[0], steps.theta[:3].mean(0))
    assert coarser.theta.isfinite().all()
    twice = steps.coarsen(2, "average", "euler", parts=2)
    assert twice.parts == 2 and torch.equal(twice.theta, steps.theta)
    assert steps_of("plain", coarse="euler", h=h).coarsen(2, "average", "euler").counts is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_composed_step_is_exact_where_the_gates_stand_still(kind):
    # Without W_hh, and with the same input, nothing moves but the state.
    a, n = drawn(1, B, 3 * H), 8
    h = torch.full((n,), 0.6, dtype=torch.float64)
    start, still = drawn(1, B, H), torch.zeros(3 * H, H, dtype=torch.float64)
    found = {}
    for coarse in ("compose", "euler"):
        steps = GatedSteps(GruCell(H, kind), a.expand(n, B, 3 * H), still, None, h, coarse)
        fine = steps.relax(start, n)
        found[coarse] = float((steps.coarsen(n, "average", "euler").relax(start, 1) - fine).abs().max())
    assert found["compose"] < 1e-14 < 1e-3 < found["euler"]


def test_rows_go_to_other_ranks(spmd):
    whole = [t.numpy().copy() for t in (drawn(8, B, 3 * H), drawn(3 * H, H), drawn(8, B, H))]

    def body(comm):
        theta, weight, sources = (torch.from_numpy(t) for t in whole)
        h = torch.arange(8, dtype=torch.float64)
        source, target = Partition.balanced(8, comm.size), Partition((0,) * comm.size + (8,))
        own = slice(source.first(comm.rank), source.first(comm.rank) + source.count(comm.rank))
        steps = GatedSteps(GruCell(H), theta[own], weight, None, h[own], counts=h[own], sources=sources[own])
        moved = steps.redistribute(comm, source, target)
        wanted = slice(0, 8 if comm.rank == comm.size - 1 else 0)
        pairs = ((moved.theta, theta), (moved.h, h), (moved.counts, h), (moved.sources, sources))
        return all(torch.equal(found, given[wanted]) for found, given in pairs)

    assert all(spmd(body))


def test_a_sweep_without_steps_is_empty():
    steps = steps_of("plain", 0, sources=True)
    nothing = torch.empty(0, B, H, dtype=torch.float64)
    forward = Forward(steps, nothing, nothing.new_empty(B, H))
    assert forward.relax(nothing, 3, record=True).shape == (0, B, H)
    gradient = torch.empty_like(steps.theta)
    adjoint = Adjoint(steps, nothing, gradient)
    assert adjoint.coarsen(2, "average", "euler").relax(nothing, 1).shape == (0, B, H)
    assert adjoint.redistribute(SerialCommunicator(), Partition((0, 0)), Partition((0, 0))).steps.theta.shape[0] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1; use 64"),
        ({"hidden_size": 3, "kind": "explicit"}, "kind='explicit' must be plain or implicit; use implicit"),
    ],
)
def test_bad_cells_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        GruCell(**options)
