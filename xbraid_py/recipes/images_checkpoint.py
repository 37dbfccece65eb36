"""Checkpoints of training on images: all that it takes to go on bitwise on as many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.multilevel.resnet.training import ResNetTraining
from xbraid_py.multilevel.resnet.training_options import EpochRecord
from xbraid_py.recipes.old_resume import resumed
from xbraid_py.run.store.keep import CheckpointStore, Score
from xbraid_py.run.store.read import no_state, restoring
from xbraid_py.run.store.write import Shard

NAME = "images"


@dataclass(frozen=True)
class ImageState:
    """Where a run goes on.

    Attributes
    ----------
    path : Path
        The checkpoint.
    tensors : dict of str to Tensor
        See `ResNetTraining.state`.
    record : EpochRecord
        Of the last epoch.
    """

    path: Path
    tensors: dict[str, Tensor]
    record: EpochRecord

    @property
    def next_record(self) -> int:
        """Number of the first record that is not yet there."""
        return self.record.epoch + 1

    def restore(self, training: ResNetTraining) -> None:
        """Bring a training to where this one was.

        Raises
        ------
        CheckpointError
            If it is of another network.
        """
        with restoring(self.path):
            training.restore(self.tensors, self.record.epoch)


def save_images(
    store: CheckpointStore,
    comm: Communicator,
    training: ResNetTraining,
    record: EpochRecord,
    configuration: Mapping,
) -> Path:
    """Write the state of a run after an epoch; collective. All ranks have the same: the first one writes.

    Raises
    ------
    RunError
        On all ranks, if the file cannot be written; the previous one is intact.
    """
    shards = {}
    if comm.rank == 0:
        shards = {name: Shard(values.cpu(), 0, len(values)) for name, values in training.state().items()}
    meta = {"run": NAME, "record": asdict(record), "configuration": dict(configuration)}
    accuracy = None if record.test_error is None else 1.0 - record.test_error
    return store.save(comm, record.epoch, shards, meta, Score(accuracy=accuracy, objective=record.loss))


def read_images(
    resume: str | None, out: Path, configuration: Mapping, free: tuple[str, ...], epochs: int
) -> ImageState | None:
    """What the option `--resume` asks for; None if there is nothing to go on from. No message.

    Parameters
    ----------
    resume : str or None
        A file, or "auto": the newest good one of the out folder, if there is any.
    out : Path
    configuration : mapping
        Of this run, JSON-able.
    free : tuple of str
        Names of options that may differ from those of the checkpoint.
    epochs : int
        That the run has.

    Raises
    ------
    CheckpointError
        If the file is damaged, no checkpoint of such a run, or one of another configuration.
    """
    with resumed(resume, out, NAME, configuration, free) as checkpoint:
        if checkpoint is None:
            return None
        path, numbers = checkpoint.path, dict(checkpoint.meta["record"])
        record = EpochRecord(**{**numbers, "blocks": tuple(numbers["blocks"])})
        if not isinstance(record.epoch, int) or not 1 <= record.epoch <= epochs:
            raise no_state(path, f"epoch={record.epoch!r}")
        return ImageState(path, {name: checkpoint.rows(name) for name in checkpoint.names()}, record)
