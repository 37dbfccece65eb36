"""DataLoader workers under a launcher: the program of docs/programs.md, and programs that begin MPI at their top."""

import re
import sys
import types

import pytest
from processes import PROJECT, finish_job, run_job, start_job

from xbraid_py.comm import SerialCommunicator, kinds

pytestmark = [pytest.mark.job, pytest.mark.timeout(200)]

PAGE = (PROJECT / "docs" / "programs.md").read_text()
PROGRAM, OF_MPI = re.findall(r"^ *```python\n(.*?)^ *```", PAGE, re.M | re.S)
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}


def run(folder, source: str, method: str, torchrun: bool = False):
    """The program on two ranks."""
    path = folder / "program.py"
    path.write_text(source)
    if torchrun:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, path, method]
        return finish_job(start_job(words, fresh=True), timeout=100)
    return run_job([path, method], 2, timeout=100)


def loss_of(job) -> str:
    """What the program has printed, of two ranks."""
    assert job.returncode == 0, job.stderr
    (found,) = re.findall(r"2 ranks, loss (\d\.\d{4})\n", job.stdout)
    return found


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_program_of_the_page(tmp_path, method):
    # The same samples in the same order as without workers.
    alone = PROGRAM.replace("num_workers=2, multiprocessing_context=method", "num_workers=0")
    assert alone != PROGRAM
    assert loss_of(run(tmp_path, PROGRAM, method)) == loss_of(run(tmp_path, alone, method))


def test_the_ranks_of_torchrun_have_workers_too(tmp_path):
    loss_of(run(tmp_path, PROGRAM, "spawn", torchrun=True))


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_the_world_may_stand_at_the_top(tmp_path, method):
    line = "    comm = xbraid_py.world()\n"
    source = PROGRAM.replace(line, "").replace("\n\ndef main", "\ncomm = xbraid_py.world()\n\n\ndef main")
    assert source.count("comm = xbraid_py.world()") == 1 and line not in source
    loss_of(run(tmp_path, source, method))


@pytest.mark.parametrize(
    ("name", "main", "environment", "serial"),
    [
        ("__mp_main__", "a worker", {}, True),
        ("__mp_main__", "a worker of torchrun", TORCHRUN | {"TORCHELASTIC_RUN_ID": "none"}, True),
        ("__mp_main__", "a rank by torch.multiprocessing.spawn", TORCHRUN, False),
        ("__main__", "a rank", TORCHRUN, False),
    ],
)
def test_who_is_a_worker(monkeypatch, name, main, environment, serial):
    monkeypatch.setitem(sys.modules, "__mp_main__", types.ModuleType(name, main))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.delenv("PMI_SIZE", raising=False)
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    monkeypatch.setattr(kinds.process_group, "is_there", lambda: False)
    monkeypatch.setattr(kinds.process_group, "world", lambda: "torch's")
    assert isinstance(kinds.world(), SerialCommunicator) == serial


def test_mpi_at_the_top_needs_the_words_of_the_page(tmp_path):
    words = re.sub(r"^  ", "", OF_MPI, flags=re.M)
    loss_of(run(tmp_path, words + PROGRAM, "spawn"))
    bare = "from mpi4py import MPI\n"
    assert words.endswith(bare)
    job = run(tmp_path, bare + PROGRAM, "spawn")
    assert job.returncode != 0 and re.search(r"DataLoader worker \(pid\(s\) .*exited unexpectedly", job.stderr)
