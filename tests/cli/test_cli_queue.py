"""Jobs: submitted, listed, stopped, continued; what happens to the queue when processes are killed or others come."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from processes import PROJECT, job_environment
from runs_on_disk import make_run, status
from served import room_for, until

from xbraid_py.cli import control, main
from xbraid_py.cli import queue as queues
from xbraid_py.cli.queue import Queue
from xbraid_py.cli.submit import seconds_of

# What a driver does as the queue sees it: a folder, its options in it, checkpoints, a status; and it can be asked.
DRIVER = """
import json, os, signal, sys, time
from pathlib import Path
options = dict(word[2:].split("=", 1) for word in sys.argv[1:])
if "config" in options:
    options = json.loads(Path(options["config"]).read_text()) | options
out, asked = Path(options["out"]), []
signal.signal(signal.SIGUSR1, lambda *_: asked.append(1))
(out / "checkpoints").mkdir(parents=True, exist_ok=True)
(out / "config.yaml").write_text(json.dumps({"wait": options["wait"]}))
def say(state):
    (out / "status.tmp").write_text(json.dumps({"state": state, "update": 3, "total": 9}))
    (out / "status.tmp").replace(out / "status.json")
def note(what):
    with open(out.parent / "notes", "a") as notes:
        notes.write(json.dumps([what, out.name, time.time(), sys.argv[1:], os.environ.get("XBRAID_WORD")]) + "\\n")
say("running")
note("begins")
print("it begins", flush=True)
if options.get("resume") != "auto":
    while not (out / options["wait"]).exists() and not asked:
        time.sleep(0.01)
if options["wait"] == "fails":
    sys.exit(3)
say("stopped" if asked else "finished")
note("ends")
sys.exit(75 if asked else 0)
"""


@pytest.fixture
def room(tmp_path):
    with room_for(DRIVER, tmp_path) as folder:
        yield folder


def submit(room: Path, *words: str, wait: str = "go") -> int:
    """The number of a new job, which ends when there is a file of this name in its folder."""
    command = [sys.executable, "-m", "xbraid_py", "submit", str(room.parent / "driver.py"), f"--wait={wait}"]
    done = subprocess.run(
        [*command, "--folder", str(room), *words], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def go(room: Path, number: int) -> None:
    out = Path(Queue(room).job(number).out)
    out.mkdir(exist_ok=True)
    (out / "go").touch()


def notes(room: Path, what: str = "begins") -> list[list]:
    path = room / "notes"
    lines = map(json.loads, path.read_text().splitlines()) if path.exists() else []
    return [line for line in lines if line[0] == what]


def is_now(room: Path, number: int, state: str) -> bool:
    control.looked_up(Queue(room))
    return Queue(room).job(number).state == state


def runner_of(room: Path) -> int:
    """The process of the runner, which holds its lock."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
        except OSError:
            continue
        if b"xbraid_py.cli.queue" in words and os.fsencode(room) in words:
            return int(path.name)
    raise AssertionError("there is no runner")


def test_so_many_at_a_time_in_their_order(room, monkeypatch):
    monkeypatch.setenv("XBRAID_WORD", "of the submitter")
    numbers = [submit(room, "--jobs=2"), submit(room), submit(room)]
    assert numbers == [1, 2, 3]
    until(lambda: len(notes(room)) == 2)
    assert {line[1] for line in notes(room)} == {"driver-1", "driver-2"}, "each has a folder of its own"
    assert is_now(room, 3, "waiting")
    go(room, 2)
    until(lambda: len(notes(room)) == 3)
    assert [line[4] for line in notes(room)] == ["of the submitter"] * 3
    for number in numbers:
        (room / f"driver-{number}" / "go").touch()
        until(lambda number=number: is_now(room, number, "finished"))
    until(lambda: not _has_runner(room))
    assert len(notes(room)) == 3 and len(notes(room, "ends")) == 3


def _has_runner(room: Path) -> bool:
    try:
        runner_of(room)
    except AssertionError:
        return False
    return True


def test_submitters_at_once_get_different_numbers(room):
    added = []
    threads = [
        threading.Thread(target=lambda: added.append(Queue(room).add({"program": ["x.py"], "ranks": 1}).number))
        for _ in range(20)
    ]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sorted(added) == list(range(1, 21)) and [job.number for job in Queue(room).jobs()] == sorted(added)


def test_a_killed_runner_leaves_its_jobs_and_the_next_takes_them_over(room):
    number = submit(room)
    until(lambda: notes(room))
    os.kill(runner_of(room), signal.SIGKILL)
    until(lambda: not _has_runner(room))
    second = submit(room)  # starts a runner, to which the first job is still under way
    time.sleep(1.5)
    assert len(notes(room)) == 1 and is_now(room, second, "waiting"), "not started twice, and counted"
    go(room, number)
    until(lambda: is_now(room, number, "finished"))
    until(lambda: len(notes(room)) == 2)
    go(room, second)
    until(lambda: is_now(room, second, "finished"))


