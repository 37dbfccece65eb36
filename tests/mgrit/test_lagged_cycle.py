"""The lagged cycle: what it converges to, how it uses tau and what it measures, and that ranks do not matter."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import reference as ref
import torch
from chain_solves import ALL_RANKS, chain, deviation, joined, options_for, same_bits, solve

from xbraid_py.comm import SerialCommunicator
from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.mgrit import MGRIT, Hierarchy, Solver
from xbraid_py.mgrit.equations import Adjoint, AdjointTrajectory, Forward
from xbraid_py.mgrit.grid import LayerGrid

HIERARCHIES = [(32, 4, 2), (64, (8, 2), 3), (48, (4, 3), 3), (64, (2, 4, 2), 4)]


def one_shot(**options) -> MGRIT:
    return options_for(cycle="lagged", **{"coarse_step": None, **options})


@ALL_RANKS
@pytest.mark.parametrize(("weights", "scheme", "parts"), [("average", None, None), ("inject", "midpoint", 1)])
def test_it_converges_to_sequential_propagation(spmd, weights, scheme, parts):
    for (count, cfactor, levels), activation in product(HIERARCHIES, ("smooth_relu", "relu", "tanh")):
        case = chain(count, activation, T=2.0)
        options = one_shot(cfactor=cfactor, max_levels=levels, coarse_weights=weights, coarse_step=scheme)
        options = replace(options, coarse_parts=parts, max_iter=40, tol=1e-14)
        for solved in spmd(lambda comm, o=options, c=case: solve(comm, o, c)):
            assert deviation(solved, case) < 1e-12, (options, activation)
            assert len(solved.forward.residuals) < 40, "it stopped because it had converged"


def literal(case: ref.Chain, cfactor: int, iterations: int, tau=None):
    """The cycle on two levels, written out: C-points, fine states, tau and output of each iteration."""
    coarse = case.coarsen(cfactor, "average", "euler")
    fine, big = case.forward_steps(), coarse.forward_steps()
    count = len(big)
    tau = [torch.zeros_like(case.u0)] * count if tau is None else tau
    found = []

    def sweep():
        points = [case.u0]
        for k in range(count):
            points.append(big[k](points[-1]) + tau[k])
        return points

    points = sweep()
    for _ in range(iterations):
        states, ends = [], []
        for k in range(count):
            x = points[k]
            for j in range(cfactor):
                states.append(x)
                x = fine[k * cfactor + j](x)
            ends.append(x)
        tau = [e - big[k](points[k]) for k, e in enumerate(ends)]
        before, points = points, sweep()
        change = sum(float((a - b).square().sum()) for a, b in zip(before[:-1], points[:-1], strict=True))
        change += float((points[-1] - ends[-1]).square().sum())
        size = sum(float(each.square().sum()) for each in points)
        found.append((torch.stack(states), torch.stack(tau), points[-1], (change / size) ** 0.5))
    return found


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_states_are_those_of_the_three_steps_written_out(spmd, iterations):
    case = chain(32, "smooth_relu", T=3.0)
    other = replace(case, theta=case.theta + 0.1)
    options = one_shot(cfactor=4, max_levels=2, coarse_parts=1, max_iter=iterations, tol=0.0)
    cold = literal(case, 4, iterations)
    # The next weights, from the tau of these.
    expected = literal(other, 4, iterations, list(cold[-1][1]))

    def body(comm):
        found = []
        warm = None
        for each in (case, other):
            hierarchy = Hierarchy.plan(options, LayerGrid(32, 3.0), comm.size)
            first = hierarchy.partition.first(comm.rank)
            rows = slice(first, first + hierarchy.partition.count(comm.rank))
            steps = ResidualSteps(DenseLayer(3, 3, "smooth_relu"), each.theta[rows], each.h)
            states = torch.full((rows.stop - rows.start, *each.u0.shape), torch.nan, dtype=torch.float64)
            solution = Solver(options, hierarchy, comm).solve(Forward(steps, states, each.u0), each.u0, warm)
            warm = solution.warm
            found.append((states, warm[0].clone(), solution.end, solution.residuals))
        return found

    parts = spmd(body)
    for which, wanted in enumerate((cold, expected)):
        states, tau, end, _ = wanted[-1]
        assert torch.allclose(joined([part[which][0] for part in parts]), states, rtol=1e-11, atol=1e-12)
        assert torch.allclose(joined([part[which][1] for part in parts]), tau, rtol=1e-10, atol=1e-12)
        (last,) = [part[which][2] for part in parts if part[which][2] is not None]
        assert torch.allclose(last, end, rtol=1e-11, atol=1e-12)
        for part in parts:
            assert part[which][3] == pytest.approx([each[3] for each in wanted], rel=1e-6, abs=1e-13)
    assert expected[0][3] > 1e-4, "the old tau is not that of the new weights"


@ALL_RANKS
@pytest.mark.parametrize(("width", "batch"), [(3, 2), (5, 251)])
def test_the_same_bits_on_any_number_of_ranks(spmd, width, batch):
    for count, cfactor, levels in HIERARCHIES if batch < 10 else HIERARCHIES[1:2]:
        case = chain(count, "smooth_relu", 4.0, 0.3, width, batch)
        options = one_shot(cfactor=cfactor, max_levels=levels, max_iter=2, tol=0.0)
        serial = solve(SerialCommunicator(), options, case)
        parts = spmd(lambda comm, o=options, c=case: solve(comm, o, c))
        assert serial.forward.residual > 1e-9, "too close to the solution to tell anything"
        for which in ("forward", "adjoint"):
            expected, found = getattr(serial, which), [getattr(part, which) for part in parts]
            for level, rows in enumerate(expected.warm):
                assert torch.equal(joined([each.warm[level] for each in found]), rows), (options, which, level)
            assert [torch.equal(each.end, expected.end) for each in found if each.end is not None] == [True]
            assert all(each.residuals == expected.residuals for each in found), (options, which)
        assert same_bits([part.states for part in parts], serial.states), options
        assert same_bits([part.gradient for part in parts], serial.gradient), options


def test_with_the_same_weights_again_one_sweep_is_exact(spmd):
    """The tau of a converged solve makes the coarse sweep exact."""
    case = chain(32, "tanh", T=3.0)
    options = one_shot(cfactor=4, max_levels=2, max_iter=30, tol=1e-14)

    def body(comm):
        hierarchy = Hierarchy.plan(options, LayerGrid(32, 3.0), comm.size)
        solved = solve(comm, options, case)
        steps = ResidualSteps(DenseLayer(3, 3, "tanh"), case.theta[solved.rows], case.h)
        gradient, solver = torch.empty_like(solved.gradient), Solver(replace(options, tol=1e-8), hierarchy, comm)
        forward = solver.solve(Forward(steps, solved.states, case.u0), case.u0, solved.forward.warm)
        adjoint = solver.solve(Adjoint(steps, solved.states, gradient), case.vN, solved.adjoint.warm)
        return forward, adjoint, float((gradient - solved.gradient).abs().max()) if len(gradient) else 0.0

    for forward, adjoint, difference in spmd(body):
        assert forward.sweeps == adjoint.sweeps == 1 and max(forward.residual, adjoint.residual) < 1e-13
        assert difference < 1e-12


def test_the_tolerance_stops_where_it_should_and_errors_are_estimated(spmd):
    case = chain(64, "smooth_relu", T=3.0)
    options = one_shot(cfactor=8, max_levels=2, max_iter=6, tol=0.0)
    full = spmd(lambda comm: solve(comm, options, case))[0]
    history = full.forward.residuals
    assert len(history) == full.forward.sweeps == 6 and history[0] > 1e-4
    # The change by a correction is about the error before it: what the next iterate is compared with is closer by far.
    exact = case.solved[0][:-1]
    for stop in range(3):
        parts = spmd(lambda comm, t=history[stop] * (1 + 1e-9): solve(comm, replace(options, tol=t), case))
        assert all(part.forward.residuals == history[: stop + 1] for part in parts)
        states = joined([part.states for part in parts])
        error = float((states - exact).norm() / exact.norm())
        assert 0.3 * history[stop] < error < 3.0 * history[stop]


class Whole(Adjoint):
    """Adjoints whose second coarse sweep is a whole one, with a correction behind it."""

    def linear(self, coarse):
        return None

    def correct(self, before, after, coarse):
        Adjoint(self.steps, self.states, self.gradient).correct(before, after, coarse)


class WholeTrajectory(AdjointTrajectory):
    linear = Whole.linear


@pytest.mark.parametrize("norm", [1, 2, "max"])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_sweep_of_changes_is_a_whole_sweep_and_a_correction(spmd, norm, parts):
    case = chain(32, "smooth_relu", T=3.0)
    options = one_shot(cfactor=4, max_levels=2, coarse_parts=parts, max_iter=2, tol=0.0, norm=norm)

    def body(comm):
        solved, found = solve(comm, options, case), []
        solver = Solver(options, Hierarchy.plan(options, LayerGrid(32, 3.0), comm.size), comm)
        steps = ResidualSteps(DenseLayer(3, 3, "smooth_relu"), case.theta[solved.rows], case.h)
        start = case.vN if solved.rows.start < solved.rows.stop == 32 else None
        for kinds in ((Adjoint, AdjointTrajectory), (Whole, WholeTrajectory)):
            gradient, kept = torch.empty_like(solved.gradient), torch.empty_like(solved.states)
            for kind, arrays in zip(kinds, ({"gradient": gradient}, {"gradient": None, "kept": kept}), strict=True):
                propagator = kind(steps, solved.states, **arrays)
                solution = solver.solve(propagator, start, max_iter=2, exact=True)
                found.append((gradient, kept, *solution.warm, solution.end, torch.tensor(solution.residuals)))
        return found

    for one, trajectory, whole, whole_trajectory in spmd(body):
        for ours, theirs in ((one, whole), (trajectory, whole_trajectory)):
            for a, b in zip(ours, theirs, strict=True):
                assert a is b is None or torch.allclose(a, b, rtol=1e-10, atol=1e-13)
        assert float(one[-1][-1]) > 1e-6, "too close to the solution to tell anything"


class Picky:
    """A monitor that is content after some iterations; its numbers are sums over the intervals."""

    def __init__(self, intervals, content):
        self.intervals, self.content, self.seen = intervals, content, []

    def measure(self, end, before):
        columns = torch.ones(self.intervals, 2, dtype=torch.float64)
        if end is not None:
            columns[-1, 1] += (end - before).norm()
        return columns

    def suffices(self, sums):
        self.seen.append(sums.tolist())
        return len(self.seen) >= self.content


def test_the_monitor_decides_with_the_tolerance(spmd):
    case = chain(32, "tanh", T=3.0)

    def body(comm, options, content):
        hierarchy = Hierarchy.plan(options, LayerGrid(32, 3.0), comm.size)
        first, count = hierarchy.partition.first(comm.rank), hierarchy.partition.count(comm.rank)
        steps = ResidualSteps(DenseLayer(3, 3, "tanh"), case.theta[first : first + count], case.h)
        monitor = Picky(hierarchy.intervals.count(comm.rank), content)
        states = torch.empty(count, *case.u0.shape, dtype=torch.float64)
        solution = Solver(options, hierarchy, comm).solve(Forward(steps, states, case.u0), case.u0, monitor=monitor)
        return solution.sweeps, monitor.seen, solution.measured.tolist()

    loose = one_shot(cfactor=4, max_levels=2, tol=1e3)
    for content, most in ((1, 1), (3, 3), (99, 10)):
        found = spmd(lambda comm, c=content: body(comm, loose, c))
        for sweeps, seen, measured in found:
            assert sweeps == len(seen) == most and measured == seen[-1]
            assert seen == found[0][1] and all(each[0] == 8 for each in seen), "the same sums on all ranks"
            changes = [each[1] - 8 for each in seen]
            assert changes[0] > 1e-4 and all(b < 0.5 * a for a, b in zip(changes[:3], changes[1:3], strict=False))


def test_nan_ends_the_iteration(spmd):
    case = chain(32, "tanh", T=3.0)
    spoiled = replace(case, theta=case.theta.clone())
    spoiled.theta[17] = torch.nan
    options = one_shot(cfactor=4, max_levels=2)
    for solved in spmd(lambda comm: solve(comm, options, spoiled).forward):
        assert solved.sweeps == 1 and solved.residual != solved.residual


def test_defaults_by_depth():
    """Eight intervals, or what divides the depth; none where coarse steps would be the fine ones."""
    for count, levels in (
        (64, [64, 8]),
        (32, [32, 8]),
        (30, [30, 6]),
        (16, [16]),
        (8, [8]),
        (31, [31]),
        (1024, [1024, 8]),
    ):
        hierarchy = Hierarchy.plan(MGRIT(), LayerGrid(count, 1.0), 3)
        assert [level.num_steps for level in hierarchy.levels] == levels
    deep = Hierarchy.plan(MGRIT(intervals=256), LayerGrid(4096, 1.0), 3)
    assert [level.num_steps for level in deep.levels] == [4096, 256, 64, 16]
    assert [MGRIT(coarse_parts=4).parts(c) for c in (2, 4, 8, 12, 7)] == [1, 2, 4, 4, 1]
    assert (MGRIT().scheme, MGRIT().parts(8), MGRIT(cycle="V").scheme, MGRIT(cycle="V").parts(8)) == (
        "euler",
        2,
        "midpoint",
        1,
    )
    own = MGRIT().for_adjoint()
    assert (MGRIT().tolerance, own.tolerance, MGRIT(tol=1e-3).for_adjoint().tolerance) == (1e-2, 5e-2, 1e-3)
    assert (MGRIT().for_adjoint(3, 0.0).iterations, MGRIT().for_adjoint(3, 0.0).tolerance) == (3, 0.0)
    assert (MGRIT().iterations, MGRIT(cycle="F").iterations, MGRIT(cycle="F").tolerance) == (10, 2, 0.0)
