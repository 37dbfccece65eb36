"""Jobs that `torchrun` has started, without mpi4py: programs, drivers, how they end, and replicas by torch itself."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
from processes import PROJECT, finish_job, run_job, start_job

from xbraid_py.run.record import read

pytestmark = [pytest.mark.job, pytest.mark.timeout(300)]

# As if mpi4py were not installed; python loads a module of this name when it starts.
WITHOUT_MPI4PY = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mpi4py":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""

PROGRAM = """
import torch
from torch import nn
import xbraid_py

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(4), nn.Linear(4, 4)

    def forward(self, u):
        return torch.tanh(self.linear(self.norm(u)))

comm = xbraid_py.world()
torch.manual_seed(0)
stack = xbraid_py.LayerParallel(block=Block, num_layers=32, T=2.0, comm=comm)
model = nn.Sequential(nn.Linear(3, 4), stack, nn.Linear(4, 2))
optimizer = torch.optim.Adam(model.parameters())
images, labels = torch.randn(16, 3), torch.arange(16) % 2
for _ in range(4):
    optimizer.zero_grad()
    loss = nn.functional.cross_entropy(model(images), labels)
    loss.backward()
    optimizer.step()
    if comm.rank == 0:
        print(comm.size, loss.item().hex())
"""


def launcher(ranks: int) -> list:
    """The torchrun of this environment."""
    return ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]


def torchrun(words, ranks: int = 2, timeout: float = 120, **options):
    """A job of some ranks, run to its end."""
    return run_job([*launcher(ranks), *words], timeout=timeout, **options)


@pytest.fixture(scope="module")
def no_mpi(tmp_path_factory) -> dict[str, str]:
    """An environment in which no process can import mpi4py."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(WITHOUT_MPI4PY)
    paths = (folder, PROJECT, os.environ.get("PYTHONPATH"))
    return {"PYTHONPATH": os.pathsep.join(str(path) for path in paths if path)}


def test_the_program_of_the_readme_under_both_launchers(tmp_path, no_mpi):
    """Unchanged, and without mpi4py where there is torchrun."""
    block = re.search(r"^```python\n(.*?)^```", (PROJECT / "README.md").read_text(), re.M | re.S)
    path = program(tmp_path, block[1])
    jobs = run_job([path], ranks=2), torchrun([path], env=no_mpi)
    assert [job.returncode for job in jobs] == [0, 0], [job.stderr for job in jobs]
    assert jobs[0].stdout == jobs[1].stdout and jobs[0].stdout.count("SolveRecord(update=2, ") == 1


def program(folder: Path, text: str) -> Path:
    """A file with a program."""
    file = folder / "train.py"
    file.write_text(text)
    return file


def test_a_program_is_the_same_under_mpirun_and_torchrun(tmp_path, no_mpi):
    file = program(tmp_path, PROGRAM)
    ours = torchrun([file], env=no_mpi)
    theirs = run_job([file], ranks=2)
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr
    assert ours.stdout == theirs.stdout and len(ours.stdout.splitlines()) == 4
    assert "Warning" not in ours.stderr


NO_LIBRARY = {"MPI4PY_LIBMPI": "/nowhere/libmpi.so"}  # read by mpi4py


@pytest.mark.parametrize("has_mpi4py", [False, True])
def test_one_process_needs_no_mpi(tmp_path, no_mpi, has_mpi4py):
    job = run_job([program(tmp_path, PROGRAM)], env=NO_LIBRARY if has_mpi4py else no_mpi, fresh=True)
    assert job.returncode == 0 and job.stdout.startswith("1 0x"), job.stderr


def test_several_processes_of_mpi_need_it(tmp_path, no_mpi):
    job = run_job([program(tmp_path, PROGRAM)], env=no_mpi | {"PMI_SIZE": "3", "PMI_RANK": "1"}, fresh=True)
    assert job.returncode == 1
    assert (
        "LaunchError: a launcher of MPI has started 3 processes, but mpi4py is not installed; install it, or start "
        "with `torchrun --nproc-per-node 3`, which needs no MPI" in job.stderr
    )


