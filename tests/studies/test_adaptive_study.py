"""The study of adaptive depth: its page, its driver on several ranks, and that it goes on where it was."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace

import pytest
from digit_files import write_digits
from kinds import draw_nothing, program
from processes import PROJECT
from studies.adaptive_depth import page
from studies.adaptive_depth.options import AdaptiveStudyOptions
from studies.study import RUNS, key, together

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import AdaptiveOptions, NestedOptions
from xbraid_py.run.options import from_dict

DRIVER = PROJECT / "drivers" / "adaptive_depth.py"


def row(run, seed, accuracy, layers, work):
    """A run on two levels whose accuracy rises evenly over ten updates, half of them with half of the layers."""
    curve = [[k, work * k / 10, layers // (2 - (k > 5)), accuracy * (k / 10)] for k in range(11)]
    result = {"val_accuracy": accuracy, "num_layers": layers, "num_parameters": 10 * layers, "work": work}
    return {
        "settings": {"run": run, "seed": seed},
        "result": result | {"curve": curve, "grids": [[1.0] * 4, [0.5, 0.5, 1.0, 1.0, 1.0]]},
    }


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    out = tmp_path_factory.mktemp("page")
    rows = [row("uniform", seed, value, 64, 100) for seed, value in enumerate((0.90, 0.92, 0.94))]
    rows += [row("adaptive", seed, value, 32, 60) for seed, value in enumerate((0.92, 0.92, 0.92))]
    rows += [row("fewer", seed, value, 32, 50) for seed, value in enumerate((0.80, 0.82, 0.84))]
    page.write([*rows, {"settings": {"run": "adaptive"}, "failure": "not finite"}], out)
    return out, (out / page.PAGE).read_text()


def test_the_table(written):
    _, text = written
    assert text.startswith("9 runs, 1 failed.")
    assert (
        "| uniform (3) | 64.0 ± 0.0 | 0 % | 640 ± 0 | 100 ± 0 | 92.00 ± 2.00 | +0.00 ± 0.00 | 3 of 3 | 64 (3 of 3) |"
        in text
    )
    # Differences of 2, 0 and -2 points: deviation 2, t(2) = 4.303, so 4.97 to either side.
    assert (
        "| adaptive (3) | 32.0 ± 0.0 | 50 % | 320 ± 0 | 60 ± 0 | 92.00 ± 0.00 | +0.00 ± 4.97 | 2 of 3 | 32 (2 of 3) |"
        in text
    )
    assert (
        "| fewer (3) | 32.0 ± 0.0 | 50 % | 320 ± 0 | 50 ± 0 | 82.00 ± 2.00 | -10.00 ± 0.00 | 0 of 3 | never |" in text
    )
    assert "| 2 | 94.00 % (64) | 92.00 % (32) | 84.00 % (32) |" in text


def test_the_pictures(written):
    out, _ = written
    names = {path.name for path in (out / "figures").iterdir()}
    assert names == {"accuracy_over_work.png", "accuracy_over_parameters.png", "grids.png"}


def test_layers_at_a_goal():
    found = row("uniform", 0, 0.9, 64, 100)
    assert [page.layers_at(found, goal) for goal in (0.0, 0.45, 0.46, 0.9, 0.91)] == [32, 32, 64, 64, None]


def test_a_page_without_runs(tmp_path):
    page.write([{"settings": {}, "failure": "not finite"}], tmp_path)
    assert (tmp_path / page.PAGE).read_text() == "0 runs, 1 failed.\n"


# Runs on all ranks together.


def test_every_run_is_made_once(spmd, shared_tmp_path):
    def body(comm):
        calls = []

        def work(settings, within):
            calls.append(settings["number"])
            if settings["number"] == 13:
                raise RunError("13 is not squared")
            return {"square": settings["number"] ** 2, "ranks": within.size}

        with together(shared_tmp_path, work, comm) as make:
            first = [make({"number": number}) for number in (2, 13, 2)]
        with together(shared_tmp_path, work, comm) as make:
            again = [make({"number": number}) for number in (13, 2, 3)]
        return calls, first, again

    results = spmd(body)
    size = len(results)
    for calls, first, again in results:
        assert calls == [2, 13, 3]
        assert first[0] == first[2] == {"settings": {"number": 2}, "result": {"square": 4, "ranks": size}}
        assert first[1] == again[0] == {"settings": {"number": 13}, "failure": "13 is not squared"}
        assert again[1] == first[0] and again[2]["result"]["square"] == 9
    lines = (shared_tmp_path / RUNS).read_text().splitlines()
    assert [json.loads(line)["settings"]["number"] for line in lines] == [2, 13, 3]


def test_a_line_that_breaks_off_is_made_again_and_other_lines_are_refused(spmd, shared_tmp_path):
    def body(comm):
        def study():
            with together(shared_tmp_path, lambda settings, within: {"is": 1}, comm) as make:
                return make({"number": 1})

        study()
        if comm.rank == 0:
            with (shared_tmp_path / RUNS).open("a") as file:
                file.write('{"settings": {"num')
        comm.barrier()
        found = study()
        comm.barrier()
        if comm.rank == 0:
            (shared_tmp_path / RUNS).write_text("something else\n")
        comm.barrier()
        try:
            study()
        except RunError as error:
            return found["result"], str(error)

    for found, message in spmd(body):
        assert found == {"is": 1}
        assert "line 1: found 'something else', which is no run; remove it" in message


def test_a_folder_in_use_is_refused(tmp_path):
    with together(tmp_path, lambda settings, comm: {}, SerialCommunicator()):
        with pytest.raises(RunError, match="is in use by another job"):
            with together(tmp_path, lambda settings, comm: {}, SerialCommunicator()):
                pass


# The driver.


def words(out, *more):
    return [DRIVER, "--smoke", "--seeds=1", f"--out={out}", *more]


@pytest.mark.job
@pytest.mark.timeout(180)
def test_the_study_is_the_same_on_two_ranks_and_is_not_made_twice(run_job, tmp_path):
    for ranks in (1, 2):
        done = run_job(words(tmp_path / str(ranks)), ranks=ranks, timeout=120)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(
            f"5 runs in {tmp_path / str(ranks) / RUNS}; tables in {tmp_path / str(ranks)}/study.md\n"
        )
    pages = [(tmp_path / str(ranks) / "study.md").read_text() for ranks in (1, 2)]
    assert pages[0] == pages[1] and pages[0].startswith("5 runs, 0 failed.")
    rows = [json.loads(line) for line in (tmp_path / "1" / RUNS).read_text().splitlines()]
    assert [each["settings"]["run"] for each in rows] == ["uniform", "adaptive", "even", "fewer", "coarsest"]
    uniform, adaptive, even, fewer, coarsest = (each["result"] for each in rows)
    assert [len(grid) for grid in uniform["grids"]] == [8, 16, 32] and 8 < adaptive["num_layers"] < 32
    assert adaptive["num_layers"] == even["num_layers"] and abs(fewer["num_layers"] - adaptive["num_layers"]) <= 2
    assert len(set(adaptive["grids"][-1])) > 1 and len(set(fewer["grids"][-1])) == 1
    assert [len(grid) for grid in coarsest["grids"]] == [8]
    before = (tmp_path / "1" / RUNS).read_bytes()
    again = run_job(words(tmp_path / "1"), timeout=60)
    assert again.returncode == 0 and (tmp_path / "1" / RUNS).read_bytes() == before


def test_digits(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    (tmp_path / "digits").mkdir()
    small = {"data": "mnist", "data_dir": write_digits(tmp_path / "digits", 20, 10), "num_train": 20, "num_val": 10}
    nested, out = NestedOptions(updates=(2, 2, 2), adaptive=AdaptiveOptions()), tmp_path / "out"
    options = AdaptiveStudyOptions(**small, out=out, seeds=1, num_layers=8, nested=nested, mgrit=MGRIT(max_levels=1))
    program("adaptive_depth").setup(options, SerialCommunicator())()
    assert (out / "figures" / "grids.png").is_file() and ", 0 failed." in (out / "study.md").read_text()
    with pytest.raises(FileNotFoundError, match="mnist|nowhere"):
        program("adaptive_depth").setup(replace(options, data_dir=tmp_path / "nowhere"), SerialCommunicator())


def test_wrong_options():
    with pytest.raises(ValueError, match="^nested.adaptive=None leaves nothing to compare; use nested.adaptive.ind"):
        AdaptiveStudyOptions(nested=NestedOptions())
    with pytest.raises(ValueError, match="^seeds=0 must be at least 1; use 5$"):
        AdaptiveStudyOptions(seeds=0)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("peaks", {"mgrit": {"max_levels": 1}}),
        ("more", {"mgrit": {"max_levels": 1}, "seeds": 8, "first_seed": 5}),
        ("oneshot", {}),
        ("deep", {"num_layers": 256, "seeds": 2}),
        (
            "mnist",
            {"data": "mnist", "width": 16, "mgrit": {"max_levels": 1}, "num_layers": 32, "seeds": 3}
            | {"nested": {"updates": [60, 40, 30]}},
        ),
    ],
)
def test_results_that_are_kept_make_their_tables(tmp_path, monkeypatch, name, words):
    draw_nothing(monkeypatch)
    kept = PROJECT / "benchmarks" / "results" / "adaptive_depth"
    with gzip.open(kept / f"{name}.jsonl.gz", "rt") as file:
        rows = {key(each["settings"]): each for each in map(json.loads, file)}
    options = from_dict(AdaptiveStudyOptions, words)
    seeds = range(options.first_seed, options.first_seed + options.seeds)
    found = [row for seed in seeds for row in options.runs(seed, lambda settings: rows[key(settings)])]
    assert len(found) == len(rows)
    page.write(found, tmp_path)
    lines = [line for line in (tmp_path / page.PAGE).read_text().splitlines() if line.startswith("|")]
    assert len(lines) > 10 and set(lines) <= set((kept / "README.md").read_text().splitlines())
