"""The one loop of every run: steps, validations, record, checkpoints, signals, screen and pictures, from start to end.

It knows no method: a training is what `Training` says, and everything else about a run is here, but for what every run
is told (`run_options.py`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.run.folder import CHECKPOINTS, METRICS, RunFolder, claim, set_aside
from xbraid_py.run.options import flat, to_dict
from xbraid_py.run.progress import Progress, events_of, require_tensorboard
from xbraid_py.run.record import read, truncate_after
from xbraid_py.run.run_options import RunOptions
from xbraid_py.run.signals import mark_ended, state_said
from xbraid_py.run.store.read import (
    Checkpoint,
    CheckpointError,
    load,
    newest_good,
    no_state,
    numbered,
    restoring,
    verify,
)
from xbraid_py.run.store.write import CheckpointStore, Score, Shard, clear_rest


@dataclass(frozen=True)
class Start:
    """Where a run goes on: a checkpoint, and the last row of the record that is made already."""

    path: Path
    row: dict[str, Any]

    @property
    def update(self) -> int:
        """Updates made."""
        return self.row["update"]


def find_start(kind: str, options: RunOptions) -> Start | None:
    """What the option `--resume` asks for; None if there is nothing to go on from. No message.

    Raises `CheckpointError` if the file is damaged, no checkpoint of such a run, or one of other options.
    """
    path = checkpoint_of(options.resume, options.out)
    if path is None:
        return None
    with load(path) as checkpoint:
        meta = state_of(checkpoint)
    if meta["run"] != kind:
        raise no_state(path, f"its run is {meta['run']!r}, not {kind}")
    check_configuration(path, meta["configuration"], to_dict(options), options.free, options.instead)
    return Start(path, meta["row"])


def checkpoint_of(resume: str | None, out: Path) -> Path | None:
    """The file that `--resume` names, or the newest good one of an out folder; None without either."""
    if resume is None:
        return None
    return newest_good(out / CHECKPOINTS) if resume == "auto" else Path(resume)


def state_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Meta data of a checkpoint that the engine has written; `CheckpointError` if it is a file of something else."""
    meta, kinds = checkpoint.meta, {"run": str, "update": int, "row": dict, "state": dict, "configuration": dict}
    for name, kind in kinds.items():
        if not isinstance(meta.get(name), kind):
            raise no_state(checkpoint.path, f"no {name}" if name not in meta else f"{name}={meta[name]!r}")
    update, final = meta["row"].get("update"), meta["row"].get("final")
    if type(update) is not int or update < 0 or update != meta["update"] or not isinstance(final, bool):
        raise no_state(checkpoint.path, f"update={update!r}, final={final!r}")
    return meta


def resumed_configuration(options: RunOptions) -> dict | None:
    """The configuration of the run that `--resume` goes on with; None if there is nothing to go on from."""
    path = checkpoint_of(options.resume, options.out)
    if path is None:
        return None
    with load(path) as checkpoint:
        return dict(state_of(checkpoint)["configuration"])


def check_configuration(
    path: Path,
    theirs: Mapping[str, Any],
    ours: Mapping[str, Any],
    free: set[str],
    instead: Mapping[str, str] | None = None,
) -> None:
    """Raise a `CheckpointError` that names the first option in which two runs differ.

    Configurations are JSON-able; groups of options are mappings in them. Options, or groups of them, that are `free`
    may differ; `instead` is what may be given instead of the same value, by the name of the option.
    """
    theirs, ours = flat(theirs), flat(ours)
    for name in sorted(theirs.keys() | ours.keys()):
        if name.split(".")[0] not in free and theirs.get(name) != ours.get(name):
            other = f", or {instead[name]}" if instead and name in instead else ""
            raise CheckpointError(
                f"{path} was written with {name}={theirs.get(name)}, but this run has {name}={ours.get(name)}; "
                f"give --{name} {theirs.get(name)}{other}, or start without --resume"
            )


log = logging.getLogger(__name__)

Row = dict[str, Any]
# Global arrays, of each the rows that this rank writes; and what else there is, JSON-able, the same on all ranks.
State = tuple[Mapping[str, Shard], Mapping[str, Any]]


