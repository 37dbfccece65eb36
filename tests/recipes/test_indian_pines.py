"""Indian Pines as a job, on a small scene: scores and pictures, the published split, ranks, and bad input."""

from __future__ import annotations

import re

import pytest
from kinds import KINDS, draw_nothing, run, updates_of
from scenes import scene, write, write_split

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.options import OptionError
from xbraid_py.run.record import read

SERIAL = SerialCommunicator()
PINES = KINDS["indian_pines"]
TINY = ("--num_layers=8", "--nested.refinements=0", "--nested.updates=3", "--validate_every=1")
SMOKE = ("--num_layers=16", "--network.width=20", "--nested.updates=12,8")

# Words, and message; FOLDER is where the files are, and ... may be anything.
BAD = {
    "option": (["--num_trian=5"], "unknown option --num_trian; did you mean --num_train?"),
    "none": (["--num_train=0"], "num_train=0 must be at least 1; use 1000"),
    "many": (
        ["--num_train=1000"],
        "num_train=1000 must leave each of the 4 classes a pixel for training and one for validation; use 4 to ...",
    ),
    "source": (["--source=web"], "...source...web..."),
    "split": (["--split=half"], "...split...half..."),
    "nowhere": (
        ["--data_dir=/nowhere"],
        "/nowhere/Indian_pines_corrected.mat not found. It comes from https://doi.org/10.4231/R7RX991C (the corrected "
        "scene, Indian_pines_corrected.mat and Indian_pines_gt.mat; ...--source tensorly). Name the folder of the "
        "files with --data_dir ..., or the folder that holds indian_pines/ with the variable XBRAID_DATA; ...",
    ),
    "no_split": (
        ["--data_dir=FOLDER/plain", "--split=published"],
        "FOLDER/plain/id_training.dat not found. It comes from the authors of a published split of the scene ...",
    ),
    "foreign": (
        ["--data_dir=FOLDER/foreign"],
        "FOLDER/foreign/Indian_pines_corrected.mat has 20 x 17 pixels, but its ground truth is uint8 of shape "
        "(20, 16); use the two files of one scene",
    ),
    "depth": (["--num_layers=9"], "num_layers=9 is not a multiple of 2^refinements=2; use 8 or 10"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folders of files: with a split, without one, and of two scenes."""
    folder = tmp_path_factory.mktemp("pines")
    cube, truth = scene()
    for name, other in (("data", truth), ("plain", truth), ("foreign", truth[:, :16])):
        (folder / name).mkdir()
        write(folder / name, cube, other)
    write_split(folder / "data", truth, 90, 60)
    return folder


def summary_of(out):
    """The scores at the end of a record."""
    row = read(out / "metrics.jsonl")[-1]
    assert row.pop("kind") == "summary"
    return row


def test_a_run_leaves_scores_and_pictures(tmp_path, capsys):
    run(PINES, SERIAL, tmp_path, *SMOKE)
    rows = updates_of(tmp_path)
    assert [row["update"] for row in rows] == list(range(21)) and {row["num_layers"] for row in rows} == {8, 16}
    # It has learned: the largest class has half of the pixels.
    scores = summary_of(tmp_path)
    assert scores["overall_accuracy"] == rows[-1]["val_accuracy"] > 0.7 and scores["kappa"] > 0.5
    shares = [share for share in scores["class_accuracy"] if share is not None]
    assert len(scores["class_accuracy"]) == 4
    assert scores["average_accuracy"] == pytest.approx(sum(shares) / len(shares), rel=1e-12)
    for name in ("accuracy.png", "convergence.png", "classes.png"):
        assert (tmp_path / "figures" / name).stat().st_size > 5000
    *per_class, totals, last = capsys.readouterr().out.splitlines()[-6:]
    labeled = int((scene()[1] > 0).sum())
    counts = [int(re.fullmatch(r"class \d +(?:- *|[\d.]+ %) of (\d+)", line)[1]) for line in per_class]
    assert sum(counts) == labeled - 160
    shown = [100 * scores["overall_accuracy"], 100 * scores["average_accuracy"], scores["kappa"]]
    assert totals == "overall {:.2f} %, average {:.2f} %, kappa {:.4f}".format(*shown)
    assert last == f"final validation accuracy: {100 * rows[-1]['val_accuracy']:.2f} %"


@pytest.mark.ranks(3)
def test_the_published_split_is_the_same_on_3_ranks(folder, spmd, shared_tmp_path, monkeypatch, capsys):
    draw_nothing(monkeypatch)
    words = (*TINY, "--split=published", f"--data_dir={folder / 'data'}")

    def alone(comm):
        if comm.rank == 0:
            run(PINES, SERIAL, shared_tmp_path / "1", *words)

    def printed():
        return [line for lines in spmd(lambda comm: capsys.readouterr().out.splitlines()) for line in lines]

    spmd(alone)
    said = printed()
    assert sum(int(line.split()[-1]) for line in said[-6:-2]) == 60
    spmd(lambda comm: run(PINES, comm, shared_tmp_path / "3", *words) and None)
    assert printed()[-6:] == said[-6:]
    one, three = (updates_of(shared_tmp_path / size) for size in ("1", "3"))
    assert len(one) == 4
    for row, other in zip(three, one, strict=True):
        assert row["objective"] == pytest.approx(other["objective"], rel=1e-9)
        # Accuracies are of counts: nothing is rounded.
        assert row["val_accuracy"] == other["val_accuracy"]
    assert summary_of(shared_tmp_path / "3") == summary_of(shared_tmp_path / "1")


def test_the_scores_are_those_of_the_nested_run(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    run(PINES, SERIAL, tmp_path, "--nested.updates=2,2", "--compare")
    assert summary_of(tmp_path)["overall_accuracy"] == updates_of(tmp_path)[-1]["val_accuracy"]
    alone = read(tmp_path / "non-nested" / "metrics.jsonl")
    assert {row["num_layers"] for row in alone if row["kind"] == "update"} == {8} and alone[-1]["kind"] == "update"


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(folder, tmp_path, name):
    words, message = BAD[name]
    pattern = re.escape(message.replace("FOLDER", str(folder))).replace(r"\.\.\.", ".*")
    with pytest.raises((ValueError, OSError, OptionError), match=f"^{pattern}$"):
        run(PINES, SERIAL, tmp_path, *(word.replace("FOLDER", str(folder)) for word in words))
    assert not (tmp_path / "metrics.jsonl").exists()
