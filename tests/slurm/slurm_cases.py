"""The batch scripts on a real SLURM of one node: `make slurm`. Plain pytest does not collect this file.

The driver is `stand_in.py`, or the one that a variable names: `XBRAID_SLURM_DRIVER=drivers/peaks.py make slurm`.
XBRAID_SLURM_INSTALL=1 installs packages that are missing; otherwise everything is skipped without, with the reason.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from processes import PROJECT, job_environment

CLUSTER = PROJECT / "tests" / "slurm" / "cluster.sh"
STAND_IN = PROJECT / "tests" / "slurm" / "stand_in.py"
DRIVER = Path(os.environ.get("XBRAID_SLURM_DRIVER", STAND_IN)).resolve()
SHORT, LONG = {
    # It waits for `Job.go`: whatever is sent to it comes before its end.
    "stand_in.py": (["--updates", "20"], ["--updates", "80", "--pause", "0.02", "--hold", "60"]),
    "peaks.py": (
        ["--smoke"],
        ["--num_layers", "32", "--num_train", "1000", "--num_val", "500", "--nested.refinements", "1"]
        + ["--nested.updates", "[80,120]"],
    ),
}[DRIVER.name]
NOT_REQUEUED = ["COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED"]


@dataclass(frozen=True)
class Job:
    """A submitted job: what SLURM, its log and its record say of it."""

    cluster: Cluster
    number: str
    out: Path
    log: Path

    def told(self, name: str) -> str:
        """A field of what `scontrol show job` says."""
        said = self.cluster.run("scontrol", "show", "job", "-o", self.number)
        return next(word.partition("=")[2] for word in said.split() if word.startswith(f"{name}="))

    def updates(self) -> list[dict]:
        """Rows of the record; a line that is being written is left out."""
        record = self.out / "metrics.jsonl"
        lines = record.read_text().splitlines(keepends=True) if record.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]
        return [row for row in rows if row["kind"] == "update"]

    def until(self, what: Callable[[Job], object], seconds: float = 180) -> None:
        """Wait until it is so, or fail with all that is known of the job."""
        end = time.monotonic() + seconds
        while not what(self):
            if time.monotonic() > end:
                show = self.cluster.run("scontrol", "show", "job", self.number)
                pytest.fail(f"still not so after {seconds} s\n{show}\n--- log\n{self.text()}")
            time.sleep(0.2)

    def end(self, seconds: float = 300) -> str:
        """Wait for the end; the state in which the job ends."""
        self.until(lambda job: job.told("JobState") in NOT_REQUEUED, seconds)
        return self.told("JobState")

    def go(self) -> None:
        """Let a long job of the stand-in come to its end."""
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "go").touch()

    def text(self) -> str:
        """The log so far."""
        return self.log.read_text() if self.log.exists() else ""


@dataclass(frozen=True)
class Cluster:
    """The SLURM of one node, and where its jobs write."""

    environment: dict[str, str]
    folder: Path

    def run(self, *words: str) -> str:
        """A command of SLURM; what it prints."""
        return subprocess.run(
            words, env=self.environment, check=True, text=True, capture_output=True, timeout=60
        ).stdout

    def submit(self, name: str, *options: str, script="peaks", driver=SHORT, **variables: str) -> Job:
        """`sbatch OPTIONS jobs/SCRIPT.sbatch DRIVER-OPTIONS`, two ranks; the same name is the same run."""
        out, log = self.folder / name, self.folder / f"{name}.log"
        words = ["sbatch", "--parsable", f"--job-name={name}", "--ntasks=2", f"--output={log}", *options]
        ours = {"OUT": str(out), "DRIVER": str(DRIVER), "PYTHON": sys.executable, "CONFIG": "jobs/peaks.yaml"}
        number = subprocess.run(
            [*words, f"jobs/{script}.sbatch", *driver],
            env={**self.environment, **ours, **variables},
            cwd=PROJECT,
            check=True,
            text=True,
            stdout=subprocess.PIPE,
            timeout=60,
        ).stdout.strip()
        return Job(self, number, out, log)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    """A cluster for the tests of this file."""
    install = os.environ.get("XBRAID_SLURM_INSTALL") == "1"
    started = subprocess.run([CLUSTER, "up", *["--install"] * install], text=True, capture_output=True, timeout=600)
    if started.returncode == 3:
        pytest.skip(f"no SLURM here: {started.stderr.strip()}")
    assert started.returncode == 0, started.stderr
    conf = started.stdout.strip().rpartition("=")[2]
    try:
        yield Cluster(job_environment({"SLURM_CONF": conf}), tmp_path_factory.mktemp("slurm"))
    finally:
        subprocess.run([CLUSTER, "down"], check=True, timeout=60)


@pytest.fixture(scope="module")
def undisturbed(cluster) -> float:
    """The final objective of the long run, which nothing has disturbed."""
    job = cluster.submit("undisturbed", driver=LONG)
    job.go()
    assert job.end() == "COMPLETED", job.text()
    assert job.updates()[-1]["final"] and job.told("Restarts") == "0"
    return job.updates()[-1]["objective"]


def finished(job: Job, undisturbed: float, restarts: int = 1) -> None:
    """The job is restarted so often, and then comes to the same end as without."""
    job.until(lambda job: int(job.told("Restarts")) >= restarts)
    job.go()
    assert job.end() == "COMPLETED", job.text()
    rows = job.updates()
    assert [row["update"] for row in rows] == list(range(rows[0]["update"], rows[-1]["update"] + 1))
    assert rows[-1]["final"] and abs(rows[-1]["objective"] - undisturbed) <= 1e-9 * abs(undisturbed)
    assert int(job.told("Restarts")) == restarts, job.text()
    starts = [line for line in job.text().splitlines() if f"job {job.number}: start " in line]
    assert len(starts) == restarts + 1 and f"start {restarts + 1}," in starts[-1], job.text()


@pytest.mark.parametrize("script", ["peaks", "peaks_scaling", "mnist", "transformer"])
def test_sbatch_takes_it(cluster, script):
    cluster.run("sbatch", "--test-only", "--ntasks=2", str(PROJECT / "jobs" / f"{script}.sbatch"))


def test_a_job_runs_to_its_end_and_then_ends_at_once(cluster):
    job = cluster.submit("short")
    assert job.end() == "COMPLETED", job.text()
    rows = job.updates()
    again = cluster.submit("short")
    assert again.end() == "COMPLETED", again.text()
    assert rows[-1]["final"] and again.updates() == rows


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
@pytest.mark.parametrize("to", ["steps", "batch"])
def test_a_signal_is_a_checkpoint_and_a_requeue(cluster, undisturbed, launcher, to):
    job = cluster.submit(f"signal-{launcher}-{to}", driver=LONG, LAUNCHER=launcher)
    job.until(lambda job: len(job.updates()) > 20)
    cluster.run("scancel", "--signal=USR1", *["--batch"] * (to == "batch"), job.number)
    finished(job, undisturbed)


def test_a_signal_before_the_ranks_listen(cluster, undisturbed):
    job = cluster.submit("early", driver=LONG)
    job.until(lambda job: "start 1," in job.text())
    cluster.run("scancel", "--signal=USR1", "--batch", job.number)
    finished(job, undisturbed)


def test_ranks_are_killed(cluster, undisturbed):
    # As by a node's failure; what they leave in shared memory must not hinder the next start of the same job.
    job = cluster.submit("killed", driver=LONG)
    job.until(lambda job: len(job.updates()) > 10)
    rows = [line.split() for line in cluster.run("scontrol", "listpids", job.number).splitlines()[1:]]
    for pid in [int(row[0]) for row in rows if row[2] == "0"]:
        os.kill(pid, signal.SIGKILL)
    assert job.end() == "FAILED", job.text()
    cluster.run("scontrol", "requeue", job.number)
    job.until(lambda job: "start 2," in job.text())
    finished(job, undisturbed)


def test_before_the_time_limit(cluster, undisturbed):
    # SLURM sends the signal 30 to 90 s before the limit of two minutes: behind the start of the ranks, and in time for
    # an update. The stand-in does not end before; how long another driver takes is its own affair.
    job = cluster.submit("limit", "--time=2", "--signal=B:USR1@30", driver=LONG)
    job.until(lambda job: int(job.told("Restarts")) or job.told("JobState") in NOT_REQUEUED, 240)
    restarts = int(job.told("Restarts"))
    assert restarts or DRIVER != STAND_IN, job.text()
    job.go()
    assert job.end(600) == "COMPLETED", job.text()
    finished(job, undisturbed, int(job.told("Restarts")))


def test_preempted_by_a_job_of_higher_priority(cluster, undisturbed):
    job = cluster.submit("low", "--partition=low", "--exclusive", driver=LONG)
    job.until(lambda job: len(job.updates()) > 10)
    other = cluster.submit("high", "--partition=high", "--exclusive")
    finished(job, undisturbed)
    assert other.end() == "COMPLETED", other.text()


def test_cancelled_is_cancelled(cluster, undisturbed):
    job = cluster.submit("cancelled", driver=LONG)
    job.until(lambda job: len(job.updates()) > 10)
    cluster.run("scancel", job.number)
    assert job.end() == "CANCELLED"
    time.sleep(3)
    assert job.told("JobState") == "CANCELLED" and "requeued\n" not in job.text()
    finished(cluster.submit("cancelled", driver=LONG), undisturbed, restarts=0)


@pytest.mark.parametrize("launcher", ["srun", "mpirun"])
def test_a_failure_is_not_requeued(cluster, launcher):
    job = cluster.submit(f"wrong-{launcher}", driver=["--no_such_option", "1"], LAUNCHER=launcher)
    assert job.end() == "FAILED"
    assert job.told("Restarts") == "0" and job.told("ExitCode") == "2:0", job.text()


def test_an_array_over_ranks(cluster):
    job = cluster.submit("array", "--array=1,2", script="peaks_scaling")
    elements = [Job(cluster, f"{job.number}_{ranks}", job.out / str(ranks), job.log) for ranks in (1, 2)]
    assert [element.end() for element in elements] == ["COMPLETED"] * 2, job.text()
    assert elements[0].updates()[-1]["objective"] == pytest.approx(elements[1].updates()[-1]["objective"], rel=1e-9)
    assert sorted(text.split(" rank(s)")[0][-1] for text in job.text().splitlines() if "start 1," in text) == ["1", "2"]


def test_the_queue_hands_jobs_to_slurm(cluster, undisturbed):
    # `xbraid-py submit --on slurm`, stopped behind a checkpoint without being requeued, and resumed on other ranks.
    folder = cluster.folder / "queue"

    def command(*words: str) -> str:
        return cluster.run(sys.executable, "-m", "xbraid_py", *words, "--folder", str(folder))

    def state() -> str:
        return command("ls").splitlines()[1].split()[2]

    command("submit", str(DRIVER), *LONG, "--on=slurm", "--ranks=2", "--time=10", f"--out={folder / 'run'}")
    number = command("ls").splitlines()[1].split("slurm ")[1].split()[0]
    job = Job(cluster, number, folder / "run", folder / ".queue" / "1.log")
    job.until(lambda job: len(job.updates()) > 10)
    command("stop", "1")
    assert job.end() == "FAILED" and job.told("Restarts") == "0", job.text()
    job.until(lambda job: state() == "stopped")
    command("resume", "1", "--ranks=1")
    again = Job(cluster, command("ls").splitlines()[1].split("slurm ")[1].split()[0], job.out, job.log)
    again.go()
    assert again.end() == "COMPLETED", again.text()
    assert state() == "finished"
    rows = again.updates()
    assert [row["update"] for row in rows] == list(range(rows[0]["update"], rows[-1]["update"] + 1))
    assert abs(rows[-1]["objective"] - undisturbed) <= 1e-9 * abs(undisturbed)
