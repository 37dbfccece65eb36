"""Options of MGRIT and the planning of its levels: integers, messages, and the count of the work."""

from __future__ import annotations

import re

import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.partition import Partition
from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.mgrit import MGRIT, Hierarchy, Solver
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.testing import run_threads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cfactor": 1}, "cfactor=1 must be at least 2 on every level; use 4"),
        ({"cfactor": 0}, "cfactor=0 must be at least 2"),
        ({"cfactor": -4}, "cfactor=-4 must be at least 2"),
        ({"cfactor": (4, 1)}, "cfactor=(4, 1) must be at least 2 on every level; use 4"),
        ({"cfactor": ()}, "cfactor=() must be at least 2"),
        ({"max_levels": 0}, "max_levels=0 must be at least 1; use 1"),
        ({"min_coarse": 0}, "min_coarse=0 must be at least 1; use 1"),
        ({"nrelax": -1}, "nrelax=-1 must be at least 0; use 1"),
        ({"nrelax0": -2}, "nrelax0=-2 must be at least 0; use 1"),
        ({"cycle": "V", "max_iter": -1}, "max_iter=-1 must be at least 0; use 1"),
        ({"max_iter": 0}, "max_iter=0 must be at least 1; use 1"),
        ({"intervals": 1}, "intervals=1 must be at least 2; use 2"),
        ({"coarse_parts": 0}, "coarse_parts=0 must be at least 1; use 1"),
        ({"tol": -1e-6}, "tol=-1e-06 must be at least 0 and finite; use 1e-6"),
        ({"tol": float("nan")}, "tol=nan must be at least 0"),
        ({"tol": float("inf")}, "tol=inf must be at least 0"),
        ({"cycle": "pipeline", "max_levels": 2}, "max_levels=2: cycle='pipeline' has one level"),
        ({"portions": 0}, "portions=0 must be at least 1; use 1"),
        ({"cycle": "W"}, "cycle='W' must be lagged or pipeline or V or F; use lagged"),
        ({"coarse_weights": "mean"}, "coarse_weights='mean' must be average or inject; use average"),
        ({"coarse_step": "rk4"}, "coarse_step='rk4' must be midpoint or euler; use midpoint"),
    ],
)
def test_bad_options_name_what_works(options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        MGRIT(**options)


def test_limits_are_allowed():
    options = MGRIT(cycle="F", cfactor=2, max_levels=1, min_coarse=1, nrelax=0, nrelax0=0, max_iter=0, tol=0.0)
    assert (options.nrelax_of(0), options.nrelax_of(1), options.cfactor_of(0, 64)) == (0, 0, None)


def test_one_number_or_one_for_each_level():
    options = MGRIT(cycle="V", cfactor=(8, 4, 2), max_levels=6, nrelax=1, nrelax0=0)
    assert [options.cfactor_of(level, 64) for level in range(6)] == [8, 4, 2, 2, 2, None]
    assert [options.nrelax_of(level) for level in range(3)] == [0, 1, 1]
    assert [MGRIT(nrelax=3).nrelax_of(level) for level in range(3)] == [3, 3, 3]
    assert [MGRIT(nrelax=0, nrelax0=2).nrelax_of(level) for level in range(3)] == [2, 0, 0]


def plan(num_layers: int, num_ranks: int = 1, **options) -> Hierarchy:
    return Hierarchy.plan(MGRIT(**{"cycle": "V", "min_coarse": 1, **options}), LayerGrid(num_layers, 2.0), num_ranks)


def sizes(hierarchy: Hierarchy) -> list[int]:
    return [level.num_steps for level in hierarchy.levels]


@pytest.mark.parametrize(
    ("num_layers", "options", "expected"),
    [
        (64, {"cfactor": 4, "max_levels": 1}, [64]),
        (64, {"cfactor": 4, "max_levels": 2}, [64, 16]),
        (64, {"cfactor": 4, "max_levels": 9}, [64, 16, 4, 1]),
        (64, {"cfactor": 4, "max_levels": 9, "min_coarse": 2}, [64, 16, 4]),
        (64, {"cfactor": 4, "max_levels": 9, "min_coarse": 4}, [64, 16, 4]),
        (64, {"cfactor": 4, "max_levels": 9, "min_coarse": 5}, [64, 16]),
        (64, {"cfactor": 4, "max_levels": 9, "min_coarse": 17}, [64]),
        (64, {"cfactor": (8, 2), "max_levels": 9}, [64, 8, 4, 2, 1]),
        (64, {"cfactor": (2, 8), "max_levels": 9}, [64, 32, 4]),
        (48, {"cfactor": 4, "max_levels": 9}, [48, 12, 3]),
        (48, {"cfactor": (4, 2), "max_levels": 9}, [48, 12, 6, 3]),
        (4, {"cfactor": 4, "max_levels": 3}, [4, 1]),
        (1, {"max_levels": 1}, [1]),
        (7, {"cfactor": 2, "max_levels": 1}, [7]),
    ],
)
def test_where_coarsening_ends(num_layers, options, expected):
    hierarchy = plan(num_layers, **options)
    assert sizes(hierarchy) == expected
    assert [level.index for level in hierarchy.levels] == list(range(len(expected)))
    ratios = [a // b for a, b in zip(expected, expected[1:], strict=False)]
    assert [level.cfactor for level in hierarchy.levels] == [*ratios, None]
    assert all(level.grid == LayerGrid(n, 2.0) for level, n in zip(hierarchy.levels, expected, strict=True))


@pytest.mark.parametrize(
    ("num_layers", "options", "message"),
    [
        (32, {"cfactor": 3}, r"num_layers=32 is not a multiple of cfactor=3; use 30 or 33"),
        (2, {"cfactor": 4}, r"num_layers=2 is not a multiple of cfactor=4; use 4"),
        (1, {}, r"num_layers=1 is not a multiple of cfactor=4; use 4"),
        (48, {"cfactor": (4, 8), "max_levels": 3}, r"steps_of_level_1=12 is not a multiple of cfactor=8; use 8 or 16"),
    ],
)
def test_a_factor_that_does_not_divide(num_layers, options, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        plan(num_layers, **options)
    # The same on every number of ranks.
    with pytest.raises(ValueError, match="^" + re.escape(message)):
        plan(num_layers, 7, **options)


def test_a_level_that_is_not_asked_for_need_not_divide():
    assert sizes(plan(48, cfactor=(4, 8), max_levels=2)) == [48, 12]


plans = st.tuples(
    st.lists(st.integers(2, 8), min_size=0, max_size=3),  # coarsening factors
    st.integers(1, 9),  # coarsest steps
    st.integers(1, 40),  # ranks
)


@given(plans)
def test_owners_of_every_level(case):
    factors, coarsest, num_ranks = case
    num_layers = coarsest
    for factor in factors:
        num_layers *= factor
    options = {"cfactor": tuple(factors) or 2, "max_levels": len(factors) + 1}
    hierarchy = plan(num_layers, num_ranks, **options)
    levels = hierarchy.levels
    assert [level.cfactor for level in levels] == [*factors, None]
    assert hierarchy.partition == levels[0].rows == levels[0].induced
    first = factors[0] if factors else 1
    assert hierarchy.intervals == Partition.balanced(num_layers // first, num_ranks)
    assert levels[0].rows.ranks_in_use == min(num_ranks, num_layers // first)
    for finer, level in zip(levels, levels[1:], strict=False):
        # A step belongs to the owner of its interval, and a whole interval to the owner of its first step.
        for row in range(level.num_steps):
            assert level.induced.owner(row) == finer.rows.owner(row * finer.cfactor)
            block = level.cfactor or 1
            assert level.rows.owner(row) == level.induced.owner(row - row % block)


def test_more_ranks_than_intervals():
    hierarchy = plan(8, 5, cfactor=4, max_levels=2)
    assert hierarchy.partition.bounds == (0, 4, 8, 8, 8, 8)
    assert hierarchy.intervals.counts == (1, 1, 0, 0, 0)
    assert [level.rows.ranks_in_use for level in hierarchy.levels] == [2, 2]


def test_the_printed_table():
    options = MGRIT(cycle="V", cfactor=(4, 2), max_levels=3, min_coarse=1, nrelax=1, coarse_step="euler")
    hierarchy = Hierarchy.plan(options, LayerGrid(64, 4.0), 5)
    header, *rows = hierarchy.table(options).splitlines()
    assert header.split() == ["level", "points", "intervals", "cfactor", "ranks", "step", "work"]
    cells = [row.split() for row in rows]
    assert [row[:6] for row in cells] == [
        ["0", "65", "16", "4", "5", "0.0625"],
        ["1", "17", "8", "2", "5", "0.25"],
        ["2", "9", "8", "-", "5", "0.5"],
    ]
    # By hand: 2 relaxations of 64; on level 1 tau, 1 + 2 relaxations of 16; on level 2 tau and the sweep of 8.
    work = [128, 64, 16]
    assert [row[6] for row in cells] == [f"{each / sum(work):.1%}" for each in work]
    assert len({len(line) for line in (header, *rows)}) == 1, "columns are aligned"


@pytest.mark.parametrize("options", [{}, {"cycle": "F"}, {"max_levels": 1}, {"nrelax": 0}, {"cfactor": (8, 2)}])
def test_the_shares_of_the_work_add_up(options):
    options = MGRIT(**{"cycle": "V", "min_coarse": 1, **options})
    hierarchy = Hierarchy.plan(options, LayerGrid(64, 1.0), 3)
    shares = [float(line.split()[-1].removesuffix("%")) for line in hierarchy.table(options).splitlines()[1:]]
    assert len(shares) == len(hierarchy.levels) and all(share > 0 for share in shares)
    assert abs(sum(shares) - 100.0) <= 0.05 * len(shares) + 1e-9


all_options = st.fixed_dictionaries(
    {
        "cfactor": st.sampled_from([2, 4, (4, 2), (2, 4, 2)]),
        "max_levels": st.integers(1, 5),
        "min_coarse": st.just(1),
        "nrelax": st.integers(0, 2),
        "nrelax0": st.sampled_from([None, 0, 1, 2]),
        "max_iter": st.integers(0, 3),
        "cycle": st.sampled_from("VF"),
        "coarse_step": st.sampled_from(["euler", "midpoint"]),
    }
)


@given(all_options, st.sampled_from([1, 3]))
def test_the_work_planned_is_the_work_done(options, num_ranks):
    options = MGRIT(**options)
    grid, block = LayerGrid(32, 1.0), DenseLayer(1, 1, "tanh")
    hierarchy = Hierarchy.plan(options, grid, num_ranks)
    theta, states = ref.random(32, 2, seed=1), ref.random(32, 1, 1, seed=2)

    def body(comm):
        rank = comm.rank
        mine = slice(hierarchy.partition.first(rank), hierarchy.partition.first(rank) + hierarchy.partition.count(rank))
        steps, solver = ResidualSteps(block, theta[mine], grid.h), Solver(options, hierarchy, comm)
        inner = states[mine].clone()
        points = torch.zeros(hierarchy.intervals.count(rank), 1, 1, dtype=torch.float64)
        forward = solver.solve(Forward(steps, inner, states[0]), states[0], (points,))
        adjoint = solver.solve(Adjoint(steps, inner, torch.empty_like(steps.theta)), states[0], (points,))
        one = solver.solve(Forward(steps, inner, states[0]), states[0], (points,), max_iter=options.max_iter + 1)
        return forward.work, adjoint.work, one.work - forward.work

    for forward, adjoint, cycle in run_threads(num_ranks, body) if num_ranks > 1 else [body(SerialCommunicator())]:
        assert forward == hierarchy.solve_work(options)
        assert adjoint == 2 * forward, "an adjoint step evaluates the layer twice"
        assert cycle == (sum(hierarchy.cycle_work(options)) if len(hierarchy.levels) > 1 else 0.0)


def test_a_hierarchy_for_another_number_of_ranks():
    message = re.escape("the hierarchy is planned for 3 ranks, the communicator has 1")
    with pytest.raises(ValueError, match=message):
        Solver(MGRIT(), plan(64, 3), SerialCommunicator())


def test_portions_are_a_rule_of_the_samples():
    rule = [MGRIT(cycle="pipeline").portions_of(samples) for samples in (1, 15, 16, 31, 32, 63, 64, 5000)]
    assert rule == [1, 1, 2, 2, 4, 4, 8, 8]
    assert [MGRIT(cycle="pipeline", portions=5).portions_of(samples) for samples in (1, 3, 5, 5000)] == [1, 3, 5, 5]
    assert MGRIT(cycle="V").portions_of(5000) == 1 and MGRIT(portions=4).portions_of(5000) == 4
