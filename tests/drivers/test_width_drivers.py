"""The drivers of Poisson and Darcy: record, pictures, samples in a folder, ranks, bad input."""

from __future__ import annotations

import runpy

import numpy as np
import pytest
from processes import PROJECT, run_job

from xbraid_py import RunError
from xbraid_py.comm import SerialCommunicator
from xbraid_py.data.darcy_public import FILES
from xbraid_py.multilevel.width.training_options import WidthTrainingOptions
from xbraid_py.recipes.width_networks import WidthNetwork
from xbraid_py.run.record import read

DRIVERS = {name: runpy.run_path(str(PROJECT / "drivers" / f"{name}.py")) for name in ("poisson", "darcy")}


def made(name, **changes):
    """A run in this process; the rows of its record."""
    driver = DRIVERS[name]
    options = driver["SmokeOptions"](**changes)
    driver["setup"](options, SerialCommunicator())()
    return read(options.out / "metrics.jsonl")[1:]


@pytest.mark.job
@pytest.mark.timeout(300)
def test_two_ranks_share_the_minibatches(tmp_path):
    alone = made("poisson", out=tmp_path / "1", dtype="float64", data_dir=tmp_path / "data")
    words = ["--smoke", "--dtype=float64", f"--data_dir={tmp_path / 'data'}", f"--out={tmp_path / '2'}"]
    job = run_job([PROJECT / "drivers" / "poisson.py", *words], 2, timeout=140)
    assert job.returncode == 0, job.stderr
    assert len(list((tmp_path / "data").iterdir())) == 1
    both = read(tmp_path / "2" / "metrics.jsonl")[1:]
    assert len(alone) == len(both) == 10 and both[-1]["final"]
    for one, two in zip(alone, both, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-9)
        assert (two["work"], two["widths"]) == (one["work"], one["widths"])
        assert two.get("val_l2", 0.0) == pytest.approx(one.get("val_l2", 0.0), rel=1e-9)
    assert [row["cycle"] for row in both if "val_l2" in row] == [1, 3, 5, 7, 9, 10]
    assert "validation L2 " in job.stdout.splitlines()[-1] and " after 10 cycles, 140 work units" in job.stdout
    for name in ("errors.png", "sample.png"):
        assert (tmp_path / "2" / "figures" / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", DRIVERS)
@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_both_kinds_of_networks_learn(name, kind, tmp_path):
    network = DRIVERS[name]["SmokeOptions"]().network
    changes = {"standardize": True} if kind == "convolutional" else {}
    network = WidthNetwork(kind=kind, **{k: getattr(network, k) for k in ("widths", "channels", "kernels", "strides")})
    rows = made(name, out=tmp_path, network=network, max_work=84.0, **changes)
    assert rows[-1]["loss"] < rows[0]["loss"] and len(rows[0]["widths"]) == 2
    assert rows[-1]["val_l2"] < 2 * rows[-1]["train_l2"] and rows[-1]["aux_val_linf"] > 0


def test_the_outflow_is_a_number(tmp_path):
    rows = made("darcy", target="flux", out=tmp_path, max_work=28.0)
    assert rows[-1]["final"] and (tmp_path / "figures" / "errors.png").exists()
    assert not (tmp_path / "figures" / "sample.png").exists()


def test_the_public_set(tmp_path):
    random = np.random.default_rng(0)
    for name, (count, n) in zip(FILES, ((30, 6), (5, 6), (5, 12)), strict=True):
        x, y = random.random((count, n, n)) > 0.5, random.random((count, n, n), dtype=np.float32)
        np.savez_compressed(tmp_path / name, x=x, y=y)
    rows = made("darcy", source="public", data_dir=tmp_path, out=tmp_path / "run", max_work=28.0)
    assert rows[-1]["cycle"] == 4 and (tmp_path / "run" / "figures" / "sample.png").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "^batch_size=0 must lie in 1 .. num_train=160; use 200$"),
        ({"max_work": -1.0}, "^max_work=-1.0 must be positive and finite; use 50$"),
        ({"checkpoint_every": 0}, "^checkpoint_every=0 must be at least 1; use 3$"),
    ],
)
@pytest.mark.parametrize("name", DRIVERS)
def test_bad_options(name, changes, message):
    with pytest.raises(ValueError, match=message):
        DRIVERS[name]["SmokeOptions"](**changes)


def test_what_cannot_be_made_is_said_in_one_message(tmp_path):
    convolutional = WidthNetwork(kind="convolutional", channels=(4,), kernels=(13,), strides=(1,))
    with pytest.raises(ValueError, match=r"^kernels=\[13\]: 13 does not fit into 12 x 12 points"):
        made("poisson", out=tmp_path / "a", network=convolutional)
    with pytest.raises(FileNotFoundError, match="darcy_train_16.npz"):
        made("darcy", out=tmp_path / "b", source="public", data_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    training = WidthTrainingOptions(levels=12)
    with pytest.raises(RunError, match="^levels=12: the hidden layers of level "):
        made("poisson", out=tmp_path / "c", training=training, num_train=20, num_val=5)
    assert not (tmp_path / "c" / "metrics.jsonl").exists()
    (tmp_path / "data").mkdir()
    made("poisson", out=tmp_path / "d", data_dir=tmp_path / "data", num_train=20, num_val=5, max_work=14.0)
    (file,) = (tmp_path / "data").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RunError, match="delete it to have the samples generated anew"):
        made("poisson", out=tmp_path / "e", data_dir=tmp_path / "data", num_train=20, num_val=5, max_work=14.0)


def test_more_ranks_than_samples_of_a_minibatch(tmp_path):
    class Many(SerialCommunicator):
        size = 30

    with pytest.raises(ValueError, match="^batch_size=20 is less than one for each of 30 ranks; use 200$"):
        DRIVERS["poisson"]["setup"](DRIVERS["poisson"]["SmokeOptions"](out=tmp_path), Many())
