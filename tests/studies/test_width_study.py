"""The study of multilevel training in width: its page says what is in its rows; driver and benchmark run and go on."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
import torch
from kinds import program
from processes import PROJECT
from studies.study import PAGE, key
from studies.width import page
from studies.width.case import changed, options_of, runs
from studies.width.parts import FIXED, SCAN, TUNED, UNDAMPED, WidthStudyOptions
from studies.width.rows import best, judged, merit, ratio, ratios, words

from xbraid_py.comm import SerialCommunicator
from xbraid_py.multilevel.width.options import WidthTrainingOptions
from xbraid_py.recipes.options.width import ERRORS, PoissonOptions, WidthNetwork
from xbraid_py.run.options import parse

DRIVER = PROJECT / "drivers" / "width_study.py"
CONV = WidthNetwork(kind="convolutional", widths=(64, 64), channels=(32,), kernels=(3,), strides=(2,))
SIZES = {
    "mesh": 8,
    "num_train": 40,
    "num_val": 10,
    "darcy_train": 40,
    "darcy_val": 10,
    "batch_size": 8,
    "max_work": 45.0,
    "validate_every": 14.0,
}
STUDY = WidthStudyOptions(poisson=WidthNetwork(widths=(64, 64)), poisson_conv=CONV, **SIZES)


def small(*words):
    """The options of the driver with `--smoke` and these words."""
    driver = program("width_study")
    return parse(driver.Options, ["--smoke", *words], presets=driver.PRESETS)


def settings_of(seed=0, max_work=90.0, validate_every=30.0, **training):
    """Settings of a run of Poisson's problem with these options of the training."""
    base = PoissonOptions(max_work=max_work, validate_every=validate_every, training=WidthTrainingOptions(**training))
    return runs([base], [seed])[0]


def row(l2, seed=0, linf=0.5, unit=14.0, without=9.0, count=10, aux=None, **changes):
    """A run of a point for each cycle; its error falls to `l2` in the middle and rises again."""
    middle, curve = count // 2, []
    for k in range(1, count + 1):
        factor = 1.0 + abs(k - middle)
        own = [l2 * factor, linf * factor]
        of_aux = [None] * 4 if aux is None else [aux, 2 * aux] * 2
        curve.append([k, unit * k, without * k, 2 * unit * k, 0.1 * k, 0.1, *own, *own, *of_aux])
    return {"settings": settings_of(seed, **changes), "result": {"curve": curve, "mean_l2": 0.0125}}


def failure(**changes):
    return {"settings": settings_of(**({"alpha_m": 0.0} if "method" in changes else {}), **changes), "failure": "nan"}


def written(parts, out):
    page.write(parts, out)
    return (out / PAGE).read_text()


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def test_runs_are_judged_at_equal_work():
    run = row(1e-3)
    # At 30, 60 and 90 units: the cycles of 28, 56 and 84, or, without tau, of 27, 54 and 90.
    assert [point["cycle"] for point in judged(run, 90.0)] == [2, 4, 6]
    assert [point["cycle"] for point in judged(run, 90.0, "work_without_tau")] == [3, 6, 10]
    assert [point["cycle"] for point in judged(run, 90.0, "counted_work")] == [1, 2, 3]
    assert [point["cycle"] for point in judged(run, 59.0)] == [2, 4]
    assert best(run, "val_l2", 90.0) == 2e-3 and best(run, "val_l2", 30.0) == 4e-3
    assert best(run, "aux_val_l2", 90.0) == math.inf == best(failure(), "val_l2", 90.0)
    # A run of few and long cycles is not judged twice at the same point.
    assert [point["cycle"] for point in judged(row(1e-3, unit=80.0, count=2), 180.0)] == [1, 2]


def test_ratios_are_paired_by_seed():
    one = [row(2e-3, seed, levels=1) for seed in (0, 1, 2)]
    two = [row(1e-3, 0), row(1.5e-3, 1), failure(seed=2), row(1e-3, 7)]
    assert ratios(one, two, "val_l2", 90.0) == pytest.approx([0.5, 0.75])
    found = ratio(one, two, "val_l2", 90.0)
    assert (found.wins, found.count) == (2, 2) and found.mean == pytest.approx(math.sqrt(0.375))
    assert str(found).startswith("0.612 (0.0") and found.verdict == "undecided"
    sure = ratio(one, [row(1e-3 + 1e-5 * seed, seed) for seed in (0, 1, 2)], "val_l2", 90.0)
    assert sure.verdict == "wins" and sure.low < 0.505 < sure.high
    worse = ratio(one, [row(4e-3 + 1e-5 * seed, seed) for seed in (0, 1, 2)], "val_l2", 90.0)
    assert worse.verdict == "loses" and ratio(one, [failure()], "val_l2", 90.0) is None
    assert str(ratio(one, two[:1], "val_l2", 90.0)) == "0.5, 1 of 1"
    assert ratio(one, two[:1], "val_l2", 90.0).verdict == "undecided"


