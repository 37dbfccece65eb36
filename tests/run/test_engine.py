"""What holds for every kind of run: where it goes on, what it leaves, and how it ends."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from kinds import KINDS, arrays_of, draw_nothing, finished, options_of, program, run, updates_of
from refusal import refusal

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.recipes.mgopt import training_of
from xbraid_py.run import engine, progress, signals
from xbraid_py.run.record import read
from xbraid_py.run.signals import Stopped
from xbraid_py.run.store.read import CheckpointError, file_name, load, numbered
from xbraid_py.run.store.write import CheckpointStore

ALL = pytest.mark.parametrize("name", KINDS)
SERIAL = SerialCommunicator()


@pytest.fixture(autouse=True)
def quick_pictures(request, monkeypatch):
    """Those of one run of each kind are drawn."""
    if "name" in request.fixturenames:
        finished(request.getfixturevalue("name"))
    draw_nothing(monkeypatch)


@pytest.fixture
def copied(tmp_path):
    """`copied(name)`: a copy of that folder, with as many of its checkpoints as asked for."""

    def of(name, keep=None):
        out = tmp_path / KINDS[name].folder
        shutil.copytree(finished(name), out)
        if keep is not None:
            (out / "checkpoints" / "best.h5").unlink(missing_ok=True)
            for number, path in numbered(out / "checkpoints"):
                if number > keep:
                    path.unlink()
        return out

    return of


def status(out):
    return json.loads((out / "status.json").read_text())


def last(out):
    return max(number for number, _ in numbered(out / "checkpoints"))


def same_end(out, expected):
    """Whether two runs have the same record and end in the same state, bit for bit."""
    assert updates_of(out) == updates_of(expected)
    path = sorted((expected / "checkpoints").glob("update_*.h5"))[-1].name
    ours, theirs = arrays_of(out / "checkpoints" / path), arrays_of(expected / "checkpoints" / path)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@ALL
def test_a_run_leaves_what_it_should(name):
    out = finished(name)
    rows = read(out / "metrics.jsonl")
    updates = [row for row in rows if row["kind"] == "update"]
    assert rows[0]["kind"] == "header"
    numbers = [row["update"] for row in updates]
    assert numbers == list(range(numbers[0], numbers[0] + len(updates)))
    assert [row["final"] for row in updates] == [False] * (len(updates) - 1) + [True]
    assert all({"run", "loss", "seconds"} <= row.keys() for row in updates)
    assert any(key.startswith("val_") and isinstance(value, float) for key, value in updates[-1].items())
    assert status(out)["state"] == "finished" and status(out)["update"] == numbers[-1]
    assert sorted(number for number, _ in numbered(out / "checkpoints")) == numbers
    assert (out / "checkpoints" / "best.h5").exists() and any((out / "figures").glob("*.png"))


@ALL
def test_going_on_is_bitwise_the_uninterrupted_run(name, copied):
    expected = finished(name)
    first = min(number for number, _ in numbered(expected / "checkpoints"))
    for at in sorted({first, (first + last(expected)) // 2, last(expected) - 1}):
        out = copied(name, keep=at)
        run(KINDS[name], SERIAL, out, "--resume=auto")
        same_end(out, expected)
        assert status(out)["state"] == "finished"
        shutil.rmtree(out)


@ALL
@pytest.mark.ranks(2, 3)
def test_going_on_on_other_ranks(name, copied, spmd):
    if not KINDS[name].exact_ranks:
        pytest.skip("each number of ranks is another run")
    expected = finished(name)
    own = copied(name, keep=last(expected) - 2)
    out = spmd(lambda comm: own)[0]  # that of rank 0, where each is a process
    spmd(lambda comm: run(KINDS[name], comm, out, "--resume=auto") and None)
    for ours, theirs in zip(updates_of(out), updates_of(expected), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-6)
        for count in ("work", "counted_work", "block_evaluations"):
            assert ours.get(count) == pytest.approx(theirs.get(count)), count


@ALL
def test_a_signal_stops_and_the_run_goes_on(name, tmp_path):
    expected, out = finished(name), tmp_path / KINDS[name].folder
    at = last(expected) - 1
    kept = CheckpointStore.save

    def asked(self, comm, update, *rest):
        signals.note(signal.SIGUSR1 if update == at - 1 else 0)
        return kept(self, comm, update, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointStore, "save", asked)
        with pytest.raises(Stopped, match=f"stopped by SIGUSR1 after update {at}; --resume auto goes on from"):
            run(KINDS[name], SERIAL, out)
    signals.forget()
    assert status(out)["state"] == "stopped" and last(out) == at
    run(KINDS[name], SERIAL, out, "--resume=auto")
    same_end(out, expected)


@pytest.mark.parametrize("keep", [None, 2])
def test_what_a_killed_job_left_is_gone(keep, copied, tmp_path):
    """Also where it was killed at its end, so that nothing is left to do."""
    name = next(iter(KINDS))
    out = copied(name, keep)
    rest = [out / "checkpoints" / f"{name}.tmp" for name in ("best.h5", file_name(3))]
    rest[0].write_bytes(b"half")
    rest[1].symlink_to(tmp_path / "other")
    (tmp_path / "other").write_text("mine")
    run(KINDS[name], SERIAL, out, "--resume=auto")
    assert not list((out / "checkpoints").glob("*.tmp")) and (tmp_path / "other").read_text() == "mine"


@ALL
def test_a_run_that_dies_while_drawing_draws_the_next_time(name, tmp_path, monkeypatch):
    """And the same command has given the same bits."""
    out = tmp_path / KINDS[name].folder

    def broken(*_):
        raise RuntimeError("no ink")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_draw", broken)
        with pytest.raises(RuntimeError, match="no ink"):
            run(KINDS[name], SERIAL, out)
    assert status(out)["state"] == "failed" and not (out / "figures").exists()
    run(KINDS[name], SERIAL, out, "--resume=auto")
    assert status(out)["state"] == "finished" and any((out / "figures").glob("*.png"))
    same_end(out, finished(name))


@ALL
@pytest.mark.parametrize("state", ["running", "failed", "stopped"])
def test_a_run_that_was_killed_behind_its_last_checkpoint_is_finished(name, copied, state, capsys):
    out = copied(name)
    (out / "status.json").write_text(json.dumps({**status(out), "state": state, "message": "killed"}))
    shutil.rmtree(out / "figures")
    run(KINDS[name], SERIAL, out, "--resume=auto")
    assert status(out)["state"] == "finished" and status(out)["message"] == ""
    assert any((out / "figures").glob("*.png"))
    assert "is finished" in capsys.readouterr().out


@pytest.mark.parametrize("error", [RuntimeError("no ink"), OSError(errno.ENOSPC, "no room")])
def test_pictures_that_died_are_made_again(error, copied, monkeypatch):
    """Also where there are some, and also if they die again."""
    out = copied("nested")
    pictures = {path.name for path in (out / "figures").iterdir()}
    (out / "status.json").write_text(json.dumps({**status(out), "state": "failed", "message": "killed"}))
    for path in (out / "figures").iterdir():
        path.unlink()

    def broken(training, folder):
        with folder.guarded():
            raise error

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_draw", broken)
        with pytest.raises((RuntimeError, RunError), match="no ink|no room"):
            run(KINDS["nested"], SERIAL, out, "--resume=auto")
    assert status(out)["state"] == "failed" and str(error.args[-1]) in status(out)["message"]
    run(KINDS["nested"], SERIAL, out, "--resume=auto")
    assert status(out)["state"] == "finished"
    assert {path.name for path in (out / "figures").iterdir()} == pictures


@ALL
def test_a_finished_run_is_left_alone(name, copied):
    out = copied(name)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != "lock"}
    run(KINDS[name], SERIAL, out, "--resume=auto")
    changed = [path.name for path, content in before.items() if path.read_bytes() != content]
    assert set(changed) <= {"status.json", "log.txt"}


@ALL
def test_options_that_are_free(name, copied, tmp_path):
    """Where things are and how often it looks: none of it keeps a run from going on, in any kind."""
    module = program(KINDS[name].driver)
    free = {"out", "resume", "record_every", "checkpoint_every", "checkpoint_best", "keep", "tensorboard"}
    options = options_of(KINDS[name], tmp_path)
    assert free <= options.free
    fields = {field for field in vars(options) if field in ("data_dir", "validate_every", "device")}
    assert fields <= options.free, f"{module.__name__}: {fields - options.free} keep a run from going on"
    out = copied(name, keep=last(finished(name)) - 1)
    run(KINDS[name], SERIAL, out, "--resume=auto", "--keep=2", "--checkpoint_every=3", "--record_every=2")
    assert status(out)["state"] == "finished"


@ALL
def test_what_is_no_state_of_this_run_is_refused(name, copied, tmp_path):
    kind = KINDS[name]
    option = kind.other.lstrip("-").partition("=")[0]
    with pytest.raises(CheckpointError, match=f"was written with {option}=.*, but this run has {option}="):
        run(kind, SERIAL, copied(name), "--resume=auto", kind.other)
    ours = updates_of(finished(name))[0]["run"]
    other = next(each for each in KINDS if updates_of(finished(each))[0]["run"] != ours)
    path = sorted((finished(other) / "checkpoints").glob("update_*.h5"))[-1]
    with pytest.raises(CheckpointError, match=f"holds no state of a training run .*, not {ours}"):
        run(kind, SERIAL, tmp_path / "elsewhere" / kind.folder, f"--resume={path}")


@ALL
def test_a_checkpoint_says_what_it_is_of(name):
    out = finished(name)
    for _, path in numbered(out / "checkpoints"):
        with load(path) as checkpoint:
            meta = checkpoint.meta
        assert {"run", "update", "row", "state", "configuration", "recipe", "sizes"} <= meta.keys()
        assert meta["row"]["update"] == meta["update"]
        assert meta["run"] == updates_of(out)[0]["run"]


@ALL
def test_tensorboard_for_every_kind(name, tmp_path, monkeypatch):
    """A stand-in for TensorBoard's writer, which need not be installed here."""
    scalars = []

    class Writer:
        def __init__(self, folder, purge_step):
            assert purge_step == 0

        def add_text(self, *_):
            pass

        def add_scalar(self, tag, value, step):
            scalars.append((tag, value, step))

        def close(self):
            scalars.append("closed")

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    for module in (engine, progress):
        monkeypatch.setattr(module, "require_tensorboard", lambda: None)
    out = tmp_path / KINDS[name].folder
    run(KINDS[name], SERIAL, out, "--tensorboard")
    rows = updates_of(out)
    losses = [(f"{row['run']}/loss", row["loss"], row["update"]) for row in rows]
    assert [each for each in scalars if each[0] == losses[0][0]] == losses
    assert scalars[-1] == "closed"


