"""The drivers of Poisson and Darcy: record, pictures, samples in a folder, ranks, bad input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kinds import program

from xbraid_py import RunError
from xbraid_py.comm import SerialCommunicator
from xbraid_py.data.darcy import FILES
from xbraid_py.recipes import network
from xbraid_py.run.options import OptionError, parse
from xbraid_py.run.record import read
from xbraid_py.run.store.read import load, numbered

DRIVERS = ("poisson", "darcy")


def options_of(name, *words):
    driver = program(name)
    return parse(driver.Options, ["--smoke", *words], presets=driver.PRESETS)


def made(name, out, *words):
    """A run in this process; the rows of its record."""
    program(name).setup(options_of(name, f"--out={out}", *words), SerialCommunicator())()
    return [row for row in read(out / "metrics.jsonl") if row["kind"] == "update"]


@pytest.mark.parametrize("name", DRIVERS)
@pytest.mark.parametrize("kind", ["dense", "convolutional"])
def test_both_kinds_of_networks_learn(name, kind, tmp_path):
    words = ["--standardize"] if kind == "convolutional" else []
    rows = made(name, tmp_path, f"--network.kind={kind}", "--max_work=84", *words)
    assert rows[-1]["loss"] < rows[0]["loss"] and len(rows[0]["widths"]) == 2
    assert rows[-1]["val_l2"] < 2 * rows[-1]["train_l2"] and rows[-1]["aux_val_linf"] > 0


def test_a_run_goes_on_for_more_work(tmp_path, capsys):
    """A run that was over is not, if it may do more; its best errors are those of both parts."""
    first = made("darcy", tmp_path / "a", "--max_work=28")
    more = made("darcy", tmp_path / "a", "--max_work=56", "--resume=auto")
    assert [row["update"] for row in more] == list(range(1, 9)) and first == more[:4]
    best = min(row["val_l2"] for row in more if "val_l2" in row)
    assert f"(best {best:.3e})" in capsys.readouterr().out.splitlines()[-1]
    made("darcy", tmp_path / "a", "--max_work=14", "--resume=auto")
    assert "is finished" in (said := capsys.readouterr().out) and f"(best {best:.3e})" in said


def test_the_outflow_is_a_number(tmp_path):
    rows = made("darcy", tmp_path, "--target=flux", "--max_work=28")
    assert rows[-1]["final"] and (tmp_path / "figures" / "errors.png").exists()
    assert not (tmp_path / "figures" / "sample.png").exists()


def test_the_public_set(tmp_path):
    random = np.random.default_rng(0)
    for name, (count, n) in zip(FILES, ((30, 6), (5, 6), (5, 12)), strict=True):
        x, y = random.random((count, n, n)) > 0.5, random.random((count, n, n), dtype=np.float32)
        np.savez_compressed(tmp_path / name, x=x, y=y)
    words = ["--source=public", f"--data_dir={tmp_path}", "--max_work=28"]
    rows = made("darcy", tmp_path / "run", *words)
    assert rows[-1]["cycle"] == 4 and (tmp_path / "run" / "figures" / "sample.png").exists()
    # The network can be made again from the checkpoint alone.
    _, validation = options_of("darcy", *words).samples.load()
    (path,) = (path for number, path in numbered(tmp_path / "run" / "checkpoints") if number == 4)
    with load(path) as checkpoint, torch.no_grad():
        error = network(checkpoint)(validation.inputs) - validation.targets.flatten(1)
    assert float(error.double().square().mean()) == pytest.approx(rows[-1]["val_l2"], rel=1e-6)


@pytest.mark.parametrize("name", DRIVERS)
def test_bad_options(name):
    for word, message in (
        ("--batch_size=0", "^batch_size=0 must lie in 1 .. num_train=160; use 200$"),
        ("--max_work=-1", "^max_work=-1.0 must be positive and finite; use 50$"),
    ):
        with pytest.raises(OptionError, match=message):
            options_of(name, word)


def test_what_cannot_be_made_is_said_in_one_message(tmp_path):
    words = ["--network.kind=convolutional", "--network.channels=4", "--network.kernels=13", "--network.strides=1"]
    with pytest.raises(ValueError, match=r"^kernels=\[13\]: 13 does not fit into 12 x 12 points"):
        made("poisson", tmp_path / "a", *words)
    with pytest.raises(FileNotFoundError, match="darcy_train_16.npz"):
        made("darcy", tmp_path / "b", "--source=public", f"--data_dir={tmp_path}")
    assert not list(tmp_path.iterdir())
    few = ["--num_train=20", "--num_val=5", "--max_work=14", f"--data_dir={tmp_path / 'data'}"]
    with pytest.raises(RunError, match="^levels=12: the hidden layers of level "):
        made("poisson", tmp_path / "c", "--training.levels=12", *few)
    assert not (tmp_path / "c" / "metrics.jsonl").exists()
    (file,) = (tmp_path / "data").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(RunError, match="delete it to have the samples generated anew"):
        made("poisson", tmp_path / "e", *few)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["poisson", "darcy"])
def test_a_gpu_that_is_not_there(name, tmp_path):
    with pytest.raises(ValueError, match="^device=cuda: PyTorch finds no such device here; use cpu$"):
        made(name, tmp_path / "out", "--device=cuda")
    assert not list(tmp_path.iterdir())


def test_more_ranks_than_samples_of_a_minibatch(tmp_path):
    class Many(SerialCommunicator):
        size = 30

    with pytest.raises(ValueError, match="^batch_size=20 is less than one for each of 30 ranks; use 200$"):
        program("poisson").setup(options_of("poisson", f"--out={tmp_path}"), Many())
