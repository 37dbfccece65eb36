"""Adaptive depth: indicators and marking against literal references, whole runs, checkpoints, export."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import reference as ref
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_runs import MIXED, ONE_SHOT, SEQUENTIAL, gathered, nested, points, problem, same_bits, timeless

from xbraid_py.comm import SerialCommunicator
from xbraid_py.export import to_sequential
from xbraid_py.grid import LayerGrid
from xbraid_py.io.checkpoint import CheckpointError, Shard, file_name, load, save
from xbraid_py.io.run_checkpoint import checkpoint_folder, read_resumed, save_run
from xbraid_py.io.training import _row
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel import AdaptiveOptions, NestedOptions, prolong_depth
from xbraid_py.multilevel.adaptive import indicator, marked, suits
from xbraid_py.network import InitialScales
from xbraid_py.optim import OneShotOptions
from xbraid_py.threads import run_threads

SCALES = InitialScales(1.0, 1.0, 1.0)
# Both solves to the end, so that the indicators do not depend on how they are made.
CONVERGED = replace(MIXED, max_iter=12, tol=1e-14)
HALF = AdaptiveOptions(indicator="goal", marking="share", fraction=0.5)
CYCLES = {"V": MIXED, "one-shot": ONE_SHOT, "sequential": SEQUENTIAL, "intervals": MGRIT(intervals=4)}
UNEVEN = LayerGrid.of_lengths([1, 1, 2, 4] * 4, 2.0)


def adaptive_run(comm, updates, options=HALF, mgrit=MIXED, num_layers=64, **others):
    """As `small_runs.nested`, with chosen layers cut."""
    run = nested(comm, updates, mgrit, num_layers, **others)
    return type(run)(
        run.problem, num_layers, replace(run.options, adaptive=options), run.one_shot_options, run.scales, run.seed
    )


# Options and marking.


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(indicator="size"), "indicator='size' must be richardson, goal, jump, both or even; use richardson"),
        (dict(marking="most"), "marking='most' must be bulk or share; use bulk"),
        (dict(fraction=0.0), "fraction=0.0 must be above 0 and at most 1; use 0.5"),
        (dict(fraction=float("nan")), "fraction=nan must be above 0 and at most 1; use 0.5"),
        (dict(max_layers=0), "max_layers=0 must be at least 1; use 64"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError) as caught:
        AdaptiveOptions(**options)
    assert str(caught.value) == message


def test_fewer_layers_than_at_the_beginning_are_refused():
    options = NestedOptions(adaptive=AdaptiveOptions(max_layers=15))
    with pytest.raises(ValueError, match="^max_layers=15 is less than the 16 layers to begin with; use 64$"):
        options.depths(64)


def by_definition(options: AdaptiveOptions, values: list[float], fitting: list[int]) -> tuple[int, ...]:
    """The marking in the slowest way: try every number of layers."""
    ranked = [layer for _, layer in sorted((-value, layer) for layer, value in enumerate(values))]
    count = len(values)
    if options.marking == "share":
        wanted = next(k for k in range(1, count + 1) if k >= options.fraction * count)
    else:
        enough = [k for k in range(1, count) if sum(values[i] for i in ranked[:k]) >= options.fraction * sum(values)]
        wanted = min([*enough, count])
    best = None
    for new in range(2 * count, count, -1):
        if new in fitting and new <= (options.max_layers or new) and (best is None or abs(new - count - wanted) < best):
            best, chosen = abs(new - count - wanted), ranked[: new - count]
    return () if best is None else tuple(sorted(chosen))


@given(
    st.lists(st.integers(0, 6).map(float), min_size=1, max_size=16),
    st.sampled_from(("bulk", "share")),
    st.sampled_from((0.125, 0.5, 0.75, 1.0)),
    st.sets(st.integers(2, 32)),
    st.none() | st.integers(1, 40),
)
def test_marking_is_what_it_says(values, marking, fraction, fitting, most):
    options = AdaptiveOptions(marking=marking, fraction=fraction, max_layers=most)
    assert marked(options, values, sorted(fitting)) == by_definition(options, values, sorted(fitting))


def test_where_all_are_alike_the_first_are_cut():
    options = AdaptiveOptions(marking="share", fraction=0.5)
    assert marked(options, [2.0] * 6, range(20)) == (0, 1, 2)
    assert marked(options, [1.0, 3.0, 3.0, 2.0], [5, 7]) == (0, 1, 2, 3)[1:4]  # 7 rather than 5: as near, and more
    assert marked(replace(options, marking="bulk"), [0.0] * 4, range(20)) == (0,)
    assert marked(replace(options, max_layers=6), [2.0] * 6, range(20)) == ()


@pytest.mark.parametrize(
    "mgrit, layers, good",
    [
        (SEQUENTIAL, 5, range(6, 11)),
        (MIXED, 8, (16,)),  # all factors that are given
        (MGRIT(cycle="V", cfactor=4, max_levels=2), 16, (20, 24, 28, 32)),
        (MGRIT(cycle="V", cfactor=4), 64, (80, 96, 112, 128)),  # three levels now, and then
        (MGRIT(), 16, (20, 28, 32)),  # 5, 7 and 8 intervals of 4 layers; 24 would be 8 of 3
        (MGRIT(), 32, (36, 40 + 2, 48, 50, 60, 64)),
        (MGRIT(), 4, range(5, 9)),  # too few for a coarse level in any case
    ],
)
def test_numbers_of_layers_that_suit_the_solvers(mgrit, layers, good):
    made = problem(SerialCommunicator(), mgrit)
    found = [count for count in range(layers + 1, 2 * layers + 1) if suits(made, made.grid(layers), count)]
    assert found == list(good)
    for count in found:
        made.hierarchies(count)  # is not refused


# Weights.


@pytest.mark.parametrize("interpolation", ["constant", "linear"])
@pytest.mark.parametrize("chosen", [(0,), (15,), (1, 2, 7, 12), (), tuple(range(16))])
def test_the_weights_of_layers_that_are_cut(spmd, interpolation, chosen):
    def body(comm):
        made = problem(comm, SEQUENTIAL)
        coarse, fine = made.network(UNEVEN), made.network(UNEVEN.halve(chosen))
        x = coarse.initial(SCALES, seed=2)
        return (
            gathered(coarse, x),
            gathered(fine, prolong_depth(coarse, fine, x, interpolation, chosen)),
            fine.partition,
        )

    for coarse, fine, partition in spmd(body):
        theta, expected = coarse["layers"], []
        for n, row in enumerate(theta):
            expected.append(row)
            if n in chosen:
                behind = theta[min(n + 1, 15)]
                expected.append(row if interpolation == "constant" else (row + behind) / 2)
        assert torch.equal(fine["layers"], torch.stack(expected))
        assert torch.equal(fine["opening"], coarse["opening"])
        assert torch.equal(fine["classification"], coarse["classification"])
        assert max(partition.counts) - min(partition.counts) <= 1  # dealt anew


def test_another_grid_than_the_cut_one_is_refused():
    made = problem(SerialCommunicator(), SEQUENTIAL)
    coarse, fine = made.network(4), made.network(LayerGrid(4, 2.0).halve((0,)))
    with pytest.raises(ValueError, match=r"^fine grid of 5 layers must be the coarse one with chosen=\(1,\) cut$"):
        prolong_depth(coarse, fine, coarse.layout.zeros(), "constant", (1,))


# Indicators.


@cache
def by_hand(interpolation: str) -> dict[str, list[float]]:
    """All indicators of a network on a grid that is not uniform, layer by layer, adjoints by autograd."""
    network = problem(SerialCommunicator(), SEQUENTIAL).network(UNEVEN)
    rows = network.layout.rows(network.initial(SCALES, 3))
    theta, h, data = rows["layers"], UNEVEN.sizes(), points()
    states = [ref.dense(rows["opening"][0], data.features, 3, "smooth_relu").requires_grad_()]
    for row, size in zip(theta, h, strict=True):
        states.append(ref.step(row, states[-1], size, "smooth_relu"))
    logits = ref.dense(rows["classification"][0], states[-1], data.num_classes, "identity")
    adjoints = torch.autograd.grad(torch.nn.functional.cross_entropy(logits.T, data.labels), states)[1:]
    found = {"richardson": [], "goal": [], "jump": []}
    for n, (row, size) in enumerate(zip(theta, h, strict=True)):
        u, behind = states[n].detach(), theta[min(n + 1, 15)]
        second = row if interpolation == "constant" else (row + behind) / 2
        half = ref.step(row, u, size / 2, "smooth_relu")
        error = 2 * (ref.step(second, half, size / 2, "smooth_relu") - ref.step(row, u, size, "smooth_relu"))
        beside = [float((theta[m] - row).norm()) for m in (n - 1, n + 1) if 0 <= m < 16]
        found["richardson"].append(float(error.square().mean().sqrt()))
        effects = [float(adjoints[n][:, b] @ error[:, b]) for b in range(error.shape[1])]
        found["goal"].append(sum(abs(effect) for effect in effects))
        found["jump"].append(size * sum(beside) / len(beside))
    shares = {name: [value / sum(values) for value in values] for name, values in found.items()}
    shares["both"] = [a + b for a, b in zip(shares["richardson"], shares["jump"], strict=True)]
    return shares


@pytest.mark.parametrize("interpolation", ["constant", "linear"])
@pytest.mark.parametrize("kind", ["goal", "richardson", "jump", "both"])
def test_indicators_are_what_they_say(spmd, kind, interpolation):
    def body(comm):
        objective = problem(comm, CONVERGED).objective(UNEVEN)
        return indicator(kind, objective, objective.network.initial(SCALES, 3), interpolation)

    expected = by_hand(interpolation)[kind]
    results = spmd(body)
    assert results[0] == pytest.approx(expected, rel=1e-9)
    assert all(found == body(SerialCommunicator()) for found in results)  # to the last bit


@pytest.mark.parametrize("mgrit", [SEQUENTIAL, ONE_SHOT, MIXED], ids=["sequential", "one-shot", "V"])
@pytest.mark.parametrize("kind", ["goal", "both"])
def test_indicators_of_unfinished_solves_have_the_same_bits_on_all_ranks(spmd, kind, mgrit):
    def body(comm):
        objective = problem(comm, mgrit).objective(UNEVEN)
        return indicator(kind, objective, objective.network.initial(SCALES, 3))

    expected = body(SerialCommunicator())
    assert spmd(body) == [expected] * len(spmd(lambda comm: 0))


def test_layers_that_do_nothing_are_not_cut():
    objective = problem(SerialCommunicator(), SEQUENTIAL).objective(12)
    x = objective.network.initial(SCALES, 3)
    rows = objective.network.layout.rows(x)["layers"]
    rows[:4], rows[7:] = 0.0, 0.0
    rows[:4, -3:] = rows[7:, -3:] = -9.0  # a bias far below 0: the activation is 0, and so is its slope
    for kind in ("goal", "richardson"):
        values = indicator(kind, objective, x, "constant")
        assert all(value > 0.0 for value in values[4:7]) and set(values[:4] + values[7:]) == {0.0}


@pytest.mark.parametrize("kind", ["richardson", "goal", "jump"])
def test_layers_come_where_the_weights_change(kind):
    """Weights with a pulse in depth: fewer layers make a smaller error of the output than more of them evenly."""
    made = problem(SerialCommunicator(), SEQUENTIAL)
    rows = ref.random(2, 12, seed=4)

    def at(grid):
        network = made.network(grid)
        x, h = network.initial(InitialScales(layers=0.0), 3), torch.tensor(grid.sizes(), dtype=torch.float64)
        begins = (h.cumsum(0) - h)[:, None]
        network.layout.rows(x)["layers"].copy_(0.2 * rows[0] + 4 * rows[1] * torch.exp(-(((begins - 1.3) / 0.05) ** 2)))
        objective = made.objective(grid)
        objective.evaluate(x)
        return x, objective, objective._end

    exact = at(LayerGrid(8192, 2.0))[2]
    grid = LayerGrid(16, 2.0)
    options = AdaptiveOptions(marking="share", fraction=0.25)
    while grid.num_layers < 40:
        x, objective, _ = at(grid)
        grid = grid.halve(marked(options, indicator(kind, objective, x, "linear"), range(100)))
    errors = [float((at(each)[2] - exact).norm()) for each in (grid, LayerGrid(160, 2.0))]
    assert grid.num_layers < 50 and errors[0] < errors[1]
    begin, front = 0.0, []
    for size in grid.sizes():
        front += [size] * (abs(begin - 1.3) < 0.06)
        begin += size
    assert max(front) < 0.5 * max(grid.sizes())


def test_even_layers_are_spread():
    objective = problem(SerialCommunicator(), SEQUENTIAL).objective(12)
    values = indicator("even", objective, objective.network.layout.zeros())
    assert marked(AdaptiveOptions(marking="share", fraction=0.5), values, range(25)) == (0, 2, 4, 6, 8, 10)
    assert marked(AdaptiveOptions(marking="share", fraction=0.25), values, range(25)) == (2, 6, 10)
    assert len(set(values)) == 12


# Runs.


@cache
def trained(cycle: str, comm=None):
    """Records and final weights of 18 updates on three levels."""
    run = adaptive_run(comm or SerialCommunicator(), (8, 5, 5), mgrit=CYCLES[cycle], interpolation="linear")
    records = [timeless(record) for record in run.run()]
    return records, gathered(run.network, run.one_shot.x)


@pytest.mark.parametrize("cycle", CYCLES)
def test_a_run_is_bitwise_the_same_on_any_number_of_ranks(spmd, cycle):
    expected, weights = trained(cycle)
    cuts = [record for record in expected if record.cut is not None]
    assert [record.update for record in cuts] == [8, 13] and len({record.num_layers for record in expected}) == 3
    grid = LayerGrid(16, 2.0)
    for record in cuts:
        grid = grid.halve(record.cut)
        assert record.lengths == grid.lengths and record.num_layers == grid.num_layers
    assert len(weights["layers"]) == grid.num_layers < 64 and not grid.is_uniform
    assert expected[-1].evaluation.value < 0.9 * expected[0].evaluation.value
    for records, found in spmd(lambda comm: trained.__wrapped__(cycle, comm)):
        assert records == expected
        assert same_bits(found, weights)


def test_the_partition_is_dealt_anew(spmd):
    def body(comm):
        run = adaptive_run(comm, (2, 2, 2), mgrit=SEQUENTIAL, num_layers=32)
        return [run.network.partition.counts for record in run.run() if record.cut is not None or record.final]

    for found in spmd(body):
        assert len(found) == 3 and all(max(counts) - min(counts) <= 1 for counts in found)
        assert [sum(counts) for counts in found] == [12, 18, 18]


def test_all_layers_chosen_is_uniform_refinement():
    """Bit by bit; the jump costs nothing, so that the work is the same too."""
    everywhere = AdaptiveOptions(indicator="jump", marking="share", fraction=1.0)
    runs = [
        nested(SerialCommunicator(), (4, 3, 3)),
        adaptive_run(SerialCommunicator(), (4, 3, 3), everywhere, num_layers=32),
    ]
    plain, chosen = ([timeless(record) for record in run.run()] for run in runs)
    assert [(record.num_layers, record.cut) for record in chosen if record.cut is not None] == [
        (16, tuple(range(8))),
        (32, tuple(range(16))),
    ]
    assert [replace(record, cut=None, lengths=None) for record in chosen] == plain
    assert torch.equal(runs[0].one_shot.x, runs[1].one_shot.x)
    assert runs[1].grid == LayerGrid(32, 2.0)


def test_a_uniform_run_says_nothing_of_grids():
    run = nested(SerialCommunicator(), (1, 1))
    rows, keys = [], set()
    for record in run.run():
        rows.append(_row(record, "nested", None))
        keys |= run.snapshot().numbers.keys()
    assert all("cut" not in row and "lengths" not in row for row in rows) and "lengths" not in keys


def test_the_record_tells_which_layers_were_cut():
    run = adaptive_run(SerialCommunicator(), (1, 1), mgrit=SEQUENTIAL, num_layers=8)
    rows = [_row(record, "nested", None) for record in run.run()]
    assert ["cut" in row for row in rows] == [False, True, False]
    assert len(rows[1]["cut"]) == 2 and rows[1]["lengths"] == list(run.grid.lengths) and rows[1]["num_layers"] == 6


def test_what_an_indicator_costs_is_counted():
    """Sequentially: a state solve of N, and 3 N for Richardson; an adjoint solve of 2 N more for the goal."""
    one_shot, costs = OneShotOptions(fixed_step=1e-3), {}
    for kind in ("jump", "even", "richardson", "goal"):
        options = replace(HALF, indicator=kind)
        run = adaptive_run(SerialCommunicator(), (2, 2), options, SEQUENTIAL, 16, one_shot=one_shot)
        records = list(run.run())
        costs[kind] = (records[2].work - records[1].work) * run.problem.work_unit(16)
        assert records[2].evaluations == 4 + (kind in ("richardson", "goal"))
    # The last update on 8 layers, and the solves for states and adjoints on 12.
    assert costs["jump"] == costs["even"] == pytest.approx(8 + 3 * 12)
    assert costs["richardson"] == pytest.approx(costs["jump"] + 4 * 8)
    assert costs["goal"] == pytest.approx(costs["jump"] + 6 * 8)


def test_where_no_layer_may_be_added_the_grid_stays():
    run = adaptive_run(SerialCommunicator(), (2, 2, 2), replace(HALF, max_layers=12), SEQUENTIAL, 32)
    found = [(record.level, record.num_layers, None if record.cut is None else len(record.cut)) for record in run.run()]
    assert found == [(2, 8, None)] * 2 + [(1, 12, 4), (1, 12, None), (0, 12, 0)] + [(0, 12, None)] * 2
    assert run.grid.num_layers == 12


# Checkpoints.


CONFIGURATION = {"num_layers": 64, "network": {"T": 2.0, "activation": "smooth_relu"}}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of the checkpoints of every update of a run on 2 ranks; its records and weights."""
    out = tmp_path_factory.mktemp("adaptive")

    def body(comm):
        run = adaptive_run(comm, (3, 2, 3), mgrit=ONE_SHOT)
        records = []
        for record in run.run():
            records.append(timeless(record))
            save_run(checkpoint_folder(out, "nested"), run, record.update, "nested", CONFIGURATION)
        return records, gathered(run.network, run.one_shot.x)

    return out, *run_threads(2, body)[0]


