"""A run of MG/OPT in depth in its folder: cycles, record, checkpoints and screen, from start to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xbraid_py.multilevel.depth.mgopt import CycleRecord
from xbraid_py.multilevel.depth.mgopt_state import NAME, read_cycle, save_cycle
from xbraid_py.recipes.classification_training import prepare
from xbraid_py.recipes.mgopt import Job
from xbraid_py.recipes.old_resume import checkpoint_folder
from xbraid_py.run.folder import RunFolder
from xbraid_py.run.progress import Progress
from xbraid_py.run.record import read
from xbraid_py.run.store.keep import CheckpointStore

# What may differ between a run and its continuation.
FREE = ("out", "resume", "smoke", "checkpoint_every", "keep", "validate_every", "max_cycles", "goal", "data_dir")


@dataclass(frozen=True, kw_only=True)
class Following:
    """When a run ends, and how often it is looked at.

    Parameters
    ----------
    goal
        Validation accuracy at which the run ends, above 0 and at most 1.
    max_cycles
        End after so many cycles, whatever the accuracy.
    validate_every
        Cycles between two validations.
    checkpoint_every
        Cycles between two checkpoints.
    keep
        Newest checkpoints to keep, besides the best.
    """

    goal: float
    max_cycles: int
    validate_every: int = 1
    checkpoint_every: int = 100
    keep: int = 3

    def __post_init__(self):
        for name in ("max_cycles", "validate_every", "checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 100")
        if not 0.0 < self.goal <= 1.0:
            raise ValueError(f"goal={self.goal} must be above 0 and at most 1; use 0.93")


def follow(
    job: Job,
    following: Following,
    folder: RunFolder,
    configuration: Mapping[str, Any],
    cycle: str,
    resume: str | None = None,
    finish: Callable[[list[dict]], None] | None = None,
) -> Callable[[], None]:
    """Read the checkpoint of a run to go on from, if there is one, without a message; returns the run.

    Parameters
    ----------
    job : Job
    following : Following
    folder : RunFolder
        Claimed.
    configuration : mapping
        JSON-able; compared when a run is resumed, but for `FREE`.
    cycle : {"V", "W"}
        For the work units of the first line.
    resume : str, optional
        A file, or "auto": the newest good one of the folder, if there is any.
    finish : callable, optional
        Called on all ranks at the end with the rows of the record that have a validation, on the others than rank 0
        with none.

    Raises
    ------
    CheckpointError
        If the file is damaged, no checkpoint of such a run, or one of another configuration.
    """
    training, out = job.training, folder.path
    state = read_cycle(resume, out, training.network, configuration, FREE)
    done = state.record if state else None

    def run() -> None:
        comm = folder.comm
        if state and (state.is_final or state.record.cycle >= following.max_cycles):
            if comm.rank == 0:
                print(f"the run in {out} is finished; for more cycles give another --max_cycles or --goal")
            return
        prepare(out, comm, [NAME], {NAME: state} if state else {})
        training.x = state.x if state else training.x
        store = CheckpointStore(checkpoint_folder(out, NAME), following.keep)
        before = done.cycle if done else 0
        every = 1 if following.validate_every == 1 else None  # of few and long cycles each is shown
        with (
            folder.open(configuration, following.max_cycles, before, append=state is not None),
            Progress(comm, following.max_cycles, done=before, every=every) as progress,
        ):
            work = training.schedule.work(cycle, training.costs)
            progress.note(f"{training.schedule}, {work:.2f} work units a cycle")
            for record, accuracy, is_final in job.run(
                following.goal, following.max_cycles, following.validate_every, done
            ):
                row = row_of(record, training.network.grid.num_layers, accuracy, following.goal, is_final)
                progress.update(row)
                folder.write(row)
                stop = folder.update(record.cycle, row["objective"], accuracy)
                if is_final and finish is not None:  # before the checkpoint that says that the run is over
                    finish(_validated(folder.metrics) if comm.rank == 0 else [])
                if stop or is_final or (record.cycle and record.cycle % following.checkpoint_every == 0):
                    network, reached = training.network, row["reached"]
                    path = save_cycle(store, network, training.x, record, reached, configuration, accuracy)
                    if stop and not is_final:
                        raise folder.stopped(path)
        if comm.rank == 0:
            print(summary(row), flush=True)

    return run


def row_of(record: CycleRecord, num_layers: int, accuracy: float | None, goal: float, is_final: bool) -> dict:
    """A record as the object of `metrics.jsonl`."""
    return {
        "kind": "update",
        "run": NAME,
        "level": 0,
        "num_layers": num_layers,
        "update": record.cycle,
        "cycle": record.cycle,
        "work": record.work,
        "counted_work": record.counted,
        "gradients": record.gradients,
        "seconds": record.seconds,
        "objective": record.evaluation.value,
        "loss": record.evaluation.loss,
        "train_accuracy": record.evaluation.accuracy,
        "val_accuracy": accuracy,
        "state_residual": record.evaluation.residual,
        "reached": accuracy is not None and accuracy >= goal,
        "final": is_final,
    }


def summary(row: Mapping[str, Any]) -> str:
    """The last line of a run."""
    return (
        f"validation accuracy {100 * row['val_accuracy']:.2f} %{'' if row['reached'] else ', not the goal,'} after "
        f"{row['cycle']} cycles, {row['work']:.1f} work units (counted: {row['counted_work']:.1f}), "
        f"{row['seconds']:.2f} seconds"
    )


def _validated(metrics: Path) -> list[dict]:
    return [row for row in read(metrics)[1:] if row.get("val_accuracy") is not None]