def test_a_runner_killed_while_it_starts_a_job(room):
    # The process has left its number, the runner has not written it down.
    sleeper = subprocess.Popen(["sleep", "60"], start_new_session=True)
    queue = Queue(room)
    with queue.locked():
        job = queue.change(_added(queue), state="running", started=time.time())
        (queue.path / f"{job.number}.pid").write_text(f"{sleeper.pid}\n")
    queue.wake()
    until(lambda: (queue.job(job.number).process or [0])[0] == sleeper.pid)
    sleeper.kill()
    sleeper.wait()
    until(lambda: is_now(room, job.number, "failed"))
    assert "killed, or the machine was restarted; xbraid-py resume 1 goes on" in queue.job(job.number).message


def _added(queue: Queue):
    number = queue.path.exists() and len(queue.jobs())
    job = queues.Job(number=int(number) + 1, program=["x.py"], ranks=1, out=str(queue.folder / "x"))
    return job


@pytest.mark.parametrize("born", ["another-boot 17", None])
def test_a_process_that_has_the_number_of_an_earlier_one_is_let_alone(room, born):
    other = subprocess.Popen(["sleep", "60"], start_new_session=True)
    now = queues.identity(other.pid)
    stale = born or f"{now.split()[0]} {int(now.split()[1]) - 1}"
    queue = Queue(room)
    with queue.locked():
        job = queue.change(_added(queue), state="running", started=time.time(), process=[other.pid, stale])
    queue.stop(job.number, now=True)
    until(lambda: is_now(room, job.number, "stopped"))
    assert other.poll() is None, "it is none of ours"
    other.kill()
    other.wait()


def test_a_damaged_file_hides_no_other_job(room):
    queue = Queue(room)
    first, second = (queue.add({"program": ["x.py"], "ranks": 1, "on": "slurm"}).number for _ in range(2))
    (queue.path / f"{first}.json").write_text('{"number": 1, ')
    assert [job.number for job in queue.jobs()] == [second]
    assert queue.add({"program": ["x.py"], "ranks": 1, "on": "slurm"}).number == 3, "its number is not given away"


def test_stop_and_resume(room, capsys):
    running, waiting = submit(room), submit(room)
    until(lambda: notes(room))
    assert main(["stop", str(running), str(waiting), "--folder", str(room)]) == 0
    said = capsys.readouterr().out
    assert f"job {running} is asked for a checkpoint and its end" in said
    assert f"job {waiting} is taken out of the queue" in said
    until(lambda: is_now(room, running, "stopped"))
    assert Queue(room).job(running).status == 75
    assert main(["stop", str(running), "--folder", str(room)]) == 0
    assert "is stopped already" in capsys.readouterr().out
    # By its number, or by its folder and the queue above it.
    assert main(["resume", str(room / "driver-1"), "--on=here"]) == 0
    until(lambda: is_now(room, running, "finished"))
    begins = notes(room)
    assert len(begins) == 2 and "--resume=auto" not in begins[0][3]
    assert begins[1][3] == [f"--config={room}/driver-1/config.yaml", f"--out={room}/driver-1", "--resume=auto"]
    assert main(["resume", str(running), "--folder", str(room)]) == 2
    assert "is finished: there is nothing to continue" in capsys.readouterr().err
    assert main(["resume", str(waiting), "--folder", str(room)]) == 0, "it has never begun"
    until(lambda: len(notes(room)) == 3)
    assert main(["resume", str(waiting), "--folder", str(room)]) == 2
    assert "is running: it goes on by itself" in capsys.readouterr().err
    go(room, waiting)
    until(lambda: is_now(room, waiting, "finished"))


def test_replicas_follow_the_ranks(room):
    # Those of the plan on two ranks, which its run has written down, do not divide three.
    make_run(room / "run", said=status("stopped", ranks=2), replicas=4)
    (room / "run" / "status.json").write_text(json.dumps(status("stopped", ranks=2)))
    queue = Queue(room)
    for ranks, words in ((8, []), (3, ["--replicas=1"]), (6, ["--replicas=2"])):
        job = control.resume(queue, room / "run", ranks, "here", room.parent / "driver.py")
        assert job.program[2:] == words and job.ranks == ranks
        queue.stop(job.number, now=True)
        until(lambda number=job.number: Queue(room).job(number).is_over)


def test_a_job_that_sbatch_never_took_can_be_taken_out(room, capsys):
    Queue(room).add({"program": ["x.py"], "ranks": 1, "on": "slurm"})
    assert main(["stop", "1", "--folder", str(room)]) == 0
    assert "taken out of the queue" in capsys.readouterr().out


