"""The translation driver: what a run leaves, the same on more ranks, how it goes on, and that it learns."""

from __future__ import annotations

import pytest
import torch
from kinds import Kind, arrays_of, draw_nothing, options_of, program, run, updates_of, words_of
from processes import PROJECT

from xbraid_py.cli import main
from xbraid_py.comm import SerialCommunicator
from xbraid_py.data.pairs import pairs
from xbraid_py.recipes.translate import Translator, build, translate

pytestmark = pytest.mark.timeout(400)

TRANSLATE = Kind("translate", ("--updates=6", "--validate_every=3"), "--warmup=1")
SERIAL = SerialCommunicator()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folder of a run of six updates on one rank."""
    out = tmp_path_factory.mktemp("translate") / "one"
    run(TRANSLATE, SERIAL, out)
    return out


def test_what_a_run_leaves(one):
    rows = updates_of(one)
    assert [row["update"] for row in rows] == list(range(1, 7))
    assert [row["update"] for row in rows if "val_accuracy" in row] == [3, 6]
    assert [stack["mode"] for stack in rows[0]["stacks"]] == ["mgrit", "mgrit"]
    sources = [line.split(" -> ")[0].split() for line in (one / "sample.txt").read_text().splitlines()]
    assert len(sources) == 8 and {len(each) for each in sources} == {4}


@pytest.mark.ranks(2, 3)
def test_the_same_on_more_ranks(one, spmd, shared_tmp_path):
    spmd(lambda comm: run(TRANSLATE, comm, shared_tmp_path) and None)
    ours, theirs = updates_of(shared_tmp_path), updates_of(one)
    for name in ("loss", "grad_norm", "val_loss"):
        expected = [row[name] for row in theirs if name in row]
        assert [row[name] for row in ours if name in row] == pytest.approx(expected, rel=2e-4)


@pytest.mark.ranks(1, 2)
def test_a_run_that_goes_on(spmd, shared_tmp_path):
    spmd(lambda comm: run(TRANSLATE, comm, shared_tmp_path) and None)
    at = shared_tmp_path / "checkpoints" / "update_000004.h5"
    spmd(lambda comm: run(TRANSLATE, comm, shared_tmp_path / "more", f"--resume={at}") and None)
    whole = {row["update"]: row["loss"] for row in updates_of(shared_tmp_path)}
    rows = [row for row in updates_of(shared_tmp_path / "more") if row["update"] > 4]
    assert [(row["update"], row["loss"]) for row in rows] == [(number, whole[number]) for number in (5, 6)]


def test_micro_batches_are_one_batch(tmp_path):
    for words in (("--batch_size=12",), ("--batch_size=4", "--accumulate=3")):
        run(TRANSLATE, SERIAL, tmp_path / f"{len(words)}", *words, "--exact", "--updates=3")
    ours, theirs = (updates_of(tmp_path / name) for name in ("1", "2"))
    for name in ("loss", "grad_norm", "val_loss"):
        expected = [row[name] for row in theirs if name in row]
        assert [row[name] for row in ours if name in row] == pytest.approx(expected, rel=1e-5)


@pytest.mark.ranks(1, 2, 3)
def test_averaged_weights_go_on(spmd, shared_tmp_path, tmp_path, monkeypatch):
    """Bitwise on as many ranks, and as the losses agree on another number; validations are of the averaged weights."""
    draw_nothing(monkeypatch)
    words = ("--accumulate=2", "--autocast=bfloat16", "--ema=0.9")
    spmd(lambda comm: run(TRANSLATE, comm, shared_tmp_path / "a", *words) and None)
    at = shared_tmp_path / "a" / "checkpoints" / "update_000004.h5"
    spmd(lambda comm: run(TRANSLATE, comm, shared_tmp_path / "b", *words, f"--resume={at}") and None)
    spmd(lambda comm: comm.rank or run(TRANSLATE, SERIAL, shared_tmp_path / "c", *words, f"--resume={at}") and None)
    whole, same, alone = (
        [row for row in updates_of(shared_tmp_path / name) if row["update"] > 4] for name in ("a", "b", "c")
    )
    assert same == whole
    for name in ("loss", "val_loss"):
        expected = [row[name] for row in whole if name in row]
        assert [row[name] for row in alone if name in row] == pytest.approx(expected, rel=1e-3)
    arrays = arrays_of(shared_tmp_path / "b" / "checkpoints" / "update_000006.h5")
    expected = arrays_of(shared_tmp_path / "a" / "checkpoints" / "update_000006.h5")
    assert all(torch.equal(arrays[name], expected[name]) for name in expected)
    averaged = {name.removeprefix("average/module."): value for name, value in arrays.items() if "average/m" in name}
    assert averaged and not any(torch.equal(arrays[f"weights/{name}"], value) for name, value in averaged.items())
    assert main(["export", str(shared_tmp_path / "a"), str(tmp_path / "net.pt")]) == 0
    model = torch.load(tmp_path / "net.pt", weights_only=False)
    assert torch.equal(model.head.weight, averaged["head.weight"])


@pytest.mark.ranks(1, 2, 3)
def test_gradients_are_those_of_the_plain_network(spmd, tmp_path):
    # The loss that the recipe trains with, through both halves.
    options = options_of(TRANSLATE, tmp_path, "--exact")
    sources, targets = pairs("reverse", 6, 4, 5, 0, 0)
    inputs = torch.stack([sources, targets], 1)

    def slope(model):
        loss = torch.nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        return [float(loss.detach()), model.embedding.weight.grad, model.head.weight.grad]

    def body(comm):
        return slope(build(options, comm).double())

    from xbraid_py import to_sequential

    loss, *slopes = slope(to_sequential(build(options, None).double()))
    for of_rank, *others in spmd(body):
        assert of_rank == pytest.approx(loss, rel=1e-12)
        assert all(torch.allclose(a, b, rtol=1e-10, atol=1e-13) for a, b in zip(slopes, others, strict=True))


def test_it_learns(tmp_path):
    words = ("--smoke", "--updates=150", "--num_layers=2", "--width=16", "--num_tokens=4", "--length=3", "--task=sort")
    more = ("--learning_rate=0.01", "--batch_size=32", "--validate_every=150", "--exact", "--checkpoint_every=150")
    run(TRANSLATE, SERIAL, tmp_path, *words, *more)
    assert updates_of(tmp_path)[-1]["val_accuracy"] > 0.9
    right = [line.split(" -> ") for line in (tmp_path / "sample.txt").read_text().splitlines()]
    assert sum(sorted(source.split()) == end.split() for source, end in right) >= 5


def test_a_network_that_is_exported(one, tmp_path):
    assert main(["export", str(one), str(tmp_path / "net.pt")]) == 0
    model = torch.load(tmp_path / "net.pt", weights_only=False)
    assert type(model) is Translator and type(model.body.encoder.layers[0]) is torch.nn.TransformerEncoderLayer
    found = translate(model, torch.tensor([[1, 2, 3, 4]]))
    assert found.shape == (1, 4)


def test_bad_input(tmp_path):
    for word, message in (
        ("--task=copy", "task='copy' must be reverse or sort"),
        ("--heads=3", "heads=3 must divide width=8"),
        ("--accumulate=0", "accumulate=0 must be at least 1"),
        ("--autocast=half", "autocast='half' must be bfloat16"),
        ("--ema=0", "ema=0.0 must be above 0 and below 1"),
        ("--num_layers=1", "num_layers=1 must be at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            program("translate").setup(options_of(TRANSLATE, tmp_path, word), SERIAL)


@pytest.mark.job
def test_a_program_on_two_ranks(one, run_job, tmp_path):
    job = run_job([PROJECT / "drivers" / "translate.py", *words_of(TRANSLATE, tmp_path)], 2, timeout=200)
    assert job.returncode == 0, job.stderr
    expected = [row["loss"] for row in updates_of(one)]
    assert [row["loss"] for row in updates_of(tmp_path)] == pytest.approx(expected, rel=2e-4)
    assert "nats per token" in job.stdout
