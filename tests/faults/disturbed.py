"""A job that is disturbed while it runs: its processes, its record, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

from processes import PROJECT, job_environment
from subjects import Subject

from xbraid_py.run.record import read
from xbraid_py.run.store.read import numbered

PATIENCE = 20.0  # seconds within which a job ends after a fault
START = 90.0  # seconds within which a job begins to train, on a busy machine
_RANK = re.compile(rb"(?:^|\0)(?:PMI_RANK|OMPI_COMM_WORLD_RANK)=(\d+)\0")


class Hang(Exception):
    """A job that has not ended, or not begun, in time."""


class Wrong(Exception):
    """A job that ends otherwise than it should, or a result that is not the undisturbed run's."""


class Lost(Exception):
    """More work is lost than there is between two checkpoints."""


@dataclass(frozen=True)
class Other:
    """In what some ranks of a job are different from the first.

    Parameters
    ----------
    words : tuple of str
        Options that are given to them alone.
    before : tuple of str
        What stands before their python.
    said : str
        What the job says of it.
    """

    words: tuple[str, ...] = ()
    before: tuple[str, ...] = ()
    said: str = ""


def mpirun() -> str:
    """The launcher beside this Python, else the one on the path."""
    beside = Path(sys.executable).parent / "mpirun"
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise SystemExit("error: no mpirun beside this Python nor on the path; install the extra mpi")
    return found


