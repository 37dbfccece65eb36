"""The text driver from the outside: what a run leaves, the same on more ranks, how bad input ends; its benchmark."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shutil
import sys

import pytest
import torch
import yaml
from processes import PROJECT, run_job

from xbraid_py.cli import main
from xbraid_py.comm import SerialCommunicator
from xbraid_py.data import text
from xbraid_py.run.options import OptionError, parse
from xbraid_py.run.record import read

# The first test starts all jobs.
pytestmark = pytest.mark.timeout(900)

DRIVER = PROJECT / "drivers" / "transformer.py"


def module_of(path):
    """A script as a module."""
    name = f"{path.parent.name}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def driver():
    return module_of(DRIVER)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """Folders and last lines of smoke runs: on one rank, on 3, on 2 replicas, and exact."""
    folder = tmp_path_factory.mktemp("text")
    cases = {
        "one": (1, []),
        "three": (3, ["--tensorboard"] if importlib.util.find_spec("tensorboard") else []),
        "replicas": (2, ["--replicas=2"]),
        "exact": (1, ["--exact"]),
    }
    found = {}
    for name, (ranks, words) in cases.items():
        job = run_job([DRIVER, "--smoke", f"--out={folder / name}", *words], ranks=ranks, timeout=200)
        assert job.returncode == 0, job.stderr
        found[name] = (folder / name, job.stdout.splitlines()[-1])
    return found


def rows_of(smoke, name, kind):
    return [row for row in read(smoke[name][0] / "metrics.jsonl") if row["kind"] == kind]


@pytest.mark.job
@pytest.mark.parametrize("name", ["one", "three", "replicas", "exact"])
def test_a_smoke_run_leaves_record_picture_and_sample(smoke, name):
    out, last = smoke[name]
    updates, tests = rows_of(smoke, name, "update"), rows_of(smoke, name, "test")
    assert [row["update"] for row in updates] == list(range(1, 9))
    assert [row["update"] for row in tests] == [4, 8]
    reached = tests[-1]["validation_loss"]
    assert re.fullmatch(
        rf"validation loss: {reached:.4f} nats per character \(entropy rate 0\.\d+\), .* seconds .*", last
    )
    assert reached < tests[0]["validation_loss"] < math.log(28)
    assert (out / "figures" / "training.png").read_bytes().startswith(b"\x89PNG")
    assert len((out / "sample.txt").read_text()) == 16 + 20
    written = yaml.safe_load((out / "config.yaml").read_text())
    assert written["num_layers"] == 16 and written["exact"] is (name == "exact")
    assert {row["stacks"][0]["mode"] for row in updates} == {"exact" if name == "exact" else "mgrit"}
    if name != "exact":
        assert updates[0]["stacks"][0]["measured"] and updates[0]["stacks"][0]["gradient_error"] < 0.1


@pytest.mark.job
@pytest.mark.parametrize("name", ["three", "replicas"])
def test_a_smoke_run_is_the_same_on_more_ranks(smoke, name):
    for kind, value in (("update", "loss"), ("update", "grad_norm"), ("test", "validation_loss")):
        ours = [row[value] for row in rows_of(smoke, name, kind)]
        assert ours == pytest.approx([row[value] for row in rows_of(smoke, "one", kind)], rel=2e-4)
    if name == "three":
        samples = [(smoke[each][0] / "sample.txt").read_text() for each in ("one", name)]
        assert samples[0] == samples[1]


@pytest.mark.job
def test_event_files_beside_the_record(smoke):
    pytest.importorskip("tensorboard", reason="needs tensorboard: pip install 'xbraid_py[tensorboard]'")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(smoke["three"][0] / "tensorboard"))
    events.Reload()
    for kind, name in (("update", "loss"), ("test", "validation_loss")):
        expected = [(row["update"], pytest.approx(row[name], rel=1e-6)) for row in rows_of(smoke, "three", kind)]
        assert [(event.step, event.value) for event in events.Scalars(name)] == expected
    assert not (smoke["one"][0] / "tensorboard").exists()


@pytest.mark.job
def test_a_run_goes_on_and_is_exported(smoke, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(smoke["three"][0], out)
    for path in (out / "checkpoints").glob("*.h5"):
        if path.name != "update_000004.h5":
            path.unlink()
    for name in ("status.json", "sample.txt"):
        (out / name).unlink()
    job = run_job(["-m", "xbraid_py", "resume", out, "--ranks=2"], timeout=200)
    assert job.returncode == 0, job.stderr
    assert job.stdout.splitlines()[-1].split(",")[0] == smoke["one"][1].split(",")[0]
    losses = [row["loss"] for row in read(out / "metrics.jsonl") if row["kind"] == "update"]
    assert losses == pytest.approx([row["loss"] for row in rows_of(smoke, "one", "update")], rel=2e-4)
    assert (out / "sample.txt").read_text() == (smoke["one"][0] / "sample.txt").read_text()
    assert main(["export", str(out), str(tmp_path / "net.pt")]) == 0
    model = torch.load(tmp_path / "net.pt", weights_only=False)
    tokens = text.load("generated", 5000, 0).split()[1]
    inputs, targets = text.windows(tokens, 16, 64, 0, 0)
    with torch.no_grad():
        found = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
    tested = [row for row in read(out / "metrics.jsonl") if row["kind"] == "test"][-1]
    assert float(found) == pytest.approx(tested["validation_loss"], rel=1e-5)


@pytest.mark.job
def test_mgrit_and_exact_propagation_have_the_same_losses(smoke):
    ours = [row["loss"] for row in rows_of(smoke, "one", "update")]
    exact = [row["loss"] for row in rows_of(smoke, "exact", "update")]
    assert ours == pytest.approx(exact, rel=0.02)


@pytest.mark.job
def test_bad_input_is_one_message_on_all_ranks(tmp_path):
    job = run_job([DRIVER, "--smoke", "--heads=3", f"--out={tmp_path / 'out'}"], ranks=3, timeout=100)
    assert job.returncode == 2 and job.stdout == ""
    assert job.stderr == "error: heads=3 must be at least 1 and divide width=8; use 2\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_layer=8"], "unknown option --num_layer; did you mean --num_layers?"),
        (["--checkpoint_every=0"], "checkpoint_every=0 must be at least 1; use 10"),
        (["--updates=0"], "updates=0 must be at least 1; use 10"),
        (["--warmup=-1"], "warmup=-1 must be at least 0; use 10"),
        (["--learning_rate=-1"], "learning_rate=-1.0 must be positive and finite; use 0.003"),
        (["--weight_decay=-1"], "weight_decay=-1.0 must be at least 0 and finite; use 0.01"),
        (["--batch_size=2", "--replicas=3"], "batch_size=2 is less than replicas=3; use 3"),
    ],
)
def test_wrong_options_are_refused(driver, words, message):
    with pytest.raises(OptionError, match=f"^{re.escape(message)}$"):
        parse(driver.Options, words)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"replicas": 2}, "replicas=2 does not divide the 1 rank(s); use 1"),
        ({"source": "no_file.txt"}, "no_file.txt is no file; use source='python', source='generated' or a text file"),
        ({"num_layers": 18}, "num_layers=18 is not a multiple of cfactor=4; use 16 or 20"),
        ({"dropout": 1.5}, "p=1.5 must be at least 0 and below 1; use 0.1"),
        ({"heads": 3}, "heads=3 must be at least 1 and divide width=8; use 2"),
        ({"context": 5000}, "tokens.shape=(500,) must be (n,), n more than length=5000"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(driver, tmp_path, changes, message):
    options = driver.SmokeOptions(out=tmp_path / "out", **changes)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)):
        driver.setup(options, SerialCommunicator())
    assert not (tmp_path / "out").exists()


def test_event_files_need_their_package(driver, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'xbraid_py\[tensorboard\]'"):
        driver.setup(driver.SmokeOptions(out=tmp_path / "out", tensorboard=True), SerialCommunicator())
    assert not (tmp_path / "out").exists()


def test_the_learning_rate_rises_and_falls_to_a_tenth(driver):
    options = driver.Options(updates=100, warmup=10)
    rates = [driver.rate(options, update) for update in range(100)]
    assert rates[:10] == pytest.approx([(k + 1) / 11 for k in range(10)])
    assert rates[10] == 1.0 == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[55] == pytest.approx(0.55) and 0.1 < rates[-1] < 0.101
    assert driver.rate(driver.Options(updates=1, warmup=0), 0) == 1.0


def test_the_default_network_is_deep(driver):
    assert driver.Options().num_layers >= 32


@pytest.mark.job
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
    benchmark = module_of(PROJECT / "benchmarks" / "transformer.py")
    exact = {n: 2.0 for n in range(1, 21)}
    assert benchmark.deviation(exact | {2: 3.0}, exact) == 0.0
    assert benchmark.deviation(exact | {3: 2.2, 9: 1.7}, exact) == pytest.approx(0.15)
    rows = [{"kind": "update", "loss": float(n)} for n in range(30)]
    smooth = benchmark.curve(rows, "training")
    assert smooth[1] == 0.0 and smooth[3] == 1.0 and smooth[30] == 19.5
