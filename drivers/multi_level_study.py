"""The study of multi-level residual networks (paper 003): models, resets of the learning rate, interpolations.

By default the reduced protocol: 5,000 images of CIFAR-10, made small by the first convolution, and 112 epochs, which
take 35 minutes on two cores. Runs that are over are not made again. Try

    python drivers/multi_level_study.py
    python drivers/multi_level_study.py --parts="[models, reset, interpolation]" --seeds=3
    python drivers/multi_level_study.py --protocol=paper --device=cuda --precision=bfloat16 --channels_last --workers=1
    python drivers/multi_level_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.progress import track
from studies.multi_level import page
from studies.multi_level.case import Case, train
from studies.study import RUNS, Settings, Study, key

from xbraid_py.comm import Communicator
from xbraid_py.data.image_sets import load_split
from xbraid_py.recipes.images import ImageOptions
from xbraid_py.run.launch import launch

MODELS = ("first", "last", "multilevel")
# What the parts change of the multilevel model.
CHANGES = {
    "models": {},
    "reset": {"reset": False},
    "interpolation": {"interpolation": "linear"},
    "momentum": {"carry_momentum": True},
    "step_size": {"last_step_size": 1.0},
}


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions):
    """The study; by default at the size of the reduced protocol.

    Parameters
    ----------
    parts
        Models are tables 3 and 4 and figure 6; reset is figure 10 (one cosine over all cycles); interpolation is a
        linear one, momentum carries that of SGD over, step_size trains the model last with h=1.
    seeds
        Of weights, order and augmentation, from 0 on.
    protocol
        Reduced or paper: other defaults, each of which may still be given.
    workers
        Runs at the same time; one core each.
    data_dir
        Folder of the images.
    out
        Folder of the results, the tables and the pictures.
    smoke
        A study of seconds: other defaults, each of which may still be given.
    """

    parts: tuple[Literal["models", "reset", "interpolation", "momentum", "step_size"], ...] = ("models",)
    seeds: int = 5
    protocol: Literal["reduced", "paper"] = "reduced"
    workers: int = 2
    data_dir: Path | None = None
    out: Path = Path("runs/multi_level_study")
    smoke: bool = False
    stem_stride: int = 4
    epochs: tuple[int, ...] = (42, 35, 35)
    precision: Literal["float64", "float32", "bfloat16", "float16"] = "bfloat16"
    channels_last: bool = True
    train_images: int = 5000
    validate_every: int = 14

    def __post_init__(self):
        super().__post_init__()
        for name in ("seeds", "workers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 5")
        if not self.parts or not set(self.parts) <= set(CHANGES):
            raise ValueError(f"parts={list(self.parts)} must be some of {', '.join(CHANGES)}; use models")


@dataclass(frozen=True, kw_only=True)
class PaperOptions(Options):
    """The study by the protocol of paper 003."""

    __doc__ = Options.__doc__
    stem_stride: int = 1
    epochs: tuple[int, ...] = (60, 50, 50)
    precision: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    train_images: int = 0
    validate_every: int = 5
    seeds: int = 3


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The study in seconds."""

    __doc__ = Options.__doc__
    train_images: int = 100
    test_images: int = 50
    filters: tuple[int, ...] | None = (4, 8, 16)
    epochs: tuple[int, ...] = (2, 1, 1)
    eta_max: float = 0.1
    batch_size: int | None = 25
    seeds: int = 2


def cases(options: Options, part: str) -> Iterator[Case]:
    """The runs of a part: of each seed in turn, so that a part of the study is one of fewer seeds."""
    base = Case(**{field.name: getattr(options, field.name) for field in fields(ImageOptions)})
    for seed in range(options.seeds):
        for model in MODELS:
            yield replace(base, model=model, seed=seed)
        if CHANGES[part]:
            model = "last" if part == "step_size" else "multilevel"
            yield replace(base, model=model, seed=seed, **CHANGES[part])


def settings_of(options: Options) -> dict[str, list[Settings]]:
    """The settings of the runs of each part."""
    return {part: [asdict(case) for case in cases(options, part)] for part in options.parts}


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    if comm.size > 1:
        raise ValueError(f"{comm.size} ranks: the study has workers of its own; start it without mpirun")
    samples = load_split(options.data, options.train_images, options.test_images, options.data_dir)
    options.check(samples, 1)
    data_dir = None if options.data_dir is None else str(options.data_dir)
    study = Study(options.out, partial(train, data_dir=data_dir), options.workers)
    parts = settings_of(options)
    settings: Sequence[Settings] = list({key(each): each for part in parts.values() for each in part}.values())

    def run() -> None:
        over = len(study.finished().keys() & {key(each) for each in settings})
        print(f"{samples.said}\n{len(settings)} runs, {over} of them over, by {options.workers} worker(s)", flush=True)
        console, rows = Console(stderr=True), {}
        made = study.run(settings)
        for row in track(made, "runs", len(settings), console=console, disable=not console.is_terminal):
            rows[key(row["settings"])] = row
            if "failure" in row:
                console.print(f"{row['settings']['model']}, seed {row['settings']['seed']}: {row['failure']}")
        found = {part: [rows[key(each)] for each in of_part] for part, of_part in parts.items()}
        text = page.write(found, options.out)
        print(f"{text}\n{len(rows)} runs in {options.out / RUNS}; tables in {options.out / page.PAGE}")

    return run


def chosen(words: Sequence[str]) -> type[Options]:
    """The options with the defaults that the words of the command line ask for."""
    if any(word.split("=")[0] == "--smoke" for word in words):
        return SmokeOptions
    joined = " ".join(words).replace("=", " ").split()
    return PaperOptions if ("--protocol", "paper") in zip(joined, joined[1:], strict=False) else Options


if __name__ == "__main__":
    launch(chosen(sys.argv[1:]), setup, description=__doc__.splitlines()[0])
