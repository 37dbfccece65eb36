"""What the cases of faults share: chance and counts, and a run that goes on from job to job until it is finished."""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from disturbed import Job, Lost, Wrong, check_finished, last_start, last_update, status
from subjects import Subject

from xbraid_py.run.store.read import newest_good, numbered


@dataclass
class Bench:
    """What is disturbed, where the cases write, their chance, what they count, and the undisturbed run's updates."""

    subject: Subject
    folder: Path
    random: random.Random
    counts: Counter
    expected: list[dict] = field(default_factory=list)
    hits: Iterator[tuple[int, int]] | None = None
    seconds: float = 1.0

    def say(self, text: str) -> None:
        """A line of the report."""
        print(text, flush=True)

    def next_hit(self) -> tuple[int, int]:
        """A number of ranks and one of them."""
        if self.hits is None:
            self.hits = self._hits()
        return next(self.hits)

    def _hits(self) -> Iterator[tuple[int, int]]:
        while True:
            yield from self.random.sample(self.subject.hits, len(self.subject.hits))

    def out(self, name: str) -> Path:
        """The folder of a run."""
        return self.folder / name / self.subject.folder

    def pause(self, share: float = 0.5) -> None:
        """Sleep for a random part of the time that the undisturbed run takes for its updates."""
        time.sleep(self.random.uniform(0.0, share * self.seconds))


class Chain:
    """A run in one folder, job after job, until it is finished; checks after every job what it has lost."""

    def __init__(self, bench: Bench, name: str, intervals: int = 1):
        self.bench, self.out, self.allowed = bench, bench.out(name), intervals * bench.subject.every
        self.reached = 0  # the last update that any job has recorded
        self.begin: dict | None = None  # what the record says of the last job that was looked at

    def job(self, ranks: int, **others) -> Job:
        """The next job, which goes on where the last one was."""
        return Job(self.bench.subject, self.out, ranks, **others)

    def check(self) -> None:
        """`Lost` if the last job has begun further back than one checkpoint interval behind the best one before it."""
        begin, first = last_start(self.out)
        if begin != self.begin and first is not None:
            self.begin = begin
            again = self.reached - max(0, first - 1)
            if again > self.allowed:
                raise Lost(f"{self.out}: {again} updates made again, at most {self.allowed} are to be lost")
        self.reached = max(self.reached, last_update(self.out))

    def finish(self, ranks: int = 2, **others) -> None:
        """The last job, undisturbed; what the run comes to has to be right."""
        with self.job(ranks, **others) as job:
            code = job.end(240.0)
        self.check()
        check_finished(job, code, self.bench.expected)
        check_accepted(self.out)

    def stop(self, ranks: int, **others) -> bool:
        """A job that is stopped in order by SIGUSR1; whether it was stopped before its end."""
        with self.job(ranks, **others) as job:
            found = job.await_training()
            if found:
                self.bench.pause(0.15)
                send(found[self.bench.random.randrange(ranks)], signal.SIGUSR1)
            code = job.end()
        self.check()
        return check_stopped(job, code, self.bench.expected)


def check_accepted(out: Path) -> None:
    """`Wrong` unless the newest checkpoint that is accepted is that of the last update."""
    path = newest_good(out / "checkpoints")
    if path is None or numbered(out / "checkpoints")[0] != (last_update(out), path):
        raise Wrong(f"{out}: the newest good checkpoint is {path}, the last update {last_update(out)}")


def check_stopped(job: Job, code: int, expected: list[dict]) -> bool:
    """`Wrong` unless a job was stopped in order behind a checkpoint of its last update, or else has finished."""
    if code == 0:
        check_finished(job, code, expected)
        return False
    if code != 75 or "--resume auto goes on from" not in job.stderr or status(job.out)["state"] != "stopped":
        raise Wrong(f"{job.out}: asked to stop, status {code} instead of 75\n{job.stderr}")
    check_accepted(job.out)
    return True


def send(number: int, what: int) -> bool:
    """Send a signal, if the process is still there."""
    try:
        os.kill(number, what)
    except ProcessLookupError:
        return False
    return True
