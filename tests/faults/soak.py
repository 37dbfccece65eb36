"""A day of work in an hour: jobs of four drivers that are killed, stopped, paused, or run into a full disk.

    python tests/faults/soak.py [--minutes 60] [--every 30] [--seed 0] [--keep FOLDER]

Every half minute on average something happens to the job that runs; the next one goes on by `--resume auto`, mostly on
another number of ranks. Every run has to end as the undisturbed one, bit by bit, and at the end nothing may be left: no
process, no memory that ranks shared, no temporary file, no lock. The last line is one JSON object: what was done, and
what went wrong (`hangs`, `wrong`, `lost`, `left`). The status is 0 if nothing did.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from cases import mount, undisturbed, unmount
from chain import Bench, Chain, check_stopped, send
from disturbed import Hang, Lost, Wrong, check_finished
from subjects import Subject, soaked

from xbraid_py.run.folder import take

SHARED = Path("/dev/shm")
FAULTS = ("kill", "launcher", "terminate", "pause", "disk")
FAILURES = ("hangs", "wrong", "lost", "left")
_ROOM = 2**20  # kilobytes of a disk that is not full


class Soak:
    """The work, and what is done to it.

    Parameters
    ----------
    folder : Path
    seed : int
    every : float
        Mean seconds between two faults.
    """

    def __init__(self, folder: Path, seed: int, every: float):
        self.folder, self.random, self.every = folder, random.Random(seed), every
        self.counts: Counter = Counter()
        self.benches = [self._bench(subject) for subject in soaked(folder / "data")]
        self.strike_at = 0.0

    def _bench(self, subject: Subject) -> Bench:
        bench = Bench(subject, self.folder / subject.name, self.random, self.counts)
        bench.folder.mkdir()
        undisturbed(bench)
        return bench

    def work(self, minutes: float) -> None:
        """Runs of the drivers in turn until so many minutes are over; those under way are finished."""
        until = time.monotonic() + 60 * minutes
        self._next_strike()
        for number, bench in enumerate(itertools.cycle(self.benches)):
            if time.monotonic() > until:
                return
            chain = Chain(bench, f"soak_{number}", intervals=2)
            chain.out.mkdir(parents=True)
            disk = chain.out if mount(chain.out, _ROOM) else None
            try:
                self._run(chain, disk, until)
            except (Hang, Wrong, Lost) as failure:
                self.counts[{Hang: "hangs", Wrong: "wrong", Lost: "lost"}[type(failure)]] += 1
                bench.say(f"FAILED: {failure}")
            finally:
                if disk is not None:
                    unmount(disk)

    def _run(self, chain: Chain, disk: Path | None, until: float) -> None:
        """One run, from job to job until it is finished."""
        jobs, code = 0, -1
        while code != 0:
            jobs += 1
            ranks, rank = chain.bench.next_hit()
            fault, code = None, None
            with chain.job(ranks) as job:
                while job.process.poll() is None and fault is None:
                    if time.monotonic() > min(self.strike_at, until):
                        fault = self._strike(job, rank, disk) if time.monotonic() < until else "no more"
                    time.sleep(0.02)
                code = job.end(20.0 if fault in ("kill", "launcher", "terminate") else 240.0)
            self.counts["jobs"] += 1
            if fault == "disk":
                mount(disk, _ROOM, again=True)
            chain.check()
            if code == 0:
                check_finished(job, code, chain.bench.expected)
            elif fault == "terminate" and code == 75:
                check_stopped(job, code, chain.bench.expected)
            elif fault is None:
                raise Wrong(f"{chain.out}: status {code} of a job that was left alone\n{job.stderr}")
            elif fault == "disk" and (code != 1 or "Traceback" in job.stderr):
                raise Wrong(f"{chain.out}: a full disk, status {code} instead of 1\n{job.stderr}")
        self.counts["runs"] += 1
        chain.bench.say(f"{chain.out.parent.name}/{chain.out.name}: finished by {jobs} jobs")

    def _strike(self, job, rank: int, disk: Path | None) -> str | None:
        """Do something to a job; None if it is not there any more."""
        self._next_strike()
        ranks = job.look()
        if rank not in ranks:
            return None
        fault = self.random.choice(FAULTS if disk is not None else FAULTS[:-1])
        if fault == "kill":
            done = send(ranks[rank], signal.SIGKILL)
        elif fault == "launcher":
            done = send(job.process.pid, signal.SIGKILL)
        elif fault == "terminate":
            done = send(ranks[rank], signal.SIGTERM)
        elif fault == "pause":  # and nothing else: the job goes on, to meet the next fault
            done = send(ranks[rank], signal.SIGSTOP)
            time.sleep(self.random.uniform(1.0, 8.0))
            send(ranks[rank], signal.SIGCONT)
        else:
            state = os.statvfs(disk)
            used = (state.f_blocks - state.f_bfree) * state.f_frsize // 1024
            done = mount(disk, used + self.random.randrange(4, 64), again=True)
        self.counts[fault] += done
        return fault if done and fault != "pause" else None

    def _next_strike(self) -> None:
        self.strike_at = time.monotonic() + self.random.expovariate(1.0 / self.every)

    def left(self, before: set[Path], scratch: Path) -> Iterator[str]:
        """What is left of all these jobs, once a last one has run."""
        for bench in self.benches:
            chain = Chain(bench, "last")
            chain.finish()
        # Other jobs on this machine have memory of their own; a folder of torch is for all that come later.
        yield from (f"{path}: shared memory" for path in set(SHARED.glob("*")) - before if not _is_mapped(path))
        yield from (f"{path}: temporary" for path in scratch.iterdir() if not path.name.startswith("torchinductor"))
        yield from (f"{path}: temporary" for path in self.folder.rglob("*.tmp*"))
        for number in filter(str.isdigit, os.listdir("/proc")):
            try:
                words = Path(f"/proc/{number}/cmdline").read_bytes()
            except OSError:
                continue
            if os.fsencode(self.folder) in words and int(number) != os.getpid():
                yield f"process {number}: {words.replace(bytes(1), b' ')[:100]!r}"
        for path in self.folder.rglob("lock"):
            try:
                take(path.parent).release()
            except ValueError as held:
                yield str(held)


def _is_mapped(path: Path) -> bool:
    """Whether a process that lives has a file in its memory."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if str(path) in maps.read_text():
                return True
        except OSError:
            continue
    return False


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--every", type=float, default=30.0, help="mean seconds between two faults")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="folder to work in, which stays")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as scratch:
        os.environ["TMPDIR"] = scratch  # of the jobs
        place = (given.keep or Path(folder)).resolve()
        place.mkdir(parents=True, exist_ok=True)
        before = set(SHARED.glob("*"))
        soak = Soak(place, given.seed, given.every)
        soak.work(given.minutes)
        for text in soak.left(before, Path(scratch)):
            soak.counts["left"] += 1
            print(f"LEFT: {text}", flush=True)
    names = (*FAULTS, "jobs", "runs", *FAILURES)
    print(json.dumps({"minutes": given.minutes} | {name: soak.counts[name] for name in names}), flush=True)
    return 1 if any(soak.counts[name] for name in FAILURES) else 0


if __name__ == "__main__":
    sys.exit(main())
