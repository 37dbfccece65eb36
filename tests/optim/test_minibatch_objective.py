"""Samples that are exchanged: objectives in minibatches and in portions, cycles over them, and runs that go on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from mgopt_runs import EXACT, last, mgopt, points, problem

from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.mgopt import MGOpt
from xbraid_py.multilevel.depth.options import LevelOptions, MGOptOptions
from xbraid_py.problem.portions import PortionedObjective
from xbraid_py.problem.problem import perceptron_weights
from xbraid_py.run.store.read import load
from xbraid_py.run.store.write import CheckpointStore

OPTIONS = MGOptOptions(levels=3, optim=LevelOptions(learning_rate=(0.3, 0.2, 0.1)))
SPLITS = {"even": (20, 20, 20), "uneven": (7, 30, 23)}


def samples(number: int, size: int = 20):
    """The circles' points in turns: a minibatch for every number."""
    train = points()
    which = (torch.arange(size) + number * size) % 60
    return train.features[:, which].contiguous(), train.labels[which]


def split(sizes):
    """All points in portions."""
    train = points()
    return list(zip(train.features.split(sizes, 1), train.labels.split(sizes), strict=True))


def of(data):
    """The problem of `mgopt_runs` with other samples."""
    return replace(problem(), features=data[0], labels=data[1])


@pytest.mark.parametrize("mgrit", [EXACT, MGRIT(cfactor=4)], ids=["layer after layer", "lagged"])
def test_exchanged_samples_are_those_of_a_new_objective(mgrit):
    solvers = {"forward": mgrit, "adjoint": mgrit.for_adjoint()}
    objective = replace(of(samples(0)), **solvers).objective(16)
    x = perceptron_weights(objective.network, seed=3)
    for data in (samples(0), samples(1), samples(2, size=11), samples(1)):
        objective.use(*data)
        fresh = replace(of(data), **solvers).objective(16)
        assert objective.evaluate(x) == fresh.evaluate(x)
        assert torch.equal(objective.gradient(x), fresh.gradient(x))


def test_labels_that_do_not_fit_are_refused():
    objective = problem().objective(16)
    with pytest.raises(ValueError, match=r"^labels.shape=\(60,\) must be \(20,\), one for each column of features$"):
        objective.use(samples(0)[0], points().labels)


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
def test_portions_are_the_whole(sizes):
    whole = problem().objective(16)
    parts = PortionedObjective(problem().objective(16), split(sizes))
    x = perceptron_weights(whole.network, seed=3)
    for _ in range(2):
        expected, found = whole.evaluate(x), parts.evaluate(x)
        for name in ("value", "loss", "accuracy"):
            assert getattr(found, name) == pytest.approx(getattr(expected, name), rel=1e-13)
        torch.testing.assert_close(parts.gradient(x), whole.gradient(x), rtol=1e-12, atol=1e-14)
        x = x + 0.1
    assert (parts.evaluations, parts.gradients) == (whole.evaluations, whole.gradients) == (2, 2)
    assert parts.work == pytest.approx(whole.work)


def test_no_portion_is_refused():
    with pytest.raises(ValueError, match="^portions is empty; use at least one$"):
        PortionedObjective(problem().objective(16), [])


def test_cycles_over_portions_are_cycles_over_all():
    expected = mgopt(optim=OPTIONS.optim)
    run = MGOpt(problem(), 16, OPTIONS, split((30, 30)))
    run.x = expected.x
    theirs, ours = last(expected, 3), last(run, 3)
    torch.testing.assert_close(run.x, expected.x, rtol=1e-11, atol=1e-12)
    assert (ours.work, ours.gradients) == (theirs.work, theirs.gradients)
    assert ours.counted == pytest.approx(theirs.counted)


def test_portions_take_no_minibatches():
    run = MGOpt(problem(), 16, OPTIONS, split((30, 30)))
    with pytest.raises(ValueError, match="^batches of an objective in portions, which has all samples; leave one out$"):
        next(run.run(1, samples))


@pytest.mark.parametrize("method", ["gd", "lbfgs"])
def test_algorithm_3_is_a_cycle_on_each_minibatch(method):
    optim = LevelOptions(method=(method,), learning_rate=(0.3,), line_search=method == "lbfgs", keep=False)
    options = replace(OPTIONS, optim=optim, line_search=method == "lbfgs")
    run = MGOpt(of(samples(0)), 16, options)
    run.x = x = perceptron_weights(run.network, seed=2)
    record = list(run.run(4, samples))[-1]
    for number in range(4):
        alone = MGOpt(of(samples(number)), 16, options)
        alone.x = x
        last(alone, 1)
        x = alone.x
    assert torch.equal(run.x, x)
    assert record.evaluation == of(samples(4)).objective(16).evaluate(x), "that of the next cycle"
    assert record.work == 4 * run.schedule.work()


@pytest.mark.parametrize("batches", [None, samples], ids=["all samples", "minibatches"])
@pytest.mark.parametrize("full_multigrid", [0, 1])
@pytest.mark.parametrize("stop", [0, 2])
@pytest.mark.parametrize("method", ["gd", "momentum", "adam", "lbfgs"])
def test_a_run_goes_on_as_if_it_had_not_stopped(tmp_path, batches, full_multigrid, stop, method):
    optim = replace(OPTIONS.optim, method=(method,), line_search=method == "lbfgs")
    options = replace(OPTIONS, full_multigrid=full_multigrid, optim=optim)

    def run():
        found = MGOpt(of(samples(0)), 16, options)
        found.x = perceptron_weights(found.network, seed=2)
        return found

    whole, first, second = run(), run(), run()
    expected = [replace(record, seconds=0.0) for record in whole.run(5, batches)]
    done = list(first.run(stop, batches))[-1]
    arrays, numbers = first.state()
    path = CheckpointStore(tmp_path).save(first.network.comm, stop, arrays, {"state": numbers})
    with load(path) as checkpoint:
        second.load(checkpoint)
    rest = list(second.run(5, batches))
    assert [replace(record, seconds=0.0) for record in rest] == expected[stop + 1 :]
    assert rest[0].seconds > done.seconds and torch.equal(second.x, whole.x)
