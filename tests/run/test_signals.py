"""Signals: a run that is asked to stop does so between two updates, on all ranks, behind a checkpoint.

The drivers of these jobs send their signals to themselves, at the moment in question; most jobs on one rank are
children of one process, since most of a short job's time is the import of torch.
"""

import json
import os
import pty
import signal
import sys
import time

import pytest
from processes import PROJECT, end_job, finish_job, job_environment, start_job

from xbraid_py.run import signals

# What happens, and on which rank (-1: on all), are the options of this driver; its checkpoints hold a number.
DRIVER = '''
"""A driver that is sent signals."""
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
import torch
from xbraid_py.run.launch import launch
from xbraid_py.run.folder import claim

@dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Parameters
    ----------
    what : str
        When a signal comes, and which.
    rank : int
        Where; -1 is everywhere.
    out : Path
        The folder.
    """
    what: str = "nothing"
    rank: int = -1
    out: Path = Path("out")

def setup(options, comm):
    here = options.rank in (-1, comm.rank)
    folder = claim(options.out, comm)

    def send(name, *numbers, pause=0.0):
        for number in numbers if here and options.what == name else ():
            os.kill(os.getpid(), number)
            time.sleep(pause)

    def save(number):
        if comm.rank == 0:
            (folder.path / "checkpoint").write_text(str(number))
        return folder.path / "checkpoint"

    def wait_for_ever():
        if comm.size > 1 and not here:
            comm.recv(torch.empty(1), (comm.rank + 1) % comm.size)
        while True:
            time.sleep(1.0)

    def run():
        with folder.open({"what": options.what}, total=6):
            for number in range(1, 7):
                if number == 3:
                    send("usr1", signal.SIGUSR1)
                    send("term", signal.SIGTERM)
                    send("hup", signal.SIGHUP)
                    send("both", signal.SIGUSR1, signal.SIGTERM)
                    send("twins", signal.SIGTERM, signal.SIGTERM)
                    send("twice", signal.SIGTERM, signal.SIGTERM, pause=0.5)
                    if options.what == "twice":
                        wait_for_ever()
                    if options.what == "crash" and here:
                        1 / 0
                    if options.what == "external":
                        os.write(1, b"ready\\n")
                        while comm.rank == 0 and not os.path.exists("go"):
                            time.sleep(0.05)
                        print("gone on" if comm.rank == 0 else "", end="", flush=True)
                if folder.update(number, objective=1.0 / number):
                    raise folder.stopped(save(number))
            send("after", signal.SIGTERM)
            time.sleep(0.3)
    send("setup", signal.SIGUSR1)
    return run

if __name__ == "__main__":
    launch(Options, setup)
'''
# Runs the driver in forked children, one for each word; leaves NAME.err and NAME.status.
SERIAL = """
import os, signal, sys
from driver import Options, launch, setup

for name in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        os.dup2(os.open(f"{name}.err", os.O_CREAT | os.O_WRONLY), 2)
        if name == "before":
            os.kill(os.getpid(), signal.SIGTERM)
        launch(Options, setup, [f"--what={name}", f"--out={name}"], prog="driver.py")
        sys.exit(0)
    open(f"{name}.status", "w").write(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])))
"""
CASES = ("nothing", "before", "setup", "usr1", "term", "hup", "both", "twins", "twice", "after")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("signals")
    (folder / "driver.py").write_text(DRIVER)
    (folder / "serial.py").write_text(SERIAL)
    return folder


@pytest.fixture(scope="module")
def serial(folder):
    """`serial(name)`: exit status, what was printed to the standard error, and the folder of a case on one rank."""
    job = finish_job(start_job(["serial.py", *CASES], env={"PYTHONPATH": str(PROJECT)}, cwd=folder), timeout=100)
    assert job.returncode == 0, job.stderr
    return lambda name: (int((folder / f"{name}.status").read_text()), (folder / f"{name}.err").read_text())


def status(out) -> dict:
    return json.loads((out / "status.json").read_text())


@pytest.mark.job
@pytest.mark.parametrize(
    "name, said",
    [("usr1", "SIGUSR1"), ("term", "SIGTERM"), ("hup", "SIGHUP"), ("both", "SIG"), ("twins", "SIGTERM")],
)
def test_on_one_rank_the_update_is_finished_first(folder, serial, name, said):
    code, err = serial(name)
    assert code == 75 and err.startswith(f"stopped by {said}") and err.count("\n") == 1
    assert err.endswith(f"after update 3; --resume auto goes on from {name}/checkpoint\n")
    assert (folder / name / "checkpoint").read_text() == "3"
    found = status(folder / name)
    assert (found["state"], found["update"], found["message"]) == ("stopped", 3, err.strip())


