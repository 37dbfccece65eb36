"""The driver of multi-level residual networks: folders, tables, ranks, bad input; pictures, networks, studies."""

from __future__ import annotations

import json
from functools import partial

import pytest
import torch
from cifar_files import write_cifar10
from kinds import finished, program, updates_of
from studies.multi_level.case import Case
from studies.multi_level.runs import train
from studies.multi_level.tables import CURVE
from studies.study import settings_of

from xbraid_py import RunError
from xbraid_py.comm import SerialCommunicator
from xbraid_py.data.image_sets import load_split
from xbraid_py.recipes import images
from xbraid_py.recipes.pictures import curves
from xbraid_py.run.record import read
from xbraid_py.run.store.read import CheckpointError, load

CIFAR = program("cifar")
TINY = {
    "epochs": (2, 1, 1),
    "blocks": (1, 2),
    "filters": (4, 8),
    "norm": "group",
    "train_images": 24,
    "test_images": 10,
    "batch_size": 7,
    "stem_stride": 2,
}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return write_cifar10(tmp_path_factory.mktemp("cifar"))


@pytest.fixture(name="run")
def run_fixture(data_dir, tmp_path):
    """The driver in this process, on one rank."""

    def run(**changes):
        options = CIFAR.Options(**(TINY | {"data_dir": data_dir, "out": tmp_path, "models": ("multilevel",)} | changes))
        CIFAR.setup(options, SerialCommunicator())()
        return options

    return run


