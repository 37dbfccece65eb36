"""The record: whole lines, plain JSON, written by rank 0 alone, and without double rows after a resumption."""

import errno
import json
import math
import os
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run import record as metrics
from xbraid_py.run.record import MetricsWriter, RecordReader, read, truncate_after

CONFIGURATION = {"num_layers": 16, "out": Path("runs/a"), "cfactor": (4, 2), "tol": math.inf}


def write_rows(path, updates, append=False, run="nested"):
    with MetricsWriter(path, SerialCommunicator(), CONFIGURATION, append=append) as record:
        for update in updates:
            record.write({"run": run, "update": update, "objective": 1 / (update + 1)})


def updates_in(path, run="nested") -> list[int]:
    return [row["update"] for row in read(path) if row.get("run") == run]


class Silent(SerialCommunicator):
    """A rank other than the first that must not send anything."""

    rank = 1
    size = 2

    def bcast(self, value, root=0):
        raise AssertionError("a message")

    gather = allgather = isend = recv = barrier = bcast


def test_rank_0_writes_a_header_and_rows(spmd, shared_tmp_path):
    path = shared_tmp_path / "new" / "metrics.jsonl"

    def body(comm):
        with MetricsWriter(path, comm, CONFIGURATION, mpi_library="MPICH 5") as record:
            record.write({"update": 0, "rank": comm.rank})
            record.write({"update": 1, "rank": comm.rank})
        comm.barrier()
        return comm.size, read(path)

    for size, (header, *rows) in spmd(body):
        assert header["kind"] == "header" and header["ranks"] == size
        assert header["configuration"] == {"num_layers": 16, "out": "runs/a", "cfactor": [4, 2], "tol": None}
        assert header["versions"]["torch"] == torch.__version__ and header["host"]["mpi"] == "MPICH 5"
        assert header["host"]["cpus"] == os.cpu_count() and header["date"].endswith("+00:00")
        assert rows == [{"update": 0, "rank": 0}, {"update": 1, "rank": 0}]


def test_other_ranks_touch_nothing(tmp_path):
    with MetricsWriter(tmp_path / "folder" / "metrics.jsonl", Silent(), {}) as record:
        record.write({"update": 0})
    assert list(tmp_path.iterdir()) == []


def test_each_line_is_there_at_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path, SerialCommunicator(), {}) as record:
        for update in range(5):
            record.write({"update": update})
            assert path.read_bytes().endswith(b'{"update": %d}\n' % update)


def test_numbers(tmp_path):
    path = tmp_path / "metrics.jsonl"
    exact = 0.1 + 0.2
    row = {
        "exact": exact,
        "nan": math.nan,
        "inf": np.float64(-math.inf),
        "numpy": np.float64(exact),
        "tensor": torch.tensor(exact, dtype=torch.float64),
        "list": torch.tensor([1.0, math.nan]),
        "count": np.int64(2**60),
        "flag": np.bool_(True),
        "none": None,
        "text": "ε\n",
    }
    with MetricsWriter(path, SerialCommunicator(), {}) as record:
        record.write(row)
    plain = {"nan": None, "inf": None, "numpy": exact, "tensor": exact, "list": [1.0, None], "flag": True}
    assert read(path)[1] == {**row, **plain, "count": 2**60}
    # Strict JSON: no reader trips over a bare NaN.
    lines = path.read_text().splitlines()
    assert len(lines) == 2 and all(json.loads(line, parse_constant=pytest.fail) for line in lines)


def test_wrong_use(tmp_path):
    record = MetricsWriter(tmp_path / "metrics.jsonl", SerialCommunicator(), {})
    assert not record.path.exists()
    with pytest.raises(ValueError, match="is not open; write inside"):
        record.write({"update": 0})
    with record, pytest.raises(TypeError):
        record.write({"update": object()})
    assert len(read(record.path)) == 1


def test_a_new_record_replaces_an_old_one(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(9))
    write_rows(path, range(2))
    assert updates_in(path) == [0, 1]


