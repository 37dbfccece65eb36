"""The driver on sequences from the outside, on small files of random digits; digits as sequences; its benchmark."""

from __future__ import annotations

import importlib.util
import json
import sys

import numpy as np
import pytest
import torch
from digit_files import write_digits
from processes import PROJECT, run_job

from xbraid_py.data.mnist import sequences, standardized
from xbraid_py.run.record import read

DRIVER = PROJECT / "drivers" / "sequences.py"
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), 200, 103)


@pytest.fixture(scope="module")
def driver():
    spec = importlib.util.spec_from_file_location("drivers_sequences", DRIVER)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def smoke(digits, out, ranks, *words):
    """A job of seconds, and its rows without the clock."""
    job = run_job([DRIVER, "--smoke", f"--data_dir={digits}", f"--out={out}", *words], ranks, timeout=200)
    assert job.returncode == 0, job.stderr
    _, *rows = read(out / "metrics.jsonl")
    return job, [{key: row[key] for key in row if key != "seconds"} for row in rows if row["kind"] != "resume"]


def losses(rows):
    return [row["loss"] for row in rows if row["kind"] == "update"]


@pytest.mark.job
@pytest.mark.timeout(400)
def test_the_same_on_one_and_three_ranks_and_after_a_stop(digits, tmp_path):
    words = ("--length=61", "--num_layers=2", "--windows=2", "--kind=implicit", "--mgrit.intervals=4")
    one, expected = smoke(digits, tmp_path / "one", 1, *words)
    _, found = smoke(digits, tmp_path / "three", 3, *words)
    assert losses(found) == pytest.approx(losses(expected), rel=1e-6) and len(losses(found)) == 8
    assert found[-1]["test_accuracy"] == expected[-1]["test_accuracy"] and found[-1]["sweeps"] >= 1
    assert one.stdout.splitlines()[-1].startswith(f"test accuracy: {100 * found[-1]['test_accuracy']:.2f} %, ")
    assert (tmp_path / "three" / "figures" / "training.png").stat().st_size > 1000
    # On from the checkpoint in the middle, on other ranks.
    out = tmp_path / "three"
    checkpoint = out / "checkpoints" / "update_000004.h5"
    again = smoke(digits, out, 2, *words, f"--resume={checkpoint}")[1]
    assert losses(again) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.job
@pytest.mark.timeout(400)
def test_converged_solves_train_as_torch_does(digits, tmp_path):
    theirs = smoke(digits, tmp_path / "torch", 1, "--network=torch")[1]
    ours = smoke(digits, tmp_path / "mgrit", 2, "--mgrit.tol=1e-6")[1]
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-4)


@pytest.mark.job
@pytest.mark.timeout(400)
def test_it_learns(digits, tmp_path):
    words = ("--max_updates=60", "--epochs=6", "--learning_rate=0.02", "--test_every=30")
    rows = smoke(digits, tmp_path / "run", 1, *words)[1]
    tests = [row for row in rows if row["kind"] == "test"]
    assert [row["update"] for row in tests] == [30, 60] and tests[-1]["test_accuracy"] > 0.5


@pytest.mark.job
@pytest.mark.timeout(200)
def test_bad_input_is_one_message_on_all_ranks(digits, tmp_path):
    words = ["--smoke", f"--data_dir={digits}", f"--out={tmp_path / 'run'}", "--windows=0"]
    job = run_job([DRIVER, *words], 2, timeout=100)
    assert job.returncode == 2 and job.stdout == "", job.stderr
    errors = [line for line in job.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "windows=0 must be a whole number, at least 1; use 1" in errors[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "length=1 must be at least 2; use 128"),
        ({"epochs": 0}, "epochs=0 must be at least 1; use 10"),
        ({"clip": 0.0}, "clip=0.0 must be positive and finite; use 1.0"),
        ({"network": "torch", "kind": "implicit"}, "network='torch' has kind=plain and dt=1.0 only"),
    ],
)
def test_bad_options_are_refused(driver, changes, message):
    with pytest.raises(ValueError, match=message):
        driver.Options(**changes)


def test_both_networks_begin_alike(driver):
    ours, theirs = (driver.Classifier(driver.SmokeOptions(network=name), None) for name in ("parallel", "torch"))
    state = ours.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in theirs.state_dict().items())


# ---- Digits as sequences


def test_images_are_read_in_three_orders():
    pixels = standardized(IMAGES)[:, 0]
    for k in range(3):
        assert torch.equal(sequences(IMAGES)[k, 5], pixels[k, 5])
        assert torch.equal(sequences(IMAGES, "columns")[k, 5], pixels[k, :, 5])
        assert sequences(IMAGES, "pixels")[k, 28 * 5 + 3] == pixels[k, 5, 3]
    assert sequences(IMAGES, dtype=torch.float64).dtype == torch.float64


@pytest.mark.parametrize(("order", "steps"), [("rows", 28), ("columns", 28), ("pixels", 784)])
@pytest.mark.parametrize("length", [2, 28, 55, 128, 784, 1000])
def test_sequences_are_resampled_to_any_length(order, steps, length):
    found, original = sequences(IMAGES, order, length, torch.float64), sequences(IMAGES, order, None, torch.float64)
    assert found.shape == (3, length, original.shape[2]) and original.shape[1] == steps
    times = np.linspace(0, steps - 1, length)
    for feature in {0, original.shape[2] - 1}:
        wanted = np.interp(times, np.arange(steps), original[1, :, feature].numpy())
        assert np.allclose(found[1, :, feature].numpy(), wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("words", "message"),
    [(("diagonal",), "order='diagonal' must be rows or columns or pixels"), (("rows", 1), "length=1 must be at least")],
)
def test_other_orders_and_lengths_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        sequences(IMAGES, *words)


# ---- The benchmark


@pytest.mark.job
@pytest.mark.timeout(300)
def test_the_benchmark_runs(digits):
    words = ["--lengths=64", "--ranks=2", "--windows=1,4", "--rounds=1", "--updates=3", "--networks=plain"]
    words.append(f"--data_dir={digits}")
    done = run_job([PROJECT / "benchmarks" / "sequences.py", "--quick", *words], timeout=250)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == "sequences"
    figures = found["figures"]
    assert {"ratio_64_2", "implicit_64_2", "sweeps_64", "error_64", "accuracy_plain"} <= figures.keys()
    assert {"window_seconds_4", "window_memory_4"} <= figures.keys() and 0 < figures["error_64"] < 0.1
    assert all(np.isfinite(value) for value in figures.values())
