"""MNIST by MG/OPT: images as columns, and the driver from the outside, on small files of random images."""

from __future__ import annotations

import runpy

import pytest
import torch
from digit_files import write_digits
from mgopt_runs import last, mgopt
from processes import PROJECT
from small_runs import gathered, same_bits
from xbraid_py.multilevel.depth.mgopt_state import NAME, read_cycle, save_cycle

from xbraid_py.comm import SerialCommunicator
from xbraid_py.data import mnist
from xbraid_py.data.mnist import columns
from xbraid_py.run.record import read
from xbraid_py.run.store.keep import CheckpointStore
from xbraid_py.run.store.write import CheckpointError, Shard
from xbraid_py.testing import run_threads

DRIVER = PROJECT / "drivers" / "mgopt_mnist.py"
SLOW = ["--mgopt.optim.learning_rate=[0.003]"]  # these images are learnt in two cycles otherwise


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return write_digits(tmp_path_factory.mktemp("digits"), 200, 103)


def literal(images, scaling, train):
    """Columns by hand, in double precision."""
    pixels = images.double().flatten(1).T / 255
    if scaling == "centered":
        pixels = pixels - (train.double() / 255).flatten(1).mean(0)[:, None]
    return (pixels - mnist.MEAN) / mnist.STANDARD_DEVIATION if scaling == "standard" else pixels


