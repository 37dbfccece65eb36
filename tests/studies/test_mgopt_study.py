"""The study of MG/OPT in depth: its page says what is in its rows, and driver and benchmark run and go on."""

from __future__ import annotations

import gzip
import json
import math

import pytest
from digit_files import write_digits
from kinds import draw_nothing
from processes import PROJECT
from studies.mgopt import page
from studies.mgopt.case import PROBLEMS, changed, options_of, runs
from studies.mgopt.parts import METHOD_PARTS, PARTS, MGOptStudyOptions, competitors
from studies.mgopt.rows import at_goal, best, groups, merit, reached, speedup, spread, words
from studies.mgopt.runs import train
from studies.study import key

from xbraid_py.comm import SerialCommunicator
from xbraid_py.recipes.mgopt import training_of

DRIVER = PROJECT / "drivers" / "mgopt_study.py"
TINY = {"num_layers": 128, "peaks_layers": 128, "mnist_layers": 128, "num_train": 60, "num_val": 40, "max_work": 6.0}
STUDY = MGOptStudyOptions(blocks=(128, 256), **TINY)
BASES = STUDY.bases
SHORT = {
    **{name: f"mgopt.{name}" for name in ("levels", "schedule", "restriction", "fine_moves", "coarse_moves")},
    **{
        "full": "mgopt.full_multigrid",
        "carry": "mgopt.carry_momentum",
        "search": "mgopt.line_search",
        "keep": "mgopt.optim.keep",
    },
}


def settings(seed=0, problem="circles", **changes):
    """Settings of a run; by default the 8-level method."""
    listed = {f"mgopt.optim.{name}": (changes.pop(name),) for name in ("method", "learning_rate") if name in changes}
    others = {SHORT.get(name, name): value for name, value in changes.items()}
    (found,) = runs([changed(PROBLEMS[problem](), listed | others)], [seed])
    return found


def row(cycles, seed=0, accuracy=1.0, unit=5.0, **changes):
    """A run whose accuracy rises evenly to the given one in so many cycles, each `unit` work units and a second."""
    curve = [[k, unit * k, unit * k, 1.0 * k, 1.0, 0.5, accuracy * k / cycles] for k in range(cycles + 1)]
    return {"settings": settings(seed, **changes), "result": {"curve": curve}}


def failure(**changes):
    return {"settings": settings(**changes), "failure": "the objective is nan"}


def lines_of(text, start):
    return [line for line in text.splitlines() if line.startswith(start)]


def written(parts, out):
    page.write(parts, out)
    return (out / page.PAGE).read_text()


def test_goals_and_speedups():
    single = [row(90, 0, unit=1.0), row(60, 1, unit=1.0), row(50, 2, 0.8, unit=1.0)]
    eight = [row(5, 0), row(6, 1), row(5, 2), failure(seed=3)]
    assert at_goal(single[0])["cycle"] == 90 and at_goal(single[0], 0.5)["cycle"] == 45
    assert at_goal(single[2]) is None and best(single[2]) == 0.8 and best(eight[3]) == 0.0
    assert {seed: point["work"] for seed, point in reached(eight).items()} == {0: 25.0, 1: 30.0, 2: 25.0}
    # The third seed has no single level to compare with: 150 / 55 units, and 3.6 and 2 seed by seed.
    assert speedup(reached(single), reached(eight), "work") == "2.73 (2.00 to 3.60)"
    assert speedup(reached(single), {}, "work") == "" and spread({}, "work") == ""
    assert spread(reached(eight), "cycle") == "5.3 ± 0.6"
    assert list(groups([*single, *eight], "seed")) == [(0,), (1,), (2,), (3,)]


def test_settings_have_words_of_their_own():
    found = words(settings(3, levels=4, method="adam", search=True))
    wanted = {"levels": 4, "method": "adam", "learning_rate": 0.1, "search": True, "line_search": False, "seed": 3}
    assert wanted.items() <= found.items()
    given = settings(3, levels=4)
    assert options_of(given).mgopt.levels == 4 and options_of(json.loads(json.dumps(given))) == options_of(given)
    assert not given.keys() & {"out", "resume", "keep"}, "where a run is is none of its settings"


def test_merit_prefers_goals_then_work_then_accuracy():
    slow, fast = [row(10), row(10, 1)], [row(8), row(9, 1)]
    partly, diverged = [row(2), row(2, 1, 0.9)], [failure(), failure(seed=1)]
    near, far = [row(9, 0, 0.9)], [row(9, 0, 0.7)]
    assert merit(fast) > merit(slow) > merit(partly) > merit(near) > merit(far) > merit(diverged)


