"""The folder of a run: one job at a time, a status that is always whole, a log, and a clear end whatever happens."""

import errno
import fcntl
import json
import logging
import os
import signal
import subprocess
import sys

import pytest
import yaml
from processes import PROJECT, job_environment

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.run import signals
from xbraid_py.run.folder import LEFT, LOCK, claim, set_aside, take
from xbraid_py.run.record import read, replacing
from xbraid_py.run.signals import Stopped

KEYS = [
    *("state", "update", "total", "objective", "accuracy", "started", "updated"),
    *("seconds_left", "ranks", "host_kind", "pid", "message"),
]
CONFIGURATION = {"num_layers": 8, "nested": {"updates": [1, 2]}, "out": "here"}


def status(path) -> dict:
    return json.loads((path / "status.json").read_text())


def test_a_run_from_its_start_to_its_end(spmd, shared_tmp_path):
    out = shared_tmp_path / "new" / "run"

    def body(comm):
        folder = claim(out, comm)
        seen = []
        with folder.open(CONFIGURATION, total=4, done=1):
            if comm.rank == 0:
                seen.append(status(out))
            for number in (2, 3, 4):
                folder.write({"kind": "update", "update": number})
                stop = folder.update(number, objective=1.0 / number, accuracy=0.5 if number == 2 else None)
                seen += [status(out)] if comm.rank == 0 and number == 2 else []
                assert not stop
            folder.log("a remark")
            if comm.rank == 0:
                logging.getLogger("xbraid_py.somewhere").warning("a warning")
        return seen, comm.size

    seen, size = spmd(body)[0]
    starting, running = seen
    assert list(starting) == KEYS
    assert (starting["state"], starting["update"], starting["total"], starting["ranks"]) == ("starting", 1, 4, size)
    assert (running["state"], running["update"], running["objective"]) == ("running", 2, 0.5)
    found = status(out)
    assert (found["state"], found["update"], found["seconds_left"], found["message"]) == ("finished", 4, 0.0, "")
    assert (found["objective"], found["accuracy"]) == (0.25, 0.5)
    assert found["started"] == starting["started"] <= found["updated"]
    assert os.uname().nodename not in found["host_kind"] or len(os.uname().nodename) < 4
    assert yaml.safe_load((out / "config.yaml").read_text()) == CONFIGURATION
    rows = read(out / "metrics.jsonl")
    assert [row.get("update") for row in rows] == [None, 2, 3, 4] and rows[0]["configuration"] == CONFIGURATION
    lines = (out / "log.txt").read_text().splitlines()
    for text in ("WARNING xbraid_py.somewhere: a warning", "a remark"):
        assert len([line for line in lines if text in line]) == 1
    assert lines[-1].endswith("finished") and "starts on" in lines[0]
    assert sorted(path.name for path in out.iterdir()) == sorted(
        ["config.yaml", "lock", "log.txt", "metrics.jsonl", "status.json"]
    )


def test_a_run_that_goes_on_appends(tmp_path):
    for append in (False, True):
        with claim(tmp_path, SerialCommunicator()).open(CONFIGURATION, append=append):
            pass
    assert [row["kind"] for row in read(tmp_path / "metrics.jsonl")] == ["header", "resume"]
    text = (tmp_path / "log.txt").read_text()
    assert text.count("finished") == 2 and text.count("goes on on 1 rank(s)") == text.count("starts on 1 rank(s)") == 1


@pytest.mark.parametrize(
    "error, state, message",
    [
        (RunError("loss=nan"), "failed", "loss=nan"),
        (KeyError("width"), "failed", "rank 0: KeyError: 'width'"),
        (KeyboardInterrupt(), "stopped", "interrupted"),
        (Stopped("stopped by SIGUSR1"), "stopped", "stopped by SIGUSR1"),
    ],
)
def test_how_a_run_ends(tmp_path, error, state, message):
    folder = claim(tmp_path, SerialCommunicator())
    with pytest.raises(type(error)), folder.open(CONFIGURATION, total=9):
        folder.update(3, objective=0.5)
        raise error
    found = status(tmp_path)
    assert (found["state"], found["message"], found["update"], found["seconds_left"]) == (state, message, 3, None)
    assert message in (tmp_path / "log.txt").read_text().splitlines()[-1]
    # The folder is free again, and nothing listens any more.
    take(tmp_path).release()
    assert not [h for h in logging.getLogger("xbraid_py").handlers if isinstance(h, logging.FileHandler)]


