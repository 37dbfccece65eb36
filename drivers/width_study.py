"""The study of multilevel training in width (paper 002): its tables 1 to 4, figures 3, 4 and 6 to 9, and a scan.

Poisson and Darcy, fully-connected and convolutional networks, numbers of levels, learning rates of the levels; and,
each with a learning rate tuned on seeds of its own, the damping, the transfers, the minibatches of tau and Adam. Runs
that are over are not made again. Try

    python drivers/width_study.py
    python drivers/width_study.py --num_train=2000 --num_val=500 --max_work=3000 --parts="[tuned, scan]"
    python drivers/width_study.py --parts="[scan]" --methods="[two levels, no tau, sgd alone]"
    python drivers/width_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.progress import track
from studies.study import RUNS, Settings, Study, key
from studies.width import page
from studies.width.case import Case, train
from studies.width.parts import FIXED, SCAN, TUNED, Bases, competitors
from studies.width.rows import merit

from xbraid_py.comm import Communicator
from xbraid_py.run.launch import launch

SAID = ("problem", "network", "method", "levels", "learning_rate", "seed")  # of a run that fails
TUNING = 100  # the first seed that learning rates are tuned on


@dataclass(frozen=True, kw_only=True)
class Options:
    """The study.

    Parameters
    ----------
    out
        Folder of the results, the tables and the pictures.
    data_dir
        Folder of the samples; by default data in the out folder.
    workers
        Runs at the same time; one core each.
    seeds
        Of samples, initial weights and minibatches, from 0 on.
    tuning_seeds
        Seeds that learning rates are tuned on, from 100 on.
    tuning_work
        Work units of the runs that tune; 0 for those of the others.
    num_train, num_val
        Samples for training and for validation.
    mesh
        Points in each direction.
    max_work
        Work units of a run, those of tau not counted.
    validate_every
        Work units between two validations.
    batch_size
        Samples of a minibatch.
    standardize
        Inputs and targets of mean 0 and deviation 1.
    widths
        Hidden layers of the fully-connected network on Poisson; by default the paper's.
    darcy_widths
        The same on Darcy.
    channels, darcy_channels
        Of the convolutions on the two problems; by default the paper's.
    kernels, strides
        Of all convolutions; by default the paper's.
    rates
        Learning rates of SGD to choose from.
    adam_rates
        Learning rates of Adam to choose from.
    methods
        What the scan compares.
    parts
        Table1, table2 and table3 have the paper's learning rate, and convolutional networks with _conv behind their
        names; table4 is of learning rates on the levels. Tuned (with _conv, with _darcy) compares numbers of levels,
        scan the settings of two levels, each with the best of several learning rates.
    smoke
        A study of seconds: other defaults, each of which may still be given.
    """

    out: Path = Path("runs/width_study")
    data_dir: Path | None = None
    workers: int = 2
    seeds: int = 5
    tuning_seeds: int = 2
    tuning_work: float = 0.0
    num_train: int = 9000
    num_val: int = 1000
    mesh: int = 32
    max_work: float = 10_000.0
    validate_every: float = 50.0
    batch_size: int = 200
    standardize: bool = False
    widths: tuple[int, ...] = ()
    darcy_widths: tuple[int, ...] = ()
    channels: tuple[int, ...] = ()
    darcy_channels: tuple[int, ...] = ()
    kernels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    adam_rates: tuple[float, ...] = (3e-4, 1e-3, 3e-3)
    methods: tuple[str, ...] = tuple(SCAN)
    parts: tuple[str, ...] = ("tuned", "scan", "table1", "table2", "table3", "table4")
    smoke: bool = False

    def __post_init__(self):
        for name in ("workers", "seeds", "tuning_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 2")
        for name in ("rates", "adam_rates"):
            if not getattr(self, name) or min(getattr(self, name)) <= 0:
                raise ValueError(f"{name}={list(getattr(self, name))} must be positive numbers; use 0.01,0.1")
        for part in self.parts:
            if part not in FIXED and part not in TUNED:
                raise ValueError(f"parts={part} is none of {', '.join((*FIXED, *TUNED))}; use table1")
        for case in (case for cases in everything(self).values() for case in cases):
            _ = case.options, case.layers

    @property
    def bases(self) -> Bases:
        """The two-level method of paper 002 on each problem, at these sizes."""
        names = "num_train num_val mesh max_work validate_every batch_size standardize".split()
        poisson = Case(widths=self.widths, **{name: getattr(self, name) for name in names})
        changes = {"problem": "darcy", "steps": 2, "weight_decay": 1e-6, "rematch_every": 10}
        darcy = replace(poisson, widths=self.darcy_widths, **changes)
        conv = {"network": "convolutional", "kernels": self.kernels, "strides": self.strides}
        return Bases(
            poisson,
            darcy,
            replace(poisson, channels=self.channels, **conv),
            replace(darcy, channels=self.darcy_channels, **conv),
            self.rates,
            self.adam_rates,
            self.methods,
            self.tuning_work or self.max_work,
        )


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The study in seconds."""

    seeds: int = 2
    tuning_seeds: int = 1
    num_train: int = 80
    num_val: int = 20
    mesh: int = 8
    max_work: float = 60.0
    validate_every: float = 20.0
    batch_size: int = 10
    widths: tuple[int, ...] = (32, 32)
    darcy_widths: tuple[int, ...] = (64, 64)
    channels: tuple[int, ...] = (8,)
    darcy_channels: tuple[int, ...] = (8,)
    kernels: tuple[int, ...] = (3,)
    strides: tuple[int, ...] = (2,)
    rates: tuple[float, ...] = (0.01, 0.1)
    adam_rates: tuple[float, ...] = (1e-3,)
    methods: tuple[str, ...] = ("two levels", "no tau", "adam", "sgd alone", "adam alone")


