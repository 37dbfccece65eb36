"""A run on minibatches in its folder: updates, tests, record, checkpoints, screen and picture, from start to end."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from xbraid_py.layer_parallel.minibatch.alike import check_alike
from xbraid_py.layer_parallel.minibatch.state import Trained
from xbraid_py.layer_parallel.minibatch.updates import Batch, Measure, train
from xbraid_py.recipes.digits_resume import Position, make_room, restore, save_trained, score_of_test
from xbraid_py.recipes.pictures.minibatch import picture
from xbraid_py.run.folder import RunFolder
from xbraid_py.run.progress import Progress
from xbraid_py.run.record import read
from xbraid_py.run.status import mark_ended
from xbraid_py.run.store.keep import CheckpointStore, Score
from xbraid_py.run.tensorboard import with_events


def follow(
    trained: Trained,
    batches: Callable[[int], Iterable[Batch]],
    loss: Measure,
    test: Callable[[], Mapping[str, float]],
    *,
    folder: RunFolder,
    configuration: Mapping[str, Any],
    num_updates: int,
    record_every: int,
    test_every: int,
    checkpoint_every: int,
    keep: int = 3,
    clip: float | None = None,
    start: Position | None = None,
    finish: Callable[[], None] | None = None,
    sizes: Mapping[str, int] | None = None,
    tensorboard: bool = False,
) -> dict:
    """Train a model in the folder of a run, from its beginning or from a checkpoint.

    A run that goes on, on as many ranks as before, is bitwise the uninterrupted one wherever its blocks are evaluated
    in the same way (`LayerParallel(vmap=...)`, which is otherwise measured anew); on other numbers of ranks it is
    the same up to rounding. Solves begin anew with every batch, so no state of theirs is kept but how exactly they are
    made. Another number of replicas shares the batches out otherwise: then losses agree as well as the solves are
    exact, and masks of dropout differ.

    Parameters
    ----------
    trained : Trained
        As built for a new run.
    batches : callable
        `batches(done)` gives the batches of the updates behind so many, the same on all ranks: pairs of inputs and
        targets of the whole batch, see `train`. They end with the run.
    loss : callable
        As in `train`.
    test : callable
        Measures the model as it is, such as {"test_accuracy": 0.98}; called on all ranks.
    folder : RunFolder
        Claimed. It is released at the end.
    configuration : mapping
        The options, JSON-able (`xbraid_py.run.options.to_dict`).
    num_updates : int
        Updates in all.
    record_every : int
        Updates between two rows of the record; the first, the last, and those after which a solver was changed or whose
        gradient error was measured are there in any case.
    test_every : int
        Updates between two tests; there is one after the last update as well.
    checkpoint_every : int
        Updates between two checkpoints; there is one after the last update, after a signal, and whenever a test is the
        best so far (by its accuracy, or else by its loss) as well.
    keep : int
        Newest checkpoints that are kept, besides the best.
    clip : float, optional
        As in `train`.
    start : Position, optional
        Where to go on (`read_resumed`); the beginning if not given.
    finish : callable, optional
        Called on all ranks after the last update, before its checkpoint: what a run leaves besides.
    sizes : mapping of str to int, optional
        What the network depends on besides the configuration, such as the number of tokens; for the checkpoints.
    tensorboard : bool
        Write event files as well.

    Returns
    -------
    dict
        The last test, as it is in the record: "kind": "test", "update", "seconds" spent in updates, and what
        `test` has given. Of a run that is over already the one that it ended with; it is left as it is.

    Raises
    ------
    ValueError
        If there is no update to be made, or the ranks hold different models.
    RunError
        On all ranks, if the loss or a weight is not finite, or a file cannot be read or written.
    Stopped
        On all ranks, if a signal has asked for it; a checkpoint of the last update is there.
    """
    comm, start = folder.comm, start or Position()
    if start.is_final:
        if comm.rank == 0:
            mark_ended(folder.path, "finished", "")  # it may have been killed behind its last checkpoint
            print(f"the run in {folder.path} is finished; to train again, start without --resume")
        folder.release()
        return start.tested
    restore(trained, start, comm)
    check_alike(trained.model, comm)
    make_room(folder, start)
    store = CheckpointStore(folder.checkpoints, keep)
    rows = train(
        trained.model,
        batches(start.update),
        loss,
        trained.optimizer,
        scheduler=trained.scheduler,
        clip=clip,
        grid=trained.grid,
        done=start.update,
        seconds=start.seconds,
    )
    tested, number = start.tested, start.update
    with (
        folder.open(configuration, num_updates, start.update, append=start.path is not None),
        with_events(folder, tensorboard, configuration, start.update + 1) as record,
        Progress(comm, num_updates, done=start.update) as screen,
    ):
        if not start.update:
            for stack in trained.stacks:
                folder.log(f"levels of a stack\n{stack.table()}")
        for row in rows:
            number = row["update"]
            is_last = number == num_updates
            telling = any(stack["event"] or stack["measured"] for stack in row["stacks"])
            if telling or is_last or number == 1 or number % record_every == 0:
                record.write(row)
            score, is_best = Score(), False
            if due := is_last or number % test_every == 0:
                tested = {"kind": "test", "update": number, "seconds": row["seconds"], **test()}
                record.write(tested)
                score = score_of_test(tested)
                is_best = comm.bcast(score.beats(store.best_score()) if comm.rank == 0 else None)
            screen.update(_shown(row, tested if due else {}))
            stop = folder.update(number, row["loss"], score.accuracy)
            if is_last:
                _end(folder, finish)
            if stop or is_last or is_best or number % checkpoint_every == 0:
                position = Position(update=number, seconds=row["seconds"], is_final=is_last, tested=tested)
                path = save_trained(store, comm, trained, position, configuration, score, sizes or {})
                if stop and not is_last:
                    raise folder.stopped(path)
        if number < num_updates:
            raise ValueError(f"batches end after update {number}, num_updates={num_updates}; use as many batches")
    return tested


def _end(folder: RunFolder, finish: Callable[[], None] | None) -> None:
    """What is made of a run at its end: before the checkpoint that says that it is over."""
    if finish is not None:
        finish()
    if folder.comm.rank == 0:
        with folder.guarded():
            picture(read(folder.metrics), folder.figures / "training.png")


def _shown(row: Mapping[str, Any], tested: Mapping[str, Any]) -> dict:
    """A row in the words of the screen."""
    shown = {"update": row["update"], "seconds": row["seconds"], "objective": row["loss"]}
    shown |= {"step_size": row["learning_rate"], "grad_norm": row["grad_norm"]}
    shown["val_accuracy"] = tested.get("test_accuracy")
    for key, name in (("state_residual", "residual"), ("adjoint_residual", "adjoint_residual")):
        shown[key] = max((stack[name] for stack in row["stacks"]), default=None)
    return shown
