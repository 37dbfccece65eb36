"""Propagators: order of consistency, transposed Jacobians, coarsening, and rows that move between ranks."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import reference as ref
import torch

from xbraid_py.comm.partition import Partition
from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.mgrit.grid import LayerGrid

C, B = 4, 3
BLOCK = DenseLayer(C, C, "tanh")
SCHEMES = ("euler", "midpoint")


def steps_of(num_layers: int, h: float, scheme: str, activation: str = "tanh") -> ResidualSteps:
    theta = ref.smooth_weights(num_layers, BLOCK.num_parameters, 0.8, seed=3, rough=0.2)
    return ResidualSteps(replace(BLOCK, activation=activation), theta, h, scheme)


def propagate(steps: ResidualSteps, u: torch.Tensor) -> torch.Tensor:
    for i in range(len(steps.theta)):
        u = steps.value(u, slice(i, i + 1))
    return u


@pytest.mark.parametrize(("scheme", "order"), [("euler", 1), ("midpoint", 2)])
def test_order_of_consistency(scheme, order):
    """N steps with the same weights converge to the flow of u' = F(u) with the order of the scheme."""
    theta, u = ref.random(1, BLOCK.num_parameters, seed=1), ref.random(1, C, B, seed=2)

    def at(num_steps):
        return propagate(ResidualSteps(BLOCK, theta.expand(num_steps, -1), 1.0 / num_steps, scheme), u)

    exact = propagate(ResidualSteps(BLOCK, theta.expand(5000, -1), 1.0 / 5000, "midpoint"), u)
    errors = [float((at(n) - exact).norm()) for n in (32, 64, 128, 256)]
    rates = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(rate - order) < 0.1 for rate in rates), rates


@pytest.mark.parametrize(("scheme", "order"), [("euler", 2), ("midpoint", 3)])
def test_local_error_of_one_step(scheme, order):
    """The error of a single step is one order higher; measured against many small steps."""
    theta, u = ref.random(1, BLOCK.num_parameters, seed=1), ref.random(1, C, B, seed=2)
    errors = []
    for h in (0.05, 0.025, 0.0125):
        exact = propagate(ResidualSteps(BLOCK, theta.expand(200, -1), h / 200, "midpoint"), u)
        errors.append(float((propagate(ResidualSteps(BLOCK, theta, h, scheme), u) - exact).norm()))
    rates = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(abs(rate - order) < 0.25 for rate in rates), rates


