"""What the drivers of multilevel training in width have in common: options, set-up, pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from xbraid_py.comm import Communicator
from xbraid_py.comm.errors import RunError
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.pde_source import SampleSource
from xbraid_py.multilevel.width.training_options import WidthTrainingOptions
from xbraid_py.recipes.width import Job
from xbraid_py.recipes.width_follow import Following, follow
from xbraid_py.recipes.width_networks import WidthNetwork
from xbraid_py.run.folder import RunFolder, claim
from xbraid_py.run.options import to_dict
from xbraid_py.run.progress import setup_logging


@dataclass(frozen=True, kw_only=True)
class WidthRunOptions:
    """A job of multilevel training in width.

    Parameters
    ----------
    num_train
        Training samples.
    num_val
        Samples for validation.
    seed
        Of samples, initial weights and minibatches.
    dtype
        Of weights and samples.
    standardize
        Inputs and targets of mean 0 and deviation 1; otherwise as they are.
    batch_size
        Samples of a minibatch, shared by the ranks.
    max_work
        End before more work units than this, those of tau included.
    validate_every
        Work units between two validations.
    checkpoint_every
        Cycles between two checkpoints.
    keep
        Newest checkpoints to keep, besides the best.
    data_dir
        Folder where samples are stored, and read if they are there; by default they stay in memory.
    out
        Folder of the record, the checkpoints and the pictures.
    resume
        Checkpoint to go on from, or auto for the newest good one in the out folder (if there is one).
    smoke
        A run of seconds: other defaults, each of which may still be given.
    network
        Kind and sizes of the network.
    training
        Levels, optimizer, damping, matching.
    """

    num_train: int = 9000
    num_val: int = 1000
    seed: int = 0
    dtype: Literal["float64", "float32"] = "float32"
    standardize: bool = False
    batch_size: int = 200
    max_work: float = 10_000.0
    validate_every: float = 50.0
    checkpoint_every: int = 50
    keep: int = 3
    data_dir: Path | None = None
    out: Path = Path("runs/width")
    resume: str | None = None
    smoke: bool = False
    network: WidthNetwork = WidthNetwork()
    training: WidthTrainingOptions = WidthTrainingOptions()

    def __post_init__(self):
        _ = self.following
        if not 1 <= self.batch_size <= self.num_train:
            raise ValueError(f"batch_size={self.batch_size} must lie in 1 .. num_train={self.num_train}; use 200")

    @property
    def following(self) -> Following:
        """When the run ends, and how often it is looked at."""
        names = ("max_work", "validate_every", "checkpoint_every", "keep")
        return Following(**{name: getattr(self, name) for name in names})


def set_up(options: WidthRunOptions, source: SampleSource, name: str, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run.

    Parameters
    ----------
    options : WidthRunOptions
    source : SampleSource
    name : str
        Of the problem, for the sizes of the paper's networks.
    comm : Communicator
        Ranks share every minibatch.
    """
    setup_logging(comm)
    if options.batch_size < comm.size:
        raise ValueError(f"batch_size={options.batch_size} is less than one for each of {comm.size} ranks; use 200")
    network, dtype = options.network.of(name), getattr(torch, options.dtype)
    # Files that are there are read now; what has to be made, by all ranks together, in the run.
    found = source.load(dtype=dtype) if source.problem is None else None
    network.features(source.shape or tuple(found[0].inputs.shape[1:]))
    folder = claim(options.out, comm)

    def make() -> Job:
        try:
            train, validation = found or source.load(comm, dtype)
            job = Job.of(
                train,
                validation,
                network,
                options.training,
                batch_size=options.batch_size,
                seed=options.seed,
                standardize=options.standardize,
                grid=ProcessGrid(comm, comm.size),
            )
            job.training.match()  # whether there can be so many levels
        except (ValueError, OSError) as error:  # on all ranks alike
            raise RunError(str(error)) from error
        return job

    return follow(
        make,
        options.training,
        options.following,
        folder,
        to_dict(options),
        resume=options.resume,
        finish=lambda job, rows: draw(job, rows, folder),
    )


def draw(job: Job, rows: list[dict], folder: RunFolder) -> None:
    """The pictures of a run: errors over work units, and the first validation sample if it is a field."""
    if folder.comm.rank:
        return
    from xbraid_py.recipes.pictures import width_curves  # matplotlib takes its time to load: on one rank only

    width_curves.over_work({"": rows}, folder.figures / "errors.png")
    exact, learned = job.predict(0)
    size = job.unseen[0].shape[-1]
    if exact.numel() == size * size:
        width_curves.fields(exact.view(size, size), learned.view(size, size), folder.figures / "sample.png")
