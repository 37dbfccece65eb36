"""V-cycles whose coarse networks are narrower and shallower against those that are only shallower, on peaks.

    python benchmarks/width_and_depth.py [--quick] [--seeds 5] [--num_layers 128] [--width 16] [--levels 4] [--goal 0.8]

Gradient descent in L2(0, T) on all levels, all samples in every step. Each hierarchy has the learning rate that is
best on seeds of its own (from 100 on); then it runs on seeds 0, 1, ... until the goal is reached on validation points.
Prints a table and, as its last line, the figures `work_depth`, `work_both`, `work_both_norms` (work units to the goal
over those of one level, medians over the seeds; a narrower layer counts as the numbers of its matrix) and
`seconds_depth`, `seconds_both`, `seconds_both_norms`. "Both" halves the width on every coarse level.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from statistics import median

import common  # first: one thread
from studies.mgopt.case import PeaksOptions, changed, runs
from studies.mgopt.parts import MOST
from studies.mgopt.runs import train

from xbraid_py.comm.agreement import RunError
from xbraid_py.multilevel.depth.options import MGOptOptions
from xbraid_py.problem.options import DenseResNetOptions


def finished(case: PeaksOptions, seeds: Iterable[int]) -> list[dict | None]:
    """Where the runs of some seeds reached their goal; None for one that did not."""
    found = []
    for settings in runs([case], seeds):
        try:
            result = train(settings)
        except RunError as error:
            print(f"  rate {rate_of(case):g}, seed {settings['seed']}: {error}")
            result = {"reached": False}
        found.append(result if result["reached"] else None)
    return found


def rate_of(case: PeaksOptions) -> float:
    """Its learning rate."""
    return case.mgopt.optim.learning_rate[0]


def tuned(case: PeaksOptions, rates: tuple[float, ...], seeds: int) -> PeaksOptions:
    """The case with the rate that takes the least work on the seeds from 100 on."""
    costs = {}
    for rate in rates:
        found = finished(changed(case, {"mgopt.optim.learning_rate": (rate,)}), range(100, 100 + seeds))
        costs[rate] = median(math.inf if run is None else run["work"] for run in found)
    return changed(case, {"mgopt.optim.learning_rate": (min(costs, key=costs.__getitem__),)})


def hierarchies(base: PeaksOptions, levels: int) -> dict[str, PeaksOptions]:
    """By name: one level, depth alone, and width on more and more of the coarse levels."""
    deep = changed(base, {"mgopt.levels": levels})
    found = {"one level": changed(base, {"mgopt.levels": 1}), "depth": deep}
    for narrow in range(1, levels):
        for scaling in ("mean", "norms"):
            how = {"mgopt.narrow": narrow, "mgopt.scaling": scaling}
            found[f"narrow {narrow}, {scaling}"] = changed(deep, how)
    return found


def compare(
    base: PeaksOptions, levels: int, rates: tuple[float, ...], seeds: int, tuning_seeds: int
) -> dict[str, float]:
    """The table, and ratios to one level."""
    work, seconds = {}, {}
    print("| hierarchy | rate | work units | seconds | reached |\n|---|---|---|---|---|")
    for name, case in hierarchies(base, levels).items():
        case = tuned(case, rates, tuning_seeds)
        ends = finished(case, range(seeds))
        work[name] = [math.inf if run is None else run["work"] for run in ends]
        seconds[name] = [math.inf if run is None else run["seconds"] for run in ends]
        units = f"{median(work[name]):.0f} ({min(work[name]):.0f} to {max(work[name]):.0f})"
        reached = sum(run is not None for run in ends)
        print(
            f"| {name} | {rate_of(case):g} | {units} | {median(seconds[name]):.2f} | {reached} of {seeds} |",
            flush=True,
        )
    figures = {}
    both = {"depth": "depth", "both": f"narrow {levels - 1}, mean", "both_norms": f"narrow {levels - 1}, norms"}
    for measure, values in (("work", work), ("seconds", seconds)):
        for short, name in both.items():
            pairs = zip(values[name], values["one level"], strict=True)
            figures[f"{measure}_{short}"] = median(a / b if b < math.inf else math.inf for a, b in pairs)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds, layers and points, a lower goal")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--tuning_seeds", type=int)
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--num_train", type=int)
    parser.add_argument("--goal", type=float)
    parser.add_argument("--max_work", type=float)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--levels", type=int, default=4)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.01, 0.02, 0.05, 0.1])
    arguments = parser.parse_args()
    defaults = {
        "seeds": (5, 1),
        "tuning_seeds": (2, 1),
        "num_layers": (128, 16),
        "num_train": (1000, 200),
        "goal": (0.8, 0.6),
        "max_work": (400.0, 60.0),
    }
    for name, (full, quick) in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
    base = PeaksOptions(
        network=DenseResNetOptions(width=arguments.width, T=5.0, activation="relu"),
        num_layers=arguments.num_layers,
        num_train=arguments.num_train,
        num_val=arguments.num_train // 2,
        mgopt=MGOptOptions(levels=1, metric="L2"),
        goal=arguments.goal,
        max_work=arguments.max_work,
        max_cycles=MOST,
    )
    rates = tuple(arguments.rates)
    common.finish("width_and_depth", compare(base, arguments.levels, rates, arguments.seeds, arguments.tuning_seeds))


if __name__ == "__main__":
    main()
