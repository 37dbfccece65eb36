"""Jobs of tests as forks of a python that has torch loaded: the same as new interpreters in all that can be seen."""

import os
import signal
import subprocess
import sys
import time

import pytest
from processes import PROJECT, end_job, finish_job, fork_server, job_environment, run_job, start_job

pytestmark = pytest.mark.job

INNER = "import sys; print(__name__, __package__, __file__, sys.argv, sys.path)"
RAISES = "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError from error"
# As a file: its names, pickles of them, a thread that ends after it, and the end of all.
PROGRAM = """
from __future__ import annotations
import atexit, dataclasses, os, pickle, sys, threading, time, typing

@dataclasses.dataclass
class Point:
    x: int

def late():
    time.sleep(0.1)
    print("late", Point)

atexit.register(print, "end")
threading.Thread(target=late).start()
print(__name__, __file__, __doc__, sys.argv, sys.path, sys.orig_argv, os.getcwd(), os.environ["EXTRA"])
print(pickle.loads(pickle.dumps(Point(3))), typing.get_type_hints(Point), sys.modules["__main__"].Point is Point)
print(sys.stdin.read() == "", sys.stdout.isatty(), sys.stdout.seekable(), sys.stdout.encoding, sys.stdout.errors)
print(os.getsid(0) == os.getpid() == os.getpgrp(), len(os.listdir("/proc/self/fd")))
"""
SIGNALS = "import signal; print({number: signal.getsignal(number) for number in signal.valid_signals()}); "
PROGRAMS = {
    "file": ["program.py", "a", "--b=c"],
    "module": ["-m", "folder.inner", "x"],
    "code": ["-c", "print(globals().keys()); import sys; print(sys.argv, sys.path, sys.orig_argv, __name__)", "-x"],
    "signals": ["-c", SIGNALS + "print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))"],
    "status": ["-c", "import sys; print('said'); sys.exit(75)"],
    "message": ["-c", "import sys; sys.exit('what is wrong')"],
    "exception": ["-c", "def f():\n    1 / 0\n\nf()"],
    "hook": ["-c", "import sys; sys.excepthook = lambda *error: print(error[:2]); raise ValueError('wrong')"],
    "cause": ["raises.py"],
    "terminated": ["-c", "import os, signal; print('lost'); os.kill(os.getpid(), signal.SIGTERM)"],
    "at once": ["-c", "import os; os._exit(3)"],
    "serial": ["-c", "from xbraid_py.comm import world; print(type(world()))"],
}


@pytest.fixture(autouse=True)
def forks(monkeypatch):
    """Forks, whatever the tests of other files run with."""
    if not hasattr(os, "pidfd_open"):
        pytest.skip("no forks on this system")
    monkeypatch.delenv("XBRAID_FRESH_JOBS", raising=False)


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_fork_is_as_a_new_interpreter(tmp_path, name):
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "raises.py").write_text(
        "try:\n    1 / 0\nexcept ZeroDivisionError as error:\n    raise KeyError from error"
    )
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "inner.py").write_text(
        "import sys; print(__name__, __package__, __file__, sys.argv, sys.path)"
    )
    forked, new = (
        run_job(PROGRAMS[name], env={"EXTRA": "given"}, cwd=tmp_path, fresh=fresh) for fresh in (False, True)
    )
    assert (forked.returncode, forked.stdout, forked.stderr) == (new.returncode, new.stdout, new.stderr)
    assert forked.stdout or forked.stderr or name in ("terminated", "at once")


def test_ctrl_c_ends_a_fork_as_a_signal():
    job = start_job(["-c", "import time; print('here', flush=True); time.sleep(100)"])
    assert job.stdout.readline() == "here\n"
    job.send_signal(signal.SIGINT)
    job = finish_job(job)
    assert job.returncode == -signal.SIGINT and job.stderr.endswith("\nKeyboardInterrupt\n")


LOADED = ["-c", "import sys; print('torch' in sys.modules, 'xbraid_py' in sys.modules)"]


