"""The study of MG/OPT in depth (paper 000): its tables 1 and 2, its figures 4 and 5, and what does the work.

Circles, MNIST and peaks; levels, depths, schedules, hyper-parameters, transfers, weights that are frozen on some
levels, gradients in L2(0, T), other optimizers of the levels, each with a learning rate tuned on seeds of its own.
Runs that are over are not made again. Try

    python drivers/mgopt_study.py
    python drivers/mgopt_study.py --parts="[table1, table2]"
    python drivers/mgopt_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console
from rich.progress import track
from studies.mgopt import page
from studies.mgopt.case import Case, train
from studies.mgopt.parts import METHOD_PARTS, PARTS, Bases, competitors
from studies.mgopt.rows import merit
from studies.study import RUNS, Settings, Study, key

from xbraid_py.comm import Communicator
from xbraid_py.run.launch import launch

TUNING = 100  # the first seed that learning rates are tuned on


@dataclass(frozen=True, kw_only=True)
class Options:
    """The study.

    Parameters
    ----------
    out
        Folder of the results, the tables and the pictures.
    workers
        Runs at the same time; one core each.
    seeds
        Of points and initial weights, from 0 on.
    few_seeds
        The same of the parts sampling, transfers and ablation.
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
        Folder of MNIST's files; empty for the usual place.
    parts
        Table1 (with figure 4), figure5, table2, hyper, sampling, transfers and ablation are on circles; methods_circles
        and methods_peaks compare the optimizers of the levels; mnist and mnist_blocks repeat table 1 and figure 5,
        methods_mnist compares the optimizers there. Mnist_epochs, which takes an hour and is not among the defaults, is
        table 1 there to the paper's 93 %.
    smoke
        A study of seconds: other defaults, each of which may still be given.
    """

    out: Path = Path("runs/mgopt_study")
    workers: int = 2
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
    data_dir: str = ""
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
    smoke: bool = False

    def __post_init__(self):
        for name in ("workers", "seeds", "few_seeds", "mnist_seeds", "tuning_seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 2")
        for name in ("num_layers", "peaks_layers", "mnist_layers", "blocks"):
            for value in getattr(self, name) if name == "blocks" else (getattr(self, name),):
                if value < 128 or value % 128:
                    raise ValueError(f"{name}={value} is not a multiple of 128 = 2^(8 - 1) for 8 levels; use 128")
        for part in self.parts:
            if part not in PARTS and part not in METHOD_PARTS:
                raise ValueError(f"parts={part} is none of {', '.join((*PARTS, *METHOD_PARTS))}; use table1")

    def seeds_of(self, part: str) -> int:
        """How many seeds a part of the study has."""
        if part in ("sampling", "transfers", "ablation"):
            return self.few_seeds
        return self.mnist_seeds if "mnist" in part or "peaks" in part else self.seeds

    @property
    def bases(self) -> Bases:
        """The 8-level method of paper 000 on each problem, at these sizes."""
        circles = Case(
            num_layers=self.num_layers, num_train=self.num_train, num_val=self.num_val, max_work=self.max_work
        )
        # The residual weights must be learnt there. No goal: runs are compared at several accuracies.
        few = self.num_train // 2
        peaks = replace(circles, problem="peaks", num_layers=self.peaks_layers, num_train=few, beta=1e-5)
        mnist = Case.mnist(self.mnist_layers, self.mnist_samples, self.mnist_work, self.data_dir)
        return Bases(circles, peaks, mnist, self.blocks)


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The study in seconds."""

    __doc__ = Options.__doc__
    seeds: int = 2
    few_seeds: int = 1
    mnist_seeds: int = 1
    tuning_seeds: int = 1
    num_layers: int = 128
    peaks_layers: int = 128
    mnist_layers: int = 128
    blocks: tuple[int, ...] = (128, 256)
    num_train: int = 100
    num_val: int = 100
    mnist_samples: int = 2000
    mnist_work: float = 30.0
    max_work: float = 30.0
    parts: tuple[str, ...] = ("table1", "figure5", "table2", "ablation")


def of_seeds(cases: Sequence[Case], seeds: Sequence[int]) -> list[Settings]:
    """Every case with every seed: of each seed in turn, so that a part of the study is one of fewer seeds."""
    settings = [asdict(replace(case, seed=seed)) for seed in seeds for case in cases]
    return list({key(each): each for each in settings}.values())


def first_stage(options: Options) -> dict[str, list[Settings]]:
    """The settings of each part; of the comparisons of methods those that tune."""
    found = {}
    for part in options.parts:
        if part in PARTS:
            found[part] = of_seeds(list(PARTS[part](options.bases)), range(options.seeds_of(part)))
        else:
            chosen = competitors(options.bases, part).values()
            found[part] = [run for case, rates in chosen for rate in rates for run in tuning(options, case, rate)]
    return found


def second_stage(options: Options, rows: Mapping[str, dict]) -> dict[str, list[Settings]]:
    """The comparisons of methods on seeds that they were not tuned on, each with its best learning rate."""
    found = {}
    for part in options.parts:
        if part not in METHOD_PARTS:
            continue
        cases = []
        for case, rates in competitors(options.bases, part).values():
            tuned = {rate: [rows[key(each)] for each in tuning(options, case, rate)] for rate in rates}
            cases.append(replace(case, learning_rate=max(rates, key=lambda rate, tuned=tuned: merit(tuned[rate]))))
        found[part] = of_seeds(cases, range(options.seeds_of(part)))
    return found


def tuning(options: Options, case: Case, rate: float) -> list[Settings]:
    """The runs that tell how good a learning rate is."""
    case = replace(case, learning_rate=rate, max_work=min(case.max_work, options.tuning_work))
    return of_seeds([case], range(TUNING, TUNING + options.tuning_seeds))


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    if comm.size > 1:
        raise ValueError(f"{comm.size} ranks: the study has workers of its own; start it without mpirun")
    study = Study(options.out, train, options.workers)
    console = Console(stderr=True)
    rows: dict[str, dict] = {}

    def make(stage: Mapping[str, list[Settings]], title: str) -> None:
        settings = list({key(each): each for part in stage.values() for each in part}.values())
        for row in track(study.run(settings), title, len(settings), console=console, disable=not console.is_terminal):
            rows[key(row["settings"])] = row
            if "failure" in row:
                console.print(f"{row['settings']}: {row['failure']}")

    def run() -> None:
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
