"""The planner's simulation against a literal one, closed forms, and what must be monotone."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain

import numpy as np
import planner_reference as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbraid_py.comm.partition import Partition
from xbraid_py.planner import Costs, Link, Machine, Plan, SolveCosts, StepCost
from xbraid_py.planner.clocks import Clocks, SharedCores, moves
from xbraid_py.planner.cycles import SolveWalk

SHARED, NETWORK = Link(0.3, 1e4, 0.2, "made up"), Link(0.7, 3e3, 0.5, "made up")
CLUSTER = Machine(2, 2, SHARED, NETWORK)
COSTS = Costs(
    state_bytes=1000,
    row_bytes=100,
    states=SolveCosts(
        sweep=StepCost(0.5, 1.0),
        record=StepCost(0.6, 0.9),
        relax=StepCost(0.4, 0.8),
        coarse_sweep=StepCost(0.3, 1.7),
        coarse=StepCost(0.2, 1.6),
        correct=StepCost(0.05, 0.0),
        layer=0.1,
        ends=2.0,
        check=0.7,
    ),
    adjoints=SolveCosts(
        sweep=StepCost(0.5, 2.5),
        record=StepCost(0.6, 2.4),
        relax=StepCost(0.4, 1.9),
        coarse_sweep=StepCost(0.3, 3.7),
        coarse=StepCost(0.2, 3.3),
        correct=StepCost(0.1, 3.4),
        layer=0.2,
        ends=1.5,
        check=0.0,
    ),
    vector=0.01,
    coarsen=0.02,
    optimizer=0.1,
    optimizer_layer=0.01,
)
STEPS = ("sweep", "record", "relax", "coarse_sweep", "coarse", "correct")
FREE = StepCost(0.0, 0.0)
NO_TIME = Link(0.0, 1e30, 0.0, "made up")
PLANS = [
    (24, Plan(cycle="serial")),
    (24, Plan(cfactors=(4,))),
    (24, Plan(cfactors=(3, 2), iterations=2)),
    (32, Plan(cfactors=(2, 2, 2), adjoint_iterations=3)),
    (24, Plan(cycle="V", cfactors=(4,), nrelax=0, iterations=2)),
    (48, Plan(cycle="V", cfactors=(2, 3, 2), iterations=2)),
    (32, Plan(cycle="F", cfactors=(2, 4, 2), nrelax=2)),
    (48, Plan(cycle="V", cfactors=(4, 3), euler=True)),
]
EACH_PLAN = pytest.mark.parametrize(("num_layers", "plan"), PLANS, ids=lambda value: getattr(value, "cycle", value))


def simulated(clock, plan, num_layers, costs=COSTS, direction=1):
    num_ranks = len(clock.time) if isinstance(clock, Clocks) else len(clock._programmes)
    SolveWalk(clock, plan, plan.hierarchy(num_layers, num_ranks), costs, direction).run()
    return clock.finish()


def literal(num_ranks, plan, num_layers, costs=COSTS, direction=1):
    return [reference.Rank(rank, plan, num_layers, num_ranks, costs, direction).solve() for rank in range(num_ranks)]


@EACH_PLAN
@pytest.mark.parametrize("num_ranks", [1, 2, 3, 5, 16])
@pytest.mark.parametrize("direction", [+1, -1])
@pytest.mark.parametrize("clock", [Clocks, SharedCores])
def test_as_the_literal_simulation(num_layers, plan, num_ranks, direction, clock):
    found = simulated(clock(CLUSTER, num_ranks), plan, num_layers, direction=direction)
    assert found == pytest.approx(reference.exact(literal(num_ranks, plan, num_layers, direction=direction), CLUSTER))


@EACH_PLAN
@pytest.mark.parametrize("num_ranks", [3, 4])
def test_shared_cores_as_slices_of_time(num_layers, plan, num_ranks):
    machine = Machine(2, 4, SHARED, NETWORK, contention=1.5, waiting=0.2)
    ranks = literal(num_ranks, plan, num_layers)
    found = simulated(SharedCores(machine, num_ranks), plan, num_layers)
    assert found == pytest.approx(reference.sliced(ranks, machine, 2e-3), rel=0.02)
    assert found > 1.2 * reference.exact(literal(num_ranks, plan, num_layers), machine) or plan.cycle == "serial"


@EACH_PLAN
def test_one_rank_does_all_the_work(num_layers, plan):
    work = [what for kind, what in chain(*literal(1, plan, num_layers)) if kind == "work"]
    for clock in (Clocks, SharedCores):
        assert simulated(clock(CLUSTER, 1), plan, num_layers) == pytest.approx(sum(work))


@pytest.mark.parametrize(("num_ranks", "per_rank"), [(1, 8), (2, 4), (4, 3), (7, 1), (64, 2)])
def test_closed_form_of_two_levels(num_ranks, per_rank):
    c, coarse, fine = 5, 2.0, 3.0
    steps = SolveCosts(FREE, StepCost(0.0, fine), FREE, StepCost(0.0, coarse), FREE, FREE, 0.0, 0.0, 0.0)
    costs = replace(COSTS, states=steps, vector=0.0, coarsen=0.0)
    machine = Machine(1, 1, NO_TIME, NO_TIME)
    plan = Plan(cfactors=(c,))
    # Rank r relaxes from its turn (r + 1) on; the second sweep reaches each rank just when it is through.
    expected = (num_ranks + 1) * per_rank * coarse + per_rank * c * fine
    found = simulated(Clocks(machine, num_ranks), plan, num_ranks * per_rank * c, costs)
    assert found == pytest.approx(expected)


@EACH_PLAN
@pytest.mark.parametrize("num_ranks", [1, 4, 40])
def test_slower_parts_never_make_a_solve_faster(num_layers, plan, num_ranks):
    def seconds(machine=CLUSTER, **changes):
        return simulated(Clocks(machine, num_ranks), plan, num_layers, replace(COSTS, **changes))

    base = seconds()
    slow = Link(0.9, 2e3, 0.9, "made up")
    assert seconds(replace(CLUSTER, shared=slow)) >= base
    assert seconds(replace(CLUSTER, network=slow)) >= base
    assert seconds(replace(CLUSTER, contention=1.4)) >= base
    assert seconds(vector=0.02) >= base and seconds(coarsen=0.04) >= base
    # Where everything costs twice as much, everything takes twice as long.
    double = {name: getattr(COSTS, name) * 2 for name in ("vector", "coarsen")}
    for name in ("states", "adjoints"):
        old = getattr(COSTS, name)
        steps = {step: StepCost(2 * getattr(old, step).call, 2 * getattr(old, step).each) for step in STEPS}
        double[name] = SolveCosts(**steps, layer=2 * old.layer, ends=2 * old.ends, check=2 * old.check)
    links = [Link(2 * one.latency, one.bandwidth / 2, 2 * one.stage, "made up") for one in (SHARED, NETWORK)]
    assert seconds(Machine(2, 2, *links), **double) == pytest.approx(2 * base)


def test_ranks_that_share_cores_take_turns():
    machine = Machine(2, 4, SHARED, contention=1.0)
    for busy, expected in ((1, 3.0), (2, 3.0), (3, 4.5), (4, 6.0)):
        clock = SharedCores(machine, 4)
        clock.work(np.array([3.0] * busy + [0.0] * (4 - busy)))
        assert clock.finish() == pytest.approx(expected)
    # Three that wait take something of the one that works; where all work, they take turns as before.
    for busy, expected in ((1, 3.75), (4, 6.0)):
        clock = SharedCores(replace(machine, waiting=0.5), 4)
        clock.work(np.array([3.0] * busy + [0.0] * (4 - busy)))
        assert clock.finish() == pytest.approx(expected)
    clock = SharedCores(replace(machine, contention=1.5), 4)
    clock.work(np.array([1.0, 3.0, 0.0, 0.0]))
    # Together until 1.5, when the first is through; then the second alone.
    assert clock.finish() == pytest.approx(1.5 + 2.0)


def test_of_a_collective_all_are_through_together():
    for kind in (Clocks, SharedCores):
        clock = kind(CLUSTER, 4)
        clock.work(np.array([1.0, 4.0, 2.0, 3.0]))
        clock.collective(3000.0)
        clock.work(np.array([1.0, 0.0, 0.0, 0.0]))
        # log2(2) stages on a node, log2(2) between two nodes, and the bytes over the network.
        assert clock.finish() == pytest.approx(4.0 + 0.2 + 0.5 + 1.0 + 1.0)


@given(
    st.lists(st.integers(0, 6), min_size=1, max_size=8).filter(any),
    st.randoms(use_true_random=False),
)
def test_moves_are_those_of_the_partitions(old, random):
    new = list(old)
    random.shuffle(new)
    source, target = (Partition(tuple(np.cumsum([0, *counts]).tolist())) for counts in (old, new))
    expected = [
        (rank, peer, part.stop - part.start)
        for rank in range(len(old))
        for peer, part in source.overlaps(rank, target)
        if peer != rank
    ]
    assert sorted(zip(*(array.tolist() for array in moves(source, target)), strict=True)) == sorted(expected)
