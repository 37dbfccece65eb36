"""Two levels in width against torch's SGD on Poisson's problem: errors at equal work, and time per work unit.

    python benchmarks/width.py [--quick] [--setting coarse] [--seeds 5] [--one_rate 0.2] [--two_rate 0.1] ...

The fully-connected network of paper 002 (2 x 400), minibatches of 200. Each method has its learning rate, tuned on
other seeds by drivers/width_study.py; work units are those of eq. 40, tau included. The setting coarse makes most steps
on the coarse level and no tau; paper is the one of the paper. One core. Prints tables and, as its last
line, the figures `l2_ratio` and `linf_ratio` (best validation errors, two levels over one, medians over seeds), the
same `_without_tau` (work units of tau not counted) and `_counted` (multiply-adds as they are: the coarse network here
costs 0.47 of the fine one, not a quarter), `time_per_work_unit` (seconds per work unit of the paper's two
levels, their matching included, over those of a plain loop with torch.optim.SGD, interleaved, median),
`time_per_counted_unit` of the setting, and `matching_share` (of the time of two levels). With --quick fewer seeds,
samples and work units.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from statistics import median

import common  # first: one thread
import torch
from studies.width.case import changed, runs
from studies.width.parts import COARSE
from studies.width.rows import ratios
from studies.width.runs import train
from torch import nn

from xbraid_py.recipes.options.width import PoissonOptions, WidthNetwork
from xbraid_py.recipes.width import WidthRun

SETTINGS = {"coarse": COARSE, "paper": {}}


def errors(one: PoissonOptions, two: PoissonOptions, seeds: int) -> dict[str, float]:
    """Ratios of the best errors, seed by seed, and the share of the matching."""
    found = {}
    for name, case in (("one", one), ("two", two)):
        found[name] = []
        for settings in runs([case], range(seeds)):
            found[name].append({"settings": settings, "result": train(settings)})
            best = found[name][-1]["result"]["best"]
            print(
                f"  {name} level(s), seed {settings['seed']}: L2 {best['val_l2']:.3e}, Linf {best['val_linf']:.3f}",
                flush=True,
            )
    figures = {}
    for counting, suffix in (("work", ""), ("work_without_tau", "_without_tau"), ("counted_work", "_counted")):
        for norm in ("l2", "linf"):
            each = ratios(found["one"], found["two"], f"val_{norm}", one.max_work, counting)
            figures[f"{norm}_ratio{suffix}"] = median(each)
            print(f"{norm}_ratio{suffix}: " + ", ".join(f"{ratio:.3f}" for ratio in each), flush=True)
    results = [row["result"] for row in found["two"]]
    spent = sum(result["matching_seconds"] for result in results)
    return figures | {"matching_share": spent / sum(result["seconds"] for result in results)}


def plain(training: WidthRun, steps: int) -> Callable[[], None]:
    """So many steps of torch's SGD on the same network and minibatches."""
    options, minibatches = training.options.training, training.method.minibatches
    layout, x = training.method.auxiliary(0)
    module = layout.module(x)
    optimizer = torch.optim.SGD(module.parameters(), lr=options.learning_rate, momentum=options.momentum)

    def body() -> None:
        for inputs, targets in minibatches.draw(steps):
            optimizer.zero_grad()
            nn.functional.mse_loss(module(inputs), targets).backward()
            optimizer.step()

    return body


def time_per_unit(two: PoissonOptions, rounds: int, share: float, counted: bool = False) -> float:
    """Seconds per work unit, of eq. 40 or counted, over those of the plain loop."""
    samples = two.samples.load(dtype=two.torch_dtype)
    cycles = WidthRun(two, *samples).method.run(4 * rounds + 2)
    first = next(cycles)  # the one with the matching
    unit = first.counted if counted else first.work
    steps = round(unit)
    bodies = {"two": lambda: next(cycles), "plain": plain(WidthRun(two, *samples), steps)}
    found = common.interleaved(bodies, rounds)
    spread = common.Spread.of_ratios(
        [seconds / unit / (1 - share) for seconds in found["two"]], [seconds / steps for seconds in found["plain"]]
    )
    print(f"plain loop: {1e3 * median(found['plain']) / steps:.2f} ms a work unit; two levels over it: {spread}")
    return spread.median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds, samples and work units")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--num_train", type=int)
    parser.add_argument("--num_val", type=int)
    parser.add_argument("--max_work", type=float, help="work units that errors are compared at")
    parser.add_argument("--rounds", type=int, help="of the timings")
    parser.add_argument("--mesh", type=int, default=32)
    parser.add_argument("--widths", type=common.integers, default=[400, 400])
    parser.add_argument("--batch_size", type=int, default=200)
    parser.add_argument("--setting", choices=list(SETTINGS), default="coarse", help="of two levels")
    parser.add_argument("--one_rate", type=float, default=0.2, help="learning rate of one level")
    parser.add_argument("--two_rate", type=float, default=0.1, help="learning rate of two levels")
    arguments = parser.parse_args()
    defaults = {
        "seeds": (5, 2),
        "num_train": (2000, 600),
        "num_val": (500, 200),
        "max_work": (3000.0, 100.0),
        "rounds": (15, 5),
    }
    for name, (full, quick) in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
    names = "num_train num_val mesh batch_size max_work".split()
    sizes = {name: getattr(arguments, name) for name in names}
    base = PoissonOptions(
        **sizes,
        network=WidthNetwork(widths=tuple(arguments.widths)),
        validate_every=min(50.0, arguments.max_work / 2),
        count_tau=False,
    )
    one = changed(base, levels=1, learning_rate=arguments.one_rate)
    paper = changed(base, learning_rate=arguments.two_rate)
    two = changed(paper, **SETTINGS[arguments.setting])
    figures = errors(one, two, arguments.seeds)
    share = figures["matching_share"]
    figures["time_per_work_unit"] = time_per_unit(paper, arguments.rounds, share)
    figures["time_per_counted_unit"] = time_per_unit(two, arguments.rounds, share, counted=True)
    common.finish("width", figures)


if __name__ == "__main__":
    main()