def test_a_run_goes_on_from_any_update_on_any_number_of_ranks(spmd, written):
    out, expected, weights = written

    def body(comm):
        wrong = []
        for k in range(len(expected) - 1):
            run = adaptive_run(comm, (3, 2, 3), mgrit=ONE_SHOT)
            path = checkpoint_folder(out, "nested") / file_name(k)
            resumed = read_resumed(str(path), out, {"nested": run}, CONFIGURATION, ())
            records = [timeless(record) for record in run.run(resumed["nested"])]
            if records != expected[k + 1 :] or not same_bits(gathered(run.network, run.one_shot.x), weights):
                wrong.append(k)
        return wrong

    assert all(found == [] for found in spmd(body))


def test_a_level_that_ends_at_once_goes_on_in_the_same_way(tmp_path):
    """What is refined after a resumption, before any solve, is what would have been refined without."""
    one_shot = OneShotOptions(gtol=1e9)

    def make():
        return adaptive_run(SerialCommunicator(), (3, 3), mgrit=ONE_SHOT, one_shot=one_shot)

    run, expected = make(), []
    for record in run.run():
        expected.append(timeless(record))
        save_run(checkpoint_folder(tmp_path, "nested"), run, record.update, "nested", CONFIGURATION)
    assert len(expected) == 3
    again = make()
    first = checkpoint_folder(tmp_path, "nested") / file_name(0)
    resumed = read_resumed(str(first), tmp_path, {"nested": again}, CONFIGURATION, ())
    assert [timeless(record) for record in again.run(resumed["nested"])] == expected[1:]