def test_table_1_and_figure_4(tmp_path):
    rows = [row(90 + 10 * seed, seed, unit=1.0, levels=1) for seed in range(2)]
    rows += [row(5, seed, levels=8) for seed in range(2)] + [failure(seed=2, levels=8)]
    text = written({"table1": rows}, tmp_path)
    assert text.startswith("5 runs in 1 parts, 1 failed.")
    (single,), (eight,) = lines_of(text, "| 1 |"), lines_of(text, "| 8 |")
    assert single.startswith("| 1 | 2 of 2 | 95.0 ± 7.1 | 95.0 ± 7.1 | 1.00 (1.00 to 1.00) |")
    assert single.endswith("| 95 | 95 |")
    assert eight.startswith("| 8 | 2 of 3 | 5.0 ± 0.0 | 25.0 ± 0.0 | 3.80 (3.60 to 4.00) | 5.00 ± 0.00 | 19.00 (18.00")
    assert eight.endswith("| 5 | 26 |")
    for name in ("figure4.png", "figure4_seconds.png"):
        assert (tmp_path / "figures" / name).read_bytes()[:4] == b"\x89PNG"


def test_depths(tmp_path):
    rows = [row(cycles, seed, num_layers=blocks) for blocks, cycles in ((128, 4), (256, 5)) for seed in range(2)]
    text = written({"figure5": rows}, tmp_path)
    assert "| 256 | 2 of 2 | 5.0 ± 0.0 | 25.0 ± 0.0 | 5.00 ± 0.00 |" in text
    assert "Most V-cycles over fewest: 1.25." in text and (tmp_path / "figures" / "figure5_circles_8.png").exists()
    text = written({"figure5": [*rows, failure(num_layers=256, seed=2)]}, tmp_path)
    assert "| 256 | 2 of 3 |" in text and "Most V-cycles" not in text


def test_steps_settings_transfers_and_moves(tmp_path):
    schedule = "[1, 1, 1, 1, 1, 1, 1, {5}]"
    parts = {
        "table2": [row(6, schedule=schedule)],
        "hyper": [row(n, s, levels=v, learning_rate=r) for r, n in ((0.1, 10), (0.5, 14)) for s in (0, 1) for v in (1,)]
        + [row(4, s, levels=8, learning_rate=r) for r in (0.1, 0.5) for s in (0, 1)],
        "transfers": [row(7, restriction="average"), failure(restriction="transpose", search=True)],
        "ablation": [row(5, s, levels=8) for s in (0, 1)]
        + [row(5 + s, s, levels=8, fine_moves="ends", coarse_moves="ends") for s in (0, 1)],
    }
    text = written(parts, tmp_path)
    assert f"| `{schedule}` | 1 of 1 | 6.0 ± 0.0 | 5.00 | 30.0 ± 0.0 | 6 | 36 |" in text
    # 2.5 and 3.5: mean 3, deviation 0.707.
    assert "| 0.5, 0.0001 | 2, 2 | 70.0 ± 0.0 | 20.0 ± 0.0 | 4.0 ± 0.0 | 3.50 (3.50 to 3.50) |" in text
    assert "Over the settings: 3.00 ± 23.6 %; the paper has 3.54 ± 8.02 %." in text
    assert "| 8 | average | constant | no | 1 of 1 | 0 | 7.0 ± 0.0 | 35.0 ± 0.0 |" in text
    assert "| 8 | transpose | constant | yes | 0 of 1 | 1 |  |  |" in text
    assert "**residual weights frozen on all levels**" in text
    assert "As many V-cycles as with all weights free: in 1 of 2 runs." in text


def test_accuracies_and_methods(tmp_path):
    single = row(100, 0, 0.8, unit=1.0, levels=1, problem="mnist")
    eight = row(10, 0, 0.9, levels=8, problem="mnist")
    peaks = [row(20, 0, 0.8, unit=1.0, levels=1, problem="peaks"), row(2, 0, 0.8, levels=4, problem="peaks")]
    parts = {"mnist": [single, eight], "sampling": [row(5, sampling="square")], "methods_peaks": peaks}
    parts["methods_circles"] = [row(50, method="adam", levels=1), row(5, method="adam", keep=False)]
    parts["methods_circles"].append(row(10, method="adam", carry=1.0))
    parts["mnist_epochs"] = [row(27600, 0, 0.93, 1.0, levels=1, problem="mnist", goal=0.93)]
    text = written(parts, tmp_path)
    assert "| 1 | 1 of 1 | 460.0 ± 0.0 | 460 | 1.00 (1.00 to 1.00) | 1.00 (1.00 to 1.00) |" in text
    # 50 % of 80 % after 63 of 100 cycles, of 90 % after 6 of 10.
    assert "| 50 % | 63 ± 0 [1 of 1] | 30 ± 0 [1 of 1]; 2.10 (2.10 to 2.10) |" in text
    assert "| 85 % | - | 50 ± 0 [1 of 1] |" in text
    # 80 %, the best of the single level after 100 units, is reached after 9 of 10 cycles of 5.
    assert "To the highest accuracy of the single level, 80.00 % in the mean:" in text
    assert "| 8 | 1 of 1 | 45.0 ± 0.0 | 2.22 (2.22 to 2.22) | 11.11 (11.11 to 11.11) |" in text
    assert "| gd | 4 | 0.1 | 10 ± 0 [1 of 1]; 1.50 (1.50 to 1.50) | 10 ± 0 [1 of 1]; 1.80 (1.80 to 1.80) |" in text
    assert "| adam, carried between levels | 8 | 0.1 | 1 of 1 | 10.0 ± 0.0 | 50.0 ± 0.0 | 5.00 (5.00 to 5.00) |" in text
    assert "| adam, anew at every visit | 8 | 0.1 | 1 of 1 | 5.0 ± 0.0 | 25.0 ± 0.0 | 10.00 (10.00 to 10.00) |" in text


