"""The study of nested iteration: its options, and which runs each part is made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from studies.nested import tuning
from studies.study import Result, Settings, StudyOptions
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.optim.options import OneShotOptions
from xbraid_py.problem.options import DenseResNetOptions, InitialScales
from xbraid_py.problem.regularization import Regularization
from xbraid_py.recipes.options.classification import ClassificationOptions

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
RUNS = ("nested", "non-nested")


def figure3() -> Iterator[Settings]:
    """Two regimes, two widths, four hyper-parameters, nested or not."""
    for regime, width, layers, tikhonov, run in product(REGIMES, (8, 5), MAGNITUDES, TIKHONOV, RUNS):
        yield {"regime": regime, "width": width, "layers": layers, "tikhonov": tikhonov, "run": run}


def open_choices() -> Iterator[Settings]:
    """What the paper does not say: one of our choices changed at a time."""
    for change, run in product(("bias", "uniform", "positive", "integral", "pairs"), RUNS):
        yield {"regime": "paper", "width": 8, "layers": 1e-6, "tikhonov": 1e-5, "run": run, "change": change}


def interpolation() -> Iterator[Settings]:
    """Linear interpolation of the weights instead of constant."""
    for regime in REGIMES:
        yield {"regime": regime, "width": 8, "layers": 1e-6, "tikhonov": 1e-5, "run": "nested", "change": "linear"}


def iterations() -> Iterator[Settings]:
    """Two MGRIT iterations right after a refinement instead of ten, in each update one validation."""
    for change in ("every", "no boost"):
        yield {"regime": "paper", "width": 8, "layers": 1e-6, "tikhonov": 1e-5, "run": "nested", "change": change}


def defaults() -> Iterator[Settings]:
    """Our own initial weights of the layers instead of the paper's."""
    for width, tikhonov, run in product((8, 5), TIKHONOV, RUNS):
        yield {"regime": "ours", "width": width, "layers": 1e-1, "tikhonov": tikhonov, "run": run}


def start() -> Iterator[Settings]:
    """Far too large ones."""
    for run in RUNS:
        yield {"regime": "ours", "width": 8, "layers": 3e-1, "tikhonov": 1e-5, "run": run}


def depth() -> Iterator[Settings]:
    """Four times as many layers."""
    for run in RUNS:
        yield {"regime": "ours", "width": 8, "layers": 1e-6, "tikhonov": 1e-5, "run": run, "change": "deep"}


def convergence() -> Iterator[Settings]:
    """How fast the solver converges after a refinement by either interpolation; the networks are trained for that."""
    for (regime, layers), change in product((("paper", 1e-6), ("ours", 1e-1)), ("convergence", "convergence, deep")):
        case = {"regime": regime, "width": 8, "layers": layers, "tikhonov": 1e-5, "run": "nested"}
        yield {**case, "change": change}


PARTS: dict[str, Callable[[], Iterator[Settings]]] = {
    "figure3": figure3,
    "defaults": defaults,
    "open": open_choices,
    "interpolation": interpolation,
    "iterations": iterations,
    "start": start,
    "depth": depth,
    "convergence": convergence,
}
# Parts of all initializations; a third of them answers the other questions.
FULL = ("figure3", "defaults")
# What is not run by default.
TUNED = "tuned_alike"
LATER = ("convergence", TUNED)


@dataclass(frozen=True, kw_only=True)
class NestedStudyOptions(StudyOptions):
    """The study.

    Parameters
    ----------
    seeds
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
        start and depth answer questions about them. Not among the defaults are convergence, of the solver after a
        refinement by either interpolation, and tuned_alike, either method with the best of the same settings, on other
        seeds.
    """

    out: Path = Path("runs/nested_study")
    seeds: int = 12
    num_layers: int = 64
    updates: tuple[int, ...] = (200, 125, 75)
    num_train: int = 5000
    num_val: int = 2500
    validate_every: int = 5
    parts: tuple[str, ...] = tuple(part for part in PARTS if part not in LATER)

    def __post_init__(self):
        super().__post_init__()
        for name in ("num_train", "num_val", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 2")
        for part in self.parts:
            if part not in (*PARTS, TUNED):
                raise ValueError(f"parts={part} is none of {', '.join((*PARTS, TUNED))}; use figure3")
        NestedOptions(updates=self.updates).depths(self.num_layers)

    def settings(self) -> list[Settings]:
        """All runs of the study: of every seed in turn, so that a part of the study is a study of fewer seeds."""
        settings = []
        for seed in range(self.seeds):
            parts = [part for part in self.parts if part in FULL or (3 * seed < self.seeds and part != TUNED)]
            settings += [{**case, **self.common, "seed": seed} for part in parts for case in PARTS[part]()]
        return settings + (tuning.trials(self.common) if TUNED in self.parts else [])

    def second_stage(self, rows: Mapping[str, Result]) -> list[Settings]:
        """The runs whose settings are those that were the best."""
        return tuning.fresh(self.common, rows, self.seeds) if TUNED in self.parts else []

    @property
    def common(self) -> Settings:
        """What all runs have in common."""
        return {
            "num_layers": self.num_layers,
            "updates": list(self.updates),
            "num_train": self.num_train,
            "num_val": self.num_val,
            "validate_every": self.validate_every,
            "validation": "balanced",
        }


def options_of(settings: Settings) -> ClassificationOptions:
    """The options of the recipe that the settings of a run stand for."""
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
    match settings.get("change"):
        case "bias":
            return replace(options, network=replace(options.network, bias="scalar"))
        case "uniform" | "positive" as distribution:
            return replace(options, initial=replace(options.initial, distribution=distribution))
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
        case "tuned alike":
            return tuning.applied(options, settings)
        case "deep" | "convergence, deep":
            return replace(options, num_layers=4 * options.num_layers)
    return options
