"""Measures messages between ranks, with the ranks of this job or with those of a small job of its own."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from math import log2
from pathlib import Path
from statistics import median

import torch

from xbraid_py.comm import Communicator, SerialCommunicator, world
from xbraid_py.comm.partition import Partition
from xbraid_py.planner.machine import CLUSTER, SHARED_MEMORY, Link, Machine
from xbraid_py.planner.measure import Slowdowns, Workload, cores_and_ranks, measure_costs, timed
from xbraid_py.problem.options import DenseResNetOptions

_REPEATS, _LAPS, _BURST = 7, 10, 50
_LARGE = 1 << 16  # bytes: less than this says nothing of the bandwidth
# What a launcher leaves in the environment; the small job must not see it.
_LAUNCHERS = (
    "TORCHELASTIC_",
    "PMI_",
    "PMI2_",
    "PMIX_",
    "OMPI_",
    "PRTE_",
    "PRRTE_",
    "SLURM_",
    "HYDI_",
    "HYDRA_",
    "MPI_LOCAL",
)


def measure_link(comm: Communicator, ranks: Sequence[int], num_bytes: int, num_rows: int) -> Link:
    """Messages around a ring of some ranks; the others wait. Every rank of the job must call it.

    Parameters
    ----------
    comm : Communicator
    ranks : sequence of int
        Two or more.
    num_bytes : int
        Of a large message: a state.
    num_rows : int
        Numbers in a collective: one for each layer.

    Returns
    -------
    Link
        The same on every rank.
    """
    counts = Partition.balanced(num_rows, comm.size).counts
    rows = torch.zeros(counts[comm.rank], dtype=torch.float64)

    def collective() -> None:
        for _ in range(_LAPS):
            comm.ordered_sum(rows, counts)

    small, large = torch.zeros(1), torch.zeros(max(_LARGE, num_bytes) // 4)
    found = []
    for _ in range(_REPEATS):
        hops = [timed(lambda t=t: _laps(comm, ranks, t)) / (_LAPS * len(ranks)) for t in (small, large)]
        comm.barrier()
        burst = timed(lambda: _burst(comm, ranks, small)) / _BURST
        comm.barrier()
        found.append((*hops, timed(collective) / _LAPS / log2(comm.size), burst))
    latency, hop, stage, burst = (median(column) for column in zip(*found, strict=True))
    # Where latencies scatter, the difference may vanish: ranks that take turns on a core.
    link = Link(latency, large.nbytes / max(hop - latency, 0.1 * hop), stage, "measured", burst)
    return comm.bcast(link, ranks[0])


def _laps(comm: Communicator, ranks: Sequence[int], tensor: torch.Tensor) -> None:
    """A message around the ring, some times."""
    if comm.rank not in ranks:
        return
    at = ranks.index(comm.rank)
    ahead, behind = ranks[(at + 1) % len(ranks)], ranks[at - 1]
    for _ in range(_LAPS):
        if at == 0:
            wait = comm.isend(tensor, ahead)
            comm.recv(tensor.new_empty(tensor.shape), behind)
            wait()
        else:
            comm.isend(comm.recv(tensor.new_empty(tensor.shape), behind), ahead)()


def _burst(comm: Communicator, ranks: Sequence[int], tensor: torch.Tensor) -> None:
    """Many messages from the first of some ranks to the second, as fast as they go."""
    if comm.rank == ranks[0]:
        for wait in [comm.isend(tensor, ranks[1]) for _ in range(_BURST)]:
            wait()
    elif comm.rank == ranks[1]:
        for _ in range(_BURST):
            comm.recv(tensor.new_empty(tensor.shape), ranks[0])


def measure_machine(workload: Workload, comm: Communicator, slowdowns: Slowdowns, network: Link = CLUSTER) -> Machine:
    """The machine that this job of several ranks runs on. Every rank must call it.

    Parameters
    ----------
    workload : Workload
    comm : Communicator
        Of two or more ranks.
    slowdowns : Slowdowns
        As `measure_costs` gives them.
    network : Link
        Between nodes, where all ranks are on one.
    """
    cores, on_node = cores_and_ranks(comm)
    shared = SHARED_MEMORY
    if on_node > 1:
        shared = measure_link(comm, range(on_node), workload.state_bytes, workload.num_layers)
    if on_node < comm.size:
        network = measure_link(comm, (0, on_node), workload.state_bytes, workload.num_layers)
    return Machine(cores, on_node, shared, network, slowdowns.contention, slowdowns.waiting)


def assumed_machine(network: Link = CLUSTER) -> Machine:
    """This node with assumed messages, for one rank that sends none."""
    cores, _ = cores_and_ranks(SerialCommunicator())
    return Machine(cores, cores, SHARED_MEMORY, network)


def probe_machine(workload: Workload, network: Link = CLUSTER, timeout: float = 60.0) -> Machine:
    """This node, for a job of one rank: contention and messages by a job of as many ranks as cores, eight at most.

    Without an `mpirun` beside this Python, or where that job fails, messages are assumed, and the `source` of the
    links says so.
    """
    mpirun = Path(sys.executable).with_name("mpirun")
    machine = assumed_machine(network)
    if not mpirun.exists():
        return machine
    given = {
        "num_layers": workload.num_layers,
        "batch": workload.batch,
        "dtype": str(workload.dtype).removeprefix("torch."),
        "architecture": dataclasses.asdict(workload.architecture),
    }
    ranks = min(max(2, machine.cores), 8)
    root = str(Path(__file__).resolve().parents[2])
    env = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHERS)}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, (root, env.get("PYTHONPATH"))))}
    command = [str(mpirun), "-n", str(ranks), sys.executable, "-m", "mpi4py", "-m", __name__, json.dumps(given)]
    try:
        done = subprocess.run(
            command, env=env, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL
        )
        found = json.loads(done.stdout.splitlines()[-1])
    except (subprocess.TimeoutExpired, OSError, IndexError, json.JSONDecodeError):
        return machine
    return dataclasses.replace(machine, shared=Link(**found["shared"]), contention=found["contention"])


def main(given: dict) -> None:
    """The small job: measures, and prints what it has found as JSON on rank 0."""
    torch.set_num_threads(1)
    comm = world()
    # Messages of the solves do not depend on how the weights come about.
    architecture = DenseResNetOptions(**given.pop("architecture") | {"splines": None})
    workload = Workload(architecture=architecture, **given | {"dtype": getattr(torch, given["dtype"])})
    _, slowdowns = measure_costs(workload, comm)
    machine = measure_machine(workload, comm, slowdowns)
    if comm.rank == 0:
        print(json.dumps({"shared": dataclasses.asdict(machine.shared), "contention": machine.contention}))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
