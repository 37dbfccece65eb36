"""Event files for TensorBoard: what is in them, read back by TensorBoard itself."""

import importlib.util
import json

import pytest
from runs_on_disk import minibatch_rows, nested_rows, write_record

from xbraid_py.run import progress
from xbraid_py.run.progress import EventWriter, write_events
from xbraid_py.run.record import number, scalars


@pytest.fixture
def accumulated():
    """Reads a folder of event files: {name: [(step, value)]}."""
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'xbraid_py[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(folder):
        events = EventAccumulator(str(folder))
        events.Reload()
        tags = events.Tags()
        return {name: [(e.step, e.value) for e in events.Scalars(name)] for name in tags["scalars"]}, tags["tensors"]

    return read


def test_numbers_of_a_row():
    row = {"kind": "update", "run": "nested", "update": 3, "a": 1, "b": None, "c": True, "d": float("nan"), "e": "1"}
    row |= {"stacks": [{"r": 0.5, "event": None}, 7], "pair": [1, 2], "group": {"x": 1.5, "update": 2}, "big": 10**400}
    assert scalars(row) == {"a": 1.0, "stacks.0.r": 0.5, "group.x": 1.5, "group.update": 2.0}
    assert [number(x) for x in (2, 0.5, True, "2", None, float("inf"), 10**400)] == [2.0, 0.5, *[None] * 5]


def test_a_record_becomes_event_files(tmp_path, accumulated):
    header = {"kind": "header", "configuration": {"seed": 0}}
    write_record(tmp_path, [header, *nested_rows(5), {"kind": "resume"}])
    assert write_events(tmp_path / "metrics.jsonl", tmp_path / "events") == 5
    found, texts = accumulated(tmp_path / "events")
    assert found["nested/objective"] == [(n, pytest.approx(2 / (n + 1))) for n in range(5)]
    assert [step for step, _ in found["nested/val_accuracy"]] == [0, 2, 4]
    assert any(name.startswith("configuration") for name in texts)


def test_rows_without_a_file(tmp_path, accumulated):
    write_events(minibatch_rows(8), tmp_path)
    found, _ = accumulated(tmp_path)
    assert found["val_accuracy"] == [(4, pytest.approx(0.04)), (8, pytest.approx(0.08))]
    assert found["stacks.1.gradient_error"][-1] == (8, pytest.approx(0.08))


def test_a_resumed_run_replaces_what_it_repeats(tmp_path, accumulated):
    with EventWriter(tmp_path) as events:
        for n in range(6):
            events.write({"update": n, "loss": 1.0})
    with EventWriter(tmp_path, resumed_at=3) as events:
        for n in range(3, 8):
            events.write({"update": n, "loss": 2.0})
    found, _ = accumulated(tmp_path)
    assert found["loss"] == [(n, 1.0 if n < 3 else 2.0) for n in range(8)]


@pytest.mark.ranks(1, 3)
def test_only_rank_0_writes(spmd, shared_tmp_path, accumulated):
    def body(comm):
        with EventWriter(shared_tmp_path / "events", comm, {"seed": 1}) as events:
            events.write({"update": 1, "loss": float(comm.rank)})
        comm.barrier()
        return True

    assert all(spmd(body))
    assert len(list((shared_tmp_path / "events").iterdir())) == 1
    assert accumulated(shared_tmp_path / "events")[0]["loss"] == [(1, 0.0)]


def test_rows_are_written_inside_with(tmp_path, accumulated):
    with pytest.raises(ValueError, match="write inside `with EventWriter"):
        EventWriter(tmp_path).write({"loss": 1.0})


def test_without_tensorboard_the_error_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for attempt in (lambda: EventWriter(tmp_path), lambda: write_events([], tmp_path), progress.require_tensorboard):
        with pytest.raises(ValueError, match=r"pip install 'xbraid_py\[tensorboard\]'"):
            attempt()


def test_a_damaged_record_is_an_error(tmp_path, accumulated):
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"kind": "update"}) + "\n")
    with pytest.raises(ValueError, match="header"):
        write_events(tmp_path / "metrics.jsonl", tmp_path / "events")
