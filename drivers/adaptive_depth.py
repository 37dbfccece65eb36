"""Adaptive depth: layers cut in two only where it is worth it, against refinement of all layers.

For each seed five runs of as many updates, all but the last one with the same number on every level:

    uniform    all layers are cut at each refinement, up to num_layers
    adaptive   those with a large indicator
    even       as many as the adaptive run has cut, spread evenly: what the indicator is good for
    fewer      all layers, from a coarser network to about as many layers as the adaptive run ended with
    coarsest   none: the network that the others begin with, but "fewer"

On peaks, or on the digits of MNIST as columns of pixels. Runs that are over are not made again. Try

    python drivers/adaptive_depth.py
    mpirun -n 2 python drivers/adaptive_depth.py --data mnist --out runs/adaptive_mnist
    python drivers/adaptive_depth.py --smoke --out /tmp/adaptive
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from studies.adaptive_depth import page
from studies.study import RUNS, Settings, together

from xbraid_py.comm import Communicator
from xbraid_py.data import mnist, peaks
from xbraid_py.data.dataset import Dataset
from xbraid_py.data.mnist import columns
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.adaptive import AdaptiveOptions
from xbraid_py.multilevel.depth.nested import NestedOptions
from xbraid_py.problem.network import InitialScales
from xbraid_py.problem.problem import DenseResNetOptions
from xbraid_py.recipes.classification import ClassificationOptions
from xbraid_py.run.launch import launch
from xbraid_py.run.options import from_dict, to_dict

# Initial weights of the opening layer: 784 pixels add up to more than two coordinates do.
OPENING = {"peaks": 1.0, "mnist": 0.1}


@dataclass(frozen=True, kw_only=True)
class Options:
    """The study.

    Parameters
    ----------
    out
        Folder of the results, the table and the pictures.
    data
        Points of peaks, or digits of MNIST.
    data_dir
        Folder of the files of MNIST.
    seeds
        Runs of each kind.
    first_seed
        Of the seeds, which are those of the initial weights, and of the points of peaks.
    num_layers
        Of the uniform runs at their end.
    width
        Channels.
    train_samples
        Training samples.
    val_samples
        Validation samples.
    validate_every
        Updates between two validations.
    nested
        Schedule of all runs, and what the adaptive ones cut.
    mgrit
        Solver of all runs.
    smoke
        A study of seconds: other defaults, each of which may still be given.
    """

    out: Path = Path("runs/adaptive_depth")
    data: Literal["peaks", "mnist"] = "peaks"
    data_dir: Path | None = None
    seeds: int = 5
    first_seed: int = 0
    num_layers: int = 64
    width: int = 8
    train_samples: int = 5000
    val_samples: int = 5000
    validate_every: int = 5
    nested: NestedOptions = NestedOptions(adaptive=AdaptiveOptions())
    mgrit: MGRIT = MGRIT()
    smoke: bool = False

    def __post_init__(self):
        for name in ("seeds", "train_samples", "val_samples", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 5")
        if self.nested.adaptive is None:
            raise ValueError("nested.adaptive=None leaves nothing to compare; use nested.adaptive.indicator=richardson")
        self.nested.depths(self.num_layers)
        DenseResNetOptions(width=self.width)


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The study in seconds."""

    seeds: int = 2
    num_layers: int = 32
    train_samples: int = 200
    val_samples: int = 200
    validate_every: int = 2
    nested: NestedOptions = NestedOptions(updates=(8, 6, 4), adaptive=AdaptiveOptions())
    mgrit: MGRIT = MGRIT(max_levels=1)


def samples(settings: Settings) -> tuple[Dataset, Dataset]:
    """Training and validation samples."""
    numbers = settings["train_samples"], settings["val_samples"]
    if settings["data"] == "peaks":
        return peaks.generate(*numbers, settings["seed"])
    halves = columns(mnist.load(settings["data_dir"]), num_train=numbers[0], num_test=numbers[1])
    return tuple(Dataset(*half.samples(), mnist.NUM_CLASSES) for half in halves)


def train(settings: Settings, comm: Communicator) -> dict:
    """One run: accuracies, size, grids, and the curve of its validations."""
    schedule, adaptive = settings["nested"], settings["nested"]["adaptive"]
    schedule = {**schedule, "adaptive": adaptive and from_dict(AdaptiveOptions, adaptive)}
    options = ClassificationOptions(
        num_layers=settings["num_layers"],
        seed=settings["seed"],
        network=DenseResNetOptions(width=settings["width"]),
        initial=InitialScales(opening=OPENING[settings["data"]]),
        nested=from_dict(NestedOptions, schedule),
        mgrit=from_dict(MGRIT, settings["mgrit"]),
    )
    points, validation = samples(settings)
    run = options.run_of(options.problem(points, comm), options.nested)
    curve, grids = [], []
    for record in run.run():
        if not grids or record.num_layers != len(grids[-1]):
            grids.append(run.grid.sizes())
        if record.final or record.update % settings["validate_every"] == 0:
            predicted = run.network.predict(run.weights, validation.features)
            accuracy = float((predicted == validation.labels).double().mean())
            curve.append([record.update, round(record.work, 3), record.num_layers, accuracy])
    return {
        "val_accuracy": accuracy,
        "train_accuracy": record.evaluation.accuracy,
        "objective": record.evaluation.value,
        "num_layers": record.num_layers,
        "num_parameters": run.network.layout.num_parameters,
        # In units of the uniform run's network, whatever the run.
        "work": record.work * run.problem.work_unit(options.num_layers) / run.problem.work_unit(settings["unit"]),
        "seconds": record.seconds,
        "grids": grids,
        "curve": curve,
    }


def runs_of(options: Options, seed: int, make: Callable[[Settings], dict]) -> list[dict]:
    """The runs of a seed."""
    names = ("data", "num_layers", "width", "train_samples", "val_samples", "validate_every")
    common = {name: getattr(options, name) for name in names} | {"seed": seed, "unit": options.num_layers}
    common |= {"data_dir": options.data_dir and str(options.data_dir), "mgrit": to_dict(options.mgrit)}
    nested = options.nested

    def made(kind: str, schedule: NestedOptions, num_layers: int = options.num_layers) -> dict:
        return make({**common, "run": kind, "num_layers": num_layers, "nested": to_dict(schedule)})

    rows = [made("uniform", replace(nested, adaptive=None)), made("adaptive", nested)]
    if "result" in rows[-1]:
        last, cut = rows[-1]["result"]["num_layers"], 2**nested.refinements
        share = (last * cut / options.num_layers) ** (1 / max(1, nested.refinements)) - 1
        if share > 0:
            even = AdaptiveOptions(indicator="even", marking="share", fraction=min(1.0, share), max_layers=last)
            rows.append(made("even", replace(nested, adaptive=even)))
        rows.append(made("fewer", replace(nested, adaptive=None), max(cut, cut * round(last / cut))))
    alone = replace(nested, adaptive=None, refinements=0, updates=(sum(nested.updates),))
    rows.append(made("coarsest", alone, options.num_layers >> nested.refinements))
    return rows


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    if options.data == "mnist":
        columns(mnist.load(options.data_dir), num_train=options.train_samples, num_test=options.val_samples)

    def run() -> None:
        with together(options.out, train, comm) as make:
            rows = []
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                rows += runs_of(options, seed, make)
            if comm.rank == 0:
                page.write(rows, options.out)
                print(f"{len(rows)} runs in {options.out / RUNS}; table in {options.out / page.PAGE}")

    return run


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