class Training(Protocol):
    """A method at work, as the engine sees it; made complete, at its beginning.

    All ranks call every method together, and get the same numbers.

    Attributes
    ----------
    total : int
        The "update" of the last row, if the run does not end before.
    """

    total: int

    def steps(self) -> Iterator[Row]:
        """Make one update after the other, each when its row is asked for, from where `load` has left off.

        Every row has "update" (int, one more each time), "loss" and "seconds", those of the training so far, and
        "final", whether it is the last one. Further names, wherever a method has the quantity: "level", "num_layers",
        "work", "objective", "grad_norm", "learning_rate", "step_size", "evaluations", "state_residual",
        "adjoint_residual", "train_accuracy", and "note", a line for the screen and the log.
        """
        ...

    def is_due(self, row: Row) -> bool:
        """Whether the network is to be validated at this row; at the last one it is in any case."""
        ...

    def validate(self) -> Row:
        """Measure the network as it is: "val_accuracy", "val_loss" and the like, and "final" if that ends the run."""
        ...

    def score(self, row: Row) -> Score:
        """How good the run is at a row, for the best checkpoint."""
        return Score(accuracy=row.get("val_accuracy"), objective=row.get("objective", row["loss"]))

    def state(self) -> State:
        """All that the rest of the run depends on, at the last row."""
        ...

    def load(self, checkpoint: Checkpoint) -> None:
        """Go on from what `state` gave, on any number of ranks; sends no message.

        The numbers are `checkpoint.meta["state"]`, the row is `checkpoint.meta["row"]`.

        Raises
        ------
        CheckpointError, LookupError, TypeError, ValueError
            If the file holds the state of something else.
        """
        ...

    def is_over(self, row: Row) -> bool:
        """Whether a run that has come to this row, perhaps by other options, has nothing left to do."""
        return row["final"]

    def describe(self) -> str:
        """What is trained now, and how; said at the first row, and whenever "level" or "num_layers" change."""
        return ""

    def draw(self, rows: list[Row], figures: Path) -> Row | None:
        """Draw the pictures of a run that is over; what is returned on rank 0 goes into the record as a summary.

        `rows` are those of the record, on rank 0 alone: only this rank writes, into the folder `figures`.
        """
        return None

    def say(self, row: Row) -> str:
        """The last line on the screen."""
        return ""


def rows_of(training: Training) -> Iterator[Row]:
    """Train to the end: the rows, with what validations have found where these were due.

    This is all that a run in memory needs: `rows = list(rows_of(training))`.
    """
    for row in training.steps():
        if row["final"] or training.is_due(row):
            row |= training.validate()
        yield row
        if row["final"]:
            return


def train(
    kind: str,
    make: Training | Callable[[], Training],
    options: RunOptions,
    comm: Communicator,
    *,
    folder: RunFolder | None = None,
    sizes: Mapping[str, int] | None = None,
    recipe: str = "",
    driver: str | os.PathLike | None = None,
    check: Callable[[Checkpoint], None] | None = None,
) -> Callable[[], Row]:
    """Claim the folder of a run and find out where it goes on, without a message; returns the run.

    A run that goes on, on as many ranks as before, is bitwise the uninterrupted one; on other numbers of ranks it is
    the same up to rounding.

    Parameters
    ----------
    kind : str
        What is trained, such as "nested"; rows and checkpoints bear it as "run".
    make : Training, or callable that returns one
        A training that takes messages to be made is made by all ranks when the run begins. One that takes none is
        handed over as it is: then a checkpoint that does not fit is found out now.
    options : RunOptions
        Of the whole program; those that are not free must be the same when a run goes on.
    comm : Communicator
    folder : RunFolder, optional
        `options.out`, claimed already.
    sizes : mapping of str to int, optional
        What the network depends on besides the options, such as the number of tokens; for the checkpoints.
    recipe : str
        By which name the network can be made again (`xbraid_py.recipes`); for the checkpoints.
    driver : path-like, optional
        The program that goes on with the run by these options, if that is not this one.
    check : callable, optional
        Of a training that is made later: raises an error now if a checkpoint, open, does not fit. It sends no message.

    Returns
    -------
    callable
        The run; returns the last row on all ranks. It raises `RunError` on all ranks if something fails, and `Stopped`
        on all ranks, with a checkpoint of the last update, if a signal has asked for it.

    Raises
    ------
    CheckpointError
        If the checkpoint to go on from is damaged, or one of something else or of other options.
    ValueError, OSError
        On rank 0, if another job has the folder, or it cannot be written.
    """
    if options.tensorboard:
        require_tensorboard()
    folder = folder or claim(options.out, comm)
    configuration = to_dict(options)
    start = find_start(kind, options)
    if start and options.resume != "auto" and comm.rank == 0:
        verify(start.path)  # whole; the ranks read their parts
    is_over, given = False, None if callable(make) else make
    if start and given is not None:
        is_over = _load(given, start)
    elif start and check is not None:
        with load(start.path) as checkpoint, restoring(start.path):
            check(checkpoint)

    def run() -> Row:
        training = _made(make) if callable(make) else make
        if start:
            _agree_on(start, comm)
        if comm.rank == 0:
            clear_rest(folder.checkpoints)
        if is_over if given is not None else start and _load_together(training, start, comm):
            assert start is not None
            _finished(training, start.row, folder)
            return start.row
        _make_room(folder, start)
        about = {"sizes": dict(sizes or {}), "recipe": recipe, "configuration": configuration}
        row = _follow(kind, training, options, folder, about, start, driver)
        if comm.rank == 0 and (text := training.say(row)):
            print(text, flush=True)
        return row

    return run


