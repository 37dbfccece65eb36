"""Runs and jobs below a folder, whoever runs them: what there is, and how they are started, stopped and continued."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xbraid_py.cli.queue import ENDED, QUEUE, RUNNING, STOPPING, WAITING, Job, Queue, environment
from xbraid_py.cli.reader import CONFIGURATION, RECORD, STATUS, NoRun, Run, quoted, read_run
from xbraid_py.cli.status import Summary, summarize
from xbraid_py.run import programs
from xbraid_py.run.documents import load_json, read_regular
from xbraid_py.run.options import flat, text

_MOST_FOLDERS = 20_000
_SHORT = 200_000  # bytes of a record that a list takes: its first line and its end
_NOT_ENTERED = re.compile(r"\..*|earlier-\d+|checkpoints|figures|tensorboard")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A run, a job, or both.

    Attributes
    ----------
    path : Path
        Folder of the run, which a job that waits has not made yet.
    name : str
        The same, from the folder that was looked at.
    job : Job or None
    run : Run or None
    summary : Summary or None
        Of the run.
    """

    path: Path
    name: str
    job: Job | None = None
    run: Run | None = None
    summary: Summary | None = None

    @property
    def state(self) -> str:
        """That of the job and of the run in one word; see `Job` and `Summary`."""
        said = self.summary.state if self.summary else None
        if self.job is None:
            return said or "starting"
        if self.job.state == RUNNING:
            if not self._has_spoken_since(self.job.submitted):
                return "starting"
            return said if said in ("starting", "stale") else "running"  # one that is over is about to end
        if self.job.is_over and said in ("starting", "running") and self._has_spoken_since(self.job.ended):
            return said  # somebody goes on with it by hand
        return self.job.state

    def _has_spoken_since(self, moment: float | None) -> bool:
        sign = self.run.status_time if self.run else None
        return sign is not None and sign >= (moment or 0.0)

    @property
    def message(self) -> str:
        """What is to be said of it."""
        return (self.job.message if self.job else "") or (self.summary.message if self.summary else "")


def entries(folder: str | os.PathLike) -> list[Entry]:
    """All runs below a folder and all jobs of its queue: jobs by their numbers, then runs by their names."""
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"folder={root} is no folder; give one that holds runs, such as runs")
    queue = Queue(root)
    jobs = {job.out: job for job in looked_up(queue)}
    found = [_entry(root, Path(job.out), job) for job in jobs.values()]
    known = {os.path.realpath(each) for each in jobs}
    found += [_entry(root, path, None) for path in runs_below(root) if os.path.realpath(path) not in known]
    return found


def runs_below(folder: Path) -> Iterator[Path]:
    """Folders that hold a run, sorted by name; what is in a run, hidden or a link is not looked at."""
    for count, (path, inner, files) in enumerate(os.walk(folder)):
        if count > _MOST_FOLDERS:
            raise ValueError(f"folder={folder} holds more than {_MOST_FOLDERS:,} folders; give one that holds runs")
        is_run = STATUS in files or RECORD in files
        inner[:] = sorted(name for name in inner if not _NOT_ENTERED.fullmatch(name))
        if is_run:
            yield Path(path)


def _entry(root: Path, path: Path, job: Job | None) -> Entry:
    run = _read(path, *(_stamp(path / name) for name in (STATUS, RECORD, CONFIGURATION)))
    summary = summarize(run) if run else None
    name = os.path.relpath(path, root)
    return Entry(path=path, name=str(path) if name.startswith("..") else name, job=job, run=run, summary=summary)


@functools.lru_cache(2000)
def _read(path: Path, *stamps: tuple[int, int] | None) -> Run | None:
    """A run as its files are at these moments: who lists runs every second reads those that have changed."""
    with contextlib.suppress(NoRun):
        return read_run(path, _SHORT)
    return None


def _stamp(path: Path) -> tuple[int, int] | None:
    with contextlib.suppress(OSError):
        found = path.stat()
        return found.st_mtime_ns, found.st_size
    return None


def looked_up(queue: Queue) -> list[Job]:
    """All jobs; SLURM is asked for those that it has, and a runner is started if jobs wait for one."""
    queue.wake()
    return [_ask_slurm(queue, job) if job.on == "slurm" and not job.is_over else job for job in queue.jobs()]


def start(queue: Queue, job: dict[str, Any], at_once: int | None = None) -> Job:
    """Add a job and have it run; for its fields see `Job`."""
    added = queue.add(job | {"environment": environment()}, at_once)
    return _hand_on(queue, added)


def _hand_on(queue: Queue, job: Job) -> Job:
    if job.on == "here":
        queue.wake()
        return job
    try:
        number = _sbatch(queue, job)
    except (OSError, ValueError) as error:
        with queue.locked():
            queue.change(job, state="failed", ended=time.time(), message=f"not submitted: {error}")
        raise
    with queue.locked():
        return queue.change(job, slurm=number)


