"""The study of multi-level residual networks: parts, defaults, page and figures; driver and benchmark."""

from __future__ import annotations

import gzip
import json
import runpy
import sys

import pytest
from cifar_files import write_cifar10
from kinds import program
from multi_level_rows import row
from processes import PROJECT
from studies.multi_level import page
from studies.multi_level.runs import train
from studies.multi_level.tables import CURVE
from studies.statistics import Summary
from studies.study import key

from xbraid_py.comm import SerialCommunicator
from xbraid_py.multilevel.resnet.training import ResNetTraining
from xbraid_py.run.options import parse

STUDY = program("multi_level_study")
TINY = {"epochs": (1, 1), "blocks": (1, 2), "filters": (4, 8), "batch_size": 8, "stem_stride": 2, "seeds": 1}
TINY |= {"train_images": 24, "test_images": 10, "norm": "group", "workers": 1}
EXTRA = {
    "train_images": 10_000,
    "stem_stride": 2,
    "eta_max": 0.2,
    "eta_min": 1e-3,
    "precision": "bfloat16",
    "reset": True,
}


def rows():
    """Two seeds: the multilevel model is 0.01 and 0.03 worse at the end, in 60 and 50 % of the time."""
    last = [row("last", error, 30.0, 100, seed, **EXTRA) for seed, error in ((0, 0.4), (1, 0.44))]
    grown = [
        row("multilevel", 0.4 + 0.032, 18.0, 60, 0, **EXTRA),
        row("multilevel", 0.44 + 0.096, 15.0, 60, 1, **EXTRA),
    ]
    first = [row("first", 0.5, 8.0, 25, seed, **EXTRA) for seed in (0, 1)]
    return [*last, *grown, *first]


def test_differences_are_paired():
    text = page.differences(rows())
    (line,) = (each for each in text.splitlines() if each.startswith("| ResNet-50-i"))
    summary = Summary.of([1.0, 3.0])
    assert f"+2.00 ({summary.low:+.2f} to {summary.high:+.2f}) | 45.0 | 2" in line
    assert page.differences([each for each in rows() if each["settings"]["model"] != "last"]) == ""


def test_figures():
    found = page.figures(rows())
    assert found["time_saved"] == pytest.approx(0.45) and found["work_saved"] == pytest.approx(0.4)
    assert found["error_last_cycle"] == pytest.approx(1.25 * 0.42 / 4)
    assert found["error_multi_level"] == pytest.approx(1.25 * (0.432 + 0.536) / 2 / 4)
    assert found["deviation_last_cycle"] == pytest.approx(1.25 * 0.04 / 2**0.5 / 4)


def test_page(tmp_path):
    changed = [row("multilevel", 0.4, 18.0, 60, seed, **EXTRA | {"reset": False}) for seed in (0, 1)]
    failed = {"settings": row("last", seed=2, **EXTRA)["settings"], "failure": "the loss is nan"}
    text = page.write({"models": [*rows(), failed], "reset": [*rows(), *changed]}, tmp_path)
    assert (tmp_path / page.PAGE).read_text() == text
    assert "10,000 training images" in text and "filters 16-32-64" in text and "cycles of 2/1/1 epochs" in text
    assert "| ResNet-50-i, reset=False | -0.63" in text and "seed 2: the loss is nan" in text
    assert (tmp_path / "figures" / "figure6.png").stat().st_size > 10_000


def test_results_that_are_kept_make_their_page(tmp_path):
    """Its lines are in the order of the file."""
    kept = PROJECT / "benchmarks" / "results" / "multi_level"
    with gzip.open(kept / "runs.jsonl.gz", "rt") as file:
        text = page.write({"models": [json.loads(line) for line in file]}, tmp_path)
    assert sorted(text.splitlines()) == sorted((kept / page.PAGE).read_text().splitlines())


@pytest.mark.parametrize("part", STUDY.CHANGES)
def test_parts(part):
    found = STUDY.settings_of(STUDY.Options(seeds=2, parts=(part,)))[part]
    models = [settings["model"] for settings in found if settings["seed"] == 1]
    changes = STUDY.CHANGES[part]
    assert models[:3] == ["first", "last", "multilevel"] and len(models) == 3 + len(changes)
    for settings, change in zip(found[len(found) - len(changes) :], changes, strict=True):
        assert all(settings[name] == value for name, value in change.items())
    assert sum("noise" in settings for settings in found) == 2 * len(changes) * (part == "noise")
    assert len({repr(settings) for settings in found}) == len(found)
    assert not {"out", "resume", "workers"} & found[0].keys()