def test_a_signal_is_answered_at_the_end_of_an_update(spmd, shared_tmp_path):
    def body(comm):
        folder = claim(shared_tmp_path, comm)
        try:
            with folder.open(CONFIGURATION):
                if folder.update(7):
                    raise folder.stopped(shared_tmp_path / "update_000007.h5")
        except Stopped as stop:
            return str(stop)

    signals.note(signal.SIGTERM)
    try:
        said = set(spmd(body))
    finally:
        signals.forget()
    path = shared_tmp_path / "update_000007.h5"
    assert said == {f"stopped by SIGTERM after update 7; --resume auto goes on from {path}"}
    assert status(shared_tmp_path)["state"] == "stopped"


def test_what_rank_0_cannot_write_ends_all_ranks_together(spmd, shared_tmp_path, monkeypatch):
    def body(comm):
        folder = claim(shared_tmp_path, comm)
        try:
            with folder.open(CONFIGURATION):
                folder.update(1)
                with folder.guarded():
                    if comm.rank == 0:
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                folder.write({"kind": "update", "update": 2})
                folder.update(2)
        except RunError as error:
            return str(error)

    said = spmd(body)
    expected = f"rank 0 cannot write to {shared_tmp_path}: [Errno 28] No space left on device; make room, or give "
    assert said == [expected + "another --out"] * len(said)
    assert status(shared_tmp_path)["state"] == "failed"


def test_a_folder_that_cannot_be_written_from_the_start(spmd, shared_tmp_path):
    (shared_tmp_path / "metrics.jsonl").mkdir(exist_ok=True)

    def body(comm):
        try:
            with claim(shared_tmp_path, comm).open(CONFIGURATION):
                return "open"
        except RunError as error:
            return str(error)

    assert all("Is a directory" in said and "another --out" in said for said in spmd(body))


def test_the_record_removed_under_a_run(tmp_path):
    folder = claim(tmp_path, SerialCommunicator())
    with pytest.raises(RunError, match="metrics.jsonl has been removed"), folder.open(CONFIGURATION):
        folder.write({"kind": "update", "update": 1})
        folder.update(1)
        (tmp_path / "metrics.jsonl").unlink()
        folder.write({"kind": "update", "update": 2})
        folder.update(2)


@pytest.mark.parametrize("name", ["lock", "log.txt", "metrics.jsonl", "status.json", "config.yaml"])
@pytest.mark.parametrize("kind", ["link", "dead link", "hard link", "pipe", "device"])
def test_nothing_planted_in_a_shared_folder_is_followed(tmp_path, name, kind):
    victim, out = tmp_path / "victim", tmp_path / "run"
    out.mkdir()
    if kind != "dead link":
        victim.write_text("mine")
    if kind == "hard link":
        os.link(victim, out / name)
    elif kind == "pipe":
        os.mkfifo(out / name)
    else:
        (out / name).symlink_to("/dev/null" if kind == "device" else victim)
    try:
        with claim(out, SerialCommunicator()).open(CONFIGURATION):
            pass
    except (OSError, RunError) as error:
        assert kind != "hard link" and name in ("lock", "log.txt", "metrics.jsonl")
        assert f"{out / name} is no regular file, but a link, a pipe or a device" in str(error)
        assert "another --out" in str(error)
    else:
        assert kind == "hard link" or name in ("status.json", "config.yaml")  # which are replaced
    if kind == "dead link":
        assert not victim.exists()
    # Systems let others make no hard link to what they cannot write to, and a new run sets these two aside.
    elif kind != "hard link" or name not in ("log.txt", "metrics.jsonl"):
        assert victim.read_text() == "mine"