def test_merit():
    assert merit([row(1e-3), row(3e-3, 1)], 90.0) == 4e-3 < merit([row(4e-3)], 90.0)
    assert merit([row(1e-3), failure(seed=1)], 90.0) == math.inf == merit([], 90.0)


def test_tables_of_levels(tmp_path):
    rows = [row(2e-3, seed, levels=1) for seed in (0, 1)] + [row(1e-3, seed, aux=3e-3) for seed in (0, 1)]
    rows += [row(1e-3, 0, levels=3, aux=5e-3), failure(seed=1, levels=3)]
    text = written({"table1": rows, "table3": rows}, tmp_path)
    assert text.startswith("12 runs in 2 parts, 2 failed.")
    assert "9000 training and 1000 validation samples on 32 x 32 points, 90 work units" in text
    assert "The mean training target has the validation L2 1.25e-02." in text
    # The best within 90 units is twice the value in the middle.
    assert lines_of(text, "| 1 | 0 of 2 | 4.00e-03 | 1.000 | 4.00e-03 | 1.000 | 2.94e-3 | 0.626 | 2.84e-3 | 0.814 |")
    assert lines_of(text, "| 2 | 0 of 2 | 2.00e-03 | 1.000 | 2.00e-03 | 1.000 | 1.61e-3 | 0.496 | 1.59e-3 | 0.664 |")
    assert lines_of(text, "| 2 aux |  | 3.00e-03 | 0.006 | 3.00e-03 | 0.006 | 1.35e-3 | 0.492 | 4.25e-4 | 0.107 |")
    assert lines_of(text, "| 3 | 1 of 2 | 2.00e-03 |")
    assert lines_of(text, "| 2 | 0.5 (0.5 to 0.5), 2 of 2 | 1 (1 to 1), 0 of 2 | 0.5")
    assert lines_of(text, "| 3 | 0.5, 1 of 1 | 1, 0 of 1 |")
    for name in ("figure3.png", "figure8.png"):
        assert (tmp_path / "figures" / name).read_bytes()[:4] == b"\x89PNG"


def test_learning_rates_on_the_levels(tmp_path):
    rows = [row(1e-3, seed, levels=4, eta=eta, aux=3e-3) for eta in (1.0, math.sqrt(2)) for seed in (0, 1)]
    text = written({"table4": rows}, tmp_path)
    assert lines_of(text, "| 1.414 | 0 of 2 | 2.00e-03 | 1.000 | 2.00e-03 | 1.000 | 1.08e-3 |")
    assert lines_of(text, "| 1.414 aux |  | 3.00e-03 | 0.006 | 3.00e-03 | 0.006 | 1.26e-3 |")


def test_methods_beside_the_single_level_of_their_optimizer(tmp_path):
    seeds = (0, 1, 2)
    rows = [row((2 + 0.01 * seed) * 1e-3, seed, levels=1) for seed in seeds]
    rows += [row((1 + 0.01 * seed) * 1e-3, seed, gamma=1.0, learning_rate=0.1) for seed in seeds]
    rows += [row((3 + 0.01 * seed) * 1e-3, seed) for seed in seeds]
    rows += [row((1 + 0.01 * seed) * 1e-3, seed, levels=1, method="adam") for seed in seeds]
    rows += [failure(seed=seed, method="adam") for seed in seeds]
    text = written({"scan": rows}, tmp_path)
    assert lines_of(text, "| sgd, 1 level | 0.01 | 0 of 3 | 4.02e-03 | 1.000 | 4.02e-03 | 1.000 | 7.1 |")
    assert lines_of(text, "| sgd, 2 levels, gamma=1.0 | 0.1 | 0 of 3 | 2.02e-03 |")
    assert lines_of(text, "| adam, 2 levels, alpha_m=0.0 | 0.01 | 3 of 3 | - | - | - | - | - |")
    assert lines_of(text, "* sgd, 2 levels, gamma=1.0: wins in L2, tau counted; L2, tau not counted; L2, multiply-adds")
    assert lines_of(text, "* sgd, 2 levels: loses in L2, tau counted;")
    assert not lines_of(text, "* adam") and (tmp_path / "figures" / "tuned_poisson_5.png").exists()