def _follow(
    kind: str,
    training: Training,
    options: RunOptions,
    folder: RunFolder,
    about: Mapping[str, Any],
    start: Start | None,
    driver: str | os.PathLike | None,
) -> Row:
    """The loop itself, in an open folder; the last row."""
    comm, done, level = folder.comm, start.update if start else 0, None
    store = CheckpointStore(folder.checkpoints, options.keep)
    with ExitStack() as stack:
        stack.enter_context(
            folder.open(about["configuration"], training.total, done, append=start is not None, driver=driver)
        )
        events = stack.enter_context(
            events_of(folder, options.tensorboard, about["configuration"], done + 1 if start else 0)
        )
        screen = stack.enter_context(Progress(comm, training.total, done=done))
        is_first, row = start is None, {}
        for row in rows_of(training):
            row = {"kind": "update", "run": kind, **row}
            number, is_final = row["update"], row["final"]
            if (row.get("level"), row.get("num_layers")) != level:
                level = row.get("level"), row.get("num_layers")
                _note(training.describe(), screen, folder)
            is_validated = any(name.startswith("val_") and value is not None for name, value in row.items())
            is_telling = row.pop("telling", False) or bool(row.get("note"))
            if is_first or is_final or is_validated or is_telling or number % options.record_every == 0:
                folder.write(row)
                events(row)
            is_first = False
            screen.update(row)
            _note(row.get("note"), screen, folder)
            if is_final:  # before the checkpoint that says that the run is over: what fails here is made up for
                _draw(training, folder)
            stop = folder.update(number, row.get("objective", row["loss"]), row.get("val_accuracy"))
            score = training.score(row)
            is_best = False
            if options.checkpoint_best and is_validated:
                is_best = comm.bcast(score.beats(store.best_score()) if comm.rank == 0 else None)
            if stop or is_final or is_best or number % options.checkpoint_every == 0:
                arrays, numbers = training.state()
                meta = {"run": kind, "update": number, "row": row, "state": numbers, **about}
                path = store.save(comm, number, arrays, meta, score)
                if stop and not is_final:
                    raise folder.stopped(path)
    return row


def _made(make: Callable[[], Training]) -> Training:
    try:
        return make()
    except (ValueError, OSError) as error:  # on all ranks alike
        raise RunError(str(error)) from error


def _load(training: Training, start: Start) -> bool:
    """Go on from a checkpoint, to be done by all ranks; whether the run is over."""
    with load(start.path) as checkpoint, restoring(start.path):
        training.load(checkpoint)
        return training.is_over(start.row)


def _agree_on(start: Start, comm: Communicator) -> None:
    try:
        comm.same((start.update, str(start.path)), "resume")
    except ValueError as error:
        raise RunError(f"{error}; the checkpoints have changed meanwhile, or not all ranks can see them") from error


def _load_together(training: Training, start: Start, comm: Communicator) -> bool:
    is_over, problem = False, None
    try:
        is_over = _load(training, start)
    except CheckpointError as error:
        problem = str(error)
    failed = comm.first_error(problem)
    if failed is not None:
        raise RunError(failed[1])
    return is_over


def _finished(training: Training, row: Row, folder: RunFolder) -> None:
    """What is left to do for a run that is over: it may have been killed in its last moments."""
    is_drawn = folder.figures.exists() and state_said(folder.path) == "finished"
    if folder.comm.bcast(folder.metrics.exists() and not is_drawn):
        try:
            _draw(training, folder)
            folder.update(row["update"])  # raises what rank 0 could not write
        except BaseException as error:
            mark_ended(folder.path, "failed", f"{type(error).__name__}: {error}", even_if_over=True)
            folder.release()
            raise
    if folder.comm.rank == 0:
        mark_ended(folder.path, "finished", "", even_if_over=True)
        print(f"the run in {folder.path} is finished; to train again, start without --resume", flush=True)
        if text := training.say(row):
            print(text, flush=True)
    folder.release()


def _draw(training: Training, folder: RunFolder) -> None:
    with folder.guarded():
        rows = read(folder.metrics) if folder.comm.rank == 0 else []
        summary = training.draw(rows, folder.figures)
        if summary:
            last = next(row for row in reversed(rows) if "update" in row)
            folder.write({"kind": "summary", "update": last["update"], **summary})


def _note(text: str | None, screen: Progress, folder: RunFolder) -> None:
    if text:
        screen.note(text)
        folder.log(text)


def _make_room(folder: RunFolder, start: Start | None) -> None:
    """Set an earlier run aside, or of one that goes on the later checkpoints, and cut its record; collective."""
    problem = None
    if folder.comm.rank == 0:
        try:
            _clear(folder.path, folder.checkpoints, start)
        except (OSError, ValueError) as error:
            problem = str(error)
    problem = folder.comm.bcast(problem)
    if problem is not None:
        raise RunError(problem)


def _clear(out: Path, checkpoints: Path, start: Start | None) -> None:
    if start is None:
        aside = set_aside(out)
        if aside is not None:
            log.info("the earlier run in %s is now in %s", out, aside)
        return
    truncate_after(out / METRICS, start.update + 1)
    later = [path for number, path in numbered(checkpoints) if number > start.update]
    aside = set_aside(out, tuple(str(path.relative_to(out)) for path in later))
    if aside is not None:
        log.info("checkpoints of later updates, which this run makes again, are now in %s", aside / checkpoints.name)
