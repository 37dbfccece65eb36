"""The study of MG/OPT in depth: its options, which runs each part is made of, and how learning rates are tuned."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

from studies.mgopt.case import PeaksOptions, changed, runs
from studies.mgopt.rows import merit
from studies.study import Parts, Result, Settings, StudyOptions, key
from xbraid_py.recipes.options.mgopt import CirclesOptions, MGOptRunOptions, MnistColumnsOptions

TUNING = 100  # the first seed that learning rates are tuned on
MOST = 1_000_000  # cycles: it is the work that ends a run
LEVELS = (1, 2, 4, 6, 8)
SCHEDULES = (
    "[1, 1, 1, 1, 1, 1, 1, {1}]",
    "[1, 1, 1, 1, 1, 1, 1, {2}]",
    "[1, 1, 1, 1, 1, 1, 1, {5}]",
    "[1, 1, 1, 1, 1, 1, 1, {10}]",
    "[1, 1, 1, 1, 2, 2, 2, {2}]",
    "[(1), 1, 1, 1, 2, 2, 2, {2}]",
)
# The methods of the levels: what changes, and the learning rates to choose from.
_GD, _L2 = (0.1, 0.2, 0.5, 1.0, 2.0), (0.01, 0.02, 0.05, 0.1, 0.2)
_MOMENTUM, _ADAM = (0.02, 0.05, 0.1, 0.2), (0.003, 0.01, 0.03, 0.1)
_IN_L2, _ANEW, _CARRIED = {"mgopt.metric": "L2"}, {"mgopt.optim.keep": False}, {"mgopt.carry_momentum": 1.0}
_BY_MOMENTUM, _BY_ADAM = ({"mgopt.optim.method": (name,)} for name in ("momentum", "adam"))
_BY_LBFGS = {"mgopt.optim.method": ("lbfgs",), "mgopt.optim.line_search": True}
METHODS = {
    "gd": ({}, _GD),
    "gd, L2": (_IN_L2, _L2),
    "momentum": (_BY_MOMENTUM, _MOMENTUM),
    "momentum, L2": (_BY_MOMENTUM | _IN_L2, _L2),
    "momentum anew": (_BY_MOMENTUM | _ANEW, _GD),
    "momentum carried": (_BY_MOMENTUM | _CARRIED, _MOMENTUM),
    "adam": (_BY_ADAM, _ADAM),
    "adam anew": (_BY_ADAM | _ANEW, _ADAM),
    "adam carried": (_BY_ADAM | _CARRIED, _ADAM),
    "lbfgs": (_BY_LBFGS, (1.0,)),
    "lbfgs, L2": (_BY_LBFGS | _IN_L2, (1.0,)),
    "lbfgs anew": (_BY_LBFGS | _ANEW, (1.0,)),
}


@dataclass(frozen=True)
class Bases:
    """What the parts change one thing of: the 8-level method on each problem; and the depths of figure 5."""

    circles: CirclesOptions
    peaks: PeaksOptions
    mnist: MnistColumnsOptions
    blocks: tuple[int, ...]


def table1(bases: Bases) -> Iterator[MGOptRunOptions]:
    """Numbers of levels (table 1, figure 4)."""
    for levels in LEVELS:
        yield changed(bases.circles, {"mgopt.levels": levels})


def figure5(bases: Bases) -> Iterator[MGOptRunOptions]:
    """Depths, by the paper's six levels and by eight."""
    for levels, blocks in product((6, 8), bases.blocks):
        yield changed(bases.circles, {"num_layers": blocks, "mgopt.levels": levels})


def table2(bases: Bases) -> Iterator[MGOptRunOptions]:
    """Steps of the optimizers on the levels."""
    for schedule in SCHEDULES:
        yield changed(bases.circles, {"mgopt.schedule": schedule})


def hyper(bases: Bases) -> Iterator[MGOptRunOptions]:
    """The nine settings of the paper's section 4.1."""
    for rate, beta, levels in product((0.05, 0.1, 0.5), (1e-3, 1e-4, 1e-5), (1, 8)):
        how = {"beta": beta, "mgopt.levels": levels, "mgopt.optim.learning_rate": (rate,)}
        yield changed(bases.circles, how)


def sampling(bases: Bases) -> Iterator[MGOptRunOptions]:
    """The other reading of the data: points uniform in the square, no gap between the classes."""
    for levels in LEVELS:
        yield changed(bases.circles, {"sampling": "square", "mgopt.levels": levels})


