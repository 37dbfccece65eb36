"""Memory of a training on two ranks, in times of the bytes of the states.

    python benchmarks/memory.py [--quick] [--ranks 1,2,4]

Makes a few weight updates with the default solver (1024 layers, width 8, T=5, 5000 samples of peaks, float64: 328 MB
of states) and adds up the peak resident memory (VmHWM) of all ranks; less that of a job of as many ranks that
makes the same imports, starts MPI and ends; divided by the bytes of the states, each counted once. The data set, the
weights and the pairs of L-BFGS count, and so do the pages of libraries that are first used by the training, on every
rank: about 15 MB a rank, whatever the problem. Last line: `ratio_P` for each number of ranks P, and `ratio`, the
largest of them. With --quick one round.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import median

import common

from xbraid_py.comm import Communicator, world
from xbraid_py.mgrit import MGRIT
from xbraid_py.optim import OneShot, OneShotOptions
from xbraid_py.problem.options import InitialScales

BYTES = 8  # of a float64
WIDTH = 8
MIB = 2**20


def peak_memory() -> int:
    """Largest resident memory of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise SystemExit(f"error: there is no {status}: this benchmark needs Linux")
    line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def train(comm: Communicator, num_layers: int, samples: int, updates: int) -> None:
    """A few weight updates of one network."""
    objective = common.problem(comm, MGRIT(), samples, width=WIDTH).objective(num_layers)
    run = OneShot(objective, OneShotOptions(), objective.network.initial(InitialScales(), 0))
    for _ in run.run(updates):
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--ranks", default="2")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--num_layers", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--updates", type=int, default=12, help="more than the 10 pairs that L-BFGS keeps")
    parser.add_argument("--job", choices=["bare", "training"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job:
        comm = world()
        if arguments.job == "training":
            train(comm, arguments.num_layers, arguments.samples, arguments.updates)
        peaks = comm.gather(peak_memory())
        if comm.rank == 0:
            common.report({"peaks": peaks})
        return

    ranks = common.integers(arguments.ranks)
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    states = arguments.num_layers * WIDTH * arguments.samples * BYTES
    handed_on = [f"--{name}={getattr(arguments, name)}" for name in ("num_layers", "samples", "updates")]
    print(f"{states / 1e6:.0f} MB of states, {rounds} rounds\nranks  bare imports MiB  training MiB  ratio")
    ratios = {}
    for size in ranks:
        found = {
            name: [sum(common.job(__file__, size, f"--job={name}", *handed_on)["peaks"]) for _ in range(rounds)]
            for name in ("bare", "training")
        }
        ratios[size] = [(a - b) / states for a, b in zip(found["training"], found["bare"], strict=True)]
        totals = (median(found[name]) / MIB for name in ("bare", "training"))
        print("{:5d}  {:16.1f}  {:12.1f}  ".format(size, *totals) + str(common.Spread.of(ratios[size])), flush=True)
    medians = {size: median(each) for size, each in ratios.items()}
    common.finish(
        "memory", {"ratio": max(medians.values())} | {f"ratio_{size}": each for size, each in medians.items()}
    )


if __name__ == "__main__":
    main()
