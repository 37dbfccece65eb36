"""How jobs end: whatever goes wrong on one rank or three gives one message, the right status, and no hang.

Most of a short job's time is the import of torch. So all jobs on one rank are children of one process,
and there are only as many on three ranks as there are ways to end.
"""

import re
import signal
import subprocess

import pytest
from processes import PROJECT, finish_job, start_job

# What goes wrong, and on which rank (-1: on all), are the options of this driver.
DRIVER = '''
"""A driver that fails as it is told."""
import os, sys, threading, warnings
from dataclasses import dataclass
import torch
from xbraid_py.comm import launcher_rank
from xbraid_py.comm.agreement import RunError
from xbraid_py.run.launch import launch

@dataclass(frozen=True, kw_only=True)
class Options:
    """Options.

    Parameters
    ----------
    what : str
        What goes wrong.
    rank : int
        Where; -1 is everywhere.
    """
    what: str = "nothing"
    rank: int = -1

def setup(options, comm):
    here = options.rank in (-1, comm.rank)
    warnings.warn("take care")
    if here and options.what == "value":
        raise ValueError("depth=3 must be even; use 4")
    if here and options.what == "file":
        open("/nowhere/peaks.dat")
    if here and options.what == "bug":
        {}["key"]

    def wait_for_ever():
        os.write(1, b"waiting\\n")  # in one piece, so that lines of several ranks do not mix
        if comm.size > 1:
            comm.recv(torch.empty(1), (comm.rank + 1) % comm.size)
        threading.Event().wait()

    def run():
        if options.what == "loss":
            raise RunError("loss=nan in update 7; lower the step size")
        if here and options.what == "crash":
            1 / 0
        if here and options.what == "thread":
            threading.Thread(target=lambda: 1 / 0).start()
        if options.what in ("crash", "thread", "wait"):
            wait_for_ever()
        if options.what == "chatter":
            while True:
                print("x" * 100)
        if options.what == "exit":
            sys.exit(5)
        if comm.rank == 0:
            print("threads", torch.get_num_threads())
    return run

if __name__ == "__main__":
    # A file that only rank 1 asks for stands for one that only rank 1 cannot see.
    alone = ["--config=/nowhere/run.yaml"] if "--what=config" in sys.argv and launcher_rank() == 1 else []
    launch(Options, setup, sys.argv[1:] + alone)
'''

# Runs the driver in forked children, one for each argument `NAME WORD...`; leaves NAME.out, NAME.err, NAME.status.
# A word VARIABLE=VALUE goes to the environment.
pytestmark = pytest.mark.job

SERIAL = """
import os, signal, sys, time
from driver import Options, launch, setup

for case in sys.argv[1:]:
    name, *words = case.split()
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.environ.update(word.split("=") for word in words if not word.startswith("--"))
        os.dup2(writer if name == "pipe" else os.open(f"{name}.out", os.O_CREAT | os.O_WRONLY), 1)
        os.dup2(os.open(f"{name}.err", os.O_CREAT | os.O_WRONLY), 2)
        os.close(reader), os.close(writer)
        words = [word for word in words if word.startswith("--")]
        launch(Options, setup, words, presets={"small": {"what": "exit"}}, prog="driver.py")
        sys.exit(0)
    os.close(writer)
    if name == "pipe":
        os.read(reader, 10)
    if name == "interrupt":
        while not (os.path.exists("interrupt.out") and open("interrupt.out").read()):
            time.sleep(0.05)
        # Twice, as from a terminal and a launcher that passes it on.
        os.kill(child, signal.SIGINT)
        time.sleep(0.2)
        os.kill(child, signal.SIGINT)
    os.close(reader)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    open(f"{name}.status", "w").write(str(status))
"""

OPTION = "error: unknown option --waht; did you mean --what?\ntry driver.py --help\n"
VALUE = "error: depth=3 must be even; use 4\n"
FILE = "error: {}[Errno 2] No such file or directory: '/nowhere/peaks.dat'\n"
LOSS = "error: loss=nan in update 7; lower the step size\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("launch")
    (folder / "driver.py").write_text(DRIVER)
    (folder / "serial.py").write_text(SERIAL)
    return folder


