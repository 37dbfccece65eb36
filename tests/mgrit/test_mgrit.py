"""MGRIT against literal references: what it converges to, how fast, and that the number of ranks does not matter."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import torch
from chain_solves import ALL_RANKS, chain, deviation, joined, options_for, same_bits, solve

from xbraid_py.comm import SerialCommunicator
from xbraid_py.kernels import fallback
from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.mgrit import MGRIT, Hierarchy, Solver
from xbraid_py.mgrit.equations import Adjoint
from xbraid_py.mgrit.grid import LayerGrid

ACTIVATIONS = ("smooth_relu", "relu", "tanh")
COARSE = tuple(product(("average", "inject"), ("midpoint", "euler")))


# Layers for 2, 3 and 4 levels. Few intervals: 8 ranks are more than there are, and so are 5.
LAYERS = {2: (8, 8, 16), 4: (16, 64, 64), 8: (32, 64, 512), (2, 4, 2): (8, 32, 32)}


@ALL_RANKS
@pytest.mark.timeout(240)
@pytest.mark.parametrize("levels", [2, 3, 4])
def test_converged_solve_is_the_sequential_one(spmd, levels):
    """All cycles, relaxations, levels, factors and coarse propagators on all numbers of ranks.

    The three activations take turns, in another order on another number of ranks: together with the equal
    bits on all ranks (below) that is all combinations.
    """
    tables = product(LAYERS, "VF", (0, 1), COARSE)
    cases = []
    for number, (cfactor, cycle, nrelax, (weights, scheme)) in enumerate(tables):
        options = MGRIT(
            cfactor=cfactor,
            max_levels=levels,
            min_coarse=1,
            nrelax=nrelax,
            max_iter=12,
            tol=1e-12,
            cycle=cycle,
            coarse_weights=weights,
            coarse_step=scheme,
        )
        turns = [chain(LAYERS[cfactor][levels - 2], activation, T=0.02) for activation in ACTIVATIONS]
        cases.append((options, number, turns))

    def body(comm):
        found = []
        for options, number, turns in cases:
            case = turns[(number + comm.size) % 3]
            solved = solve(comm, options, case)
            found.append((options, len(solved.forward.residuals), deviation(solved, case)))
        return found

    for of_rank in spmd(body):
        assert len(of_rank) == 64
        worst = max(of_rank, key=lambda entry: entry[2])
        assert worst[2] < 1e-10, worst
        # The first guess is not the solution already.
        assert min(entry[1] for entry in of_rank) > 1


@ALL_RANKS
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_sequential_and_single_layer_and_as_many_ranks_as_intervals(spmd, activation):
    """One level; one layer; N = P; K = P; K < P: always the solution."""
    size = len(spmd(lambda comm: None))
    cases = [(options_for(max_levels=1), chain(count, activation)) for count in (1, 2, size, 13)]
    for cfactor, intervals in ((2, size), (2, 2 * size), (4, 1), (3, 2)):
        options = options_for(cfactor=cfactor, max_levels=2, max_iter=intervals)
        cases.append((options, chain(cfactor * intervals, activation)))

    for of_rank in spmd(lambda comm: [(solve(comm, *case), case[1]) for case in cases]):
        for number, (solved, case) in enumerate(of_rank):
            assert deviation(solved, case) < 1e-12, cases[number][0]
            if number < 4:
                assert solved.forward.residuals == [] and solved.forward.residual == 0.0
                assert solved.forward.warm == solved.adjoint.warm == ()


@pytest.mark.parametrize(("nrelax", "cycle"), [(0, "V"), (1, "V"), (2, "V"), (1, "F")])
def test_a_two_level_solve_is_exact_after_few_iterations(spmd, nrelax, cycle):
    """Each iteration makes 1 + nrelax further C-points exact: all K of them after K / (1 + nrelax)."""
    K, gain = 12, 1 + nrelax
    # Strong rough weights and a coarse step that hardly resembles the fine ones: slow convergence.
    case = chain(2 * K, "tanh", T=12.0, rough=1.0)
    states, adjoints, _ = case.solved

    def errors(comm, iterations):
        options = options_for(cfactor=2, max_levels=2, nrelax=nrelax, cycle=cycle, max_iter=iterations)
        solved = solve(comm, replace(options, coarse_weights="inject"), case)
        mine = slice(solved.rows.start // 2, solved.rows.stop // 2)
        points = (solved.forward.warm[0] - states[:-1:2][mine]).flatten(1)
        backwards = (solved.adjoint.warm[0] - adjoints[2::2][mine]).flatten(1)
        return points, backwards, deviation(solved, case)

    for iterations in range(K // gain + 1):
        parts = spmd(lambda comm, count=iterations: errors(comm, count))
        size = joined([part[0] for part in parts]).norm(dim=1)
        exact = min(K, 1 + iterations * gain)
        assert size[:exact].max() < 1e-10, iterations
        if iterations == K // gain:
            assert max(part[2] for part in parts) < 1e-10
            assert joined([part[1] for part in parts]).abs().max() < 1e-10 * adjoints.abs().max()
        if iterations <= K // gain - 2:
            assert size[exact] > 1e-6, "not exact before its time"
            assert max(part[2] for part in parts) > 1e-6


def test_adjoints_become_exact_from_the_other_end(spmd):
    K = 12
    case = chain(2 * K, "tanh", T=12.0, rough=1.0)
    states, adjoints, _ = case.solved

    def errors(comm, iterations):
        options = options_for(cfactor=2, max_levels=2, nrelax=0, max_iter=iterations, coarse_weights="inject")
        # Linearized at the exact states, so that the adjoint solve is looked at alone.
        exact = solve(comm, replace(options, max_iter=K), case)
        hierarchy = Hierarchy.plan(options, LayerGrid(2 * K, 12.0), comm.size)
        steps = ResidualSteps(DenseLayer(3, 3, "tanh"), case.theta[exact.rows], case.h)
        propagator = Adjoint(steps, exact.states, torch.empty_like(exact.gradient))
        found = Solver(options, hierarchy, comm).solve(propagator, case.vN).warm[0]
        return found - adjoints[2::2][exact.rows.start // 2 : exact.rows.stop // 2]

    for iterations in (0, 1, 4, K - 2, K):
        parts = spmd(lambda comm, count=iterations: errors(comm, count))
        size = joined(parts).flatten(1).norm(dim=1).flip(0) / adjoints.abs().max()
        assert size[: iterations + 1].max() < 1e-11
        if iterations <= K - 2:
            assert size[iterations + 1] > 1e-7


@ALL_RANKS
@pytest.mark.parametrize(("width", "batch"), [(3, 2), (4, 129), (5, 251)])
def test_c_points_have_the_same_bits_on_any_number_of_ranks(spmd, monkeypatch, width, batch):
    """After two iterations, far from converged: states, adjoints, gradient, residuals, outputs."""
    monkeypatch.setattr(fallback, "CHUNK_BYTES", 3 * width * batch * 8)  # three intervals at once
    chosen = [(64, 4, 3), (64, (2, 4, 2), 4), (48, (4, 3), 3), (24, 4, 2)] if batch < 10 else [(64, 4, 3)]
    for (count, cfactor, levels), cycle, (weights, scheme) in product(chosen, "VF", COARSE):
        case = chain(count, "tanh" if cycle == "V" else "smooth_relu", 4.0, 0.3, width, batch)
        options = options_for(cfactor=cfactor, max_levels=levels, cycle=cycle, nrelax0=0)
        options = replace(options, coarse_weights=weights, coarse_step=scheme)
        serial = solve(SerialCommunicator(), options, case)
        parts = spmd(lambda comm, o=options, c=case: solve(comm, o, c))
        assert len(serial.forward.warm[0]) == count // options.cfactor_of(0, count)
        for which in ("forward", "adjoint"):
            expected, found = getattr(serial, which), [getattr(part, which) for part in parts]
            assert torch.equal(joined([each.warm[0] for each in found]), expected.warm[0]), (options, which)
            assert [torch.equal(each.end, expected.end) for each in found if each.end is not None] == [True]
            assert all(each.residuals == expected.residuals for each in found), (options, which)
            assert expected.residual > 1e-9, "too close to the solution to tell anything"
        assert same_bits([part.states for part in parts], serial.states), options
        assert same_bits([part.gradient for part in parts], serial.gradient), options