def test_a_start_on_the_coarsest_network(tmp_path):
    rows = [row(10, 0), row(10, 1), failure(seed=2), row(4, 0, full=1), row(12, 1, full=1), row(3, 2, 0.95, full=1)]
    text = written({"initialization": rows}, tmp_path)
    assert "| 8 | 0 | 2 of 3 | 45.0 ± 0.0 |  | 2 of 3 | 50.0 ± 0.0 |  |" in text
    # 90 % after 4, 11 and 3 cycles of 5: on the first seed earlier than after 9.
    assert "| 8 | 1 | 3 of 3 | 30.0 ± 21.8 | 1 | 2 of 3 | 40.0 ± 28.3 | 1 |" in text


def test_no_rows_make_a_page(tmp_path):
    assert written({}, tmp_path).startswith("0 runs in 0 parts, 0 failed.")
    assert "##" not in written({"table1": []}, tmp_path)


@pytest.mark.parametrize("part", ["table1", "figure5", "table2", "hyper", "initialization", "mnist"])
def test_results_that_are_kept_make_their_tables(tmp_path, monkeypatch, kept, part):
    draw_nothing(monkeypatch)
    options = MGOptStudyOptions()
    settings = runs(PARTS[part](options.bases), options.seeds_of(part))
    _, title, *text = written({part: [kept[key(each)] for each in settings]}, tmp_path).split("\n\n")
    whole = (KEPT / page.PAGE).read_text().split("\n\n")
    first = whole.index(title)
    assert [each.strip() for each in text] == [each.strip() for each in whole[first + 1 : first + 1 + len(text)]]


KEPT = PROJECT / "benchmarks" / "results" / "mgopt"


@pytest.fixture(scope="module")
def kept():
    """The results that are kept, by the key of their settings."""
    with gzip.open(KEPT / "runs.jsonl.gz", "rt") as file:
        return {key(each["settings"]): each for each in map(json.loads, file)}


@pytest.mark.parametrize("part", PARTS)
def test_every_part_is_of_different_runs_that_can_be_made(part):
    cases = list(PARTS[part](BASES))
    assert len(set(cases)) == len(cases) > 1
    assert part in page.SECTIONS
    for case in cases:
        assert case.num_layers % 2 ** (case.mgopt.steps().levels - 1) == 0


def test_validations_on_mnist_are_every_fifth_work_unit():
    every = {each["mgopt"]["levels"]: each["validate_every"] for each in runs(PARTS["mnist"](BASES), [0])}
    assert every == {1: 5, 2: 2, 4: 1, 6: 1, 8: 1}
    assert {each["validate_every"] for each in runs(PARTS["table1"](BASES), [0])} == {1}


def test_epochs_are_of_the_papers_size_and_long_enough():
    options = MGOptStudyOptions(parts=("mnist_epochs",))
    long = options.first_stage({})["mnist_epochs"]
    assert {each["seed"] for each in long} == {0, 1, 2} and {each["mgopt"]["levels"] for each in long} == {
        1,
        2,
        4,
        6,
        8,
    }
    assert {(each["num_layers"], each["goal"]) for each in long} == {(2048, 0.93)}
    assert all(each["max_work"] >= 460 * 60 for each in long)
    # A quarter of an epoch of a single level, so that none is taken for half an epoch more than it is.
    assert {each["mgopt"]["levels"]: each["validate_every"] for each in long} == {1: 15, 2: 5, 4: 3, 6: 3, 8: 3}


def test_both_pages_say_the_same_of_the_papers_cycles():
    driver = " ".join((PROJECT / "drivers" / "mgopt_mnist.py").read_text().split())
    readme = " ".join((KEPT / "README.md").read_text().split())
    for said in (driver, readme):
        assert said.count("The paper's 460 V-cycles of a single level to 93 % are") == 1
    first = readme.index("The paper's 460 V-cycles of a single level")
    sentences = readme[first : readme.index(" `python drivers/mgopt_study.py --parts=", first)]
    assert sentences in driver.replace(" (benchmarks/results/mgopt)", "")