def transfers(bases: Bases) -> Iterator[MGOptRunOptions]:
    """Restriction of the weights, interpolation, line search on the correction."""
    for restriction, interpolation, search in product(
        ("inject", "average", "transpose"), ("constant", "linear"), (False, True)
    ):
        how = {"mgopt.restriction": restriction, "mgopt.interpolation": interpolation, "mgopt.line_search": search}
        yield changed(bases.circles, how)


def initialization(bases: Bases) -> Iterator[MGOptRunOptions]:
    """A full-multigrid start, which paper 000 calls possible (section 1), and runs without."""
    for levels, cycles in product((4, 8), (0, 1)):
        yield changed(bases.circles, {"mgopt.levels": levels, "mgopt.full_multigrid": cycles})


def ablation(bases: Bases) -> Iterator[MGOptRunOptions]:
    """Which weights may move on which level: what does the work?"""
    for moves in (("all", "all"), ("ends", "ends"), ("all", "layers"), ("all", "ends"), ("layers", "layers")):
        for levels in (1, 4, 8):
            how = {"mgopt.fine_moves": moves[0], "mgopt.coarse_moves": moves[1], "mgopt.levels": levels}
            yield changed(bases.circles, how)


def on_mnist(bases: Bases) -> Iterator[MGOptRunOptions]:
    """Table 1 on MNIST; methods of more levels are given less work, as they need less."""
    for levels, share in zip(LEVELS, (1.0, 1.0, 0.7, 0.5, 0.45), strict=True):
        yield changed(bases.mnist, {"mgopt.levels": levels, "max_work": share * bases.mnist.max_work})


def mnist_blocks(bases: Bases) -> Iterator[MGOptRunOptions]:
    """Figure 5 on MNIST: depths, by eight levels, to 70 %."""
    for blocks in bases.blocks:
        yield replace(bases.mnist, num_layers=blocks, goal=0.7, max_work=0.2 * bases.mnist.max_work)


def mnist_epochs(bases: Bases) -> Iterator[MGOptRunOptions]:
    """Table 1 on MNIST to the paper's 93 %: up to 600 epochs of 60 minibatches for a single level."""
    base = replace(bases.mnist, goal=0.93, max_work=36 * bases.mnist.max_work)
    for levels in LEVELS:
        yield changed(base, {"mgopt.levels": levels})


PARTS: dict[str, Callable[[Bases], Iterator[MGOptRunOptions]]] = {
    "table1": table1,
    "figure5": figure5,
    "table2": table2,
    "hyper": hyper,
    "sampling": sampling,
    "transfers": transfers,
    "initialization": initialization,
    "ablation": ablation,
    "mnist": on_mnist,
    "mnist_blocks": mnist_blocks,
    "mnist_epochs": mnist_epochs,
}
METHOD_PARTS = ("methods_circles", "methods_peaks", "methods_mnist")


def competitors(bases: Bases, part: str) -> dict[tuple[str, int], tuple[MGOptRunOptions, tuple[float, ...]]]:
    """By method and number of levels: the case, and the learning rates to choose from."""
    base: MGOptRunOptions = getattr(bases, part.removeprefix("methods_"))
    names = list(METHODS)
    if part == "methods_mnist":
        # Short runs, and those methods that minibatches suit: pairs of L-BFGS hold for one minibatch.
        base, names = replace(base, max_work=0.1 * base.max_work), ["gd", "momentum", "momentum carried", "adam"]
    found = {}
    # With T=5 two layers on the coarsest of eight levels would be no discretization of anything.
    for name, levels in product(names, (1, 4) if part == "methods_peaks" else (1, 8)):
        changes, rates = METHODS[name]
        # On a single level nothing is left of momentum that begins anew at every step, and none is carried.
        if levels > 1 or not name.endswith(("anew", "carried")):
            found[name, levels] = changed(base, changes | {"mgopt.levels": levels}), rates
    return found