def test_models_and_seeds_have_folders_of_their_own(run, tmp_path, capsys):
    run(models=("first", "last", "multilevel"), seeds=(0, 3), validate_every=2)
    names = ["first_0", "first_3", "last_0", "last_3", "multilevel_0", "multilevel_3"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == names
    found = {name: updates_of(tmp_path / name) for name in names}
    assert [row["blocks"] for row in found["multilevel_3"]] == [[1, 2], [1, 2], [2, 4], [4, 8]]
    assert [row["level"] for row in found["multilevel_3"]] == [2, 2, 1, 0]
    assert [row["work"] for row in found["multilevel_3"]] == [0.25, 0.5, 1.0, 2.0]
    assert [row["work"] for row in found["last_0"]] == [1.0, 2.0, 3.0, 4.0]
    assert [row["work"] for row in found["first_0"]] == [0.25, 0.5, 0.75, 1.0]
    assert [row["final"] for row in found["last_3"]] == [False, False, False, True]
    assert ["val_error" in row for row in found["last_3"]] == [False, True, True, True]
    assert found["first_0"][0]["loss"] == found["multilevel_0"][0]["loss"] != found["first_3"][0]["loss"]
    text, screen = (tmp_path / "tables.md").read_text(), capsys.readouterr().out
    assert text.strip() in screen
    # Half the steps with a quarter of the blocks, a quarter with half of them: 1 - (2/4 + 1/2 + 1) / 4.
    assert "| ResNet-26-i (4-8) | 1-2 to 4-8 | CIFAR-10 | 2 |" in text and "| 50.0 ± 0.0 |" in text
    assert "cifar10: found 1 of 5 training batches (40 of 50,000 images): data_batch_2.bin" in screen
    assert "; the set is incomplete; 24 images for training, 10 for test" in screen
    assert (tmp_path / "figure6.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "last_3" / "figures" / "epochs.png").exists()


def test_the_folder_of_a_run_is_enough_to_go_on(run, tmp_path, capsys):
    """As `xbraid-py resume` does it: with the run's own configuration, in its own folder."""
    run(epochs=(2, 1))
    header = read(tmp_path / "multilevel_0" / "metrics.jsonl")[0]
    configuration = {name: header["configuration"][name] for name in ("models", "seeds", "out")}
    assert configuration == {"models": ["multilevel"], "seeds": [0], "out": str(tmp_path / "multilevel_0")}
    capsys.readouterr()
    run(epochs=(2, 1), out=tmp_path / "multilevel_0", resume="auto")
    assert f"the run in {tmp_path / 'multilevel_0'} is finished" in capsys.readouterr().out
    assert not {"multilevel_0", "tables.md"} & {path.name for path in (tmp_path / "multilevel_0").iterdir()}


def test_what_is_finished_is_not_made_again(run, tmp_path, capsys):
    run()
    before = (tmp_path / "multilevel_0" / "metrics.jsonl").read_bytes()
    run(resume="auto", models=("multilevel", "last"))
    assert (tmp_path / "multilevel_0" / "metrics.jsonl").read_bytes() == before
    assert "multilevel_0 is finished" in capsys.readouterr().out
    assert len((tmp_path / "tables.md").read_text().splitlines()) == 4
    run()  # anew: the earlier run is set aside
    assert updates_of(tmp_path / "multilevel_0") == updates_of(tmp_path / "multilevel_0" / "earlier-1")


@pytest.mark.ranks(1, 2)
@pytest.mark.parametrize("norm", ["batch", "group"])
def test_batch_norm_on_another_number_of_ranks_says_that_it_is_another_run(spmd, data_dir, shared_tmp_path, norm):
    out = shared_tmp_path / norm

    def go(comm, **changes):
        options = TINY | {"data_dir": data_dir, "out": out, "models": ("first",), "epochs": (2,), "norm": norm}
        CIFAR.setup(CIFAR.Options(**options | changes), comm)()

    def body(comm):
        if comm.rank == 0:
            go(SerialCommunicator())
        comm.barrier()
        go(comm, resume=str(out / "first_0" / "checkpoints" / "update_000001.h5"))
        comm.barrier()
        return comm.size

    size = spmd(body)[0]
    said = f"norm=batch takes the mean of each rank's images: on {size} rank(s) after 1 this is not the run"
    text = (out / "first_0" / "log.txt").read_text()
    assert text.count(said) == (norm == "batch" and size > 1), text


def test_a_checkpoint_of_another_model_is_refused(run, tmp_path):
    run(epochs=(1, 1))
    last = tmp_path / "multilevel_0" / "checkpoints" / "update_000002.h5"
    with pytest.raises(CheckpointError, match=r"was written with models=\['multilevel'\], but this run has"):
        run(epochs=(1, 1), resume=str(last), models=("last",))


def test_the_network_of_a_checkpoint():
    """At the end of the first cycle and of the last one: it is as good as the record says."""
    out = finished("images")
    for row in (row for row in updates_of(out) if "val_loss" in row):
        with load(out / "checkpoints" / f"update_{row['update']:06d}.h5") as checkpoint:
            network = images.network(checkpoint)
            given = checkpoint.meta["configuration"]
        assert list(network.blocks) == row["blocks"] and not network.training
        test = load_split("cifar10", given["train_images"], given["test_images"], given["data_dir"]).test
        with torch.no_grad():
            logits = network(images.standardize(test.pixels, torch.float64))
        assert float((logits.argmax(1) == test.labels).double().mean()) == pytest.approx(row["val_accuracy"])
        assert float(torch.nn.functional.cross_entropy(logits, test.labels)) == pytest.approx(row["val_loss"])


def test_the_picture_of_a_run(monkeypatch, tmp_path):
    figures, rows = [], updates_of(finished("images"))
    monkeypatch.setattr(curves, "save", lambda figure, path: figures.append(figure))
    curves.over_epochs(rows, tmp_path / "epochs.png")
    left, right = figures[0].axes
    drawn = {each.get_label(): each.get_data() for each in (*left.lines, *right.lines)}
    assert list(drawn["loss"][1]) == [row["loss"] for row in rows]
    assert list(drawn["validation error"][1]) == [100 * row["val_error"] for row in rows if "val_error" in row]
    begins = [each.get_xdata()[0] for each in left.lines if each.get_label().startswith("_")]
    assert begins == [0, 2, 4] and [text.get_text() for text in left.texts] == ["1-2", "2-4", "4-8"]
    with pytest.raises(ValueError, match="^rows holds no epoch"):
        curves.over_epochs([], tmp_path / "epochs.png")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"models": ("first", "middle")}, "^model='middle' must be first, last or multilevel; use multilevel$"),
        ({"models": ()}, r"^models=\[\] must name "),
        ({"seeds": (1, 1)}, r"^seeds=\[1, 1\] must name "),
        ({"blocks": (1, 1)}, r"^blocks=\[1, 1\]: stages behind the first need at least 2 blocks"),
        ({"filters": (4, 8, 16)}, "^filters=.* must name 2 stages"),
        ({"wide": True}, r"^filters=\[4, 8\] and wide=True are two choices; use one of them$"),
        ({"validate_every": 0}, "^validate_every=0 must be at least 1; use 5$"),
        ({"checkpoint_every": 0}, "^checkpoint_every=0 must be at least 1; use 5$"),
        ({"pad": -1}, "^pad=-1 must be at least 0; use 4$"),
        ({"pad": 32}, "^pad=32 must be smaller than images of 32 x 32 pixels; use 4$"),
        ({"device": "abacus"}, "^device='abacus' must be cpu or cuda; use cpu$"),
        ({"train_images": 41}, r"^train_images=41 must lie in 0 .. 40, the images that were found; use 0 for all"),
        ({"batch_size": 25}, r"^batch_size=25 must lie in 1 .. 24, from the ranks to the training images"),
        ({"resume": "a.h5", "seeds": (1, 2)}, "^resume=a.h5 is of one run, but there are 2; use auto$"),
    ],
)
def test_bad_options(run, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        run(**changes)
    assert not list(tmp_path.iterdir())


def test_missing_images_are_said(run, tmp_path):
    with pytest.raises(FileNotFoundError, match="CIFAR-10 needs one or more of data_batch_1.bin, "):
        run(data_dir=tmp_path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(run):
    with pytest.raises(ValueError, match="^device=cuda: PyTorch finds no such device here; use cpu$"):
        run(device="cuda")


def test_a_loss_that_is_not_finite_ends_the_run(run, tmp_path):
    with pytest.raises(RunError, match="^epoch 1, minibatch [123]: the loss is nan; use a smaller eta_max$"):
        run(eta_max=1e30, norm="none")
    assert json.loads((tmp_path / "multilevel_0" / "status.json").read_text())["state"] == "failed"


def test_a_run_of_a_study_is_that_of_the_driver(run, data_dir, tmp_path):
    run(seeds=(3,))
    settings = json.loads(json.dumps(settings_of(Case(**TINY, data_dir=data_dir, model="multilevel", seed=3))))
    result = train(settings)
    columns = [name for name in CURVE if name != "seconds"]
    found = [[dict(zip(CURVE, point, strict=True))[name] for name in columns] for point in result["curve"]]
    rows = [[row[name] for name in columns] for row in updates_of(tmp_path / "multilevel_3")]
    assert found == [pytest.approx(row, rel=1e-5) for row in rows]
    assert json.loads(json.dumps(result)) == result and result["block_evaluations"] == 21 * (3 + 3 + 6 + 12)
    with pytest.raises(ValueError, match="^model='deep' must be "):
        train(settings | {"model": "deep"})


def test_subsets_do_not_depend_on_the_seed(data_dir):
    read_some = partial(load_split, "cifar10", data_dir=data_dir)
    few, more, every = read_some(5, 3), read_some(9, 4), read_some()
    assert torch.equal(few.train.pixels, more.train.pixels[:5]) and torch.equal(few.test.labels, more.test.labels[:3])
    assert (every.train.num_samples, every.test.num_samples, every.num_classes) == (40, 20, 10)
    assert not torch.equal(few.train.pixels, every.train.pixels[:5])


def test_defaults_are_those_of_the_paper():
    options = CIFAR.Options()
    assert options.optimization.batch_size == 100 and options.channels == (16, 32, 64)
    assert [level.step_size for level in options.levels("last")] == [0.25] * 3
    assert options.levels("last")[0].blocks == (8, 8, 8)
    stl10 = Case(data="stl10", wide=True)
    assert stl10.optimization.batch_size == 32 and stl10.channels == (32, 64, 128) and stl10.border == 12
