"""MG/OPT in depth as a job: circles and MNIST's columns to their goals, going on with other ends, bad input."""

from __future__ import annotations

import pytest
from kinds import KINDS, finished, options_of, run, updates_of

from xbraid_py.comm import SerialCommunicator
from xbraid_py.recipes.mgopt import training_of
from xbraid_py.recipes.options.mgopt import CirclesOptions, MnistColumnsOptions
from xbraid_py.recipes.pictures.curves import over_cycles
from xbraid_py.run.engine import rows_of
from xbraid_py.run.options import OptionError
from xbraid_py.run.run_options import RunOptions

SERIAL = SerialCommunicator()
CIRCLES, MNIST = KINDS["mgopt"], KINDS["mgopt_mnist"]
GOAL = ("--num_layers=64", "--mgopt.levels=4", "--max_cycles=20")


def test_circles_are_learnt(tmp_path, capsys):
    row = run(CIRCLES, SERIAL, tmp_path, *GOAL, "--mgrit.max_levels=1")  # whose work is what it counts
    assert row["val_accuracy"] == 1.0 and row["final"] and row["update"] < 20
    assert row["work"] == row["counted_work"] == 5.0 * row["cycle"] and row["gradients"][0] == 2 * row["cycle"]
    said = f"validation accuracy 100.00 % after {row['cycle']} cycles, {row['work']:.1f} work units"
    assert said in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"cycles.png", "classes.png"}


def test_a_run_that_is_over_goes_on_for_more_cycles_or_a_higher_goal(tmp_path, capsys):
    run(MNIST, SERIAL, tmp_path, "--max_cycles=3", "--validate_every=2")
    assert "%, not the goal, after 3 cycles" in capsys.readouterr().out
    run(MNIST, SERIAL, tmp_path, "--validate_every=2", "--resume=auto")
    found, expected = updates_of(tmp_path), updates_of(finished("mgopt_mnist"))
    # The first part made a validation at its end that the whole run did not.
    assert found[3].pop("val_accuracy") is not None and found[3].pop("final")
    expected[3].pop("final")
    assert found == expected
    # And one that has come further than it was to is over.
    out = tmp_path / "checkpoints" / "update_000005.h5"
    run(MNIST, SERIAL, tmp_path / "other", "--max_cycles=4", f"--resume={out}")
    said = capsys.readouterr().out
    assert "is finished" in said and "no validation, not the goal, after 5 cycles" in said


def rows(kind, *words):
    """The rows of a run in memory."""
    return list(rows_of(training_of(options_of(kind, RunOptions.out, *words), SERIAL)))


def test_validations_are_made_as_often_as_asked_for():
    found = rows(MNIST, "--max_cycles=5", "--validate_every=2")
    assert ["val_accuracy" in row for row in found] == [True, False, True, False, True, True]


def test_all_images_in_portions_and_a_goal():
    words = ("--dtype=float64", "--batch_size=0", "--goal=0.3", "--validate_every=1", "--max_cycles=40")
    whole, parts = (rows(MNIST, *words, f"--portion={portion}") for portion in (200, 70))
    assert whole[-1]["final"] and whole[-1]["update"] < 40
    assert whole[-1]["val_accuracy"] >= 0.3 > whole[-2]["val_accuracy"]
    for row, other in zip(parts, whole, strict=True):
        assert row["objective"] == pytest.approx(other["objective"], rel=1e-9)
        assert row["train_accuracy"] == pytest.approx(other["train_accuracy"])
        assert row["counted_work"] == pytest.approx(other["counted_work"], rel=1e-12)
        assert all(row[name] == other[name] for name in ("work", "gradients", "val_accuracy"))


def test_a_minibatch_for_each_cycle():
    found = rows(MNIST, "--max_cycles=3", "--mgopt.optim.learning_rate=1e-12", "--beta=0")
    losses = {row["loss"] for row in found}
    assert len(losses) == 4, "of the same weights, on other images"


@pytest.mark.parametrize(
    ("options_class", "changes", "message"),
    [
        (CirclesOptions, {"goal": 0.0}, "^goal=0.0 must be above 0 and at most 1; use 0.93$"),
        (CirclesOptions, {"goal": 1.5}, "^goal=1.5 must be above 0 and at most 1; use 0.93$"),
        (CirclesOptions, {"beta": -1.0}, "^beta=-1.0 must be at least 0 and finite; use 1e-4$"),
        (CirclesOptions, {"max_cycles": 0}, "^max_cycles=0 must be at least 1; use 100$"),
        (CirclesOptions, {"validate_every": 0}, "^validate_every=0 must be at least 1; use 100$"),
        (CirclesOptions, {"keep": 0}, "^keep=0 must be at least 1; use 5$"),
        (MnistColumnsOptions, {"portion": 0}, "^portion=0 must be at least 1; use 2000$"),
        (MnistColumnsOptions, {"scaling": "raw"}, "^scaling='raw' must be centered or unit or standard; use centered$"),
        (MnistColumnsOptions, {"batch_size": -1}, "^batch_size=-1 must be at least 0; use 1000, or 0 for all images$"),
    ],
)
def test_bad_options(options_class, changes, message):
    with pytest.raises(ValueError, match=message):
        options_class(**changes)


@pytest.mark.parametrize(
    ("kind", "word", "message"),
    [
        (CIRCLES, "--num_layers=62", r"^num_layers=62 is not a multiple of 2\^\(levels - 1\)=4; use 60 or 64$"),
        (CIRCLES, "--mgopt.schedule=[(1), x, {2}]", "entry 2, 'x', must be n, .n., m/n or, for the coarsest level"),
        (MNIST, "--num_layers=22", r"^num_layers=22 is not a multiple of 2\^\(levels - 1\)=4; use"),
        (MNIST, "--batch_size=1000", "^batch_size=1000 is more than num_samples=200"),
    ],
)
def test_bad_input_is_one_message_before_the_run(tmp_path, kind, word, message):
    with pytest.raises((ValueError, OptionError), match=message):
        run(kind, SERIAL, tmp_path, word)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_picture_of_cycles(tmp_path):
    shown = [
        {"cycle": k, "work": 5.0 * k, "seconds": 0.1 * k, "loss": 1 / (k + 1), "val_accuracy": 0.5} for k in range(4)
    ]
    for over in ("cycle", "work", "seconds"):
        over_cycles({"one": shown, "two": shown[:1]}, tmp_path / f"{over}.png", over)
        assert (tmp_path / f"{over}.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(ValueError, match="^over='update' must be one of cycle, work, seconds; use cycle$"):
        over_cycles({"one": shown}, tmp_path / "x.png", "update")
    with pytest.raises(ValueError, match="^runs holds no run"):
        over_cycles({}, tmp_path / "x.png")