def test_append(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(2), append=True)
    write_rows(path, range(2, 4), append=True)
    assert [row.get("kind") for row in read(path)] == ["header", None, None, "resume", None, None]
    assert updates_in(path) == [0, 1, 2, 3]


@pytest.mark.parametrize("update", [0, 3, 7, 8])
def test_a_resumed_run_leaves_no_double_rows(tmp_path, update):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(8))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"run": "nested", "upda')
    assert truncate_after(path, update) == 8 - update
    assert whole.startswith(path.read_bytes())
    write_rows(path, range(update, 8), append=True)
    assert updates_in(path) == list(range(8))
    assert list(tmp_path.iterdir()) == [path]


def test_other_runs_keep_their_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(8))
    write_rows(path, range(8), append=True, run="non_nested")
    assert truncate_after(path, 5, run="non_nested") == 3
    assert updates_in(path) == list(range(8)) and updates_in(path, "non_nested") == list(range(5))


def test_cut_anywhere_the_record_goes_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(4))
    content = path.read_bytes()
    for size in range(len(content)):
        path.write_bytes(content[:size])
        truncate_after(path, 2)
        done = updates_in(path)
        write_rows(path, range(len(done), 4), append=True)
        assert updates_in(path) == [0, 1, 2, 3] and read(path)[0]["kind"] == "header"


def test_no_record(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert truncate_after(path, 3) == 0 and not path.exists()
    path.write_text("x y\n0 1\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 1 is no JSON object"):
        truncate_after(path, 3)
    path.write_text('{"update": 3}\n')
    with pytest.raises(ValueError, match="the first line is no header"):
        read(path)
    path.write_text('{"kind": "header"}\n{"update": 3}\n7\n{"update": 4}\n')
    with pytest.raises(ValueError, match="line 3 is no JSON object"):
        truncate_after(path, 3)
    assert path.read_text().count("\n") == 4


def test_a_failed_replacement_leaves_the_record(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, range(8))
    content = path.read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        truncate_after(path, 3)
    assert path.read_bytes() == content and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with MetricsWriter(path, SerialCommunicator(), {}) as record:
        resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, before[1]))
        try:
            with pytest.raises(OSError, match="not written: No space left"):
                record.write({"update": 0, "objective": 0.123456789})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert len(read(path)) == 1


_KILLED = """
import os, signal, sys
from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.record import RecordReader, MetricsWriter
with MetricsWriter(sys.argv[1], SerialCommunicator(), {}) as record:
    for update in range(3):
        record.write({"run": "nested", "update": update})
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_run_leaves_its_rows(tmp_path, run_job):
    path = tmp_path / "metrics.jsonl"
    assert run_job(["-c", _KILLED, path]).returncode == -signal.SIGKILL
    assert updates_in(path) == [0, 1, 2]


def test_a_record_that_grows_is_read_on(tmp_path):
    """`RecordReader` takes in what is new, leaves a line that breaks off, and begins anew with another file."""
    path = tmp_path / "metrics.jsonl"
    reader = RecordReader(path)
    with pytest.raises(FileNotFoundError):
        reader.read()
    path.write_text('{"kind": "header", "ranks": 2}\n{"kind": "update", "run": "a", "update": 3, "loss": 0.5}\n{"kind"')
    reader.read()
    assert reader.header["ranks"] == 2 and len(reader.rows) == 1 and not reader.damaged
    with path.open("a") as file:
        file.write(': "update", "run": "a", "update": 4, "loss": 0.25}\n[1]\n{"kind": "resume", "ranks": 3}\n')
    reader.read()
    assert reader.columns["loss"] == {"a": {3: 0.5, 4: 0.25}}
    assert reader.damaged == [4] and reader.resumes[0]["ranks"] == 3
    reader.read()
    assert len(reader.rows) == 2
    other = tmp_path / "other"
    other.write_text('{"kind": "header", "ranks": 1}\n')
    other.replace(path)
    reader.read()
    assert reader.header["ranks"] == 1 and not reader.rows and not reader.damaged