def test_torch_is_loaded_and_nothing_of_ours():
    assert run_job(LOADED).stdout == "True False\n"
    # What is read when torch is loaded comes too late for a fork.
    for other in ({"fresh": True}, {"env": {"OMP_NUM_THREADS": "2"}}, {"env": {"PYTHONHASHSEED": "1"}}):
        assert run_job(LOADED, **other).stdout == "False False\n"
    assert run_job(["-I", *LOADED]).stdout == "False False\n"


def test_forks_draw_different_numbers():
    code = "import random, numpy; print(random.random(), numpy.random.rand())"
    first, second = (run_job(["-c", code]).stdout.split() for _ in range(2))
    assert not set(first) & set(second)


def test_many_at_once_with_much_output():
    code = "import sys; print(sys.argv[1] * 200_000); print('e' * 200_000, file=sys.stderr); sys.exit(int(sys.argv[1]))"
    jobs = [start_job(["-c", code, number]) for number in range(6)]
    for number, job in enumerate(jobs):
        done = finish_job(job)
        assert (done.returncode, done.stdout) == (number, str(number) * 200_000 + "\n")
        assert len(done.stderr) == 200_001


def test_its_process_id_is_free_once_its_end_is_known():
    job = start_job(["-c", "import time; time.sleep(100)"])
    with pytest.raises(subprocess.TimeoutExpired):
        job.communicate(timeout=0.1)
    assert job.poll() is None
    os.kill(job.pid, 0)
    job.kill()
    assert (job.wait(), job.poll(), job.returncode) == (-signal.SIGKILL,) * 3
    with pytest.raises(ProcessLookupError):
        os.kill(job.pid, 0)
    assert end_job(job) == ("", "")


RANK = """
import os, signal, sys
from xbraid_py.comm import world
comm = world()
signal.signal(signal.SIGUSR1, lambda number, frame: os.write(1, b"asked\\n"))
said = comm.gather([comm.rank, comm.size, os.getcwd(), sys.argv[1:]])
print(said, flush=True) if comm.rank == 0 else None
signal.pause() if "pause" in sys.argv else None
sys.exit(5 if comm.rank == 1 else 0)
"""


@pytest.mark.parametrize("fresh", [False, pytest.param(True, marks=pytest.mark.long)], ids=["forked", "new"])
def test_ranks_of_a_launcher(tmp_path, fresh):
    job = run_job(["-c", RANK, "a"], 3, cwd=tmp_path, fresh=fresh)
    assert (job.returncode, job.stderr) == (5, "")
    assert job.stdout == f"{[[rank, 3, str(tmp_path), ['a']] for rank in range(3)]}\n"
    job = start_job(["-c", RANK, "pause"], 2, fresh=fresh)
    job.stdout.readline()
    time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)  # which the launcher passes on to all
    job = finish_job(job)
    assert (job.returncode, job.stdout, job.stderr) == (5, "asked\n" * 2, "")


OWNER = """
import os, sys, time
from processes import start_job
write = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(100)"
files = [f"{sys.argv[1]}/{which}" for which in range(2)]
jobs = [start_job(["-c", write, file]) for file in files]
while not all(os.path.exists(file) and os.path.getsize(file) for file in files):
    time.sleep(0.01)
os.kill(os.getpid(), 9)
"""


def test_forks_end_with_the_process_that_asked_for_them(tmp_path):
    subprocess.run([sys.executable, "-c", OWNER, tmp_path], env=job_environment(), cwd=PROJECT, timeout=60)
    for file in tmp_path.iterdir():
        while os.path.exists(f"/proc/{file.read_text()}"):
            time.sleep(0.01)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_server_that_has_ended_is_an_error(monkeypatch):
    server = type(fork_server)(job_environment())
    try:
        assert server.start(["-c", "pass"], job_environment(), PROJECT).wait() == 0
        job = server.start(["-c", "import time; time.sleep(100)"], job_environment(), PROJECT)
        server.process.kill()
        with pytest.raises(EOFError, match="the fork server has ended"):
            job.wait()
        os.kill(job.pid, signal.SIGKILL)
    finally:
        server.stop()
