"""Checkpoints of training on minibatches: written, found again by `--resume`, and read on any number of ranks."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.errors import RunError
from xbraid_py.layer_parallel.minibatch.state import Trained, check_weights
from xbraid_py.run.folder import CHECKPOINTS, METRICS, RunFolder, set_aside
from xbraid_py.run.record import truncate_after
from xbraid_py.run.resume import check_configuration
from xbraid_py.run.store.keep import CheckpointStore, Score, clear_rest
from xbraid_py.run.store.read import no_state, numbered, restoring
from xbraid_py.run.store.write import CheckpointError, load, newest_good

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Position:
    """How far a run is.

    Parameters
    ----------
    update : int
        Updates made; the batches of later ones follow from it.
    seconds : float
        Spent in them.
    is_final : bool
        Whether the run is over.
    tested : dict
        The last test, as in the record; empty if there was none.
    path : Path, optional
        The checkpoint of this position.
    """

    update: int = 0
    seconds: float = 0.0
    is_final: bool = False
    tested: dict = field(default_factory=dict)
    path: Path | None = None


def save_trained(
    store: CheckpointStore,
    comm: Communicator,
    trained: Trained,
    position: Position,
    configuration: Mapping[str, Any],
    score: Score,
    sizes: Mapping[str, int],
) -> Path:
    """Write a checkpoint; collective.

    Parameters
    ----------
    store : CheckpointStore
    comm : Communicator
        All ranks of the job.
    trained : Trained
    position : Position
    configuration : mapping
        JSON-able; compared when the run is resumed.
    score : Score
        How good the model is; an empty one if that was not measured.
    sizes : mapping of str to int
        What the network depends on besides the configuration.

    Raises
    ------
    RunError
        On all ranks, if a weight is not finite, or the file cannot be written; the earlier ones are intact.
    """
    bad = comm.first_error(None if trained.is_finite() else "not finite")
    if bad is not None:
        raise RunError(
            f"update {position.update}: rank {bad[0]} has weights that are not finite, so there is no checkpoint; "
            f"use a smaller learning rate, or clip the gradients"
        )
    training = {"seconds": position.seconds, "final": position.is_final, "tested": position.tested}
    meta = {
        "update": position.update,
        "training": training | trained.numbers(comm),
        "configuration": dict(configuration),
        "driver": Path(sys.argv[0]).name,
        "sizes": dict(sizes),
    }
    return store.save(comm, position.update, trained.shards(comm), meta, score)


def read_resumed(
    resume: str | None, out: Path, configuration: Mapping[str, Any], free: tuple[str, ...], model: nn.Module
) -> Position:
    """What the option `--resume` asks for; for the set-up of a driver, on all ranks, without a message.

    Parameters
    ----------
    resume : str or None
        A file, or "auto": the newest good one in the out folder, if there is any.
    out : Path
    configuration : mapping
        Of this job, JSON-able.
    free : tuple of str
        Names of options that may differ from those of the checkpoint.
    model : Module
        Like the one that will be trained, without ranks; it is only looked at.

    Returns
    -------
    Position
        The beginning if there is nothing to go on from.

    Raises
    ------
    CheckpointError
        If the file is damaged, no checkpoint of such a run, or one of another configuration or network.
    """
    path = None
    if resume is not None:
        path = newest_good(out / CHECKPOINTS) if resume == "auto" else Path(resume)
    if path is None:
        return Position()
    with load(path) as checkpoint:
        meta = checkpoint.meta
        if not is_of_minibatches(meta):
            raise CheckpointError(
                f"{path} holds no state of training on minibatches; give a file of such a run's checkpoints folder"
            )
        check_configuration(path, meta["configuration"], configuration, free)
        check_weights(checkpoint, model)
    with restoring(path):
        training = meta["training"]
        found = Position(
            update=meta["update"],
            seconds=float(training["seconds"]),
            is_final=training["final"],
            tested=dict(training["tested"]),
            path=path,
        )
    if type(found.update) is not int or found.update < 1 or not isinstance(found.is_final, bool):
        raise no_state(path, f"update={found.update!r}, final={found.is_final!r}")
    return found


def is_of_minibatches(meta: Mapping[str, Any]) -> bool:
    """Whether these are the meta data of a checkpoint of training on minibatches."""
    return all(isinstance(meta.get(name), dict) for name in ("training", "configuration")) and "update" in meta


def restore(trained: Trained, position: Position, comm: Communicator) -> None:
    """Take over what the checkpoint of a position holds; collective.

    Raises
    ------
    RunError
        On all ranks, if they go on from different checkpoints, or one of them cannot read its part.
    """
    try:
        comm.same((position.update, str(position.path)), "resume")
    except ValueError as error:
        raise RunError(f"{error}; the checkpoints have changed meanwhile, or not all ranks can see them") from error
    problem = None
    if position.path is not None:
        try:
            with load(position.path) as checkpoint, restoring(position.path):
                trained.load(checkpoint, checkpoint.meta["training"])
        except CheckpointError as error:
            problem = str(error)
    failed = comm.first_error(problem)
    if failed is not None:
        raise RunError(failed[1])


def make_room(folder: RunFolder, position: Position) -> None:
    """Set an earlier run aside, or of a resumed one the later checkpoints, and cut its record; collective.

    Raises
    ------
    RunError
        On all ranks, if the folder cannot be changed.
    """
    problem = None
    if folder.comm.rank == 0:
        try:
            _make_room(folder.path, position)
        except (OSError, ValueError) as error:
            problem = str(error)
    problem = folder.comm.bcast(problem)
    if problem is not None:
        raise RunError(problem)


def _make_room(out: Path, position: Position) -> None:
    if position.path is None:
        aside = set_aside(out)
        if aside is not None:
            log.info("the earlier run in %s is now in %s", out, aside)
        return
    truncate_after(out / METRICS, position.update + 1)
    clear_rest(out / CHECKPOINTS)
    later = [path for number, path in numbered(out / CHECKPOINTS) if number > position.update]
    aside = set_aside(out, tuple(str(path.relative_to(out)) for path in later))
    if aside is not None:
        log.info("checkpoints of later updates, which this run makes again, are now in %s", aside / CHECKPOINTS)


def score_of_test(tested: Mapping[str, Any]) -> Score:
    """Score of a test: its first accuracy if there is one, or else its first loss."""

    def first(end: str) -> float | None:
        found = (value for name, value in tested.items() if name.endswith(end))
        return next((value for value in found if math.isfinite(value)), None)

    return Score(accuracy=first("accuracy"), objective=first("loss"))
