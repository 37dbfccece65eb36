"""`xbraid-py plan`: how long a weight update takes on how many ranks, by which cycle, and which is best.

Measures this machine for some seconds, simulates the critical path of an update, and predicts time, speedup and
memory. Ranks beyond those of a node go to further nodes, over a network whose constants are assumed. The only command
that takes part in a job of several ranks: `mpirun -n 4 xbraid-py plan`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from xbraid_py.comm import Communicator
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.planner.machine import CLUSTER, Link
from xbraid_py.planner.measure import Workload
from xbraid_py.planner.recommend import advice, headings, lines, measured_planner, show
from xbraid_py.problem.problem import DenseResNetOptions
from xbraid_py.run.launch import launch

_DESCRIPTION = "Plan: how long a weight update takes on how many ranks, by which cycle, and which is best."


def main(words: Sequence[str]) -> int:
    """Make the plan on the ranks of this job, and end with what `launch` says of it."""
    launch(Options, setup, words, prog="xbraid-py plan", description=_DESCRIPTION)
    return 0


@dataclass(frozen=True, kw_only=True)
class Options:
    """What is to be trained, and on which machine.

    Parameters
    ----------
    num_layers
        Residual layers.
    width
        Channels of a layer.
    batch
        Training samples.
    dtype
        Of weights and states.
    ranks
        Numbers of ranks to predict for.
    cycles
        Cycles to choose from, besides serial propagation: lagged, V, F.
    ranks_per_node
        Ranks on a node; as many as it has cores if not given. With more of them they take turns.
    latency
        Of a message between nodes, in seconds.
    bandwidth
        Between nodes, in bytes/s.
    stage
        Of one of the log2(nodes) stages of a collective between nodes, in seconds.
    json
        File for the predictions and the measured constants.
    """

    num_layers: int = 1024
    width: int = 8
    batch: int = 5000
    dtype: Literal["float64", "float32"] = "float64"
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 1024)
    cycles: tuple[Literal["lagged", "V", "F"], ...] = ("lagged",)
    ranks_per_node: int | None = None
    latency: float = CLUSTER.latency
    bandwidth: float = CLUSTER.bandwidth
    stage: float = CLUSTER.stage
    json: Path | None = None

    def __post_init__(self):
        LayerGrid(self.num_layers, 1.0)
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks={','.join(map(str, self.ranks))} must be at least 1, all of them; use 1,2,4")
        if self.ranks_per_node is not None and self.ranks_per_node < 1:
            raise ValueError(f"ranks_per_node={self.ranks_per_node} must be at least 1; use 2")


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Validate; the plan is made by the function returned."""
    workload = Workload(
        num_layers=options.num_layers,
        batch=options.batch,
        architecture=DenseResNetOptions(width=options.width),
        dtype=getattr(torch, options.dtype),
    )
    source = CLUSTER.source if options.latency == CLUSTER.latency else "given"
    network = Link(options.latency, options.bandwidth, options.stage, source)
    if options.json is not None:
        options.json.parent.mkdir(parents=True, exist_ok=True)

    def run() -> None:
        planner = measured_planner(workload, comm, network)
        if comm.rank > 0:
            return
        on_node = options.ranks_per_node or planner.machine.cores
        planner = replace(planner, machine=replace(planner.machine, ranks_per_node=on_node))
        found = [planner.best(options.num_layers, ranks, options.cycles) for ranks in sorted(set(options.ranks))]
        print(headings(workload, planner))
        show(lines(found, options.num_layers, on_node))
        print(advice(found, options.num_layers), flush=True)
        if options.json is not None:
            rows = [asdict(each) | {"seconds": each.seconds, "speedup": each.speedup} for each in found]
            constants = {"machine": asdict(planner.machine), "costs": asdict(planner.costs)}
            options.json.write_text(json.dumps({"predictions": rows, **constants}, indent=1) + "\n")

    return run
