"""Checkpoints of multilevel training in width: all that it takes to go on bitwise on as many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.multilevel.width.training import WidthRecord, WidthTraining
from xbraid_py.recipes.old_resume import resumed
from xbraid_py.run.store.keep import CheckpointStore, Score
from xbraid_py.run.store.read import no_state, restoring
from xbraid_py.run.store.write import Shard

NAME = "width"


@dataclass(frozen=True)
class WidthState:
    """Where a run goes on.

    Attributes
    ----------
    path : Path
        The checkpoint.
    tensors : dict of str to Tensor
        See `WidthTraining.state`.
    record : WidthRecord
        Of the last cycle.
    """

    path: Path
    tensors: dict[str, Tensor]
    record: WidthRecord

    @property
    def next_record(self) -> int:
        """Number of the first record that is not yet there."""
        return self.record.cycle + 1

    def restore(self, training: WidthTraining) -> None:
        """Bring a training to where this one was.

        Raises
        ------
        CheckpointError
            If it is of another network.
        """
        with restoring(self.path):
            training.restore(self.tensors)


def save_width(
    store: CheckpointStore,
    comm: Communicator,
    training: WidthTraining,
    record: WidthRecord,
    configuration: Mapping,
    error: float | None = None,
) -> Path:
    """Write the state of a run after a cycle; collective. All ranks have the same: the first one writes.

    Parameters
    ----------
    store : CheckpointStore
    comm : Communicator
    training : WidthTraining
    record : WidthRecord
    configuration : mapping
        JSON-able; compared when the run is resumed.
    error : float, optional
        On the validation samples, the smaller the better.

    Raises
    ------
    RunError
        On all ranks, if the file cannot be written; the previous one is intact.
    """
    shards = {}
    if comm.rank == 0:
        shards = {name: Shard(values.cpu(), 0, len(values)) for name, values in training.state().items()}
    meta = {"run": NAME, "record": asdict(record), "configuration": dict(configuration)}
    return store.save(comm, record.cycle, shards, meta, Score(objective=error))


def read_width(resume: str | None, out: Path, configuration: Mapping, free: tuple[str, ...]) -> WidthState | None:
    """What the option `--resume` asks for; None if there is nothing to go on from. No message.

    Parameters
    ----------
    resume : str or None
        A file, or "auto": the newest good one of the out folder, if there is any.
    out : Path
    configuration : mapping
        Of this job, JSON-able.
    free : tuple of str
        Names of options that may differ from those of the checkpoint.

    Raises
    ------
    CheckpointError
        If the file is damaged, no checkpoint of such a run, or one of another configuration.
    """
    with resumed(resume, out, NAME, configuration, free) as checkpoint:
        if checkpoint is None:
            return None
        path, meta = checkpoint.path, checkpoint.meta
        numbers = dict(meta["record"])
        numbers["widths"] = tuple(tuple(each) for each in numbers["widths"])
        record = WidthRecord(**numbers)
        if not isinstance(record.cycle, int) or record.cycle < 1:
            raise no_state(path, f"cycle={record.cycle!r}")
        return WidthState(path, {name: checkpoint.rows(name) for name in checkpoint.names()}, record)
