"""The study of nested iteration on peaks (paper 001, figures 3 and 4), in the paper's regime and in ours.

Widths 5 and 8, 64 layers, initial magnitudes {0, 1e-6}, Tikhonov {1e-5, 1e-7}, 12 initializations: 48 networks trained
by nested iteration, 48 with all layers from the start; then what the paper leaves open, and where the one is ahead.
Runs that are over are not made again. Try

    python drivers/nested_study.py
    python drivers/nested_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from rich.console import Console
from rich.progress import track
from studies.nested import page
from studies.study import RUNS, Settings, Study

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.data import peaks
from xbraid_py.data.dataset import Dataset
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.nested import NestedIteration, NestedOptions
from xbraid_py.optim import OneShotOptions
from xbraid_py.problem.network import InitialScales
from xbraid_py.problem.problem import DenseResNetOptions
from xbraid_py.problem.regularization import Regularization
from xbraid_py.recipes.classification import ClassificationOptions
from xbraid_py.run.launch import launch

# The paper's: small opening and classification layers, every L-BFGS pair taken, two iterations of V-cycles with
# rediscretized coarse levels for every update (10 for the first three after a refinement), plain sums for the
# regularization.
PAPER = ClassificationOptions(
    network=DenseResNetOptions(width=8),
    initial=InitialScales(opening=1e-3, layers=1e-6, classification=1e-3),
    regularization=Regularization(tikhonov=1e-5, ddt=1e-5, classification=1e-7, measure="sum"),
    optim=OneShotOptions(curvature_check=False),
    mgrit=MGRIT(cycle="V", cfactor=4, max_levels=2, max_iter=2, coarse_weights="inject", coarse_step="euler"),
)
REGIMES = {"paper": PAPER, "ours": ClassificationOptions()}
MAGNITUDES, TIKHONOV = (0.0, 1e-6), (1e-5, 1e-7)


@dataclass(frozen=True, kw_only=True)
class Options:
    """The study.

    Parameters
    ----------
    out
        Folder of the results, the tables and the pictures.
    workers
        Runs at the same time; one core each.
    inits
        Initializations of every network; a third of them in all parts but the first two.
    num_layers
        Of the finest networks.
    updates
        Schedule of the nested iteration, the coarsest of the three levels first.
    num_train
        Training points.
    num_val
        Validation points, as many of each class, as in the published files.
    validate_every
        Updates between two validations.
    parts
        Figure3 is the paper's, defaults the same with this project's initial weights; open, interpolation, iterations,
        start and depth answer questions about them.
    smoke
        A study of seconds: other defaults, each of which may still be given.
    """

    out: Path = Path("runs/nested_study")
    workers: int = 2
    inits: int = 12
    num_layers: int = 64
    updates: tuple[int, ...] = (200, 125, 75)
    num_train: int = 5000
    num_val: int = 2500
    validate_every: int = 5
    parts: tuple[str, ...] = ("figure3", "defaults", "open", "interpolation", "iterations", "start", "depth")
    smoke: bool = False

    def __post_init__(self):
        for name in ("workers", "inits", "num_train", "num_val", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 2")
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"parts={part} is none of {', '.join(PARTS)}; use figure3")
        NestedOptions(updates=self.updates).depths(self.num_layers)


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The study in seconds."""

    inits: int = 2
    num_layers: int = 16
    updates: tuple[int, ...] = (6, 4, 3)
    num_train: int = 100
    num_val: int = 100
    validate_every: int = 1
    parts: tuple[str, ...] = ("figure3", "interpolation")


def figure3(options: Options) -> Iterator[Settings]:
    """Two regimes, two widths, four hyper-parameters, nested or not."""
    for regime, width, layers, tikhonov, run in product(
        REGIMES, (8, 5), MAGNITUDES, TIKHONOV, ("nested", "non-nested")
    ):
        yield {"regime": regime, "width": width, "layers": layers, "tikhonov": tikhonov, "run": run}


def open_choices(options: Options) -> Iterator[Settings]:
    """What the paper does not say: one of our choices changed at a time."""
    for change, run in product(("bias", "uniform", "positive", "integral", "pairs"), ("nested", "non-nested")):
        yield {"regime": "paper", "width": 8, "layers": 1e-6, "tikhonov": 1e-5, "run": run, "change": change}


def interpolation(options: Options) -> Iterator[Settings]:
    """Linear interpolation of the weights instead of constant."""
    for regime in REGIMES:
        yield {"regime": regime, "width": 8, "layers": 1e-6, "tikhonov": 1e-5, "run": "nested", "change": "linear"}


def iterations(options: Options) -> Iterator[Settings]:
    """Two MGRIT iterations right after a refinement instead of ten, in each update one validation."""
    for change in ("every", "no boost"):
        yield {"regime": "paper", "width": 8, "layers": 1e-6, "tikhonov": 1e-5, "run": "nested", "change": change}


