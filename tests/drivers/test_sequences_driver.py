"""The driver on sequences: the same on more ranks and as torch's; digits as sequences; its benchmark."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from digit_files import write_digits
from kinds import KINDS, options_of, program, run, updates_of
from processes import PROJECT, run_job

from xbraid_py.comm import SerialCommunicator
from xbraid_py.data.mnist import sequences, standardized
from xbraid_py.recipes.sequences import build

SEQUENCES = KINDS["sequences"]
SERIAL = SerialCommunicator()
IMAGES = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 28, 28), dtype=np.uint8))


def losses(out):
    return [row["loss"] for row in updates_of(out)]


@pytest.mark.ranks(3)
def test_the_same_on_one_and_three_ranks(spmd, shared_tmp_path, tmp_path):
    """Implicit, in two layers and windows, and of a length that nothing divides; on from the middle on one rank."""
    words = ("--length=61", "--num_layers=2", "--kind=implicit", "--mgrit.intervals=4", "--max_updates=8")
    one, three, rest = tmp_path / "one", shared_tmp_path / "three", tmp_path / "rest"
    run(SEQUENCES, SERIAL, one, *words, "--windows=2")
    spmd(lambda comm: run(SEQUENCES, comm, three, *words, "--windows=2") and None)
    found, expected = updates_of(three)[-1], updates_of(one)[-1]
    assert losses(three) == pytest.approx(losses(one), rel=1e-6) and len(losses(one)) == 8
    assert found["val_accuracy"] == expected["val_accuracy"]
    assert found["sweeps"] >= 1 and found["adjoint_sweeps"] >= 1 and 0 < found["state_residual"] < 0.1
    run(SEQUENCES, SERIAL, rest, *words, "--windows=2", f"--resume={three / 'checkpoints' / 'update_000004.h5'}")
    assert losses(rest) == pytest.approx(losses(one)[4:], rel=1e-5)


@pytest.mark.ranks(2)
def test_converged_solves_train_as_torch_does(spmd, shared_tmp_path, tmp_path):
    run(SEQUENCES, SERIAL, tmp_path / "torch", "--network=torch")
    spmd(lambda comm: run(SEQUENCES, comm, shared_tmp_path / "mgrit", "--mgrit.tol=1e-6") and None)
    assert losses(shared_tmp_path / "mgrit") == pytest.approx(losses(tmp_path / "torch"), rel=1e-4)
    assert "sweeps" not in updates_of(tmp_path / "torch")[-1]


def test_it_learns(tmp_path):
    words = ("--max_updates=60", "--epochs=6", "--learning_rate=0.02", "--validate_every=30", "--checkpoint_every=100")
    run(SEQUENCES, SERIAL, tmp_path, *words)
    validated = [row for row in updates_of(tmp_path) if "val_accuracy" in row]
    assert [row["update"] for row in validated] == [30, 60] and validated[-1]["val_accuracy"] > 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"length": 1}, "length=1 must be at least 2; use 128"),
        ({"epochs": 0}, "epochs=0 must be at least 1; use 10"),
        ({"clip": 0.0}, "clip=0.0 must be positive and finite; use 1.0"),
        ({"network": "torch", "kind": "implicit"}, "network='torch' has kind=plain and dt=1.0 only"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        program("sequences").Options(**changes)


def test_what_the_network_refuses_is_found_in_the_set_up(tmp_path):
    with pytest.raises(ValueError, match="windows=0 must be a whole number, at least 1; use 1"):
        program("sequences").setup(options_of(SEQUENCES, tmp_path / "out", "--windows=0"), SERIAL)


def test_both_networks_begin_alike(tmp_path):
    options = options_of(SEQUENCES, tmp_path)
    ours, theirs = (build(replace(options, network=name), None) for name in ("parallel", "torch"))
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
@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_benchmark_runs(tmp_path):
    words = ["--lengths=64", "--ranks=2", "--windows=1,4", "--rounds=1", "--updates=3", "--networks=plain"]
    words.append(f"--data_dir={write_digits(tmp_path, 200, 103)}")
    done = run_job([PROJECT / "benchmarks" / "sequences.py", "--quick", *words], timeout=250)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["benchmark"] == "sequences"
    figures = found["figures"]
    assert {"ratio_64_2", "implicit_64_2", "lstm_64_2", "sweeps_64", "error_64", "accuracy_plain"} <= figures.keys()
    assert 0.8 < figures["told_64"] < 1.2  # samples and weights are those of the measurement
    assert {"window_seconds_4", "window_memory_4"} <= figures.keys() and 0 < figures["error_64"] < 0.1
    assert all(np.isfinite(value) for value in figures.values())
