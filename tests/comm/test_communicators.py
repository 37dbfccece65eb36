"""The kinds of communicators: serial runs, threads that fail, launchers, and what `as_communicator` takes."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings

import pytest
import torch

from xbraid_py.comm import (
    Communicator,
    LaunchError,
    SerialCommunicator,
    as_communicator,
    check_launcher,
    launcher_rank,
    world,
)
from xbraid_py.comm.agreement import launcher_size, started_by_torch
from xbraid_py.comm.threads import ThreadCommunicator, run_threads


def test_serial_runs_have_nobody_to_talk_to():
    comm = SerialCommunicator()
    with pytest.raises(ValueError, match="^dest=1: a serial run"):
        comm.isend(torch.zeros(1), 1)
    with pytest.raises(ValueError, match="^source=1: a serial run"):
        comm.recv(torch.zeros(1), 1)


def test_a_failing_thread_ends_the_others():
    def body(comm):
        if comm.rank == 1:
            raise ZeroDivisionError("rank 1")
        comm.recv(torch.empty(1), 1)  # never sent

    before = threading.active_count()
    with pytest.raises(ZeroDivisionError, match="rank 1"):
        run_threads(3, body)
    assert threading.active_count() == before


def test_abort_of_a_thread_ends_the_others():
    def body(comm):
        if comm.rank == 2:
            comm.abort(3)
        comm.bcast(None, root=2)

    with pytest.raises(SystemExit) as raised:
        run_threads(3, body)
    assert raised.value.code == 3


@pytest.mark.parametrize("out", [torch.empty(2, dtype=torch.float64), torch.empty(3)], ids=["shape", "dtype"])
def test_threads_notice_what_mpi_would_mangle(out):
    def body(comm):
        if comm.rank == 0:
            comm.isend(torch.zeros(3, dtype=torch.float64), 1)
        else:
            comm.recv(out, 0)

    with pytest.raises(ValueError, match="^rank 1 expects .* from rank 0"):
        run_threads(2, body)


def test_threads_notice_wrong_counts():
    with pytest.raises(ValueError, match=r"^counts=\[1, 1\] but the ranks sent \[2, 2\]"):
        run_threads(2, lambda comm: comm.allgather(torch.zeros(2), [1, 1]))


LAUNCHERS = [
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
]


@pytest.mark.parametrize(("size_name", "rank_name"), LAUNCHERS)
def test_launchers_are_believed(size_name, rank_name):
    environ = {size_name: "4", rank_name: "3"}
    check_launcher(4, environ)
    assert launcher_rank(environ) == 3
    with pytest.raises(LaunchError, match=rf"^{size_name}=4 but MPI sees 1 process\(es\).*beside this python.*pmi2"):
        check_launcher(1, environ)


def test_no_launcher_no_complaint():
    check_launcher(1, {})
    assert launcher_rank({}) == 0


def test_the_innermost_launcher_counts():
    # mpirun inside a SLURM allocation: the allocation holds more tasks than the job has ranks.
    environ = {"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "PMI_SIZE": "2", "PMI_RANK": "1"}
    check_launcher(2, environ)
    assert launcher_rank(environ) == 1


TORCHRUN = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("more", "missing", "expected"),
    [
        ({}, None, True),
        ({"TORCHELASTIC_RUN_ID": "none"}, None, True),
        ({}, "MASTER_PORT", False),
        ({}, "RANK", False),
        # Set for all processes of a cluster's node, where MPI has started this one.
        ({"PMI_SIZE": "2", "PMI_RANK": "0"}, None, False),
        ({"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "0"}, None, False),
        # One torchrun on each node, started by mpirun, or by srun.
        ({"PMI_SIZE": "2", "PMI_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, None, True),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, None, True),
    ],
)
def test_who_has_started_a_process(more, missing, expected):
    environ = TORCHRUN | more
    environ.pop(missing, None)
    assert started_by_torch(environ) is expected
    if expected:
        assert (launcher_rank(environ), launcher_size(environ)) == (1, 3)
    elif more:
        assert (launcher_rank(environ), launcher_size(environ)) == (0, 2)


def test_one_process_among_several_is_told_so(monkeypatch):
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"^comm=None with WORLD_SIZE=3: .* use comm=xbraid_py.world\(\) to share"):
        as_communicator(None)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        as_communicator(None)


def test_without_an_mpi_library_one_process_is_a_serial_run(monkeypatch):
    class NoLibrary:
        def __getattr__(self, name):
            raise RuntimeError("cannot load MPI library\nlibmpi.so: cannot open shared object file")

    for name in (*TORCHRUN, "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "mpi4py", NoLibrary())
    assert isinstance(world(), SerialCommunicator)
    monkeypatch.setenv("PMI_SIZE", "2")
    said = r"started 2 processes, but mpi4py finds no MPI library \(cannot load MPI library\); install it, or"
    with pytest.raises(LaunchError, match=said):
        world()


def test_what_is_no_group_of_ranks():
    with pytest.raises(TypeError, match=r"^comm=-100 is no group of ranks that this process belongs to; use xbraid_py"):
        as_communicator(torch.distributed.GroupMember.NON_GROUP_MEMBER)


def test_independent_processes_notice_their_launcher(run_job):
    job = run_job(["-c", "from xbraid_py.comm import world; world()"], env={"SLURM_NTASKS": "3", "SLURM_PROCID": "0"})
    assert job.returncode != 0
    assert "LaunchError: SLURM_NTASKS=3 but MPI sees 1 process(es)" in job.stderr


def test_a_single_process_is_a_serial_run(run_job):
    code = "from mpi4py import MPI; from xbraid_py.comm import *"
    job = run_job(["-c", f"{code}; print(type(world()), type(as_communicator(MPI.COMM_SELF)))"])
    assert job.stdout.count("SerialCommunicator") == 2, job.stderr


def test_wrap_takes_what_a_caller_has(spmd):
    def body(comm):
        assert as_communicator(comm) is comm
        assert isinstance(as_communicator(None), SerialCommunicator)
        return isinstance(comm, Communicator) and (comm.size == 1) == isinstance(comm, SerialCommunicator)

    assert all(spmd(body))


def test_mpi4py_is_not_needed_without_a_launcher():
    code = "import sys, torch, xbraid_py.comm; sys.exit('mpi4py' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_threads_are_the_default_stand_in():
    assert all(type(comm) is ThreadCommunicator for comm in run_threads(2, lambda comm: comm))


JOB = """
import torch
from xbraid_py.comm import world
comm = world()
if comm.rank == 1:
    comm.abort(7)
comm.recv(torch.empty(1), 1)
"""


def test_abort_ends_a_job_that_waits(run_job):
    assert run_job(["-c", JOB], ranks=3).returncode == 7