def test_no_rows_make_a_page(tmp_path):
    assert written({}, tmp_path).startswith("0 runs in 0 parts, 0 failed.")
    assert "##" not in written({"table1": []}, tmp_path)


@pytest.mark.parametrize("part", [*FIXED, *TUNED])
def test_parts_are_of_different_runs_that_can_be_made(part):
    cases = list(STUDY.cases(part).values())
    assert len(set(cases)) == len(cases) > 1 and part in page.SECTIONS
    for case in cases:
        training = case.training
        assert case.layers.widths and case.num_train == 40 and not case.count_tau
        assert (case.layers.kind == "convolutional") == part.endswith("_conv")
        assert STUDY.rates_of(case) == (STUDY.adam_rates if training.method == "adam" else STUDY.rates)
        # Momentum that is carried between levels makes Adam's steps of any size.
        assert training.method != "adam" or training.levels == 1 or training.alpha_m == 0.0
    assert part == "table4" or {case.training.levels for case in cases} >= {1, 2}


@pytest.mark.parametrize("part", ["tuned_conv", "table1_conv", "table2_conv", "table3_conv"])
def test_convolutional_parts_can_be_made_smaller(part):
    """Fewer samples and levels: the runs of one seed that are left are those of the whole, but for that."""
    study = replace(STUDY, darcy_train=20, num_train=16, most_levels=2)
    found = list(study.cases(part).values())
    assert {case.num_train for case in found} == {20 if "darcy" in {case.name for case in found} else 16}
    assert {case.training.levels for case in found} == {1, 2}
    whole = [case for case in STUDY.cases(part).values() if case.training.levels <= 2]
    assert [case.training for case in found] == [case.training for case in whole]


def test_the_device_is_not_one_of_the_settings():
    """What was made on one is not made again on another; and rows of before there was a choice are found."""
    cases = [replace(STUDY, device=device).cases("table1_conv").values() for device in ("cpu", "cuda")]
    here, there = (list(map(key, runs(each, [0]))) for each in cases)
    assert here == there and not any("device" in each for each in here)
    assert options_of(json.loads(here[0])).device == "cpu"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    with pytest.raises(ValueError, match="^device=cuda: PyTorch finds no such device here; use cpu$"):
        program("width_study").setup(small("--device=cuda", f"--out={tmp_path}"), SerialCommunicator())
    assert not list(tmp_path.iterdir())


def test_names_of_settings_are_of_one_group():
    """So that tables can name them without their groups."""
    for part in ("scan", "table1_conv", "table4"):
        for each in runs(STUDY.cases(part).values(), [0]):
            assert words(each)["levels"] == each["training"]["levels"]
            flat = [name for value in each.values() if isinstance(value, dict) for name in value if name != "pairs"]
            flat += [*each["training"]["pairs"], *(name for name in each if not isinstance(each[name], dict))]
            assert len(flat) == len(set(flat)) == len(words(each))


def test_who_is_ahead_on_the_way(tmp_path):
    """Two levels are ahead by a half in units of eq. 40, from the first third of the work on."""
    budget = {"max_work": 120.0, "validate_every": 10.0}
    base = [row(2e-3, seed, unit=10.0, without=10.0, count=12, levels=1, **budget) for seed in (0, 1)]
    ahead = [row(1e-3, seed, unit=10.0, without=10.0, count=12, **budget) for seed in (0, 1)]
    text = written({"scan": [*base, *ahead]}, tmp_path)
    (line,) = (each for each in lines_of(text, "| sgd, 2 levels") if "tau counted" in each and "/" in each)
    assert line.count("0.50 / 1.00") == 6


def test_what_is_scanned():
    found, base = STUDY.cases("scan"), STUDY.base("poisson")
    assert list(found) == list(SCAN) and found["two levels"] == base
    assert found["no damping"] == changed(base, **UNDAMPED)
    assert found["no tau"].training.gamma == 0.0 and found["sgd alone"].training.levels == 1
    assert found["eq. 32"].training.pairs.scaling == "mean"
    with pytest.raises(ValueError, match="^methods=momentum is none of two levels, no tau"):
        replace(STUDY, methods=("momentum",))


