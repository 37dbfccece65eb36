"""MGRIT iteration by iteration: the textbook's C-points, residuals, rates, warm starts, transposition."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product

import pytest
import reference as ref
import torch
from chain_solves import both_solves, chain, chains_and_states, deviation, joined, options_for, solve

from xbraid_py.kernels import fallback
from xbraid_py.mgrit import Hierarchy, Solver
from xbraid_py.mgrit.grid import LayerGrid

# With four levels an F-cycle differs from V-cycles alone only if the third is not solved by one of them.
HIERARCHIES = [(16, 4, 2), (16, 2, 3), (48, (3, 2), 4), (32, (2, 4), 3)]


@cache
def literal(options, case, iterations):
    """C-points of states and adjoints after every iteration, by the textbook."""
    chains, states, shape = chains_and_states(options, case)
    forward = ref.mgrit([each.forward_steps() for each in chains], *shape, case.u0, iterations)
    backwards = [each.adjoint_steps(at) for each, at in zip(chains, states, strict=True)]
    return forward, ref.mgrit(backwards, *shape, case.vN, iterations)


@pytest.mark.ranks(3, long=(1,))
@pytest.mark.parametrize("coarse", [("average", "midpoint"), ("inject", "euler")])
@pytest.mark.parametrize(("nrelax", "nrelax0"), [(0, None), (1, None), (1, 0), (0, 2)])
@pytest.mark.parametrize("cycle", ["V", "F"])
def test_every_iteration_is_the_textbooks(spmd, cycle, nrelax, nrelax0, coarse):
    """C-points, residuals and outputs from the first guess on."""
    # The reference is slow, and over MPI every rank computes it: with many on few cores every other hierarchy will do.
    size = spmd(lambda comm: comm.size)[0]
    for count, cfactor, levels in HIERARCHIES[:: 1 if size <= 3 else 2]:
        case = chain(count, "smooth_relu", T=3.0)
        options = options_for(cfactor=cfactor, max_levels=levels, cycle=cycle, nrelax=nrelax, nrelax0=nrelax0)
        options = replace(options, coarse_weights=coarse[0], coarse_step=coarse[1])
        forward, adjoint = literal(options, case, 3)

        def body(comm, options=options, case=case):
            return [both_solves(comm, replace(options, max_iter=iterations), case) for iterations in range(4)]

        parts = spmd(body)
        for iterations, which in product(range(4), (0, 1)):
            points, residuals, end = (forward, adjoint)[which]
            found = [part[iterations][which] for part in parts]
            points = points[iterations] if which == 0 else points[iterations].flip(0)
            assert torch.allclose(joined([each.warm[0] for each in found]), points, rtol=1e-11, atol=1e-12)
            assert len(found[0].residuals) == iterations + 1
            assert found[0].residuals == pytest.approx(residuals[: iterations + 1], rel=1e-6, abs=1e-14)
            assert all(each.residuals == found[0].residuals for each in found), "the same on all ranks"
            if iterations == 3:
                (last,) = [each.end for each in found if each.end is not None]
                assert torch.allclose(last, end, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("cycle", ["V", "F"])
def test_residuals_fall_and_the_tolerance_stops_where_it_should(spmd, cycle):
    case = chain(64, "tanh", T=2.0)
    options = options_for(cfactor=4, max_levels=3, cycle=cycle, max_iter=6)
    full = spmd(lambda comm: solve(comm, options, case))
    for history in (full[0].forward.residuals, full[0].adjoint.residuals):
        assert len(history) == 7
        assert all(b < 0.5 * a for a, b in zip(history, history[1:4], strict=False)), history
        assert history[-1] < 1e-5 * history[0]
    history = full[0].forward.residuals
    for stop in range(5):
        # Just met after `stop` iterations: not one more, not one less.
        tolerance = history[stop] * (1 + 1e-9)
        parts = spmd(lambda comm, tol=tolerance: solve(comm, replace(options, tol=tol), case).forward)
        # The residuals of a run with tolerance are those of a run without.
        assert all(part.residuals == history[: stop + 1] for part in parts)
        fixed = spmd(lambda comm, count=stop: solve(comm, replace(options, max_iter=count), case).forward)
        assert all(torch.equal(a.warm[0], b.warm[0]) for a, b in zip(parts, fixed, strict=True))
        assert all(a.residual == history[stop] for a in fixed)
    limited = spmd(lambda comm: solve(comm, replace(options, tol=1e-30, max_iter=2), case).forward.residuals)
    assert all(part == history[:3] for part in limited)
    # More iterations than the options ask for, but never fewer.
    more = spmd(lambda comm: solve(comm, replace(options, max_iter=2), case, max_iter=4).forward.residuals)
    fewer = spmd(lambda comm: solve(comm, replace(options, max_iter=2), case, max_iter=1).forward.residuals)
    assert all(len(part) == 5 for part in more) and all(len(part) == 3 for part in fewer)


def test_recorded_states_and_gradient_are_those_of_the_last_sweep(spmd):
    """With a tolerance or without: row i of the states is what the last relaxation put into layer i."""
    case = chain(16, "tanh", T=3.0)
    for tol, max_iter in product((0.0, 1e-3), (0, 1, 3)):
        options = options_for(cfactor=4, max_levels=2, tol=tol, max_iter=max_iter)
        parts = spmd(lambda comm, o=options: solve(comm, o, case))
        states, points = (
            joined([take(part) for part in parts]) for take in (lambda p: p.states, lambda p: p.forward.warm[0])
        )
        for i, u in enumerate(states):
            if i % 4 == 0:
                assert torch.equal(u, points[i // 4])
            else:
                before = ref.step(case.theta[i - 1], states[i - 1], case.h, "tanh")
                assert torch.allclose(u, before, rtol=1e-13, atol=1e-13)
        assert not joined([part.gradient for part in parts]).isnan().any()


def test_midpoint_with_averages_converges_faster_than_injection(spmd):
    """At least three times less error an iteration on a smooth network (design, 4.3)."""
    case = chain(128, "tanh", T=3.0, rough=0.0)

    def rate(weights, scheme):
        options = options_for(cfactor=4, max_levels=2, nrelax=0, max_iter=3)
        options = replace(options, coarse_weights=weights, coarse_step=scheme)
        history = spmd(lambda comm: solve(comm, options, case).forward.residuals)[0]
        return (history[0] / history[3]) ** (1 / 3)

    rates = {scheme: rate(*scheme) for scheme in product(("average", "inject"), ("midpoint", "euler"))}
    assert rates["inject", "euler"] > 2.0, "it converges at all"
    assert rates["average", "midpoint"] > 3.0 * rates["inject", "euler"], rates
    assert max(rates, key=rates.get) == ("average", "midpoint")


@pytest.mark.parametrize("cycle", ["V", "F"])
def test_warm_start(spmd, cycle):
    case = chain(32, "tanh", T=3.0)
    options = options_for(cfactor=4, max_levels=3, cycle=cycle, max_iter=14)
    nothing = replace(options, max_iter=0)

    def body(comm):
        full = solve(comm, options, case)
        guess = (full.forward.warm[0], full.adjoint.warm[0])
        kept = [points.clone() for points in guess]
        again = solve(comm, nothing, case, guess)
        untouched = all(torch.equal(a, b) for a, b in zip(guess, kept, strict=True))
        mine, all_noise = slice(full.rows.start // 4, full.rows.stop // 4), ref.random(8, 3, 2, seed=9)
        noise = all_noise[mine].clone()
        far = solve(comm, nothing, case, (noise, noise))
        untouched &= torch.equal(noise, all_noise[mine])
        stopped = solve(comm, replace(options, tol=1e-10), case, guess)
        cold = solve(comm, nothing, case)
        return again, untouched, noise, far, stopped, cold, deviation(again, case)

    for again, untouched, noise, far, stopped, cold, wrong in spmd(body):
        assert wrong < 1e-12 and untouched
        for solution in (again.forward, again.adjoint):
            assert len(solution.residuals) == 1 and solution.residual < 1e-14
        assert len(stopped.forward.residuals) == len(stopped.adjoint.residuals) == 1
        assert cold.forward.residual > 1e-4 and far.forward.residual > 0.1
        # Given points are relaxed from, and stay as they are but for the first, which is the given state.
        mine = again.rows.start // 4
        for points, fixed, start in ((far.forward.warm[0], 0, case.u0), (far.adjoint.warm[0], 7, case.vN)):
            for k, point in enumerate(points):
                assert torch.equal(point, start if mine + k == fixed else noise[k])


def test_chunks_do_not_matter(spmd, monkeypatch):
    case = chain(64, "tanh", T=3.0)
    options = options_for(cfactor=4, max_levels=3)
    found = []
    for size in (1, 3 * 48, 1 << 19):
        monkeypatch.setattr(fallback, "CHUNK_BYTES", size)
        found.append(spmd(lambda comm: solve(comm, options, case)))
    for parts in found[1:]:
        for a, b in zip(parts, found[0], strict=True):
            assert torch.equal(a.forward.warm[0], b.forward.warm[0]) and torch.equal(a.states, b.states)
            assert torch.equal(a.adjoint.warm[0], b.adjoint.warm[0]) and torch.equal(a.gradient, b.gradient)


@dataclass(frozen=True)
class Tangent:
    """Linearized steps d + h sigma'(W u + b) W d, written out: a third propagator for the same solver."""

    theta: torch.Tensor
    states: torch.Tensor
    h: float
    direction = +1
    cost = 1.0
    transfer = None

    def step(self, x):
        found = x.clone()
        for i, (row, u, d) in enumerate(zip(self.theta, self.states, x, strict=True)):
            weight = row[:9].reshape(3, 3)
            found[i] = d + self.h * (1 - torch.tanh(weight @ u + row[9:, None]) ** 2) * (weight @ d)
        return found

    def relax(self, points, cfactor, tau=None, record=False, inputs=None):
        x = points
        for j in range(cfactor):
            rows = slice(j, None, cfactor)
            if inputs is not None:
                inputs[rows] = x
            x = replace(self, theta=self.theta[rows], states=self.states[rows]).step(x)
            x = x if tau is None else x + tau[rows]
        return x

    def coarsen(self, cfactor, weights, scheme, parts):
        return Tangent(self.theta[::cfactor], self.states[::cfactor], cfactor * self.h)

    def redistribute(self, comm, source, target):
        moved = [comm.redistribute(each.contiguous(), source, target) for each in (self.theta, self.states)]
        return Tangent(*moved, self.h)

    def empty(self, num_rows):
        return self.states.new_empty((num_rows, *self.states.shape[1:]))


def test_the_adjoint_is_the_transpose_of_the_linearized_solve(spmd):
    """<v, J d> = <J^T v, d>, both by converged MGRIT, the tangent written out by hand."""
    case = chain(24, "tanh", T=2.0)
    options = options_for(cfactor=(2, 3), max_levels=3, max_iter=14)
    d = ref.random(3, 2, seed=11)

    def body(comm):
        solved = solve(comm, options, case)
        hierarchy = Hierarchy.plan(options, LayerGrid(24, 2.0), comm.size)
        tangent = Tangent(case.theta[solved.rows], solved.states, case.h)
        return Solver(options, hierarchy, comm).solve(tangent, d).end, solved.adjoint.end

    parts = spmd(body)
    (forward,) = [part[0] for part in parts if part[0] is not None]
    (backward,) = [part[1] for part in parts if part[1] is not None]
    left, right = (case.vN * forward).sum(), (backward * d).sum()
    assert abs(left - right) < 1e-12 * case.vN.norm() * forward.norm()
    assert (forward - d).norm() > 0.1 * d.norm(), "the Jacobian is not the identity"
