"""Views of the record: a bar on a terminal, rows in a batch log, TensorBoard's event files; and the log messages."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self, TextIO, cast

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from xbraid_py.comm import Communicator
from xbraid_py.run.record import number, read, scalars

# Key of a row, title, width, format, factor (accuracies are fractions in the record, percentages on the screen).
_COLUMNS = (
    ("update", "update", 6, ".0f", 1),
    ("num_layers", "layers", 6, ".0f", 1),
    ("work", "work", 7, ".1f", 1),
    ("seconds", "seconds", 8, ".1f", 1),
    ("objective", "objective", 11, ".4e", 1),
    ("grad_norm", "gradient", 9, ".2e", 1),
    ("train_accuracy", "train %", 7, ".2f", 100),
    ("val_accuracy", "valid %", 7, ".2f", 100),
    ("val_loss", "val loss", 8, ".4f", 1),
    ("state_residual", "state res", 9, ".1e", 1),
    ("adjoint_residual", "adj. res", 8, ".1e", 1),
    ("step_size", "step", 8, ".1e", 1),
    ("evaluations", "evals", 5, ".0f", 1),
)
# Of the current row beside a bar: key, what stands before and after the number, format, factor.
_SHORT = (
    ("num_layers", "", " layers", ".0f", 1),
    ("objective", "obj ", "", ".3e", 1),
    ("val_accuracy", "valid ", " %", ".2f", 100),
    ("grad_norm", "grad ", "", ".1e", 1),
    ("state_residual", "res ", "", ".1e", 1),
)
_BAR_WIDTH = 12
_REDRAW_SECONDS = 0.2  # of the bar: one thread draws and computes
_ROW_SECONDS = 10.0  # after which a batch log shows a row in any case


class Progress:
    """Shows the rows of the record on rank 0; on other ranks it does nothing, and it never sends a message.

    A context manager. On a terminal: a bar with the current row, above it the last row of each level done. In a batch
    log: the first and last row of each level under a line of titles, and between them a row every `every` updates, or
    when the last one is 10 seconds old. Columns that no row has filled yet are left out.

    Parameters
    ----------
    comm : Communicator
    total_updates : int
        Weight updates of all levels together, those before a resumption included.
    stream : text file, optional
        Where to print; the standard output.
    every : int, optional
        Updates between two rows of a batch log; the default makes about 40 rows in all.
    done : int
        Updates done before a resumption.

    Raises
    ------
    ValueError
        If a number is out of its range.
    """

    def __init__(
        self,
        comm: Communicator,
        total_updates: int,
        stream: TextIO | None = None,
        every: int | None = None,
        done: int = 0,
    ):
        for name, value, least in (("total_updates", total_updates, 0), ("done", done, 0), ("every", every, 1)):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}; use {max(least, 10)}")
        self._total = total_updates
        self._done = done
        self._every = every or max(1, total_updates // 40)
        self._stream = stream
        self._view: _Bar | _Rows | None = None
        self._is_shown = comm.rank == 0

    def __enter__(self) -> Self:
        if self._is_shown:
            console = Console(file=self._stream or sys.stdout, highlight=False)
            is_seen = self._stream is not None or reaches_terminal()
            if console.is_terminal and not console.is_dumb_terminal and is_seen:
                self._view = _Bar(console, self._total, self._done)
            else:
                self._view = _Rows(cast(TextIO, console.file), self._every)
        return self

    def __exit__(self, *exception) -> None:
        if self._view is not None:
            self._view.close()
            self._view = None

    def update(self, row: Mapping[str, Any]) -> None:
        """Show one row of the record, or hold it back until it turns out to be the last of its level.

        Shown are "run", "level", "num_layers", "update", "work", "seconds", "objective" (or else "loss"), "grad_norm",
        "train_accuracy" and "val_accuracy" (fractions), "state_residual", "adjoint_residual", "step_size" (or else
        "learning_rate"), "evaluations". What is missing or None shows as "-".
        """
        if self._view is not None:
            self._view.update({"objective": row.get("loss"), "step_size": row.get("learning_rate"), **row})

    def note(self, text: str) -> None:
        """Print a line of text, above the bar or after the rows so far."""
        if self._view is not None:
            self._view.note(text)


# Names of the processes by which Open MPI hands on what a rank prints to a terminal of its own making.
_HANDING_ON = ("mpirun", "mpiexec", "orterun", "orted", "prterun", "prted")


def reaches_terminal() -> bool:
    """Whether what is printed to a terminal comes to one that somebody looks at.

    Open MPI gives every rank one of its own, also where the output of its `mpirun` goes into a file; there it is the
    output of `mpirun` that counts. Where that cannot be seen, as on another node, it is taken to be a file.
    """
    if "OMPI_COMM_WORLD_SIZE" not in os.environ:
        return True
    pid, found = os.getppid(), ""
    with contextlib.suppress(OSError, ValueError):
        while True:
            name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
            if name not in _HANDING_ON:
                break
            found = os.readlink(f"/proc/{pid}/fd/1")
            pid = int(rest.split()[1])
    return found.startswith("/dev/") and found != os.devnull


Filled = Collection[str]  # keys of the columns that are shown


def filled(row: Mapping[str, Any]) -> set[str]:
    """Keys of the columns that a row fills."""
    return {key for key, *_ in (*_COLUMNS, *_SHORT) if row.get(key) is not None}


def titles(keys: Filled | None = None) -> str:
    """The line above the rows: of these columns, or of all there are."""
    return "  ".join(title.rjust(width) for key, title, width, _, _ in _COLUMNS if keys is None or key in keys)


def format_row(row: Mapping[str, Any], keys: Filled | None = None) -> str:
    """A row of the record as one line under `titles`."""
    return "  ".join(
        _cell(row, key, form, factor).rjust(width)
        for key, _, width, form, factor in _COLUMNS
        if keys is None or key in keys
    )


def _short_row(row: Mapping[str, Any], keys: Filled) -> str:
    parts = (f"{before}{_cell(row, key, form, by)}{after}" for key, before, after, form, by in _SHORT if key in keys)
    return "  ".join(parts)


def _cell(row: Mapping[str, Any], key: str, form: str, factor: int) -> str:
    value = row.get(key)
    return "-" if value is None else format(value * factor, form)


def _level(row: Mapping[str, Any]) -> tuple:
    return row.get("run"), row.get("level"), row.get("num_layers")


def _name(row: Mapping[str, Any]) -> str:
    """What the rows that follow belong to, as far as the row says so."""
    parts = [
        None if row.get("run") is None else str(row["run"]),
        None if row.get("level") is None else f"level {row['level']}",
        None if row.get("num_layers") is None else f"{row['num_layers']} layers",
    ]
    return ", ".join(part for part in parts if part)


class _Rows:
    """A batch log."""

    def __init__(self, stream: TextIO, every: int):
        self._stream = stream
        self._every = every
        self._last: Mapping[str, Any] | None = None
        self._skipped = 0  # rows since the one shown last
        self._filled: set[str] = {"update"}
        self._titles = ""  # shown last
        self._shown_at = 0.0

    def update(self, row):
        begins = self._last is None or _level(row) != _level(self._last)
        if begins:
            self._flush()
            self._print(f"\n{_name(row)}" if _name(row) else "")
            self._titles = ""
        self._last = row
        self._filled |= filled(row)
        self._skipped += 1
        if begins or self._skipped >= self._every or time.monotonic() - self._shown_at >= _ROW_SECONDS:
            self._flush()

    def note(self, text):
        self._flush()
        self._print(text)

    def close(self):
        self._flush()

    def _flush(self):
        if self._skipped:
            assert self._last is not None
            if (line := titles(self._filled)) != self._titles:
                self._print(line)
                self._titles = line
            self._print(format_row(self._last, self._filled))
            self._skipped = 0
            self._shown_at = time.monotonic()

    def _print(self, text):
        print(text, file=self._stream, flush=True)


class _Bar:
    """A terminal."""

    def __init__(self, console: Console, total: int, done: int):
        self._bar = Bar(
            BarColumn(bar_width=_BAR_WIDTH),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[row]}", markup=False),
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", total=total, completed=done, row="")
        self._count_width = 2 * len(str(total)) + 1
        self._last: Mapping[str, Any] | None = None
        self._drawn_at = 0.0
        self._filled: set[str] = {"update"}
        self._titles = ""
        self._bar.start()

    def update(self, row):
        if self._last is not None and _level(row) != _level(self._last):
            self._end_level()
        self._last = row
        self._filled |= filled(row)
        now = time.monotonic()
        # On a narrow screen the row is cut; rich would drop the bar. The rest is "400/400 0:00:00" and spaces.
        room = max(0, self._bar.console.width - _BAR_WIDTH - self._count_width - 11)
        self._bar.update(self._task, completed=row.get("update"), row=_short_row(row, self._filled)[:room])
        if now - self._drawn_at >= _REDRAW_SECONDS:
            self._bar.refresh()
            self._drawn_at = now

    def note(self, text):
        self._bar.console.print(text, markup=False)

    def close(self):
        if self._last is not None:
            self._end_level()
        self._bar.refresh()
        self._bar.stop()

    def _end_level(self):
        assert self._last is not None
        text = format_row(self._last, self._filled)
        if (line := titles(self._filled)) != self._titles:
            text, self._titles = f"{line}\n{text}", line
        self._bar.console.print(text, markup=False, no_wrap=True, overflow="ellipsis", crop=True)


class _CurrentStderr(logging.StreamHandler):
    """Writes to what is the standard error at that moment: a bar redirects it while it is on the screen."""

    def __init__(self):
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:
        return sys.stderr


def setup_logging(comm: Communicator) -> None:
    """Send the library's messages to the standard error: from INFO on rank 0, errors with their rank elsewhere.

    What is only worth a warning is met by every rank alike, so one of them says it. For programs, once, at their start;
    a second call replaces the first. Ranks that are threads share one setting.
    """
    handler = _CurrentStderr()
    rank = "" if comm.rank == 0 else f"rank {comm.rank}: "
    handler.setFormatter(logging.Formatter(f"{rank}%(levelname)s %(name)s: %(message)s"))
    handler.setLevel(logging.INFO if comm.rank == 0 else logging.ERROR)
    logger = logging.getLogger("xbraid_py")
    for old in [old for old in logger.handlers if isinstance(old, _CurrentStderr)]:
        logger.removeHandler(old)
    logger.addHandler(handler)
    logger.setLevel(handler.level)


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
    ValueError, OSError
        On every rank if TensorBoard is not installed; on rank 0 if the files cannot be written.
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
    """What adds a row of a run to event files in its open folder, if that is wanted, or does nothing.

    Sends no message; what fails is said by the next `RunFolder.update`. For the other arguments, and what is raised,
    see `EventWriter`.
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
    """Write a whole record, a `metrics.jsonl` or rows like its own, as event files; the number of rows written.

    Raises
    ------
    ValueError
        If TensorBoard is not installed, or the file is no record.
    OSError
        If the record cannot be read or the files cannot be written.
    """
    require_tensorboard()
    if isinstance(record, str | os.PathLike):
        record = read(record)
    header = next((row for row in record if row.get("kind") == "header"), {})
    rows = [row for row in record if row.get("kind") not in ("header", "resume")]
    with EventWriter(folder, configuration=header.get("configuration"), resumed_at=0) as events:
        for row in rows:
            events.write(row)
    return len(rows)