def test_learning_rates_are_tuned_on_other_seeds():
    options = small("--parts=[tuned]", "--tuning_seeds=2", "--tuning_work=20", "--rates=0.01,0.1,0.3")
    first = options.first_stage({})["tuned"]
    assert {each["seed"] for each in first} == {100, 101} and {each["max_work"] for each in first} == {20.0}
    assert len(first) == 4 * 3 * 2
    rows = {}
    for each in first:
        levels, rate, seed = each["training"]["levels"], each["training"]["learning_rate"], each["seed"]
        how = {"levels": levels, "seed": seed, "max_work": 20.0, "validate_every": each["validate_every"]}
        diverges = rate == 0.3 and levels > 1 and seed == 101
        rows[key(each)] = failure(**how) if diverges else row(1e-4 / rate, unit=10.0, **how)
    second = [options_of(each) for each in options.second_stage(rows)["tuned"]]
    chosen = {(each.training.levels, each.training.learning_rate) for each in second}
    assert chosen == {(1, 0.3), (2, 0.1), (3, 0.1), (4, 0.1)}
    assert {each.seed for each in second} == {0, 1} and {each.max_work for each in second} == {60.0}


@pytest.mark.job
@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_driver_goes_on_where_it_was(run_job, tmp_path, capsys):
    words = ["--parts=[scan]", "--methods=[two levels,sgd alone]", "--rates=0.05", "--seeds=1", "--workers=1"]
    words.append(f"--out={tmp_path}")
    job = run_job([DRIVER, "--smoke", *words], timeout=140)
    assert job.returncode == 0, job.stderr
    said = job.stdout.splitlines()
    assert said[:2] == ["at most 288 work units, tau included", "2 runs, 0 of them over, by 1 worker(s)"]
    rows = (tmp_path / "runs.jsonl").read_text()
    assert len(rows.splitlines()) == 4 and all("result" in json.loads(line) for line in rows.splitlines())
    assert len(list((tmp_path / "data").glob("poisson-*.h5"))) == 2  # of the seeds 0 and 100
    text = (tmp_path / "study.md").read_text()
    assert text.startswith("2 runs in 1 parts, 0 failed.")
    (tmp_path / "study.md").unlink()
    program("width_study").setup(small(*words), SerialCommunicator())()
    assert "2 runs, 2 of them over" in capsys.readouterr().out
    assert (tmp_path / "runs.jsonl").read_text() == rows and (tmp_path / "study.md").read_text() == text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("figure9",)}, "^parts=figure9 is none of table1, table1_undamped, table1_conv"),
        ({"tuning_seeds": 0}, "^tuning_seeds=0 must be at least 1; use 2$"),
        ({"most_levels": 0}, "^most_levels=0 must be at least 1; use 2$"),
        ({"device": "tpu"}, "^device='tpu' must be cpu or cuda; use cpu$"),
        ({"rates": (0.1, -1.0)}, r"^rates=\[0.1, -1.0\] must be positive numbers; use 0.01,0.1$"),
        ({"max_work": 0.0}, "^max_work=0.0 must be positive and finite; use 50$"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        WidthStudyOptions(**changes)


@pytest.mark.job
@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_benchmark_runs(run_job):
    words = "--quick --seeds=2 --num_train=60 --num_val=20 --mesh=8 --widths=24,24 --batch_size=20".split()
    job = run_job([PROJECT / "benchmarks" / "width.py", *words, "--max_work=60", "--rounds=2"], timeout=140)
    assert job.returncode == 0, job.stderr
    found = json.loads(job.stdout.splitlines()[-1])
    names = {f"{norm}_ratio{way}" for norm in ("l2", "linf") for way in ("", "_without_tau", "_counted")}
    assert found["benchmark"] == "width"
    assert found["figures"].keys() == names | {"time_per_work_unit", "time_per_counted_unit", "matching_share"}
    assert all(math.isfinite(value) and value > 0 for value in found["figures"].values()), found
    assert found["figures"]["matching_share"] < 1


def test_errors_have_one_order():
    assert ERRORS == (*(f"{s}_{n}" for s in ("train", "val") for n in ("l2", "linf")), *ERRORS[4:])
    assert ERRORS[4:] == tuple(f"aux_{name}" for name in ERRORS[:4])
