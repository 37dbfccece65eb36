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
from xbraid_py.planner import (
    CLUSTER,
    CONVOLUTION,
    TRANSFORMER,
    Constants,
    Link,
    Planner,
    Workload,
    draw,
    in_sentences,
    make_map,
    measured_planner,
    named_workload,
)
from xbraid_py.planner.maps import powers_of_two
from xbraid_py.planner.predict import Prediction, simplest
from xbraid_py.planner.recommend import advice, headings, lines, show
from xbraid_py.problem.options import DenseResNetOptions
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
    block
        Dense layers with their native kernels, trained on all samples at once; or torch blocks, trained on minibatches:
        a convolution of 8 channels on 28x28 pixels, or a decoder layer of width 64 with 64 tokens.
    width
        Channels of a dense layer.
    batch
        Training samples; of blocks, those of a minibatch.
    dtype
        Of weights and states of dense layers; those of blocks are float32.
    costs
        Measured here, or those by which `choose` makes a plan, written down and the same on any machine.
    ranks
        Numbers of ranks to predict for.
    cycles
        Cycles to choose from, besides exact propagation: lagged, V, F.
    sweeps, adjoint_sweeps
        Fine sweeps of a solve by the lagged cycle. If not given 1 and 1 for dense layers, which start from the last
        solve; for blocks, which start cold, 4 and 3 with convolutions, 7 and 5 with transformers.
    ranks_per_node
        Ranks on a node; as many as it has cores if not given. With more of them they take turns.
    latency
        Of a message between nodes, in seconds.
    bandwidth
        Between nodes, in bytes/s.
    stage
        Of one of the log2(nodes) stages of a collective between nodes, in seconds.
    map
        Picture of who wins where, from 1 to `batch` samples and from 2 to 4,096 ranks, with some sentences.
    json
        File for the predictions and the measured constants.
    """

    num_layers: int = 1024
    block: Literal["dense", "conv", "transformer"] = "dense"
    width: int = 8
    batch: int = 5000
    dtype: Literal["float64", "float32"] = "float64"
    costs: Literal["measured", "rule"] = "measured"
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 64, 256, 1024)
    cycles: tuple[Literal["lagged", "V", "F"], ...] = ("lagged",)
    sweeps: int | None = None
    adjoint_sweeps: int | None = None
    ranks_per_node: int | None = None
    latency: float = CLUSTER.latency
    bandwidth: float = CLUSTER.bandwidth
    stage: float = CLUSTER.stage
    map: Path | None = None
    json: Path | None = None

    def __post_init__(self):
        LayerGrid(self.num_layers, 1.0)
        if not self.ranks or min(self.ranks) < 1:
            raise ValueError(f"ranks={','.join(map(str, self.ranks))} must be at least 1, all of them; use 1,2,4")
        for name in ("ranks_per_node", "sweeps", "adjoint_sweeps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1; use 2")


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Validate; the plan is made by the function returned."""
    if options.block == "dense":
        workload = Workload(
            num_layers=options.num_layers,
            batch=options.batch,
            architecture=DenseResNetOptions(width=options.width),
            dtype=getattr(torch, options.dtype),
        )
    else:
        workload = named_workload(options.block, options.num_layers, options.batch)
    source = CLUSTER.source if options.latency == CLUSTER.latency else "given"
    network = Link(options.latency, options.bandwidth, options.stage, source)
    for path in (options.json, options.map):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)

    def run() -> None:
        if options.costs == "rule":
            planner = _by_rule(options, options.batch)
        else:
            planner = measured_planner(workload, comm, network)
        if comm.rank > 0:
            return
        planner = _with_sweeps(planner, options)
        on_node = options.ranks_per_node or planner.machine.cores
        planner = replace(planner, machine=replace(planner.machine, ranks_per_node=on_node))
        found = [_best(planner, options, ranks) for ranks in sorted(set(options.ranks))]
        print(headings(options.num_layers, _what(options), planner))
        show(lines(found, options.num_layers, on_node))
        best = [row[0] for row in found]
        print(advice(best, options.num_layers), flush=True)
        if options.map is not None:
            _map(planner, options)
        if options.json is not None:
            rows = [asdict(each) | {"seconds": each.seconds, "speedup": each.speedup} for each in best]
            constants = {"machine": asdict(planner.machine), "costs": asdict(planner.costs)}
            options.json.write_text(json.dumps({"predictions": rows, **constants}, indent=1) + "\n")

    return run


def _what(options: Options) -> str:
    """The layers in words."""
    return f"dense, width {options.width}, {options.dtype}" if options.block == "dense" else options.block


def _by_rule(options: Options, samples: int) -> Planner:
    """The planner of `choose`."""
    constants = Constants()
    layers = {"conv": CONVOLUTION, "transformer": TRANSFORMER}
    itemsize = getattr(torch, options.dtype).itemsize
    layer = layers.get(options.block) or constants.dense(options.width, itemsize)
    return constants.planner(layer, samples)


def _with_sweeps(planner: Planner, options: Options) -> Planner:
    """With the numbers of sweeps that are given."""
    given = {name: getattr(options, name) for name in ("sweeps", "adjoint_sweeps") if getattr(options, name)}
    return replace(planner, **given)


def _best(planner: Planner, options: Options, ranks: int) -> list[Prediction]:
    """The best plan, and the best one of another kind."""
    found = planner.of_each_kind(options.num_layers, ranks, options.cycles)
    best = simplest(found)
    return [best, *[each for each in found if each.kind != best.kind][:1]]


def _map(planner: Planner, options: Options) -> None:
    """Draw who wins where, and say it."""
    assert options.map is not None
    samples = powers_of_two(1, options.batch)

    def planner_of(number: int) -> Planner:
        return replace(planner, costs=planner.costs.at(number), events_up_to=0)

    found = make_map(planner_of, options.num_layers, samples, powers_of_two(2, 4096), options.cycles)
    draw(found, f"{options.num_layers:,} layers, {_what(options)}", options.map)
    for sentence in in_sentences(found):
        print(sentence, flush=True)
