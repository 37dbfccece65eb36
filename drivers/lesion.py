"""Norms of residual modules over depth, and lesions of trained networks (paper 003, sections 3.2 and 3.3, appendix C).

    Y_{j+1} = Y_j + G(Y_j),    G = h F,    |G| falls as 1/d with the number d of blocks if the network is one of an ODE.

Networks of several depths are trained on images with the same step size h at every depth (implicit), and with one that
is halved where the blocks are doubled (explicit); or checkpoints of drivers/cifar.py are taken. Then every block is
left out in turn, several are at random, and blocks are shuffled within their stages. Networks that are trained already
are not trained again. Tables, figures 3, 4 and 7, and a picture of the lesions are at the end. Try

    python drivers/lesion.py
    mpirun -n 2 python drivers/lesion.py --depths=4,8 --step_sizes=implicit --epochs=20
    python drivers/lesion.py --depths=5,9,18 --filters=16,32,64 --epochs=160 --eta_max=0.5 --train_images=0 \\
        --test_images=0 --device=cuda
    python drivers/lesion.py --checkpoint=runs/cifar/last_0/checkpoints/images/update_000160.h5
    python drivers/lesion.py --smoke --out /tmp/lesion
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from studies.lesion.lesion import Lesions, measured, read_trained, write_lesions
from studies.multi_level.case import Case

from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.image_sets import ImageSplit, load_split
from xbraid_py.multilevel.resnet.training import ResNetTraining
from xbraid_py.recipes.images_checkpoint import NAME
from xbraid_py.recipes.images_follow import Following, follow
from xbraid_py.recipes.old_resume import checkpoint_folder
from xbraid_py.run.folder import claim
from xbraid_py.run.launch import launch
from xbraid_py.run.options import to_dict
from xbraid_py.run.progress import setup_logging
from xbraid_py.run.signals import Stopped, stop_agreed
from xbraid_py.run.store.write import newest_good


@dataclass(frozen=True, kw_only=True)
class Options:
    """The job: networks are trained one after the other, each in its folder, then all are measured.

    Parameters
    ----------
    data
        The set of images.
    train_images
        Take only so many training images; 0 takes all that are found.
    test_images
        The same of the test images.
    depths
        Residual blocks of each stage, of each of the networks.
    step_sizes
        Implicit has h=1 in all networks, explicit h=1 in the first one, and h d the same in all.
    filters
        Of each stage; 16,32,64 in the paper.
    norm
        Normalization: batch, group, batch with frozen statistics, none.
    stem_stride
        Of the first convolution; 2 halves large images at once.
    epochs
        Of each network.
    eta_max
        Learning rate at the beginning; it falls along a cosine.
    eta_min
        Learning rate at the end.
    batch_size
        Images of a minibatch, shared by the ranks; by default 100, or 32 of STL-10.
    weight_decay
        Of SGD.
    precision
        Of the numbers; bfloat16 and float16 are mixed with float32.
    channels_last
        Channels innermost in memory: faster on GPUs with mixed precision.
    device
        Where it runs; on several GPUs every rank takes its own.
    seeds
        Of weights, order and augmentation of the images.
    draws
        Orders in which blocks are left out at random, and shuffled orders, of each network.
    checkpoint
        Checkpoints of drivers/cifar.py, or of this, to be measured; nothing is trained then.
    checkpoint_every
        Epochs between two checkpoints.
    keep
        Newest checkpoints of each network to keep, besides the best.
    data_dir
        Folder of the images.
    out
        Folder of the tables and the pictures; in it one for each network.
    resume
        Auto goes on from what is in the out folder; null trains all networks anew.
    smoke
        A job of seconds: other defaults, each of which may still be given.
    """

    data: Literal["cifar10", "cifar100", "stl10"] = "cifar10"
    train_images: int = 2000
    test_images: int = 500
    depths: tuple[int, ...] = (2, 4, 8)
    step_sizes: tuple[Literal["implicit", "explicit"], ...] = ("implicit", "explicit")
    filters: tuple[int, ...] = (8, 16, 32)
    norm: Literal["batch", "group", "frozen", "none"] = "batch"
    stem_stride: int = 1
    epochs: int = 10
    eta_max: float = 0.1
    eta_min: float = 0.001
    batch_size: int | None = None
    weight_decay: float = 2e-4
    precision: Literal["float64", "float32", "bfloat16", "float16"] = "float32"
    channels_last: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    seeds: tuple[int, ...] = (0,)
    draws: int = 5
    checkpoint: tuple[Path, ...] = ()
    checkpoint_every: int = 1
    keep: int = 1
    data_dir: Path | None = None
    out: Path = Path("runs/lesion")
    resume: Literal["auto"] | None = "auto"
    smoke: bool = False

    def __post_init__(self):
        for name in ("depths", "step_sizes", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{name}={list(values)} must name each at least one, and each once; use one of them")
        if min(self.depths) < 1:
            raise ValueError(f"depths={list(self.depths)} must be at least 1; use 2,4,8")
        if self.epochs < 1:
            raise ValueError(f"epochs={self.epochs} must be at least 1; use 10")
        _ = self.cases, self.lesions, self.following

    @property
    def cases(self) -> list[Case]:
        """The networks to train, in their order."""
        names = "data train_images test_images filters norm stem_stride eta_max eta_min batch_size weight_decay".split()
        common = {name: getattr(self, name) for name in (*names, "precision", "channels_last", "device")}
        rules = {"implicit": lambda depth: 1.0, "explicit": lambda depth: self.depths[0] / depth}
        shapes = [(depth, rules[word](depth)) for word in self.step_sizes for depth in self.depths]
        return [
            Case(
                **common, model="first", blocks=(depth,) * len(self.filters), step_size=h, epochs=(self.epochs,), seed=k
            )
            for depth, h in dict.fromkeys(shapes)
            for k in self.seeds
        ]

    @property
    def lesions(self) -> Lesions:
        """What is done to each network."""
        return Lesions(draws=self.draws)

    @property
    def following(self) -> Following:
        """How often a training is looked at."""
        return Following(validate_every=self.epochs, checkpoint_every=self.checkpoint_every, keep=self.keep)

    def folder_of(self, case: Case) -> Path:
        """Where the training of a network is."""
        return self.out / f"{'-'.join(map(str, case.blocks))}_h{case.step_size:g}_{case.seed}"

    def samples_of(self, case: Case, ranks: int) -> ImageSplit:
        """The images of a network; a `ValueError` or `OSError` if they do not do."""
        samples = load_split(case.data, case.train_images, self.test_images, self.data_dir)
        case.check(samples, ranks)
        return samples


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The job in seconds."""

    train_images: int = 100
    test_images: int = 50
    depths: tuple[int, ...] = (2, 4)
    filters: tuple[int, ...] = (4, 8, 16)
    epochs: int = 2
    batch_size: int | None = 25
    draws: int = 2


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the trainings and what is done to the networks."""
    setup_logging(comm)
    torch.backends.cudnn.benchmark = True  # all minibatches have one shape
    cases = [] if options.checkpoint else options.cases
    given = [read_trained(path, options.device) for path in options.checkpoint]
    said = {options.samples_of(case, comm.size).said: None for case in (*cases, *(each.case for each in given))}

    def prepared(case: Case) -> Callable[[], None]:
        def make() -> ResNetTraining:
            samples = options.samples_of(case, comm.size)
            return case.make(case.model, case.seed, samples, ProcessGrid(comm, comm.size))

        folder = claim(options.folder_of(case), comm)
        return follow(make, case, options.following, folder, to_dict(case), options.resume)

    trainings = [prepared(case) for case in cases]

    def run() -> None:
        if comm.rank == 0:
            print("\n".join(said), flush=True)
        for each in trainings:
            each()
        paths = [newest_good(checkpoint_folder(options.folder_of(case), NAME)) for case in cases]
        rows = []
        for trained in given or [read_trained(path, options.device) for path in paths]:
            if stop_agreed(comm):
                raise Stopped(f"stopped after {len(rows)} measured networks; start again to go on")
            if comm.rank == 0:
                print(f"lesions of {trained.state.path}", flush=True)
            rows.append(measured(trained, options.samples_of(trained.case, comm.size), options.lesions, comm))
        write_lesions(rows, options.out, comm)

    return run


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
