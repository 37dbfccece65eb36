"""The study of nested iteration: it runs, goes on where it was, and its page says what is in its rows."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
from kinds import draw_nothing
from processes import PROJECT
from studies.nested import page, tuning
from studies.nested.convergence import factors, pairs_of, section
from studies.nested.options import REGIMES, NestedStudyOptions, options_of
from studies.nested.runs import train
from studies.study import key

DRIVER = PROJECT / "drivers" / "nested_study.py"


def row(run, seed, accuracy, regime="paper", width=8, tikhonov=1e-5, change=None):
    """A run of 100 updates, a second each, whose accuracy rises evenly; the nested one is twice as fast."""
    speed = 0.5 if run == "nested" else 1.0
    settings = {"regime": regime, "width": width, "layers": 1e-6, "tikhonov": tikhonov, "run": run, "seed": seed}
    settings |= {"updates": [50, 25, 25]} | ({"change": change} if change else {})
    curve = [[0, 16, k, speed * k, speed * k, accuracy * k / 100] for k in range(101)]
    result = {
        "val_accuracy": accuracy,
        "square_accuracy": accuracy / 2,
        "work": speed * 100,
        "seconds": speed * 100,
        "updates": 100,
        "curve": curve,
    }
    return {"settings": settings, "result": result}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    pairs = [("nested", (0.90, 0.92, 0.97)), ("non-nested", (0.80, 0.90, 0.91))]
    rows = [row(run, seed, value) for run, values in pairs for seed, value in enumerate(values)]
    rows += [row("nested", seed, 0.5, change=change) for seed in range(2) for change in ("every", "no boost", "linear")]
    page.write([*rows, {"settings": {"regime": "paper"}, "failure": "not finite"}], out)
    return out, (out / page.PAGE).read_text()


def test_the_table_of_figure_3(written):
    _, text = written
    assert text.startswith("12 runs, 1 failed.")
    assert "| mean | 93.00 % | 87.00 % | 92.3 % | 90.7 % |" in text
    assert "| median | 92.00 % | 90.00 % | 94 % | 91.8 % |" in text
    assert "| deviation | 3.61 % | 6.08 % | 5.18 % | 6.08 % |" in text
    # Differences of 10, 2 and 6 points: mean 6, deviation 4, t(2) = 4.303, so 9.94 to either side.
    assert (
        "3 pairs. Nested less non-nested: +6.00 points in the mean (95 %: -3.94 to +15.94), nested ahead in 3." in text
    )
    assert "0.50 times the layer steps of the non-nested one, in 0.50 times its seconds" in text
    assert "drawn uniformly from the square: nested 46.50 %, non-nested 43.50 %." in text


def test_accuracy_over_work(written):
    _, text = written
    # A unit is a second. After 25 of them half of the nested run is over and a quarter of the other one.
    assert "| after 25 work units | 46.5 % | 21.8 % | +24.8" in text
    assert "| 90 % reached after (median; runs that do) | 49 units (3 of 3) | 100 units (2 of 3) |" in text
    assert "| 95 % reached after (median; runs that do) | - (1 of 3) | - (0 of 3) |" in text


def test_changes_and_pictures(written):
    out, text = written
    assert "| the paper's regime | linear | 1e-06 | 50.00 ± 0.00 % (2) |  |  |" in text
    names = {"accuracies.png", "mean_over_work.png", "best_paper_8.png", "after_refinement.png"}
    assert {path.name for path in (out / "figures").iterdir()} == names


def test_a_part_of_the_study_has_a_page(tmp_path):
    page.write([row("nested", 0, 0.9)], tmp_path)
    assert "## Width 8, the paper's regime" in (tmp_path / page.PAGE).read_text()
    page.write([], tmp_path)
    assert (tmp_path / page.PAGE).read_text() == "0 runs, 0 failed.\n"


def test_results_that_are_kept_make_their_page(tmp_path, monkeypatch):
    """They are those of the study as it is by default."""
    draw_nothing(monkeypatch)
    kept = PROJECT / "benchmarks" / "results" / "nested"
    with gzip.open(kept / "peaks_runs.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert {key(each["settings"]) for each in rows} == {key(each) for each in NestedStudyOptions().settings()}
    page.write(rows, tmp_path)
    assert (tmp_path / page.PAGE).read_text() == (kept / "peaks.md").read_text()


@pytest.mark.parametrize("part", ["convergence", "tuned_alike"])
def test_later_results_that_are_kept_make_their_page(tmp_path, part):
    kept = PROJECT / "benchmarks" / "results" / "nested"
    with gzip.open(kept / f"{part}.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    study = NestedStudyOptions(parts=(part,))
    wanted = study.settings() + study.second_stage({key(each["settings"]): each for each in rows})
    assert {key(each["settings"]) for each in rows} == set(map(key, wanted))
    page.write(rows, tmp_path)
    assert (tmp_path / page.PAGE).read_text() == (kept / f"{part}.md").read_text()


def test_every_change_is_another_run():
    settings = NestedStudyOptions(parts=("figure3", "open", "interpolation", "iterations", "depth")).settings()
    options = {(options_of(each), each["run"]) for each in settings}
    assert len(options) == len(settings)


def test_a_run():
    options = NestedStudyOptions(num_layers=16, updates=(3, 2, 2), num_train=60, num_val=20, validate_every=2)
    nested, alone = (train(each) for each in options.settings()[:2])
    assert nested["updates"] == 7 and [point[:3] for point in nested["curve"]][-1] == [0, 16, 7]
    assert [point[2] for point in nested["curve"]] == [0, 2, 4, 6, 7]
    assert {point[1] for point in nested["curve"]} == {4, 8, 16} and {point[1] for point in alone["curve"]} == {16}
    assert nested["val_accuracy"] == pytest.approx(nested["curve"][-1][5], abs=1e-4)
    assert 0 <= nested["square_accuracy"] <= 1 and nested["work"] > 0


def test_convergence_after_a_refinement():
    """By either interpolation of the same weights: the network that training goes on with is the constant one."""
    small = {"num_layers": 64, "updates": (4, 2, 2), "num_train": 60, "num_val": 20}
    (settings, *_) = NestedStudyOptions(**small, parts=("convergence",)).settings()
    found = train(settings)["refinements"]
    kinds = [(each["num_layers"], each["interpolation"]) for each in found]
    assert kinds == [(32, "constant"), (32, "linear"), (64, "constant"), (64, "linear")]
    for each in found:
        for solve in ("states", "adjoints"):
            first, *_, last = each[solve]
            assert len(each[solve]) == 11 and first > 1e-8 and last < 1e-3 * first
    assert found[0]["states"] != found[1]["states"] and found[2]["states"] != found[3]["states"]


def test_both_methods_are_tuned_by_the_same_search_and_compared_on_other_seeds(tmp_path):
    study = NestedStudyOptions(parts=("tuned_alike",), seeds=3)
    trials = study.settings()
    assert len(trials) == 2 * len(tuning.CANDIDATES) * len(tuning.TUNING) == 168
    options = [(options_of(each), each["run"], each["seed"]) for each in trials]
    assert len(set(options)) == len(options), "candidates are different runs"
    usual = [each for each in options if each[0] == replace(REGIMES["ours"], num_layers=64, seed=each[2])]
    assert len(usual) == 2 * len(tuning.TUNING), "the defaults are one of them"

    def accuracy(each):
        """The first candidate is the best for nested runs but fails once; the third, and for the others the last."""
        place = tuning.CANDIDATES.index(tuple(each[name] for name in tuning.NAMES))
        return 0.9 - 0.01 * place if each["run"] == "nested" else 0.5 + 0.01 * place

    def made(each):
        if each["seed"] == 101 and each["run"] == "nested" and each["layers"] == 0.01 and each["ddt"] == 0:
            return {"settings": each, "failure": "not finite"}
        return {"settings": each, "result": {"val_accuracy": accuracy(each) + 0.001 * (each["seed"] % 3)}}

    rows = {key(each): made(each) for each in trials}
    second = study.second_stage(rows)
    assert {each["seed"] for each in second} == {200, 201, 202} and {each["width"] for each in second} == {8, 5}
    chosen = {run: {tuple(e[n] for n in tuning.NAMES) for e in second if e["run"] == run} for run in tuning.RUNS}
    assert chosen["nested"] == {tuning.CANDIDATES[2], tuning.DEFAULT}
    assert chosen["non-nested"] == {tuning.CANDIDATES[-1], tuning.DEFAULT}
    page.write([*rows.values(), *map(made, second)], tmp_path)
    text = (tmp_path / page.PAGE).read_text()
    assert "| 1, 0.01, 0.1, 1e-06, 0, 10 | 90.07 ± 0.06 (3) | 50.10 ± 0.08 (4) |" in text
    # 88 and 70 per cent; with the defaults, the tenth candidate, 81 and 59.
    assert "| 5, each tuned | 88.10 ± 0.10 (3) | 70.10 ± 0.10 (3) | +18.00 (+18.00 to +18.00) | 3 |" in text
    assert "| 8, defaults | 81.10 ± 0.10 (3) | 59.10 ± 0.10 (3) | +22.00 (+22.00 to +22.00) | 3 |" in text


def test_factors_are_of_iterations_that_both_have():
    constant = {"num_layers": 32, "states": [1.0, 1e-2, 1e-4, 1e-6], "adjoints": [1.0, 0.5, 1e-12, 1e-12]}
    linear = {"num_layers": 32, "states": [2.0, 0.2, 0.02, 0.002], "adjoints": [1.0, 0.25, 0.125, 0.1]}
    assert factors((constant, linear), "states") == pytest.approx([1e-2, 1e-1])
    assert factors((constant, linear), "adjoints") == pytest.approx([0.5, 0.25])
    settings = {"regime": "paper", "num_layers": 64, "change": "convergence, deep", "seed": 0}
    row = {"settings": settings, "result": {"refinements": [constant, linear]}}
    (key_of,) = pairs_of([row])
    assert key_of == ("paper", 256, 32)
    *_, text = section([row])
    assert "| paper, 256 layers | 32 | states | 1.0e-02 | 1.0e-01 | 10.00 | 2.0 | 10.0 | 1 |" in text


@pytest.mark.job
@pytest.mark.long
def test_the_driver_goes_on_where_it_was(run_job, tmp_path):
    words = ["--smoke", "--parts=interpolation", "--seeds=1", "--workers=2", f"--out={tmp_path}"]
    first = run_job([DRIVER, *words], timeout=150)
    assert first.returncode == 0, first.stderr
    rows = (tmp_path / "runs.jsonl").read_text()
    assert len(rows.splitlines()) == 2 and all("result" in json.loads(line) for line in rows.splitlines())
    again = run_job([DRIVER, *words], timeout=150)
    assert again.returncode == 0 and (tmp_path / "runs.jsonl").read_text() == rows
    assert (tmp_path / "study.md").read_text().startswith("2 runs, 0 failed.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("figure4",)}, "^parts=figure4 is none of figure3, defaults, open"),
        ({"num_val": 0}, "^num_val=0 must be at least 1; use 2$"),
        ({"num_layers": 30}, r"^num_layers=30 is not a multiple of 2\^refinements=4; use 28 or 32$"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        NestedStudyOptions(**changes)
