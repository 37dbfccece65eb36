"""What killed jobs leave on a node goes, and what living ones use stays."""

from __future__ import annotations

import mmap
import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import PROJECT

from xbraid_py.comm import leftovers

pytestmark = pytest.mark.skipif(
    not Path("/dev/shm").is_dir() or not Path("/proc/self/maps").exists(), reason="no Linux"
)

# By which launchers number the ranks.
NUMBERS = ("MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "SLURM_LOCALID", "PMI_SIZE")

DRIVER = """
import os, signal
from dataclasses import dataclass
from xbraid_py.run.launch import launch

@dataclass(frozen=True)
class Options:
    rank: int = -1

def setup(options, comm):
    def run():
        maps = open("/proc/self/maps").read().split("\\n")
        names = {line.split()[5] for line in maps if "/dev/shm/mpich_shm" in line}
        assert comm.size == 1 or names and not any(map(os.path.exists, names)), names
        comm.barrier()
        if comm.rank == options.rank:
            os.kill(os.getpid(), signal.SIGKILL)
        comm.barrier()
    return run

if __name__ == "__main__":
    launch(Options, setup)
"""


@pytest.fixture
def make():
    """`make(folder, name, age)`: the path of a new file, so many seconds old; all of them go after the test."""
    made = []

    def make(name: str, age: float, kind: str = "file") -> Path:
        path = Path("/dev/shm" if name.startswith("mpich") else "/tmp") / name
        made.append(path)
        if kind == "file":
            path.write_bytes(b"\0" * mmap.PAGESIZE)
            os.utime(path, (time.time() - age,) * 2)
        elif kind == "link":
            path.symlink_to("/dev/null")
        else:
            os.mkfifo(path)
        return path

    yield make
    for path in made:
        path.unlink(missing_ok=True)


def name() -> str:
    return f"mpich_shm_{secrets.token_hex(4)}_0"


def test_shared_memory_of_dead_jobs_goes(make, monkeypatch):
    for variable in NUMBERS:
        monkeypatch.delenv(variable, raising=False)
    dead, young, mapped, opened = (make(name(), age) for age in (1e6, 0, 1e6, 1e6))
    others = [make(f"mpich_shm_{secrets.token_hex(4)}", 1e6), make(name(), 0, "link"), make(name(), 0, "pipe")]
    with mapped.open("r+b") as file:
        memory = mmap.mmap(file.fileno(), mmap.PAGESIZE)
    with opened.open("rb"):
        found = leftovers.remove_dead()
        assert not dead.exists()  # another job that starts just now may have been faster
        for path in (young, mapped, opened, *others):
            assert path not in found and os.path.lexists(path)
        monkeypatch.setenv("MPI_LOCALRANKID", "1")
        make(name(), 1e6)
        assert leftovers.remove_dead() == []
        monkeypatch.delenv("MPI_LOCALRANKID")
    # Another process, a rank that does not come to its end, keeps its memory for as long as it lives.
    memory.close()
    code = (
        f"import mmap; f = open({str(mapped)!r}, 'r+b'); m = mmap.mmap(f.fileno(), 4096); print(1, flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"1\n"
        leftovers.remove_dead()
        assert mapped.exists() and not opened.exists()
        job.kill()
    leftovers.remove_dead()
    assert not mapped.exists()


def test_files_of_a_launcher_stay_while_one_is_there_that_may_have_made_them(make, monkeypatch):
    for variable in NUMBERS:
        monkeypatch.delenv(variable, raising=False)
    code = "open('/proc/self/comm', 'w').write('hydra_pmi_proxy'); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        job.stdout.readline()
        old, new = make(f"hydra_hwloc_xmlfile_{secrets.token_hex(3)}", 1e9), make("hydra_hwloc_xmlfile_abcDEF", 0)
        leftovers.remove_dead(now=time.time() + 60)
        assert new.exists() and not old.exists()
        job.kill()


@pytest.mark.job
def test_a_killed_job_leaves_no_shared_memory(run_job, tmp_path):
    (tmp_path / "driver.py").write_text(DRIVER)
    for rank, status in ((-1, 0), (1, 128 + signal.SIGKILL)):
        job = run_job([tmp_path / "driver.py", f"--rank={rank}"], 3, env={"PYTHONPATH": str(PROJECT)})
        assert job.returncode in (status, status % 128), job.stderr
        assert "AssertionError" not in job.stderr