@pytest.mark.parametrize(
    "words, epochs, seeds, images",
    [
        ([], (42, 35, 35), 5, 5000),
        (["--paper"], (60, 50, 50), 3, 0),
        (["--paper", "--seeds=4"], (60, 50, 50), 4, 0),
        (["--smoke", "--paper"], (2, 1, 1), 2, 100),
    ],
)
def test_defaults_of_the_protocols(words, epochs, seeds, images):
    options = parse(STUDY.Options, words, presets=STUDY.PRESETS)
    assert (options.epochs, options.seeds, options.train_images) == (epochs, seeds, images)


def test_wrong_options():
    with pytest.raises(ValueError, match=r"^seeds=0 must be at least 1; use 2$"):
        STUDY.Options(seeds=0)
    with pytest.raises(ValueError, match=r"^parts=\[\] must be some of models, reset"):
        STUDY.Options(parts=())
    with pytest.raises(ValueError, match=r"^checkpoint_every=-1 must be at least 0; use 5$"):
        STUDY.Options(checkpoint_every=-1)
    with pytest.raises(ValueError, match=r"^noise=-0.1 must be at least 0 and finite; use 0.1$"):
        STUDY.Options(noise=-0.1)
    with pytest.raises(ValueError, match=r"^filters=.* must name 3 stages"):
        STUDY.Options(filters=(4, 8))


def test_the_study_runs_and_goes_on(tmp_path, capsys):
    options = STUDY.Options(**TINY, data_dir=write_cifar10(tmp_path), out=tmp_path / "out", parts=("models", "reset"))
    STUDY.setup(options, SerialCommunicator())()
    assert "4 runs, 0 of them over" in capsys.readouterr().out
    made = [json.loads(line) for line in (tmp_path / "out" / "runs.jsonl").read_text().splitlines()]
    assert len(made) == 4 and all("result" in each for each in made)
    STUDY.setup(options, SerialCommunicator())()
    assert "4 runs, 4 of them over" in capsys.readouterr().out


def test_rows_of_before_are_those_of_the_study():
    """So that a study goes on from what is kept."""
    with gzip.open(PROJECT / "benchmarks" / "results" / "multi_level" / "runs.jsonl.gz", "rt") as file:
        kept = {key(json.loads(line)["settings"]) for line in file}
    assert kept == set(map(key, STUDY.settings_of(STUDY.Options())["models"]))


def test_a_run_goes_on_from_its_own_checkpoint(tmp_path, monkeypatch):
    """Stopped after the refinement, and then as if nothing had happened."""
    data = write_cifar10(tmp_path)
    options = STUDY.Options(**TINY | {"epochs": (2, 2)}, data_dir=data, out=tmp_path, parts=("noise",))
    settings = next(each for each in STUDY.settings_of(options)["noise"] if "noise" in each)
    whole = train(settings, tmp_path / "whole", 1)
    in_memory = train(settings)
    assert without_seconds(whole) == without_seconds(in_memory)
    monkeypatch.setattr(ResNetTraining, "run", stopping(ResNetTraining.run, 3))
    with pytest.raises(InterruptedError):
        train(settings, tmp_path / "cut", 1)
    monkeypatch.undo()
    (folder,) = (tmp_path / "cut").iterdir()
    metrics = folder / "multilevel_0" / "metrics.jsonl"
    before = metrics.read_text().count('"epoch"')
    found = train(settings, tmp_path / "cut", 1)
    assert without_seconds(found) == without_seconds(whole) and metrics.read_text().count('"epoch"') == 4 > before
    assert without_seconds(train(settings, tmp_path / "cut", 1)) == without_seconds(whole), "a run that is over"


def stopping(run, epochs):
    def until(self):
        for record in run(self):
            if record.epoch > epochs:
                raise InterruptedError
            yield record

    return until


def without_seconds(result):
    place = CURVE.index("seconds")
    curve = [[value for n, value in enumerate(point) if n != place] for point in result["curve"]]
    return {**result, "seconds": 0.0, "curve": curve}


@pytest.mark.job
@pytest.mark.long
def test_the_benchmark_prints_its_figures(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(PROJECT / "benchmarks"))
    names = runpy.run_path(str(PROJECT / "benchmarks" / "multi_level.py"))
    quick = dict(
        epochs=(1, 1), blocks=(1, 2), filters=(4, 8), batch_size=8, train_images=24, test_images=10, norm="group"
    )
    names["main"].__globals__["QUICK"] = names["replace"](names["QUICK"], **quick)
    words = ["multi_level.py", "--quick", "--workers", "1", "--data_dir", str(write_cifar10(tmp_path))]
    monkeypatch.setattr(sys, "argv", words)
    names["main"]()
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])["figures"]
    assert figures["work_saved"] == pytest.approx(0.25)
    assert {"time_saved", "error_multi_level", "error_last_cycle"} <= figures.keys()
