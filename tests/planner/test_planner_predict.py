"""The planner's predictions, its choice of a plan, and what it measures."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from xbraid_py.comm import SerialCommunicator
from xbraid_py.mgrit import Hierarchy
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.planner import (
    CLUSTER,
    SERIAL,
    SHARED_MEMORY,
    Costs,
    Link,
    Machine,
    Plan,
    Planner,
    SolveCosts,
    StepCost,
    Workload,
    advice,
    assumed_machine,
    candidates,
    measure_costs,
    measure_machine,
)
from xbraid_py.planner.predict import MIN_COARSE
from xbraid_py.planner.recommend import headings, lines, show
from xbraid_py.problem.options import DenseResNetOptions


def step(each):
    return StepCost(1e-5, each)


STATES = SolveCosts(step(35e-6), step(36e-6), step(30e-6), step(100e-6), step(90e-6), step(0.0), 1e-6, 1.5e-3, 7e-4)
ADJOINTS = SolveCosts(step(78e-6), step(79e-6), step(70e-6), step(210e-6), step(200e-6), step(210e-6), 2e-6, 4e-4, 0.0)
COSTS = Costs(320000, 576, STATES, ADJOINTS, 25e-6, 3e-6, 8e-4, 3e-6)
MACHINE = Machine(4, 4, Link(1e-6, 8e9, 1e-6, "made up"), CLUSTER, 1.1)
PLANNER = Planner(MACHINE, COSTS)
SMALL = Workload(num_layers=16, batch=20, architecture=DenseResNetOptions(width=3))


def test_serial_propagation_is_its_own_measure():
    found = PLANNER.predict(SERIAL, 100, 1)
    assert found.speedup == pytest.approx(1.0) and found.efficiency == pytest.approx(1.0)
    layers = 100 * (36e-6 + 80e-6 + 3e-6)
    assert found.seconds == pytest.approx(layers + 2e-5 + 1.9e-3 + 8e-4)
    assert found.seconds == found.states + found.adjoints + found.optimizer


def test_serial_propagation_gains_nothing_from_ranks():
    seconds = [PLANNER.predict(SERIAL, 4096, ranks).seconds for ranks in (1, 2, 4, 64, 1024)]
    assert min(seconds) > 0.95 * seconds[0]
    assert seconds[-1] > seconds[-2]


def test_the_lagged_cycle_scales_better_than_published_ones():
    one_shot, published = (
        Plan(cfactors=(16, 8)),
        Plan(cycle="V", cfactors=(4, 4, 4), iterations=2, adjoint_iterations=2),
    )
    for ranks in (2, 8, 64, 512):
        ours, theirs = (PLANNER.predict(plan, 4096, ranks) for plan in (one_shot, published))
        assert ours.speedup > 1.5 * theirs.speedup
    assert PLANNER.predict(one_shot, 4096, 64).efficiency > PLANNER.predict(one_shot, 4096, 512).efficiency


def test_many_ranks_as_few_ranks():
    # Above and below the number of ranks where the simulation changes from events to arrays.
    plan = Plan(cfactors=(8,))
    seconds = [PLANNER.predict(plan, 1024, ranks).seconds for ranks in (15, 16, 17, 18)]
    assert max(seconds) < 1.1 * min(seconds)


def test_the_best_plan_is_the_fastest_candidate():
    for ranks in (1, 4, 32, 64):
        best = PLANNER.best(512, ranks, ("lagged", "V"))
        others = [PLANNER.predict(plan, 512, ranks) for plan in candidates(512, ("lagged", "V"))]
        limit = 1.03 * min(each.seconds for each in others)
        as_good = [len(each.plan.cfactors) for each in others if each.seconds <= limit]
        assert best.seconds <= limit and len(best.plan.cfactors) == min(as_good)


def test_one_rank_is_best_served_by_serial_propagation():
    assert PLANNER.best(1024, 1).plan == SERIAL
    # Where messages cost more than the layers, it is better than any number of ranks.
    slow = replace(PLANNER, machine=Machine(1, 1, SHARED_MEMORY, Link(1.0, 1e3, 1.0, "made up")))
    found = [slow.best(64, ranks) for ranks in (1, 2, 64)]
    assert found[0].plan == SERIAL and found[0].seconds < 0.1 * min(each.seconds for each in found[1:])
    assert advice(found, 64).startswith("Serial propagation on one rank is fastest here")


def test_advice_names_the_fewest_ranks_that_are_as_good():
    found = [PLANNER.best(4096, ranks) for ranks in (1, 2, 4, 64, 1024)]
    fastest = min(found, key=lambda each: each.seconds)
    text = advice(found, 4096)
    assert f"{fastest.num_ranks} ranks with {fastest.plan.text(4096)}" in text
    assert "at least 50 % up to" in text


@pytest.mark.parametrize("num_layers", [1, 2, 15, 16, 17, 24, 30, 64, 97, 1000, 4096])
def test_candidates_fit_the_depth(num_layers):
    found = list(candidates(num_layers, ("lagged", "V", "F")))
    assert found[0] == SERIAL and len(set(found)) == len(found)
    for plan in found[1:]:
        assert num_layers % plan.coarsest == 0 and num_layers // plan.coarsest >= MIN_COARSE
        planned = Hierarchy.plan(plan.options(num_layers), LayerGrid(num_layers, 1.0), 3)
        assert [level.cfactor for level in planned.levels] == [*plan.cfactors, None]
        assert plan.hierarchy(num_layers, 3).partition == planned.partition
    assert (len(found) > 1) == any(num_layers % c == 0 for c in range(2, num_layers // MIN_COARSE + 1))


def test_options_fit_other_depths_where_that_is_possible():
    for plan in (Plan(cfactors=(32,)), Plan(cfactors=(16, 4))):
        options = plan.options(256)
        for num_layers in (16, 64, 256):
            assert Hierarchy.plan(options, LayerGrid(num_layers, 1.0), 2).levels[0].num_steps == num_layers
    assert Plan(cfactors=(16, 2)).options(256).cfactor == (16, 2)


def test_memory_is_one_copy_of_the_states_and_little_more():
    states = 1024 * COSTS.state_bytes
    assert states < PLANNER.memory(SERIAL, 1024, 1) < 1.08 * states
    assert states < PLANNER.memory(Plan(cfactors=(128,)), 1024, 2) < 1.15 * states
    assert PLANNER.memory(Plan(cfactors=(2,)), 1024, 2) > 3 * states


def test_bad_arguments():
    for make, message in (
        (lambda: Plan(cycle="W"), "cycle='W' must be serial, pipeline, lagged, V or F; use lagged"),
        (lambda: Plan(cycle="V"), "exact propagation has none"),
        (lambda: Plan(cfactors=(4,), iterations=0), "iterations=0"),
        (lambda: Machine(0, 1, CLUSTER), "cores=0 must be at least 1; use 1"),
        (lambda: Machine(1, 1, CLUSTER, contention=0.5), "contention=0.5"),
        (lambda: Machine(1, 1, CLUSTER, waiting=1.5), "waiting=1.5 must be between 0 and 1"),
        (lambda: Link(-1.0, 1.0, 0.0, ""), "latency=-1.0"),
        (lambda: Link(0.0, 0.0, 0.0, ""), "bandwidth=0.0"),
        (lambda: Planner(MACHINE, COSTS, collectives=-1), "collectives=-1"),
        (lambda: Workload(num_layers=0, batch=1), "num_layers=0 must be at least 1"),
        (
            lambda: PLANNER.predict(Plan(cfactors=(3,)), 32, 2),
            "num_layers=32 is not a multiple of cfactor=3; use 30 or 33",
        ),
    ):
        with pytest.raises(ValueError) as found:
            make()
        assert message in str(found.value)


def test_the_table_holds_every_prediction(capsys):
    found = [PLANNER.best(64, ranks) for ranks in (1, 8)]
    show(lines([found[:1], [found[1], found[0]]], 64, 4))
    titles, one, eight = capsys.readouterr().out.splitlines()
    assert titles.split()[:3] == ["ranks", "nodes", "plan"] and len(titles) == len(one) == len(eight)
    assert one.split()[:3] == ["1", "1", "serial"] and eight.split()[:2] == ["8", "2"]
    assert f"{found[1].speedup:.2f}" in eight and eight.endswith("one layer after the other: 1.00")
    assert "made up" in headings(64, "of no kind", PLANNER)


@pytest.mark.ranks(1, 2, 3)
def test_constants_are_measured_on_any_number_of_ranks(spmd):
    def body(comm):
        costs, slowdowns = measure_costs(SMALL, comm, seconds=0.01)
        machine = measure_machine(SMALL, comm, slowdowns) if comm.size > 1 else assumed_machine()
        return costs, machine

    found = spmd(body)
    costs, machine = found[0]
    assert all(other == found[0] for other in found)
    assert costs.state_bytes == 3 * 20 * 8 and costs.row_bytes == 12 * 8
    for solve in (costs.states, costs.adjoints):
        for part in (solve.sweep, solve.record, solve.relax, solve.coarse_sweep, solve.coarse, solve.correct):
            assert part.call + part.each > 0.0
    assert machine.contention >= 1.0 and machine.shared.bandwidth > 0.0
    assert machine.shared.source == ("measured" if len(found) > 1 else SHARED_MEMORY.source)


def test_measured_time_is_that_of_the_machine():
    # A slower layer is seen to be slower: 40 times the samples.
    few, many = (
        measure_costs(
            replace(SMALL, batch=batch, architecture=DenseResNetOptions(width=16)), SerialCommunicator(), 0.01
        )[0]
        for batch in (500, 20000)
    )
    assert many.states.record.each > few.states.record.each
    assert many.adjoints.record.each > few.adjoints.record.each
    assert many.state_bytes == 40 * few.state_bytes
    half = replace(SMALL, dtype=torch.float32)
    assert measure_costs(half, SerialCommunicator(), 0.01)[0].state_bytes == SMALL.state_bytes // 2
