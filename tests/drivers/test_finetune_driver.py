"""The fine-tuning driver: what a run leaves, the same on more ranks, how it goes on, and how bad input ends."""

from __future__ import annotations

import math

import pytest
import torch
from kinds import Kind, draw_nothing, options_of, program, run, updates_of, words_of
from model_zoo import package
from processes import PROJECT

from xbraid_py.cli import main
from xbraid_py.comm import SerialCommunicator
from xbraid_py.data import text

pytestmark = pytest.mark.timeout(400)

FINETUNE = Kind("finetune", ("--updates=8", "--validate_every=4"), "--warmup=1")
SERIAL = SerialCommunicator()
ALL = ("--accumulate=2", "--batch_size=4", "--autocast=bfloat16", "--ema=0.9", "--dropout=0.1")


@pytest.fixture(autouse=True)
def transformers():
    """The package, or a skip."""
    return package("transformers")


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folder of a run of eight updates on one rank."""
    package("transformers")
    out = tmp_path_factory.mktemp("finetune") / "one"
    run(FINETUNE, SERIAL, out)
    return out


def validation_loss(model) -> float:
    """What a run validates, by another way."""
    tokens = torch.tensor(list(text.load("generated", 5000, 0).text.encode()))
    inputs, targets = text.windows(tokens[int(0.9 * len(tokens)) :], 16, 64, 0, 0)
    with torch.no_grad():
        logits = model.eval()(inputs).logits
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()))


def test_a_run_leaves_a_model_of_transformers(one, transformers):
    rows = updates_of(one)
    assert [row["update"] for row in rows] == list(range(1, 9))
    validated = [row["val_loss"] for row in rows if "val_loss" in row]
    assert len(validated) == 2 and validated[1] < validated[0] < math.log(256)
    assert {row["stacks"][0]["mode"] for row in rows} == {"mgrit"}
    assert len((one / "sample.txt").read_text()) > 16
    model = transformers.GPT2LMHeadModel.from_pretrained(one / "model")
    assert validation_loss(model) == pytest.approx(validated[-1], rel=1e-5)


@pytest.mark.ranks(2)
def test_the_same_on_more_ranks(one, spmd, shared_tmp_path):
    spmd(lambda comm: run(FINETUNE, comm, shared_tmp_path) and None)
    ours, theirs = updates_of(shared_tmp_path), updates_of(one)
    for name in ("loss", "grad_norm", "val_loss"):
        expected = [row[name] for row in theirs if name in row]
        assert [row[name] for row in ours if name in row] == pytest.approx(expected, rel=2e-4)


@pytest.mark.ranks(1, 2)
def test_a_run_that_goes_on(one, spmd, shared_tmp_path):
    # The schedule is that of all updates, so the first part is cut out of a whole run.
    spmd(lambda comm: run(FINETUNE, comm, shared_tmp_path) and None)
    at = shared_tmp_path / "checkpoints" / "update_000005.h5"
    spmd(lambda comm: run(FINETUNE, comm, shared_tmp_path / "more", f"--resume={at}") and None)
    whole = {row["update"]: row["loss"] for row in updates_of(shared_tmp_path)}
    rows = [row for row in updates_of(shared_tmp_path / "more") if row["update"] > 5]
    assert [row["update"] for row in rows] == [6, 7, 8]
    assert [row["loss"] for row in rows] == [whole[row["update"]] for row in rows]


@pytest.mark.ranks(2)
def test_everything_at_once(spmd, shared_tmp_path, transformers, monkeypatch):
    """Micro-batches, halves and averaged weights, on two ranks and on from there on one."""
    draw_nothing(monkeypatch)
    spmd(lambda comm: run(FINETUNE, comm, shared_tmp_path / "two", *ALL) and None)
    at = shared_tmp_path / "two" / "checkpoints" / "update_000005.h5"
    spmd(lambda comm: run(FINETUNE, comm, shared_tmp_path / "more", *ALL, f"--resume={at}") and None)
    spmd(lambda comm: comm.rank or run(FINETUNE, SERIAL, shared_tmp_path / "one", *ALL, f"--resume={at}") and None)
    whole = [row for row in updates_of(shared_tmp_path / "two") if row["update"] > 5]
    rows = [row for row in updates_of(shared_tmp_path / "more") if row["update"] > 5]
    assert [(row["loss"], row.get("val_loss")) for row in rows] == [(row["loss"], row.get("val_loss")) for row in whole]
    alone = [row for row in updates_of(shared_tmp_path / "one") if row["update"] > 5]
    assert [row["loss"] for row in alone] == pytest.approx([row["loss"] for row in whole], rel=1e-2)
    # The model that is left is that of the validations.
    model = transformers.GPT2LMHeadModel.from_pretrained(shared_tmp_path / "two" / "model")
    assert validation_loss(model) == pytest.approx(whole[-1]["val_loss"], rel=1e-5)


def test_a_model_from_a_folder(one, tmp_path, transformers):
    # It begins where the other one has ended, with its sizes, whatever is asked for.
    run(FINETUNE, SERIAL, tmp_path, f"--model={one / 'model'}", "--num_layers=4", "--learning_rate=1e-9", "--exact")
    last = [row["val_loss"] for row in updates_of(one) if "val_loss" in row][-1]
    assert [row["val_loss"] for row in updates_of(tmp_path) if "val_loss" in row][0] == pytest.approx(last, rel=1e-4)
    assert transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "model").config.n_layer == 16


def test_a_network_that_is_exported(one, tmp_path, transformers):
    assert main(["export", str(one), str(tmp_path / "net.pt")]) == 0
    model = torch.load(tmp_path / "net.pt", weights_only=False)
    assert type(model) is transformers.GPT2LMHeadModel
    last = [row["val_loss"] for row in updates_of(one) if "val_loss" in row][-1]
    assert validation_loss(model) == pytest.approx(last, rel=1e-5)


def test_weight_decay_is_for_matrices():
    from xbraid_py import param_groups
    from xbraid_py.recipes.finetune import build

    model = build(options_of(FINETUNE, PROJECT), None)
    names = {id(p): name for name, p in model.named_parameters()}
    with_decay, without = ({names[id(p)] for p in group["params"]} for group in param_groups(model, 0.1))
    assert with_decay | without == set(names.values())
    assert all(name.endswith(".bias") or ".ln_" in name for name in without)
    assert not any(name.endswith(".bias") or ".ln_" in name for name in with_decay)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--model=nowhere",), "model=nowhere is no folder with a config.json"),
        (("--heads=3",), "heads=3 must divide width=16"),
        (("--num_layers=1",), "num_layers=1 must be at least 2"),
        (("--accumulate=0",), "accumulate=0 must be at least 1; use 4"),
        (("--autocast=float16",), "autocast='float16' must be bfloat16"),
        (("--ema=1.0",), "ema=1.0 must be above 0 and below 1; use 0.99"),
        (("--context=600",), "context=600 must be less than the 500 bytes"),
    ],
)
def test_bad_input(words, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        program("finetune").setup(options_of(FINETUNE, tmp_path, *words), SERIAL)


def test_a_model_for_other_tokens(tmp_path, transformers):
    config = transformers.GPT2Config(vocab_size=20, n_layer=2, n_embd=8, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has 20 tokens and 2 blocks; 256 and 2 are needed"):
        program("finetune").setup(options_of(FINETUNE, tmp_path / "out", f"--model={tmp_path}"), SERIAL)


@pytest.mark.job
def test_a_program_on_two_ranks(one, run_job, tmp_path):
    job = run_job([PROJECT / "drivers" / "finetune.py", *words_of(FINETUNE, tmp_path)], 2, timeout=200)
    assert job.returncode == 0, job.stderr
    expected = [row["loss"] for row in updates_of(one)]
    assert [row["loss"] for row in updates_of(tmp_path)] == pytest.approx(expected, rel=2e-4)
    assert "nats per byte" in job.stdout
