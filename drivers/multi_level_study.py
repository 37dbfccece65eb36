"""The study of multi-level residual networks (paper 003): models, resets of the learning rate, interpolations.

By default the reduced protocol: 5,000 images of CIFAR-10, made small by the first convolution, and 112 epochs, which
take 35 minutes on two cores. Runs that are over are not made again. Try

    python drivers/multi_level_study.py
    python drivers/multi_level_study.py --parts="[models, reset, interpolation]" --seeds=3
    python drivers/multi_level_study.py --paper --device=cuda --precision=bfloat16 --channels_last --workers=1
    python drivers/multi_level_study.py --paper --train_images=10000 --precision=bfloat16 --channels_last=true \\
        --checkpoint_every=5
    python drivers/multi_level_study.py --smoke --out /tmp/study
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Literal

from studies import multi_level
from studies.multi_level.case import Case
from studies.study import Parts, Settings, Study, StudyOptions, of_seeds, run_study

from xbraid_py.comm import Communicator
from xbraid_py.recipes import MultiLevelOptions
from xbraid_py.run.launch import launch
from xbraid_py.run.run_options import free

MODELS = ("first", "last", "multilevel")
# What the parts change of the multilevel model, each in a run of its own; step_size of the model last.
CHANGES = {
    "models": (),
    "reset": ({"reset": False},),
    "rates": (
        *({"eta_max": rate} for rate in (0.05, 0.1, 0.2, 1.0)),
        *({"eta_min": rate} for rate in (1e-4, 1e-2)),
    ),
    "interpolation": ({"interpolation": "linear"},),
    "momentum": ({"carry_momentum": True},),
    "noise": ({"noise": 0.05}, {"noise": 0.2}),
    "step_size": ({"last_step_size": 1.0},),
}
PRESETS = {
    "paper": {  # the protocol of paper 003
        "stem_stride": 1,
        "epochs": (60, 50, 50),
        "precision": "float32",
        "channels_last": False,
        "train_images": 0,
        "validate_every": 5,
        "seeds": 3,
    },
    "smoke": {
        "train_images": 100,
        "test_images": 50,
        "filters": (4, 8, 16),
        "epochs": (2, 1, 1),
        "eta_max": 0.1,
        "batch_size": 25,
        "seeds": 2,
    },
}


@dataclass(frozen=True, kw_only=True)
class Options(MultiLevelOptions, StudyOptions):
    """The study; by default at the size of the reduced protocol.

    Parameters
    ----------
    parts
        Models are tables 3 and 4 and figure 6; rates is figure 9, reset is figure 10 (one cosine over all cycles);
        interpolation is a linear one, momentum carries that of SGD over, noise makes inserted blocks other ones than
        those they are copied from, step_size trains the model last with h=1.
    seeds
        Of weights, order and augmentation, from 0 on.
    checkpoint_every
        Epochs between two checkpoints of a run, in the folder checkpoints of the out folder, from which a study that
        was stopped goes on; 0 writes none: then it goes on with the run that it was at.
    """

    parts: tuple[Literal["models", "reset", "rates", "interpolation", "momentum", "noise", "step_size"], ...] = (
        "models",
    )
    seeds: int = 5
    out: Path = Path("runs/multi_level_study")
    stem_stride: int = 4
    epochs: tuple[int, ...] = (42, 35, 35)
    precision: Literal["float64", "float32", "bfloat16", "float16"] = "bfloat16"
    channels_last: bool = True
    train_images: int = 5000
    validate_every: int = free(14)
    checkpoint_every: int = 0

    def __post_init__(self):
        StudyOptions.__post_init__(self)
        MultiLevelOptions.__post_init__(self)
        if self.checkpoint_every < 0:
            raise ValueError(f"checkpoint_every={self.checkpoint_every} must be at least 0; use 5")
        if not self.parts or not set(self.parts) <= set(CHANGES):
            raise ValueError(f"parts={list(self.parts)} must be some of {', '.join(CHANGES)}; use models")


def cases(options: Options, part: str) -> list[Case]:
    """The runs of a part, but for their seeds."""
    base = Case(**{field.name: getattr(options, field.name) for field in fields(MultiLevelOptions)})
    found = [replace(base, model=model) for model in MODELS]
    changed = "last" if part == "step_size" else "multilevel"
    return found + [replace(base, model=changed, **changes) for changes in CHANGES[part]]


def settings_of(options: Options) -> Parts:
    """The settings of the runs of each part."""
    return {
        part: [_said(each) for each in of_seeds(cases(options, part), range(options.seeds))] for part in options.parts
    }


def _said(settings: Settings) -> Settings:
    """Without what is not given of later options, so that rows of before there were any are found."""
    return {name: value for name, value in settings.items() if name not in ("noise", "data_dir") or value is not None}


def said(settings: Settings) -> str:
    """How a run that fails is called."""
    return f"{settings['model']}, seed {settings['seed']}"


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Check everything; returns the study."""
    samples = options.samples()
    options.check(samples, 1)
    how = {"folder": options.out / "checkpoints", "checkpoint_every": options.checkpoint_every}
    study = Study(options.out, partial(multi_level.runs.train, **how), options.workers)
    study_run = run_study(study, {"runs": lambda rows: settings_of(options)}, multi_level.page.write, comm, said)

    def run() -> None:
        print(samples.said, flush=True)
        study_run()

    return run


if __name__ == "__main__":
    launch(Options, setup, presets=PRESETS, description=__doc__.splitlines()[0])
