"""The MNIST driver: the same on more ranks and replicas, that it learns, and how bad input ends."""

from __future__ import annotations

import re

import pytest
from kinds import KINDS, options_of, program, run, updates_of

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.options import OptionError

DIGITS = KINDS["digits"]
SERIAL = SerialCommunicator()


@pytest.mark.parametrize("variant", ["conv", "dense"])
@pytest.mark.ranks(3)
def test_the_same_on_one_and_three_ranks(spmd, shared_tmp_path, tmp_path, variant):
    """Losses to 1e-6; single precision leaves residuals a digit or two."""
    words = (f"--variant={variant}", "--max_updates=8")
    spmd(lambda comm: run(DIGITS, comm, shared_tmp_path / "three", *words) and None)
    run(DIGITS, SERIAL, tmp_path / "one", *words)
    found, expected = updates_of(shared_tmp_path / "three"), updates_of(tmp_path / "one")
    assert [row["update"] for row in found] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert found[0]["stacks"][0]["mode"] == "mgrit" and found[0]["stacks"][0]["measured"]
    for row, other in zip(found, expected, strict=True):
        assert row.get("val_accuracy") == other.get("val_accuracy")
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-6)
        (mine,), (its,) = row["stacks"], other["stacks"]
        for name in ("mode", "level", "iterations", "adjoint_iterations", "measured"):
            assert mine[name] == its[name], name
        assert mine["adjoint_residual"] == pytest.approx(its["adjoint_residual"], rel=1e-2)


@pytest.mark.ranks(4)
def test_two_replicas_and_exact_propagation_are_near(spmd, shared_tmp_path, tmp_path):
    # Adam divides gradients by their size, so what rounding has left of a vanishing one counts: 1e-4.
    def body(comm):
        replicas = f"--replicas={comm.size if comm.size % 2 else 2}"
        run(DIGITS, comm, shared_tmp_path / "replicas", replicas, "--exact")

    spmd(body)
    run(DIGITS, SERIAL, tmp_path / "exact", "--exact")
    exact, replicas = updates_of(tmp_path / "exact"), updates_of(shared_tmp_path / "replicas")
    assert [row["loss"] for row in replicas] == pytest.approx([row["loss"] for row in exact], rel=1e-4)
    assert {row["stacks"][0]["mode"] for row in replicas} == {"exact"}


def test_it_learns(tmp_path):
    words = ("--max_updates=40", "--epochs=4", "--learning_rate=0.01", "--validate_every=10", "--checkpoint_every=100")
    run(DIGITS, SERIAL, tmp_path, *words)
    validated = [row for row in updates_of(tmp_path) if "val_accuracy" in row]
    assert [row["update"] for row in validated] == [10, 20, 30, 40] and validated[-1]["val_accuracy"] > 0.5


BAD = [
    ("--data_dir=/nowhere", "train-images-idx3-ubyte", "--data_dir FOLDER"),
    ("--mgrit.cfactor=3", "num_layers=8 is not a multiple of cfactor=3; use 6 or 9", ""),
    ("--replicas=2", "replicas=2 does not divide the 1 rank(s)", "use 1"),
    ("--varant=conv", "unknown option --varant; did you mean --variant?", ""),
    ("--learning_rate=0", "learning_rate=0.0 must be positive and finite; use 0.005", ""),
    ("--epochs=0", "epochs=0 must be at least 1; use 10", ""),
    ("--width=0", "width=0 must be at least 1; use 10", ""),
    ("--resume=/nowhere.h5", "checkpoint /nowhere.h5: No such file or directory", "--resume auto"),
    ("--batch_size=500", "batch_size=500 is more than num_samples=200", ""),
]


@pytest.mark.parametrize(("word", "message", "use"), BAD, ids=[word for word, _, _ in BAD])
def test_bad_input_is_refused_in_the_set_up(tmp_path, word, message, use):
    with pytest.raises((ValueError, OSError, OptionError), match=f"{re.escape(message)}.*{re.escape(use)}"):
        program("mnist").setup(options_of(DIGITS, tmp_path / "out", word), SERIAL)
    assert not (tmp_path / "out" / "metrics.jsonl").exists()
