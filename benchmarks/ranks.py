"""Time of a weight update by every plan for a number of ranks, against one rank, beside the limit of the machine.

    python benchmarks/ranks.py [--quick] [--depths 64,256,1024] [--ranks 2] [--rounds 3] [--updates 40]

All plans train the same network (width 8, T=5, 5000 samples of peaks, the same initial weights, no nesting) by L-BFGS
with its defaults, in one job, and make their updates in turns, so that whatever else the machine does meets all: layer
after layer on rank 0 alone, while the others sleep (the serial run: portions of the samples, as the plan for one rank
has them, and all samples at once); replicas that share the samples; a pipeline of the ranks, in 4 and 8 portions; the
lagged cycle and a V-cycle of coarsening factor 16. The limit is what the ranks can reach: each of them trains by itself
with its share of the samples, all at the same time, without a message. The first updates, in which L-BFGS gathers
its pairs, do not count.

Last line: for each depth the speed-up of each plan, the median over updates and rounds of the quotient of two updates
that follow each other, and the limit.
"""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median

import common
import torch

from xbraid_py.comm import Communicator, SerialCommunicator, world
from xbraid_py.mgrit import MGRIT
from xbraid_py.optim import OneShot, OneShotOptions
from xbraid_py.problem.options import InitialScales

SKIPPED = 12  # updates that do not count: L-BFGS has all its pairs by then
EXACT = MGRIT(cycle="pipeline")


def plans(ranks: int) -> dict[str, tuple[MGRIT, int | None]]:
    """Solver and replicas of each plan; without replicas one rank alone."""
    return {
        "serial": (EXACT, None),
        "one portion": (common.SERIAL, None),
        "replicas": (EXACT, ranks),
        "pipeline of 4": (MGRIT(cycle="pipeline", portions=4), 1),
        "pipeline of 8": (MGRIT(cycle="pipeline", portions=8), 1),
        "lagged": (MGRIT(), 1),
        "V": (MGRIT(cycle="V", cfactor=16), 1),
    }


def training(comm: Communicator, options: MGRIT, replicas: int, num_layers: int, samples: int, seed: int) -> OneShot:
    """A training at its start."""
    problem = common.problem(comm, options, samples, seed=seed, replicas=replicas)
    objective = problem.objective(num_layers)
    return OneShot(objective, OneShotOptions(), objective.network.initial(InitialScales(), seed))


def take_turns(num_layers: int, updates: int, samples: int, seed: int) -> None:
    """What the ranks of a job do: seconds of the updates of all plans, in turns."""
    comm = world()
    alone = SerialCommunicator()
    steps = {"limit": training(alone, EXACT, 1, num_layers, samples // comm.size, seed)}
    for name, (options, replicas) in plans(comm.size).items():
        if replicas is not None:
            steps[name] = training(comm, options, replicas, num_layers, samples, seed)
        elif comm.rank == 0:
            steps[name] = training(alone, options, 1, num_layers, samples, seed)
    names = ["limit", *plans(comm.size)]
    runs = {name: each.run(10 * updates) for name, each in steps.items()}
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    gc.freeze()
    for number in range(SKIPPED + updates):
        for name in names[:: -1 if number % 2 else 1]:
            asleep(comm)
            start = time.perf_counter()
            if name in runs:
                next(runs[name])
            own = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
            slowest = comm.allgather(own, [1] * comm.size).max()  # those that did nothing have been faster
            if number >= SKIPPED:
                seconds[name].append(float(slowest))
    gc.unfreeze()
    objectives = {name: each.evaluation.value for name, each in steps.items()}
    if comm.rank == 0:
        common.report({"seconds": seconds, "objectives": objectives})


def asleep(comm: Communicator) -> None:
    """Wait for all ranks without taking a core from one that works alone."""
    crowded, comm.oversubscribed = getattr(comm, "oversubscribed", False), True
    comm.barrier()
    comm.oversubscribed = crowded


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, few updates")
    parser.add_argument("--depths", default="64,256,1024")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--updates", type=int)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    updates = arguments.updates or (8 if arguments.quick else 40)
    depths = common.integers(arguments.depths)
    if arguments.job is not None:
        take_turns(depths[0], updates, arguments.samples, arguments.job)
        return

    rounds, figures = arguments.rounds or (1 if arguments.quick else 3), {}
    for depth in depths:
        ratios: dict[str, list[float]] = {}
        times: dict[str, list[float]] = {}
        for seed in range(rounds):
            handed_on = f"--updates={updates}", f"--samples={arguments.samples}"
            row = common.job(__file__, arguments.ranks, f"--job={seed}", f"--depths={depth}", *handed_on)
            for name, found in row["seconds"].items():
                times[name] = times.get(name, []) + found
                ratios[name] = ratios.get(name, []) + [
                    a / b for a, b in zip(row["seconds"]["serial"], found, strict=True)
                ]
        print(f"{depth} layers, {arguments.ranks} ranks, {rounds} x {updates} updates")
        for name, found in ratios.items():
            milliseconds = common.Spread.of([1e3 * each for each in times[name]])
            print(f"  {name:14s} {milliseconds!s:>26s} ms   speed-up {common.Spread.of(found)!s:>24s}", flush=True)
        figures[str(depth)] = {name: median(found) for name, found in ratios.items()}
    common.finish("ranks", figures)


if __name__ == "__main__":
    main()