@pytest.mark.parametrize("scaling", ["centered", "unit", "standard"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_columns(digits, scaling, dtype):
    data = mnist.load(digits)
    train, test = columns(data, scaling, dtype, num_train=150)
    assert (len(train), len(test)) == (150, 103)
    for half, images, labels in ((train, data.train_images, data.train_labels), (test, data.test_images, None)):
        features, found = half.samples()
        assert features.dtype == dtype and features.is_contiguous()
        expected = literal(images[: len(half)], scaling, data.train_images)
        torch.testing.assert_close(features.double(), expected, rtol=1e-5, atol=2e-6)
        assert labels is None or torch.equal(found, labels[:150])
    which = torch.tensor([7, 3])
    assert torch.equal(train.samples(which)[0], train.samples()[0][:, which])
    assert torch.equal(train.samples(which)[1], train.labels[which])
    portions = train.portions(40)
    assert [len(labels) for _, labels in portions] == [38, 38, 37, 37]
    assert torch.equal(torch.cat([features for features, _ in portions], 1), train.samples()[0])


def test_wrong_columns_are_refused(digits):
    data = mnist.load(digits)
    with pytest.raises(ValueError, match="^scaling='raw' must be centered or unit or standard; use centered$"):
        columns(data, "raw")
    with pytest.raises(ValueError, match=r"^num_test=104 must lie in 1 .. 103, the images there are; use 103$"):
        columns(data, num_test=104)


def smoke(run_job, digits, out, ranks, *words):
    """A job of seconds, and its rows without the clock."""
    # No order of sums differs between numbers of ranks but for the messages: double precision shows it.
    words = ["--smoke", "--dtype=float64", f"--data_dir={digits}", f"--out={out}", *SLOW, *words]
    job = run_job([DRIVER, *words], ranks, timeout=140)
    assert job.returncode == 0, job.stderr
    return job, [{k: v for k, v in row.items() if k != "seconds"} for row in read(out / "metrics.jsonl")[1:]]


def agree(found, expected):
    """Whether two records tell the same."""
    found, expected = ([row for row in rows if row["kind"] == "update"] for rows in (found, expected))
    assert [row["update"] for row in found] == [row["update"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row["objective"] == pytest.approx(other["objective"], rel=1e-9)
        assert row["counted_work"] == pytest.approx(other["counted_work"], rel=1e-12)
        assert row["train_accuracy"] == pytest.approx(other["train_accuracy"])
        for name in ("work", "gradients", "val_accuracy"):
            assert row[name] == other[name], name


@pytest.mark.job
@pytest.mark.timeout(300)
def test_goes_on_on_more_ranks_where_it_was(run_job, digits, tmp_path):
    job, expected = smoke(run_job, digits, tmp_path / "whole", 1)
    assert [row["update"] for row in expected] == list(range(13))
    assert [row["val_accuracy"] is None for row in expected] == [bool(k % 2) for k in range(13)]
    last = expected[-1]
    assert last["final"] and last["val_accuracy"] > 0.2 > expected[0]["val_accuracy"] and last["work"] == 60.0
    line = f"validation accuracy {100 * last['val_accuracy']:.2f} %, not the goal, after 12 cycles, 60.0 work units"
    assert line in job.stdout
    out = tmp_path / "parts"
    smoke(run_job, digits, out, 1, "--max_cycles=5")
    _, found = smoke(run_job, digits, out, 2, "--resume=auto")
    # The first part made a validation at its end, cycle 5, that the whole run did not.
    assert found[5]["val_accuracy"] is not None and found[5]["final"]
    found[5]["val_accuracy"] = None
    agree(found, expected)
    assert (out / "figures" / "cycles.png").stat().st_size > 0 and (out / "checkpoints" / "mgopt" / "best.h5").exists()
    job, _ = smoke(run_job, digits, out, 1, "--resume=auto")
    assert "is finished" in job.stdout


@pytest.mark.job
@pytest.mark.timeout(300)
def test_all_images_in_portions_and_a_goal(run_job, digits, tmp_path):
    words = ["--batch_size=0", "--goal=0.3", "--validate_every=1", "--max_cycles=40"]
    whole, parts = (
        smoke(run_job, digits, tmp_path / f"{portion}", 1, *words, f"--portion={portion}")[1] for portion in (200, 70)
    )
    agree(parts, whole)
    assert whole[-1]["reached"] and whole[-1]["final"] and whole[-1]["update"] < 40
    assert whole[-1]["val_accuracy"] >= 0.3 > whole[-2]["val_accuracy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": -1}, "^batch_size=-1 must be at least 0; use 1000, or 0 for all images$"),
        ({"batch_size": 1000}, "^batch_size=1000 is more than num_samples=200"),
        ({"num_layers": 20}, r"^num_layers=20 is not a multiple of 2\^\(levels - 1\)=8; use 16 or 24$"),
        ({"goal": 1.5}, "^goal=1.5 must be above 0 and at most 1; use 0.93$"),
    ],
)
def test_bad_options(digits, changes, message):
    driver = runpy.run_path(str(DRIVER))
    with pytest.raises(ValueError, match=message):
        driver["configured"](driver["SmokeOptions"](data_dir=digits, **changes), SerialCommunicator())


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("readers", [1, 2])
def test_checkpoints_are_read_on_other_numbers_of_ranks(spmd, shared_tmp_path, readers):
    configuration = {"beta": 1.0, "out": "here"}

    def write(comm):
        run = mgopt(comm, num_layers=32)
        record = last(run, 2)
        save_cycle(
            CheckpointStore(shared_tmp_path / "checkpoints" / NAME), run.network, run.x, record, False, configuration
        )
        return record, gathered(run.network, run.x)

    def take(comm):
        network = mgopt(comm, num_layers=32).network
        state = read_cycle("auto", shared_tmp_path, network, configuration | {"out": "there"}, ("out",))
        return state.record, state.next_record, state.is_final, gathered(network, state.x)

    record, weights = spmd(write)[0]
    for found in run_threads(readers, take):
        assert found[:3] == (record, 3, False) and same_bits(found[3], weights)


def test_checkpoints_of_something_else_are_refused(tmp_path):
    run = mgopt(num_layers=32)
    assert read_cycle("auto", tmp_path, run.network, {}, ()) is None
    assert read_cycle(None, tmp_path, run.network, {}, ()) is None
    path = save_cycle(CheckpointStore(tmp_path), run.network, run.x, last(run, 1), False, {"beta": 1.0})
    with pytest.raises(CheckpointError, match="was written with beta=1.0, but this run has beta=2.0"):
        read_cycle(str(path), tmp_path, run.network, {"beta": 2.0}, ())
    with pytest.raises(CheckpointError, match="32 rows or vectors where this run has 16"):
        read_cycle(str(path), tmp_path, mgopt(num_layers=16).network, {"beta": 1.0}, ())
    meta = {"run": "nested", "configuration": {}}
    foreign = CheckpointStore(tmp_path / "other").save(run.network.comm, 1, {"a": Shard(run.x, 0, len(run.x))}, meta)
    with pytest.raises(CheckpointError, match="its run is 'nested', not mgopt"):
        read_cycle(str(foreign), tmp_path, run.network, {}, ())
