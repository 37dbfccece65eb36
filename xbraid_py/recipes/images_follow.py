"""A run of training on images in its folder: epochs, record, checkpoints and screen, from start to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xbraid_py.comm.errors import RunError
from xbraid_py.multilevel.resnet.training import ResNetTraining
from xbraid_py.multilevel.resnet.training_options import EpochRecord
from xbraid_py.recipes.classification_training import prepare
from xbraid_py.recipes.images import ImageOptions, numbers_of
from xbraid_py.recipes.images_checkpoint import NAME, read_images, save_images
from xbraid_py.recipes.old_resume import checkpoint_folder
from xbraid_py.run.folder import RunFolder
from xbraid_py.run.progress import Progress
from xbraid_py.run.store.keep import CheckpointStore
from xbraid_py.run.store.write import CheckpointError

# What may differ between a run and its continuation.
FREE = ("out", "resume", "smoke", "checkpoint_every", "keep", "validate_every", "data_dir", "device")


@dataclass(frozen=True, kw_only=True)
class Following:
    """How often a run is looked at.

    Parameters
    ----------
    validate_every
        Epochs between two looks at the test images; the ends of cycles come in addition.
    checkpoint_every
        Epochs between two checkpoints.
    keep
        Newest checkpoints to keep, besides the best.
    """

    validate_every: int = 1
    checkpoint_every: int = 1
    keep: int = 3

    def __post_init__(self):
        for name in ("validate_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 3")


def follow(
    make: Callable[[], ResNetTraining],
    options: ImageOptions,
    following: Following,
    folder: RunFolder,
    configuration: Mapping[str, Any],
    resume: str | None = None,
) -> Callable[[], None]:
    """Read the checkpoint of a run to go on from, if there is one, without a message; returns the run.

    Parameters
    ----------
    make : callable
        The training, made by all ranks together when the run begins.
    options : ImageOptions
        Of it.
    following : Following
    folder : RunFolder
        Claimed.
    configuration : mapping
        JSON-able; compared when a run is resumed, but for `FREE`.
    resume : str, optional
        A file, or "auto": the newest good one of the folder, if there is any.

    Raises
    ------
    CheckpointError
        If the file is damaged, no checkpoint of such a run, or one of another configuration.
    """
    out, comm, epochs = folder.path, folder.comm, options.training.cycles.total
    last = sum(options.levels("last")[-1].blocks)
    state = read_images(resume, out, configuration, FREE, epochs)
    done = state.record if state else None
    before = done.epoch if done else 0

    def run() -> None:
        if before == epochs:
            if comm.rank == 0:
                print(f"the run in {out} is finished", flush=True)
            folder.release()
            return
        training = make()
        if state:
            try:
                state.restore(training)
            except CheckpointError as error:  # on all ranks alike
                raise RunError(str(error)) from error
        prepare(out, comm, [NAME], {NAME: state} if state else {})
        store = CheckpointStore(checkpoint_folder(out, NAME), following.keep)
        with (
            folder.open(configuration, epochs, before, append=state is not None),
            Progress(comm, epochs, done=before) as progress,
        ):
            progress.note(f"{out}: work is in epochs of the last cycle's network")
            for record in training.run(following.validate_every, done):
                is_final = record.epoch == epochs
                row = row_of(record, training, last, is_final)
                progress.update(row)
                folder.write(row)
                stop = folder.update(record.epoch, record.loss, row["val_accuracy"])
                if stop or is_final or record.epoch % following.checkpoint_every == 0:
                    path = save_images(store, comm, training, record, configuration)
                    if stop and not is_final:
                        raise folder.stopped(path)

    return run


def row_of(record: EpochRecord, training: ResNetTraining, last: int, is_final: bool) -> dict[str, Any]:
    """A record as the object of `metrics.jsonl`; the unit of "work" is an epoch of a network of `last` blocks."""
    images = training.steps_per_epoch * training.options.batch_size
    return {
        "kind": "update",
        "run": NAME,
        "level": len({level.blocks for level in training.levels[record.cycle - 1 :]}) - 1,
        "num_layers": sum(record.blocks),
        "update": record.epoch,
        "work": record.block_evaluations / (images * last),
        "objective": record.loss,
        "loss": record.loss,
        "train_accuracy": 1.0 - record.error,
        "val_accuracy": None if record.test_error is None else 1.0 - record.test_error,
        "step_size": record.learning_rate,
        **numbers_of(record),
        "final": is_final,
    }
