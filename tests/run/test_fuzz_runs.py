"""Whatever is in the folder of a run, it is read, or refused by the documented errors: records, states, checkpoints."""

from __future__ import annotations

import contextlib
import io
import json

import pytest
import torch
from fuzz_inputs import JSON, also, fuzzed, near, only, working_folder
from hypothesis import given
from hypothesis import strategies as st
from runs_on_disk import make_run
from small_runs import nested

from xbraid_py.cli import main
from xbraid_py.cli.reader import NoRun, read_run
from xbraid_py.comm import SerialCommunicator
from xbraid_py.multilevel.depth.nested_state import save_run
from xbraid_py.run import record as metrics
from xbraid_py.run.lock import take
from xbraid_py.recipes.old_resume import read_resumed, resumed_configuration
from xbraid_py.run.status import mark_ended
from xbraid_py.run.store.write import CheckpointError, Shard, file_name, load, newest_good, save, verify

COMM = SerialCommunicator()
FREE = ("out",)


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


@pytest.fixture(scope="module")
def trained(folder):
    """A run, its checkpoint's arrays, and its meta data."""
    run = nested(COMM, (2, 1), num_layers=16)
    for record in run.run():
        if record.update == 1:
            path = save_run(folder / "trained", run, 1, "nested", {"seed": 0})
            break
    with load(path) as checkpoint:
        return run, {name: checkpoint.rows(name) for name in checkpoint.names()}, checkpoint.meta


@fuzzed(0.06)
@given(data=st.data())
def test_checkpoints_that_hold_something_else(folder, trained, data):
    """Files that are sound, checksums included, but whose content is not that of a run, or only nearly."""
    run, arrays, meta = trained
    arrays, meta = dict(arrays), json.loads(json.dumps(meta))
    _change(data, meta)
    if data.draw(st.booleans()):
        _change_arrays(data, arrays)
    path = folder / "trained" / file_name(2)
    save(path, COMM, {name: Shard(rows, 0, len(rows)) for name, rows in arrays.items()}, meta)
    with only(CheckpointError):
        found = read_resumed(str(path), folder, {"nested": run}, {"seed": 0}, FREE)
        assert set(found) == {"nested"} and len(found["nested"].vectors["weights"]) == 1
    with also(CheckpointError):
        assert isinstance(resumed_configuration(str(path), folder), dict | None)


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
        arrays[data.draw(extra) if kind == "renamed" else name] = new


def test_good_runs_are_read(folder, trained, run):
    """What the inputs are changed from is not refused itself."""
    state, arrays, meta = trained
    path = folder / "trained" / file_name(3)
    save(path, COMM, {name: Shard(rows, 0, len(rows)) for name, rows in arrays.items()}, meta)
    assert "nested" in read_resumed(str(path), folder, {"nested": state}, {"seed": 0}, FREE)
    (run / "metrics.jsonl").write_text(RECORD)
    assert len(metrics.read(run / "metrics.jsonl")) == 4
