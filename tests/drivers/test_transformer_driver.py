"""The text driver: what a run leaves, the same on more ranks, how bad input ends; its benchmark."""

from __future__ import annotations

import importlib.util
import json
import math
import re

import pytest
import torch
from kinds import KINDS, options_of, program, run, updates_of
from processes import PROJECT, run_job

from xbraid_py.cli import main
from xbraid_py.comm import SerialCommunicator
from xbraid_py.data import text
from xbraid_py.recipes.adamw import rate
from xbraid_py.run.options import OptionError, parse

pytestmark = pytest.mark.timeout(400)

TEXT = KINDS["text"]
SERIAL = SerialCommunicator()
EIGHT = ("--updates=8", "--validate_every=4", "--checkpoint_every=4")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folder of a run of eight updates on one rank."""
    out = tmp_path_factory.mktemp("text") / "one"
    run(TEXT, SERIAL, out, *EIGHT)
    return out


def test_a_run_leaves_record_picture_and_sample(one):
    rows = updates_of(one)
    assert [row["update"] for row in rows] == list(range(1, 9))
    validated = [row for row in rows if "val_loss" in row]
    assert [row["update"] for row in validated] == [4, 8]
    assert validated[1]["val_loss"] < validated[0]["val_loss"] < math.log(28)
    assert (one / "figures" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert len((one / "sample.txt").read_text()) == 16 + 20
    assert {row["stacks"][0]["mode"] for row in rows} == {"mgrit"}
    assert rows[0]["stacks"][0]["measured"] and rows[0]["stacks"][0]["gradient_error"] < 0.1


@pytest.mark.parametrize("words", [(), ("--replicas=2",)], ids=["layers", "replicas"])
@pytest.mark.ranks(2)
def test_the_same_on_more_ranks(one, spmd, shared_tmp_path, words):
    if words and spmd(lambda comm: comm.size)[0] % 2:
        pytest.skip("two replicas need an even number of ranks")
    spmd(lambda comm: run(TEXT, comm, shared_tmp_path, *EIGHT, *words) and None)
    ours, theirs = updates_of(shared_tmp_path), updates_of(one)
    for name in ("loss", "grad_norm", "val_loss"):
        expected = [row[name] for row in theirs if name in row]
        assert [row[name] for row in ours if name in row] == pytest.approx(expected, rel=2e-4)
    if not words:
        assert (shared_tmp_path / "sample.txt").read_text() == (one / "sample.txt").read_text()


def test_a_network_that_is_exported(one, tmp_path):
    assert main(["export", str(one), str(tmp_path / "net.pt")]) == 0
    model = torch.load(tmp_path / "net.pt", weights_only=False)
    tokens = text.load("generated", 5000, 0).split()[1]
    inputs, targets = text.windows(tokens, 16, 64, 0, 0)
    with torch.no_grad():
        found = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    assert float(found) == pytest.approx(updates_of(one)[-1]["val_loss"], rel=1e-5)


def test_mgrit_and_exact_propagation_have_the_same_losses(one, tmp_path):
    run(TEXT, SERIAL, tmp_path, *EIGHT, "--exact")
    exact = updates_of(tmp_path)
    assert {row["stacks"][0]["mode"] for row in exact} == {"exact"}
    assert [row["loss"] for row in updates_of(one)] == pytest.approx([row["loss"] for row in exact], rel=0.02)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_layer=8"], "unknown option --num_layer; did you mean --num_layers?"),
        (["--checkpoint_every=0"], "checkpoint_every=0 must be at least 1; use 5"),
        (["--updates=0"], "updates=0 must be at least 1; use 10"),
        (["--warmup=-1"], "warmup=-1 must be at least 0; use 10"),
        (["--learning_rate=-1"], "learning_rate=-1.0 must be positive and finite; use 0.003"),
        (["--dropout=1.5"], "dropout=1.5 must be at least 0 and below 1; use 0.1"),
        (["--weight_decay=-1"], "weight_decay=-1.0 must be at least 0 and finite; use 0.01"),
        (["--batch_size=2", "--replicas=3"], "batch_size=2 is less than replicas=3; use 3"),
    ],
)
def test_wrong_options_are_refused(words, message):
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        parse(program("transformer").Options, words)


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--replicas=2", "replicas=2 does not divide the 1 rank(s); use 1"),
        ("--source=no_file.txt", "no_file.txt is no file; use source='python', source='generated' or a text file"),
        ("--num_layers=18", "num_layers=18 is not a multiple of cfactor=4; use 16 or 20"),
        ("--heads=3", "heads=3 must be at least 1 and divide width=8; use 2"),
        (
            "--context=5000",
            "context=5000 must be less than the 500 characters there are for validation; use 250",
        ),
    ],
)
def test_bad_input_is_found_before_anything_is_written(tmp_path, word, message):
    options = options_of(TEXT, tmp_path / "out", word)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        program("transformer").setup(options, SERIAL)
    assert not (tmp_path / "out").exists()


def test_event_files_need_their_package(tmp_path, monkeypatch):
    options = options_of(TEXT, tmp_path / "out", "--tensorboard")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'xbraid_py\[tensorboard\]'"):
        program("transformer").setup(options, SERIAL)
    assert not (tmp_path / "out").exists()


def test_the_learning_rate_rises_and_falls_to_a_tenth():
    make = program("transformer").Options
    options = make(updates=100, warmup=10)
    rates = [rate(options, update) for update in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 11 for k in range(10)])
    assert rates[10] == 1.0 == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.101
    assert rate(make(updates=1, warmup=0), 0) == 1.0


def test_the_default_network_is_deep():
    assert program("transformer").Options().num_layers >= 32


@pytest.mark.job
@pytest.mark.long
def test_the_benchmark_runs():
    words = ["--updates=10", "--", "--smoke"]
    job = run_job([PROJECT / "benchmarks" / "transformer.py", *words], timeout=400)
    assert job.returncode == 0, job.stderr
    found = json.loads(job.stdout.splitlines()[-1])
    figures = found["figures"]
    assert found["benchmark"] == "transformer"
    names = {"loss_deviation", "loss_deviation_training", "loss_deviation_validation", "forward", "adjoint"}
    assert figures.keys() == names | {"gradient_error", "gradient_error_measured", "exact_updates"}
    assert 0 < figures["loss_deviation"] < 0.02 and figures["forward"] > 1


def test_the_deviation_is_the_largest_after_the_first_tenth(monkeypatch):
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    path = PROJECT / "benchmarks" / "transformer.py"
    spec = importlib.util.spec_from_file_location("benchmarks_transformer", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    exact = {n: 2.0 for n in range(1, 21)}
    assert benchmark.deviation(exact | {2: 3.0}, exact) == 0.0
    assert benchmark.deviation(exact | {3: 2.2, 9: 1.7}, exact) == pytest.approx(0.15)
    rows = [{"kind": "update", "loss": float(n)} for n in range(30)]
    smooth = benchmark.curve(rows, "training")
    assert smooth[1] == 0.0 and smooth[3] == 1.0 and smooth[30] == 19.5
