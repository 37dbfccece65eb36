"""A nested iteration that goes on from its state at any update, on any number of ranks, is the uninterrupted one."""

from __future__ import annotations

from itertools import islice

import pytest
import torch
from small_runs import ONE_SHOT, SEQUENTIAL, gathered, load_state, nested, same_bits, save_state, timeless

from xbraid_py.comm import SerialCommunicator
from xbraid_py.optim import OneShotOptions
from xbraid_py.run.store.read import CheckpointError, file_name, load
from xbraid_py.testing import run_threads

SERIAL = SerialCommunicator()
UPDATES = (3, 2, 3)
RANKS = (1, 2, 3, 5, 8, 1)


def on_ranks(size, body):
    return run_threads(size, body) if size > 1 else [body(SERIAL)]


def make(comm, method="lbfgs", **others):
    """Two pairs are fewer than there are updates, so that memory is full at some checkpoints and not at others."""
    one_shot = OneShotOptions(method=method, memory=2, boost_updates=2, boost_iter=4)
    return nested(comm, UPDATES, one_shot=one_shot, **others)


def finish(run):
    """The records of the rest of a run, and its final weights."""
    records = [timeless(record) for record in run.run()]
    return records, gathered(run.network, run.weights)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(method, size)`: folder of the states of every update, written on `size` ranks; records; weights."""
    known = {}

    def write(method, size, **others):
        key = (method, size, *others.items())
        if key not in known:
            out = tmp_path_factory.mktemp(f"{method}{size}")

            def body(comm):
                run = make(comm, method, **others)
                records = []
                for record in run.run():
                    records.append(timeless(record))
                    save_state(out, run, record.update)
                return records, gathered(run.network, run.weights)

            known[key] = (out, *on_ranks(size, body)[0])
        return known[key]

    return write


def check_rests(out, expected, weights, updates, method, readers, **others):
    """Go on from the states of some updates on `readers` ranks."""

    def body(comm):
        wrong = []
        for k in updates:
            records, found = finish(load_state(out / file_name(k), make(comm, method, **others)))
            if records != expected[k + 1 :]:
                wrong.append((k, records))
            elif not same_bits(found, weights):
                wrong.append((k, "weights"))
        return wrong

    assert on_ranks(readers, body) == [[]] * readers


@pytest.mark.parametrize("readers", [1, 2, 3])
@pytest.mark.parametrize("writers", [1, 2, 3])
def test_the_rest_of_a_run_is_bitwise_the_same(written, writers, readers):
    out, expected, weights = written("lbfgs", writers)
    assert [record.level for record in expected] == [2, 2, 2, 1, 1, 0, 0, 0, 0]
    assert expected[-1].final and expected[-1].update == sum(UPDATES)
    # Every update of every run is read on some number of ranks, and every update on every number of ranks.
    updates = range(8) if readers == 1 else range((writers + readers) % 3, 8, 3)
    check_rests(out, expected, weights, updates, "lbfgs", readers)


@pytest.mark.parametrize("method, writers, readers", [("bfgs", 1, 3), ("bfgs", 3, 1), ("steepest", 2, 1)])
def test_whatever_the_method(written, method, writers, readers):
    out, expected, weights = written(method, writers)
    check_rests(out, expected, weights, (2, 4, 7), method, readers)


@pytest.mark.parametrize("mgrit", [SEQUENTIAL, ONE_SHOT], ids=["sequential", "lagged"])
@pytest.mark.parametrize("writers, readers", [(1, 3), (3, 1), (2, 2)])
def test_with_other_propagation(written, writers, readers, mgrit):
    out, expected, weights = written("lbfgs", writers, mgrit=mgrit)
    check_rests(out, expected, weights, (2, 4, 7), "lbfgs", readers, mgrit=mgrit)


def test_from_one_number_of_ranks_to_the_next(written, tmp_path):
    _, expected, weights = written("lbfgs", 1)
    found, last = [], None
    for size, updates in zip(RANKS, (2, 2, 2, 2, 2, 100), strict=True):

        def body(comm, last=last, updates=updates):
            run = make(comm) if last is None else load_state(last, make(comm))
            records = []
            for record in islice(run.run(), updates):
                records.append(timeless(record))
                path = save_state(tmp_path, run, record.update)
            return records, path, gathered(run.network, run.weights)

        records, last, ends = on_ranks(size, body)[0]
        found += records
    assert found[: len(expected)] == expected and same_bits(ends, weights)


def test_after_the_end_there_is_the_end(written):
    out, expected, weights = written("lbfgs", 2)
    run = load_state(out / file_name(8), make(SERIAL))
    assert run.depth == 32 and same_bits(gathered(run.network, run.weights), weights), "to draw from"
    records, found = finish(run)
    assert records == expected[-1:] and same_bits(found, weights)


def test_a_checkpoint_does_not_disturb_the_run(written):
    _, expected, weights = written("lbfgs", 1)
    records, found = finish(make(SERIAL))
    assert records == expected and same_bits(found, weights)


def test_all_of_a_state_matters(written):
    """The states, adjoints and pairs in a file are read: without one of them the rest is another."""
    out, expected, _ = written("lbfgs", 1)

    def rest(change):
        run = load_state(out / file_name(7), make(SERIAL))
        change(run)
        return finish(run)[0][0]

    assert rest(lambda run: None) == expected[8]
    for change in (
        lambda run: setattr(run.objective, "warm", None),
        lambda run: run.one_shot.quasi_newton.s[0].mul_(2),
        lambda run: run.one_shot.quasi_newton.y[1].mul_(2),
        lambda run: run.one_shot.gradient.mul_(2),
        lambda run: run.weights.mul_(2),
    ):
        assert rest(change).evaluation.value != expected[8].evaluation.value


def test_random_state_is_taken_over(tmp_path):
    run = make(SERIAL)
    next(run.run())
    torch.manual_seed(3)
    path = save_state(tmp_path, run, 0)
    expected = torch.rand(4)
    torch.manual_seed(4)
    load_state(path, make(SERIAL))
    assert torch.equal(torch.rand(4), expected)


def test_no_rank_in_a_file(written):
    """Whoever writes, the file holds the same arrays and numbers."""
    contents = []
    for size in (1, 2, 3):
        with load(written("lbfgs", size)[0] / file_name(6)) as file:
            file.meta["state"]["before"].pop("seconds")
            arrays = {name: file.rows(name).tolist() for name in file.names() if name != "random_state"}
            contents.append((file.meta, arrays))
    assert contents[0] == contents[1] == contents[2]
    groups = {name.rsplit("/", 1)[0] for name in arrays}
    assert groups == {"weights", "gradient", "optimizer/s", "optimizer/y", "warm"}
    assert len(arrays["weights/layers.weight"]) == 32 and len(arrays["warm/state_0"]) == 8


def test_the_state_of_another_network_is_refused(written):
    out, *_ = written("lbfgs", 1)
    with pytest.raises(CheckpointError, match=r"32 layers, where this run has \[16, 32, 64\]"):
        load_state(out / file_name(6), make(SERIAL, num_layers=64))
    with pytest.raises(CheckpointError, match="holds no state of a training run"):
        load_state(out / file_name(6), make(SERIAL, width=4))


@pytest.mark.parametrize("first, second", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("sizes", [(1, 3), (2, 1)])
def test_another_precision_only_when_asked(tmp_path, first, second, sizes):
    def write(comm):
        run = make(comm, dtype=first)
        for record in run.run():
            if record.update == 4:
                return save_state(tmp_path, run, 4)

    path = on_ranks(sizes[0], write)[0]
    with load(path) as checkpoint:
        stored = checkpoint.rows("weights/layers.weight")
    message = f"holds {first}, but this run has {second}; give --convert_dtype"
    with pytest.raises(CheckpointError, match=message):
        load_state(path, make(SERIAL, dtype=second))

    def read(comm):
        run = load_state(path, make(comm, dtype=second), convert_dtype=True)
        pairs = run.one_shot.quasi_newton
        kinds = {rows.dtype for rows in (run.weights, run.one_shot.gradient, *pairs.s, *pairs.y, *run.objective.warm)}
        return kinds, gathered(run.network, run.weights)["layers"]

    for kinds, rows in on_ranks(sizes[1], read):
        assert kinds == {second}
        assert torch.equal(rows[:, : stored[0].numel()], stored.flatten(1).to(second))


def test_the_rest_in_the_other_precision_is_close(written):
    out, expected, _ = written("lbfgs", 2)
    run_threads(3, lambda comm: _close(load_state(out / file_name(5), make(comm, dtype=torch.float32), True), expected))


def _close(run, expected):
    records = list(run.run())
    assert [record.update for record in records] == [6, 7, 8]
    for record, other in zip(records, expected[6:], strict=True):
        assert record.evaluation.value != other.evaluation.value
        assert record.evaluation.value == pytest.approx(other.evaluation.value, rel=1e-3)
