"""A job that is stopped and goes on, each time on another number of ranks, is the uninterrupted one."""

import json

import pytest
from processes import PROJECT, finish_job, start_job

from xbraid_py.run.record import read
from xbraid_py.run.store.read import file_name

DRIVER = PROJECT / "drivers" / "peaks.py"
TINY = [
    *("--num_layers=16", "--num_train=50", "--num_val=40", "--network.width=3"),
    *("--mgrit.min_coarse=2", "--mgrit.intervals=4", "--nested.refinements=1", "--nested.updates=4,6"),
    *("--optim.boost_updates=1", "--checkpoint_every=2", "--validate_every=2"),
]
# Makes a run stop as a signal does, once it has come to an update.
STOPPING = """
import os, runpy, signal, sys
from xbraid_py.run.folder import RunFolder

at, driver = int(sys.argv[1]), sys.argv[2]
update = RunFolder.update

def stopping(self, number, *others):
    if number == at and self.comm.rank == self.comm.size - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return update(self, number, *others)

RunFolder.update = stopping
sys.argv = sys.argv[2:]
runpy.run_path(driver, run_name="__main__")
"""


def rows_of(out):
    rows = read(out / "metrics.jsonl")
    return [{key: row[key] for key in row if key != "seconds"} for row in rows if row["kind"] == "update"]


@pytest.mark.job
@pytest.mark.long
@pytest.mark.timeout(300)
def test_over_mpi_from_stop_to_stop(tmp_path):
    """On 1, 2, 5 and 3 ranks, stopped by a signal between them; then the run that is over ends at once."""

    def start(out, ranks, at, *more):
        words = ["-c", STOPPING, at, DRIVER, *TINY, f"--out={out}", *more]
        return finish_job(start_job(words, ranks=ranks), timeout=100)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole, 1, -1).returncode == 0
    for ranks, at in ((1, 1), (2, 3), (5, 7)):
        job = start(parts, ranks, at, "--resume=auto")
        assert job.returncode == 75, job.stderr
        path = parts / "checkpoints" / file_name(at)
        assert job.stderr == f"stopped by SIGUSR1 after update {at}; --resume auto goes on from {path}\n"
        status = json.loads((parts / "status.json").read_text())
        assert (status["state"], status["update"], status["ranks"]) == ("stopped", at, ranks)
    last = start(parts, 3, -1, "--resume=auto")
    assert last.returncode == 0 and len(rows_of(parts)) == len(rows_of(whole)) == 11
    for row, expected in zip(rows_of(parts), rows_of(whole), strict=True):
        assert list(row) == list(expected)
        for name, value in expected.items():
            is_float = isinstance(value, float)
            assert row[name] == (pytest.approx(value, rel=1e-9, abs=1e-14) if is_float else value), name
    assert sorted(path.name for path in (parts / "checkpoints").iterdir()) == [
        "best.h5",
        *(file_name(update) for update in (7, 8, 10)),
    ]
    before = (parts / "metrics.jsonl").read_bytes()
    again = start(parts, 2, -1, "--resume=auto")
    said, accuracy = again.stdout.splitlines()
    assert (again.returncode, said) == (0, f"the run in {parts} is finished; to train again, start without --resume")
    assert accuracy == last.stdout.splitlines()[-1] and (parts / "metrics.jsonl").read_bytes() == before
