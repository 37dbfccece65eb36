"""The study of multilevel training in width: its options, which runs each part is made of, and how rates are tuned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import sqrt
from pathlib import Path
from typing import Any, Literal

from studies.study import Parts, Result, Settings, StudyOptions, key
from studies.width.case import changed, options_of, runs
from studies.width.rows import merit
from xbraid_py.multilevel.width.options import WidthOptions
from xbraid_py.recipes.options.device import DeviceOptions
from xbraid_py.recipes.options.width import PROBLEMS, WidthNetwork, WidthRunOptions, check_inputs

TUNING = 100  # the first seed that learning rates are tuned on
# "Stability tuning" of the paper's section 8.3; section 8.2.1 is without it, which we read as no damping at all.
DAMPED = {"eta": 2 * sqrt(2), "gamma": 0.125, "alpha_m": 0.2}
UNDAMPED = {"eta": 1.0, "gamma": 1.0, "alpha_m": 1.0}
# Most steps on the coarse level, where they are cheap, and little that holds it back.
COARSE = {"steps": 1, "coarse_steps": 32, "gamma": 0.0, "eta": 1.0, "alpha_m": 0.0}
# Other options of the training than those of the two-level method, by what they are called.
Changes = Mapping[str, Mapping[str, Any]]
# What the scan changes: the last two are of one level. Where a neuron's gradient has been 0, Adam's second moment is 0
# too, and the momentum of its partner, prolonged, makes a step of any size: none is carried.
SCAN: Changes = {
    "two levels": {},
    "no tau": {"gamma": 0.0},
    "gamma 0.5": {"gamma": 0.5},
    "gamma 1": {"gamma": 1.0},
    "alpha_m 0": {"alpha_m": 0.0},
    "alpha_m 1": {"alpha_m": 1.0},
    "no damping": UNDAMPED,
    "eq. 32": {"pairs": WidthOptions(scaling="mean")},
    "sums": {"pairs": WidthOptions(scaling="sums")},
    "other minibatches for tau": {"tau": "other"},
    "eta 1": {"eta": 1.0},
    "mutual matching": {"pairs": WidthOptions(matching="mutual")},
    "coarse steps": COARSE,
    "coarse steps, levels 3": COARSE | {"levels": 3},
    "adam": {"method": "adam", "alpha_m": 0.0},
    "adam, no tau": {"method": "adam", "alpha_m": 0.0, "gamma": 0.0},
    "adam, coarse steps": COARSE | {"method": "adam"},
    "sgd alone": {"levels": 1},
    "adam alone": {"method": "adam", "levels": 1},
}


def _levels(most: int, changes: Mapping[str, Any] | None = None) -> Changes:
    # What is changed is the cycle: one level alone is the same run in all parts.
    cycle = changes or {}
    return {f"levels {n}": {"levels": n, **(cycle if n > 1 else {})} for n in range(1, most + 1)}


# By part: the problem and its network, and what is changed.
FIXED: dict[str, tuple[str, Changes]] = {
    "table1": ("poisson", _levels(4)),
    "table1_undamped": ("poisson", _levels(2, UNDAMPED)),
    "table1_conv": ("poisson_conv", _levels(4)),
    "table2": ("darcy", _levels(2, UNDAMPED)),
    "table2_conv": ("darcy_conv", _levels(2, UNDAMPED)),
    "table3": ("darcy", _levels(5, DAMPED)),
    "table3_conv": ("darcy_conv", _levels(5, DAMPED)),
    "table4": (
        "darcy",
        {f"eta {eta:.3g}": DAMPED | {"levels": 4, "eta": eta} for eta in (1.0, sqrt(2), 2.0, 2 * sqrt(2), 4.0)},
    ),
}
# Each method with the best of several learning rates.
TUNED: dict[str, tuple[str, Changes]] = {
    "tuned": ("poisson", _levels(4)),
    "tuned_conv": ("poisson_conv", _levels(2)),
    "tuned_darcy": (
        "darcy",
        {
            "levels 1": {"levels": 1},
            "levels 2": DAMPED | {"levels": 2},
            "levels 2, no damping": UNDAMPED | {"levels": 2},
            "adam alone": {"method": "adam", "levels": 1, "weight_decay": 0.0},
        },
    ),
    "scan": ("poisson", SCAN),
}


@dataclass(frozen=True, kw_only=True)
class WidthStudyOptions(DeviceOptions, StudyOptions):
    """The study.

    Parameters
    ----------
    data_dir
        Folder of the samples; by default data in the out folder.
    most_levels
        Leave out runs with more levels than this.
    tuning_seeds
        Seeds that learning rates are tuned on, from 100 on.
    tuning_work
        Work units of the runs that tune; 0 for those of the others.
    num_train, num_val
        Samples of Poisson's problem for training and for validation.
    darcy_train, darcy_val
        Of Darcy's.
    target
        What is learned of Darcy's problem.
    inputs
        What its inputs hold.
    mesh
        Points in each direction.
    max_work
        Work units of a run.
    count_tau
        Whether those of tau are among them; if not a run is longer, and may be judged in either way.
    validate_every
        Work units between two validations.
    batch_size
        Samples of a minibatch.
    standardize
        Inputs and targets of mean 0 and deviation 1.
    poisson, darcy
        The fully-connected networks.
    poisson_conv, darcy_conv
        The convolutional ones.
    rates
        Learning rates of SGD to choose from.
    adam_rates
        Learning rates of Adam to choose from.
    methods
        What the scan compares.
    parts
        Table1, table2 and table3 have the paper's learning rate, and convolutional networks with _conv behind their
        names; table1 and table3 are damped, table1_undamped and table2 are not. Table4 is of learning rates on the
        levels. Tuned (with _conv) compares numbers of levels, tuned_darcy one and two of them, damped and not, and
        Adam, and scan the settings of two levels, each with the best of several learning rates.
    """

    out: Path = Path("runs/width_study")
    seeds: int = 5
    data_dir: Path | None = None
    most_levels: int = 5
    tuning_seeds: int = 2
    tuning_work: float = 0.0
    num_train: int = 9000
    num_val: int = 1000
    darcy_train: int = 40_000
    darcy_val: int = 10_000
    target: Literal["flux", "pressure"] = "flux"
    inputs: tuple[str, ...] = ("log_k",)
    mesh: int = 32
    max_work: float = 10_000.0
    count_tau: bool = False
    validate_every: float = 50.0
    batch_size: int = 200
    standardize: bool = False
    poisson: WidthNetwork = WidthNetwork()
    poisson_conv: WidthNetwork = WidthNetwork(kind="convolutional")
    darcy: WidthNetwork = WidthNetwork()
    darcy_conv: WidthNetwork = WidthNetwork(kind="convolutional")
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    adam_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    methods: tuple[str, ...] = tuple(SCAN)
    parts: tuple[str, ...] = ("tuned", "scan", "table1", "table2", "table3", "table4")

    def __post_init__(self):
        DeviceOptions.__post_init__(self)
        StudyOptions.__post_init__(self)
        for name in ("tuning_seeds", "most_levels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 2")
        for name in ("rates", "adam_rates"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name}={list(getattr(self, name))} must be positive numbers; use 0.01,0.1")
        for name, known, use in (("methods", SCAN, list(SCAN)[:2]), ("parts", FIXED | TUNED, "table1")):
            for each in getattr(self, name):
                if each not in known:
                    raise ValueError(f"{name}={each} is none of {', '.join(known)}; use {use}")
        check_inputs(self.inputs)
        if not 1 <= self.batch_size <= self.darcy_train:
            raise ValueError(f"batch_size={self.batch_size} must lie in 1 .. darcy_train={self.darcy_train}; use 200")
        if self.darcy_val < 1:
            raise ValueError(f"darcy_val={self.darcy_val} must be at least 1; use 10000")
        for part in self.parts:
            for case in self.cases(part).values():
                _ = case.layers

    def base(self, name: str) -> WidthRunOptions:
        """The two-level method of paper 002 on a problem, poisson or darcy, with its convolutional network or not."""
        names, problem = "mesh max_work validate_every batch_size standardize".split(), name.removesuffix("_conv")
        sizes = {name: getattr(self, name) for name in names}
        if problem == "darcy":
            sizes |= {"num_train": self.darcy_train, "num_val": self.darcy_val}
            sizes |= {"target": self.target, "inputs": self.inputs}
        else:
            sizes |= {"num_train": self.num_train, "num_val": self.num_val}
        return PROBLEMS[problem](network=getattr(self, name), count_tau=self.count_tau, **sizes)

    def cases(self, part: str) -> dict[str, WidthRunOptions]:
        """The runs of a part by what they are called, those that compete with their first learning rate."""
        name, changes = (FIXED | TUNED)[part]
        base, names = self.base(name), self.methods if part == "scan" else changes
        found = {name: changed(base, **changes[name]) for name in names}
        return {name: case for name, case in found.items() if case.training.levels <= self.most_levels}

    def rates_of(self, case: WidthRunOptions) -> tuple[float, ...]:
        """Learning rates that a run has to choose from."""
        return self.adam_rates if case.training.method == "adam" else self.rates

    def first_stage(self, rows: Mapping[str, Result]) -> Parts:
        """The settings of each part; of those with competitors the runs that tune."""
        found = {}
        for part in self.parts:
            cases = self.cases(part).values()
            if part in FIXED:
                found[part] = runs(cases, range(self.seeds))
            else:
                found[part] = [
                    each for case in cases for rate in self.rates_of(case) for each in self._tuning(case, rate)
                ]
        return found

    def second_stage(self, rows: Mapping[str, Result]) -> Parts:
        """The competitors on seeds that they were not tuned on, each with its best learning rate."""
        found = {}
        for part in self.parts:
            if part in TUNED:
                tuned = [self._tuned(case, rows) for case in self.cases(part).values()]
                found[part] = runs(tuned, range(self.seeds))
        return found

    def _tuned(self, case: WidthRunOptions, rows: Mapping[str, Result]) -> WidthRunOptions:
        """A run with its best learning rate."""

        def badness(rate: float) -> float:
            return merit([rows[key(each)] for each in self._tuning(case, rate)], self._tuning_work)

        return changed(case, learning_rate=min(self.rates_of(case), key=badness))

    def _tuning(self, case: WidthRunOptions, rate: float) -> list[Settings]:
        """The runs of a learning rate that tune."""
        case = changed(replace(case, max_work=self._tuning_work), learning_rate=rate)
        return runs([case], range(TUNING, TUNING + self.tuning_seeds))

    @property
    def _tuning_work(self) -> float:
        return self.tuning_work or self.max_work

    def work_ahead(self, over: Mapping[str, Result]) -> float:
        """Work units, those of tau included, of all runs but those that are over, by `key`; at most."""
        first = {key(each): each for part in self.first_stage({}).values() for each in part}
        ahead = [options_of(each) for name, each in first.items() if name not in over]
        # Which rates will be the best, and so which of the later runs are over, is not yet known.
        later = {
            changed(case, learning_rate=1.0)
            for part in self.parts
            if part in TUNED
            for case in self.cases(part).values()
        }
        return sum(case.cycles * case.training.work()[0] for case in (*ahead, *(self.seeds * list(later))))
