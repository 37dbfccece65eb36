"""The tests' own tools: `spmd` on threads and over MPI, and jobs started as subprocesses."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from processes import PROJECT, end_job, finish_job, job_environment, start_job

TESTS = PROJECT / "tests"
PATHS = os.pathsep.join(map(str, (TESTS, TESTS / "helpers", PROJECT)))
PYTEST = ["-m", "pytest", "-p", "conftest", "-p", "no:cacheprovider"]

ONE_RANK_FAILS = """
import torch

def test_first(spmd):
    assert spmd(lambda comm: comm.rank) == [0, 1, 2]

def test_wrong(spmd):
    def body(comm):
        if comm.rank == 1:
            raise ZeroDivisionError("on purpose")
        comm.recv(torch.empty(1), 1)
    spmd(body)
"""

ALL_RANKS_FAIL = """
def test_wrong(spmd):
    assert spmd(lambda comm: comm.rank) == "something else"

def test_plain():
    assert False, "not collected over MPI"
"""

SIZES = """
import pytest

def test_all(spmd): pass

@pytest.mark.ranks(2, 8)
def test_others(spmd): pass

@pytest.mark.ranks(1, 3, long=(5,))
def test_long(spmd): pass
"""


def pytest_over_mpi(run_job, folder, source, *options):
    """Run `source` as a test file, with this folder's conftest, on 3 ranks."""
    file = folder / "test_inner.py"
    file.write_text(source)
    return run_job(["-m", "mpi4py", *PYTEST, "--only-mpi", *options], ranks=3, env={"PYTHONPATH": PATHS}, cwd=folder)


def test_results_come_in_the_order_of_the_ranks(spmd):
    results = spmd(lambda comm: (comm.rank, comm.size))
    assert results == [(rank, len(results)) for rank in range(len(results))]


@pytest.mark.ranks(2, 8)
def test_the_marker_sets_the_number_of_ranks(spmd, request):
    size = len(spmd(lambda comm: None))
    assert size >= 2 if request.node.callspec.id == "mpi" else size in (2, 8)


@pytest.mark.job
@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        (["-m", "not long"], {"all": [1, 2, 3, 5], "others": [2, 8], "long": [1, 3]}),
        ([], {"all": [1, 2, 3, 5], "others": [2, 8], "long": [1, 3, 5]}),
        (["-m", "not long", "--few-ranks"], {"all": [1, 3], "others": [2], "long": [1, 3]}),
    ],
)
def test_numbers_of_ranks(run_job, tmp_path, options, sizes):
    (tmp_path / "test_inner.py").write_text(SIZES)
    job = run_job([*PYTEST, "--collect-only", "-q", *options], env={"PYTHONPATH": PATHS}, cwd=tmp_path)
    expected = [f"test_inner.py::test_{name}[{size}ranks]" for name in sizes for size in sizes[name]]
    assert [line for line in job.stdout.splitlines() if "::" in line] == expected, job.stderr


def test_one_folder_for_all_ranks(spmd, shared_tmp_path):
    def body(comm):
        (shared_tmp_path / f"{comm.rank}.txt").write_text("here")
        comm.barrier()
        return sorted(path.name for path in shared_tmp_path.iterdir())

    results = spmd(body)
    assert results == [[f"{rank}.txt" for rank in range(len(results))]] * len(results)


@pytest.mark.job
def test_a_failure_on_one_rank_ends_the_job(run_job, tmp_path):
    job = pytest_over_mpi(run_job, tmp_path, ONE_RANK_FAILS)
    assert job.returncode != 0
    assert "rank 1 of 3: FAILED" in job.stderr
    assert "ZeroDivisionError: on purpose" in job.stderr


@pytest.mark.job
def test_a_failure_outside_a_body_is_reported_in_full_by_rank_0(run_job, tmp_path):
    (tmp_path / "test_without.py").write_text("raise SystemExit('files without bodies are not collected')")
    job = pytest_over_mpi(run_job, tmp_path, ALL_RANKS_FAIL)
    assert job.returncode != 0
    assert job.stdout.count("1 failed, 1 deselected in") == 1
    assert job.stdout.count("FAILED") == 1
    assert "rank 1: test_inner.py::test_wrong" in job.stderr and "rank 2: test_inner.py::test_wrong" in job.stderr


def test_jobs_see_no_launcher(monkeypatch):
    names = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_SIZE", "SLURM_NTASKS", "MPI_LOCALNRANKS", "HYDI_CONTROL_FD")
    for name in (*names, "RANK", "WORLD_SIZE", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "set by a launcher")
    environment = job_environment({"EXTRA": "1"})
    assert not [name for name, value in environment.items() if value == "set by a launcher"]
    assert environment["EXTRA"] == environment["OMP_NUM_THREADS"] == "1"
    assert environment["PATH"] == os.environ["PATH"]


@pytest.mark.job
def test_status_and_output_of_a_job(run_job):
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit({})"
    one = run_job(["-c", code.format(2)])
    assert (one.returncode, one.stdout, one.stderr) == (2, "out\n", "err\n")
    three = run_job(["-c", code.format(0)], ranks=3)
    # Lines of several ranks may run into each other.
    assert (three.returncode, three.stdout.count("out"), three.stderr.count("err")) == (0, 3, 3)
    assert run_job(["-c", code.format(2)], ranks=3).returncode == 2


@pytest.mark.job
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_job_past_its_time_ends_with_its_ranks(tmp_path, ranks):
    # Ranks that ignore the polite request, as one that sits in a library call does.
    code = (
        "import os, signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "open(f'{sys.argv[1]}/{os.getpid()}', 'w'); time.sleep(100)"
    )
    job = start_job(["-c", code, tmp_path], ranks)
    while len(list(tmp_path.iterdir())) < ranks:
        time.sleep(0.05)
    with pytest.raises(pytest.fail.Exception, match="no end after 0.1 s"):
        finish_job(job, timeout=0.1)
    # The launcher's helper ends the ranks once it misses the launcher: wait for that, with the test's time limit.
    while any(runs(int(path.name)) for path in tmp_path.iterdir()):
        time.sleep(0.05)


@pytest.mark.job
def test_a_job_that_is_over_can_be_ended_again():
    job = start_job(["-c", "print('done')"])
    job.wait()
    assert end_job(job) == ("done\n", "")


def runs(pid: int) -> bool:
    """Whether the process is there, zombies not counted."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


@pytest.mark.job
def test_runs_tells_the_living_from_the_dead():
    job = start_job(["-c", "import time; time.sleep(100)"])
    assert runs(job.pid)
    job.kill()
    end_job(job)
    assert not runs(job.pid)
