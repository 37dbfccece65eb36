"""Jobs started as subprocesses, and bodies on ranks that are threads."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from forked_job import ForkedJob, ForkServer

from xbraid_py.comm import Communicator
from xbraid_py.testing import run_threads

PROJECT = Path(__file__).resolve().parents[2]

# What a launcher leaves in the environment; a job started from a test must not see it.
_LAUNCHER_PREFIXES = (
    *("PMI_", "PMI2_", "PMIX_", "OMPI_", "PRTE_", "PRRTE_", "SLURM_", "HYDI_", "HYDRA_", "MPI_LOCAL"),
    *("TORCHELASTIC_", "MASTER_", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)

# Open MPI refuses root and more ranks than cores unless it is told so; MPICH does not read these.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    "PRTE_MCA_hwloc_default_binding_policy": "none",
}


def run_on_one_core(size: int, body: Callable[[Communicator], Any]) -> list[Any]:
    """`run_threads` on one core: threads that hand the interpreter to each other across cores take twice as long."""
    if not hasattr(os, "sched_setaffinity"):
        return run_threads(size, body)
    cores = os.sched_getaffinity(0)
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    os.sched_setaffinity(0, {sorted(cores)[worker % len(cores)]})  # the threads of the body inherit it
    try:
        return run_threads(size, body)
    finally:
        os.sched_setaffinity(0, cores)


def job_environment(env: Mapping[str, str] | None = None) -> dict[str, str]:
    """Environment of a job started by hand: one thread a rank, nothing of a launcher around us; then `env`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER_PREFIXES)}
    paths = os.pathsep.join(
        filter(None, (str(PROJECT), str(PROJECT / "tests" / "helpers"), os.environ.get("PYTHONPATH")))
    )
    return {**clean, **_OPEN_MPI, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, **(env or {})}


# Started once in a process of pytest, and not before a job asks for it.
fork_server = ForkServer(job_environment())


def start_job(
    args: Sequence, ranks: int = 1, env: Mapping[str, str] | None = None, cwd=PROJECT, fresh: bool = False
) -> subprocess.Popen | ForkedJob:
    """Start `python *args`, by `mpirun` if `ranks` is above 1, as a session of its own with captured output.

    The mpirun is the one beside this python, otherwise the one on the PATH. Most processes are forks of a python that
    has torch loaded. Those that are not the same as a fork are new interpreters, all are if XBRAID_FRESH_JOBS is set;
    where a test's subject is a process as such (its start, its kin, its imports) it asks for that by `fresh`.
    """
    words, environment = [*map(str, args)], job_environment(env)
    forked = not (fresh or os.environ.get("XBRAID_FRESH_JOBS")) and fork_server.can_start(words, environment)
    if forked and ranks == 1:
        return fork_server.start(words, environment, cwd)
    command = fork_server.command(words) if forked else [sys.executable, *words]
    if ranks > 1:
        beside = Path(sys.executable).parent / "mpirun"
        mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
        if mpirun is None:
            pytest.fail(f"ranks={ranks}: there is no mpirun beside {sys.executable} or on the PATH; install mpich")
        command = [mpirun, "-n", str(ranks), *command]
    return subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish_job(job: subprocess.Popen | ForkedJob, timeout: float = 60) -> subprocess.CompletedProcess:
    """Wait for a started job; past `timeout` seconds end all of it and fail the test."""
    try:
        out, err = job.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        out, err = end_job(job)
        pytest.fail(f"no end after {timeout} s: {job.args}\n--- stdout\n{out}\n--- stderr\n{err}")
    return subprocess.CompletedProcess(job.args, job.returncode, out, err)


def end_job(job: subprocess.Popen | ForkedJob) -> tuple[str, str]:
    """End a started job, ranks included; what it has printed."""
    # A launcher that is asked politely takes its ranks with it, those in other process groups too.
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(job.pid, sign)
        try:
            return job.communicate(timeout=2)
        except subprocess.TimeoutExpired:
            continue
    return "", "(the job still holds its output open)"


def run_job(
    args: Sequence, ranks: int = 1, timeout: float = 60, env=None, cwd=PROJECT, fresh: bool = False
) -> subprocess.CompletedProcess:
    """Run `python *args` on `ranks` ranks to its end; `returncode`, `stdout` and `stderr` as text."""
    return finish_job(start_job(args, ranks, env, cwd, fresh), timeout)
