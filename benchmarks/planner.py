"""The planner's prediction of the time of a weight update against its measured time, for every plan on 1 and 2 ranks.

    python benchmarks/planner.py [--quick] [--ranks 1,2] [--depths 64,256,1024] [--blocks conv,transformer] [--passes 3]

Starts a job for each number of ranks with the `mpirun` beside this Python. A job measures the constants of the planner
and the updates of all plans in turns, each depth several times, and compares medians. Of dense layers an update is a
state solve with its loss, an adjoint solve and a direction of L-BFGS with all its pairs; the lagged cycle makes one
sweep, and a fixed step takes the place of the line search. Of torch blocks (64 of them, minibatches) it is a forward
and a backward pass, the average over replicas, and a step of Adam.

Last line: `worst_error`, the largest relative error over all plans, and `median_error`, their median.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median

import common
import torch

from xbraid_py import LayerParallel
from xbraid_py.comm import Communicator, ProcessGrid, world
from xbraid_py.mgrit import MGRIT
from xbraid_py.optim import OneShot, OneShotOptions
from xbraid_py.planner import (
    SERIAL,
    ModuleWorkload,
    Plan,
    Planner,
    Workload,
    assumed_machine,
    measure_costs,
    measure_machine,
    measure_module,
    named_workload,
)
from xbraid_py.problem.options import InitialScales

# Enough updates for L-BFGS to have all its pairs before any of them counts.
MEMORY = 10
INTERVALS = 8
BLOCK_LAYERS, BLOCK_BATCH = 64, 8


def plans(ranks: int, num_layers: int, is_module: bool = False) -> dict[str, Plan]:
    """The plans to compare."""
    found = {} if ranks > 1 else {"serial": SERIAL}
    if ranks > 1:
        found["replicas"] = Plan(cycle="pipeline", replicas=ranks, portions=ranks if is_module else 8)
    found |= {f"pipeline {number}": Plan(cycle="pipeline", portions=number) for number in (4, 8)}
    if not is_module:
        found["lagged"] = Plan(cfactors=(num_layers // INTERVALS,))
    return found


class Updates:
    """The updates of a run with a plan, timed one by one."""

    def __init__(self, workload: Workload, comm: Communicator, plan: Plan):
        options = plan.options(workload.num_layers)
        if plan.cycle == "lagged":
            options = replace(options, max_iter=1)
        problem = replace(workload.problem(comm, options), replicas=plan.replicas)
        objective = problem.objective(workload.num_layers)
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


class Batches:
    """Minibatches through a stack of torch blocks with a plan, timed one by one."""

    def __init__(self, workload: ModuleWorkload, comm: Communicator, plan: Plan):
        self.grid = ProcessGrid(comm, plan.replicas)
        options = plan.options(workload.num_layers)
        if plan.cycle == "pipeline":
            options = MGRIT(cycle="pipeline", portions=plan.portions_each)
        self.stack: LayerParallel = workload.stack(self.grid.layers, workload.num_layers, options)
        self.optimizer = torch.optim.Adam(self.stack.parameters(), 1e-6)
        self.input = self.grid.shard(workload.input())
        for _ in range(2):
            self._update()

    def _update(self) -> None:
        self.optimizer.zero_grad()
        u = self.input.detach().requires_grad_()
        self.stack(u).backward(self.input)
        if self.grid.replicas > 1:
            self.grid.average_gradients(self.stack)
        self.optimizer.step()

    def seconds(self, number: int) -> list[float]:
        """Of the next updates."""
        return [timed(self._update) for _ in range(number)]


def timed(call: Callable[[], object]) -> float:
    """Seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def planner_here(workload: Workload | ModuleWorkload, comm: Communicator) -> Planner:
    """From constants measured now."""
    if workload.is_module:
        costs, slowdowns = measure_module(workload, comm, 1.0)
        like, of_optimizer = workload.like_dense(), {"pairs": 0, "collectives": 0}
    else:
        costs, slowdowns = measure_costs(workload, comm, 0.4)
        like, of_optimizer = workload, {"pairs": MEMORY}
    machine = measure_machine(like, comm, slowdowns) if comm.size > 1 else assumed_machine()
    return Planner(machine, costs, **of_optimizer)


