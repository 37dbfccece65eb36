"""A run resumed from a checkpoint of any update, on any number of ranks, is the uninterrupted run."""

import pytest
import torch
from small_runs import ONE_SHOT, SEQUENTIAL, gathered, nested, same_bits, timeless

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.errors import RunError
from xbraid_py.multilevel.depth.nested_state import save_run
from xbraid_py.optim import OneShotOptions
from xbraid_py.recipes.old_resume import checkpoint_folder, read_resumed
from xbraid_py.run.store.write import CheckpointError, Shard, file_name, load, save
from xbraid_py.testing import run_threads

UPDATES = (3, 2, 3)
CONFIGURATION = {"num_layers": 32, "out": "here", "optim": {"memory": 2, "fixed_step": None}}
METHODS = ("lbfgs", "bfgs", "steepest")


def on_ranks(size, body):
    return run_threads(size, body) if size > 1 else [body(SerialCommunicator())]


def make(comm, method="lbfgs", **others):
    """Two pairs are fewer than there are updates, so that memory is full at some checkpoints and not at others."""
    return nested(
        comm, UPDATES, one_shot=OneShotOptions(method=method, memory=2, boost_updates=2, boost_iter=4), **others
    )


def finish(run, snapshot=None):
    """The records of a run, or of the rest of one, and its final weights."""
    records = [timeless(record) for record in run.run(snapshot)]
    return records, gathered(run.network, run.weights)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(method, size)`: folder of the checkpoints of every update, written on `size` ranks; records; weights."""
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
                    save_run(checkpoint_folder(out, "nested"), run, record.update, "nested", CONFIGURATION)
                return records, gathered(run.network, run.weights)

            known[key] = (out, *on_ranks(size, body)[0])
        return known[key]

    return write


def check_rests(out, expected, weights, updates, method, readers, **others):
    """Go on from the checkpoints of some updates on `readers` ranks."""

    def body(comm):
        wrong = []
        for k in updates:
            run = make(comm, method, **others)
            path = checkpoint_folder(out, "nested") / file_name(k)
            resumed = read_resumed(str(path), out, {"nested": run}, CONFIGURATION, ())
            records, found = finish(run, resumed["nested"])
            if (list(resumed), resumed["nested"].next_record) != (["nested"], k + 1) or records != expected[k + 1 :]:
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


def test_after_the_end_there_is_at_most_the_end(written):
    out, expected, weights = written("lbfgs", 2)
    run = make(SerialCommunicator())
    path = checkpoint_folder(out, "nested") / file_name(8)
    records, found = finish(run, read_resumed(str(path), out, {"nested": run}, CONFIGURATION, ())["nested"])
    assert records in ([], expected[-1:]) and same_bits(found, weights)


def test_a_checkpoint_does_not_disturb_the_run(written):
    _, expected, weights = written("lbfgs", 1)
    records, found = finish(make(SerialCommunicator()))
    assert records == expected and same_bits(found, weights)


def test_all_of_a_checkpoint_matters(written):
    """The states, adjoints and pairs in a file are read: without one of them the rest is another."""
    out, expected, _ = written("lbfgs", 1)

    def rest(change):
        run = make(SerialCommunicator())
        resumed = read_resumed(
            str(checkpoint_folder(out, "nested") / file_name(7)), out, {"nested": run}, CONFIGURATION, ()
        )
        change(resumed["nested"])
        return finish(run, resumed["nested"])[0][0]

    assert rest(lambda snapshot: None) == expected[8]
    for change in (
        lambda snapshot: snapshot.warm.pop("state"),
        lambda snapshot: snapshot.vectors["s"][0].mul_(2),
        lambda snapshot: snapshot.vectors["y"][1].mul_(2),
        lambda snapshot: snapshot.vectors["gradient"][0].mul_(2),
        lambda snapshot: snapshot.vectors["weights"][0].mul_(2),
    ):
        assert rest(change).evaluation.value != expected[8].evaluation.value


def test_random_state_is_taken_over(written, tmp_path):
    run = make(SerialCommunicator())
    next(run.run())
    torch.manual_seed(3)
    path = save_run(tmp_path, run, 0, "nested", CONFIGURATION)
    expected = torch.rand(4)
    torch.manual_seed(4)
    read_resumed(str(path), tmp_path, {"nested": run}, CONFIGURATION, ())
    assert torch.equal(torch.rand(4), expected)


def test_no_rank_in_a_file(written):
    """Whoever writes, the file holds the same arrays and numbers."""
    contents = []
    for size in (1, 2, 3):
        with load(checkpoint_folder(written("lbfgs", size)[0], "nested") / file_name(6)) as file:
            numbers = file.meta["snapshot"]
            numbers["before"].pop("seconds")
            arrays = {name: file.rows(name).tolist() for name in file.names() if name != "random_state"}
            contents.append((file.meta, arrays))
    assert contents[0] == contents[1] == contents[2]
    assert {name.rsplit("/", 1)[0] for name in arrays} == {
        "weights",
        "gradient",
        "optimizer/s",
        "optimizer/y",
        "warm",
    }
    assert len(arrays["weights/layers.weight"]) == 32 and len(arrays["warm/state_0"]) == 8


def refusal(path, configuration=CONFIGURATION, names=("nested",), free=("out",)) -> str:
    run = make(SerialCommunicator())
    with pytest.raises(CheckpointError) as caught:
        read_resumed(str(path), path.parent, {name: run for name in names}, configuration, free)
    return str(caught.value)


@pytest.fixture
def path(written):
    return checkpoint_folder(written("lbfgs", 1)[0], "nested") / file_name(2)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"num_layers": 64}, "num_layers=32, but this run has num_layers=64; give --num_layers 32"),
        ({"optim": {"memory": 3, "fixed_step": None}}, "optim.memory=2, but this run has optim.memory=3"),
        ({"optim": {"memory": 2}, "num_layers": 32, "more": 1}, "more=None, but this run has more=1"),
    ],
)
def test_another_configuration(path, change, said):
    message = refusal(path, {**CONFIGURATION, **change})
    assert message.startswith(f"{path} was written with {said}")
    assert message.endswith(", or start without --resume")


def test_what_may_differ(path):
    run = make(SerialCommunicator())
    other = {**CONFIGURATION, "out": "there", "optim": {"memory": 9}}
    assert read_resumed(str(path), path.parent, {"nested": run}, other, ("out", "optim"))["nested"].next_record == 3
    assert "with optim.memory=2, but" in refusal(path, other)


def test_a_checkpoint_of_something_else(tmp_path):
    path = tmp_path / "else.h5"
    save(path, SerialCommunicator(), {"w": Shard(torch.zeros(3), 0, 3)}, {"update": 1})
    assert refusal(path) == f"{path} holds no state of a training run; give one of a run's checkpoints folder"


def test_a_truncated_or_missing_file(tmp_path, path):
    good = path.read_bytes()
    cut = tmp_path / "cut.h5"
    for size in (0, 100, len(good) // 2, len(good) - 1):
        cut.write_bytes(good[:size])
        assert refusal(cut).startswith(f"checkpoint {cut}: truncated, damaged or no HDF5 file")
    missing = tmp_path / "missing.h5"
    assert refusal(missing).startswith(f"checkpoint {missing}: No such file or directory; give another file")


def test_the_run_of_comparison_has_checkpoints_of_its_own(tmp_path):
    run = make(SerialCommunicator())
    next(run.run())
    folder = checkpoint_folder(tmp_path, "non-nested")
    path = save_run(folder, run, 0, "non-nested", CONFIGURATION)
    assert (
        path.parent == tmp_path / "checkpoints" / "non-nested"
        and checkpoint_folder(tmp_path, "nested") == path.parents[1]
    )
    assert refusal(path) == f"{path} belongs to the non-nested run, which this job has not; give --compare"
    # A later run of the job goes on only from the end of the earlier one.
    runs = {"nested": run, "non-nested": run}
    with pytest.raises(CheckpointError, match="follows a run whose end is not in"):
        read_resumed(str(path), tmp_path, runs, CONFIGURATION, ())
    save_run(path.parents[1], run, 5, "nested", CONFIGURATION)
    assert list(read_resumed("auto", tmp_path, runs, CONFIGURATION, ())) == ["nested"]
    finish(run)
    save_run(path.parents[1], run, 8, "nested", CONFIGURATION)
    for resume in ("auto", str(path)):
        resumed = read_resumed(resume, tmp_path, runs, CONFIGURATION, ())
        assert {name: snapshot.is_final for name, snapshot in resumed.items()} == {"nested": True, "non-nested": False}


def test_auto_takes_the_newest_good_one(tmp_path):
    run = make(SerialCommunicator())
    assert read_resumed("auto", tmp_path, {"nested": run}, CONFIGURATION, ()) == {}
    assert read_resumed(None, tmp_path, {"nested": run}, CONFIGURATION, ()) == {}
    folder = checkpoint_folder(tmp_path, "nested")
    updates = run.run()
    for k in range(3):
        next(updates)
        path = save_run(folder, run, k, "nested", CONFIGURATION)
    path.write_bytes(path.read_bytes()[:1000])
    assert read_resumed("auto", tmp_path, {"nested": run}, CONFIGURATION, ())["nested"].next_record == 2


def test_a_checkpoint_that_cannot_be_written_is_one_message(spmd, shared_tmp_path):
    blocked = shared_tmp_path / "file"
    blocked.write_text("")

    def body(comm):
        run = make(comm)
        next(run.run())
        try:
            save_run(blocked, run, 0, "nested", CONFIGURATION)
        except RunError as error:
            return str(error)

    for message in spmd(body):
        assert message.startswith(f"the checkpoint {blocked / file_name(0)} could not be written: ")
        assert message.endswith("; make room, or give another --out")
