"""Runs on minibatches that go on from checkpoints: weights, moments, solvers, masks and replicas, on any ranks."""

import json
import shutil

import pytest
import torch
from minibatch_runs import UPDATES, build, on_ranks, rows_of, run, same, undisturbed_runs
from refusal import refusal
from torch import nn

from xbraid_py import LayerParallel, RunError
from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.minibatch.state import MinibatchState, load_weights
from xbraid_py.run.store.read import file_name, load
from xbraid_py.run.store.write import Shard, save


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(size)`: folder of an undisturbed run with a checkpoint of every update, and what the run returned."""
    return undisturbed_runs(tmp_path_factory)


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("writers", [1, 2, 3])
def test_the_rest_of_a_run_is_the_same(written, tmp_path, writers, readers):
    out, last, weights = written(writers)
    levels = {row["stacks"][0]["level"] for row in rows_of(out)}
    assert len(levels) > 1, "the solver is tightened under way"
    for number in (1, 6) if writers == readers else ((writers + readers) % 3 + 3,):
        there = tmp_path / f"{number}"
        file = out / "checkpoints" / file_name(number)
        for row, found in on_ranks(readers, lambda comm, there=there, file=file: run(comm, there, file)):
            same(rows_of(there), rows_of(out, number), 0.0 if writers == readers else 1e-9)
            assert row["val_accuracy"] == last["val_accuracy"]
            for name, value in weights.items():
                if writers == readers:
                    assert torch.equal(found[name], value), name
                else:
                    assert torch.allclose(found[name], value, rtol=1e-8, atol=1e-10), name


def test_random_numbers_go_on(tmp_path):
    """Of a dropout around the stack, whose numbers come from torch's own generator."""

    def body(out, resume=None):
        torch.manual_seed(1)
        drawn = []
        run(SerialCommunicator(), out, resume, at=lambda number: drawn.append(float(torch.rand(1))))
        return drawn

    expected = body(tmp_path / "a")
    assert body(tmp_path / "b", tmp_path / "a" / "checkpoints" / file_name(3)) == expected[3:]


OPTIMIZERS = {
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
}
SCHEDULES = {
    "none": lambda optimizer: None,
    "lambda": lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: 1 / (k + 1)),
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=UPDATES + 1),
}


@pytest.mark.parametrize(
    ("optimizer", "schedule"), [*((name, "none") for name in OPTIMIZERS), ("momentum", "one-cycle"), ("sgd", "lambda")]
)
def test_whatever_the_optimizer_and_the_schedule(tmp_path, optimizer, schedule):
    changes = {"optimizer": OPTIMIZERS[optimizer], "schedule": SCHEDULES[schedule], "dropout": 0.0}

    def body(comm):
        _, expected = run(comm, tmp_path / "a", **changes)
        _, found = run(comm, tmp_path / "b", tmp_path / "a" / "checkpoints" / file_name(3), **changes)
        return all(torch.equal(found[name], expected[name]) for name in expected)

    assert on_ranks(2, body) == [True, True]
    same(rows_of(tmp_path / "b"), rows_of(tmp_path / "a", 3))


def test_an_optimizer_of_another_kind_is_refused(tmp_path):
    model = nn.Linear(3, 2).double()
    optimizer = torch.optim.LBFGS(model.parameters())
    optimizer.step(lambda: model(torch.ones(1, 3, dtype=torch.float64)).sum().backward() or 1.0)
    trained = MinibatchState(model=model, optimizer=optimizer, comm=SerialCommunicator())
    with pytest.raises(ValueError, match="^optimizer=LBFGS keeps a .*use torch.optim.Adam$"):
        trained.state()
    with pytest.raises(ValueError, match="not the model's; use model.parameters"):
        MinibatchState(model=nn.Linear(1, 1), optimizer=optimizer, comm=SerialCommunicator())


def test_all_of_a_checkpoint_matters(written, tmp_path):
    """Moments, statistics, steps, draws and how exactly solves are made: without one of them the rest is another."""
    out, _, _ = written(1)
    with load(out / "checkpoints" / file_name(6)) as file:
        arrays = {name: file.rows(name) for name in file.names()}
        meta = file.meta
    expected = rows_of(out, 6)

    def rest(change):
        mine, its = {k: v.clone() for k, v in arrays.items()}, json.loads(json.dumps(meta))
        change(mine, its["state"])
        there = tmp_path / "there"
        shutil.rmtree(there, ignore_errors=True)
        shards = {name: Shard(rows, 0, len(rows)) for name, rows in mine.items()}
        save(tmp_path / "changed.h5", SerialCommunicator(), shards, its)
        run(SerialCommunicator(), there, tmp_path / "changed.h5")
        return rows_of(there)

    assert rest(lambda mine, its: None) == expected
    for change in (
        lambda mine, its: mine["weights/2.layers.0.weight"].mul_(2),
        lambda mine, its: mine["weights/1.running_mean"].add_(1),
        lambda mine, its: mine["optimizer/exp_avg/2.layers.0.bias"].mul_(2),
        lambda mine, its: mine["optimizer/exp_avg_sq/0.weight"].mul_(2),
        lambda mine, its: mine["optimizer_scalars/step/0.weight"].add_(1),
        lambda mine, its: its["groups"][0].update(lr=0.01),
        lambda mine, its: its["scheduler"].update(last_epoch=1),
        lambda mine, its: its["solvers"][0][0].update(draws=1),
        lambda mine, its: its["solvers"][0][0]["accuracy"].update(level=0),
    ):
        assert rest(change) != expected
    assert {name.split("/")[0] for name in arrays} == {"weights", "optimizer", "optimizer_scalars", "random_state"}
    assert len(arrays["weights/2.layers.0.weight"]) == 8 == len(arrays["optimizer/exp_avg/2.layers.0.weight"])


def trained_of(model, comm, grid=None, update=1):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return MinibatchState(model=model, optimizer=optimizer, comm=comm, grid=grid, update=update)


def saved(trained, path):
    arrays, numbers = trained.state()
    save(path, trained.comm, arrays, {"state": numbers})


def test_no_rank_in_a_file(written):
    found = []
    for size in (1, 2, 3):
        with load(written(size)[0] / "checkpoints" / file_name(5)) as file:
            shapes = {name: (file.shape(name), file.rows(name, 0, 0).dtype) for name in file.names()}
            found.append((shapes, file.meta["update"], file.meta["state"]["groups"]))
    assert found[0] == found[1] == found[2]


def test_replicas_may_change(tmp_path):
    changes = {"converged": True, "dropout": 0.0}
    on_ranks(2, lambda comm: run(comm, tmp_path / "two", replicas=2, **changes))
    on_ranks(1, lambda comm: run(comm, tmp_path / "one", **changes))
    file = tmp_path / "two" / "checkpoints" / file_name(4)
    on_ranks(1, lambda comm: run(comm, tmp_path / "rest", file, **changes))
    on_ranks(2, lambda comm: run(comm, tmp_path / "same", file, replicas=2, **changes))
    same(rows_of(tmp_path / "same"), rows_of(tmp_path / "two", 4))
    for out in ("two", "rest"):
        losses = [row["loss"] for row in rows_of(tmp_path / out, 4)]
        expected = [row["loss"] for row in rows_of(tmp_path / "one", 4)]
        assert losses == pytest.approx(expected, rel=1e-4)


def test_each_replica_has_its_own_solvers(tmp_path):
    def make(comm, replicas):
        grid = ProcessGrid(comm, replicas)
        return trained_of(build(grid.layers), comm, grid)

    def level(trained):
        return trained.stacks[0].solver_state()["accuracy"]["level"]

    def write(comm):
        trained = make(comm, 2)
        state = trained.stacks[0].solver_state()
        state["accuracy"]["level"] = 2 - trained.grid.replica
        trained.stacks[0].load_solver_state(state)
        saved(trained, tmp_path / file_name(1))

    def read_back(comm, replicas):
        trained = make(comm, replicas)
        with load(tmp_path / file_name(1)) as file:
            trained.load(file)
        return level(trained)

    on_ranks(4, write)
    assert on_ranks(4, lambda comm: read_back(comm, 2)) == [2, 2, 1, 1]
    assert on_ranks(3, lambda comm: read_back(comm, 3)) == [2, 2, 2], "the most exact"
    assert on_ranks(1, lambda comm: read_back(comm, 1)) == [2]


@pytest.mark.ranks(1, 3)
def test_statistics_in_a_stack_and_a_single_number(spmd, shared_tmp_path):
    """Buffers of the layers, a parameter without axes, a buffer that is not kept."""

    class Around(nn.Module):
        def __init__(self, stack):
            super().__init__()
            self.stack, self.scale = stack, nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
            self.register_buffer("mask", torch.ones(3, 3, dtype=torch.complex64), persistent=False)

    def make(comm, seed):
        def block():
            return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4).eval()).double()

        stack = LayerParallel(block, 8, 1.0, comm, seed=seed)
        with torch.no_grad():
            for buffer in stack.layers.buffers():
                buffer.add_(seed)
        return Around(stack)

    def body(comm):
        model, other = make(comm, 1), make(comm, 2)
        saved(trained_of(model, comm), shared_tmp_path / file_name(1))
        with torch.no_grad():
            other.scale.zero_()
        with load(shared_tmp_path / file_name(1)) as file:
            load_weights(file, other)
        ours, theirs = model.state_dict(), other.state_dict()
        return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)

    results = spmd(body)
    assert results == [True] * len(results)


@pytest.mark.ranks(1, 2)
def test_a_weight_that_is_not_finite_is_not_saved(spmd):
    def body(comm):
        model = build(comm)
        trained = trained_of(model, comm, update=4)
        if comm.rank == model[2].last_rank:
            with torch.no_grad():
                next(model[2].parameters())[0] = torch.nan
        return refusal(RunError, trained.state)

    for message in spmd(body):
        assert message.startswith("update 4: rank ") and "weights that are not finite" in message