@pytest.fixture(scope="module")
def serial(folder):
    cases = [
        "good",
        "option --waht=crash",
        "value --what=value",
        "file --what=file",
        "loss --what=loss",
        "crash --what=crash",
        "thread --what=thread",
        "exit --what=exit",
        "preset --small",
        "interrupt --what=wait",
        "pipe --what=chatter",
        "openmpi OMPI_COMM_WORLD_SIZE=3 OMPI_COMM_WORLD_RANK=0",
        "slurm SLURM_NTASKS=3 SLURM_PROCID=0",
        "slurm1 SLURM_NTASKS=3 SLURM_PROCID=1",
    ]
    job = finish_job(start_job(["serial.py", *cases], env={"PYTHONPATH": str(PROJECT)}, cwd=folder), timeout=100)
    assert job.returncode == 0, job.stderr

    def result(name):
        out = folder / f"{name}.out"
        return subprocess.CompletedProcess(
            name,
            int((folder / f"{name}.status").read_text()),
            out.read_text() if out.exists() else "",
            _without_warning((folder / f"{name}.err").read_text()),
        )

    return result


def _without_warning(text):
    return re.sub(r".*UserWarning: take care\n.*\n", "", text)


def start(folder, *options):
    return start_job(["driver.py", *options], ranks=3, env={"PYTHONPATH": str(PROJECT)}, cwd=folder)


def test_a_good_run_has_one_thread(serial):
    job = serial("good")
    assert (job.returncode, job.stdout, job.stderr) == (0, "threads 1\n", "")


@pytest.mark.parametrize(
    "name, status, message",
    [("option", 2, OPTION), ("value", 2, VALUE), ("file", 2, FILE.format("")), ("loss", 1, LOSS)],
)
def test_on_one_rank_an_error_is_one_message(serial, name, status, message):
    job = serial(name)
    assert (job.returncode, job.stdout, job.stderr) == (status, "", message)


@pytest.mark.parametrize(
    "options, status, message",
    [
        (["--waht=crash"], 2, OPTION),
        (["--what=file", "--rank=1"], 2, FILE.format("rank 1 of 3: ")),
        (["--what=config"], 2, None),
        (["--what=loss"], 1, LOSS),
    ],
)
def test_on_three_ranks_an_error_is_one_message(folder, options, status, message):
    job = finish_job(start(folder, *options))
    # One warning at most: that of rank 0.
    assert job.stderr.count("UserWarning") <= 1
    said = _without_warning(job.stderr)
    assert job.returncode == status
    if message is None:
        assert re.match(r"error: rank 1 of 3: --config=/nowhere/run.yaml cannot be read: No such file", said)
        assert said.count("\n") == 1
    else:
        assert said == message


@pytest.mark.parametrize("name", ["crash", "thread"])
def test_on_one_rank_an_unexpected_exception_is_a_traceback(serial, name):
    job = serial(name)
    assert job.returncode == 1
    assert job.stderr.startswith("rank 0 of 1:\nTraceback")
    assert job.stderr.count("Traceback") == job.stderr.count("\nZeroDivisionError: ") == 1


@pytest.mark.parametrize(
    "options, culprit, error",
    [
        (["--what=crash"], 0, "ZeroDivisionError"),
        (["--what=thread", "--rank=2"], 2, "ZeroDivisionError"),
        (["--what=bug", "--rank=1"], 1, "KeyError"),
    ],
)
def test_an_unexpected_exception_ends_ranks_that_wait(folder, options, culprit, error):
    job = finish_job(start(folder, *options))
    said = _without_warning(job.stderr)
    assert job.returncode == 1
    assert said.startswith(f"rank {culprit} of 3:\nTraceback")
    assert said.count("Traceback") == said.count(f"\n{error}: ") == 1


@pytest.mark.parametrize("name, variable", [("openmpi", "OMPI_COMM_WORLD_SIZE"), ("slurm", "SLURM_NTASKS")])
def test_independent_runs_of_a_foreign_launcher_are_refused(serial, name, variable):
    job = serial(name)
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr.startswith(f"error: {variable}=3 but MPI sees 1 process(es)")
    assert job.stderr.count("\n") == 1


def test_of_independent_runs_only_the_first_speaks(serial):
    job = serial("slurm1")
    assert (job.returncode, job.stdout, job.stderr) == (2, "", "")


def test_ctrl_c_ends_one_rank(serial):
    job = serial("interrupt")
    assert (job.returncode, job.stderr) == (130, "interrupted\n")


def test_ctrl_c_ends_ranks_that_wait(folder):
    job = start(folder, "--what=wait")
    for _ in range(3):
        assert job.stdout.readline() == "waiting\n"
    job.send_signal(signal.SIGINT)
    ended = finish_job(job, timeout=20)
    assert ended.returncode == 130
    assert _without_warning(ended.stderr).startswith("interrupted\n")
    assert ended.stderr.count("interrupted") == 1 and "Traceback" not in ended.stderr


def test_a_reader_that_goes_away_is_no_traceback(serial):
    job = serial("pipe")
    assert (job.returncode, job.stderr) == (1, "")


def test_system_exit_passes_through(serial):
    assert serial("exit").returncode == 5


def test_presets_reach_the_options(serial):
    assert serial("preset").returncode == 5
