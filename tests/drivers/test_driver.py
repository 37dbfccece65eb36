"""A driver, that of peaks, from the outside: what a job leaves, how bad input ends it, and how killed jobs go on."""

import importlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from bad_input import BAD
from processes import PROJECT, end_job, finish_job, run_job, start_job

from xbraid_py.run.options import parse, to_dict
from xbraid_py.run.record import read
from xbraid_py.run.store.read import newest_good

# The jobs of all tests are started by the first one.
pytestmark = [pytest.mark.job, pytest.mark.timeout(400)]

DRIVER = PROJECT / "drivers" / "peaks.py"
TINY = [
    *("--num_layers=16", "--num_train=50", "--num_val=40", "--network.width=3"),
    *("--mgrit.min_coarse=2", "--mgrit.intervals=4"),  # 16 layers by the lagged cycle, 8 one after the other
    *("--nested.refinements=1", "--nested.updates=4,16", "--optim.boost_updates=1"),
    *("--checkpoint_every=1", "--keep=99", "--validate_every=2"),
]
KILLED_AT = 6
# By an option, in the set-up, and during the run; the messages themselves are tested without jobs.
CHOSEN = ("option", "depth", "nan")
FEW_LAYERS = ["--num_layers=2", "--nested.refinements=0", "--nested.updates=1", "--mgrit.max_levels=1"]


def updates_of(out: Path) -> list[dict]:
    """The rows of a record, without the clock."""
    rows = read(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    return [{key: row[key] for key in row if key != "seconds"} for row in rows if row["kind"] == "update"]


def agree(found: list[dict], expected: list[dict]) -> bool:
    """Whether rows are the same, numbers to 1e-9."""

    def same(a, b):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-14) if isinstance(b, float) else a == b

    pairs = zip(found, expected, strict=True)
    return len(found) == len(expected) and all(
        list(row) == list(other) and all(same(row[key], other[key]) for key in row) for row, other in pairs
    )


def ranks_of(job: subprocess.Popen) -> list[int]:
    """Processes of the ranks of a job started by mpirun: its descendants that run this python."""
    parents, found = {}, []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            words = path.read_text().rsplit(")", 1)[1].split()
            command = path.with_name("cmdline").read_bytes().split(b"\0")[0]
        except OSError:  # it has just ended
            continue
        parents[int(path.parent.name)] = int(words[1])
        if command == sys.executable.encode():
            found.append(int(path.parent.name))

    def is_descendant(pid):
        while pid in parents and pid != job.pid:
            pid = parents[pid]
        return pid == job.pid

    return sorted(pid for pid in found if is_descendant(pid))