def test_a_driver_is_the_same_under_mpirun_and_torchrun(tmp_path, no_mpi):
    driver = [PROJECT / "drivers" / "peaks.py", "--smoke"]
    ours = torchrun([*driver, "--out", tmp_path / "torch"], env=no_mpi)
    theirs = run_job([*driver, "--out", tmp_path / "mpi"], ranks=2)
    assert ours.returncode == theirs.returncode == 0, ours.stderr + theirs.stderr

    def updates(name):
        rows = read(tmp_path / name / "metrics.jsonl")
        return [{key: row[key] for key in row if key != "seconds"} for row in rows if row["kind"] == "update"]

    assert updates("torch") == updates("mpi") and len(updates("mpi")) > 10
    again = torchrun([*driver, "--out", tmp_path / "mpi", "--resume", "auto"], ranks=3, env=no_mpi)
    assert again.returncode == 0 and "final validation accuracy" in again.stdout, again.stderr


def test_a_stack_of_one_process_among_several_says_so(tmp_path, no_mpi):
    job = torchrun([program(tmp_path, PROGRAM.replace("comm=comm", "comm=None"))], env=no_mpi)
    assert job.returncode == 0
    assert job.stderr.count("UserWarning: comm=None with WORLD_SIZE=2: each process works alone, on all layers") == 2


def test_a_request_to_torchrun_ends_the_update(tmp_path, no_mpi):
    driver = [PROJECT / "drivers" / "peaks.py", "--smoke", "--nested.updates=2,5000", "--out", tmp_path]
    job = start_job([*launcher(2), *driver], env=no_mpi, fresh=True)
    record, until = tmp_path / "metrics.jsonl", time.monotonic() + 100
    while time.monotonic() < until and not (record.exists() and len(record.read_text().splitlines()) > 5):
        time.sleep(0.1)
    os.kill(job.pid, signal.SIGTERM)
    ended = finish_job(job, timeout=60)
    assert ended.stderr.count("stopped by SIGTERM after update") == 1 and "SIGKILL" not in ended.stderr, ended.stderr
    assert list((tmp_path / "checkpoints").glob("update_*.h5"))


DRIVER = """
import os, sys, time
from dataclasses import dataclass
import torch
from xbraid_py.run.launch import launch

@dataclass(frozen=True)
class Options:
    how: str = "error"
    patience: float = 300.0

def setup(options, comm):
    if options.how == "setup" and comm.rank == 1:
        raise ValueError("nothing to read; use a file")

    def run():
        comm.barrier()
        if comm.rank < comm.size - 1:
            comm.recv(torch.empty(3), comm.size - 1)
        elif options.how == "error":
            raise ZeroDivisionError("on purpose")
        elif options.how == "killed":
            os.kill(os.getpid(), 9)
        time.sleep(200)

    return run

launch(Options, setup)
"""


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--how=error"], ["rank 2 of 3:\nTraceback", "ZeroDivisionError: on purpose"]),
        (["--how=killed"], ["rank 0 of 3: another rank is gone", "rank 1 of 3: another rank is gone"]),
        (["--how=setup"], ["error: rank 1 of 3: nothing to read; use a file"]),
        (
            ["--how=late", "--patience=3"],
            ["error: no message for 3 seconds (--patience)\nrank 0: waits for rank 2", "\nrank 2: works, in "],
        ),
    ],
    ids=["error", "killed", "setup", "late"],
)
def test_ranks_that_wait_and_ranks_that_work_end_with_the_one_that_fails(tmp_path, words, said):
    # Torchrun gives them 30 seconds before it kills them, and says so.
    job = torchrun([program(tmp_path, DRIVER), *words], ranks=3)
    assert job.returncode == 1
    assert all(text in job.stderr for text in said), job.stderr
    assert ("SIGKILL" in job.stderr) == ("--how=killed" in words)


