"""The study of training loops over depth: its page says what is in its rows, its runs are of equal work, it goes on."""

from __future__ import annotations

import gzip
import json
import math

import pytest
from digit_files import write_digits
from kinds import program
from processes import PROJECT
from studies.depth import page
from studies.depth.options import LOOPS, RATES, TUNING, DepthStudyOptions, merit
from studies.depth.runs import share, train
from studies.study import key

from xbraid_py.comm import SerialCommunicator

DRIVER = PROJECT / "drivers" / "depth_study.py"
KEPT = PROJECT / "benchmarks" / "results" / "depth"
TINY = {"work": 12.0, "num_layers": 8, "width": 4, "num_train": 500}


def row(loop, seed, value, seconds=2.0, problem="digits", search=False, rate=0.1):
    name = {"digits": "val_accuracy", "text": "val_loss"}[problem]
    settings = {"problem": problem, "optimizer": "sgd", "loop": loop, "line_search": search, "learning_rate": rate}
    settings |= {"seed": seed, "work": 8.0, "num_layers": 8}
    curve = [[work, work, seconds * work / 8, value * work / 8] for work in (2, 4, 6, 8)]
    return {
        "settings": settings,
        "result": {name: value, "loss": 1.0, "work": 8.0, "updates": 8, "seconds": seconds, "curve": curve},
    }


def failure(loop, seed):
    return {"settings": row(loop, seed, 0.0)["settings"], "failure": "update 3: the loss is nan"}


def written(parts, out):
    page.write(parts, out)
    return (out / page.PAGE).read_text()


def test_the_page_says_what_is_in_the_rows(tmp_path):
    compared = [row("plain", seed, 0.80 + 0.01 * seed) for seed in range(3)]
    compared += [row("nested", seed, 0.90 + 0.02 * seed, 1.0, rate=0.3) for seed in range(3)]
    compared += [row("[(1), {2}]", 0, 0.5, 4.0, search=True), failure("[(1), {2}]", 1)]  # at its half after 2 seconds
    compared += [row("plain", 0, 2.0, problem="text"), failure("[(1), 1, {2}]", 0)]
    tuning = [row("plain", TUNING, value, rate=rate) for rate, value in ((0.1, 0.7), (1.0, 0.71))]
    text = written({"tuning": [*tuning, failure("nested", TUNING)], "compared": compared}, tmp_path)
    assert text.startswith("13 runs, 3 failed.")
    # Differences of 10, 11 and 12 points: mean 11, deviation 1, t(2) = 4.303, so 2.48 to either side.
    for line in (
        "| all layers from the start | 0.1 | 8 | 40.50 | 81.00 ± 1.00 (3) |  | 2.0 | 1.00 | 81.00 |",
        "| nested iteration | 0.3 | 8 | 46.00 | 92.00 ± 2.00 (3) | +11.00 (+8.52 to +13.48) | 1.0 | 0.50 | 92.00 |",
        "| MG/OPT [(1), {2}], line search | 0.1 | 8 | 25.00 | 50.00 ± 0.00 (1) | -30.00 (-30.00 to -30.00) "
        "| 4.0 | 2.00 | 25.00 |",
        "| MG/OPT [(1), {2}] |  |  |  | failed |  |  |  |  |",
        "| all layers from the start | 0.1 | 8 | 1.000 | 2.000 ± 0.000 (1) |  | 2.0 | 1.00 | 2.000 |",
        "| loop | 0.1 | 0.3 | 1 |",
        "| all layers from the start | 70.00 |  | 71.00 |",
        "| nested iteration |  |  |  |",
    ):
        assert line in text, line


def test_a_part_of_the_study_has_a_page(tmp_path):
    assert written({}, tmp_path).startswith("0 runs, 0 failed.")
    assert written({"compared": [failure("plain", 0), row("nested", 0, 0.5)]}, tmp_path).startswith("2 runs, 1 failed.")