def test_a_job_stops_at_its_time_limit(room):
    job = submit(room, "--time=0:01")
    until(lambda: is_now(room, job, "stopped"))
    assert Queue(room).job(job).message == "time limit" and Queue(room).job(job).status == 75


def test_a_job_that_fails_says_so_and_the_next_begins(room, capsys):
    (room / "driver-1").mkdir()
    (room / "driver-1" / "fails").touch()
    failing, next_one = submit(room, wait="fails"), submit(room)
    until(lambda: is_now(room, failing, "failed"))
    assert Queue(room).job(failing).status == 3
    until(lambda: is_now(room, next_one, "running"))
    capsys.readouterr()
    assert main(["ls", str(room)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:5] == ["1", "driver-1", "failed", "3", "/"]
    assert "ended with status 3; see xbraid-py logs 1" in lines[1]
    go(room, next_one)
    assert main(["logs", "-f", str(next_one), "--folder", str(room)]) == 0
    assert capsys.readouterr().out == "it begins\n", "to its end"


def test_a_program_that_cannot_be_started(room):
    queue = Queue(room)
    job = control.start(queue, {"program": ["x.py"], "ranks": 2, "launcher": "there-is-no-such-mpirun -n"})
    until(lambda: is_now(room, job.number, "failed"))
    assert "launcher=there-is-no-such-mpirun -n is no command" in queue.job(job.number).message


def test_two_jobs_do_not_share_a_folder(room, capsys):
    first = submit(room, f"--out={room / 'mine'}")
    words = ["submit", str(room.parent / "driver.py"), "--wait=go", "--folder", str(room), "--out", str(room / "mine")]
    assert main(words) == 2
    assert f"mine belongs to job {first}, which is" in capsys.readouterr().err
    until(lambda: notes(room))
    go(room, first)
    until(lambda: is_now(room, first, "finished"))


def test_runs_that_were_started_by_hand_are_listed_stopped_and_queued(room, tmp_path, capsys):
    make_run(room / "deep" / "er" / "run", said=status("stopped"))
    make_run(room / "deep" / "er" / "run" / "earlier-1")
    make_run(room / ".hidden")
    assert main(["ls", str(room)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and lines[1].split()[:3] == ["-", "deep/er/run", "stopped"]
    held = subprocess.Popen([sys.executable, room.parent / "driver.py", f"--out={room / 'own'}", "--wait=go"])
    until(lambda: notes(room))
    assert main(["stop", str(room / "own")]) == 2
    assert "is run by no process of this machine that can be seen" in capsys.readouterr().err
    held.kill()
    held.wait()
    # One that holds the lock, as runs do.
    body = (
        "import fcntl, json, os, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: sys.exit(75))\n"
        "lock = open(sys.argv[1], 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "lock.write(json.dumps({'pid': os.getpid(), 'since': ''})); lock.flush(); print(flush=True)\n"
        "signal.pause()"
    )
    held = subprocess.Popen([sys.executable, "-c", body, room / "own" / "lock"], stdout=subprocess.PIPE)
    held.stdout.readline()
    assert main(["stop", str(room / "own")]) == 0
    assert held.wait(timeout=30) == 75


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["submit", "peeks"], "DRIVER=peeks is no file and no program of the library; use one of"),
        (["submit", "peaks", "--ranks=0"], "ranks=0 must be at least 1; use --ranks=2"),
        (["submit", "peaks", "--time=soon"], "time=soon is none; use --time=30 (minutes)"),
        (["submit", "peaks", "--resume=auto"], "resume is said by the queue itself"),
        (["submit", "peaks", "--out"], "out is given without a folder; use --out=runs/mine"),
        (["submit", "peaks", "--on=lsf"], "argument --on: invalid choice: 'lsf'"),
        (["submit", "peaks", "--ranks=2", "--launcher=none-such"], "launcher=none-such is no command to be found"),
        (["stop", "99", "--folder=nowhere"], "JOB=99 is no job of the queue in"),
        (["resume", "99", "--folder=nowhere"], "JOB=99 is no job of the queue in"),
        (["logs", "nowhere/at/all"], "JOB=nowhere/at/all is no job and no folder of a run; use xbraid-py ls"),
        (["ls", "nowhere"], "folder=nowhere is no folder"),
    ],
)
def test_messages(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir()), "nothing is begun"