@dataclass(frozen=True, kw_only=True)
class MGOptStudyOptions(StudyOptions):
    """The study.

    Parameters
    ----------
    seeds
        Of points and initial weights, from 0 on.
    few_seeds
        The same of the parts sampling, transfers, ablation and mnist_epochs.
    mnist_seeds
        The same on MNIST and on peaks.
    tuning_seeds
        Seeds that learning rates are tuned on, from 100 on.
    tuning_work
        Work units of a run that tunes.
    num_layers
        Residual layers of the finest networks.
    peaks_layers
        The same on peaks.
    mnist_layers
        The same on MNIST.
    blocks
        Residual layers of the finest networks of figure 5.
    num_train
        Training points of circles; half as many of peaks.
    num_val
        Validation points of circles and peaks.
    mnist_samples
        Training images, and half as many for validation; 0 takes all.
    mnist_work
        Work units of the single level on MNIST.
    max_work
        Work units of a run that does not reach its goal.
    data_dir
        Folder of MNIST's files.
    parts
        Table1 (with figure 4), figure5, table2, hyper, sampling, transfers and ablation are on circles; methods_circles
        and methods_peaks compare the optimizers of the levels; mnist and mnist_blocks repeat table 1 and figure 5,
        methods_mnist compares the optimizers there. Not among the defaults are initialization, a full-multigrid start
        on circles, and mnist_epochs, table 1 there to the paper's 93 %, with some 90,000 work units for each of
        few_seeds: hours.
    """

    out: Path = Path("runs/mgopt_study")
    seeds: int = 10
    few_seeds: int = 3
    mnist_seeds: int = 5
    tuning_seeds: int = 2
    tuning_work: float = 100.0
    num_layers: int = 2048
    peaks_layers: int = 256
    mnist_layers: int = 2048
    blocks: tuple[int, ...] = (128, 256, 512, 1024, 2048, 4096)
    num_train: int = 2000
    num_val: int = 1000
    mnist_samples: int = 0
    mnist_work: float = 1000.0
    max_work: float = 400.0
    data_dir: Path | None = None
    parts: tuple[str, ...] = (
        "table1",
        "figure5",
        "table2",
        "hyper",
        "sampling",
        "transfers",
        "ablation",
        "methods_circles",
        "methods_peaks",
        "mnist",
        "mnist_blocks",
        "methods_mnist",
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("few_seeds", "mnist_seeds", "tuning_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 2")
        for name in ("num_layers", "peaks_layers", "mnist_layers", "blocks"):
            for value in getattr(self, name) if name == "blocks" else (getattr(self, name),):
                if value < 128 or value % 128:
                    raise ValueError(f"{name}={value} is not a multiple of 128 = 2^(8 - 1) for 8 levels; use 128")
        for part in self.parts:
            if part not in PARTS and part not in METHOD_PARTS:
                raise ValueError(f"parts={part} is none of {', '.join((*PARTS, *METHOD_PARTS))}; use table1")

    def seeds_of(self, part: str) -> range:
        """The seeds of a part of the study."""
        if part in ("sampling", "transfers", "ablation", "mnist_epochs"):
            return range(self.few_seeds)
        return range(self.mnist_seeds if "mnist" in part or "peaks" in part else self.seeds)

    @property
    def bases(self) -> Bases:
        """The 8-level method of paper 000 on each problem, at these sizes."""
        common = {"num_val": self.num_val, "max_work": self.max_work, "max_cycles": MOST}
        # No goal on MNIST and on peaks: runs are compared at several accuracies.
        return Bases(
            CirclesOptions(num_layers=self.num_layers, num_train=self.num_train, **common),
            PeaksOptions(num_layers=self.peaks_layers, num_train=self.num_train // 2, **common),
            MnistColumnsOptions(
                num_layers=self.mnist_layers,
                num_train=self.mnist_samples or None,
                num_test=self.mnist_samples // 2 or None,
                goal=1.0,
                max_work=self.mnist_work,
                max_cycles=MOST,
                data_dir=self.data_dir,
            ),
            self.blocks,
        )

    def first_stage(self, rows: Mapping[str, Result]) -> Parts:
        """The settings of each part; of the comparisons of methods those that tune."""
        found = {}
        for part in self.parts:
            if part in PARTS:
                # Runs of hours are validated more rarely: four times in an epoch of a single level.
                apart = 15.0 if part == "mnist_epochs" else 5.0
                found[part] = runs(PARTS[part](self.bases), self.seeds_of(part), apart)
            else:
                chosen = competitors(self.bases, part).values()
                found[part] = [run for case, rates in chosen for rate in rates for run in self.tuning(case, rate)]
        return found

    def second_stage(self, rows: Mapping[str, Result]) -> Parts:
        """The comparisons of methods on seeds that they were not tuned on, each with its best learning rate."""
        found = {}
        for part in self.parts:
            if part in METHOD_PARTS:
                cases = []
                for case, rates in competitors(self.bases, part).values():
                    merits = {rate: merit([rows[key(run)] for run in self.tuning(case, rate)]) for rate in rates}
                    best = max(rates, key=merits.__getitem__)
                    cases.append(changed(case, {"mgopt.optim.learning_rate": (best,)}))
                found[part] = runs(cases, self.seeds_of(part))
        return found

    def tuning(self, case: MGOptRunOptions, rate: float) -> list[Settings]:
        """The runs that tell how good a learning rate is."""
        how = {"mgopt.optim.learning_rate": (rate,), "max_work": min(case.max_work, self.tuning_work)}
        return runs([changed(case, how)], range(TUNING, TUNING + self.tuning_seeds))
