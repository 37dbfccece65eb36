"""What a resumed run on minibatches finds and leaves in its folder: checkpoints taken, passed over, refused; events."""

import contextlib
import json
import shutil

import pytest
import torch
from minibatch_runs import CONFIGURATION, FREE, UPDATES, build, on_ranks, rows_of, run, same, undisturbed_runs
from torch import nn

from xbraid_py import RunError
from xbraid_py.comm import SerialCommunicator
from xbraid_py.recipes.digits_resume import Position, read_resumed, score_of_test
from xbraid_py.run.record import read
from xbraid_py.run.store.keep import Score
from xbraid_py.run.store.write import CheckpointError, Shard, file_name, load, save


@pytest.fixture(autouse=True)
def no_picture(monkeypatch):
    """It takes longer to draw than all the rest of these runs."""
    monkeypatch.setattr("xbraid_py.recipes.digits_run.picture", lambda rows, path: None)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(size)`: folder of an undisturbed run with a checkpoint of every update, and what the run returned."""
    return undisturbed_runs(tmp_path_factory)


def test_a_run_that_is_over_ends_at_once(written, tmp_path, capsys):
    out = tmp_path / "run"
    shutil.copytree(written(1)[0], out)
    before, _ = (out / "metrics.jsonl").read_bytes(), capsys.readouterr()
    status = json.loads((out / "status.json").read_text())
    (out / "status.json").write_text(json.dumps(status | {"state": "running"}))
    tested, _ = run(SerialCommunicator(), out, "auto", at=lambda number: pytest.fail("an update"))
    assert tested == read(out / "metrics.jsonl")[-1] and (out / "metrics.jsonl").read_bytes() == before
    assert capsys.readouterr().out == f"the run in {out} is finished; to train again, start without --resume\n"
    assert json.loads((out / "status.json").read_text())["state"] == "finished"


def test_from_an_earlier_checkpoint_in_the_same_folder(written, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(written(1)[0], out)
    run(SerialCommunicator(), out, out / "checkpoints" / file_name(5))
    assert sorted(path.name for path in (out / "earlier-1" / "checkpoints").iterdir()) == [
        file_name(number) for number in (6, 7, 8)
    ]
    same(rows_of(out), rows_of(written(1)[0]))


def test_a_damaged_checkpoint_is_passed_over(written, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(written(1)[0], out)
    for number in (7, 8):
        path = out / "checkpoints" / file_name(number)
        path.write_bytes(path.read_bytes()[:-300])
    assert read_resumed("auto", out, CONFIGURATION, FREE, build(None)).update == 6
    run(SerialCommunicator(), out, "auto")
    same(rows_of(out), rows_of(written(1)[0]))


def test_the_best_test_has_a_checkpoint(tmp_path):
    run(SerialCommunicator(), tmp_path, checkpoint_every=100, test_every=1, keep=1)
    tests = [row for row in rows_of(tmp_path) if row["kind"] == "test"]
    best = max(row["test_accuracy"] for row in tests)
    with load(tmp_path / "checkpoints" / "best.h5") as file:
        assert file.meta["training"]["tested"]["test_accuracy"] == best == file.meta["score"]["accuracy"]
        assert file.meta["update"] == next(row["update"] for row in tests if row["test_accuracy"] == best)
    assert score_of_test({"validation_loss": 2.0, "seconds": 1.0}) == Score(objective=2.0)
    assert score_of_test({"test_accuracy": float("nan")}) == Score()


def refusal(path, configuration=CONFIGURATION, model=None):
    with pytest.raises(CheckpointError) as caught:
        read_resumed(str(path), path.parent, configuration, FREE, model or build(None))
    return str(caught.value)


def test_what_is_refused(written, tmp_path):
    path = written(1)[0] / "checkpoints" / file_name(3)
    assert read_resumed(None, tmp_path, {}, (), build(None)) == Position()
    assert read_resumed("auto", tmp_path, {}, (), build(None)) == Position()
    assert read_resumed(str(path), tmp_path, CONFIGURATION | {"out": "there"}, FREE, build(None)).update == 3
    message = refusal(path, CONFIGURATION | {"mgrit": {"cfactor": 4}})
    assert message == (
        f"{path} was written with mgrit.cfactor=2, but this run has mgrit.cfactor=4; "
        f"give --mgrit.cfactor 2, or start without --resume"
    )
    other = build(None)
    other[3] = nn.Linear(4, 5).double()
    assert "3.weight of (2, 4) torch.float64, not (5, 4) torch.float64; start" in refusal(path, model=other)
    assert "0.weight of (4, 3) torch.float64, not (4, 3) torch.float32; start" in refusal(
        path, model=build(None).float()
    )
    assert "holds another network than this run's: no 4.bias; start" in refusal(
        path, model=nn.Sequential(*build(None), nn.Linear(2, 2).double())
    )
    assert "holds another network than this run's: 3.bias; start" in refusal(path, model=build(None)[:3])
    foreign = tmp_path / "else.h5"
    save(foreign, SerialCommunicator(), {"w": Shard(torch.zeros(3), 0, 3)}, {"update": 1})
    assert refusal(foreign).startswith(f"{foreign} holds no state of training on minibatches; give a file")


@pytest.mark.parametrize(
    "change",
    [
        lambda mine, its: its.update(update="5"),
        lambda mine, its: its["training"].update(final=None),
        lambda mine, its: its["training"].update(seconds=[]),
        lambda mine, its: its["training"].pop("tested"),
        lambda mine, its: its["training"].update(groups=[7]),
        lambda mine, its: its["training"].update(groups=[]),
        lambda mine, its: its["training"].update(scheduler=None),
        lambda mine, its: its["training"].update(scheduler=3),
        lambda mine, its: its["training"].update(solvers=[]),
        lambda mine, its: its["training"].update(solvers=[[]]),
        lambda mine, its: its["training"]["solvers"][0][0].pop("accuracy"),
        lambda mine, its: mine.pop("random_state"),
        lambda mine, its: mine.update(random_state=torch.zeros(3, dtype=torch.uint8)),
        lambda mine, its: mine.pop("optimizer_scalars/step/0.weight"),
        lambda mine, its: mine.update({"optimizer/exp_avg/0.weight": torch.zeros(2)}),
        lambda mine, its: mine.update({"optimizer/exp_avg/2.layers.0.weight": torch.zeros(3, 4, 4)}),
        lambda mine, its: mine.update({"weights/2.layers.0.weight": torch.zeros(3, 4, 4)}),
    ],
)
def test_a_sound_file_of_other_content(written, tmp_path, change):
    with load(written(1)[0] / "checkpoints" / file_name(5)) as file:
        mine, its = {name: file.rows(name) for name in file.names()}, json.loads(json.dumps(file.meta))
    change(mine, its)
    path = tmp_path / "changed.h5"
    save(path, SerialCommunicator(), {name: Shard(rows, 0, len(rows)) for name, rows in mine.items()}, its)
    with pytest.raises((CheckpointError, RunError), match=str(path)):
        run(SerialCommunicator(), tmp_path / "run", path)


def test_ranks_that_go_on_from_different_checkpoints_are_told(written, tmp_path):
    out = written(1)[0]

    def body(comm):
        try:
            run(comm, tmp_path / "run", out / "checkpoints" / file_name(2 + comm.rank))
        except RunError as error:
            return str(error)

    for message in on_ranks(2, body):
        assert "resume" in message and "the checkpoints have changed meanwhile" in message


def test_event_files_go_on(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'xbraid_py[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def crash(update):
        if update == 6:
            raise RunError("a crash")

    with pytest.raises(RunError):
        run(SerialCommunicator(), tmp_path, at=crash, tensorboard=True, checkpoint_every=3)
    run(SerialCommunicator(), tmp_path, "auto", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == list(range(1, UPDATES + 1))
    expected = [row["loss"] for row in rows_of(tmp_path) if row["kind"] == "update"]
    assert [event.value for event in events.Scalars("loss")] == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in events.Scalars("test_accuracy")] == [4, 8]
    run(SerialCommunicator(), tmp_path)
    assert (tmp_path / "earlier-1" / "tensorboard").is_dir() and not (tmp_path / "tensorboard").exists()


@pytest.mark.ranks(1, 2)
def test_event_files_that_cannot_be_written_are_one_message(spmd, shared_tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'xbraid_py[tensorboard]'")
    out = shared_tmp_path / "run"

    def body(comm):
        def at(update):
            assert update == 2, "an update after the failure"

        try:
            run(comm, out, written(comm), at=at, tensorboard=True)
        except RunError as error:
            return str(error)

    def written(comm):
        # A file that the run does not set aside, since it goes on.
        with contextlib.suppress(RunError):
            run(comm, out, at=lambda update: crash(update), checkpoint_every=1)
        if comm.rank == 0:
            (out / "tensorboard").write_text("in the way")
        comm.barrier()
        return "auto"

    def crash(update):
        if update == 2:
            raise RunError("a crash")

    for message in spmd(body):
        assert message.startswith(f"rank 0 cannot write to {out}: ") and "tensorboard" in message