def test_slurm_is_asked_for_only_where_it_is(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main(["submit", "peaks", "--on=slurm", f"--folder={tmp_path}"]) == 2
    assert "on=slurm needs sbatch, and there is none on the PATH; use --on=here" in capsys.readouterr().err


def test_slurm_job(room, tmp_path, monkeypatch, capsys):
    # What is handed to SLURM, and what becomes of its answers; tests/slurm has the real one.
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    for name, body in {
        "sbatch": 'printf "%s\\n" "$DRIVER" "$OUT" "$@" > "$SEEN"; echo 77',
        "squeue": 'cat "$STATE"',
        "scontrol": 'echo scontrol "$@" >> "$SEEN"',
        "scancel": 'echo scancel "$@" >> "$SEEN"',
    }.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{body}\n")
        (bin_ / name).chmod(0o755)
    seen, state = tmp_path / "seen", tmp_path / "state"
    monkeypatch.setenv("PATH", f"{bin_}:{os.environ['PATH']}")
    monkeypatch.setenv("SEEN", str(seen))
    monkeypatch.setenv("STATE", str(state))
    state.write_text("PENDING\n")
    words = ["submit", str(tmp_path / "driver.py"), "--wait=go", "--on=slurm", "--ranks=32", "--time=04:00:00"]
    assert main([*words, "--folder", str(room)]) == 0
    assert "(SLURM's 77)" in capsys.readouterr().err
    driver, out, *handed = seen.read_text().splitlines()
    assert driver == str(tmp_path / "driver.py") and out == str(room / "driver-1")
    assert {"--parsable", "--ntasks=32", "--time=240", "--wait=go"} <= set(handed)
    for said, expected in (("PENDING", "waiting"), ("RUNNING", "running")):
        state.write_text(f"{said}\n")
        assert [job.state for job in control.looked_up(Queue(room))] == [expected]
    seen.write_text("")
    assert main(["stop", "1", "--folder", str(room)]) == 0
    asked = ["scontrol update JobId=77 Requeue=0", "scancel --batch --signal=USR1 77"]
    assert seen.read_text().splitlines() == asked
    assert [job.state for job in control.looked_up(Queue(room))] == ["stopping"]
    make_run(room / "driver-1", said=status("stopped"))
    state.write_text("FAILED\n")  # how a job ends that is not put back into the queue
    assert [job.state for job in control.looked_up(Queue(room))] == ["stopped"]
    assert main(["resume", "1", "--ranks=16", "--folder", str(room)]) == 0
    _, _, *handed = seen.read_text().splitlines()
    assert {"--ntasks=16", f"--config={room}/driver-1/config.yaml"} <= set(handed)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("30", 1800), ("1:30", 90), ("04:00:00", 14400), ("2-0", 172800), ("1-02:03", 93780), ("1-02:03:04", 93784)],
)
def test_times_as_slurm_writes_them(text, seconds):
    assert seconds_of(text) == seconds


def test_a_study_says_how_many_runs_it_has_to_do(tmp_path, capsys):
    folder = tmp_path / "study"
    folder.mkdir()
    rows = [{"settings": {"seed": n}, "result": {}} for n in range(27)] + [{"settings": {}, "failure": "nan"}]
    (folder / "runs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "study.json").write_text('{"runs": 42}')
    assert main(["status", str(folder)]) == 0
    assert capsys.readouterr().out.split(maxsplit=1)[1] == "stopped  42 runs, 14 to do, 1 failed\n"
    assert main(["ls", str(tmp_path)]) == 0
    assert "42 runs, 14 to do, 1 failed" in capsys.readouterr().out


@pytest.mark.job
def test_a_training_on_two_ranks_is_stopped_and_goes_on_on_three(tmp_path, monkeypatch):
    for name, value in job_environment().items():  # what Open MPI has to be told, for one
        monkeypatch.setenv(name, value)
    room = tmp_path / "runs"
    small = ["--num_layers=16", "--num_train=100", "--num_val=50", "--nested.refinements=0", "--nested.updates=[1500]"]
    program = [str(PROJECT / "drivers" / "peaks.py"), *small, "--mgrit.cycle=lagged", "--replicas=1"]
    queue = Queue(room)
    job = control.start(queue, {"program": program, "ranks": 2})
    try:
        until(lambda: control.entries(room)[0].state == "running", 200)
        until(lambda: control.entries(room)[0].summary.update > 3, 200)
        control.stop(queue, job.number)
        until(lambda: is_now(room, job.number, "stopped"), 200)
        (entry,) = control.entries(room)
        stopped_at = entry.summary.update
        assert entry.summary.state == "stopped" and 3 < stopped_at < 1500
        control.resume(queue, job.number, ranks=3)
        until(lambda: control.entries(room)[0].state == "running", 200)
        until(lambda: control.entries(room)[0].summary.update > stopped_at, 200)
    finally:
        queue.stop(job.number, now=True)
    until(lambda: queue.job(job.number).is_over, 200)
    rows = [json.loads(line) for line in (room / "peaks-1" / "metrics.jsonl").read_text().splitlines()]
    assert [row["ranks"] for row in rows if row["kind"] in ("header", "resume")] == [2, 3]
    updates = [row["update"] for row in rows if row["kind"] == "update"]
    assert updates == list(range(len(updates))) and len(updates) > stopped_at