def test_checkpoints_of_later_updates_are_set_aside(copied):
    out = copied("mgopt")
    folder = out / "checkpoints"
    (folder / file_name(9)).with_suffix(".h5.tmp").write_bytes(b"half")
    run(KINDS["mgopt"], SERIAL, out, f"--resume={folder / file_name(2)}")
    same_end(out, finished("mgopt"))
    aside = out / "earlier-1" / "checkpoints"
    assert sorted(path.name for path in aside.iterdir()) == [file_name(number) for number in (3, 4, 5, 6)]
    assert not list(folder.glob("*.tmp"))


@pytest.mark.ranks(2, 3)
def test_ranks_that_see_different_checkpoints_end_together(copied, spmd):
    own = copied("mgopt")
    out = spmd(lambda comm: own)[0]

    def body(comm):
        path = out / "checkpoints" / file_name(5 if comm.rank else 4)
        return refusal(RunError, run, KINDS["mgopt"], comm, out, f"--resume={path}")

    (said,) = set(spmd(body))
    assert said.startswith("resume=(4, ") and "the checkpoints have changed meanwhile, or not all ranks can" in said


def test_rows_in_memory_are_those_of_the_record():
    """Studies train without a folder: `rows_of` is the same loop."""
    kind = KINDS["mgopt"]
    options = replace(options_of(kind, finished("mgopt")), resume=None)
    rows = list(engine.rows_of(training_of(options, SERIAL)))
    assert [row["loss"] for row in rows] == [row["loss"] for row in updates_of(finished("mgopt"))]