@pytest.mark.parametrize("activation", ["tanh", "smooth_relu", "relu"])
@pytest.mark.parametrize("rows", [slice(None), slice(1, None, 3), slice(5, 6), slice(2, 2)])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_value_and_vjp_against_autograd(scheme, rows, activation):
    steps = steps_of(6, 0.3, scheme, activation)
    theta = steps.theta[rows].clone().requires_grad_()
    count = len(theta)
    u = ref.random(count, C, B, seed=4).requires_grad_()
    v = ref.random(count, C, B, seed=5)
    plain, kept = u.detach().clone(), v.clone()
    value = steps.value(plain, rows)
    back, gradient = steps.vjp(plain, kept, rows, with_gradient=True)
    only_back, none = steps.vjp(plain, kept, rows)
    assert none is None and torch.equal(only_back, back)
    assert torch.equal(plain, u) and torch.equal(kept, v), "the arguments must not be overwritten"
    assert value.shape == back.shape == (count, C, B) and gradient.shape == theta.shape
    if count:
        literal = [ref.step(row, x, 0.3, activation, scheme) for row, x in zip(theta, u, strict=True)]
        expected = torch.autograd.grad(literal, [u, theta], list(v))
        assert torch.allclose(value, torch.stack(literal).detach(), rtol=1e-13, atol=1e-13)
        assert torch.allclose(back, expected[0], rtol=1e-12, atol=1e-12)
        assert torch.allclose(gradient, expected[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_vjp_is_the_transpose_of_the_linearized_step(scheme):
    """<v, J d> = <J^T v, d>, with J d by central differences of the step."""
    steps = steps_of(6, 0.3, scheme)
    u, v, d = ref.random(3, 6, C, B, seed=6)
    eps = 1e-5
    product = (steps.value(u + eps * d, slice(None)) - steps.value(u - eps * d, slice(None))) / (2 * eps)
    left, right = (v * product).sum(), (steps.vjp(u, v, slice(None))[0] * d).sum()
    assert abs(left - right) < 1e-8 * v.norm() * product.norm()


def test_coarsening_against_the_literal_mean():
    fine = steps_of(12, 0.25, "euler")
    for scheme in SCHEMES:
        for cfactor in (2, 3, 4, 12):
            average, inject = (fine.coarsen(cfactor, weights, scheme) for weights in ("average", "inject"))
            assert average.h == inject.h == cfactor * 0.25 and average.scheme == inject.scheme == scheme
            assert average.block is fine.block and len(average.theta) == len(inject.theta) == 12 // cfactor
            for k in range(12 // cfactor):
                interval = list(fine.theta[cfactor * k : cfactor * (k + 1)])
                assert torch.allclose(average.theta[k], sum(interval) / cfactor, rtol=1e-14, atol=1e-15)
                assert torch.equal(inject.theta[k], interval[0])
    assert torch.equal(fine.theta, steps_of(12, 0.25, "euler").theta), "the fine weights must not change"


def test_coarsening_twice_and_for_no_rows():
    fine = steps_of(12, 0.25, "euler")
    twice, once = (
        s.theta
        for s in (
            fine.coarsen(2, "average", "euler").coarsen(3, "average", "euler"),
            fine.coarsen(6, "average", "euler"),
        )
    )
    assert torch.allclose(twice, once, rtol=1e-13, atol=1e-14)
    for weights in ("average", "inject"):
        empty = replace(fine, theta=fine.theta[:0]).coarsen(4, weights, "midpoint")
        assert empty.theta.shape == (0, BLOCK.num_parameters)


def test_averages_have_the_same_bits_on_any_number_of_rows():
    fine = steps_of(48, 0.25, "euler")
    whole = fine.coarsen(8, "average", "euler").theta
    parts = [replace(fine, theta=fine.theta[8 * k : 8 * k + 8]).coarsen(8, "average", "euler").theta for k in range(6)]
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("weights", ["average", "inject"])
def test_coarse_step_is_consistent_with_the_fine_ones(weights):
    """A coarse step differs from the c fine ones by O(h^2) with smooth weights, h being its own size."""
    errors = []
    for n in (32, 64, 128):
        theta = ref.smooth_weights(n, BLOCK.num_parameters, 0.8, seed=3)
        fine = ResidualSteps(BLOCK, theta[:4], 1.0 / n)
        u = ref.random(1, C, B, seed=2)
        errors.append(float((propagate(fine.coarsen(4, weights, "euler"), u) - propagate(fine, u)).norm()))
    rates = [math.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert all(rate > 1.8 for rate in rates), rates


def test_forward_records_and_adjoint_is_linear_in_its_argument():
    steps, template = steps_of(4, 0.3, "euler"), torch.empty(C, B, dtype=torch.float64)
    forward = Forward(steps, torch.zeros(4, C, B, dtype=torch.float64), template)
    u = ref.random(2, C, B, seed=7)
    ahead = forward.relax(u, 2, record=True)
    assert torch.equal(ahead, forward.relax(u, 2)) and ahead is not u
    middle = steps.value(u, slice(0, None, 2))
    assert torch.equal(forward.states[::2], u) and torch.equal(forward.states[1::2], middle)
    assert torch.equal(ahead, steps.value(middle, slice(1, None, 2)))
    states = ref.random(4, C, B, seed=8)
    adjoint = Adjoint(steps, states, torch.zeros(4, BLOCK.num_parameters, dtype=torch.float64))
    a, b = ref.random(2, 4, C, B, seed=9)
    both = adjoint.step(2.0 * a - b)
    separate = 2.0 * adjoint.step(a) - adjoint.step(b)
    assert torch.allclose(both, separate, rtol=1e-12, atol=1e-12)
    quiet = adjoint.relax(a[:2], 2)
    assert not adjoint.gradient.any(), "only what is recorded has a gradient"
    back = adjoint.relax(a[:2], 2, record=True)
    middle, last = steps.vjp(states[1::2], a[:2], slice(1, None, 2), with_gradient=True)
    expected, first = steps.vjp(states[::2], middle, slice(0, None, 2), with_gradient=True)
    assert torch.equal(back, expected) and torch.equal(back, quiet)
    assert torch.equal(adjoint.gradient[::2], first) and torch.equal(adjoint.gradient[1::2], last)
    assert (forward.direction, adjoint.direction) == (1, -1)


def test_costs():
    euler, midpoint = steps_of(4, 0.3, "euler"), steps_of(4, 0.3, "midpoint")
    template = torch.empty(C, B)
    assert (euler.cost, midpoint.cost) == (1.0, 2.0)
    assert (Forward(euler, None, template).cost, Forward(midpoint, None, template).cost) == (1.0, 2.0)
    assert (Adjoint(euler, template, None).cost, Adjoint(midpoint, template, None).cost) == (2.0, 4.0)


def test_coarse_adjoint_is_linearized_at_the_c_points():
    fine, states = steps_of(8, 0.3, "euler"), ref.random(8, C, B, seed=8)
    for weights in ("average", "inject"):
        coarse = Adjoint(fine, states, None).coarsen(4, weights, "midpoint")
        assert torch.equal(coarse.states, states[::4]) and coarse.gradient is None
        assert torch.equal(coarse.steps.theta, fine.coarsen(4, weights, "midpoint").theta)
        assert (coarse.steps.h, coarse.steps.scheme) == (4 * 0.3, "midpoint")


def test_empty_states_have_the_type_of_a_state():
    template = torch.empty(1, dtype=torch.float32).expand(C, B)
    for propagator in (
        Forward(steps_of(2, 0.1, "euler"), None, template),
        Adjoint(steps_of(2, 0.1, "euler"), torch.zeros(2, C, B), None),
    ):
        for count in (0, 3):
            empty = propagator.empty(count)
            assert empty.shape == (count, C, B) and empty.dtype == torch.float32 and empty.is_contiguous()


@pytest.mark.ranks(1, 2, 3, 5, 8)
def test_redistribute_moves_rows_to_their_owners(spmd):
    whole, states = steps_of(7, 0.3, "midpoint"), ref.random(7, C, B, seed=8)

    def body(comm):
        rank, last = comm.rank, comm.size - 1
        source = Partition.balanced(7, comm.size)
        ends = Partition((0, *[7 - 7 * (last - r) // comm.size for r in range(comm.size)]))
        mine = slice(source.first(rank), source.first(rank) + source.count(rank))
        # Rows as coarsening by injection leaves them: with a stride.
        spread = torch.zeros(2 * source.count(rank), BLOCK.num_parameters, dtype=torch.float64)
        spread[::2] = whole.theta[mine]
        steps = replace(whole, theta=spread[::2])
        right = []
        for target in (ends, Partition((0,) * comm.size + (7,)), Partition((0,) + (7,) * comm.size), source):
            wanted = slice(target.first(rank), target.first(rank) + target.count(rank))
            forward = Forward(steps, None, states[0]).redistribute(comm, source, target)
            adjoint = Adjoint(steps, states[mine], None).redistribute(comm, source, target)
            for moved in (forward.steps, adjoint.steps, steps.redistribute(comm, source, target)):
                right.append(torch.equal(moved.theta, whole.theta[wanted]))
                right.append((moved.h, moved.scheme, moved.block) == (whole.h, whole.scheme, whole.block))
            right.append(torch.equal(adjoint.states, states[wanted]))
        return right

    assert all(all(right) for right in spmd(body))


def test_steps_of_a_grid_reach_its_end():
    """h N = T: with F = const the network moves by exactly T times this constant."""
    block, grid = DenseLayer(C, C, "identity"), LayerGrid(10, 2.5)
    theta = torch.zeros(10, block.num_parameters, dtype=torch.float64)
    theta[:, C * C :] = 3.0
    end = propagate(ResidualSteps(block, theta, grid.h), torch.zeros(1, C, B, dtype=torch.float64))
    assert torch.allclose(end, torch.full_like(end, 7.5), rtol=1e-14)


@pytest.mark.parametrize(("parts", "left"), [(1, 0.25), (2, 0.12), (4, 1e-12)])
def test_correction_of_the_gradient(parts, left):
    """First order in the change: exact for coarse steps that are the fine ones, close for smooth weights otherwise."""
    n, cfactor = 32, 4
    theta = ref.smooth_weights(n, BLOCK.num_parameters, 0.8, seed=3)
    steps, states = ResidualSteps(BLOCK, theta, 1.0 / n), ref.random(n, C, B, seed=4)
    states = states[:1] + 0.05 * torch.arange(n)[:, None, None] / n * states  # along a trajectory, nearly
    points, change = ref.random(2, n // cfactor, C, B, seed=5)

    def gradient(v):
        adjoint = Adjoint(steps, states, torch.zeros(n, BLOCK.num_parameters, dtype=torch.float64))
        adjoint.relax(v, cfactor, record=True)
        return adjoint

    before, exact = gradient(points), gradient(points + change).gradient
    uncorrected = float((before.gradient - exact).norm())
    before.correct(points, points + change, before.coarsen(cfactor, "average", "euler", parts))
    corrected = float((before.gradient - exact).norm())
    assert uncorrected > 0.5 * float(exact.norm())
    assert corrected < left * uncorrected


def test_a_coarse_step_of_as_many_parts_as_steps_is_exact():
    steps = steps_of(8, 0.3, "euler")
    u, states = ref.random(2, C, B, seed=7), ref.random(8, C, B, seed=8)
    coarse = steps.coarsen(4, "average", "midpoint", 4)
    assert coarse.parts == 4 and coarse.cost == 4.0
    assert torch.equal(coarse.relax(u, 1, None, None), steps.relax(u, 4, None, None))
    back = Adjoint(steps, states, None)
    assert torch.equal(back.coarsen(4, "average", "midpoint", 4).step(u), back.relax(u, 4))


def test_coarsening_twice_averages_over_all_layers():
    steps = steps_of(16, 0.3, "euler")
    twice = steps.coarsen(4, "average", "euler", 2).coarsen(2, "average", "euler", 2)
    assert twice.parts == 2 and twice.h == pytest.approx(4 * steps.h)
    assert torch.allclose(twice.theta, steps.theta.unflatten(0, (4, 4)).mean(1), rtol=1e-14, atol=1e-14)
    adjoint = Adjoint(steps, ref.random(16, C, B, seed=8), None)
    states = adjoint.coarsen(4, "average", "euler", 2).coarsen(2, "average", "euler", 2).states
    assert torch.equal(states, adjoint.states[::4])