def stop(queue: Queue, target: int | Path, now: bool = False) -> str:
    """Ask a job, or a run of this machine in no queue, for a checkpoint and its end; what is to be said of it."""
    job = job_of(queue, target)
    if isinstance(target, Path) and (job is None or job.is_over):
        return _stop_run(target, now)
    assert job is not None
    if job.is_over:
        return f"job {job.number} is {job.state} already"
    if job.on == "slurm" and job.slurm:
        _slurm("scontrol", "update", f"JobId={job.slurm}", "Requeue=0")
        pending = _slurm_state(job.slurm) == "PENDING"
        _slurm("scancel", *([] if now or pending else ["--batch", "--signal=USR1"]), job.slurm)
    job = queue.stop(job.number, now)
    queue.wake()
    if job.is_over:
        return f"job {job.number} is taken out of the queue"
    return f"job {job.number} is {'ended' if now else 'asked for a checkpoint and its end'}"


def _stop_run(path: Path, now: bool) -> str:
    run = read_run(path, _SHORT)
    pid = _holder(run.path)
    if pid is None:
        state = summarize(run).state
        if state in ENDED:
            return f"{run.path} is {state} already"
        raise ValueError(f"{run.path} is run by no process of this machine that can be seen; stop it where it runs")
    for _ in range(2 if now else 1):
        os.kill(pid, signal.SIGTERM if now else signal.SIGUSR1)  # one rank tells the others
        time.sleep(0.5 if now else 0.0)
    return f"{run.path} is {'ended' if now else 'asked for a checkpoint and its end'}"


def _holder(path: Path) -> int | None:
    """The process of this machine that has a run's lock: the number in the file, if it holds the file open."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        pid, lock = int(load_json(read_regular(path / "lock", follow=False))["pid"]), os.stat(path / "lock")
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                if os.path.samestat(os.stat(each), lock):
                    return pid
    return None


def resume(
    queue: Queue, target: int | Path, ranks: int | None = None, on: str | None = None, driver: Path | None = None
) -> Job:
    """Have a job, or a run that was in no queue, go on from its newest checkpoint, on so many ranks as before or given.

    Raises `ValueError` if it is not over.
    """
    job = job_of(queue, target)
    if job is None:
        assert isinstance(target, Path)
        return _queue_run(queue, target, ranks, on or "here", driver)
    if (Path(job.out) / CONFIGURATION).exists():
        run = read_run(job.out, _SHORT)
        refuse_finished(run)
        program = [job.program[0], *configured(run), *_replicas(run, ranks or job.ranks)]
    else:
        program = job.program  # it has not come so far as to write down its options
    job = queue.again(
        job.number,
        program=program,
        ranks=job.ranks if ranks is None else ranks,
        on=on or job.on,
        environment=environment(),
        slurm="",
    )
    return _hand_on(queue, job)


def _queue_run(queue: Queue, path: Path, ranks: int | None, on: str, driver: Path | None) -> Job:
    run = read_run(path, _SHORT)
    refuse_finished(run)
    summary = summarize(run)
    if summary.state in (RUNNING, "starting"):
        raise ValueError(f"{run.path} is {summary.state}; stop it first, or wait for its end")
    ranks = ranks or summary.ranks or 1
    program = [os.path.abspath(driver or find_driver(run)), *configured(run), *_replicas(run, ranks)]
    about = {"program": program, "out": os.path.abspath(run.path), "ranks": ranks}
    return start(queue, about | {"on": on, "folder": os.getcwd()})


def _replicas(run: Run, ranks: int) -> list[str]:
    """What is said of replicas where those of a run do not divide the ranks on which it goes on."""
    before = run.configuration.get("replicas")
    if not isinstance(before, int) or isinstance(before, bool) or before < 1 or ranks % before == 0:
        return []
    return [f"--replicas={math.gcd(before, ranks)}"]


def refuse_finished(run: Run) -> None:
    """Raise a ValueError if a run has come to its end."""
    if run.status.get("state") == "finished":
        raise ValueError(f"{run.path} is finished: there is nothing to continue; submit another run")


def job_of(queue: Queue, target: int | Path) -> Job | None:
    """The job of a number, or that of a folder of a run, if there is one."""
    if isinstance(target, int):
        return queue.job(target)
    own = os.path.realpath(target)
    return next((job for job in reversed(queue.jobs()) if os.path.realpath(job.out) == own), None)


def queue_of(folder: Path | None, target: Path | None = None) -> Queue:
    """The queue that is meant: that of a folder, or of the folders above a run, or else of runs."""
    if folder is None and target is not None:
        above = [parent for parent in Path(os.path.abspath(target)).parents if (parent / QUEUE).is_dir()]
        folder = above[0] if above else None
    return Queue(Path("runs") if folder is None else folder)


def configured(run: Run) -> list[str]:
    """The options of a run as words: its configuration file, or else what its record says; `ValueError` without
    either.
    """
    file = run.path / CONFIGURATION
    if not any(flaw.endswith(CONFIGURATION) or flaw.startswith(CONFIGURATION) for flaw in run.flaws):
        return [f"--config={file}"]
    if not run.configuration:
        raise ValueError(f"{run.path} says nowhere with which options it was started: {'; '.join(run.flaws)}")
    options = {name: value for name, value in flat(run.configuration).items() if name not in ("resume", "out")}
    return [f"--{name}={text(value)}" for name, value in options.items()]


def find_driver(run: Run) -> Path:
    """The program that a run was made by, if it comes with the library.

    Whatever else the record names is not run, since it may be anything and the record from anywhere: `ValueError`.
    """
    named = run.about.get("driver") or run.header.get("driver")
    if not isinstance(named, str) or not named:
        raise ValueError(f"{run.path} does not say which program it was made by; use --driver=drivers/peaks.py")
    own = programs.path_of(programs.name_of(named) if os.sep in named else named)
    if own is None:
        known = ", ".join(programs.names()) or "none here"
        raise ValueError(
            f"{run.path} was made by {named}, which is no program of this library ({known}) and is run only if you "
            f"name it; use --driver={quoted(named)} if you trust it"
        )
    return own


# ---- SLURM

_SCRIPT = Path(__file__).resolve().parents[2] / "jobs" / "driver.sbatch"
_SLURM_STATES = {"PENDING": WAITING, "REQUEUED": WAITING, "COMPLETED": "finished"}
_UNDER_WAY = ("CONFIGURING", "RUNNING", "COMPLETING", "SUSPENDED", "STAGE_OUT", "SIGNALING", "REQUEUE_HOLD")


def require_slurm() -> None:
    """Raise a ValueError if jobs cannot be handed to SLURM from here."""
    if shutil.which("sbatch") is None:
        raise ValueError("on=slurm needs sbatch, and there is none on the PATH; use --on=here")
    if not _SCRIPT.is_file():
        raise ValueError(f"on=slurm needs {_SCRIPT.name}, which is in jobs/ of the checkout; use --on=here")


def _sbatch(queue: Queue, job: Job) -> str:
    require_slurm()
    variables = {"PROJECT": str(_SCRIPT.parents[1]), "DRIVER": job.program[0], "OUT": job.out, "PYTHON": sys.executable}
    words = [f"--ntasks={job.ranks}", f"--job-name={Path(job.program[0]).stem}-{job.number}"]
    # A percent sign begins a pattern of SLURM's.
    words += [f"--output={str(queue.log(job.number)).replace('%', '%%')}"]
    words += [f"--time={max(1, round(job.limit / 60))}"] if job.limit else []
    said = _slurm("sbatch", "--parsable", *words, str(_SCRIPT), *_absolute(job), environment=variables)
    return said.split(";")[0].strip()


def _absolute(job: Job) -> Sequence[str]:
    """Options of a job; a configuration file is named from the root, since SLURM's script goes to the project."""
    return [
        f"--config={os.path.join(job.folder, word.partition('=')[2])}" if word.startswith("--config=") else word
        for word in job.program[1:]
    ]