def everything(options: Options) -> dict[str, list[Case]]:
    """The cases of each part, those that compete for a learning rate with their first one."""
    bases = options.bases
    return {
        part: list(FIXED[part](bases)) if part in FIXED else [case for case, _ in competitors(bases, part).values()]
        for part in options.parts
    }


def of_seeds(cases: Iterable[Case], seeds: Sequence[int]) -> list[Settings]:
    """Every case with every seed: of each seed in turn, so that a part of the study is one of fewer seeds."""
    cases = list(cases)
    settings = [asdict(replace(case, seed=seed)) for seed in seeds for case in cases]
    return list({key(each): each for each in settings}.values())


def tuning(options: Options, case: Case, rate: float) -> list[Settings]:
    """The runs of a learning rate that tune."""
    case = replace(case, learning_rate=rate, max_work=options.bases.tuning_work)
    return of_seeds([case], range(TUNING, TUNING + options.tuning_seeds))


def first_stage(options: Options) -> dict[str, list[Settings]]:
    """The settings of each part; of those with competitors the runs that tune."""
    found = {}
    for part in options.parts:
        if part in FIXED:
            found[part] = of_seeds(FIXED[part](options.bases), range(options.seeds))
        else:
            entries = competitors(options.bases, part).values()
            found[part] = [each for case, rates in entries for rate in rates for each in tuning(options, case, rate)]
    return found


def second_stage(options: Options, rows: Mapping[str, dict]) -> dict[str, list[Settings]]:
    """The competitors on seeds that they were not tuned on, each with its best learning rate."""
    found = {}
    for part in options.parts:
        if part not in FIXED:
            cases = []
            for case, rates in competitors(options.bases, part).values():
                budget = options.bases.tuning_work
                bad = {r: merit([rows[key(each)] for each in tuning(options, case, r)], budget) for r in rates}
                cases.append(replace(case, learning_rate=min(rates, key=bad.__getitem__)))
            found[part] = of_seeds(cases, range(options.seeds))
    return found


def estimate(options: Options, over: Mapping[str, dict]) -> str:
    """Runs and work units ahead."""
    first = {key(each): each for part in first_stage(options).values() for each in part}
    later = {
        (replace(case, learning_rate=1.0), seed)
        for part, cases in everything(options).items()
        if part not in FIXED
        for case in cases
        for seed in range(options.seeds)
    }
    ahead = [Case(**each) for name, each in first.items() if name not in over]
    work = sum(case.cycles() * case.options.work()[0] for case in [*ahead, *(case for case, _ in later)])
    return (
        f"{len(first)} runs, {len(first) - len(ahead)} of them over, then {len(later)} with tuned learning rates: at "
        f"most {work:,.0f} work units, tau included, by {options.workers} worker(s)"
    )


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    if comm.size > 1:
        raise ValueError(f"{comm.size} ranks: the study has workers of its own; start it without mpirun")
    folder = options.data_dir or options.out / "data"
    study = Study(options.out, partial(train, data_dir=str(folder)), options.workers)
    console = Console(stderr=True)
    rows: dict[str, dict] = {}

    def make(stage: Mapping[str, list[Settings]], title: str) -> None:
        settings = list({key(each): each for part in stage.values() for each in part}.values())
        # The workers would all write the same files.
        for source in dict.fromkeys(Case(**each).source(folder) for each in settings):
            source.samples(comm)
        for row in track(study.run(settings), title, len(settings), console=console, disable=not console.is_terminal):
            rows[key(row["settings"])] = row
            if "failure" in row:
                console.print(", ".join(f"{name}={row['settings'][name]}" for name in SAID) + f": {row['failure']}")

    def run() -> None:
        print(estimate(options, study.finished()), flush=True)
        first = first_stage(options)
        make(first, "runs")
        second = second_stage(options, rows)
        make(second, "tuned runs")
        parts = {part: [rows[key(each)] for each in settings] for part, settings in (first | second).items()}
        page.write(parts, options.out)
        print(f"{len(rows)} runs in {options.out / RUNS}; tables in {options.out / page.PAGE}")

    return run


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
