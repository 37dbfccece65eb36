"""A training run with its record, its checkpoints and its screen."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path

from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.io.metrics import MetricsWriter, truncate_after
from xbraid_py.io.progress import Progress
from xbraid_py.io.run_checkpoint import checkpoint_folder, save_run
from xbraid_py.kernels import BACKEND
from xbraid_py.multilevel import NestedIteration, Record, Snapshot

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What a run leaves behind, and how often.

    Parameters
    ----------
    record : MetricsWriter
    progress : Progress
    validation : tuple of (F, B) tensor and (B,) int64 tensor
        Features and labels of the validation points.
    configuration : mapping
        JSON-able; goes into the checkpoints.
    checkpoint_every, validate_every : int
        Updates between two checkpoints, and between two validations.
    """

    record: MetricsWriter
    progress: Progress
    validation: tuple[Tensor, Tensor]
    configuration: Mapping
    checkpoint_every: int
    validate_every: int

    def run_all(self, runs: Mapping[str, NestedIteration], out: Path, resumed: Mapping[str, Snapshot]) -> float:
        """Train one run after the other, each from its snapshot if it has one; collective.

        Returns
        -------
        float
            Validation accuracy at the end of the first run.
        """
        accuracies = [
            self._run(run, name, checkpoint_folder(out, name), resumed.get(name)) for name, run in runs.items()
        ]
        return accuracies[0]

    def _run(self, run: NestedIteration, name: str, folder: Path, snapshot: Snapshot | None) -> float:
        accuracy, depth = None, None
        for record in run.run(snapshot):
            if record.num_layers != depth:
                depth = record.num_layers
                solver = run.objective.forward
                table = solver.hierarchy.table(solver.options)
                self.progress.note(f"{name}: {depth} layers, kernels: {BACKEND}\n{table}")
            due = record.final or record.update % self.validate_every == 0
            accuracy = self.accuracy(run) if due else None
            row = _row(record, name, accuracy)
            self.progress.update(row)
            if record.note:
                self.progress.note(record.note)
            if snapshot is not None and snapshot.is_final:
                continue  # a run that is over has its record and its checkpoint already
            self.record.write(row)
            if record.final or record.update % self.checkpoint_every == 0:
                save_run(folder, run, record.update, name, self.configuration)
        return accuracy

    def accuracy(self, run: NestedIteration) -> float:
        """Share of the validation points that the network classifies rightly at present."""
        features, labels = self.validation
        return float((run.network.predict(run.one_shot.x, features) == labels).double().mean())


def prepare(out: Path, comm: Communicator, runs: Iterable[str], resumed: Mapping[str, Snapshot]) -> None:
    """Make room for a job in its folder: an earlier one there is set aside, a resumed one cut to where it goes on."""
    if comm.rank == 0:
        record = out / "metrics.jsonl"
        if resumed:
            for name in runs:
                truncate_after(record, resumed[name].next_record if name in resumed else 0, name)
        elif record.exists():
            aside = next(path for n in count(1) if not (path := out / f"earlier-{n}").exists())
            aside.mkdir()
            for name in ("metrics.jsonl", "checkpoints", "figures"):
                if (out / name).exists():
                    (out / name).rename(aside / name)
            log.info("the earlier run in %s is now in %s", out, aside)
    comm.barrier()


def _row(record: Record, name: str, accuracy: float | None) -> dict[str, object]:
    """A record as the object of `metrics.jsonl`."""
    evaluation = record.evaluation
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
    }