def _slurm(*words: str, environment: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        words, env=os.environ | (environment or {}), capture_output=True, text=True, timeout=60, check=False
    )
    if done.returncode:
        raise ValueError(f"{words[0]} has failed: {done.stderr.strip() or f'status {done.returncode}'}; see sinfo")
    return done.stdout


def _slurm_state(number: str) -> str | None:
    """What SLURM calls the state of a job; None if it does not know the job any more, "" if it does not answer."""
    words = ["squeue", "--noheader", "--states=all", f"--jobs={number}", "--format=%T"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    if done.returncode:
        return None if "Invalid job id" in done.stderr else ""
    return done.stdout.strip() or None


def _ask_slurm(queue: Queue, job: Job) -> Job:
    said = _slurm_state(job.slurm) if job.slurm else ""
    if said == "" or (said in _UNDER_WAY and job.state in (RUNNING, STOPPING)):
        return job
    changes: dict[str, Any] = {"state": _SLURM_STATES.get(said or "")}
    if said in _UNDER_WAY:
        changes = {"state": RUNNING, "started": time.time()}
    elif changes["state"] is None:
        own = ""
        with contextlib.suppress(OSError, ValueError, AttributeError):
            own = load_json(read_regular(Path(job.out) / STATUS)).get("state")
        state = own if own in ("finished", "stopped") else "stopped" if job.state == STOPPING else "failed"
        changes = {"state": state, "message": "" if state != "failed" else f"SLURM: {said or 'gone'}"}
    if changes["state"] == job.state or (job.state == STOPPING and changes["state"] == WAITING):
        return job
    if changes["state"] in ENDED:
        changes["ended"] = time.time()
    with queue.locked():
        current = queue.job(job.number)
        return current if current.is_over or current.slurm != job.slurm else queue.change(current, **changes)
