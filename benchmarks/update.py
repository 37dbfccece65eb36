"""Time of a weight update on two ranks with the lagged cycle, against one rank with serial propagation.

    python benchmarks/update.py [--quick] [--depths 256,1024] [--ranks 2] [--rounds 3] [--seeds 20]

Both train the same network (width 8, T=5, 5000 samples of peaks, the same initial weights, no nesting) by L-BFGS with
its defaults, 60 updates. An update is the line search with all its trials and the gradient at the accepted one; the
first few, which start cold, do not count. In one job the two make their updates in turns, so that whatever else the
machine does meets both: first all ranks one of theirs, then rank 0 alone a serial one, while the others wait. Each
round is another seed, for points and weights.

Last line: for each depth `speedup_N`, the median over the updates of all rounds of the ratio of the times of two
updates that follow each other; `objective_deviation`, the relative difference of the objectives after the last update,
ours less the serial run's, as the median over seeds, and `objective_worst`, the largest. Sixty updates are
chaotic: the table shows beside ours the deviations of serial runs whose initial weights are changed by 1e-6. They are
taken on one rank, since every number is the same on any number of ranks, and for the first depth only.
With --quick one round, fewer seeds.
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import common

from xbraid_py.comm import SerialCommunicator, world
from xbraid_py.mgrit import MGRIT
from xbraid_py.optim import OneShot, OneShotOptions
from xbraid_py.problem.options import InitialScales

SKIPPED = 5  # updates that do not count: more than those with boosted solves


def optimizer(comm, options: MGRIT, num_layers: int, samples: int, seed: int, change: float = 0.0) -> OneShot:
    """A training at its start, with initial weights changed by a share of their size."""
    objective = common.problem(comm, options, samples, seed=seed).objective(num_layers)
    return OneShot(objective, OneShotOptions(), (1 + change) * objective.network.initial(InitialScales(), seed))


def take_turns(num_layers: int, updates: int, samples: int, seed: int) -> None:
    """What the ranks of a job do: report seconds of updates of both kinds, in turns, and counts."""
    comm = world()
    ours = optimizer(comm, MGRIT(), num_layers, samples, seed)
    serial = optimizer(SerialCommunicator(), common.SERIAL, num_layers, samples, seed) if comm.rank == 0 else None
    # One update more than counts: the last one that counts then ends with a gradient, like the others.
    steps = {"lagged": ours.run(updates + 1), "serial": serial.run(updates + 1) if serial else None}
    row: dict = {name: [] for name in steps}
    for number in range(updates + 1):
        for name, each in steps.items():
            comm.barrier()
            start = time.perf_counter()
            if each is not None:
                next(each)
            if number:  # the first step makes no update yet
                row[name].append(time.perf_counter() - start)
    objective = ours.objective
    fine = num_layers * (objective.sweeps + 2 * objective.adjoint_sweeps)
    row |= {
        "solves": (objective.evaluations + objective.gradients) / (2 * updates + 2),
        "sweeps": objective.sweeps / objective.evaluations,
        "adjoint_sweeps": objective.adjoint_sweeps / objective.gradients,
        "coarse": 1 - fine / objective.work,  # all the steps that are none of the fine level
    }
    if comm.rank == 0:
        common.report(row)


def deviations(num_layers: int, updates: int, samples: int, seed: int) -> tuple[float, float]:
    """Relative deviation after all updates: of the lagged cycle, and of a serial run with changed weights."""
    values = []
    for options, change in ((common.SERIAL, 0.0), (MGRIT(), 0.0), (common.SERIAL, 1e-6)):
        run = optimizer(SerialCommunicator(), options, num_layers, samples, seed, change)
        for _ in run.run(updates):
            pass
        # More iterations than there are intervals: nothing is left of the solver's error.
        values.append(run.objective.evaluate(run.x, 2 * MGRIT().intervals, error=0.0).value)
    return values[1] / values[0] - 1, values[2] / values[0] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round, fewer seeds")
    parser.add_argument("--depths", default="256,1024")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--seeds", type=int, help="of the deviations")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--job", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    depths = common.integers(arguments.depths)
    if arguments.updates <= SKIPPED:
        parser.error(f"updates={arguments.updates} must be above {SKIPPED}, which do not count; use 60")
    if arguments.job is not None:
        take_turns(depths[0], arguments.updates, arguments.samples, arguments.job)
        return

    rounds = arguments.rounds or (1 if arguments.quick else 3)
    handed_on = [f"--{name}={getattr(arguments, name)}" for name in ("updates", "samples")]
    figures = {}
    print(
        f"{arguments.updates} updates, {arguments.samples} samples, {rounds} round(s), {arguments.ranks} ranks\n"
        f"layers  seed  {'serial ms':>24s}  {'one-shot ms':>24s}  {'speedup':>24s}  solves/update  sweeps  coarse work"
    )
    for depth in depths:
        ratios = []
        for seed in range(rounds):
            row = common.job(__file__, arguments.ranks, f"--job={seed}", f"--depths={depth}", *handed_on)
            times = {name: row[name][SKIPPED:] for name in ("serial", "lagged")}
            found = [a / b for a, b in zip(times["serial"], times["lagged"], strict=True)]
            ratios += found
            spreads = [common.Spread.of([1e3 * each for each in times[name]]) for name in times]
            print(
                f"{depth:6d}  {seed:4d}  {spreads[0]!s:>24s}  {spreads[1]!s:>24s}  {common.Spread.of(found)!s:>24s}  "
                f"{row['solves']:13.2f}  {row['sweeps']:.2f} {row['adjoint_sweeps']:.2f}  {100 * row['coarse']:9.1f}%",
                flush=True,
            )
        figures[f"speedup_{depth}"] = median(ratios)
        print(f"        speedup: {common.Spread.of(ratios)}", flush=True)
    seeds = arguments.seeds or (2 if arguments.quick else 20)
    pairs = [deviations(depths[0], arguments.updates, arguments.samples, seed) for seed in range(seeds)]
    for name, found in zip(("lagged", "serial, changed by 1e-6"), zip(*pairs, strict=True), strict=True):
        print(
            f"objective against serial, {depths[0]} layers, {name}: median {100 * median(found):+.2f} %; "
            + " ".join(f"{100 * each:+.1f}" for each in found)
        )
    ours = [pair[0] for pair in pairs]
    figures |= {"objective_deviation": median(ours), "objective_worst": max(map(abs, ours))}
    common.finish("update", figures)


if __name__ == "__main__":
    main()