def test_rates_are_chosen_on_a_seed_of_their_own():
    options = DepthStudyOptions(seeds=2, problems=("digits",), **TINY)
    tuning = options.tuning({})["tuning"]
    assert len(tuning) == 2 * len(LOOPS) * 3 and {each["seed"] for each in tuning} == {TUNING}
    assert {each["work"] for each in tuning} == {4.0}
    rows = {key(each): {"settings": each, "result": {"val_accuracy": each["learning_rate"]}} for each in tuning}
    for each in rows.values():
        if each["settings"]["learning_rate"] == max(RATES["digits", "sgd"]):
            each["result"]["val_accuracy"] = math.nan
    found = options.compared(rows)["compared"]
    assert {(each["optimizer"], each["learning_rate"]) for each in found} == {("adam", 3e-2), ("sgd", 0.3)}
    assert len(found) == 2 * 2 * len(LOOPS) and {each["seed"] for each in found} == {0, 1}
    assert merit(failure("plain", 0)) == -math.inf < merit(row("plain", 0, 5.0, problem="text"))
    assert share(0.0) == 0.05 and share(0.05) == pytest.approx(1.0, abs=0.01) and share(1.0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    "wrong", [{"problems": ("speech",)}, {"optimizers": ("lbfgs",)}, {"work": 1.0}, {"num_layers": 6}]
)
def test_options_that_are_refused(wrong):
    ((name, _),) = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name}=.*; use "):
        DepthStudyOptions(**wrong)


def test_runs_of_equal_work(tmp_path):
    write_digits(tmp_path, 500, 100)
    options = DepthStudyOptions(problems=("digits",), optimizers=("sgd",), data_dir=tmp_path, **TINY)
    found = {each["loop"]: train({**each, "learning_rate": 0.1, "seed": 0}) for each in options.cases()}
    plain, nested, cycles = (found[name] for name in ("plain", "nested", "[(1), 1, {2}]"))
    assert plain["work"] == plain["updates"] == 12
    # A third of the work with two layers, at a quarter of a unit, then with four at a half, then with all eight.
    assert nested["work"] == 12 and nested["updates"] == 16 + 8 + 4
    assert cycles["updates"] == 3 and cycles["work"] >= 12  # of 4 units by eq. 10, and more with a line search
    for result in found.values():
        assert [point[0] for point in result["curve"]] == sorted(point[0] for point in result["curve"])
        assert result["curve"][-1][3] == result["val_accuracy"] and math.isfinite(result["loss"])


def test_results_that_are_kept_make_their_page(tmp_path):
    with gzip.open(KEPT / "runs.jsonl.gz", "rt") as file:
        rows = {key(each["settings"]): each for each in map(json.loads, file)}
    options = DepthStudyOptions()
    parts = {name: [rows[key(each)] for each in wanted] for name, wanted in options.tuning(rows).items()}
    parts |= {name: [rows[key(each)] for each in wanted] for name, wanted in options.compared(rows).items()}
    assert sum(map(len, parts.values())) == len(rows)
    assert written(parts, tmp_path) == (KEPT / "study.md").read_text()


def test_files_that_are_missing_are_said_at_once(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data_dir FOLDER"):
        program("depth_study").setup(DepthStudyOptions(out=tmp_path, data_dir=tmp_path), SerialCommunicator())


@pytest.mark.job
@pytest.mark.long
def test_the_driver_goes_on_where_it_was(run_job, tmp_path):
    (tmp_path / "digits").mkdir()
    write_digits(tmp_path / "digits", 500, 100)
    words = ["--smoke", "--problems=[digits]", f"--data_dir={tmp_path / 'digits'}", f"--out={tmp_path}"]
    first = run_job([DRIVER, *words], timeout=200)
    assert first.returncode == 0, first.stderr
    rows = (tmp_path / "runs.jsonl").read_text()
    assert len(rows.splitlines()) == 4 * len(LOOPS) and all("result" in json.loads(each) for each in rows.splitlines())
    again = run_job([DRIVER, *words], timeout=200)
    assert again.returncode == 0 and (tmp_path / "runs.jsonl").read_text() == rows
    assert (tmp_path / "study.md").read_text().startswith(f"{4 * len(LOOPS)} runs, 0 failed.")
