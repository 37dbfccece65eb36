"""The status of a run, and its last words."""

from __future__ import annotations

import json

import pytest

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run import signals as run_status
from xbraid_py.run.folder import claim, last_words
from xbraid_py.run.signals import RunStatus, mark_ended


def status(path) -> dict:
    return json.loads((path / "status.json").read_text())


def test_the_status_is_written_once_a_second(tmp_path, monkeypatch):
    now = [0.0]
    written = []
    monkeypatch.setattr(run_status.time, "monotonic", lambda: now[0])
    replace = run_status._replace
    monkeypatch.setattr(run_status, "_replace", lambda path, fields: (written.append(now[0]), replace(path, fields)))
    report = RunStatus(tmp_path, 2, 100)
    report.change("starting")
    for number in range(1, 41):
        now[0] += 0.125
        report.update(number, objective=float("nan") if number == 40 else 1.0)
    assert written == [0.0, 0.125, 1.125, 2.125, 3.125, 4.125]
    report.change("stopped", "enough")
    found = status(tmp_path)
    assert (found["state"], found["message"], found["update"], found["objective"]) == ("stopped", "enough", 40, None)


def test_the_time_left(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_status.time, "monotonic", lambda: now[0])
    report = RunStatus(tmp_path, 1, 100, done=10)
    report.update(10)
    assert status(tmp_path)["seconds_left"] is None
    for number in range(11, 21):
        now[0] += 2.0
        report.update(number)
    assert status(tmp_path)["seconds_left"] == pytest.approx(160.0)
    # Of the last updates: they may be slower, or faster, than the first ones.
    for number in range(21, 91):
        now[0] += 4.0
        report.update(number)
    assert status(tmp_path)["seconds_left"] == pytest.approx(40.0)
    unknown = RunStatus(tmp_path, 1, None)
    unknown.update(1)
    now[0] += 2.0
    unknown.update(2)
    assert status(tmp_path)["seconds_left"] is None and status(tmp_path)["total"] is None


def test_a_status_that_cannot_be_written_is_one_warning(tmp_path, caplog):
    report = RunStatus(tmp_path / "missing", 1, 10)
    for state in ("starting", "running", "finished"):
        report.change(state)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    with pytest.raises(ValueError, match="state='done' must be one of starting, running"):
        report.change("done")


def test_the_last_words_of_any_rank(tmp_path):
    folder = claim(tmp_path, SerialCommunicator())
    with folder.open({"num_layers": 8}):
        folder.update(5)
        last_words("rank 2: the end")
        found = status(tmp_path)
        assert (found["state"], found["message"], found["update"]) == ("failed", "rank 2: the end", 5)
    assert status(tmp_path)["state"] == "finished"
    last_words("too late")
    mark_ended(tmp_path, "failed", "too late")
    assert status(tmp_path)["state"] == "finished"
    for content in ("", "{", "[]"):
        (tmp_path / "status.json").write_text(content)
        mark_ended(tmp_path, "failed", "x")
        assert (tmp_path / "status.json").read_text() == content
    mark_ended(tmp_path / "missing", "failed", "x")
