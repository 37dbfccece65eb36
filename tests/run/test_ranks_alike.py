"""Ranks that are not alike, or do not come: one message that says what differs or who waits for whom, and no hang."""

import re
import sys

import pytest
from processes import PROJECT, finish_job, start_job

pytestmark = pytest.mark.job

# In what rank 1 differs from the others is an option of this driver.
DRIVER = '''
"""A driver of which one rank is another."""
import os, sys, threading, time
from dataclasses import dataclass
import torch
from xbraid_py.comm import launcher_rank
from xbraid_py.comm.agreement import hold
from xbraid_py.run.launch import launch

@dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Parameters
    ----------
    what : str
        In what rank 1 differs.
    depth, width : int
        Numbers.
    patience : float
        Of the watchdog.
    """
    what: str = "nothing"
    depth: int = 64
    width: int = 8
    patience: float = 60.0

def setup(options, comm):
    here = comm.rank == 1
    hold(comm, "samples", torch.arange(6.0) + (here and options.what == "data"), torch.arange(6))
    if here and options.what == "exit":
        sys.exit(0)

    def run():
        if here and options.what == "leave":
            sys.exit(0)
        if here and options.what in ("leave", "sleep"):
            threading.Event().wait()
        if options.what in ("leave", "sleep"):
            if comm.rank == 0:
                comm.recv(torch.empty(1), 1)
            comm.barrier()
        if options.what == "slow" and here:
            time.sleep(5)
        comm.barrier()
        if comm.rank == 0:
            print("done")
    return run

if __name__ == "__main__":
    words = sys.argv[1:]
    if launcher_rank() == 1:
        words += {"--what=options": ["--depth=32", "--width=4"], "--what=help": ["--help"],
                  "--what=config": ["--print_config"], "--what=wrong": ["--width=wide"]}.get(words[0], [])
    launch(Options, setup, words)
'''

ALONE = (
    "rank 1 of 3 ends here, after --help or --print_config perhaps, and others do not; start all ranks with the same"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alike")
    (folder / "driver.py").write_text(DRIVER)
    (folder / "other.py").write_text(DRIVER + "# one line more\n")
    return folder


def run(folder, *words, fresh=False, timeout=60):
    return finish_job(
        start_job([*words], ranks=3, env={"PYTHONPATH": str(PROJECT)}, cwd=folder, fresh=fresh), timeout=timeout
    )


def test_ranks_that_are_alike_run(folder):
    job = run(folder, "driver.py", "--what=nothing")
    assert (job.returncode, job.stdout, job.stderr) == (0, "done\n", "")


@pytest.mark.parametrize(
    "what, message",
    [
        ("options", "options: depth=64 on ranks 0, 2 but 32 on rank 1; width=8 on ranks 0, 2 but 4 on rank 1; "),
        ("help", ALONE),
        ("config", ALONE),
        ("wrong", "rank 1 of 3: --width=wide is not an int; use --width=8\ntry driver.py --help"),
        ("exit", ALONE),
        ("data", "data: samples='6 by digest "),
    ],
)
def test_what_differs_on_one_rank_ends_all(folder, what, message):
    job = run(folder, "driver.py", f"--what={what}")
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr.startswith(f"error: {message}") and job.stderr.count("error") == 1, job.stderr


def test_another_file_on_one_rank_ends_all(folder):
    other = [":", "-n", "1", sys.executable, "other.py", "--what=nothing"]
    job = run(folder, "driver.py", "--what=nothing", *other, fresh=True)
    assert (job.returncode, job.stdout) == (2, "")
    files = r"driver.py='\w+' on ranks 0-2 but nothing on rank 3; other.py=nothing on ranks 0-2 but '\w+' on rank 3;"
    assert re.match(f"error: files of the program, by their digests: {files}", job.stderr), job.stderr


def test_a_rank_that_leaves_the_run_alone_ends_all(folder):
    job = run(folder, "driver.py", "--what=leave")
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr.startswith("rank 1 of 3 has left the others by SystemExit(0)\n")


def test_who_waits_too_long_says_where_all_ranks_are(folder):
    job = run(folder, "driver.py", "--what=sleep", "--patience=2")
    assert (job.returncode, job.stdout) == (1, "")
    lines = job.stderr.splitlines()
    assert lines[0] == "error: no message for 2 seconds (--patience)"
    assert re.fullmatch(r"rank 0: waits for rank 1, in .*driver.py, line \d+, run", lines[1])
    assert re.fullmatch(r"rank 1: works, in .*driver.py, line \d+, run", lines[2])
    assert re.fullmatch(r"rank 2: waits for all others, in .*driver.py, line \d+, run", lines[3])


def test_a_rank_that_is_slow_is_waited_for(folder):
    job = run(folder, "driver.py", "--what=slow", "--patience=30")
    assert (job.returncode, job.stdout, job.stderr) == (0, "done\n", "")
