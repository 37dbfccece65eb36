"""Adaptive depth: whole runs, the same on any number of ranks; records, checkpoints, export."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from adaptive_runs import CYCLES, HALF, adaptive_run
from small_runs import ONE_SHOT, SEQUENTIAL, gathered, load_state, nested, points, same_bits, save_state, timeless

from xbraid_py.comm import SerialCommunicator
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.multilevel.depth.options import AdaptiveOptions
from xbraid_py.optim import OneShotOptions
from xbraid_py.recipes.classification import row_of
from xbraid_py.run.options import to_dict
from xbraid_py.run.store.read import CheckpointError, file_name, load
from xbraid_py.run.store.write import Shard, save
from xbraid_py.testing import run_threads

# Runs.


@cache
def trained(cycle: str, comm=None):
    """Records and final weights of 18 updates on three levels."""
    run = adaptive_run(comm or SerialCommunicator(), (8, 5, 5), mgrit=CYCLES[cycle], interpolation="linear")
    records = [timeless(record) for record in run.run()]
    return records, gathered(run.network, run.weights)


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
        rows.append(row_of(record))
        keys |= run.state()[1].keys()
    assert all("cut" not in row and "lengths" not in row for row in rows) and "lengths" not in keys


def test_the_record_tells_which_layers_were_cut():
    run = adaptive_run(SerialCommunicator(), (1, 1), mgrit=SEQUENTIAL, num_layers=8)
    rows = [row_of(record) for record in run.run()]
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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Folder of the checkpoints of every update of a run on 2 ranks; its records and weights."""
    out = tmp_path_factory.mktemp("adaptive")

    def body(comm):
        run = adaptive_run(comm, (3, 2, 3), mgrit=ONE_SHOT)
        records = []
        for record in run.run():
            records.append(timeless(record))
            save_state(out, run, record.update)
        return records, gathered(run.network, run.weights)

    return out, *run_threads(2, body)[0]


def test_a_run_goes_on_from_any_update_on_any_number_of_ranks(spmd, written):
    out, expected, weights = written

    def body(comm):
        wrong = []
        for k in range(len(expected) - 1):
            run = load_state(out / file_name(k), adaptive_run(comm, (3, 2, 3), mgrit=ONE_SHOT))
            records = [timeless(record) for record in run.run()]
            if records != expected[k + 1 :] or not same_bits(gathered(run.network, run.weights), weights):
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
        save_state(tmp_path, run, record.update)
    assert len(expected) == 3
    again = load_state(tmp_path / file_name(0), make())
    assert [timeless(record) for record in again.run()] == expected[1:]


@pytest.mark.parametrize(
    "change", [{"lengths": [1] * 3}, {"lengths": "abc"}, {"lengths": [0] * 40}, {"num_layers": 65}]
)
def test_a_checkpoint_of_another_grid_is_refused(written, tmp_path, change):
    out, *_ = written
    path = out / file_name(8)
    with load(path) as checkpoint:
        shards = {name: checkpoint.rows(name) for name in checkpoint.names()}
        meta = checkpoint.meta
    assert meta["state"]["num_layers"] == len(meta["state"]["lengths"]) == 40
    meta["state"].update(change)
    shards = {name: Shard(rows, 0, len(rows)) for name, rows in shards.items()}
    save(tmp_path / path.name, SerialCommunicator(), shards, meta)
    run = adaptive_run(SerialCommunicator(), (3, 2, 3), mgrit=ONE_SHOT)
    with pytest.raises(CheckpointError, match="holds no state of a training run"):
        load_state(tmp_path / path.name, run)


def test_a_uniform_run_does_not_go_on_from_it(written):
    out, *_ = written
    path = out / file_name(8)
    run = nested(SerialCommunicator(), (3, 2, 3), ONE_SHOT, num_layers=64)
    with pytest.raises(CheckpointError, match=r"layers, where this run has \[16, 32, 64\]"):
        load_state(path, run)


def test_an_exported_network_has_the_sizes_of_its_layers(spmd, shared_tmp_path):
    def body(comm):
        run = adaptive_run(comm, (3, 3), mgrit=ONE_SHOT, num_layers=32)
        for record in run.run():
            if record.final:
                network = {"network": to_dict(run.problem.architecture)}
                path = save_state(shared_tmp_path, run, record.update, configuration=network)
        comm.barrier()
        module = to_sequential(path)
        with torch.no_grad():
            logits = module(points().features.T)
        classes = run.network.predict(run.weights, points().features)
        return [step.h for step in module[1]], run.grid.sizes(), bool((logits.max(1).indices == classes).all())

    for sizes, expected, same in spmd(body):
        assert sizes == expected and len(set(sizes)) == 2 and same
