"""Weighted C-relaxation, full multigrid start, norms and tolerances, against the textbook iteration by iteration."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import reference as ref
import torch
from chain_solves import both_solves, chain, chains_and_states, deviation, joined, options_for, solve

from xbraid_py import MGRIT
from xbraid_py.mgrit.norms import Norm, Size, Stop

HIERARCHIES = [(16, 4, 2), (16, 2, 3), (32, (2, 4), 3)]


def textbook(options, case, iterations):
    """C-points and residuals of states and adjoints, and their ends, by the textbook."""
    chains, states, shape = chains_and_states(options, case)
    choices = {"weight": options.c_weight, "full": options.start == "full", "norm": options.norm}
    forward = ref.mgrit([each.forward_steps() for each in chains], *shape, case.u0, iterations, **choices)
    backwards = [each.adjoint_steps(at) for each, at in zip(chains, states, strict=True)]
    return forward, ref.mgrit(backwards, *shape, case.vN, iterations, **choices)


@pytest.mark.ranks(3, long=(1, 2, 5))
@pytest.mark.parametrize(
    ("c_weight", "start", "nrelax", "norm"),
    [(0.7, "coarsest", 1, 2), (1.3, "full", 2, 1), (1.3, "full", 2, "max"), (1.0, "full", 0, 2), (1.0, "full", 1, 2)],
)
def test_every_iteration_is_the_textbooks(spmd, c_weight, start, nrelax, norm):
    for (count, cfactor, levels), cycle in product(HIERARCHIES, "VF"):
        case = chain(count, "tanh", T=3.0)
        options = options_for(cfactor=cfactor, max_levels=levels, cycle=cycle, nrelax=nrelax, norm=norm)
        options = replace(options, c_weight=c_weight, start=start, max_iter=2)
        literal = textbook(options, case, 2)
        parts = spmd(lambda comm, options=options, case=case: both_solves(comm, options, case))
        for which in (0, 1):
            points, residuals, end = literal[which]
            found = [part[which] for part in parts]
            wanted = points[2] if which == 0 else points[2].flip(0)
            assert torch.allclose(joined([each.warm[0] for each in found]), wanted, rtol=1e-11, atol=1e-12)
            assert found[0].residuals == pytest.approx(residuals, rel=1e-6, abs=1e-14)
            assert all(each.residuals == found[0].residuals for each in found), "the same on all ranks"
            (last,) = [each.end for each in found if each.end is not None]
            assert torch.allclose(last, end, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("options", [{"c_weight": 0.8}, {"c_weight": 1.2, "cycle": "F"}, {"start": "full"}])
def test_converged_solve_is_the_sequential_one(spmd, options):
    case = chain(32, "tanh", T=2.0)
    made = options_for(**{"cfactor": 2, "max_levels": 3, "tol": 1e-13, "max_iter": 40, **options})
    assert max(deviation(part, case) for part in spmd(lambda comm: solve(comm, made, case))) < 1e-10


@pytest.mark.parametrize("norm", [1, 2, "max"])
def test_norms_are_those_of_all_numbers(norm):
    a, b = ref.random(5, 3, 4, seed=1), ref.random(5, 3, 4, seed=2)
    order = float("inf") if norm == "max" else norm
    made = Norm(norm)
    rows = made.of_intervals(a, b)
    joint = rows[0]
    for row in rows[1:]:
        joint = made.joined(joint, row)
    (size,) = made.of_sums(joint)
    wanted = (a - b).flatten().norm(order)
    assert size.absolute == pytest.approx(float(wanted), rel=1e-14)
    assert size.relative == pytest.approx(float(wanted / b.flatten().norm(order)), rel=1e-14)
    assert made.of_intervals(a[:0], b[:0]).shape == (0, 2)


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize("norm", [1, 2, "max"])
@pytest.mark.parametrize("cycle", ["V", "lagged"])
def test_absolute_and_relative_tolerances_stop_where_they_should(spmd, norm, cycle):
    """Just met after some iterations, by either bound: not one more, not one less; norms and residuals belong."""
    case = chain(64, "tanh", T=2.0)
    least = {} if cycle == "V" else {"coarse_parts": 1}
    options = MGRIT(cycle=cycle, cfactor=4, max_levels=2, min_coarse=1, norm=norm, tol=0.0, max_iter=4, **least)
    full = spmd(lambda comm: solve(comm, options, case))[0]
    for solution in (full.forward, full.adjoint):
        assert len(solution.norms) == len(solution.residuals) == (5 if cycle == "V" else 4)
        assert all(a > 0 and b > 0 for a, b in zip(solution.norms, solution.residuals, strict=True))
        scale = {round(a / b, 1) for a, b in zip(solution.norms[1:], solution.residuals[1:], strict=True)}
        assert len(scale) <= 2, "the norm of the states hardly changes"
    for stop in range(1, 3):
        for bound in ({"tol": full.forward.residuals[stop]}, {"atol": full.forward.norms[stop]}):
            (name, value) = next(iter(bound.items()))
            limited = replace(options, **{name: value * (1 + 1e-9)})
            found = [part.forward for part in spmd(lambda comm, o=limited: solve(comm, o, case))]
            assert all(each.residuals == full.forward.residuals[: stop + 1] for each in found), name
            assert all(each.norms == full.forward.norms[: stop + 1] for each in found)


def test_full_multigrid_begins_with_a_smaller_residual(spmd):
    case = chain(128, "tanh", T=3.0)
    options = options_for(cfactor=2, max_levels=5, max_iter=0)

    def residual(start):
        return spmd(lambda comm: solve(comm, replace(options, start=start), case).forward.residual)[0]

    plain, full = residual("coarsest"), residual("full")
    assert full < 0.3 * plain


def test_stop():
    assert Stop(0.0).met(Size(0.0, 0.0)) and not Stop(0.0).met(Size(1e-300, 1e-300)) and not Stop(0.0).watches
    assert Stop(0.0, 1e-3).met(Size(1e-4, 1.0)) and not Stop(0.0, 1e-3).met(Size(1e-2, 1e-9))
    assert Stop(1e-3).met(Size(10.0, 1e-4)) and Stop(1e-3).watches and Stop(0.0, 1.0).watches
    assert not Stop(1e-3, 1e-3).met(Size(float("nan"), float("nan")))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"cycle": "V", "c_weight": 0.0}, "c_weight=0.0 must lie between 0 and 2; use 1.0"),
        ({"cycle": "V", "c_weight": float("nan")}, "c_weight=nan must lie between 0 and 2"),
        ({"c_weight": 0.5}, "c_weight=0.5 is for V- and F-cycles; cycle='lagged' has no C-relaxation"),
        ({"start": "full"}, "start='full' is for V- and F-cycles"),
        ({"cycle": "V", "start": "half"}, "start='half' must be coarsest or full; use coarsest"),
        ({"norm": 3}, "norm=3 must be 2 or 1 or max; use 2"),
        ({"atol": -1.0}, "atol=-1.0 must be at least 0 and finite"),
        ({"atol": float("inf")}, "atol=inf must be at least 0 and finite"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        MGRIT(**options)
