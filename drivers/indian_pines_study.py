"""The study of nested iteration on Indian Pines (paper 001, figure 5): accuracy over work units, several seeds.

Nested iteration over 32, 64, 128 layers by two schedules, 200/100/50 and 200/200/200 updates, and 128 layers from the
start with as much work as the longer one, which serves both comparisons. Serial propagation: converged layer-parallel
runs are the same. Runs that are over are not made again. Try

    python drivers/indian_pines_study.py
    python drivers/indian_pines_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from indian_pines import Options as Job
from rich.console import Console
from rich.progress import track
from studies.indian_pines import page
from studies.study import RUNS, Settings, Study

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.data import indian_pines
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.nested import NestedOptions
from xbraid_py.recipes.scores import Scores
from xbraid_py.run.launch import launch

# Options that every run has as they are.
NAMES = ("source", "num_train", "num_layers", "width", "dtype", "validate_every")


@dataclass(frozen=True, kw_only=True)
class Options:
    """The study.

    Parameters
    ----------
    out
        Folder of the results, the table and the picture.
    data_dir
        Folder of the files; by default indian_pines in the folder that XBRAID_DATA names.
    source
        Read the files, the copy in the package tensorly, or whichever is there.
    workers
        Runs at the same time; one core each.
    seeds
        Of the training pixels and the initial weights, from 0 on.
    num_train
        Training pixels.
    num_layers
        Of the finest network.
    width
        Channels.
    schedules
        Updates on the three levels, one schedule after the other.
    dtype
        Of weights and states.
    validate_every
        Updates between two validations.
    smoke
        A study of seconds: other defaults, each of which may still be given.
    """

    out: Path = Path("runs/indian_pines_study")
    data_dir: Path | None = None
    source: Literal["auto", "files", "tensorly"] = "auto"
    workers: int = 2
    seeds: int = 3
    num_train: int = 1000
    num_layers: int = 128
    width: int = 220
    schedules: tuple[int, ...] = (200, 100, 50, 200, 200, 200)
    dtype: Literal["float64", "float32"] = "float32"
    validate_every: int = 10
    smoke: bool = False

    def __post_init__(self):
        for name in ("workers", "seeds", "validate_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 2")
        if not self.schedules or len(self.schedules) % 3:
            raise ValueError(f"schedules={list(self.schedules)} must be updates on three levels; use 200,100,50")
        self.job(0, self.schedules[:3])

    def job(self, seed: int, updates: tuple[int, ...]) -> Job:
        """The job of a nested run."""
        job = Job(
            data_dir=self.data_dir,
            source=self.source,
            num_train=self.num_train,
            num_layers=self.num_layers,
            seed=seed,
            dtype=self.dtype,
            validate_every=self.validate_every,
            nested=NestedOptions(updates=updates),
            mgrit=MGRIT(max_levels=1),
        )
        return replace(job, network=replace(job.network, width=self.width))


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The study in seconds."""

    seeds: int = 2
    num_train: int = 160
    num_layers: int = 16
    width: int = 20
    schedules: tuple[int, ...] = (6, 4, 2, 6, 6, 6)
    validate_every: int = 2


def settings_of(options: Options) -> list[Settings]:
    """All runs: of every seed in turn, the longest first."""
    schedules = [list(options.schedules[k : k + 3]) for k in range(0, len(options.schedules), 3)]
    longest = max(schedules, key=sum)
    common = {name: getattr(options, name) for name in NAMES} | {
        "data_dir": None if options.data_dir is None else str(options.data_dir)
    }
    runs = [{"run": "non-nested", "updates": longest}]
    runs += [{"run": "nested", "updates": updates} for updates in sorted(schedules, key=sum, reverse=True)]
    return [{**run, **common, "seed": seed} for seed in range(options.seeds) for run in runs]


def train(settings: Settings) -> dict:
    """One run: its accuracies, and the curve of its validations."""
    folder = settings["data_dir"]
    options = Options(data_dir=folder and Path(folder), **{name: settings[name] for name in NAMES})
    job = options.job(settings["seed"], tuple(settings["updates"]))
    scene = indian_pines.load(
        job.data_dir, source=job.source, num_train=job.num_train, seed=job.seed, dtype=job.torch_dtype
    )
    nested = job.nested if settings["run"] == "nested" else job.nested.non_nested()
    run = job.run_of(job.problem(scene.train, as_communicator(None)), nested)
    curve = []
    for record in run.run():
        if record.final or record.update % options.validate_every == 0:
            predicted = run.network.predict(run.weights, scene.validation.features)
            accuracy = float((predicted == scene.validation.labels).double().mean())
            curve.append([record.level, record.num_layers, record.update, record.work, record.seconds, accuracy])
    classes = run.network.predict(run.weights, scene.pixels)
    return {
        "val_accuracy": accuracy,
        "train_accuracy": record.evaluation.accuracy,
        "objective": record.evaluation.value,
        "updates": record.update,
        "work": record.work,
        "seconds": record.seconds,
        "scores": Scores.of(predicted, scene.validation.labels, scene.train.num_classes).as_dict(),
        # Of the first seed, for the picture.
        "classes": classes.to(torch.uint8).tolist() if settings["seed"] == 0 else None,
        "curve": [[*row[:3], *(round(value, 4) for value in row[3:])] for row in curve],
    }


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything; returns the study."""
    if comm.size > 1:
        raise ValueError(f"{comm.size} ranks: the study has workers of its own; start it without mpirun")
    scene = indian_pines.load(options.data_dir, source=options.source, num_train=options.num_train)
    study = Study(options.out, train, options.workers)
    settings = settings_of(options)
    console = Console(stderr=True)

    def run() -> None:
        over = track(study.run(settings), "runs", len(settings), console=console, disable=not console.is_terminal)
        rows = list(over)
        names = indian_pines.names(scene.train.num_classes)
        page.write(rows, options.out, names, scene.truth.numpy())
        print(f"{len(rows)} runs in {options.out / RUNS}; table in {options.out / page.PAGE}")

    return run


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
