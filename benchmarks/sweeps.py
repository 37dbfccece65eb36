"""Fine sweeps of the lagged cycle for each state and adjoint solve, over the whole peaks job.

    python benchmarks/sweeps.py [--quick] [--seeds 5]

Trains the nested job (16, 32, 64 layers, default schedule, 5000 samples) with the default solver and once more with
exact gradients (serial propagation), on one rank: counts are the same on any number. Sweeps of a level count with its
layers: sum of sweeps x layers over sum of solves x layers. Last line: medians over the seeds of `forward` and
`adjoint`, and of `evaluations`, the state solves in times of those with exact gradients; the largest of each as
`..._worst`. With the default options the level of 16 layers is solved sequentially, since 8 intervals of 2 layers
would save nothing, with one sweep a solve; `..._iterative` leaves such levels out.
With --quick one seed.
"""

from __future__ import annotations

import argparse
from statistics import median

import common

from xbraid_py.comm import SerialCommunicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.nested import NestedIteration
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.problem.objective import NetworkObjective


def train(num_layers: int, nested: NestedOptions, samples: int, seed: int, options: MGRIT) -> list[NetworkObjective]:
    """The objectives of all levels after a run, the coarsest first."""
    problem = common.problem(SerialCommunicator(), options, samples, seed=seed)
    run = NestedIteration(problem, num_layers, options=nested, seed=seed)
    found = {}
    for _ in run.run():
        found[run.depth] = run.objective
    return list(found.values())


def layers(objective: NetworkObjective) -> int:
    """Depth of an objective's network."""
    return objective.network.grid.num_layers


def is_sequential(objective: NetworkObjective) -> bool:
    """Whether its states are found by one sweep through all layers."""
    return len(objective.forward.hierarchy.levels) == 1


def ratios(levels: list[NetworkObjective], exact: list[NetworkObjective]) -> dict[str, float]:
    """The figures of a run, of at least one level."""

    def weighted(name: str, objectives: list[NetworkObjective]) -> int:
        return sum(getattr(each, name) * layers(each) for each in objectives)

    return {
        "forward": weighted("sweeps", levels) / weighted("evaluations", levels),
        "adjoint": weighted("adjoint_sweeps", levels) / weighted("gradients", levels),
        "evaluations": sum(each.evaluations for each in levels) / sum(each.evaluations for each in exact),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--num_layers", type=int, default=64)
    parser.add_argument("--samples", type=int, default=5000)
    parser.add_argument("--updates", help="on each level, the coarsest first, as in 200,125,75")
    arguments = parser.parse_args()
    seeds = range(arguments.seeds or (1 if arguments.quick else 5))
    nested = NestedOptions()
    if arguments.updates:
        updates = tuple(common.integers(arguments.updates))
        nested = NestedOptions(refinements=len(updates) - 1, updates=updates)

    found: dict[str, list[float]] = {}
    print("seed  layers  evaluations  (exact)  gradients  forward  adjoint  sweeps a solve; * solved sequentially")
    for seed in seeds:
        job = arguments.num_layers, nested, arguments.samples, seed
        levels, exact = train(*job, MGRIT()), train(*job, common.SERIAL)
        for ours, theirs in zip(levels, exact, strict=True):
            per_solve = (ours.sweeps / ours.evaluations, ours.adjoint_sweeps / ours.gradients)
            print(
                f"{seed:4d}  {layers(ours):5d}{'*' if is_sequential(ours) else ' '}  {ours.evaluations:11d}  "
                f"{theirs.evaluations:7d}  {ours.gradients:9d}  {per_solve[0]:7.3f}  {per_solve[1]:7.3f}"
            )
        pairs = [pair for pair in zip(levels, exact, strict=True) if not is_sequential(pair[0])]
        figures = ratios(levels, exact)
        if pairs:
            iterative = ratios(*map(list, zip(*pairs, strict=True)))
            figures |= {f"{name}_iterative": value for name, value in iterative.items()}
        for name, value in figures.items():
            found.setdefault(name, []).append(value)
        print(f"{seed:4d}  all     " + "  ".join(f"{name} {value:.3f}" for name, value in figures.items()), flush=True)

    last = {}
    print(f"\n{'over seeds':22s} {'median':>7s} {'worst':>7s}")
    for name, values in found.items():
        last |= {name: median(values), f"{name}_worst": max(values)}
        print(f"{name:22s} {median(values):7.3f} {max(values):7.3f}")
    common.finish("sweeps", last)


if __name__ == "__main__":
    main()