@pytest.mark.parametrize("part", METHOD_PARTS)
def test_methods_compete_at_two_numbers_of_levels(part):
    found = competitors(BASES, part)
    assert part in page.SECTIONS and {levels for _, levels in found} == {1, 4 if "peaks" in part else 8}
    for (name, levels), (case, rates) in found.items():
        mgopt = case.mgopt
        assert mgopt.levels == levels and mgopt.optim.method == (name.split(",")[0].split(" ")[0],)
        assert mgopt.optim.keep != name.endswith("anew")
        assert (mgopt.carry_momentum > 0) == name.endswith("carried")
        assert (mgopt.metric == "L2") == name.endswith("L2") and mgopt.optim.line_search == name.startswith("lbfgs")
        assert len(set(rates)) == len(rates)


@pytest.mark.parametrize("problem", ["circles", "peaks"])
def test_a_run(problem):
    case = changed(getattr(BASES, problem), {"mgopt.levels": 4})
    found = train(*runs([case], [0]))
    assert [point[0] for point in found["curve"]] == [0, 1] and found["work"] == 5.0
    assert found["reached"] == (found["val_accuracy"] >= 1.0)
    training = training_of(case, SerialCommunicator())
    assert len(training.validation[1]) == 40
    assert training.method.objectives[0].features.shape == (2, 60 if problem == "circles" else 30)


def test_learning_rates_are_tuned_on_other_seeds():
    options = MGOptStudyOptions(parts=("methods_circles",), seeds=2, tuning_seeds=2, **TINY)
    first = options.first_stage({})["methods_circles"]
    assert {each["seed"] for each in first} == {100, 101}
    # The larger of two rates is the better one, but diverges on a seed.
    rows = {}
    for each in first:
        chosen = words(each)
        diverges = chosen["learning_rate"] >= 0.5 and chosen["method"] != "lbfgs" and each["seed"] == 101
        result = {"curve": [[1, 10 / chosen["learning_rate"], 0, 0, 0, 0, 1.0]]}
        rows[key(each)] = {"settings": each, **({"failure": "nan"} if diverges else {"result": result})}
    second = [words(each) for each in options.second_stage(rows)["methods_circles"]]
    assert {each["seed"] for each in second} == {0, 1}
    assert {each["learning_rate"] for each in second if each["method"] == "gd"} == {0.2}
    assert {each["learning_rate"] for each in second if each["method"] == "adam"} == {0.1}


@pytest.mark.job
@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_driver_goes_on_where_it_was(run_job, tmp_path):
    digits = write_digits(tmp_path, 2000, 1000)
    words = [
        "--smoke",
        f"--data_dir={digits}",
        "--parts=[table1,mnist_blocks]",
        "--seeds=1",
        "--max_work=8",
        f"--out={tmp_path}",
    ]
    first = run_job([DRIVER, *words], timeout=140)
    assert first.returncode == 0, first.stderr
    rows = (tmp_path / "runs.jsonl").read_text()
    assert len(rows.splitlines()) == 5 + 2 and all("result" in json.loads(line) for line in rows.splitlines())
    again = run_job([DRIVER, *words], timeout=140)
    assert again.returncode == 0 and (tmp_path / "runs.jsonl").read_text() == rows
    assert (tmp_path / "study.md").read_text().startswith("7 runs in 2 parts, 0 failed.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ("figure9",)}, "^parts=figure9 is none of table1, figure5"),
        ({"blocks": (128, 200)}, r"^blocks=200 is not a multiple of 128 = 2\^\(8 - 1\) for 8 levels; use 128$"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        MGOptStudyOptions(**changes)


@pytest.mark.job
@pytest.mark.long
@pytest.mark.timeout(300)
def test_the_benchmark_runs(run_job, tmp_path):
    words = "--quick --seeds=1 --num_layers=128 --blocks=128,256 --mnist_layers=128 --mnist_work=20".split()
    words += ["--mnist_samples=1000", f"--data_dir={write_digits(tmp_path, 1200, 500)}"]
    job = run_job([PROJECT / "benchmarks" / "mgopt.py", *words], timeout=140)
    assert job.returncode == 0, job.stderr
    found = json.loads(job.stdout.splitlines()[-1])
    assert found["benchmark"] == "mgopt"
    assert found["figures"].keys() == {"circles_speedup", "circles_seconds", "mnist_speedup", "depth_spread"}
    assert all(math.isfinite(value) for value in found["figures"].values()), found
    assert found["figures"]["circles_speedup"] > 2