def kill_one_rank(out: Path, at: int, which: int) -> subprocess.CompletedProcess:
    """A run on 3 ranks of which one is killed once update `at` is recorded."""
    job = start_job([DRIVER, *TINY, f"--out={out}"], ranks=3, fresh=True)
    try:
        for _ in range(20_000):
            if job.poll() is not None or any(row["update"] >= at for row in updates_of(out)):
                break
            time.sleep(0.005)
        ranks = ranks_of(job)
        assert len(ranks) == 3, f"no 3 ranks but {ranks}: {end_job(job)}"
        os.kill(ranks[which], signal.SIGKILL)
        return finish_job(job, timeout=10)
    finally:
        if job.poll() is None:
            end_job(job)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a run that was killed, and of those of `jobs`."""
    return tmp_path_factory.mktemp("driver")


@pytest.fixture(scope="module")
def jobs(folder):
    """All jobs by their names, which are those of their folders too."""
    found = {"killed": kill_one_rank(folder / "killed", KILLED_AT, -1)}

    def run(name, size, *words):
        out = f"--out={folder}/{name}_{size}"
        found[f"{name}_{size}"] = run_job([DRIVER, *words, out], size)

    run("full", 1, *TINY)
    run("few", 3, *TINY, *FEW_LAYERS)
    for size in (1, 3):
        shutil.copytree(folder / "killed", folder / f"after_{size}")
        run("after", size, *TINY, "--resume=auto")
        run("smoke", size, "--smoke")
    for name in CHOSEN:
        run(name, 3, *TINY, BAD[name][0])
    return found


@pytest.mark.parametrize("size", [1, 3])
def test_a_smoke_run_leaves_record_checkpoints_and_pictures(folder, jobs, size):
    job, left = jobs[f"smoke_{size}"], folder / f"smoke_{size}"
    assert (job.returncode, job.stderr) == (0, "")
    rows = updates_of(left)
    assert [row["update"] for row in rows] == list(range(21))
    assert {row["num_layers"] for row in rows} == {16, 32} and rows[-1]["final"]
    assert job.stdout.splitlines()[-1] == f"final validation accuracy: {100 * rows[-1]['val_accuracy']:.2f} %"
    assert rows[-1]["val_accuracy"] > 0.4  # it has learned something: by chance it is 0.2
    for path in (
        "checkpoints/update_000020.h5",
        *(f"figures/{name}.png" for name in ("accuracy", "classes", "convergence")),
    ):
        assert (left / path).stat().st_size > 1000
    assert (left / "figures" / "classes.png").read_bytes().startswith(b"\x89PNG")
    header = read(left / "metrics.jsonl")[0]
    assert header["ranks"] == size and header["configuration"]["num_layers"] == 32


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.usefixtures("jobs")
def test_a_run_leaves_its_configuration_log_and_status(folder, monkeypatch, size):
    left = folder / f"smoke_{size}"
    configuration = yaml.safe_load((left / "config.yaml").read_text())
    assert configuration == read(left / "metrics.jsonl")[0]["configuration"]
    monkeypatch.syspath_prepend(DRIVER.parent)
    options = parse(importlib.import_module("peaks").Options, [f"--config={left / 'config.yaml'}"])
    assert to_dict(options) == configuration
    assert (left / "log.txt").read_text().splitlines()[-1].endswith("finished")
    status = json.loads((left / "status.json").read_text())
    last = updates_of(left)[-1]
    assert (status["state"], status["update"], status["total"], status["ranks"]) == ("finished", 20, 20, size)
    assert (status["objective"], status["accuracy"]) == (last["objective"], last["val_accuracy"])


@pytest.mark.usefixtures("jobs")
def test_a_smoke_run_is_the_same_on_3_ranks(folder):
    assert agree(updates_of(folder / "smoke_3"), updates_of(folder / "smoke_1"))


@pytest.mark.parametrize("name", CHOSEN)
def test_bad_input_is_one_message_of_all_ranks(folder, jobs, name):
    _, status, message = BAD[name]
    job = jobs[f"{name}_3"]
    assert (job.returncode, job.stdout) == (status, "")
    said = job.stderr.splitlines()
    assert said[0] == f"error: {message}" and said[1:] in ([], ["try peaks.py --help"])
    assert not (folder / f"{name}_3" / "figures").exists()


def test_more_ranks_than_layers(jobs):
    job = jobs["few_3"]
    message = "error: 3 ranks are more than num_layers=2; use at most 2 ranks\n"
    assert (job.returncode, job.stdout, job.stderr) == (2, "", message)


def test_a_killed_rank_ends_the_job_and_leaves_a_good_checkpoint(folder, jobs):
    assert jobs["killed"].returncode != 0
    rows = updates_of(folder / "killed")
    assert KILLED_AT <= rows[-1]["update"] < 20 and not rows[-1]["final"]
    newest = newest_good(folder / "killed" / "checkpoints")
    # An update is recorded before its checkpoint is written.
    assert int(newest.stem.split("_")[1]) in (rows[-1]["update"], rows[-1]["update"] - 1)
    status = json.loads((folder / "killed" / "status.json").read_text())
    assert status["state"] in ("starting", "running") and status["total"] == 20


@pytest.mark.parametrize("size", [1, 3])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(folder, jobs, size):
    job, left = jobs[f"after_{size}"], folder / f"after_{size}"
    rows = updates_of(left)
    assert job.returncode == 0 and [row["update"] for row in rows] == list(range(21))
    assert agree(rows, updates_of(folder / "full_1"))
    assert job.stdout.splitlines()[-1] == jobs["full_1"].stdout.splitlines()[-1]
    kinds = [row["kind"] for row in read(left / "metrics.jsonl")]
    assert kinds.count("resume") == 1 and kinds.count("header") == 1
    assert (left / "figures" / "accuracy.png").exists()
    assert json.loads((left / "status.json").read_text())["state"] == "finished"
