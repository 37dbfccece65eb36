"""A training run with its record, its checkpoints and its screen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.errors import RunError
from xbraid_py.kernels import BACKEND
from xbraid_py.multilevel.depth.nested import NestedIteration
from xbraid_py.multilevel.depth.nested_state import save_run
from xbraid_py.multilevel.depth.record import Record, Snapshot
from xbraid_py.run.folder import CHECKPOINTS, METRICS, RunFolder, set_aside
from xbraid_py.run.progress import Progress
from xbraid_py.run.record import read, truncate_after
from xbraid_py.run.resume import checkpoint_folder
from xbraid_py.run.store.keep import CheckpointStore, Score, clear_rest
from xbraid_py.run.store.read import numbered

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run leaves behind, and how often.

    Parameters
    ----------
    folder : RunFolder
        Open.
    progress : Progress
    validation : tuple of (F, B) tensor and (B,) int64 tensor
        Features and labels of the validation points.
    configuration : mapping
        JSON-able; goes into the checkpoints.
    checkpoint_every, validate_every : int
        Updates between two checkpoints, and between two validations.
    keep : int
        Newest checkpoints of a run that are kept, besides the best.
    """

    folder: RunFolder
    progress: Progress
    validation: tuple[Tensor, Tensor]
    configuration: Mapping
    checkpoint_every: int
    validate_every: int
    keep: int = 3

    def run_all(self, runs: Mapping[str, NestedIteration], resumed: Mapping[str, Snapshot]) -> float:
        """Train one run after the other, each from its snapshot if it has one; collective.

        Returns
        -------
        float
            Validation accuracy at the end of the first run.

        Raises
        ------
        Stopped
            On all ranks, if a signal has asked for it; a checkpoint of the last update is there.
        """
        accuracies, before, last = [], 0, list(runs)[-1]
        for name, run in runs.items():
            accuracies.append(self._run(run, name, before, resumed.get(name), name == last))
            before += sum(run.options.updates)
        return accuracies[0]

    def _run(self, run: NestedIteration, name: str, before: int, snapshot: Snapshot | None, is_last: bool) -> float:
        store = CheckpointStore(checkpoint_folder(self.folder.path, name), self.keep)
        accuracy, depth = None, None
        for record in run.run(snapshot):
            if record.num_layers != depth:
                depth = record.num_layers
                solver = run.objective.forward
                table = solver.hierarchy.table(solver.options)
                self._note(f"{name}: {depth} layers, kernels: {BACKEND}\n{table}")
            due = record.final or record.update % self.validate_every == 0
            accuracy = self.accuracy(run) if due else None
            row = _row(record, name, accuracy)
            self.progress.update(row)
            if record.note:
                self._note(record.note)
            if snapshot is not None and snapshot.is_final:
                continue  # a run that is over has its record and its checkpoint already
            self.folder.write(row)
            stop = self.folder.update(before + record.update, record.evaluation.value, accuracy)
            if stop or record.final or record.update % self.checkpoint_every == 0:
                score = Score(accuracy=accuracy, objective=record.evaluation.value)
                path = save_run(store, run, record.update, name, self.configuration, score)
                # At the end of a run that no other one follows there is nothing left to stop.
                if stop and not (record.final and is_last):
                    raise self.folder.stopped(path)
        return accuracy

    def _note(self, text: str) -> None:
        self.progress.note(text)
        self.folder.log(text)

    def accuracy(self, run: NestedIteration) -> float:
        """Share of the validation points that the network classifies rightly at present."""
        features, labels = self.validation
        return float((run.network.predict(run.weights, features) == labels).double().mean())


def prepare(out: Path, comm: Communicator, runs: Iterable[str], resumed: Mapping[str, Snapshot]) -> None:
    """Make room for a job in its folder: an earlier one there is set aside, a resumed one cut to where it goes on.

    Checkpoints of later updates than the one that a run goes on from are set aside as well. Collective.

    Raises
    ------
    RunError
        On all ranks, if they go on from different checkpoints, or the folder cannot be changed.
    """
    goes_on = {name: snapshot.next_record for name, snapshot in resumed.items()}
    try:
        comm.same(goes_on, "resume")
    except ValueError as error:
        raise RunError(f"{error}; the checkpoints have changed meanwhile, or not all ranks can see them") from error
    problem = None
    if comm.rank == 0:
        try:
            _make_room(out, runs, goes_on)
        except (OSError, ValueError) as error:
            problem = str(error)
    problem = comm.bcast(problem)
    if problem is not None:
        raise RunError(problem)


def _make_room(out: Path, runs: Iterable[str], goes_on: Mapping[str, int]) -> None:
    if not goes_on:
        aside = set_aside(out)
        if aside is not None:
            log.info("the earlier run in %s is now in %s", out, aside)
        return
    for name in runs:
        first = goes_on.get(name, 0)
        truncate_after(out / METRICS, first, name)
        folder = checkpoint_folder(out, name)
        clear_rest(folder)
        later = [path for number, path in numbered(folder) if number >= first]
        aside = set_aside(out, tuple(str(path.relative_to(out)) for path in later))
        if aside is not None:
            log.info("checkpoints of later updates, which this run makes again, are now in %s", aside / CHECKPOINTS)


def finished_accuracy(out: Path, run: str = "nested") -> float | None:
    """Validation accuracy at the end of a run, as its record says; None if that is not known. Sends no message."""
    try:
        rows = read(out / METRICS)
    except (OSError, ValueError):
        return None
    return next((row.get("val_accuracy") for row in reversed(rows) if row.get("final") and row.get("run") == run), None)


def _row(record: Record, name: str, accuracy: float | None) -> dict[str, object]:
    """A record as the object of `metrics.jsonl`."""
    evaluation = record.evaluation
    grid = {} if record.cut is None else {"cut": list(record.cut), "lengths": list(record.lengths)}
    return {
        "kind": "update",
        "run": name,
        "level": record.level,
        "num_layers": record.num_layers,
        "update": record.update,
        "work": record.work,
        "seconds": record.seconds,
        "objective": evaluation.value,
        "loss": evaluation.loss,
        "grad_norm": record.grad_norm,
        "train_accuracy": evaluation.accuracy,
        "val_accuracy": accuracy,
        "state_residual": evaluation.residual,
        "adjoint_residual": record.adjoint_residual,
        "step_size": record.step,
        "backtracks": record.backtracks,
        "evaluations": record.evaluations,
        "note": record.note,
        "final": record.final,
        **grid,
    }
