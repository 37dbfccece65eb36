"""The queue of a folder: its jobs, a file each, a lock, and a runner that lives as long as there is something to do.

Nobody has to start anything beforehand. Whoever changes the queue has its lock; whoever looks at it starts a runner,
detached, if jobs wait and there is none. Jobs are sessions of their own: a runner that is killed leaves them alone, and
the next one takes them over. A process is known by its number and the time at which it was started, so that after a
restart of the machine no other one is taken for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from xbraid_py.cli.reader import STATUS
from xbraid_py.run.documents import load_json, read_regular
from xbraid_py.run.record import open_own, replacing

QUEUE, OVER = ".queue", "over"
WAITING, RUNNING, STOPPING = "waiting", "running", "stopping"
ENDED = ("finished", "stopped", "failed")
_COME_BACK = 75  # how a driver ends that was asked to, behind a checkpoint
_LOOK, _ASK = 0.5, 5.0  # seconds between two looks at the queue, and two times that a job is asked to stop
# Of the submitter's environment: what a job finds its programs, data and cores by.
_VARIABLES = (
    *("PATH", "HOME", "LANG", "PYTHONPATH", "VIRTUAL_ENV", "LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "TMPDIR"),
    *("XBRAID_", "OMP_", "MKL_", "OPENBLAS_", "OMPI_MCA_", "OMPI_ALLOW_", "PRTE_MCA_", "MPIR_CVAR_", "SRUN_MPI"),
)
# The job keeps the runner's lock until its number is written down, so no second runner can miss it; a job that is only
# starting does not listen, and must not die of being asked.
_SHELL = 'trap "" USR1; echo $$ > "$0" || exit 1; exec "$@" 9>&-'


@dataclass(frozen=True, kw_only=True)
class Job:
    """What the queue knows of a job.

    Attributes
    ----------
    number : int
    program : list of str
        The driver and its options, but for those of the folder and of resuming.
    out : str
        Folder of the run.
    ranks : int
    on : {"here", "slurm"}
    state : str
        "waiting", "running", "stopping" (it has been asked to), "finished", "stopped" or "failed".
    limit : float or None
        Seconds after which it is asked to stop.
    launcher : str or None
        What starts the ranks, if that was said.
    folder : str
        Working folder.
    environment : dict of str to str
    submitted, started, ended : float or None
        In seconds since 1970.
    process : list or None
        Number of the process and when it was started, see `identity`.
    slurm : str
        Number that SLURM has given the job.
    status : int or None
        Exit status, if somebody has seen it.
    message : str
    """

    number: int
    program: list[str]
    out: str
    ranks: int
    on: str = "here"
    state: str = WAITING
    limit: float | None = None
    launcher: str | None = None
    folder: str = "."
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    submitted: float | None = None
    started: float | None = None
    ended: float | None = None
    process: list | None = None
    slurm: str = ""
    status: int | None = None
    message: str = ""

    @property
    def is_over(self) -> bool:
        """Whether nothing more is to be expected of it."""
        return self.state in ENDED


class Queue:
    """The queue of a folder of runs, in the folder `.queue` of it.

    Parameters
    ----------
    folder : path-like
        Made if there is none, when the first job is added.
    """

    def __init__(self, folder: str | os.PathLike):
        self.folder = Path(os.path.abspath(folder))
        self.path = self.folder / QUEUE

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes the queue meanwhile."""
        try:
            (self.path / OVER).mkdir(parents=True, exist_ok=True)
            handle = open_own(self.path / "lock", os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise ValueError(
                f"folder={self.folder} cannot hold a queue: {error.strerror}; give another --folder"
            ) from error
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield
        finally:
            os.close(handle)

    def jobs(self, with_over: bool = True) -> list[Job]:
        """All jobs, or those that are not over; files that hold none are left out."""
        paths = [*self.path.glob("[0-9]*.json"), *(self.path.glob(f"{OVER}/[0-9]*.json") if with_over else ())]
        # A job that ends meanwhile is met twice rather than never; what is under way counts.
        found = {job.number: job for path in reversed(paths) if (job := _read(path))}
        return sorted(found.values(), key=lambda job: job.number)

    def job(self, number: int) -> Job:
        """A job by its number; `ValueError` if there is none."""
        for path in self._places(number):
            if job := _read(path):
                return job
        known = ", ".join(str(job.number) for job in self.jobs()[-5:]) or "none yet"
        raise ValueError(f"JOB={number} is no job of the queue in {self.folder}; the last ones are {known}")

    def log(self, number: int) -> Path:
        """File of what a job prints."""
        return self.path / f"{number}.log"

    def add(self, job: Mapping[str, Any], at_once: int | None = None) -> Job:
        """Append a job, whose number is given here; without an `out` it writes into a folder of its own.

        `at_once` is from now on the largest number of jobs that run at the same time. Raises `ValueError` if another
        job has the folder.
        """
        with self.locked():
            number = 1 + max((int(path.stem) for path in self.path.glob("**/[0-9]*.json")), default=0)
            name = Path(job["program"][0]).stem
            out = job.get("out") or str(self.folder / f"{name}-{number}")
            for other in self.jobs(with_over=False):
                if other.out == out:
                    raise ValueError(
                        f"out={out} belongs to job {other.number}, which is {other.state}; give another --out"
                    )
            new = Job(**{**job, "number": number, "out": out, "submitted": time.time()})
            self._write(new)
            if at_once is not None:
                with replacing(self.path / "settings.json") as temporary:
                    temporary.write_text(json.dumps({"jobs": at_once}))
        return new

    def again(self, number: int, **changes: Any) -> Job:
        """Put a job that is over back into the queue, under its number; `ValueError` if it is not over."""
        with self.locked():
            job = self.job(number)
            if not job.is_over:
                raise ValueError(f"job {number} is {job.state}: it goes on by itself; stop it first, or wait")
            fresh = {"state": WAITING, "started": None, "ended": None, "process": None, "status": None, "message": ""}
            return self.change(job, **fresh | {"submitted": time.time()} | changes)

    def change(self, job: Job, **changes: Any) -> Job:
        """Write a job with some fields changed; for who has the lock."""
        new = replace(job, **changes)
        self._write(new)
        return new

    def at_once(self) -> int:
        """How many jobs may run at the same time."""
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            return max(1, int(load_json(read_regular(self.path / "settings.json"))["jobs"]))
        return 1

    def stop(self, number: int, now: bool = False) -> Job:
        """Ask a job for a checkpoint and its end; one that waits is taken out. With `now` it is ended at once."""
        with self.locked():
            job = self.job(number)
            if job.state == WAITING:
                return self.change(job, state="stopped", ended=time.time(), message="before it began")
            if not job.is_over:
                job = self.change(job, state=STOPPING)
                if job.on == "here":
                    signal_job(job, signal.SIGKILL if now else signal.SIGUSR1)
            return job

    def wake(self) -> None:
        """Start a runner if there is something to do and none is there; where nothing may be written, do nothing."""
        if not any(job.on == "here" for job in self.jobs(with_over=False)) or not os.access(self.path, os.W_OK):
            return
        with self.locked():
            try:
                _take_runner(self.path).close()
            except BlockingIOError:
                return
        with open(open_own(self.path / "runner.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _places(self, number: int) -> tuple[Path, Path]:
        return self.path / f"{number}.json", self.path / OVER / f"{number}.json"

    def _write(self, job: Job) -> None:
        here, there = self._places(job.number)
        was_over = there.exists()
        target = there if job.is_over and was_over else here
        with replacing(target, durable=True) as temporary:
            temporary.chmod(0o600)  # it holds variables of the environment
            temporary.write_text(json.dumps(asdict(job), indent=1), encoding="utf-8")
        if job.is_over and not was_over:
            os.replace(here, there)
        elif not job.is_over:
            there.unlink(missing_ok=True)


def _read(path: Path) -> Job | None:
    known = {each.name for each in fields(Job)}
    with contextlib.suppress(OSError, ValueError, TypeError):
        values = load_json(read_regular(path, follow=False))
        return Job(**{name: value for name, value in values.items() if name in known})
    return None


def environment() -> dict[str, str]:
    """What a job takes of this process's environment."""
    return {name: value for name, value in os.environ.items() if name.startswith(_VARIABLES)}


def identity(pid: int) -> str | None:
    """When a process was started, and since which start of the machine that counts; None if it is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
        state, *rest = text.rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return None if state in "ZX" else f"{boot} {rest[18]}"
    except OSError:
        if Path("/proc/self/stat").exists():
            return None
    words = ["ps", "-o", "stat=,lstart=", "-p", str(pid)]  # systems without /proc
    said = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split(maxsplit=1)
    return said[1].strip() if len(said) == 2 and not said[0].startswith("Z") else None


def is_alive(job: Job) -> bool:
    """Whether the process that was started for a job is still there."""
    return job.process is not None and identity(job.process[0]) == job.process[1]


def signal_job(job: Job, number: signal.Signals) -> None:
    """Send a signal to the process of a job, if that is still the one; one that ends all, to its whole session."""
    if job.process is None or not is_alive(job):
        return
    pid = job.process[0]
    with contextlib.suppress(ProcessLookupError):
        if number == signal.SIGKILL:
            # Ranks may be sessions of their own: their launcher ends them when it is told to, twice.
            for _ in range(2):
                os.kill(pid, signal.SIGTERM)
                time.sleep(0.5)
            os.killpg(pid, signal.SIGKILL)
        else:
            os.kill(pid, number)


def launcher(ranks: int, given: str | None) -> list[str]:
    """The words before the program, which start it on so many ranks; none for one rank unless they are given."""
    if given is not None:
        words = shlex.split(given)
        if not words or shutil.which(words[0]) is None:
            raise ValueError(f"launcher={given} is no command to be found; use --launcher='mpirun -n'")
        return [*words, str(ranks)]
    if ranks == 1:
        return []
    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise ValueError(f"ranks={ranks} needs an mpirun, and there is none; use --launcher='srun -n', or --ranks=1")
    return [mpirun, "-n", str(ranks)]


def command_of(job: Job) -> list[str]:
    """The words that run a job, or go on with its run if there is a checkpoint."""
    goes_on = ["--resume=auto"] if (Path(job.out) / "checkpoints").is_dir() else []
    return [*launcher(job.ranks, job.launcher), sys.executable, *job.program, f"--out={job.out}", *goes_on]


def _take_runner(path: Path):
    """The lock of the runner, as an open file; `BlockingIOError` if there is one."""
    stream = open(open_own(path / "runner.lock", os.O_RDWR | os.O_CREAT), "r+b")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        stream.close()
        raise
    return stream


def run(folder: str | os.PathLike) -> None:
    """Run the jobs of a queue until there are none; at once at an end if another runner is there."""
    queue = Queue(folder)
    try:
        with queue.locked():
            lock = _take_runner(queue.path)
    except BlockingIOError:
        return
    os.dup2(lock.fileno(), 9, inheritable=False)  # the number that a shell can close
    lock.close()
    for number in (signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    children: dict[int, subprocess.Popen] = {}
    asked: dict[int, float] = {}
    while True:
        with queue.locked():
            jobs = [job for job in queue.jobs(with_over=False) if job.on == "here"]
            jobs = [_look_after(queue, job, children, asked) for job in jobs]
            under_way = sum(job.state in (RUNNING, STOPPING) for job in jobs)
            waiting = [job for job in jobs if job.state == WAITING]
            for job in waiting[: max(0, queue.at_once() - under_way)]:
                _start(queue, job, children)
            if all(job.is_over for job in jobs):
                os.close(9)  # before anybody else can look whether there is a runner
                return
        time.sleep(_LOOK)


def _look_after(queue: Queue, job: Job, children: dict[int, subprocess.Popen], asked: dict[int, float]) -> Job:
    """A job under way as it is now: over, asked to stop once more, or unchanged."""
    if job.state not in (RUNNING, STOPPING):
        return job
    child = children.get(job.number)
    if job.process is None:
        # Its runner was killed while it started: the process has left its number, or was never there.
        with contextlib.suppress(OSError, ValueError):
            pid = int(read_regular(queue.path / f"{job.number}.pid"))
            if found := identity(pid):
                job = queue.change(job, process=[pid, found])
    status = child.poll() if child else None
    if status is None and (is_alive(job) or child is not None):
        if job.limit and job.state == RUNNING and time.time() - (job.started or 0) > job.limit:
            job = queue.change(job, state=STOPPING, message="time limit")
            signal_job(job, signal.SIGUSR1)
        # Who has made it "stopping" has asked once; a job that was only starting did not listen.
        if job.state == STOPPING and time.monotonic() - asked.setdefault(job.number, time.monotonic()) > _ASK:
            signal_job(job, signal.SIGUSR1)
            asked[job.number] = time.monotonic()
        return job
    children.pop(job.number, None)
    asked.pop(job.number, None)
    (queue.path / f"{job.number}.pid").unlink(missing_ok=True)
    state, message = _ending(job, status)
    return queue.change(job, state=state, status=status, ended=time.time(), message=message)


def _ending(job: Job, status: int | None) -> tuple[str, str]:
    """How a job has ended whose process is gone."""
    if status == 0:
        return "finished", ""
    if status == _COME_BACK or (status is not None and job.state == STOPPING):
        return "stopped", job.message
    if status is not None:
        how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return "failed", f"ended {how}; see xbraid-py logs {job.number}"
    # Nobody has seen the end: what the run itself has said last counts.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if (said := load_json(read_regular(Path(job.out) / STATUS)).get("state")) in ENDED:
            return said, job.message
    if job.state == STOPPING:
        return "stopped", job.message
    return "failed", f"killed, or the machine was restarted; xbraid-py resume {job.number} goes on"


def _start(queue: Queue, job: Job, children: dict[int, subprocess.Popen]) -> None:
    job = queue.change(job, state=RUNNING, started=time.time())
    pid_file = queue.path / f"{job.number}.pid"
    try:
        pid_file.unlink(missing_ok=True)
        with open(open_own(queue.log(job.number), os.O_WRONLY | os.O_CREAT | os.O_APPEND), "ab") as log:
            child = subprocess.Popen(
                ["sh", "-c", _SHELL, str(pid_file), *command_of(job)],
                cwd=job.folder,
                env=os.environ | job.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(9,),
            )
    except (OSError, ValueError) as error:
        queue.change(job, state="failed", ended=time.time(), message=f"not started: {error}")
        return
    children[job.number] = child
    if found := identity(child.pid):
        queue.change(job, process=[child.pid, found])


if __name__ == "__main__":
    run(sys.argv[1])