@pytest.mark.job
def test_before_during_and_after(folder, serial):
    assert serial("nothing") == (0, "") and status(folder / "nothing")["state"] == "finished"
    assert serial("before") == (-signal.SIGTERM, "")
    assert serial("setup") == (75, "stopped before the run has begun; start again\n")
    assert not (folder / "setup" / "status.json").exists()
    assert serial("after") == (0, "") and status(folder / "after")["state"] == "finished"


@pytest.mark.job
def test_a_second_sigterm_ends_one_rank_at_once(folder, serial):
    assert serial("twice") == (143, "terminated\n")
    found = status(folder / "twice")
    assert (found["state"], found["message"]) == ("stopped", "terminated")
    assert not (folder / "twice" / "checkpoint").exists()


def start(folder, *options):
    return start_job(["driver.py", *options], ranks=3, env={"PYTHONPATH": str(PROJECT)}, cwd=folder)


@pytest.mark.job
@pytest.mark.parametrize("what, rank, said", [("usr1", 2, "SIGUSR1"), ("term", -1, "SIGTERM")])
def test_all_ranks_stop_after_the_same_update(folder, what, rank, said):
    out = f"{what}_3"
    job = finish_job(start(folder, f"--what={what}", f"--rank={rank}", f"--out={out}"))
    expected = f"stopped by {said} after update 3; --resume auto goes on from {out}/checkpoint\n"
    assert (job.returncode, job.stdout, job.stderr) == (75, "", expected)
    assert (folder / out / "checkpoint").read_text() == "3" and status(folder / out)["ranks"] == 3


@pytest.mark.job
def test_a_second_sigterm_ends_ranks_that_wait(folder):
    job = finish_job(start(folder, "--what=twice", "--rank=1", "--out=twice_3"))
    assert job.returncode == 143 and "Traceback" not in job.stderr
    assert status(folder / "twice_3")["message"] == "terminated"


@pytest.mark.job
def test_a_rank_that_fails_says_so_in_the_status(folder):
    job = finish_job(start(folder, "--what=crash", "--rank=1", "--out=crash_3"))
    assert job.returncode == 1 and "rank 1 of 3:\nTraceback" in job.stderr
    found = status(folder / "crash_3")
    assert found["state"] == "failed" and found["message"] == "rank 1: ZeroDivisionError: division by zero"


@pytest.mark.job
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_the_launcher_hands_signals_on(folder, number):
    # Two of the ranks wait inside MPI.
    (folder / "go").unlink(missing_ok=True)
    job = start(folder, "--what=external", f"--out=external_{number.name}")
    try:
        for _ in range(3):
            assert job.stdout.readline() == "ready\n"
        job.send_signal(number)
        (folder / "go").write_text("")
        ended = finish_job(job, timeout=60)
    finally:
        if job.poll() is None:
            end_job(job)
    assert ended.returncode == 75
    assert f"stopped by {number.name} after update" in ended.stderr


@pytest.mark.job
def test_a_terminal_is_closed(folder):
    (folder / "go").unlink(missing_ok=True)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        words = ["driver.py", "--what=external", "--out=closed"]
        os.execve(sys.executable, [sys.executable, *words], {**job_environment(), "PYTHONPATH": str(PROJECT)})
    try:
        said, ended = b"", (0, 0)
        while b"ready" not in said:
            said += os.read(terminal, 1000)
        os.close(terminal)
        (folder / "go").write_text("")
        until = time.monotonic() + 60
        while not (ended := os.waitpid(pid, os.WNOHANG))[0] and time.monotonic() < until:
            time.sleep(0.05)
    finally:
        if not ended[0]:
            os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(ended[1]) == 75
    found = status(folder / "closed")
    assert found["state"] == "stopped" and found["message"].startswith("stopped by SIGHUP after update 3;")


def test_what_nohup_ignores_stays_so():
    before = {number: signal.getsignal(number) for number in signals.ASKING}
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signals.install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.noted() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("said", [(0, 0, 0), (0, 10, 0), (15, 10, 10), (0, 0, 255)])
def test_what_one_rank_says_all_ranks_hear(spmd, said):
    found = spmd(lambda comm: signals.stop_agreed(comm, said[comm.rank % 3]))
    assert found == [max(said[rank % 3] for rank in range(len(found)))] * len(found)


def test_what_a_process_was_sent_is_asked_for(spmd):
    try:
        assert set(spmd(signals.stop_agreed)) == {0}
        signals.note(signal.SIGUSR1)
        assert signals.noted() == signal.SIGUSR1
        assert set(spmd(signals.stop_agreed)) == {signal.SIGUSR1}
    finally:
        signals.forget()
    assert signals.noted() == 0


def test_handlers_note_and_nothing_else():
    before = {number: signal.getsignal(number) for number in signals.ASKING}
    try:
        signals.install()
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.noted() == signal.SIGTERM
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.noted() == signal.SIGUSR1
        signals.install()
        assert signals.noted() == 0
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
