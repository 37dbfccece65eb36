"""What all tests share: `spmd` for bodies on several ranks, and jobs started as subprocesses."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: its threads are set up only once

import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch
from processes import fork_server, run_job, run_on_one_core

from xbraid_py.comm import Communicator, SerialCommunicator, world
from xbraid_py.comm.agreement import launcher_size

torch.set_num_threads(1)

# Tests that a shell has started in the background ignore Ctrl-C, and so would their jobs, which are to meet it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# The same examples in every run and on every rank, whatever the speed of the machine.
hypothesis.settings.register_profile(
    "same",
    derandomize=True,
    database=None,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow, hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("same")

THREAD_RANKS = (1, 2, 3, 5)
EXIT_STATUS = pytest.StashKey[int]()


def over_mpi(config: pytest.Config) -> bool:
    """Whether this is a run over MPI, `mpirun -n P python -m pytest --only-mpi`, or the same by `torchrun`."""
    return config.getoption("only_mpi") or config.getoption("with_mpi")


def pytest_addoption(parser):
    text = "bodies for several ranks on 1 and 3 threads only, where they are run on more numbers otherwise"
    parser.addoption("--few-ranks", action="store_true", help=text)


def pytest_configure(config):
    # References of one rank, in the bodies of several.
    config.addinivalue_line("filterwarnings", "ignore:comm=None with WORLD_SIZE")
    config.addinivalue_line("markers", "job: starts jobs, most with mpirun; left out unless asked for by -m job")
    config.addinivalue_line("markers", "long: tells little more than shorter tests do; left to `make test-all`")
    config.addinivalue_line(
        "markers", "ranks(*sizes, long=()): numbers of thread ranks of an `spmd` test; over MPI the least"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session):
    if over_mpi(session.config) and world_once().rank > 0:
        # One report a job, that of rank 0. Failures of the others are printed below.
        session.config.get_terminal_writer()._file = open(os.devnull, "w")


def pytest_sessionfinish(session, exitstatus):
    session.config.stash[EXIT_STATUS] = exitstatus


def pytest_unconfigure(config):
    fork_server.stop()
    # A rank that leaves first after a failure may end the job: not before rank 0 has printed its report. A rank
    # that leaves early, without running the tests, waits for nobody.
    if over_mpi(config) and config.stash.get(EXIT_STATUS, None) in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        world_once().barrier()


def pytest_ignore_collect(collection_path, config):
    # Every rank collects all files: not those of which none of its tests is run.
    is_test = config.getoption("only_mpi") and collection_path.match("test_*.py")
    return True if is_test and "spmd" not in collection_path.read_text() else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    if config.getoption("only_mpi"):
        config.hook.pytest_deselected(items=[item for item in items if not item.get_closest_marker("mpi")])
        items[:] = [item for item in items if item.get_closest_marker("mpi")]


def pytest_generate_tests(metafunc):
    if "spmd" not in metafunc.fixturenames:
        return
    marker = metafunc.definition.get_closest_marker("ranks")
    sizes, more = (marker.args, marker.kwargs.get("long", ())) if marker else (THREAD_RANKS, ())
    if over_mpi(metafunc.config):
        params = [pytest.param(min((*sizes, *more)), marks=pytest.mark.mpi, id="mpi")]
    else:
        if metafunc.config.getoption("few_ranks"):
            sizes = [size for size in sizes if size in (1, 3)] or sizes[:1]
        params = [pytest.param(size, id=f"{size}ranks") for size in sizes]
        params += [pytest.param(size, id=f"{size}ranks", marks=pytest.mark.long) for size in more]
    metafunc.parametrize("spmd", params, indirect=True)


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report):
    # Rank 0 prints its own failures at the end; the reports of the other ranks go nowhere.
    if report.failed and "mpi4py.MPI" in sys.modules and world_once().rank > 0:
        print(f"rank {world_once().rank}: {report.nodeid}\n{report.longreprtext}", file=sys.__stderr__, flush=True)


@cache
def world_once() -> Communicator:
    """All ranks of this job."""
    comm = world()
    assert comm.size == launcher_size(), f"{launcher_size()} processes, but the job has {comm.size} rank(s)"
    return comm


class _EndJobOnError:
    """End the whole job if the body fails: the other ranks may wait for a message that never comes."""

    def __init__(self, comm: Communicator, name: str, config: pytest.Config):
        self.comm, self.name, self.config = comm, name, config

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if kind is None or issubclass(kind, pytest.skip.Exception):
            return
        self.config.pluginmanager.getplugin("capturemanager").suspend(in_=True)
        text = "".join(traceback.format_exception(kind, error, trace))
        print(f"\nrank {self.comm.rank} of {self.comm.size}: FAILED {self.name}\n{text}", file=sys.stderr, flush=True)
        self.comm.abort(1)


@pytest.fixture
def spmd(request) -> Callable[[Callable[[Communicator], Any]], list[Any]]:
    """`spmd(body)` runs `body(comm)` on every rank; the results of all ranks, in their order, on every rank.

    Plain pytest runs the test once for each of the numbers 1, 2, 3 and 5 of ranks that are threads (others by
    `@pytest.mark.ranks(1, 8)`, and those of `long=(2, 5)` in `make test-all` only); pytest over MPI, or over
    torch.distributed, once, on the ranks of the job. A body that raises ends such a job at once, so errors that a test
    expects are caught inside it.
    """
    if not over_mpi(request.config):
        size = request.param
        return lambda body: [body(SerialCommunicator())] if size == 1 else run_on_one_core(size, body)
    comm = world_once()
    if comm.size < request.param:
        pytest.skip(f"needs {request.param} ranks, the job has {comm.size}")

    def run(body):
        with _EndJobOnError(comm, request.node.nodeid, request.config):
            return comm.bcast(comm.gather(body(comm)))

    return run


@pytest.fixture
def shared_tmp_path(spmd, tmp_path) -> Path:
    """One temporary folder for all ranks of an `spmd` test."""
    return spmd(lambda comm: tmp_path)[0]


@pytest.fixture(name="run_job")
def run_job_fixture() -> Callable[..., subprocess.CompletedProcess]:
    """The function `run_job`, for tests that start whole jobs."""
    return run_job
