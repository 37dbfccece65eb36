"""Layer-parallel MG/OPT with coarse levels on fewer ranks: who owns what, and the same result as on one rank."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mgopt_runs import EXACT, last, mgopt, points, problem
from small_runs import gathered, same_bits

from xbraid_py.comm.partition import Partition
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.mgopt import MGOpt
from xbraid_py.multilevel.depth.options import LevelOptions, MGOptOptions
from xbraid_py.problem.problem import perceptron_weights
from xbraid_py.run.store.read import CheckpointError, file_name, load
from xbraid_py.run.store.write import CheckpointStore
from xbraid_py.testing import run_threads

GD = LevelOptions(learning_rate=(0.3, 0.2, 0.1))
METHODS = {
    "gd": GD,
    "adam": LevelOptions(method=("adam",), learning_rate=(0.01,)),
    "momentum": LevelOptions(method=("momentum",), learning_rate=(0.05,)),
    "lbfgs": LevelOptions(method=("lbfgs",), learning_rate=(1.0,), line_search=True),
}
SOLVERS = {
    "layer after layer": EXACT,
    "lagged": MGRIT(cfactor=4, max_iter=3),
    "V-cycles": MGRIT(cycle="V", cfactor=2, max_levels=2, tol=1e-13, max_iter=40),
}


def test_rows_on_the_first_ranks():
    assert Partition.balanced(10, 5, 3) == Partition((0, 4, 7, 10, 10, 10))
    assert Partition.balanced(2, 4, 3) == Partition((0, 1, 2, 2, 2))
    assert Partition.balanced(10, 3, 3) == Partition.balanced(10, 3)
    with pytest.raises(ValueError, match=r"^in_use=4 must lie in 1 .. num_ranks=3; use 3$"):
        Partition.balanced(10, 3, 4)
    with pytest.raises(ValueError, match=r"^in_use=0 must lie in"):
        Partition.balanced(10, 3, 0)


def test_how_many_ranks():
    options = MGOptOptions(min_layers=16)
    assert [options.ranks(num_layers, 4) for num_layers in (128, 64, 63, 32, 31, 8, 1)] == [4, 4, 3, 2, 1, 1, 1]
    assert MGOptOptions(min_layers=0).ranks(1, 4) == 4
    with pytest.raises(ValueError, match="^min_layers=-1 must be at least 0; use 16$"):
        MGOptOptions(min_layers=-1)


def ends(run):
    """What is left of a run of three cycles, on every rank."""
    record = last(run, 3)
    owners = [objective.network.partition.ranks_in_use for objective in run.objectives]
    return owners, record.evaluation.value, record.work, record.counted, gathered(run.network, run.x)


@pytest.mark.ranks(1, 2, 4)
@pytest.mark.parametrize("mgrit", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("min_layers", [0, 8])
def test_three_cycles_are_those_on_one_rank(spmd, mgrit, min_layers):
    how = {"num_layers": 32, "levels": 4, "mgrit": mgrit, "min_layers": min_layers, "optim": GD}

    def body(comm):
        return comm.size, ends(mgopt(comm, **how))

    _, value, work, counted, weights = ends(mgopt(**how))
    for size, (owners, its_value, its_work, its_counted, its_weights) in spmd(body):
        if min_layers:
            assert owners == [size, min(size, 2), 1, 1]
        assert its_value == pytest.approx(value, rel=1e-9)
        assert (its_work, its_counted) == (work, pytest.approx(counted))
        for name, rows in weights.items():
            torch.testing.assert_close(its_weights[name], rows, rtol=1e-9, atol=1e-9)


@pytest.mark.ranks(2, 4)
@pytest.mark.parametrize("optim", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("interpolation, restriction", [("constant", "inject"), ("linear", "average")])
def test_every_optimizer_and_transfer(spmd, optim, interpolation, restriction):
    how = {"num_layers": 32, "levels": 4, "min_layers": 8, "optim": optim, "line_search": True, "metric": "L2"}
    how |= {"interpolation": interpolation, "restriction": restriction}
    how["carry_momentum"] = 0.5 if optim.method in (("adam",), ("momentum",)) else 0.0

    def body(comm):
        return ends(mgopt(comm, **how))

    expected = ends(mgopt(**how))
    for found in spmd(body):
        assert found[1] == pytest.approx(expected[1], rel=1e-9)
        for name, rows in expected[4].items():
            torch.testing.assert_close(found[4][name], rows, rtol=1e-8, atol=1e-8)


@pytest.mark.ranks(2, 4)
def test_minibatches(spmd):
    def batches(cycle):
        train, which = points(), (torch.arange(20) + 20 * cycle) % 60
        return train.features[:, which].contiguous(), train.labels[which]

    def body(comm):
        run = mgopt(comm, num_layers=32, levels=4, min_layers=8, optim=GD)
        record = list(run.run(4, batches))[-1]
        return record.evaluation.value, gathered(run.network, run.x)

    alone = mgopt(num_layers=32, levels=4, optim=GD)
    value = list(alone.run(4, batches))[-1].evaluation.value
    for found, weights in spmd(body):
        assert found == pytest.approx(value, rel=1e-9)
        for name, rows in gathered(alone.network, alone.x).items():
            torch.testing.assert_close(weights[name], rows, rtol=1e-9, atol=1e-9)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("readers", [1, 2])
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"mgrit": "lagged"},
        {"mgrit": "lagged", "optim": "lbfgs", "line_search": True},
        {"mgrit": "V-cycles", "optim": "adam", "full_multigrid": 1},
        {"optim": "adam", "carry_momentum": 0.5},
        {"mgrit": "lagged", "optim": "momentum", "carry_momentum": 0.5, "metric": "L2", "min_layers": 8},
    ],
    ids=str,
)
def test_a_run_goes_on_from_its_state_on_other_numbers_of_ranks(spmd, shared_tmp_path, readers, how):
    """Bitwise: what the optimizers have gathered and what the solves start from are parts of the state."""
    how = how | {"mgrit": SOLVERS[how.get("mgrit", "layer after layer")], "optim": METHODS[how.get("optim", "gd")]}

    def write(comm):
        run = mgopt(comm, num_layers=32, **how)
        for record in run.run(4):
            if record.cycle == 2:
                arrays, numbers = run.state()
                CheckpointStore(shared_tmp_path).save(comm, 2, arrays, {"state": numbers})
        return replace(record, seconds=0.0), gathered(run.network, run.x)

    def rest(comm):
        run = mgopt(comm, num_layers=32, **how)
        with load(shared_tmp_path / file_name(2)) as checkpoint:
            run.load(checkpoint)
        cycles = [replace(record, seconds=0.0) for record in run.run(4)]
        assert [record.cycle for record in cycles] == [3, 4]
        return cycles[-1], gathered(run.network, run.x)

    record, weights = spmd(write)[0]
    for found, ends in run_threads(readers, rest):
        assert found == record and same_bits(ends, weights)


@pytest.mark.parametrize("ranks, replicas", [(1, 1), (2, 2), (2, 1)])
def test_a_run_on_replicas_goes_on_with_other_numbers_of_them(tmp_path, ranks, replicas):
    def run(comm, replicas):
        lagged = replace(problem(comm, MGRIT(cfactor=4, portions=4)), replicas=replicas)
        found = MGOpt(lagged, 32, MGOptOptions(levels=3, optim=METHODS["momentum"]))
        found.x = perceptron_weights(found.network, seed=2)
        return found

    def write(comm):
        whole = run(comm, 2)
        for record in whole.run(3):
            if record.cycle == 2:
                arrays, numbers = whole.state()
                CheckpointStore(tmp_path).save(comm, 2, arrays, {"state": numbers})
        return replace(record, seconds=0.0), gathered(whole.network, whole.x)

    def rest(comm):
        found = run(comm, replicas)
        with load(tmp_path / file_name(2)) as checkpoint:
            found.load(checkpoint)
        return replace(last(found, 3), seconds=0.0), gathered(found.network, found.x)

    record, weights = run_threads(4, write)[0]
    for found, ends in run_threads(ranks, rest):
        assert found == record and same_bits(ends, weights)


def test_a_state_of_an_earlier_version_has_weights_alone(tmp_path):
    run = mgopt(num_layers=32, optim=METHODS["momentum"])
    cycles = run.run(4)
    record = [next(cycles) for _ in range(3)][-1]
    arrays, numbers = run.state()
    found = mgopt(num_layers=32, optim=METHODS["momentum"])
    for left, message in ((("weights/", "gradient/"), "level0/momentum_buffer is"), (("weights/",), "the gradient is")):
        arrays = {name: each for name, each in arrays.items() if name.startswith(left)}
        path = CheckpointStore(tmp_path).save(run.network.comm, 2, arrays, {"state": numbers})
        with load(path) as checkpoint, pytest.raises(CheckpointError, match=f"{message} missing"):
            found.load(checkpoint)
    with load(path) as checkpoint:
        del checkpoint.meta["state"]["levels"]
        found.load(checkpoint)
    assert torch.equal(found.x, run.x)
    ours, theirs = next(found.run(4)), next(cycles)
    assert ours.evaluation != theirs.evaluation, "the momentum begins anew"
    assert (ours.cycle, ours.work, ours.gradients) == (3, theirs.work, theirs.gradients) and ours.work > record.work
    assert ours.counted == pytest.approx(theirs.counted)


def test_the_state_of_another_run_is_refused(tmp_path):
    run = mgopt(num_layers=32)
    record = last(run, 1)
    arrays, numbers = run.state()
    path = CheckpointStore(tmp_path).save(run.network.comm, 1, arrays, {"state": numbers})
    assert numbers["cycle"] == record.cycle == 1
    with load(path) as checkpoint:
        for other, message in (
            (mgopt(num_layers=16), "32 rows or vectors where this run has 16"),
            (mgopt(num_layers=32, levels=2), "cycle=1 of 3 levels"),
        ):
            with pytest.raises(CheckpointError, match=message):
                other.load(checkpoint)
        checkpoint.meta["state"]["cycle"] = True
        with pytest.raises(CheckpointError, match="cycle=True of 3 levels"):
            mgopt(num_layers=32).load(checkpoint)
