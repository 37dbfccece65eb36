"""Programs of one's own on two ranks: what hangs elsewhere ends, with the calls and the ranks, and the way out."""

from __future__ import annotations

import time

import pytest
from processes import run_job, start_job

pytestmark = [pytest.mark.job, pytest.mark.timeout(300)]
LAUNCHERS = ["mpirun", "torchrun"]
# Each kind of launcher on each number of ranks for one habit; the others once by either.
JOBS = [("mpirun", 2), ("torchrun", 3)]

PROGRAM = """
import os, sys, time, torch
from torch import nn
import xbraid_py

comm = xbraid_py.world()
torch.manual_seed(0)
model = nn.Sequential(xbraid_py.LayerParallel(lambda: nn.Linear(4, 4), 8, 1.0, comm), nn.Linear(4, 2))
optimizer = torch.optim.SGD(model.parameters(), 0.1)


def step():
    optimizer.zero_grad()
    model(torch.ones(3, 4)).square().sum().backward()
    optimizer.step()


step()
{habit}
step()
print(f"done {{comm.rank}}\\n", end="", flush=True)
"""

HABITS = {
    "state_dict": (
        "if comm.rank == 0: torch.save(model.state_dict(), os.devnull)",
        "ranks are in different calls: state_dict() on rank 0 but forward() on rank 1",
    ),
    "evaluation": (
        "if comm.rank == 0:\n    with torch.no_grad(): model.eval()(torch.ones(3, 4))",
        "shape and mode of the input",
    ),
    "a batch less": (
        "if comm.rank == 0: step()",
        "ranks are in different calls: forward() on rank 0 but the end of the program on rank 1",
    ),
    "no backward": (
        "if comm.rank == 0: model(torch.ones(3, 4)).sum().backward()\nelse: model(torch.ones(3, 4))",
        "ranks are in different calls: backward() on rank 0 but forward() on rank 1",
    ),
    "plain module": (
        "if comm.rank == 0: xbraid_py.to_sequential(model)",
        "ranks are in different calls: to_sequential() on rank 0 but forward() on rank 1",
    ),
    "exit": (
        "if comm.rank > 0: sys.exit(3)",
        "ranks are in different calls: forward() on rank 0 but the end of the program on rank 1",
    ),
}


def words_of(launcher: str, path, ranks: int) -> tuple[list, int]:
    """What starts a program on so many ranks, and the ranks that are for `mpirun`."""
    if launcher == "mpirun":
        return [path], ranks
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks, path], 1


def run(launcher: str, path, ranks: int = 2, **options):
    """The program, to its end."""
    words, processes = words_of(launcher, path, ranks)
    return run_job(words, ranks=processes, timeout=120, **options)


@pytest.fixture
def program(tmp_path):
    """Writes the program with a habit in it; its path."""

    def write(habit: str):
        path = tmp_path / "program.py"
        path.write_text(PROGRAM.format(habit=habit))
        return path

    return write


@pytest.mark.parametrize(
    ("which", "launcher", "ranks"),
    [*((which, *job) for which in HABITS for job in JOBS), ("state_dict", "mpirun", 3), ("state_dict", "torchrun", 2)],
)
def test_ranks_that_make_other_calls_end(program, which, launcher, ranks):
    habit, message = HABITS[which]
    done = run(launcher, program(habit), ranks)
    said = message if ranks == 2 else message.replace("on rank 1", "on ranks 1-2")
    assert done.returncode != 0 and said in done.stderr
    assert "cannot stand behind `if rank == 0:`" in done.stderr and "done 0" not in done.stdout


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_exception_on_one_rank_ends_all(program, launcher, ranks):
    done = run(launcher, program("if comm.rank == 1: raise KeyError('here')"), ranks)
    said = f"rank 1 of {ranks}:\n" if launcher == "mpirun" else "[rank1]: Traceback"  # torch's own words
    assert done.returncode != 0 and said in done.stderr and "KeyError: 'here'" in done.stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_an_exception_on_all_ranks_is_said_once(program, launcher):
    done = run(launcher, program("raise KeyError('here')"))
    assert done.returncode != 0 and done.stderr.count("KeyError: 'here'") == 1


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_that_does_not_come(program, launcher):
    words, processes = words_of(launcher, program("if comm.rank == 1: time.sleep(1000)"), 2)
    job = start_job(words, processes, {"XBRAID_PATIENCE": "2"})
    stdout, stderr = job.communicate(timeout=120)
    assert job.returncode != 0 and "no message for 2 seconds (XBRAID_PATIENCE)" in stderr
    assert "rank 0: waits for rank 1" in stderr and "its last call for all ranks is forward()" in stderr
    assert "rank 1: works, in " in stderr and "program.py" in stderr and "is backward()" in stderr


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_may_work_on_after_the_others(program, launcher):
    # Longer than the patience: at the end of the program a rank waits for as long as it takes.
    start = time.monotonic()
    path = program("pass")
    path.write_text(path.read_text() + "\nif comm.rank == 0: time.sleep(6)\nprint('over', flush=True)")
    words, processes = words_of(launcher, path, 2)
    job = start_job(words, processes, {"XBRAID_PATIENCE": "2"})
    stdout, stderr = job.communicate(timeout=120)
    assert job.returncode == 0, stderr
    assert stdout.count("over") == 2
    assert time.monotonic() - start > 6


def test_a_patience_that_is_none(program):
    done = run("mpirun", program("pass"), env={"XBRAID_PATIENCE": "soon"})
    assert done.returncode != 0 and "XBRAID_PATIENCE=soon must be seconds above 0, or inf; use 300" in done.stderr
