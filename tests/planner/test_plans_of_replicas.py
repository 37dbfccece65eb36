"""Replicas, pipelines and the plan by rule: the simulation against recursions, closed forms, and real hierarchies."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from xbraid_py.mgrit import MGRIT, Hierarchy
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.planner import (
    CONVOLUTION,
    SERIAL,
    TRANSFORMER,
    Constants,
    Costs,
    Link,
    Machine,
    Plan,
    Planner,
    SolveCosts,
    StepCost,
    Workload,
    candidates,
    choose,
    in_sentences,
    make_map,
    measured,
)
from xbraid_py.planner.clocks import Clocks, SharedCores
from xbraid_py.planner.maps import draw, powers_of_two
from xbraid_py.problem.options import DenseResNetOptions

FREE = StepCost(0.0, 0.0)
NO_TIME = Link(0.0, 1e30, 0.0, "made up")
SLOW = Link(0.3, 1e4, 0.2, "made up", 0.05)
CONSTANTS = Constants()


def pipeline(work, latency, transfer, portions):
    """End of a pipeline, portion by portion and rank by rank."""
    ends = [[0.0] * len(work) for _ in range(portions)]
    for m in range(portions):
        for p in range(len(work)):
            arrival = ends[m][p - 1] + latency if p else 0.0
            free = ends[m - 1][p] if m else 0.0
            ends[m][p] = max(arrival, free) + work[p] + (transfer if p + 1 < len(work) else 0.0)
    return ends[-1][-1]


@given(
    st.lists(st.floats(0.01, 5.0), min_size=1, max_size=6),
    st.integers(1, 9),
    st.floats(0.0, 2.0),
    st.sampled_from([1, 2, 3]),
)
def test_a_pipeline_is_its_recursion(work, portions, latency, replicas):
    size = len(work) * replicas
    machine = Machine(size, size, Link(latency, 1e3, 0.1, "made up"))
    expected = pipeline(work, latency, 0.5, portions)
    for kind in (Clocks, SharedCores):
        clock = kind(machine, size, replicas)
        clock.pipeline(np.arange(len(work)), np.array(work), 500.0, portions)
        assert clock.finish() == pytest.approx(expected)


@pytest.mark.parametrize(("portions", "stages"), [(1, 4), (8, 2), (8, 64), (32, 8), (5, 3)])
def test_a_pipeline_without_messages_has_its_closed_form(portions, stages):
    clock = Clocks(Machine(1, 1, NO_TIME, NO_TIME), stages)
    clock.pipeline(np.arange(stages), np.full(stages, 1.0 / (portions * stages)), 1.0, portions)
    assert clock.finish() == pytest.approx((portions + stages - 1) / (portions * stages))


def test_portions_of_a_pipeline_share_the_cores_of_a_node():
    clocks = [kind(Machine(2, 4, NO_TIME), 4) for kind in (Clocks, SharedCores)]
    for clock in clocks:
        clock.pipeline(np.arange(4), np.ones(4), 0.0, 30)
    slow, exact = (clock.finish() for clock in clocks)
    assert exact == pytest.approx(slow, rel=0.1) and exact == pytest.approx(60.0, rel=0.1)


@pytest.mark.parametrize("ranks", [1, 2, 6, 12])
def test_arrays_as_events_where_every_rank_has_a_core(ranks):
    costs = CONSTANTS.costs(CONSTANTS.dense(8), 96)
    machine = Machine(ranks, ranks, SLOW, SLOW)
    arrays, events = (Planner(machine, costs, events_up_to=most) for most in (0, 16))
    for plan in candidates(64, ("lagged", "V"), num_ranks=ranks, samples=96):
        assert arrays.predict(plan, 64, ranks).seconds == pytest.approx(events.predict(plan, 64, ranks).seconds)


def test_what_replicas_add():
    steps = SolveCosts(StepCost(0.0, 1.0), FREE, FREE, FREE, FREE, FREE, 0.0, 0.0, 0.0)
    few = Costs(
        0, 64, replace(steps, sweep=StepCost(0.0, 0.1)), replace(steps, sweep=StepCost(0.0, 0.1)), *[0.0] * 4, 0.01
    )
    costs = replace(few, states=steps, adjoints=steps, samples=10, others=(few,))
    machine = Machine(8, 8, Link(0.5, 64.0, 2.0, "made up", 0.25))
    plan = Plan(cycle="pipeline", replicas=4, portions=4)
    found = Planner(machine, costs, pairs=0, collectives=0).predict(plan, 16, 4)
    layers = 16 * costs.at(3).states.sweep.each
    # log2(4) stages and 16 rows of weights; the collective of the loss with 16 bytes; neighbors are on one rank.
    assert found.states == pytest.approx(layers + (2 * 2.0 + 16 * 64 / 64) + (2 * 2.0 + 16 / 64))
    # Three messages and three quarters of the weights; the gradient of 16 layers is added up once.
    assert found.adjoints == pytest.approx(layers + 16 * 0.01 + (3 * 0.25 + 0.5 + 0.75 * 16) + 16 * 0.01, rel=1e-6)


def test_costs_lie_on_lines_between_known_numbers_of_samples():
    layer = CONSTANTS.dense(8)
    costs = CONSTANTS.costs(layer, 1000)
    for samples in (8, 100, 999):
        each = costs.at(samples).adjoints.sweep.each
        assert each == pytest.approx(layer.adjoint_fixed + layer.adjoint * samples)
    assert costs.at(3).states.sweep == costs.at(8).states.sweep, "eight samples are taken at once"
    assert [costs.portion(portions) for portions in (1, 2, 8, 125, 500)] == [1000, 504, 128, 8, 2]


def test_memory_of_replicas_is_that_of_their_weights():
    planner = CONSTANTS.planner(CONSTANTS.dense(8), 512)
    one, eight = (planner.memory(Plan(cycle="pipeline", replicas=ranks, portions=8), 64, ranks) for ranks in (1, 8))
    # All weights once for each replica, and gradients: one where there is a single portion, up to four of eight.
    assert eight - one == (8 * 3 - 6) * 64 * planner.costs.row_bytes


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ({"cycle": "pipeline", "cfactors": (4,)}, "exact propagation has none"),
        ({"cycle": "pipeline", "replicas": 4, "portions": 2}, "replicas=4 must be at least 1, and at most portions=2"),
        ({"cycle": "serial", "portions": 2}, "portions=2: cycle='serial' has one"),
    ],
)
def test_plans_that_make_no_sense_are_refused(plan, message):
    with pytest.raises(ValueError, match=message):
        Plan(**plan)


def test_numbers_that_do_not_fit_are_refused():
    planner = CONSTANTS.planner(CONSTANTS.dense(8), 16)
    with pytest.raises(ValueError, match="replicas=4 does not divide num_ranks=6"):
        planner.predict(Plan(cycle="pipeline", replicas=4, portions=4), 64, 6)
    with pytest.raises(ValueError, match="portions=32 are more than the samples=16"):
        planner.predict(Plan(cycle="pipeline", portions=32), 64, 2)
    with pytest.raises(ValueError, match="ranks=0 must be at least 1"):
        choose(64, 16, 0)


# ---- Candidates are what can be run


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 12])
@pytest.mark.parametrize("samples", [1, 5, 40])
def test_candidates_are_valid_options_on_so_many_ranks(ranks, samples):
    found = list(candidates(48, num_ranks=ranks, samples=samples))
    assert found[0] == SERIAL and len(set(found)) == len(found)
    for plan in found:
        options, stages = plan.options(48), plan.stages(ranks)
        assert plan.replicas * stages == ranks and plan.replicas <= options.portions_of(samples) == plan.portions
        levels = Hierarchy.plan(options, LayerGrid(48, 1.0), stages)
        assert levels.partition == plan.hierarchy(48, ranks).partition
        assert tuple(level.cfactor for level in levels.levels[:-1]) == plan.cfactors


@pytest.mark.ranks(4)
def test_plans_of_all_kinds_are_trained_by(spmd):
    def body(comm):
        workload = Workload(num_layers=16, batch=24, architecture=DenseResNetOptions(width=3))
        values = {}
        for plan in (*candidates(16, num_ranks=4, samples=24), choose(16, 24, 4).plan):
            problem = replace(workload.problem(comm, plan.options(16)), replicas=plan.replicas)
            objective = problem.objective(16)
            x = objective.network.layout.zeros()
            values[plan.text(16)] = objective.evaluate(x, error=0.0).value
            objective.gradient(x)
        return values

    (found, *others) = spmd(body)
    assert all(each == found for each in others) and len(found) > 12
    assert max(found.values()) == pytest.approx(min(found.values()))


# ---- By rule


@pytest.mark.parametrize("layer", [None, CONVOLUTION, TRANSFORMER])
def test_the_rule_is_the_same_every_time(layer, monkeypatch):
    sizes = [(1024, 16, 32), (64, 5000, 2), (30, 7, 5), (1, 1, 1), (4096, 5000, 4096)]
    first = [choose(*size, layer=layer) for size in sizes]

    def measures(*_):
        raise AssertionError("the rule measures nothing")

    monkeypatch.setattr(time, "perf_counter", measures)
    assert [choose(*size, layer=layer) for size in sizes] == first
    assert all(each.text.startswith("plan: ") and "\n" not in each.text for each in first)


def test_the_rule_shares_samples_first_and_layers_then():
    kinds = {ranks: choose(1024, 512, ranks, layer=TRANSFORMER).prediction.kind for ranks in (1, 2, 256, 4096)}
    assert kinds[1] == "serial" and kinds[2] == kinds[256] == "replicas"
    assert kinds[4096] in ("replicas of pipelines", "replicas of lagged")
    assert choose(1024, 1, 64).plan.cycle == "lagged", "there is nothing else to share"


def test_exact_plans_of_the_rule_have_the_portions_of_the_batch():
    for batch in (5, 16, 100, 5000):
        portions = MGRIT(cycle="pipeline").portions_of(batch)
        for ranks in (1, 2, 8, 64):
            choice = choose(256, batch, ranks)
            if not choice.plan.is_exact:
                continue
            if choice.plan.replicas <= portions:
                assert choice.plan.portions == portions
            else:
                assert choice.plan.portions % choice.plan.replicas == 0 and "portions=" in choice.reason


def test_an_exact_plan_wins_where_another_is_little_faster():
    for batch in (16, 256, 5000):
        for ranks in (2, 8, 32, 128):
            choice = choose(512, batch, ranks)
            if not choice.plan.is_exact:
                exact = choose(512, batch, ranks, cycles=())
                assert exact.plan.is_exact and exact.prediction.seconds > 1.1 * choice.prediction.seconds
            if choice.runner_up:
                assert choice.runner_up.kind != choice.prediction.kind


def test_cores_are_an_argument_and_not_looked_up(monkeypatch):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0}, raising=False)
    few, many = (choose(1024, 5000, 64, cores=cores) for cores in (2, 64))
    assert few.num_layers == many.num_layers and choose(1024, 5000, 64) == choose(1024, 5000, 64, cores=CONSTANTS.cores)


def test_many_ranks_do_more_with_replicas_than_with_layers_alone():
    """4096 layers, 5000 samples; round costs of a slow core, the fixed ones of a layer and of a call small."""
    machine = Machine(32, 32, Link(10e-6, 8e9, 5e-6, "fixed"), Link(10e-6, 12e9, 5e-6, "fixed"))

    def costs(samples, others=()):
        share = samples / 5000

        def step(each, fixed=2e-7):
            return StepCost(1e-5, each * share + fixed)

        ends = {"opening": 1e-5 + 2e-4 * share, "closing": 2e-5 + 1e-3 * share, "once": 1e-4}
        states = SolveCosts(step(35e-6), step(36e-6), step(30e-6), step(100e-6), step(90e-6), FREE, 0.0, 1.5e-3, 7e-4)
        adjoints = SolveCosts(
            step(78e-6), step(79e-6), step(70e-6), step(210e-6), step(200e-6), step(210e-6), 0.0, 4e-4, 0.0
        )
        states, adjoints = replace(states, **ends), replace(adjoints, **ends)
        return Costs(64 * samples, 576, states, adjoints, 25e-6 * share, 3e-6, 2e-4, 3e-6, 1e-7, samples, others, 8)

    planner = Planner(machine, costs(5000, (costs(8),)))
    layers = planner.of_each_kind(4096, 1024, plans=list(candidates(4096)))
    of_layers = min(each.seconds for each in layers if not each.plan.is_exact)
    whole = planner.best(4096, 1024)
    # By layers alone 18 times one rank; 107 with replicas.
    assert 15.0 < planner.serial(4096) / of_layers < 20.0
    assert whole.plan.replicas > 1 and of_layers / whole.seconds > 5.0


# ---- In words and as a picture


def test_a_map_says_when_to_spread_layers(tmp_path):
    found = make_map(lambda samples: CONSTANTS.planner(TRANSFORMER, samples), 256, (1, 16, 64), (2, 16, 256))
    assert found.spread_from(64) == 256 and found.best[64, 2].kind == "replicas"
    words = " ".join(in_sentences(found))
    assert "with more ranks spread the layers as well" in words and "64 samples: 256" in words
    draw(found, "a map", tmp_path / "deeper" / "map.png")
    assert (tmp_path / "deeper" / "map.png").read_bytes().startswith(b"\x89PNG")
    lonely = make_map(lambda samples: CONSTANTS.planner(CONSTANTS.dense(8), samples), 4, (1, 2), (2, 4))
    assert in_sentences(lonely)[0].startswith("Layers should not be spread at all")


def test_powers_of_two_end_where_they_should():
    assert powers_of_two(1, 5000)[-3:] == (2048, 4096, 5000) and powers_of_two(2, 8) == (2, 4, 8)
    assert powers_of_two(1, 1) == (1,)


@pytest.mark.ranks(1, 2, 3)
def test_what_is_measured_makes_a_choice(spmd):
    def body(comm):
        workload = Workload(num_layers=16, batch=80, architecture=DenseResNetOptions(width=3))
        choice = measured(workload, comm)
        problem = replace(workload.problem(comm, choice.options), replicas=choice.plan.replicas)
        objective = problem.objective(16)
        return choice, objective.evaluate(objective.network.layout.zeros()).value

    found = spmd(body)
    assert all(each == found[0] for each in found) and found[0][0].prediction.seconds > 0.0
    # With all weights zero the loss is that of equal chances.
    assert found[0][1] == pytest.approx(np.log(5))
