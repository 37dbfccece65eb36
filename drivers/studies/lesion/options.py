"""What the job of lesions is told, and the trainings that it makes of it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xbraid_py.recipes.options.images import ImageOptions, ImageRunOptions
from xbraid_py.run.run_options import RunOptions, free

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True)
class Lesions:
    """What is done to a network besides leaving out each of its blocks alone.

    Parameters
    ----------
    draws
        Orders in which blocks are left out at random, and shuffled orders; each from a seed of its own.
    seed
        Of the first draw.
    """

    draws: int = 5
    seed: int = 0

    def __post_init__(self):
        if self.draws < 1:
            raise ValueError(f"draws={self.draws} must be at least 1; use 5")

    def random(self, draw: int) -> torch.Generator:
        """The random numbers of a draw, from 0."""
        import torch

        return torch.Generator().manual_seed(self.seed * 1_000_003 + draw)


@dataclass(frozen=True, kw_only=True)
class LesionOptions(ImageOptions, RunOptions):
    """The job: networks are trained one after the other, each in its folder, then all are measured.

    Parameters
    ----------
    depths
        Residual blocks of each stage, of each of the networks.
    step_sizes
        Implicit has h=1 in all networks, explicit h=1 in the first one, and h d the same in all.
    filters
        Of each stage; 16,32,64 in the paper.
    epochs
        Of each network.
    seeds
        Of weights, order and augmentation of the images.
    draws
        Orders in which blocks are left out at random, and shuffled orders, of each network.
    checkpoint
        Checkpoints of drivers/cifar.py, or of this, to be measured; nothing is trained then.
    out
        Folder of the tables and the pictures; in it one for each network, such as 2-2-2_h1/first_0.
    resume
        Auto goes on from what is in the out folder, null trains all networks anew; or a checkpoint of a single one.
    checkpoint_every
        Epochs between two checkpoints.
    """

    train_images: int = 2000
    test_images: int = 500
    depths: tuple[int, ...] = (2, 4, 8)
    step_sizes: tuple[Literal["implicit", "explicit"], ...] = ("implicit", "explicit")
    filters: tuple[int, ...] = (8, 16, 32)
    epochs: int = 10
    eta_max: float = 0.1
    seeds: tuple[int, ...] = (0,)
    draws: int = 5
    checkpoint: tuple[Path, ...] = ()
    validate_every: int = free(10)
    checkpoint_every: int = free(1)
    keep: int = free(1)
    out: Path = free(Path("runs/lesion"))
    resume: str | None = free("auto")

    def __post_init__(self):
        RunOptions.__post_init__(self)
        ImageOptions.__post_init__(self)
        for name in ("depths", "step_sizes", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must name each at least one, and each once; use one of them")
        if min(self.depths) < 1:
            raise ValueError(f"depths={list(self.depths)} must be at least 1; use 2,4,8")
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1; use 10")
        Lesions(draws=self.draws)
        count = len(self.trainings)
        if self.resume not in (None, "auto") and count > 1:
            raise ValueError(f"resume={self.resume} is of one network, but there are {count}; use auto")

    @property
    def trainings(self) -> list[ImageRunOptions]:
        """The networks to train, in their order."""
        shared = (*fields(ImageOptions), *fields(RunOptions))
        common = {each.name: getattr(self, each.name) for each in shared} | {"epochs": (self.epochs,)}
        rules = {"implicit": lambda depth: 1.0, "explicit": lambda depth: self.depths[0] / depth}
        shapes = [
            ((depth,) * len(self.filters), rules[word](depth)) for word in self.step_sizes for depth in self.depths
        ]
        found = []
        for blocks, h in dict.fromkeys(shapes):
            one = {"blocks": blocks, "step_size": h, "out": self.out / f"{'-'.join(map(str, blocks))}_h{h:g}"}
            found += ImageRunOptions(**common | one, models=("first",), seeds=self.seeds).runs
        return found
