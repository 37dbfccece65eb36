"""CIFAR-10, CIFAR-100 and STL-10 by multi-level residual networks (paper 003): shallow first, doubled in depth twice.

    Y_{j+1} = Y_j + h F(Y_j, theta_j),    F two times batch normalization, ReLU and a 3x3 convolution,

in three stages; cycles of 60, 50 and 50 epochs, in each of which the learning rate falls along a cosine. The multilevel
model begins with 2-2-2 blocks and h=1, and doubles its blocks and halves h for every further cycle; first and last have
the blocks of its first and of its last cycle all the time. Tables 3 and 4 and figure 6 are at the end. Try

    python drivers/cifar.py
    python drivers/cifar.py --data=cifar100 --wide --models=multilevel --seeds=0,1,2
    python drivers/cifar.py --device=cuda --precision=bfloat16 --channels_last
    mpirun -n 2 python drivers/cifar.py --train_images=5000 --epochs=6,5,5 --resume auto
    python drivers/cifar.py --smoke --out /tmp/cifar
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from studies.multi_level.case import Case
from studies.multi_level.outcome import folder_of, write_outcome

from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.image_subsets import load_samples
from xbraid_py.multilevel.resnet.training import ResNetTraining
from xbraid_py.recipes.images import ImageOptions
from xbraid_py.recipes.images_follow import Following, follow
from xbraid_py.run.folder import claim
from xbraid_py.run.launch import launch
from xbraid_py.run.options import to_dict
from xbraid_py.run.progress import setup_logging


@dataclass(frozen=True, kw_only=True)
class Options(ImageOptions):
    """The job: runs of several models and seeds, one after the other, each in its folder.

    Parameters
    ----------
    models
        First, last, multilevel.
    seeds
        Of weights, order and augmentation of the images.
    checkpoint_every
        Epochs between two checkpoints.
    keep
        Newest checkpoints of each run to keep, besides the best.
    data_dir
        Folder of the images.
    out
        Folder of the tables and the picture; in it one for each run.
    resume
        Checkpoint to go on from, of a single run; or auto, for the newest good one of each run (if there is one).
    smoke
        A job of seconds: other defaults, each of which may still be given.
    """

    models: tuple[str, ...] = ("first", "last", "multilevel")
    seeds: tuple[int, ...] = (0,)
    checkpoint_every: int = 1
    keep: int = 3
    data_dir: Path | None = None
    out: Path = Path("runs/cifar")
    resume: str | None = None
    smoke: bool = False

    def __post_init__(self):
        super().__post_init__()
        for name in ("models", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must name each at least one, and each once; use one of them")
        for case in self.cases:
            _ = case.levels(case.model)
        if self.resume not in (None, "auto") and len(self.cases) > 1:
            raise ValueError(f"resume={self.resume} is of one run, but there are {len(self.cases)}; use auto")
        _ = self.following

    @property
    def cases(self) -> list[Case]:
        """The runs, in their order."""
        common = {field.name: getattr(self, field.name) for field in fields(ImageOptions)}
        return [Case(**common, model=model, seed=seed) for seed in self.seeds for model in self.models]

    @property
    def following(self) -> Following:
        """How often a run is looked at."""
        return Following(validate_every=self.validate_every, checkpoint_every=self.checkpoint_every, keep=self.keep)


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The job in seconds."""

    train_images: int = 100
    test_images: int = 50
    filters: tuple[int, ...] | None = (4, 8, 16)
    epochs: tuple[int, ...] = (2, 1, 1)
    eta_max: float = 0.1
    batch_size: int | None = 25


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the runs, one after the other."""
    setup_logging(comm)
    samples = load_samples(options.data, options.train_images, options.test_images, options.data_dir)
    options.check(samples, comm.size)
    torch.backends.cudnn.benchmark = True  # all minibatches have one shape

    def prepared(case: Case) -> Callable[[], None]:
        folder = claim(folder_of(case, options.out), comm)
        one = replace(options, models=(case.model,), seeds=(case.seed,))

        def make() -> ResNetTraining:
            return case.make(case.model, case.seed, samples, ProcessGrid(comm, comm.size))

        return follow(make, case, options.following, folder, to_dict(one), options.resume)

    runs = [prepared(case) for case in options.cases]

    def run() -> None:
        if comm.rank == 0:
            print(samples.said, flush=True)
        for each in runs:
            each()
        write_outcome(options.cases, options.out, comm)

    return run


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
