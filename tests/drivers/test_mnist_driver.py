"""The MNIST driver from the outside, on small files of random images: ranks, replicas, and how bad input ends."""

import json
import os
import signal
import struct
import time

import numpy as np
import pytest
from processes import PROJECT, end_job, finish_job, run_job, start_job

from xbraid_py.data.mnist import PUBLISHED
from xbraid_py.run.record import read

pytestmark = [pytest.mark.job, pytest.mark.timeout(400)]

DRIVER = PROJECT / "drivers" / "mnist.py"


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Folder of 200 training and 103 test images: a bright row that tells the class, and noise."""
    folder = tmp_path_factory.mktemp("digits")
    random = np.random.default_rng(0)
    for number, name in zip((200, 200, 103, 103), PUBLISHED, strict=True):
        labels = (np.arange(number) % 10).astype(np.uint8)
        if "labels" in name:
            (folder / name).write_bytes(struct.pack(">BBBBI", 0, 0, 8, 1, number) + labels.tobytes())
        else:
            images = random.integers(0, 60, (number, 28, 28), dtype=np.uint8)
            images[np.arange(number), 3 + 2 * labels] = 250
            (folder / name).write_bytes(struct.pack(">BBBB3I", 0, 0, 8, 3, number, 28, 28) + images.tobytes())
    return folder


def smoke(digits, out, ranks, *words):
    """A job of seconds, and its rows without the clock."""
    job = run_job([DRIVER, "--smoke", f"--data_dir={digits}", f"--out={out}", *words], ranks, timeout=200)
    assert job.returncode == 0, job.stderr
    header, *rows = read(out / "metrics.jsonl")
    assert header["ranks"] == ranks and header["configuration"]["num_layers"] == 8
    return job, [{key: row[key] for key in row if key != "seconds"} for row in rows]


def agree(found, expected):
    """Whether two records tell the same, losses to 1e-6; single precision leaves residuals a digit or two."""
    assert [(row["kind"], row["update"]) for row in found] == [(row["kind"], row["update"]) for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.get("test_accuracy") == other.get("test_accuracy")
        assert row.get("loss", 0.0) == pytest.approx(other.get("loss", 0.0), rel=1e-6)
        for mine, its in zip(row.get("stacks", ()), other.get("stacks", ()), strict=True):
            for name in ("mode", "level", "iterations", "adjoint_iterations", "measured"):
                assert mine[name] == its[name], name
            assert mine["adjoint_residual"] == pytest.approx(its["adjoint_residual"], rel=1e-2)


@pytest.mark.parametrize("variant", ["conv", "dense"])
def test_the_same_on_one_and_three_ranks(digits, tmp_path, variant):
    one, expected = smoke(digits, tmp_path / "one", 1, f"--variant={variant}")
    three, found = smoke(digits, tmp_path / "three", 3, f"--variant={variant}")
    agree(found, expected)
    assert [row["update"] for row in found if row["kind"] == "update"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found[0]["stacks"][0]["mode"] == "mgrit" and found[0]["stacks"][0]["measured"]
    for job in (one, three):
        accuracy = 100 * found[-1]["test_accuracy"]
        assert job.stdout.splitlines()[-1].startswith(f"test accuracy: {accuracy:.2f} %, ")
    assert "variant: " + variant in (tmp_path / "three" / "config.yaml").read_text()
    assert (tmp_path / "three" / "figures" / "training.png").stat().st_size > 1000


def test_two_replicas_and_exact_propagation_are_near(digits, tmp_path):
    # Adam divides gradients by their size, so what rounding has left of a vanishing one counts: 1e-4.
    exact = smoke(digits, tmp_path / "exact", 1, "--exact")[1]
    replicas = smoke(digits, tmp_path / "replicas", 4, "--replicas=2", "--exact")[1]
    losses = [[row["loss"] for row in rows if row["kind"] == "update"] for rows in (exact, replicas)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert {row["stacks"][0]["mode"] for row in replicas if row["kind"] == "update"} == {"exact"}


def test_it_learns(digits, tmp_path):
    words = ("--max_updates=40", "--epochs=4", "--learning_rate=0.01", "--record_every=10", "--test_every=10")
    rows = smoke(digits, tmp_path / "run", 1, *words)[1]
    tests = [row for row in rows if row["kind"] == "test"]
    assert [row["update"] for row in tests] == [10, 20, 30, 40] and tests[-1]["test_accuracy"] > 0.5


BAD = [
    ("--data_dir=/nowhere", "train-images-idx3-ubyte", "--data_dir FOLDER"),
    ("--mgrit.cfactor=3", "num_layers=8 is not a multiple of cfactor=3; use 6 or 9", ""),
    ("--replicas=2", "replicas=2 does not divide the ", "use 1"),
    ("--varant=conv", "unknown option --varant; did you mean --variant?", ""),
    ("--learning_rate=0", "learning_rate=0.0 must be positive and finite; use 0.005", ""),
    ("--epochs=0", "epochs=0 must be at least 1; use 10", ""),
    ("--keep=0", "keep=0 must be at least 1; use 10", ""),
    ("--resume=/nowhere.h5", "checkpoint /nowhere.h5: No such file or directory", "--resume auto"),
    ("--batch_size=500", "batch_size=500 is more than num_samples=200", ""),
]


@pytest.mark.parametrize(("word", "message", "use"), BAD, ids=[word for word, _, _ in BAD])
def test_bad_input_is_one_message(digits, tmp_path, word, message, use):
    ranks = 3 if word in ("--data_dir=/nowhere", "--mgrit.cfactor=3", "--replicas=2") else 1
    job = run_job([DRIVER, "--smoke", f"--data_dir={digits}", f"--out={tmp_path / 'run'}", word], ranks, timeout=100)
    assert job.returncode == 2 and job.stdout == "", job.stderr
    errors = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0] and use in errors[0] and "Traceback" not in job.stderr


def updates_in(out) -> int:
    """Number of the last update in a record that is being written."""
    try:
        return max(row.get("update", 0) for row in read(out / "metrics.jsonl"))
    except (OSError, ValueError):
        return 0


def test_killed_and_stopped_on_any_number_of_ranks(digits, tmp_path):
    """Killed on 3 ranks, stopped on 2, killed on 1, and to the end on 2: the undisturbed run."""
    words = ["--variant=dense", "--max_updates=240", "--epochs=24", "--test_every=60", "--checkpoint_every=10"]
    undisturbed, expected = smoke(digits, tmp_path / "undisturbed", 1, *words)
    out = tmp_path / "run"
    for ranks, what, when in ((3, "kill", 35), (2, "usr1", 75), (1, "kill", 115)):
        job = start_job([DRIVER, "--smoke", f"--data_dir={digits}", f"--out={out}", "--resume=auto", *words], ranks)
        try:
            for _ in range(20_000):
                if job.poll() is not None or updates_in(out) >= when:
                    break
                time.sleep(0.005)
            status = json.loads((out / "status.json").read_text())
            assert status["state"] == "running" and status["ranks"] == ranks
            if what == "kill":
                os.kill(status["pid"], signal.SIGKILL)
            else:
                os.kill(job.pid, signal.SIGUSR1)
            ended = finish_job(job, timeout=60)
        finally:
            if job.poll() is None:
                end_job(job)
        newest = max((out / "checkpoints").glob("update_*.h5"))
        if what == "kill":
            assert ended.returncode not in (0, 75) and "Traceback" not in ended.stderr
            assert updates_in(out) - int(newest.stem[7:]) <= 10, "no more is lost than there is between two checkpoints"
        else:
            last = updates_in(out)
            assert ended.returncode == 75, ended.stderr
            assert f"after update {last}; --resume auto goes on from {newest}" in ended.stderr
            assert int(newest.stem[7:]) == last < 240
    last = run_job(["-m", "xbraid_py", "resume", out, "--ranks=2"], timeout=200)
    assert last.returncode == 0, last.stderr
    header, *rows = read(out / "metrics.jsonl")
    assert [row["ranks"] for row in rows if row["kind"] == "resume"] == [2, 1, 2] and header["ranks"] == 3
    told = [{key: row[key] for key in row if key != "seconds"} for row in rows if row["kind"] != "resume"]
    agree(told, expected)
    ends = [job.stdout.splitlines()[-1].split(",")[0] for job in (undisturbed, last)]
    assert ends[0] == ends[1] and ends[0].startswith("test accuracy: ")


def test_an_interrupted_run_keeps_its_record(digits, tmp_path):
    out = tmp_path / "run"
    words = ["--smoke", f"--data_dir={digits}", f"--out={out}", "--epochs=100000", "--max_updates=1000000"]
    job = start_job([DRIVER, *words])
    try:
        for _ in range(20_000):
            if job.poll() is not None or (out / "metrics.jsonl").exists() and len(read(out / "metrics.jsonl")) > 3:
                break
            time.sleep(0.005)
        os.kill(job.pid, signal.SIGINT)
        ended = finish_job(job, timeout=30)
    finally:
        if job.poll() is None:
            end_job(job)
    assert ended.returncode == 130 and "interrupted" in ended.stderr and "Traceback" not in ended.stderr
    assert [row["update"] for row in read(out / "metrics.jsonl")[1:4]] == [1, 2, 3]
