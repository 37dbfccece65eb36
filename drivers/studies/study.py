"""Studies: many runs with other settings each, every one made once, on all cores, and kept when it is over.

A study has a folder with one file, `runs.jsonl`: a line for every run that is over. What is there is not made again,
so a study that was killed goes on where it was. At its end a page with the tables is written beside it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TextIO

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.run import signals
from xbraid_py.run.folder import take
from xbraid_py.run.memory import give_back
from xbraid_py.run.options import to_dict
from xbraid_py.run.record import replacing
from xbraid_py.run.run_options import RunOptions

logger = logging.getLogger(__name__)

RUNS, PAGE, PLAN = "runs.jsonl", "study.md", "study.json"
LEFT = "stopped; the runs that are over are kept, start again to go on"
_LOOK = 0.5  # seconds between two looks for a signal
Settings = Mapping[str, Any]
Result = dict[str, Any]
# The settings of the runs of each part of a study; and from the rows of the stages before, by `key`, those of the next.
Parts = Mapping[str, Sequence[Settings]]
Stage = Callable[[Mapping[str, Result]], Parts]


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What every study is told.

    Parameters
    ----------
    out
        Folder of the results, the tables and the pictures.
    workers
        Runs at the same time; one core each.
    seeds
        Of samples and initial weights, from 0 on.
    """

    out: Path = Path("runs/study")
    workers: int = 2
    seeds: int = 3

    def __post_init__(self):
        for name in ("workers", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use 2")
            if getattr(self, name) > 1000:
                raise ValueError(f"{name}={getattr(self, name)} must be at most 1000; use 2")


@dataclass(frozen=True)
class Study:
    """The runs of a study.

    Parameters
    ----------
    folder : Path
        Of `runs.jsonl`; made if there is none.
    work : callable
        `work(settings)` makes one run and returns its result, JSON-able. It must be a function of a module, since other
        processes call it, and may raise `RunError`: then the run counts as failed, with the message as its result.
    workers : int
        Processes that make runs at the same time, each with one thread.
    """

    folder: Path
    work: Callable[[Settings], Result]
    workers: int = 1

    def __post_init__(self):
        if self.workers < 1:
            raise ValueError(f"workers={self.workers} must be at least 1; use 2")

    def finished(self) -> dict[str, Result]:
        """Results of the runs that are over, by `key` of their settings.

        Raises
        ------
        ValueError
            If a line but the last one is no result. A last line that breaks off is left out: the run is made again.
        """
        path = self.folder / RUNS
        if not path.exists():
            return {}
        *lines, rest = path.read_bytes().decode(errors="replace").split("\n")
        if rest:
            logger.warning("%s: the last line breaks off; that run is made again", path)
        found = {}
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                found[key(row["settings"])] = row
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: found {line[:60]!r}, which is no run; remove it") from error
        return found

    def run(self, settings: Sequence[Settings]) -> Iterator[Result]:
        """Make all runs that are not yet over; yields each when it is: "settings" and "result" or "failure".

        Those that were over before come first.

        Raises
        ------
        ValueError
            If settings occur twice, or another process makes runs in this folder.
        RunError
            If a process has died (of lack of memory, say); what is over is kept.
        Stopped
            If a signal has asked for the end: the runs under way are left.
        """
        keys = [key(each) for each in settings]
        if len(set(keys)) < len(keys):
            raise ValueError("settings holds the same settings twice; every run is made once")
        self.folder.mkdir(parents=True, exist_ok=True)
        lock = take(self.folder)
        try:
            over = self.finished()
            self._cut()
            with replacing(self.folder / PLAN) as temporary:  # for who looks at it: the stages so far and this one
                temporary.write_text(json.dumps({"runs": len({*over, *keys})}))
            yield from (over[each] for each in keys if each in over)
            yield from self._make([each for each, name in zip(settings, keys, strict=True) if name not in over])
        finally:
            lock.release()

    def _cut(self) -> None:
        """Remove a last line that breaks off."""
        path = self.folder / RUNS
        if path.exists() and not (raw := path.read_bytes()).endswith(b"\n"):
            with path.open("r+b") as file:
                file.truncate(raw.rfind(b"\n") + 1)

    def _make(self, settings: Iterable[Settings]) -> Iterator[Result]:
        # Fresh processes: what this one has loaded and opened stays here.
        pool = ProcessPoolExecutor(self.workers, get_context("spawn"), _start_worker)
        try:
            waiting = {pool.submit(_attempt, self.work, dict(each)) for each in settings}
            with (self.folder / RUNS).open("a", encoding="utf-8") as file:
                while waiting and not signals.noted():
                    over, waiting = wait(waiting, timeout=_LOOK, return_when=FIRST_COMPLETED)
                    for future in over:
                        row = future.result()
                        _keep(file, row)
                        yield row
        except BrokenProcessPool as error:
            if not signals.noted():  # which may have been sent to all of them
                raise RunError(
                    "a process of the study has died; start again to go on, with fewer workers perhaps"
                ) from error
        finally:
            if signals.noted():
                for process in active_children():
                    process.terminate()
            pool.shutdown(wait=True, cancel_futures=True)
        if signals.noted():
            raise signals.Stopped(LEFT)


@contextmanager
def together(
    folder: Path, work: Callable[[Settings, Communicator], Result], comm: Communicator
) -> Iterator[Callable[[Settings], Result]]:
    """A study whose runs are made on all ranks together, one after the other; collective.

    Parameters
    ----------
    folder : Path
        As of `Study`; rank 0 reads and writes there.
    work : callable
        `work(settings, comm)` makes one run; every rank must return the same.
    comm : Communicator

    Yields
    ------
    callable
        `make(settings)` gives a row as `Study.run` does, of a run that is made now unless it was over before.

    Raises
    ------
    RunError
        On all ranks: another process makes runs in this folder, or its file holds something else.
    """
    lock, found, problem = None, {}, None
    if comm.rank == 0:
        try:
            lock = take(folder)
            study = Study(folder, _attempt)
            found = study.finished()
            study._cut()
        except (ValueError, OSError) as error:
            problem = str(error)
    problem, found = comm.bcast((problem, found))
    if problem is not None:
        raise RunError(problem)
    over = dict(found)  # each rank its own: ranks that are threads are handed the same one

    def make(settings: Settings) -> Result:
        name = key(settings)
        if name not in over:
            over[name] = _attempt(lambda each: work(each, comm), dict(settings))
            if comm.rank == 0:
                with (folder / RUNS).open("a", encoding="utf-8") as file:
                    _keep(file, over[name])
        return over[name]

    try:
        yield make
    finally:
        if lock is not None:
            lock.release()


def until_told(rows: Iterable[Result], comm: Communicator) -> Iterator[Result]:
    """The rows of a run, as long as no rank was sent a signal that asks for the end (`Stopped`); collective.

    A run that is left is made again from its start: a study keeps those that are over.
    """
    for row in rows:
        yield row
        if signals.stop_agreed(comm):
            raise signals.Stopped(LEFT)


def key(settings: Settings) -> str:
    """What tells runs apart: the settings as JSON, their names sorted."""
    return json.dumps(settings, sort_keys=True)


def settings_of(options: RunOptions) -> Settings:
    """The settings of a run from the options of its recipe, without folders, checkpoints and ranks.

    `from_dict` makes the options of them again.
    """
    without = {each.name for each in fields(RunOptions)} | {"plan", "replicas"}
    return {name: value for name, value in to_dict(options).items() if name not in without}


def of_seeds(cases: Iterable[RunOptions], seeds: Iterable[int], **more: Any) -> list[Settings]:
    """Every case with every seed: of each seed in turn, so that a part of the study is one of fewer seeds.

    Parameters
    ----------
    cases : iterable of RunOptions
        With a field "seed".
    seeds : iterable of int
    **more
        Further settings of all these runs.
    """
    cases = list(cases)
    return once({**more, **settings_of(replace(case, seed=seed))} for seed in seeds for case in cases)


def once(settings: Iterable[Settings]) -> list[Settings]:
    """The settings without those that are there already."""
    return list({key(each): each for each in settings}.values())


def run_study(
    study: Study,
    stages: Mapping[str, Stage],
    write: Callable[[dict[str, list[Result]], Path], str | None],
    comm: Communicator,
    said: Callable[[Settings], str] = str,
) -> Callable[[], None]:
    """Check that there is one rank; returns the study: its runs with a progress bar, and then its page.

    Parameters
    ----------
    study : Study
    stages : mapping of str to callable
        By what the progress bar says, one after the other: each gives the settings of the runs of its parts, which may
        have runs in common.
    write : callable
        `write(parts, out)` writes the page from the rows of each part; what it returns is printed.
    comm : Communicator
    said : callable
        How a run that fails is called on the screen.

    Raises
    ------
    ValueError
        On more than one rank.
    """
    if comm.size > 1:
        raise ValueError(f"{comm.size} ranks: the study has workers of its own; start it without mpirun")

    def run() -> None:
        from rich.console import Console
        from rich.progress import track

        console, rows, parts = Console(stderr=True), {}, {}
        for title, stage in stages.items():
            made = stage(rows)
            settings = once(each for part in made.values() for each in part)
            if not settings:
                continue
            over = len(study.finished().keys() & {key(each) for each in settings})
            print(f"{len(settings)} {title}, {over} of them over, by {study.workers} worker(s)", flush=True)
            bar = track(study.run(settings), title, len(settings), console=console, disable=not console.is_terminal)
            for row in bar:
                rows[key(row["settings"])] = row
                if "failure" in row:
                    console.print(f"{said(row['settings'])}: {row['failure']}")
            parts |= {part: [rows[key(each)] for each in of_part] for part, of_part in made.items()}
        text = write(parts, study.folder)
        if text:
            print(text)
        print(f"{len(rows)} runs in {study.folder / RUNS}; tables in {study.folder / PAGE}", flush=True)

    return run


def _keep(file: TextIO, row: Result) -> None:
    """Append a row to the file of runs, durably."""
    file.write(json.dumps(row) + "\n")
    file.flush()
    os.fsync(file.fileno())


def _start_worker() -> None:
    import torch  # the processes of a study are as many as there are cores

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C goes to all of them: these end at once, and say nothing


def _attempt(work: Callable[[Settings], Result], settings: Settings) -> Result:
    try:
        return {"settings": settings, "result": work(settings)}
    except RunError as error:
        return {"settings": settings, "failure": str(error)}
    finally:
        give_back()  # the next run is of another size
