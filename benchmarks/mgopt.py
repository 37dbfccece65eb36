"""MG/OPT in depth against gradient descent: work units to the same accuracy, and how cycles depend on depth.

    python benchmarks/mgopt.py [--quick] [--seeds 10] [--mnist_seeds 3] [--data_dir FOLDER]

Circles: one and eight levels with 2048 blocks to the validation accuracy 1, and six levels with 128 to 4096 blocks.
MNIST: one and eight levels by minibatches of 1000, to the highest accuracy that the single level reaches in 2000 work
units. One core, the methods in turns. Prints tables and, as its last line, the figures `circles_speedup` and
`mnist_speedup` (work of the single level over that of eight, means over the seeds), `circles_seconds` (the same of
seconds) and `depth_spread` (most V-cycles over fewest, less 1, of the means over the seeds).
With --quick fewer seeds, layers and work units.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import common
from studies.mgopt.case import changed, runs
from studies.mgopt.parts import MGOptStudyOptions
from studies.mgopt.rows import Point, at_goal, best, ratios, reached, speedup, spread
from studies.mgopt.runs import train
from studies.rows import Row

from xbraid_py.recipes.options.mgopt import MGOptRunOptions


def run(case: MGOptRunOptions, seed: int) -> Row:
    """One run as a row of the study."""
    (settings,) = runs([case], [seed])
    return {"settings": settings, "result": train(settings)}


def quotient(base: dict[int, Point], other: dict[int, Point], field: str) -> float:
    """Ratio of the sums over the seeds that both have reached."""
    common_seeds = [seed for seed in base if seed in other]
    if not common_seeds:
        raise SystemExit("error: no seed has reached the goal by both methods; give more --max_work")
    return sum(base[seed][field] for seed in common_seeds) / sum(other[seed][field] for seed in common_seeds)


def circles(base: MGOptRunOptions, seeds: Sequence[int]) -> dict[str, float]:
    """One level against eight."""
    rows: dict[int, list[Row]] = {1: [], 8: []}
    for seed in seeds:
        for levels in rows:
            rows[levels].append(run(changed(base, {"mgopt.levels": levels}), seed))
    single, eight = (reached(each) for each in rows.values())
    print(f"circles, {base.num_layers} blocks, {len(seeds)} seeds")
    for levels, found in zip(rows, (single, eight), strict=True):
        print(
            f"  {levels} levels: reached {len(found)}, V-cycles {spread(found, 'cycle')}, work "
            f"{spread(found, 'work')}, seconds {spread(found, 'seconds', 2)}"
        )
    print(f"  speed-up: work {speedup(single, eight, 'work')}, seconds {speedup(single, eight, 'seconds')}", flush=True)
    return {
        "circles_speedup": quotient(single, eight, "work"),
        "circles_seconds": quotient(single, eight, "seconds"),
    }


def depths(base: MGOptRunOptions, blocks: Sequence[int], seeds: Sequence[int]) -> dict[str, float]:
    """Cycles of six levels over depths."""
    means = []
    for num_layers in blocks:
        case = changed(base, {"num_layers": num_layers, "mgopt.levels": 6})
        found = reached([run(case, seed) for seed in seeds])
        if len(found) < len(seeds):
            raise SystemExit(f"error: {num_layers} blocks: {len(found)} of {len(seeds)} runs have reached the goal")
        print(f"circles, 6 levels, {num_layers:5d} blocks: V-cycles {spread(found, 'cycle')}", flush=True)
        means.append(mean(point["cycle"] for point in found.values()))
    return {"depth_spread": max(means) / min(means) - 1.0}


def mnist(base: MGOptRunOptions, seeds: Sequence[int]) -> dict[str, float]:
    """One level against eight, to the highest accuracy of the single one."""
    single: dict[int, Point] = {}
    eight: dict[int, Point] = {}
    for seed in seeds:
        alone = run(changed(base, {"mgopt.levels": 1}), seed)
        goal = best(alone)
        single[seed] = at_goal(alone, goal)
        other = run(replace(base, goal=goal), seed)
        eight |= reached([other])
        units = f"{eight[seed]['work']:.1f} with 8" if seed in eight else "not reached with 8"
        print(f"mnist, seed {seed}: {100 * goal:.2f} % in {single[seed]['work']:.1f} units with 1 level, {units}")
    each = ratios(single, eight, "work")
    print("  speed-ups: " + ", ".join(f"{ratio:.2f}" for ratio in each), flush=True)
    return {"mnist_speedup": quotient(single, eight, "work")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer seeds, layers and work units")
    parser.add_argument("--seeds", type=int)
    parser.add_argument("--num_layers", type=int)
    parser.add_argument("--blocks", type=common.integers)
    parser.add_argument("--max_work", type=float, default=400.0, help="work units of a run on circles at most")
    parser.add_argument("--mnist_seeds", type=int)
    parser.add_argument("--mnist_layers", type=int)
    parser.add_argument("--mnist_work", type=float, help="work units of the single level on MNIST")
    parser.add_argument("--mnist_samples", type=int, default=0, help="training images; 0 takes all")
    parser.add_argument("--data_dir", type=Path, help="folder of MNIST's files")
    arguments = parser.parse_args()
    defaults = {
        "seeds": (10, 3),
        "num_layers": (2048, 512),
        "blocks": ([128, 256, 512, 1024, 2048, 4096], [128, 512, 2048]),
        "mnist_seeds": (3, 1),
        "mnist_layers": (2048, 256),
        "mnist_work": (2000.0, 300.0),
    }
    for name, (full, quick) in defaults.items():
        if getattr(arguments, name) is None:
            setattr(arguments, name, quick if arguments.quick else full)
    names = ("num_layers", "max_work", "mnist_layers", "mnist_samples", "mnist_work", "data_dir")
    bases = MGOptStudyOptions(**{name: getattr(arguments, name) for name in names}).bases
    seeds = range(arguments.seeds)
    # The one that may lack its files comes first.
    figures = mnist(bases.mnist, range(arguments.mnist_seeds))
    figures |= circles(bases.circles, seeds)
    figures |= depths(bases.circles, arguments.blocks, seeds)
    common.finish("mgopt", figures)


if __name__ == "__main__":
    main()
