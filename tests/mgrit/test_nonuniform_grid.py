"""Grids whose steps differ in length: integers, solves against the literal loop, averages, regularization."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import gathered, problem

from xbraid_py.comm import SerialCommunicator
from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.mgrit import MGRIT, Hierarchy, Solver
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.problem.options import InitialScales
from xbraid_py.problem.regularization import Regularization

WIDTH, BATCH, T = 3, 2, 2.0
BLOCK = DenseLayer(WIDTH, WIDTH, "tanh")
lengths = st.lists(st.integers(1, 12), min_size=1, max_size=24)


def drawn(number: int, seed: int = 0) -> tuple[int, ...]:
    """Lengths that powers of two make, as refinements leave them."""
    return tuple(int(each) for each in 2 ** np.random.default_rng(seed).integers(0, 4, number))


# Integers.


@given(lengths, st.integers(2, 7))
def test_grids_with_the_same_steps_are_equal(found, factor):
    grid = LayerGrid.of_lengths(found, T)
    assert LayerGrid.of_lengths([factor * each for each in found], T) == grid
    assert grid.is_uniform == (len(set(found)) == 1)
    if grid.is_uniform:
        assert grid == LayerGrid(len(found), T) and grid.sizes() == [T / len(found)] * len(found)
    assert sum(grid.sizes()) == pytest.approx(T, rel=1e-14)
    assert [size / grid.sizes()[0] for size in grid.sizes()] == pytest.approx([each / found[0] for each in found])


@given(lengths, st.data())
def test_halving_cuts_the_chosen_steps_and_no_others(found, data):
    grid = LayerGrid.of_lengths(found, T)
    chosen = data.draw(st.sets(st.integers(0, len(found) - 1)))
    fine = grid.halve(chosen)
    expected = [
        part for row, size in enumerate(grid.sizes()) for part in ([size / 2, size / 2] if row in chosen else [size])
    ]
    assert fine.num_layers == len(found) + len(chosen) and fine.sizes() == pytest.approx(expected, rel=1e-14)
    assert grid.halve(range(len(found))) == grid.refine(2)
    assert grid.halve(()) == grid


@given(st.lists(st.integers(1, 12), min_size=12, max_size=12), st.sampled_from((1, 2, 3, 4, 6, 12)))
def test_coarsening_adds_lengths_and_undoes_refinement(found, factor):
    grid = LayerGrid.of_lengths(found, T)
    coarse = grid.coarsen(factor).sizes()
    assert coarse == pytest.approx([sum(grid.sizes(k, factor)) for k in range(0, 12, factor)], rel=1e-14)
    assert grid.refine(factor).coarsen(factor) == grid


@pytest.mark.parametrize("wrong", [(1, 2), (1, 2, 0), (1, -1, 1)])
def test_bad_lengths_are_named(wrong):
    with pytest.raises(ValueError) as caught:
        LayerGrid(3, T, wrong)
    assert str(caught.value) == f"lengths={wrong} must be num_layers=3 whole numbers from 1 on; use (1, 1, 1)"


def test_a_step_that_is_not_there_is_not_cut():
    with pytest.raises(ValueError, match=r"^chosen=3 is outside 0 \.\. 2$"):
        LayerGrid(3, T).halve({3})


# Solves.


@cache
def literal(number: int, scheme: str) -> tuple[torch.Tensor, ...]:
    """Weights, sizes, first state and last adjoint; and states, adjoints and gradient by autograd, step by step."""
    theta = ref.smooth_weights(number, WIDTH * WIDTH + WIDTH, 0.7, seed=1, rough=0.3)
    sizes = LayerGrid.of_lengths(drawn(number), T).sizes()
    u0, vN = ref.random(2, WIDTH, BATCH, seed=2)
    leaf = theta.clone().requires_grad_()
    states = [u0.clone().requires_grad_()]
    for row, h in zip(leaf, sizes, strict=True):
        states.append(ref.step(row, states[-1], h, "tanh", scheme))
    gradient, *adjoints = torch.autograd.grad((states[-1] * vN).sum(), [leaf, *states])
    return theta, u0, vN, torch.stack(states).detach(), torch.stack(adjoints), gradient


def solved(comm, options: MGRIT, number: int, scheme: str):
    """Rows owned here, states, gradient, output, adjoint at the first state, and whether the solves had converged."""
    theta, u0, vN, *_ = literal(number, scheme)
    grid = LayerGrid.of_lengths(drawn(number), T)
    hierarchy = Hierarchy.plan(options, grid, comm.size)
    first, count = hierarchy.partition.first(comm.rank), hierarchy.partition.count(comm.rank)
    h = torch.tensor(grid.sizes(first, count), dtype=torch.float64)
    steps = ResidualSteps(BLOCK, theta[first : first + count], h, scheme)
    states = torch.full((count, WIDTH, BATCH), torch.nan, dtype=torch.float64)
    gradient = torch.full((count, theta.shape[1]), torch.nan, dtype=torch.float64)
    solver = Solver(options, hierarchy, comm)
    forward = solver.solve(Forward(steps, states, u0), u0 if first == 0 and count else None)
    start = vN if count and first + count == number else None
    adjoint = solver.solve(Adjoint(steps, states, gradient), start)
    residuals = max(forward.residual, adjoint.residual)
    return len(hierarchy.levels), states, gradient, forward.end, adjoint.end, residuals


SOLVERS = {
    "V, average": (24, MGRIT(cycle="V", cfactor=4, max_levels=2, max_iter=12, tol=1e-15)),
    "V, inject, F-relaxation": (
        24,
        MGRIT(cycle="V", cfactor=2, max_levels=2, nrelax=0, coarse_weights="inject", max_iter=20, tol=1e-15),
    ),
    "V, levels": (32, MGRIT(cycle="V", cfactor=(4, 2), max_levels=3, min_coarse=1, max_iter=20, tol=1e-15)),
    "F, levels": (
        32,
        MGRIT(cycle="F", cfactor=2, max_levels=4, min_coarse=1, coarse_step="euler", max_iter=20, tol=1e-15),
    ),
    "V, parts": (24, MGRIT(cycle="V", cfactor=6, max_levels=2, coarse_parts=3, max_iter=12, tol=1e-15)),
    "lagged": (40, MGRIT(max_iter=60, tol=1e-14)),
    "one-shot, levels": (48, MGRIT(cfactor=(4, 3), max_levels=3, min_coarse=1, max_iter=80, tol=1e-14)),
    "sequential": (7, MGRIT(max_levels=1)),
}


@pytest.mark.parametrize("scheme", ["euler", "midpoint"])
@pytest.mark.parametrize("name", SOLVERS)
def test_a_converged_solve_is_the_literal_loop(spmd, name, scheme):
    number, options = SOLVERS[name]
    _, _, _, states, adjoints, gradient = literal(number, scheme)
    parts = spmd(lambda comm: solved(comm, options, number, scheme))
    assert parts[0][0] == {"levels": 3 + (options.cycle == "F"), "sequential": 1}.get(name.split(", ")[-1], 2)
    ends = [each[place] for place in (3, 4) for each in parts if each[place] is not None]
    found = [torch.cat([part[place] for part in parts]) for place in (1, 2)] + ends
    for mine, exact in zip(found, (states[:-1], gradient, states[-1], adjoints[0]), strict=True):
        assert float((mine - exact).abs().max()) < 1e-10 * float(exact.abs().max())
    assert all(part[5] < 1e-13 for part in parts)


def test_a_solve_has_the_same_bits_on_any_number_of_ranks(spmd):
    for name, (number, options) in SOLVERS.items():
        loose = replace(options, max_iter=2, tol=0.0)
        _, states, gradient, *_ = solved(SerialCommunicator(), loose, number, "euler")
        parts = spmd(lambda comm, o=loose, n=number: solved(comm, o, n, "euler"))
        assert torch.equal(torch.cat([part[1] for part in parts]), states), name
        assert torch.equal(torch.cat([part[2] for part in parts]), gradient), name


@pytest.mark.parametrize("name", ["V, levels", "lagged", "sequential"])
def test_lengths_that_are_equal_have_the_bits_of_none(name):
    number, options = SOLVERS[name]
    h, (theta, u0, vN, *_) = T / number, literal(number, "euler")
    found = []
    for sizes in (h, torch.full((number,), h, dtype=torch.float64)):
        hierarchy = Hierarchy.plan(options, LayerGrid(number, T, (3,) * number), 1)
        states, gradient = torch.empty(number, WIDTH, BATCH, dtype=torch.float64), torch.empty_like(theta)
        steps = ResidualSteps(BLOCK, theta, sizes)
        solver = Solver(replace(options, max_iter=2, tol=0.0), hierarchy, SerialCommunicator())
        solver.solve(Forward(steps, states, u0), u0)
        solver.solve(Adjoint(steps, states, gradient), vN)
        found.append((states, gradient))
    # Sums of sizes are rounded otherwise than multiples of one; the fine level alone has the same bits.
    for one, other in zip(*found, strict=True):
        if name == "sequential":
            assert torch.equal(one, other)
        else:
            assert float((one - other).abs().max()) <= 1e-14 * float(one.abs().max())


def test_a_network_with_equal_lengths_is_the_one_without():
    made = problem(SerialCommunicator())
    plain, listed = (made.objective(each) for each in (16, LayerGrid(16, 2.0, (4,) * 16)))
    x = plain.network.initial(InitialScales(layers=0.3), 1)
    assert listed.network.sizes == plain.network.sizes == 0.125
    assert listed.evaluate(x) == plain.evaluate(x) and torch.equal(listed.gradient(x), plain.gradient(x))


# Averages.


def test_averaged_weights_are_weighted_by_the_sizes():
    theta, h = ref.random(6, BLOCK.num_parameters, seed=3), torch.tensor([1.0, 2.0, 4.0, 0.5, 0.5, 3.0]).double()
    steps = ResidualSteps(BLOCK, theta, h).coarsen(3, "average", "euler")
    expected = [(h[k : k + 3, None] * theta[k : k + 3]).sum(0) / h[k : k + 3].sum() for k in (0, 3)]
    assert torch.allclose(steps.theta, torch.stack(expected), rtol=1e-14, atol=0)
    assert steps.h.tolist() == [7.0, 4.0]
    assert torch.equal(ResidualSteps(BLOCK, theta, h).coarsen(3, "inject", "euler").theta, theta[::3])
    parts = ResidualSteps(BLOCK, theta, h).coarsen(6, "average", "euler", parts=2)
    assert torch.equal(parts.theta, steps.theta) and torch.equal(parts.h, steps.h) and parts.parts == 2


def test_a_gradient_is_corrected_in_proportion_to_the_sizes():
    """What a change of the adjoints adds to the gradient of averaged weights, by the chain rule."""
    theta, h = ref.random(6, BLOCK.num_parameters, seed=3), torch.tensor([1.0, 2.0, 4.0, 0.5, 0.5, 3.0]).double() / 8
    states, gradient = ref.random(6, WIDTH, BATCH, seed=4), torch.zeros_like(theta)
    before, after = ref.random(2, 2, WIDTH, BATCH, seed=5)
    fine = Adjoint(ResidualSteps(BLOCK, theta, h), states, gradient)
    fine.correct(before, after, fine.coarsen(3, "average", "euler"))
    leaf = theta.clone().requires_grad_()
    total = 0.0
    for k in (0, 1):
        own = slice(3 * k, 3 * k + 3)
        row = (h[own, None] * leaf[own]).sum(0) / h[own].sum()
        total += (ref.step(row, states[3 * k], float(h[own].sum()), "tanh") * (after - before)[k]).sum()
    assert torch.allclose(gradient, torch.autograd.grad(total, leaf)[0], rtol=1e-12, atol=1e-15)


# Regularization.


@pytest.mark.parametrize("measure", ["sum", "integral"])
def test_the_gradient_of_the_regularization_is_the_slope_of_its_value(spmd, measure):
    term = Regularization(tikhonov=0.3, ddt=0.05, classification=0.7, measure=measure)
    grid = LayerGrid.of_lengths(drawn(16, seed=3), 2.0)
    eps = 1e-6

    def body(comm):
        objective = problem(comm, regularization=term).objective(grid)
        network, intervals = objective.network, objective.forward.hierarchy.intervals
        x, direction = (network.initial(InitialScales(1.0, 1.0, 1.0), seed) for seed in (1, 2))

        def value(shift):
            terms, gradient = term.terms(network, x + shift * direction, intervals.count(comm.rank))
            return float(comm.ordered_sum(terms[:, None], intervals.counts)), gradient

        slope = float(objective.dots([value(0.0)[1]], [direction]))
        return value(0.0)[0], (value(eps)[0] - value(-eps)[0]) / (2 * eps), slope, gathered(network, x)["layers"]

    for found, differences, slope, theta in spmd(body):
        assert slope == pytest.approx(differences, rel=1e-8)
        assert found > literal_terms(theta, grid, term) > 0.5 * found  # opening and classification come on top


def literal_terms(theta: torch.Tensor, grid: LayerGrid, term: Regularization) -> float:
    """The residual layers' part, summand by summand."""
    h, total = grid.sizes(), 0.0
    for n, row in enumerate(theta):
        total += term.tikhonov / 2 * float(row.square().sum()) * (h[n] if term.measure == "integral" else 1.0)
        if n:
            apart = (h[n - 1] + h[n]) / 2
            jump = float(((row - theta[n - 1]) / apart).square().sum())
            total += term.ddt / 2 * jump * (apart if term.measure == "integral" else 1.0)
    return total


def test_the_integral_of_the_regularization_does_not_depend_on_the_grid():
    """Weights that are a smooth function of depth: the sums tend to the integrals, whatever the lengths."""
    term = Regularization(tikhonov=1.0, ddt=1.0, classification=0.0, opening=0.0)
    made = problem(SerialCommunicator(), MGRIT(max_levels=1), regularization=term)
    exact = 1.0  # integral of (cos^2 + sin^2) / 2 over [0, 2]
    errors = []
    for refinements in (3, 4, 5):
        grid = LayerGrid.of_lengths(drawn(8, seed=5), 2.0).refine(2**refinements)
        network = made.network(grid)
        x = network.layout.zeros()
        h = np.array(grid.sizes())
        middles = torch.from_numpy(np.cumsum(h) - h / 2)
        network.layout.rows(x)["layers"][:, 0] = middles.cos()
        terms, _ = term.terms(network, x, 1)
        errors.append(abs(float(terms.sum()) - exact))
    rates = [np.log2(a / b) for a, b in zip(errors, errors[1:], strict=False)]
    assert min(rates) > 0.9 and errors[-1] < 0.01