def run_job(depths: list[int], batch: int, passes: int, number: int, blocks: list[str]) -> None:
    """What the ranks of a job do: a row for each kind of layers, depth and plan."""
    comm = world()
    rows = []
    optim = OneShotOptions(memory=MEMORY)
    cases = [("dense", Workload(num_layers=depth, batch=batch, optim=optim)) for depth in depths]
    cases += [(name, named_workload(name, BLOCK_LAYERS, BLOCK_BATCH)) for name in blocks]
    for what, workload in cases:
        num_layers = workload.num_layers
        found = plans(comm.size, num_layers, workload.is_module)
        kind, own = (Batches, max(1, number // 5)) if workload.is_module else (Updates, number)
        runs = {name: kind(workload, comm, plan) for name, plan in found.items()}
        measured = {name: [] for name in found}
        predicted = {name: [] for name in found}
        for _ in range(min(2, passes) if workload.is_module else passes):
            planner = planner_here(workload, comm)
            for name, plan in found.items():
                comm.barrier()
                measured[name] += runs[name].seconds(own)
                prediction = planner.predict(plan, num_layers, comm.size) if comm.rank == 0 else None
                predicted[name].append(prediction.seconds if prediction else 0.0)
        for name in found:
            row = {"block": what, "ranks": comm.size, "num_layers": num_layers, "plan": name}
            rows.append(row | {"measured": median(measured[name]), "predicted": median(predicted[name])})
    if comm.rank == 0:
        common.report({"rows": rows})


def start(ranks: int, arguments: argparse.Namespace) -> list[dict]:
    """Rows of a job on so many ranks."""
    given = {"blocks": ""} | vars(arguments)
    options = (f"--{name}={given[name]}" for name in ("depths", "batch", "passes", "updates", "blocks"))
    return common.job(__file__, ranks, "--job", *options)["rows"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats")
    parser.add_argument("--ranks", default="1,2")
    parser.add_argument("--depths", default="64,256,1024")
    parser.add_argument("--batch", type=int, default=5000, help="samples of dense layers")
    parser.add_argument("--blocks", default="conv,transformer", help="torch blocks, or none")
    parser.add_argument("--passes", type=int, help="turns of measuring constants and updates")
    parser.add_argument("--updates", type=int, help="updates in a turn")
    parser.add_argument("--job", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.passes = arguments.passes or (1 if arguments.quick else 3)
    arguments.updates = arguments.updates or (5 if arguments.quick else 10)
    if arguments.job:
        depths = common.integers(arguments.depths) if arguments.depths else []
        blocks = [name for name in arguments.blocks.split(",") if name]
        run_job(depths, arguments.batch, arguments.passes, arguments.updates, blocks)
        return
    errors = []
    print(f"{'layers':18s} {'ranks':>5s} {'plan':11s} {'measured ms':>11s} {'predicted ms':>12s} {'ratio':>6s}")
    for ranks in common.integers(arguments.ranks):
        for row in start(ranks, arguments):
            ratio = row["predicted"] / row["measured"]
            errors.append(ratio - 1)
            milliseconds = (1e3 * row["measured"], 1e3 * row["predicted"])
            name = f"{row['num_layers']:5d} {row['block']:12s} {row['ranks']:5d} {row['plan']:11s}"
            print(f"{name} {milliseconds[0]:11.2f} {milliseconds[1]:12.2f} {ratio:6.2f}", flush=True)
    common.finish("planner", {"worst_error": max(map(abs, errors)), "median_error": median(map(abs, errors))})


if __name__ == "__main__":
    main()
