"""Measures what layers of a given width, batch and type cost here: medians of interleaved rounds, in seconds.

All ranks of a job take part: the first alone for the costs, all cores at once for how much they slow each other down.
"""

from __future__ import annotations

import os
import socket
import time
from dataclasses import dataclass
from statistics import median

from xbraid_py.comm import Communicator
from xbraid_py.planner.machine import Costs, SolveCosts, StepCost
from xbraid_py.planner.probe import COARSE, PARTS, Probe, Workload, coarse_layers, timed

# Depth of the largest network that is timed: states beyond the caches, but seconds in all; in whole intervals.
_PROBE_BYTES, _PROBE_SECONDS, _WHOLE = 96 << 20, 0.06, 8
_LEAST_ROUNDS, _MOST_ROUNDS, _CROWD_ROUNDS = 5, 25, 9


@dataclass(frozen=True)
class Slowdowns:
    """How ranks of a node slow each other down, see `Machine`; as here where a job cannot show it."""

    contention: float = 1.0
    waiting: float = 0.0


def measure_costs(workload: Workload, comm: Communicator, seconds: float = 1.5) -> tuple[Costs, Slowdowns]:
    """What layers cost on one rank alone, and how ranks slow each other down.

    Every rank of the job must call it; the numbers are those of rank 0, on every rank.

    Parameters
    ----------
    workload : Workload
        The network that is timed has its layers, or fewer where that takes too long or too much memory.
    comm : Communicator
    seconds : float
        About how long to measure the costs; five rounds at least are made.

    Returns
    -------
    costs : Costs
    slowdowns : Slowdowns
    """
    cores, on_node = cores_and_ranks(comm)
    probe = medians = None
    if comm.rank == 0:
        layers = _affordable(workload)
        probe = Probe(workload, layers)
        first = timed(probe.round)
        number = min(_MOST_ROUNDS, max(_LEAST_ROUNDS, int(seconds / first)))
        comm.bcast((layers, number * first))
        rounds = [probe.round() for _ in range(number)]
        medians = {name: median(each[name] for each in rounds) for name in rounds[0]}
    else:
        layers, wait = comm.bcast(None)
        time.sleep(wait)  # a rank that waits in MPI may burn a core that the first one needs
    slowdowns = _slowdowns(workload, comm, layers, cores, on_node)
    return comm.bcast((_costs(workload, layers, medians), slowdowns) if comm.rank == 0 else None)


def _slowdowns(workload: Workload, comm: Communicator, layers: int, cores: int, on_node: int) -> Slowdowns:
    """How much slower layers are on rank 0 while all cores are busy, and what waiting ranks take."""
    busy = min(cores, on_node)
    if on_node == 1:
        return Slowdowns()
    # Together the ranks hold as much as one alone, as in a run.
    probe = Probe(workload, -(-layers // busy)) if comm.rank < busy else None
    rest = comm.bcast(probe.layer() * probe.num_layers if comm.rank == 0 else None)
    alone, together, waited = [], [], []
    for _ in range(_CROWD_ROUNDS):
        for at_work, others, found in ((1, time.sleep, alone), (busy, time.sleep, together), (busy, _nothing, waited)):
            comm.barrier()
            found.append(probe.layer() if comm.rank < at_work else others(rest))
    comm.barrier()
    if comm.rank > 0:
        return Slowdowns()
    alone, together, waited = (median(seconds) for seconds in (alone, together, waited))
    # Each of the ranks that wait takes a share of the cores of those at work.
    share = cores * (waited / together - 1.0) / (on_node - cores) if on_node > cores else 0.0
    return Slowdowns(max(1.0, together / alone), min(1.0, max(0.0, share)))


def _nothing(seconds: float) -> None:
    """Go on, to wait in MPI."""


def cores_and_ranks(comm: Communicator) -> tuple[int, int]:
    """Cores and ranks of the first node of the job, on every rank; every rank must call it."""
    affinity = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    found = comm.bcast(comm.gather((socket.gethostname(), affinity)))
    host = [cores for name, cores in found if name == found[0][0]]
    return len(set().union(*host)), len(host)


def _affordable(workload: Workload) -> int:
    """Layers of the network that is timed."""
    few = min(4, workload.num_layers)
    probe = Probe(workload, few)
    probe.layer()
    seconds = max(probe.layer(), 1e-9)
    most = min(workload.num_layers, _PROBE_BYTES // workload.state_bytes, int(_PROBE_SECONDS / seconds))
    return max(few, most - most % _WHOLE if most > _WHOLE else most)


def _costs(workload: Workload, layers: int, seconds: dict[str, float]) -> Costs:
    """The costs from the medians of the rounds."""

    def line(name: str, n: int = layers) -> StepCost:
        """The line through the seconds for one and for n layers."""
        one, many = seconds[f"{name}_one"], seconds[f"{name}_many"]
        each = max(0.0, many - one) / (n - 1) if n > 1 else one
        return StepCost(max(0.0, one - each), each)

    def solve(kind: str, whole: str) -> SolveCosts:
        coarse = coarse_layers(layers)
        steps = {part: line(f"{kind}_{part}", coarse if part in COARSE else layers) for part in PARTS}
        total, sweep = line(whole), steps["sweep"]
        return SolveCosts(
            **steps,
            layer=max(0.0, total.each - sweep.each),
            ends=max(0.0, total.call - sweep.call),
            check=seconds["check"] if kind == "state" else 0.0,
        )

    parameters = workload.architecture.width * (workload.architecture.width + 1)
    optimizer = line("optimize")
    return Costs(
        state_bytes=workload.state_bytes,
        row_bytes=parameters * workload.dtype.itemsize,
        states=solve("state", "evaluate"),
        adjoints=solve("adjoint", "gradient"),
        vector=seconds["vector"],
        coarsen=seconds["coarsen"],
        optimizer=optimizer.call,
        optimizer_layer=optimizer.each,
    )