def test_links_to_nowhere_are_set_aside_with_the_rest(tmp_path):
    for name in ("log.txt", "figures"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    assert set_aside(tmp_path) == tmp_path / "earlier-1"
    assert sorted(path.name for path in (tmp_path / "earlier-1").iterdir()) == ["figures", "log.txt"]


def test_what_killed_jobs_were_replacing_goes(tmp_path):
    for name in ("config.yaml", "status.json", "metrics.jsonl"):
        with pytest.raises(KeyboardInterrupt), replacing(tmp_path / name) as temporary:
            os.link(temporary, kept := temporary.with_name(f".{name}.{'0123456789abcdef'}.tmp"))
            raise KeyboardInterrupt
        assert not temporary.exists() and kept.exists()
    (tmp_path / ".notes.tmp").write_text("mine")
    with claim(tmp_path, SerialCommunicator()).open(CONFIGURATION):
        pass
    assert [path.name for path in tmp_path.glob(".*")] == [".notes.tmp"]


def test_no_name_under_which_a_file_is_replaced_can_be_guessed(tmp_path):
    found = set()
    for _ in range(3):
        with replacing(tmp_path / "file") as temporary:
            found.add(temporary.name)
            temporary.write_text("new")
    assert len(found) == 3 and (tmp_path / "file").read_text() == "new"
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_full_disk_leaves_no_half_of_a_configuration(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = claim(tmp_path, SerialCommunicator())
    monkeypatch.setattr(type(tmp_path), "write_text", full)
    with pytest.raises(RunError, match="No space left"), folder.open(CONFIGURATION):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize("name", ["run\nresume: auto", "a\rresume: auto", "b\u2028resume: auto", "c\udcff"])
def test_no_letter_of_a_name_is_an_option(tmp_path, name):
    out = tmp_path / name
    with claim(out, SerialCommunicator()).open({"num_layers": 8}, driver=f"{name}.py"):
        pass
    text = (out / "config.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text) == {"num_layers": 8} and len(text.splitlines()) == 2


def test_a_second_job_is_refused_until_the_first_ends(tmp_path):
    out = tmp_path / "run"
    first = claim(out, SerialCommunicator())
    with pytest.raises(ValueError) as caught:
        claim(out, SerialCommunicator())
    assert str(caught.value).startswith(f"out={out} is in use by another job (process {os.getpid()}, since 20")
    assert str(caught.value).endswith("); wait for its end, stop it, or give another --out")
    with first.open(CONFIGURATION), pytest.raises(ValueError, match="in use"):
        claim(out, SerialCommunicator())
    second = claim(out, SerialCommunicator())
    # A run that never begins, as its options are wrong, leaves nothing behind either.
    del second
    claim(out, SerialCommunicator()).release()


_HOLDER = """
import sys, time
from xbraid_py.run.folder import take
lock = take(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_a_killed_job_refuses_nobody(tmp_path):
    command = [sys.executable, "-c", _HOLDER, str(tmp_path)]
    with subprocess.Popen(command, env=job_environment(), cwd=PROJECT, stdout=subprocess.PIPE, text=True) as job:
        assert job.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {job.pid}, since"):
            take(tmp_path)
        job.kill()
        job.wait()
    take(tmp_path).release()


@pytest.mark.job
def test_a_second_job_ends_with_one_message(tmp_path, run_job):
    lock = take(tmp_path)
    job = run_job([PROJECT / "drivers" / "peaks.py", "--smoke", f"--out={tmp_path}"], ranks=2)
    lock.release()
    assert (job.returncode, job.stdout) == (2, "")
    assert job.stderr.startswith(f"error: rank 0 of 2: out={tmp_path} is in use by another job (process {os.getpid()},")
    assert job.stderr.count("\n") == 1 and [path.name for path in tmp_path.iterdir()] == ["lock"]


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"[1]", b'{"pid": "x"}', b"\xff\xfe", b"[" * 1000, b"\x00"),
        *(b'{"pid": Infinity, "since": 0}', b'{"pid": [], "since": 0}'),
    ],
)
def test_whatever_the_lock_file_says(tmp_path, content):
    lock = take(tmp_path)
    (tmp_path / "lock").write_bytes(content)
    with pytest.raises(ValueError, match="in use by another job; wait"):
        take(tmp_path)
    lock.release()
    lock.release()
    take(tmp_path).release()


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    take(tmp_path).release()
    assert "has no locks" in caplog.text


@pytest.mark.parametrize("kind, what", [("file", "Not a directory|File exists"), ("taken", "Is a directory")])
def test_a_folder_that_cannot_be_made(tmp_path, kind, what):
    (tmp_path / "file").write_text("")
    (tmp_path / "taken" / LOCK).mkdir(parents=True)
    out = tmp_path / ("file/run" if kind == "file" else "taken")
    with pytest.raises(OSError, match=f"out={out} cannot be written: ({what}); give another --out"):
        claim(out, SerialCommunicator())


def test_an_earlier_run_is_set_aside(tmp_path):
    assert set_aside(tmp_path) is None
    for n in (1, 2):
        with claim(tmp_path, SerialCommunicator()).open(CONFIGURATION):
            pass
        (tmp_path / "checkpoints" / "non-nested").mkdir(parents=True)
        assert set_aside(tmp_path) == tmp_path / f"earlier-{n}"
        left = {path.name for path in (tmp_path / f"earlier-{n}").iterdir()}
        assert left == set(LEFT) - {"figures", "tensorboard"}
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "a.h5").write_text("a")
    (tmp_path / "checkpoints" / "b.h5").write_text("b")
    assert set_aside(tmp_path, ("checkpoints/b.h5", "checkpoints/c.h5")) == tmp_path / "earlier-3"
    assert (tmp_path / "earlier-3" / "checkpoints" / "b.h5").read_text() == "b"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["a.h5"]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files here")
def test_no_file_stays_open(tmp_path):
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with claim(tmp_path, SerialCommunicator()).open(CONFIGURATION) as opened:
            assert opened is None
        claim(tmp_path, SerialCommunicator())
    assert len(os.listdir("/proc/self/fd")) == before
