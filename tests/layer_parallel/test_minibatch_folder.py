"""What a run on minibatches leaves in its folder and refuses to go on from: rows, the best, other content, events."""

import contextlib
import json
import logging

import pytest
import torch
from minibatch_runs import UPDATES, SmallOptions, SmallTraining, build, rows_of, run, undisturbed_runs
from refusal import refusal
from torch import nn

from xbraid_py import RunError
from xbraid_py.comm import SerialCommunicator
from xbraid_py.layer_parallel.minibatch.state import MinibatchState
from xbraid_py.run.store.read import CheckpointError, file_name, load
from xbraid_py.run.store.write import Score, Shard, save


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """`written(size)`: folder of an undisturbed run with a checkpoint of every update, and what the run returned."""
    return undisturbed_runs(tmp_path_factory)


def test_what_is_recorded(tmp_path, caplog):
    """Rows between two are left out, but for those in which a solver was changed or an error measured."""
    caplog.set_level(logging.INFO, "xbraid_py")  # as `launch` does
    run(SerialCommunicator(), tmp_path, record_every=100, validate_every=100)
    rows = rows_of(tmp_path)
    stacks = {row["update"]: row["stacks"][0] for row in rows}
    assert stacks[1]["measured"] and stacks[5]["measured"], "every fourth is, and whenever something was changed"
    assert all(stack["measured"] or stack["event"] for n, stack in stacks.items() if n not in (1, UPDATES))
    assert 2 < len(rows) < UPDATES and not any("telling" in row for row in rows)
    for row, stack in zip(rows, stacks.values(), strict=True):
        assert (row["state_residual"], row["adjoint_residual"]) == (stack["residual"], stack["adjoint_residual"])
    said = (tmp_path / "log.txt").read_text()
    assert stacks[1]["event"] in said and "levels of a stack" in said


def test_the_best_validation_has_a_checkpoint(tmp_path):
    run(SerialCommunicator(), tmp_path, checkpoint_every=100, validate_every=1, keep=1)
    rows = rows_of(tmp_path)
    best = max(row["val_accuracy"] for row in rows)
    with load(tmp_path / "checkpoints" / "best.h5") as file:
        assert file.meta["row"]["val_accuracy"] == best == file.meta["score"]["accuracy"]
        assert file.meta["update"] == next(row["update"] for row in rows if row["val_accuracy"] == best)


def test_what_was_not_validated_has_no_score(tmp_path):
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    state = MinibatchState(model=model, optimizer=optimizer, comm=SerialCommunicator())
    training = SmallTraining(SmallOptions(out=tmp_path), state, UPDATES)
    assert training.score({"loss": 1.0, "val_loss": 2.0}) == Score(objective=2.0)
    assert training.score({"loss": 1.0, "val_accuracy": 0.5}) == Score(accuracy=0.5)
    assert training.score({"loss": 1.0, "val_accuracy": float("nan")}) == Score() == training.score({"loss": 1.0})


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (lambda: nn.Sequential(*build(None)[:3], nn.Linear(4, 5).double()), "3.weight of (2, 4) torch.float64, not (5"),
        (lambda: build(None).float(), "0.weight of (4, 3) torch.float64, not (4, 3) torch.float32; start"),
        (lambda: nn.Sequential(*build(None), nn.Linear(2, 2).double()), "another network than this run's: no 4.bias;"),
        (lambda: build(None)[:3], "holds another network than this run's: 3.bias; start"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(written, tmp_path, model, said):
    """In the set-up: the model on ranks is not made."""
    path = written(1)[0] / "checkpoints" / file_name(3)

    def built(comm, *_):
        assert comm is None, "the network on ranks"
        return model()

    with pytest.raises(CheckpointError) as caught:
        run(SerialCommunicator(), tmp_path / "run", path, model=built)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        lambda mine, its: its.update(update="5"),
        lambda mine, its: its.update(update=0),
        lambda mine, its: its.update(seconds=[]),
        lambda mine, its: its.pop("seconds"),
        lambda mine, its: its.update(groups=[7]),
        lambda mine, its: its.update(groups=[]),
        lambda mine, its: its.update(scheduler=None),
        lambda mine, its: its.update(scheduler=3),
        lambda mine, its: its.update(solvers=[]),
        lambda mine, its: its.update(solvers=[[]]),
        lambda mine, its: its["solvers"][0][0].pop("accuracy"),
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
    change(mine, its["state"])
    path = tmp_path / "changed.h5"
    save(path, SerialCommunicator(), {name: Shard(rows, 0, len(rows)) for name, rows in mine.items()}, its)
    with pytest.raises((CheckpointError, RunError), match=str(path)):
        run(SerialCommunicator(), tmp_path / "run", path)


def test_batches_that_end_too_early(tmp_path, monkeypatch):
    monkeypatch.setattr(SmallTraining, "batches", lambda self, done: iter(()))
    with pytest.raises(ValueError, match=r"^batches end after update 0, total=8; use as many batches$"):
        run(SerialCommunicator(), tmp_path)


# ---- Event files


def crash_at(number):
    def at(update):
        if update == number:
            raise RunError("a crash")

    return at


def test_event_files_go_on(tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'xbraid_py[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(RunError):
        run(SerialCommunicator(), tmp_path, at=crash_at(6), tensorboard=True, checkpoint_every=3)
    run(SerialCommunicator(), tmp_path, "auto", tensorboard=True)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("small/loss")] == list(range(1, UPDATES + 1))
    expected = [row["loss"] for row in rows_of(tmp_path)]
    assert [event.value for event in events.Scalars("small/loss")] == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in events.Scalars("small/val_accuracy")] == [4, 8]
    run(SerialCommunicator(), tmp_path)
    assert (tmp_path / "earlier-1" / "tensorboard").is_dir() and not (tmp_path / "tensorboard").exists()


@pytest.mark.ranks(1, 2)
def test_event_files_that_cannot_be_written_are_one_message(spmd, shared_tmp_path):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'xbraid_py[tensorboard]'")
    out = shared_tmp_path / "run"

    def body(comm):
        # A file that the run does not set aside, since it goes on.
        with contextlib.suppress(RunError):
            run(comm, out, at=crash_at(2))
        if comm.rank == 0:
            (out / "tensorboard").write_text("in the way")
        comm.barrier()

        def at(update):
            assert update == 2, "an update after the failure"

        return refusal(RunError, run, comm, out, "auto", at=at, tensorboard=True)

    for message in spmd(body):
        assert message.startswith(f"rank 0 cannot write to {out}: ") and "tensorboard" in message
