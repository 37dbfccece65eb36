"""TensorBoard: the numbers of a record as event files, written while a run is under way or afterwards."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from xbraid_py.run.record import number, scalars

if TYPE_CHECKING:
    from xbraid_py.comm import Communicator
    from xbraid_py.run.folder import RunFolder

EVENTS = "tensorboard"  # the folder of the event files in that of a run


def require_tensorboard() -> None:
    """Raise a ValueError that says how to install TensorBoard, if it is missing; loads nothing."""
    try:
        found = importlib.util.find_spec("tensorboard") is not None
    except ValueError:  # blocked, or half loaded
        found = False
    if not found:
        raise ValueError(
            "event files need the package tensorboard, which is not installed; use pip install 'xbraid_py[tensorboard]'"
        )


class EventWriter:
    """Writes rows as event files on rank 0; on other ranks it does nothing, and it never sends a message.

    A context manager with the `write` of `MetricsWriter`. Each quantity is drawn over the updates, under its own name,
    or under RUN/NAME where rows say which run they are of.

    Parameters
    ----------
    folder : path-like
        Of the event files; made if there is none.
    comm : Communicator, optional
        The ranks of the job; without them this process writes.
    configuration : mapping, optional
        JSON-able; shown as text.
    resumed_at : int, optional
        A run that goes on here: TensorBoard drops what earlier files say of this update and later ones.

    Raises
    ------
    ValueError
        If TensorBoard is not installed; on every rank.
    OSError
        On rank 0, if the files cannot be written.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        comm: Communicator | None = None,
        configuration: Mapping[str, Any] | None = None,
        resumed_at: int | None = None,
    ):
        require_tensorboard()
        self.folder = Path(folder)
        self._is_writer = comm is None or comm.rank == 0
        self._configuration, self._resumed_at = configuration, resumed_at
        self._writer = None
        self._rows = 0

    def __enter__(self) -> Self:
        if self._is_writer:
            from torch.utils.tensorboard import SummaryWriter  # takes seconds to load: on one rank only

            self.folder.mkdir(parents=True, exist_ok=True)
            self._writer = SummaryWriter(str(self.folder), purge_step=self._resumed_at)
            if self._configuration:
                text = json.dumps(self._configuration, indent=1, default=str)
                # Four spaces make a block of it: nothing in it is read as markup.
                self._writer.add_text("configuration", "\n".join(f"    {line}" for line in text.splitlines()))
        return self

    def __exit__(self, *exception) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def write(self, row: Mapping[str, Any]) -> None:
        """Add the numbers of a row at its "update", or at the number of the row if it has none."""
        if not self._is_writer:
            return
        if self._writer is None:
            raise ValueError(f"the folder {self.folder} is not open; write inside `with EventWriter(...) as events:`")
        update = number(row.get("update"))
        step = self._rows if update is None else int(update)
        prefix = f"{row['run']}/" if isinstance(row.get("run"), str) else ""
        for name, value in scalars(row).items():
            self._writer.add_scalar(prefix + name, value, step)
        self._rows += 1


@contextlib.contextmanager
def events_of(
    folder: RunFolder, wanted: bool, configuration: Mapping[str, Any], resumed_at: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """What adds a row of a run to event files in its folder `tensorboard`, if that is wanted, or does nothing.

    Sends no message; what fails is said by the next `RunFolder.update`.

    Parameters
    ----------
    folder : RunFolder
        Open.
    wanted : bool
    configuration : mapping
        JSON-able; shown as text.
    resumed_at : int
        TensorBoard drops what earlier files say of this update and later ones.

    Raises
    ------
    ValueError
        If TensorBoard is wanted and not installed.
    """
    if not wanted:
        yield lambda row: None
        return
    with contextlib.ExitStack() as stack:
        events = None
        with folder.guarded():
            events = stack.enter_context(EventWriter(folder.path / EVENTS, folder.comm, configuration, resumed_at))

        def write(row: Mapping[str, Any]) -> None:
            if events is not None:
                with folder.guarded():
                    events.write(row)

        try:
            yield write
        finally:
            with folder.guarded():
                stack.close()


def write_events(record: str | os.PathLike | Sequence[Mapping[str, Any]], folder: str | os.PathLike) -> int:
    """Write a whole record as event files.

    Parameters
    ----------
    record : path-like or sequence of mapping
        A `metrics.jsonl`, or rows like its own: a header may be the first of them.
    folder : path-like
        Of the event files; what earlier files there say is dropped by TensorBoard.

    Returns
    -------
    int
        Rows written.

    Raises
    ------
    ValueError
        If TensorBoard is not installed, or the file is no record.
    OSError
        If the record cannot be read or the files cannot be written.
    """
    require_tensorboard()
    if isinstance(record, str | os.PathLike):
        from xbraid_py.run.record import read  # needs torch, which rows do not

        record = read(record)
    header = next((row for row in record if row.get("kind") == "header"), {})
    rows = [row for row in record if row.get("kind") not in ("header", "resume")]
    with EventWriter(folder, configuration=header.get("configuration"), resumed_at=0) as events:
        for row in rows:
            events.write(row)
    return len(rows)
