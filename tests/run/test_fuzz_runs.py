"""Whatever is in the folder of a run, it is read, or refused by the documented errors: records, states, checkpoints."""

from __future__ import annotations

import contextlib
import io
import json
from functools import cache
from types import SimpleNamespace

import kinds
import pytest
import torch
from fuzz_inputs import JSON, also, fuzzed, near, only, working_folder
from hypothesis import given
from hypothesis import strategies as st
from kinds import KINDS, finished
from runs_on_disk import make_run

from xbraid_py.cli import main
from xbraid_py.cli.reader import NoRun, read_run
from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.run import engine
from xbraid_py.run import record as metrics
from xbraid_py.run.engine import resumed_configuration
from xbraid_py.run.folder import take
from xbraid_py.run.run_options import RunOptions
from xbraid_py.run.signals import mark_ended
from xbraid_py.run.store.read import CheckpointError, file_name, load, newest_good, numbered, verify
from xbraid_py.run.store.write import Shard, save

COMM = SerialCommunicator()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of these tests."""
    yield from working_folder(tmp_path_factory)


RECORD = "\n".join(
    json.dumps(row)
    for row in (
        {"kind": "header", "configuration": {"seed": 0}, "ranks": 2, "date": "2020-01-01T00:00:00+00:00"},
        {"kind": "update", "run": "nested", "update": 0, "objective": 1.5, "seconds": 0.1, "final": False},
        {"kind": "resume", "ranks": 3},
        {"kind": "update", "run": "nested", "update": 1, "objective": 0.5, "stacks": [{"residual": 0.1}]},
    )
)
RECORD += "\n"
STATUS = (
    '{"state": "running", "update": 3, "total": 9, "objective": 0.5, "accuracy": null, "seconds_left": 1.5, '
    '"started": "2020-01-01T00:00:00+00:00", "updated": "2020-01-01T00:00:00+00:00", "ranks": 2, "pid": 1, '
    '"message": ""}'
)


@pytest.fixture(scope="module")
def run(folder):
    """The folder of a run."""
    return make_run(folder / "run")


@fuzzed(0.05)
@given(
    status=near(STATUS),
    record=near(RECORD),
    configuration=near("seed: 0\nmgrit: {cycle: V}\n"),
    broken=st.integers(0, 2),
)
def test_folders_of_runs(run, status, record, configuration, broken):
    contents = {"status.json": STATUS.encode(), "metrics.jsonl": RECORD.encode(), "config.yaml": b"seed: 0\n"}
    name = list(contents)[broken]
    contents[name] = (status, record, configuration)[broken]
    for name, content in contents.items():
        (run / name).write_bytes(content)
    with only(NoRun):
        read_run(run)
    with also(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        assert main(["status", str(run)]) in (0, 1, 2, 3, 4)


@fuzzed(0.09)
@given(record=near(RECORD), status=near(STATUS), update=st.integers(0, 3))
def test_records_and_states(run, record, status, update):
    (run / "metrics.jsonl").write_bytes(record)
    with only(ValueError):
        metrics.read(run / "metrics.jsonl")
    with also(ValueError):
        metrics.truncate_after(run / "metrics.jsonl", update, "nested")
    (run / "status.json").write_bytes(status)
    with also():
        mark_ended(run, "failed", "it")


@fuzzed(0.03)
@given(said=near('{"pid": 17, "since": "2020"}'))
def test_locks(folder, said):
    """Whatever the other job has written, it is said that there is one."""
    held = take(folder / "locked")
    (folder / "locked" / "lock").write_bytes(said)
    with only(), pytest.raises(ValueError, match="is in use by another job"):
        take(folder / "locked")
    held.release()


def small_checkpoint(folder):
    arrays = {"a/b": torch.arange(6.0).reshape(3, 2), "c": torch.tensor([True, False]), "d": torch.zeros(0, 3)}
    path = folder / "small" / file_name(1)
    save(path, COMM, {name: Shard(rows, 0, len(rows)) for name, rows in arrays.items()}, {"update": 1, "of": [0.5]})
    return path, arrays


@pytest.fixture(scope="module")
def small(folder):
    """Bytes of a small checkpoint, and what it holds."""
    path, arrays = small_checkpoint(folder)
    return path.read_bytes(), arrays


@fuzzed(0.12)
@given(data=st.data())
def test_checkpoints(folder, small, data):
    content, arrays = small
    path = folder / "small" / file_name(2)
    path.write_bytes(data.draw(near(content)))
    with only(CheckpointError):
        verify(path)
        with load(path) as checkpoint:
            assert checkpoint.meta == {"update": 1, "of": [0.5]} and checkpoint.names() == tuple(sorted(arrays))
            assert all(torch.equal(checkpoint.rows(name), rows) for name, rows in arrays.items())
    newest_good(folder / "small")


class Loaded(Exception):
    """Raised in place of the first update of a run that goes on."""


def go_on(folder, name):
    """Set up the run of a kind, read the checkpoint in its folder, and stop there."""

    def read(*_):
        raise Loaded

    with pytest.MonkeyPatch.context() as patch:
        for function in ("_follow", "_finished"):
            patch.setattr(engine, function, read)
        patch.setattr(engine, "_make_room", lambda *_: None)
        patch.setattr(
            engine, "claim", lambda out, comm: SimpleNamespace(comm=comm, path=out, checkpoints=out / "checkpoints")
        )
        kinds.run(KINDS[name], COMM, folder / name / KINDS[name].folder, "--resume=auto")


@cache
def content_of(name):
    """The arrays and the meta data of a checkpoint of a kind of run, before its last one."""
    path = numbered(finished(name) / "checkpoints")[1][1]
    with load(path) as checkpoint:
        return {key: checkpoint.rows(key) for key in checkpoint.names()}, checkpoint.meta


def put(folder, name, arrays, meta):
    """Make them the only checkpoint of the run of a kind."""
    path = folder / name / KINDS[name].folder / "checkpoints" / file_name(2)
    save(path, COMM, {key: Shard(rows, 0, len(rows)) for key, rows in arrays.items()}, meta)
    return path


@pytest.mark.parametrize("name", KINDS)
@fuzzed(0.02)
@given(data=st.data())
def test_checkpoints_that_hold_something_else(folder, name, data):
    """Files that are sound, checksums included, but whose content is not that of a run, or only nearly."""
    arrays, meta = content_of(name)
    arrays, meta = dict(arrays), json.loads(json.dumps(meta))
    _change(data, meta)
    if data.draw(st.booleans()):
        _change_arrays(data, arrays)
    path = put(folder, name, arrays, meta)
    with only(CheckpointError, RunError, Loaded):
        go_on(folder, name)
    with also(CheckpointError):
        options = RunOptions(out=path.parents[1], resume="auto")
        assert isinstance(resumed_configuration(options), dict)


def _change(data, meta: dict) -> None:
    """Something else under one of the names, or nothing."""
    place = meta
    while True:
        name = data.draw(st.sampled_from(sorted(place)))
        if isinstance(place[name], dict) and place[name] and data.draw(st.integers(0, 3)):
            place = place[name]
            continue
        if data.draw(st.integers(0, 3)) == 0:
            del place[name]
        else:
            place[name] = data.draw(JSON)
        return


def _change_arrays(data, arrays: dict) -> None:
    name = data.draw(st.sampled_from(sorted(arrays)))
    rows = arrays.pop(name)
    changes = {
        "gone": lambda: None,
        "renamed": lambda: rows,
        "shorter": lambda: rows[:-1],
        "narrower": lambda: rows[..., :-1] if rows.dim() > 1 else rows[:1],
        "flat": lambda: rows.reshape(-1),
        "deeper": lambda: rows[..., None],
        "integers": lambda: rows.to(torch.int64),
        "other": lambda: rows.to(torch.float32),
    }
    kind = data.draw(st.sampled_from(sorted(changes)))
    new = changes[kind]()
    if new is not None:
        extra = st.sampled_from(
            ("weights/x", "warm/state_9", "warm/state_x", "warm/x", "optimizer/s/x.y", "gradient/x")
        )
        if kind == "renamed":
            name = data.draw(extra)
            if name.split("/")[0] in arrays:  # nothing can be below an array
                name = name.replace("/", "_")
        arrays[name] = new


@pytest.mark.parametrize("name", KINDS)
def test_good_checkpoints_are_read(folder, name):
    """What the inputs are changed from is not refused itself."""
    put(folder, name, *content_of(name))
    with pytest.raises(Loaded):
        go_on(folder, name)


def test_good_records_are_read(run):
    (run / "metrics.jsonl").write_text(RECORD)
    assert len(metrics.read(run / "metrics.jsonl")) == 4