@pytest.mark.parametrize(
    "change", [{"lengths": [1] * 3}, {"lengths": "abc"}, {"lengths": [0] * 40}, {"num_layers": 65}]
)
def test_a_checkpoint_of_another_grid_is_refused(written, tmp_path, change):
    out, *_ = written
    path = checkpoint_folder(out, "nested") / file_name(8)
    with load(path) as checkpoint:
        shards = {name: checkpoint.rows(name) for name in checkpoint.names()}
        meta = checkpoint.meta
    assert meta["snapshot"]["num_layers"] == len(meta["snapshot"]["lengths"]) == 40
    meta["snapshot"].update(change)
    shards = {name: Shard(rows, 0, len(rows)) for name, rows in shards.items()}
    save(tmp_path / path.name, SerialCommunicator(), shards, meta)
    run = adaptive_run(SerialCommunicator(), (3, 2, 3), mgrit=ONE_SHOT)
    with pytest.raises(CheckpointError, match="holds no state of a training run"):
        read_resumed(str(tmp_path / path.name), out, {"nested": run}, CONFIGURATION, ())


def test_a_uniform_run_does_not_go_on_from_it(written):
    out, *_ = written
    path = checkpoint_folder(out, "nested") / file_name(8)
    run = nested(SerialCommunicator(), (3, 2, 3), ONE_SHOT, num_layers=64)
    with pytest.raises(CheckpointError, match=r"layers, where this run has \[16, 32, 64\]"):
        read_resumed(str(path), out, {"nested": run}, CONFIGURATION, ())


def test_an_exported_network_has_the_sizes_of_its_layers(spmd, shared_tmp_path):
    def body(comm):
        run = adaptive_run(comm, (3, 3), mgrit=ONE_SHOT, num_layers=32)
        for record in run.run():
            if record.final:
                path = save_run(shared_tmp_path, run, record.update, "nested", CONFIGURATION)
        comm.barrier()
        module = to_sequential(path)
        with torch.no_grad():
            logits = module(points().features.T)
        classes = run.network.predict(run.one_shot.x, points().features)
        return [step.h for step in module[1]], run.grid.sizes(), bool((logits.max(1).indices == classes).all())

    for sizes, expected, same in spmd(body):
        assert sizes == expected and len(set(sizes)) == 2 and same
