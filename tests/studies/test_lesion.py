"""Lesions of residual networks: orders, numbers against networks taken apart by hand, the driver."""

from __future__ import annotations

import json
import shlex
import shutil
import signal

import pytest
import torch
from cifar_files import write_cifar10
from kinds import finished, program, updates_of
from processes import PROJECT
from studies.lesion import figures as lesion_figures
from studies.lesion import lesion
from studies.lesion.lesion import mean_norms, measure, random_removals, read_trained, shuffled, without
from studies.lesion.options import Lesions

from xbraid_py import RunError
from xbraid_py.cli import main
from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layers.image_resnet import ImageResNet
from xbraid_py.multilevel.resnet import training as resnet_training
from xbraid_py.recipes.images import training_of
from xbraid_py.recipes.options.images import MultiLevelOptions
from xbraid_py.run import signals
from xbraid_py.run.options import parse
from xbraid_py.run.record import read
from xbraid_py.run.store.read import CheckpointError

LESION = program("lesion")
TINY = {
    "epochs": 1,
    "depths": (1, 2),
    "filters": (4, 8),
    "norm": "group",
    "train_images": 12,
    "test_images": 10,
    "batch_size": 6,
    "stem_stride": 2,
    "draws": 2,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_cifar10(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(name="run")
def run_fixture(data_dir, tmp_path, monkeypatch):
    """The driver in this process, on one rank, without its pictures (they take most of the time) unless wanted."""
    write = lesion_figures.write

    def run(pictures=False, **changes):
        monkeypatch.setattr(lesion_figures, "write", write if pictures else lambda *_: None)
        options = LESION.Options(**(TINY | {"data_dir": data_dir, "out": tmp_path} | changes))
        LESION.setup(options, SerialCommunicator())()
        return options

    return run


def make(data_dir, comm=None, blocks=(3, 4)):
    """A training whose network has not h = 1, nor the statistics of a new one, and is right on 3 of 4 test images."""
    options = MultiLevelOptions(
        blocks=blocks,
        filters=(4, 8),
        step_size=0.5,
        epochs=(1,),
        batch_size=5,
        stem_stride=2,
        precision="float64",
        test_images=16,
        data_dir=data_dir,
    )
    training = training_of(
        options, "first", 3, options.samples(), ProcessGrid(comm, comm.size) if comm else None
    ).method
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in training.network.state_dict().values():
            if value.is_floating_point():
                value.mul_(1.0 + 0.5 * torch.rand(value.shape, generator=random, dtype=value.dtype))
        # Answers of all kinds, most of them right: so lesions can do harm.
        images = training.pipeline.standardize(training.test[0], torch.float64)
        training.network.head.linear.bias -= training.network.eval()(images).mean(0)
        labels = training.network(images).argmax(1)
        training.test = training.test[0], torch.where(torch.arange(len(labels)) % 4 == 0, (labels + 1) % 10, labels)
    return training


def by_hand(training, order):
    """Accuracy of the blocks in this order, each formula written out; order has pairs, a minus sign for a shortcut."""
    network, (pixels, labels) = training.network.eval(), training.test
    y = network.stem(training.pipeline.standardize(pixels, torch.float64))
    for stage, j, is_whole in order:
        block = network.stages[stage][j]
        y = block.shortcut(y) + (0.5 * block.residual(y) if is_whole else 0.0)
    return float((network.head(y).argmax(1) == labels).double().mean())


@torch.no_grad()
def test_measured_numbers_are_those_by_hand(data_dir):
    training = make(data_dir)
    found = measure(training, Lesions(draws=2, seed=7))
    every = [(s, j) for s, count in enumerate((3, 4)) for j in range(count)]
    whole = [(s, j, True) for s, j in every]
    assert found["accuracy"] == pytest.approx(by_hand(training, whole), rel=1e-5)
    for place, accuracy in zip(every, found["left_out"], strict=True):
        # A transition keeps its shortcut; any other block is a step of no length.
        order = [(s, j, (s, j) != place) for s, j in every]
        assert accuracy == pytest.approx(by_hand(training, order), rel=1e-5)
    assert len({found["accuracy"], *found["left_out"]}) > 2  # lesions are seen
    for draw in range(2):
        order = shuffled(training.network, Lesions(seed=7).random(draw))
        moved = [(s, j, True) for s, part in enumerate(order) for j in part]
        assert found["shuffled"][draw] == pytest.approx(by_hand(training, moved), rel=1e-5)
        orders = dict(random_removals(training.network, Lesions(seed=7).random(draw)))
        assert set(found["random"]) == {"1", "2", "4"} == {str(count) for count in orders}
        for count, order in orders.items():
            kept = [(s, j, True) for s, part in enumerate(order) for j in part]
            assert len(kept) == 7 - count
            assert found["random"][str(count)][draw] == pytest.approx(by_hand(training, kept), rel=1e-5)
    assert training.network.blocks == (3, 4) and json.loads(json.dumps(found)) == found


@torch.no_grad()
def test_norms_are_those_by_hand(data_dir, monkeypatch):
    monkeypatch.setattr(lesion, "_PORTION", 5)  # 16 images in portions of 5, 5, 5 and 1
    training = make(data_dir)
    network = training.network.eval()
    y = network.stem(training.pipeline.standardize(training.test[0], torch.float64))
    wanted = []
    for stage in network.stages:
        for block in stage:
            g = 0.5 * block.residual(y)
            wanted.append([sum(float(each.norm()) for each in part) / 16 for part in (y, g)])
            y = block.shortcut(y) + g
    assert mean_norms(training).tolist() == [pytest.approx(pair, rel=1e-12) for pair in wanted]
    norms = measure(training, Lesions(draws=1))["norms"]
    assert [pair[:2] for pair in norms] == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [1, 3]]
    assert [pair[2:] for pair in norms] == [pytest.approx(pair, rel=1e-5) for pair in wanted]


@pytest.mark.ranks(1, 3)
def test_numbers_do_not_depend_on_the_ranks(spmd, data_dir, monkeypatch):
    monkeypatch.setattr(lesion, "_PORTION", 5)
    monkeypatch.setattr(resnet_training, "_PORTION", 5)
    alone = make(data_dir, blocks=(1, 2))
    wanted = measure(alone, Lesions(draws=1)), mean_norms(alone).tolist()

    def body(comm):
        training = make(data_dir, comm, blocks=(1, 2))
        return measure(training, Lesions(draws=1)), mean_norms(training).tolist()

    assert all(found == wanted for found in spmd(body))


def test_random_orders_keep_transitions_in_their_places():
    network = ImageResNet((2, 3, 5), (2, 2, 4), norm="none")
    seen = set()
    for draw in range(30):
        order = shuffled(network, Lesions().random(draw))
        assert [sorted(part) for part in order] == [[0, 1], [0, 1, 2], [0, 1, 2, 3, 4]] != order
        assert order[1][0] == order[2][0] == 0
        seen.add(str(order))
        counts, before = [], set()
        for count, kept in random_removals(network, Lesions().random(draw)):
            gone = {(s, j) for s, part in enumerate(without(network, ())) for j in part if j not in kept[s]}
            assert len(gone) == count and gone >= before and not gone & {(1, 0), (2, 0)}
            counts, before = [*counts, count], gone
        assert counts == [1, 2, 4, 8]  # of 2 + 2 + 4 blocks
    assert len(seen) > 20
    assert shuffled(network, Lesions().random(3)) == shuffled(network, Lesions().random(3))
    fixed = ImageResNet((1, 2), (2, 2), norm="none")
    assert shuffled(fixed, Lesions().random(0)) == [[0], [0, 1]]
    with pytest.raises(ValueError, match="^draws=0 must be at least 1; use 5$"):
        Lesions(draws=0)


def test_the_driver_trains_once_and_measures(run, tmp_path, capsys):
    run(pictures=True)
    assert {path.name for path in tmp_path.glob("*.png")} == set(lesion_figures.FIGURES)
    names = [f"{name}/first_0" for name in ("1-1_h1", "2-2_h0.5", "2-2_h1")]
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*") if path.is_dir()) == names
    rows = [json.loads(line) for line in (tmp_path / "lesion.jsonl").read_text().splitlines()]
    assert [(row["settings"]["blocks"], row["settings"]["step_size"]) for row in rows] == [
        ([1, 1], 1.0),
        ([2, 2], 1.0),
        ([2, 2], 0.5),
    ]
    for row, name in zip(rows, (names[0], names[2], names[1]), strict=True):
        updates = [each for each in read(tmp_path / name / "metrics.jsonl") if each["kind"] == "update"]
        assert row["result"]["accuracy"] == pytest.approx(updates[-1]["val_accuracy"])
    screen, before = capsys.readouterr().out, (tmp_path / "lesion.jsonl").read_bytes()
    assert (tmp_path / "lesion.md").read_text().strip() in screen
    assert "* h = 1, d = 2, 4: the mean norm of G goes as d^" in screen and "* h d = 2, d = 2, 4: " in screen
    kept = (tmp_path / names[1] / "metrics.jsonl").read_bytes()

    run(seeds=(0, 1), draws=1)  # of another seed too; what is there is only looked at
    screen = capsys.readouterr().out
    assert [f"{name} is finished" in screen for name in (*names, "2-2_h1/first_1")] == [True, True, True, False]
    assert (tmp_path / names[1] / "metrics.jsonl").read_bytes() == kept
    again = [json.loads(line) for line in (tmp_path / "lesion.jsonl").read_text().splitlines()]
    assert len(again) == 6 and again[0]["result"]["left_out"] == rows[0]["result"]["left_out"]
    with pytest.raises(CheckpointError, match="was written with eta_max=0.1, but this run has eta_max=0.2"):
        run(eta_max=0.2)

    path = again[1]["settings"]["checkpoint"]
    run(checkpoint=(path,), out=tmp_path / "alone", draws=1)
    alone = json.loads((tmp_path / "alone" / "lesion.jsonl").read_text())
    assert alone == again[1] and json.loads(before.splitlines()[0])["settings"] == rows[0]["settings"]

    signals.note(signal.SIGTERM)
    with pytest.raises(signals.Stopped, match="^stopped after 0 measured networks; start again to go on$"):
        run(checkpoint=(path,), out=tmp_path / "alone", draws=1)
    signals.forget()
    (tmp_path / "alone" / "lesion.md").unlink()
    (tmp_path / "alone" / "lesion.md").mkdir()
    with pytest.raises(RunError, match="^the tables in .*alone could not be written: "):
        run(checkpoint=(path,), out=tmp_path / "alone", draws=1)


def test_another_program_goes_on_with_a_training(tmp_path, capsys):
    """`xbraid-py resume` on the folder of a training starts drivers/cifar.py, which takes its options."""
    made, out = finished("lesion"), tmp_path / "2-2_h1" / "first_0"
    shutil.copytree(made, out)
    (out / "status.json").unlink()
    for path in (out / "checkpoints").glob("update_00000[34].h5"):
        path.unlink()
    (out / "checkpoints" / "best.h5").unlink()
    capsys.readouterr()
    assert main(["resume", str(out), "--print"]) == 0
    program_file, *words = shlex.split(capsys.readouterr().out)[1:]
    assert program_file == str(PROJECT / "drivers" / "cifar.py")
    cifar = program("cifar")
    cifar.setup(parse(cifar.Options, words, presets=cifar.PRESETS), SerialCommunicator())()
    assert updates_of(out) == updates_of(made)
    kinds = [row["kind"] for row in read(out / "metrics.jsonl")]
    assert kinds == ["header", "update", "update", "resume", "update", "update"]


def test_a_checkpoint_of_the_other_driver(run, tmp_path):
    made = finished("images")
    at = (2, 5)
    run(checkpoint=tuple(made / "checkpoints" / f"update_00000{k}.h5" for k in at), draws=1)
    rows = [json.loads(line) for line in (tmp_path / "lesion.jsonl").read_text().splitlines()]
    settings = [row["settings"] for row in rows]
    assert [(each["blocks"], each["step_size"]) for each in settings] == [([1, 2], 1.0), ([4, 8], 0.25)]
    assert {(each["model"], each["seed"]) for each in settings} == {("multilevel", 0)}
    validated = {row["epoch"]: row["val_accuracy"] for row in updates_of(made) if "val_accuracy" in row}
    assert [row["result"]["accuracy"] for row in rows] == pytest.approx([validated[k] for k in at])
    assert "* h d = 3, d = 3, 12: " in (tmp_path / "lesion.md").read_text()


def test_files_that_are_no_such_checkpoint(run, tmp_path):
    with pytest.raises(CheckpointError, match="none.h5: No such file"):
        run(checkpoint=(tmp_path / "none.h5",))
    path = finished("lesion") / "checkpoints" / "update_000001.h5"
    trained = read_trained(path)
    assert (trained.options.models, trained.options.blocks, trained.epoch) == (("first",), (2, 2), 1)
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 255
    damaged = tmp_path / "damaged.h5"
    damaged.write_bytes(raw)
    with pytest.raises(CheckpointError, match="damaged.h5"):
        run(checkpoint=(damaged,))
    with pytest.raises(CheckpointError, match="its run is 'mgopt', not images"):
        run(checkpoint=(finished("mgopt") / "checkpoints" / "update_000001.h5",))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depths": ()}, r"^depths=\[\] must name "),
        ({"depths": (2, 2)}, r"^depths=\[2, 2\] must name "),
        ({"depths": (0, 2)}, r"^depths=\[0, 2\] must be at least 1; use 2,4,8$"),
        ({"seeds": (1, 1)}, r"^seeds=\[1, 1\] must name "),
        ({"epochs": 0}, "^epochs=0 must be at least 1; use 10$"),
        ({"draws": 0}, "^draws=0 must be at least 1; use 5$"),
        ({"keep": 0}, "^keep=0 must be at least 1; use 5$"),
        ({"resume": "a.h5"}, "^resume=a.h5 is of one network, but there are 3; use auto$"),
        ({"filters": (8, 4)}, "^filters=.* must be positive and not decrease"),
        ({"train_images": 41}, r"^train_images=41 must lie in 0 .. 40, the images that were found; use 0 for all"),
        ({"batch_size": 13}, r"^batch_size=13 must lie in 1 .. 12, from the ranks to the training images"),
    ],
)
def test_bad_options(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not list(tmp_path.iterdir())
