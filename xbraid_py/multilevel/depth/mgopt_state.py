"""Checkpoints of runs of MG/OPT in depth: the weights of the finest network, and where the run has come to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from xbraid_py.multilevel.depth.mgopt import CycleRecord
from xbraid_py.optim.objective import Evaluation
from xbraid_py.problem.network import DenseResNet
from xbraid_py.recipes.old_resume import resumed
from xbraid_py.run.store.keep import CheckpointStore, Score
from xbraid_py.run.store.read import check_total, no_state
from xbraid_py.run.store.write import Shard

NAME = "mgopt"


@dataclass(frozen=True)
class CycleState:
    """Where a run goes on.

    Attributes
    ----------
    x : Tensor
        Weights of the finest network, flat.
    record : CycleRecord
        Of the last cycle.
    is_final : bool
        Whether the run was over.
    """

    x: Tensor
    record: CycleRecord
    is_final: bool

    @property
    def next_record(self) -> int:
        """Number of the first record that is not yet there."""
        return self.record.cycle + 1


def save_cycle(
    store: CheckpointStore,
    network: DenseResNet,
    x: Tensor,
    record: CycleRecord,
    is_final: bool,
    configuration: Mapping,
    accuracy: float | None = None,
) -> Path:
    """Write the state of a run after a cycle; collective.

    Parameters
    ----------
    store : CheckpointStore
    network : DenseResNet
        The finest one.
    x : Tensor
        Its weights.
    record : CycleRecord
    is_final : bool
        Whether the run is over.
    configuration : mapping
        JSON-able; compared when the run is resumed.
    accuracy : float, optional
        On the validation data.

    Raises
    ------
    RunError
        On all ranks, if the file cannot be written; the previous one is intact.
    """
    named, shards = network.layout.named(x), {}
    for stack in network.layout.stacks:
        for name in stack.shapes:
            rows = named[f"{stack.name}.{name}"]
            shards[f"weights/{stack.name}.{name}"] = Shard(rows, stack.first, stack.total)
    meta = {"run": NAME, "record": asdict(record), "is_final": is_final, "configuration": dict(configuration)}
    score = Score(accuracy=accuracy, objective=record.evaluation.value)
    return store.save(network.comm, record.cycle, shards, meta, score)


def read_cycle(
    resume: str | None, out: Path, network: DenseResNet, configuration: Mapping, free: tuple[str, ...]
) -> CycleState | None:
    """What the option `--resume` asks for, on any number of ranks; None if there is nothing to go on from. No message.

    Parameters
    ----------
    resume : str or None
        A file, or "auto": the newest good one of the out folder, if there is any.
    out : Path
    network : DenseResNet
        The finest one.
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
        x = network.layout.zeros()
        named = network.layout.named(x)
        for stack in network.layout.stacks:
            for name in stack.shapes:
                key = f"weights/{stack.name}.{name}"
                check_total(path, checkpoint.total(key), stack.total)
                rows = checkpoint.rows(key, stack.first if stack.count else 0, stack.count)
                own = named[f"{stack.name}.{name}"]
                own.copy_(rows.reshape(own.shape))
        numbers = dict(meta["record"])
        evaluation, gradients = Evaluation(**numbers.pop("evaluation")), tuple(numbers.pop("gradients"))
        record = CycleRecord(**numbers, evaluation=evaluation, gradients=gradients)
        if not isinstance(record.cycle, int) or record.cycle < 0:
            raise no_state(path, f"cycle={record.cycle!r}")
        return CycleState(x, record, bool(meta["is_final"]))