REPLICAS = """
import json, sys
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
import xbraid_py

dist.init_process_group("gloo")
grid = xbraid_py.ProcessGrid(dist.group.WORLD, replicas=int(sys.argv[1]))
mesh = grid.device_mesh()
x, y = torch.randn(2, 8, 3, generator=torch.Generator().manual_seed(0))

def model():
    torch.manual_seed(0)
    stack = xbraid_py.LayerParallel(lambda: nn.Linear(3, 3), 8, 2.0, grid.layers, mgrit=xbraid_py.MGRIT(max_levels=1))
    return nn.Sequential(nn.Linear(3, 3), stack, nn.Linear(3, 3))

def gradients(made, called=None):
    nn.functional.mse_loss((called or made)(grid.shard(x)), grid.shard(y)).backward()
    grads = [parameter.grad for parameter in made.parameters()]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]

expected = model()
gradients(expected)
grid.average_gradients(expected)
expected = [parameter.grad for parameter in expected.parameters()]

def distance(found):
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True))

whole = model()
found = {"mesh": mesh.mesh.tolist(), "names": mesh.mesh_dim_names}
found["ddp"] = distance(gradients(whole, DistributedDataParallel(whole, process_group=mesh.get_group("replicas"))))
ends = model()
for part in (ends[0], ends[2]):
    fully_shard(part, mesh=mesh["replicas"])
gradients(ends)
grid.average_gradients(ends[1])
grads = [parameter.grad for parameter in ends.parameters()]
found["fsdp"] = distance([grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads])
try:
    wrong = model()
    found["everybody"] = distance(gradients(wrong, DistributedDataParallel(wrong)))
except ValueError as error:
    found["everybody"] = str(error)
wrong = model()
fully_shard(wrong)
try:
    gradients(wrong)
    torch.optim.SGD(wrong.parameters(), 0.1).step()
    found["sharded by everybody"] = "nothing said"
except RuntimeError as error:
    found["sharded by everybody"] = str(error)
both = [None, None] if dist.get_rank() == 0 else None
dist.gather_object(found, both, 0)
if both:
    print(json.dumps(both))
dist.destroy_process_group()
"""
REFUSED = (
    "DistributedDataParallel takes ranks 0, 1 for replicas, but they share the layers out; give it process_group="
    "mesh.get_group('replicas'), with mesh = xbraid_py.ProcessGrid(comm, replicas).device_mesh(), or wrap only what "
    "lies around the stack"
)
SHARDS_REFUSED = (
    "fully_shard takes ranks 0, 1 for owners of the same weights, but they share the layers out; shard what lies "
    "around the stack alone: fully_shard(head, mesh=mesh['replicas']), with mesh = "
    "xbraid_py.ProcessGrid(comm, replicas).device_mesh()"
)


@pytest.mark.parametrize(
    ("replicas", "mesh"), [(2, [[0], [1]]), (1, [[0, 1]])], ids=["two replicas", "one, of two ranks"]
)
def test_torch_averages_over_the_replicas_of_a_grid_and_not_over_ranks_that_share_layers(
    tmp_path, no_mpi, replicas, mesh
):
    job = torchrun([program(tmp_path, REPLICAS), replicas], env=no_mpi)
    assert job.returncode == 0, job.stderr
    for found in json.loads(job.stdout):
        assert found["mesh"] == mesh and found["names"] == ["replicas", "layers"]
        assert found["ddp"] < 1e-6 and found["fsdp"] < 1e-6
        assert found["everybody"] == REFUSED if replicas == 1 else found["everybody"] < 1e-6
        assert found["sharded by everybody"] == (SHARDS_REFUSED if replicas == 1 else "nothing said")


def test_a_mesh_is_of_ranks_of_torch():
    code = "import xbraid_py as xb; xb.ProcessGrid(None).device_mesh()"
    job = run_job(["-c", code])
    assert "ValueError: 1 rank(s) that are not all those of a process group of torch.distributed" in job.stderr


NESTED = """
import torch.distributed as dist
import xbraid_py
comm = xbraid_py.world()
part = comm.split(int(comm.rank == 2))
pair = comm.split(int(comm.rank == 0))
# The ranks have been in different numbers of groups by now.
again = part.split(0, -part.rank)
everybody = comm.split(0, -comm.rank)
found = comm.gather((again.size, again.rank, everybody.rank, sum(everybody.bcast(everybody.gather(pair.size)))))
if comm.rank == 0:
    print(found)
"""


def test_groups_of_ranks_that_are_in_other_groups(tmp_path, no_mpi):
    job = torchrun([program(tmp_path, NESTED)], ranks=3, env=no_mpi)
    assert job.stdout == "[(2, 1, 2, 5), (2, 0, 1, 5), (1, 0, 0, 5)]\n", job.stderr
