"""A run of multilevel training in width in its folder: cycles, record, checkpoints and screen, from start to end."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xbraid_py.comm.errors import RunError
from xbraid_py.multilevel.width.training import WidthRecord
from xbraid_py.multilevel.width.training_options import WidthTrainingOptions
from xbraid_py.recipes.classification_training import prepare
from xbraid_py.recipes.old_resume import checkpoint_folder
from xbraid_py.recipes.width import Job, cycles_of
from xbraid_py.recipes.width_checkpoint import NAME, read_width, save_width
from xbraid_py.run.folder import RunFolder
from xbraid_py.run.progress import Progress
from xbraid_py.run.record import read
from xbraid_py.run.store.keep import CheckpointStore
from xbraid_py.run.store.write import CheckpointError

# What may differ between a run and its continuation.
FREE = ("out", "resume", "smoke", "checkpoint_every", "keep", "validate_every", "max_work", "data_dir")


@dataclass(frozen=True, kw_only=True)
class Following:
    """When a run ends, and how often it is looked at.

    Parameters
    ----------
    max_work
        End before more work units than this, those of tau included.
    validate_every
        Work units between two validations.
    checkpoint_every
        Cycles between two checkpoints.
    keep
        Newest checkpoints to keep, besides the best.
    """

    max_work: float
    validate_every: float = 50.0
    checkpoint_every: int = 50
    keep: int = 3

    def __post_init__(self):
        for name in ("max_work", "validate_every"):
            if not 0.0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite; use 50")
        for name in ("checkpoint_every", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 3")


def follow(
    make: Callable[[], Job],
    training: WidthTrainingOptions,
    following: Following,
    folder: RunFolder,
    configuration: Mapping[str, Any],
    resume: str | None = None,
    finish: Callable[[Job, list[dict]], None] | None = None,
) -> Callable[[], None]:
    """Read the checkpoint of a run to go on from, if there is one, without a message; returns the run.

    Parameters
    ----------
    make : callable
        The job, made by all ranks together when the run begins, since its samples may have to be generated.
    training : WidthTrainingOptions
        Of the job.
    following : Following
    folder : RunFolder
        Claimed.
    configuration : mapping
        JSON-able; compared when a run is resumed, but for `FREE`.
    resume : str, optional
        A file, or "auto": the newest good one of the folder, if there is any.
    finish : callable, optional
        Called on all ranks at the end with the job and the rows of the record that have a validation, on the others
        than rank 0 with none.

    Raises
    ------
    CheckpointError
        If the file is damaged, no checkpoint of such a run, or one of another configuration.
    """
    out, comm = folder.path, folder.comm
    state = read_width(resume, out, configuration, FREE)
    done, cycles = state.record if state else None, cycles_of(training, following.max_work)

    def run() -> None:
        if done and done.cycle >= cycles:
            if comm.rank == 0:
                print(f"the run in {out} is finished; for more cycles give another --max_work")
            return
        job = make()
        if state:
            try:
                state.restore(job.training)
            except CheckpointError as error:  # on all ranks alike
                raise RunError(str(error)) from error
        prepare(out, comm, [NAME], {NAME: state} if state else {})
        store, before = CheckpointStore(checkpoint_folder(out, NAME), following.keep), done.cycle if done else 0
        with (
            folder.open(configuration, cycles, before, append=state is not None),
            Progress(comm, cycles, done=before) as progress,
        ):
            progress.note("{:g} work units a cycle, {:g} without those of tau".format(*training.work()))
            for record, errors, is_final in job.run(cycles, following.validate_every, done):
                row = row_of(record, errors, is_final)
                progress.update(row)
                folder.write(row)
                stop = folder.update(record.cycle, record.loss)
                if is_final and finish is not None:  # before the checkpoint that says that the run is over
                    finish(job, _validated(folder.metrics) if comm.rank == 0 else [])
                if stop or is_final or record.cycle % following.checkpoint_every == 0:
                    error = errors["val_l2"] if errors else None
                    path = save_width(store, comm, job.training, record, configuration, error)
                    if stop and not is_final:
                        raise folder.stopped(path)
        if comm.rank == 0:
            print(summary(_validated(folder.metrics)), flush=True)

    return run


def row_of(record: WidthRecord, errors: Mapping[str, float | None] | None, is_final: bool) -> dict:
    """A record as the object of `metrics.jsonl`, with its errors if there are any."""
    return {
        "kind": "update",
        "run": NAME,
        "level": 0,
        "update": record.cycle,
        "cycle": record.cycle,
        "work": record.work,
        "work_without_tau": record.work_without_tau,
        "counted": record.counted,
        "seconds": record.seconds,
        "matching_seconds": record.matching_seconds,
        "objective": record.loss,
        "loss": record.loss,
        "widths": record.widths,
        **(errors or {}),
        "final": is_final,
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """The last line of a run, from its rows with a validation."""
    row, l2, largest = rows[-1], [each["val_l2"] for each in rows], [each["val_linf"] for each in rows]
    return (
        f"validation L2 {l2[-1]:.3e} (best {min(l2):.3e}), Linf {largest[-1]:.3f} (best {min(largest):.3f}) after "
        f"{row['cycle']} cycles, {row['work']:g} work units (without tau {row['work_without_tau']:g}, counted "
        f"{row['counted']:.1f}), {row['seconds']:.2f} seconds"
    )


def _validated(metrics: Path) -> list[dict]:
    return [row for row in read(metrics)[1:] if row.get("val_l2") is not None]