def defaults(options: Options) -> Iterator[Settings]:
    """Our own initial weights of the layers instead of the paper's."""
    for width, tikhonov, run in product((8, 5), TIKHONOV, ("nested", "non-nested")):
        yield {"regime": "ours", "width": width, "layers": 1e-1, "tikhonov": tikhonov, "run": run}


def start(options: Options) -> Iterator[Settings]:
    """Far too large ones."""
    for run in ("nested", "non-nested"):
        yield {"regime": "ours", "width": 8, "layers": 3e-1, "tikhonov": 1e-5, "run": run}


def depth(options: Options) -> Iterator[Settings]:
    """Four times as many layers."""
    for run in ("nested", "non-nested"):
        yield {"regime": "ours", "width": 8, "layers": 1e-6, "tikhonov": 1e-5, "run": run, "change": "deep"}


PARTS = {
    "figure3": figure3,
    "defaults": defaults,
    "open": open_choices,
    "interpolation": interpolation,
    "iterations": iterations,
    "start": start,
    "depth": depth,
}
# Parts of all initializations; a third of them answers the other questions.
FULL = ("figure3", "defaults")


def settings_of(options: Options) -> list[Settings]:
    """All runs of the study: of every seed in turn, so that a part of the study is a study of fewer seeds."""
    common = {
        "num_layers": options.num_layers,
        "updates": list(options.updates),
        "num_train": options.num_train,
        "num_val": options.num_val,
        "validate_every": options.validate_every,
        "validation": "balanced",
    }
    settings = []
    for seed in range(options.inits):
        parts = [part for part in options.parts if part in FULL or 3 * seed < options.inits]
        settings += [{**case, **common, "seed": seed} for part in parts for case in PARTS[part](options)]
    return settings


def changed(options: ClassificationOptions, change: str | None) -> ClassificationOptions:
    """The options with one choice made in another way."""
    match change:
        case "bias":
            return replace(options, network=replace(options.network, bias="scalar"))
        case "uniform" | "positive":
            return replace(options, initial=replace(options.initial, distribution=change))
        case "integral":
            return replace(options, regularization=replace(options.regularization, measure="integral"))
        case "pairs":
            return replace(options, optim=replace(options.optim, curvature_check=True))
        case "linear":
            return replace(options, nested=replace(options.nested, interpolation="linear"))
        case "no boost":
            return replace(options, optim=replace(options.optim, boost_updates=0), validate_every=1)
        case "every":
            return replace(options, validate_every=1)
        case "deep":
            return replace(options, num_layers=4 * options.num_layers)
    return options


def train(settings: Settings) -> dict:
    """One run: validation accuracy, objective, and the curve of its validations."""
    base = REGIMES[settings["regime"]]
    options = replace(
        base,
        num_layers=settings["num_layers"],
        seed=settings["seed"],
        validate_every=settings["validate_every"],
        network=replace(base.network, width=settings["width"]),
        initial=replace(base.initial, layers=settings["layers"]),
        regularization=replace(base.regularization, tikhonov=settings["tikhonov"]),
        nested=NestedOptions(updates=tuple(settings["updates"])),
    )
    options = changed(options, settings.get("change"))
    # The points are the same in all runs: what differs is the initialization.
    numbers = settings["num_train"], settings["num_val"]
    points, validation = peaks.generate(*numbers, 0, options.torch_dtype, balanced=True)
    _, square = peaks.generate(*numbers, 0, options.torch_dtype)
    nested = options.nested if settings["run"] == "nested" else options.nested.non_nested()
    run = options.run_of(options.problem(points, as_communicator(None)), nested)
    curve = []
    for record in run.run():
        if record.final or record.update % options.validate_every == 0:
            accuracy = share_of_right_ones(run, validation)
            curve.append([record.level, record.num_layers, record.update, record.work, record.seconds, accuracy])
    return {
        "val_accuracy": accuracy,
        "square_accuracy": share_of_right_ones(run, square),
        "train_accuracy": record.evaluation.accuracy,
        "objective": record.evaluation.value,
        "updates": record.update,
        "evaluations": record.evaluations,
        "work": record.work,
        "seconds": record.seconds,
        "curve": [[*row[:3], *(round(value, 4) for value in row[3:])] for row in curve],
    }


def share_of_right_ones(run: NestedIteration, points: Dataset) -> float:
    """Accuracy of the present network."""
    return float((run.network.predict(run.weights, points.features) == points.labels).double().mean())


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    if comm.size > 1:
        raise ValueError(f"{comm.size} ranks: the study has workers of its own; start it without mpirun")
    study = Study(options.out, train, options.workers)
    settings = settings_of(options)
    console = Console(stderr=True)

    def run() -> None:
        rows = []
        over = track(study.run(settings), "runs", len(settings), console=console, disable=not console.is_terminal)
        for row in over:
            rows.append(row)
            if "failure" in row:
                console.print(f"{row['settings']}: {row['failure']}")
        page.write(rows, options.out)
        print(f"{len(rows)} runs in {options.out / RUNS}; tables in {options.out / page.PAGE}")

    return run


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