class Job:
    """A driver on a folder, started at once; a context manager that leaves no process behind.

    Parameters
    ----------
    subject : Subject
    out : Path
        Folder of the run; what is printed goes into OUT.stdout and OUT.stderr beside it.
    ranks : int
    words : sequence of str
        More options.
    wrapper : sequence of str
        Words before the driver, of a script that runs it.
    other : Other, optional
        In what the ranks but the first are different.
    """

    def __init__(
        self,
        subject: Subject,
        out: Path,
        ranks: int,
        words: Sequence[str] = ("--resume=auto",),
        wrapper: Sequence[str] = (),
        other: Other | None = None,
    ):
        self.out, self.ranks = out, ranks
        self.seen: dict[int, int] = {}
        out.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *map(str, wrapper), str(subject.driver), *subject.words, f"--out={out}", *words]
        if other is not None:
            rest = ["-n", str(ranks - 1), *other.before, *command, *other.words]
            command = [mpirun(), "-n", "1", *command, ":", *rest]
        elif ranks > 1:
            command = [mpirun(), "-n", str(ranks), *command]
        self._err = out.with_name(f"{out.name}.stderr")
        with open(out.with_name(f"{out.name}.stdout"), "wb") as stdout, open(self._err, "wb") as stderr:
            self.process = subprocess.Popen(
                command,
                env=job_environment(),
                cwd=PROJECT,
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *exception) -> None:
        self.look()
        for number in self.seen:
            if self._lives(number):
                os.kill(number, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def stderr(self) -> str:
        """What the job has printed to the standard error so far."""
        return self._err.read_text(errors="replace")

    def look(self) -> dict[int, int]:
        """Process numbers of the ranks that are there, by rank; all processes of the job are kept in mind."""
        children = _children()
        found, waiting = {}, [self.process.pid]
        while waiting:
            number = waiting.pop()
            waiting += children.get(number, [])
            began = _began(number)
            if began is None:
                continue
            self.seen[number] = began
            rank = _rank_of(number) if self.ranks > 1 else 0
            if rank is not None:
                found[rank] = number
        return found

    def _lives(self, number: int) -> bool:
        return _began(number) == self.seen[number]

    def await_ranks(self) -> dict[int, int]:
        """Process numbers of all ranks by rank, once the launcher has started them."""
        return self._await(lambda: len(found := self.look()) == self.ranks and found)

    def await_training(self) -> dict[int, int] | None:
        """As `await_ranks`, once updates are made; None if the job has ended before."""

        def trains():
            if self.process.poll() is not None:
                return True
            ranks = self.look()
            said = status(self.out)
            return len(ranks) == self.ranks and said.get("state") == "running" and said.get("pid") == ranks[0]

        self._await(trains)
        ranks = self.look()
        return ranks if self.process.poll() is None and len(ranks) == self.ranks else None

    def _await(self, what: Callable):
        end = time.monotonic() + START
        while True:
            if found := what():
                return found
            if time.monotonic() > end:
                raise Hang(f"{self.out}: still not begun after {START:g} s\n{self.stderr}")
            time.sleep(0.01)

    def end(self, patience: float = PATIENCE) -> int:
        """Exit status, once no process of the job is left; `Hang` if that takes too long."""
        self.look()
        limit = time.monotonic() + patience
        while self.process.poll() is None or any(map(self._lives, self.seen)):
            if time.monotonic() > limit:
                raise Hang(f"{self.out}: has not ended after {patience:g} s\n{self.stderr}")
            time.sleep(0.01)
        return self.process.returncode


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and (fields := _stat(int(name))):
            found.setdefault(int(fields[1]), []).append(int(name))
    return found


def _stat(number: int) -> list[str] | None:
    """State, parent and so on of a process; None if there is none, or only its exit status is left."""
    try:
        text = Path(f"/proc/{number}/stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields


def _began(number: int) -> int | None:
    """When a process began, which tells it from a later one of the same number."""
    fields = _stat(number)
    return int(fields[19]) if fields else None


def _rank_of(number: int) -> int | None:
    try:
        found = _RANK.search(Path(f"/proc/{number}/environ").read_bytes())
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    return int(found[1]) if found else None


def status(out: Path) -> dict:
    """`status.json`; empty if there is none."""
    try:
        return json.loads((out / "status.json").read_bytes())
    except FileNotFoundError:
        return {}


def rows(out: Path) -> list[dict]:
    """What the record holds; nothing if there is none."""
    path = out / "metrics.jsonl"
    return read(path) if path.exists() else []


def updates(out: Path) -> list[dict]:
    """The updates in the record, without the clock."""
    return [{key: row[key] for key in row if "seconds" not in key} for row in rows(out) if row["kind"] == "update"]


def last_update(out: Path) -> int:
    """Number of the last update in the record; 0 if there is none."""
    return max((row["update"] for row in updates(out)), default=0)


def last_start(out: Path) -> tuple[dict | None, int | None]:
    """What the record says of the last (re)start, and the number of the first update after it, if there are any."""
    found = rows(out)
    begin = max((at for at, row in enumerate(found) if row["kind"] in ("header", "resume")), default=None)
    if begin is None:
        return None, None
    return found[begin], found[begin + 1]["update"] if begin + 1 < len(found) else None


def newest(out: Path) -> Path:
    """The checkpoint of the highest number, good or not."""
    return numbered(out / "checkpoints")[0][1]


def check_finished(job: Job, code: int, expected: list[dict]) -> None:
    """`Wrong` unless a job has ended as it should, with the results of the undisturbed run, bit by bit."""
    if code != 0:
        raise Wrong(f"{job.out}: status {code} instead of 0\n{job.stderr}")
    found = updates(job.out)
    if found != expected:
        place = next((n for n, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), len(found))
        raise Wrong(f"{job.out}: the record differs from the undisturbed one from row {place} on, of {len(expected)}")
    if status(job.out)["state"] != "finished":
        raise Wrong(f"{job.out}: the status is {status(job.out)['state']}, not finished")
    if rest := list((job.out / "checkpoints").glob("*.tmp")):
        raise Wrong(f"{job.out}: {rest[0].name} is left")
    seconds = [row["seconds"] for row in rows(job.out) if row["kind"] == "update"]
    if min(seconds) < 0:
        raise Wrong(f"{job.out}: the record has {min(seconds)} seconds")
