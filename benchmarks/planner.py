"""The planner's prediction of the time of a weight update against its measured time, on 1, 2 and 4 ranks.

    python benchmarks/planner.py [--quick] [--ranks 1,2,4] [--depths 64,256,1024] [--passes 5]

Starts a job for each number of ranks with the `mpirun` beside this Python. A job measures the constants of the
planner and the updates in turns, each depth several times, and compares medians. An update is a state solve with its
loss, an adjoint solve and a direction of L-BFGS with all its pairs; the lagged cycle makes one sweep, and a fixed
step takes the place of the line search. Last line: the figure `worst_error`, the largest relative error over all
numbers of ranks and depths, and `median_error`, their median.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import common

from xbraid_py.comm import Communicator, world
from xbraid_py.optim import OneShot, OneShotOptions
from xbraid_py.planner import SERIAL, Plan, Planner, Workload, assumed_machine, measure_costs, measure_machine
from xbraid_py.problem.network import InitialScales

# Enough updates for L-BFGS to have all its pairs before any of them counts.
MEMORY = 10
INTERVALS = 8


def plans(ranks: int, num_layers: int) -> dict[str, Plan]:
    """The plans to compare: the lagged cycle with its defaults, and on one rank serial propagation."""
    one_shot = {"lagged": Plan(cfactors=(num_layers // INTERVALS,))}
    return {"serial": SERIAL, **one_shot} if ranks == 1 else one_shot


class Updates:
    """The updates of a run with a plan, timed one by one."""

    def __init__(self, workload: Workload, comm: Communicator, plan: Plan):
        options = plan.options(workload.num_layers)
        if plan.cycle == "lagged":
            options = replace(options, max_iter=1)
        objective = workload.problem(comm, options).objective(workload.num_layers)
        one_shot = OneShotOptions(memory=MEMORY, boost_updates=0, fixed_step=1e-3)
        run = OneShot(objective, one_shot, objective.network.initial(InitialScales(), 0))
        self.updates = run.run(10**9)
        for _ in range(MEMORY + 2):
            next(self.updates)

    def seconds(self, number: int) -> list[float]:
        """Of the next updates."""
        found = []
        for _ in range(number):
            start = time.perf_counter()
            next(self.updates)
            found.append(time.perf_counter() - start)
        return found


def run_job(depths: list[int], batch: int, passes: int, number: int) -> None:
    """What the ranks of a job do: a row for each depth and plan."""
    comm = world()
    rows = []
    for num_layers in depths:
        workload = Workload(num_layers=num_layers, batch=batch, optim=OneShotOptions(memory=MEMORY))
        found = plans(comm.size, num_layers)
        runs = {name: Updates(workload, comm, plan) for name, plan in found.items()}
        measured = {name: [] for name in found}
        predicted = {name: [] for name in found}
        for _ in range(passes):
            costs, slowdowns = measure_costs(workload, comm, 0.4)
            if comm.size > 1:
                machine = measure_machine(workload, comm, slowdowns)
            else:
                machine = assumed_machine()
            planner = Planner(machine, costs, MEMORY)
            for name, plan in found.items():
                comm.barrier()
                measured[name] += runs[name].seconds(number)
                prediction = planner.predict(plan, num_layers, comm.size) if comm.rank == 0 else None
                predicted[name].append(prediction.seconds if prediction else 0.0)
        for name in found:
            row = {"ranks": comm.size, "num_layers": num_layers, "plan": name}
            rows.append(row | {"measured": median(measured[name]), "predicted": median(predicted[name])})
    if comm.rank == 0:
        common.report({"rows": rows})


def start(ranks: int, arguments: argparse.Namespace) -> list[dict]:
    """Rows of a job on so many ranks."""
    options = (f"--{name}={getattr(arguments, name)}" for name in ("depths", "batch", "passes", "updates"))
    return common.job(__file__, ranks, "--job", *options)["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--ranks", default="1,2,4")
    parser.add_argument("--depths", default="64,256,1024")
    parser.add_argument("--batch", type=int, default=5000, help="samples")
    parser.add_argument("--passes", type=int, help="turns of measuring constants and updates")
    parser.add_argument("--updates", type=int, help="updates in a turn")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.passes = arguments.passes or (2 if arguments.quick else 7)
    arguments.updates = arguments.updates or (5 if arguments.quick else 10)
    if arguments.job:
        run_job(common.integers(arguments.depths), arguments.batch, arguments.passes, arguments.updates)
        return
    errors = []
    print(f"{'ranks':>5s} {'layers':>6s} {'plan':10s} {'measured ms':>11s} {'predicted ms':>12s} {'error':>7s}")
    for ranks in common.integers(arguments.ranks):
        for row in start(ranks, arguments):
            errors.append(row["predicted"] / row["measured"] - 1)
            milliseconds = (1e3 * row["measured"], 1e3 * row["predicted"])
            print(
                f"{row['ranks']:5d} {row['num_layers']:6d} {row['plan']:10s} {milliseconds[0]:11.2f} "
                f"{milliseconds[1]:12.2f} {100 * errors[-1]:+6.1f}%",
                flush=True,
            )
    common.finish("planner", {"worst_error": max(map(abs, errors)), "median_error": median(map(abs, errors))})


if __name__ == "__main__":
    main()
