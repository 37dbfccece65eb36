"""Studies: every run once, whatever happens between; statistics of their results."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from studies.statistics import Summary, deviation_ratio
from studies.study import PAGE, RUNS, Study, StudyOptions, key, of_seeds, run_study, settings_of
from study_work import die, square

from xbraid_py.cli.status import study as study_status
from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.recipes.options.mgopt import CirclesOptions
from xbraid_py.run.options import from_dict


@pytest.fixture
def calls(tmp_path):
    folder = tmp_path / "calls"
    folder.mkdir()
    return folder


def numbers(calls, *values):
    return [{"number": value, "calls": str(calls)} for value in values]


def made(calls):
    return sorted(path.name for path in calls.iterdir())


def test_every_run_is_made_once(tmp_path, calls):
    study = Study(tmp_path / "study", square, workers=2)
    rows = list(study.run(numbers(calls, 1, 2, 13)))
    assert {row["settings"]["number"]: row.get("result", {}).get("square") for row in rows} == {1: 1, 2: 4, 13: None}
    assert [row["failure"] for row in rows if "failure" in row] == ["the number 13 is not squared"]
    assert all(row["result"]["threads"] == 1 for row in rows if "result" in row)
    again = list(Study(tmp_path / "study", square).run(numbers(calls, 3, 2, 1)))
    assert [row["settings"]["number"] for row in again] == [2, 1, 3], "those that are over come first"
    assert made(calls) == ["1-0", "13-0", "2-0", "3-0"]
    assert len((tmp_path / "study" / RUNS).read_text().splitlines()) == 4
    assert study_status(tmp_path / "study") == ("finished", "4 runs, 0 to do, 1 failed")


def test_a_study_says_what_it_has_to_do(tmp_path, calls):
    rows = Study(tmp_path, square).run(numbers(calls, 1, 2, 3))
    next(rows)
    state, says = study_status(tmp_path)
    assert state == "running" and says.startswith("3 runs, ")
    rows.close()
    assert study_status(tmp_path)[0] in ("stopped", "finished"), "the lock is gone"


def test_a_run_whose_line_breaks_off_is_made_again(tmp_path, calls):
    study = Study(tmp_path, square)
    list(study.run(numbers(calls, 1, 2)))
    whole = (tmp_path / RUNS).read_bytes()
    (tmp_path / RUNS).write_bytes(whole[:-4])
    assert len(study.finished()) == 1
    last = json.loads(whole.splitlines()[-1])["settings"]["number"]  # whichever worker was the slower one
    list(study.run(numbers(calls, 1, 2)))
    assert made(calls) == sorted(["1-0", "2-0", f"{last}-1"])
    assert (tmp_path / RUNS).read_bytes() == whole


def test_a_study_that_was_left_goes_on(tmp_path, calls):
    # Long enough for the study to be left while most of them have not begun.
    some = [each | {"seconds": 0.25} for each in numbers(calls, *range(6, 18))]
    rows = Study(tmp_path, square).run(some)
    next(rows)
    rows.close()
    assert 1 <= len(made(calls)) < 12, "what was not yet begun is not made"
    list(Study(tmp_path, square).run(some))
    results = Study(tmp_path, square).finished()
    assert sorted(row["result"]["square"] for row in results.values() if "result" in row) == sorted(
        n**2 for n in range(6, 18) if n != 13
    )


def test_a_damaged_line_is_named(tmp_path):
    (tmp_path / RUNS).write_text('{"settings": {"a": 1}, "result": {}}\nnonsense\n')
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2: found 'nonsense', which is no run; remove it"):
        Study(tmp_path, square).finished()


def test_the_same_settings_twice(tmp_path, calls):
    with pytest.raises(ValueError, match="twice"):
        list(Study(tmp_path, square).run(numbers(calls, 1, 1)))
    assert key({"a": 1, "b": 2}) == key({"b": 2, "a": 1})


def test_two_studies_in_one_folder(tmp_path, calls):
    rows = Study(tmp_path, square).run(numbers(calls, 1, 2))
    next(rows)
    with pytest.raises(ValueError, match="in use by another job"):
        next(Study(tmp_path, square).run(numbers(calls, 3)))
    rows.close()
    assert len(list(Study(tmp_path, square).run(numbers(calls, 3)))) == 1


def test_a_process_that_dies(tmp_path):
    with pytest.raises(RunError, match="a process of the study has died"):
        list(Study(tmp_path, die).run([{"number": 1}]))


def test_workers(tmp_path):
    with pytest.raises(ValueError, match="workers=0 must be at least 1; use 2"):
        Study(tmp_path, square, workers=0)


def test_summaries():
    values = [3.0, 1.0, 4.0, 1.0, 5.0]
    found = Summary.of(values)
    assert (found.count, found.mean, found.median, found.largest, found.least) == (5, 2.8, 3.0, 5.0, 1.0)
    assert found.deviation == pytest.approx(np.std(values, ddof=1), rel=1e-14)
    low, high = scipy.stats.t.interval(0.95, 4, 2.8, scipy.stats.sem(values))
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-12)
    assert found.half_width == pytest.approx((high - low) / 2, rel=1e-12)
    alone = Summary.of([2.0])
    assert (alone.deviation, alone.low, alone.high) == (0.0, 2.0, 2.0)
    for bad in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match="must be finite numbers, at least one"):
            Summary.of(bad)


def test_intervals_hold_what_they_promise():
    rng = np.random.default_rng(1)
    samples = rng.normal(2.0, 3.0, size=(400, 12))
    inside = sum(found.low <= 2.0 <= found.high for found in map(Summary.of, samples))
    assert 0.92 <= inside / 400 <= 0.98
    ratio, low, high = deviation_ratio(rng.normal(0, 2, 500), rng.normal(0, 1, 500))
    assert low < ratio < high and low < 2.0 < high and high - low < 0.6
    assert math.isnan(deviation_ratio([1.0, 2.0], [1.0, 1.0])[0])


def test_rows_can_be_read_by_others(tmp_path, calls):
    list(Study(tmp_path, square).run(numbers(calls, 4)))
    (row,) = map(json.loads, (tmp_path / RUNS).read_text().splitlines())
    assert row["result"]["square"] == 16 and row["settings"]["number"] == 4


# The whole of a study.


def parts_of(calls, *parts):
    return {f"part {n}": numbers(calls, *each) for n, each in enumerate(parts)}


def test_a_study_of_two_stages(tmp_path, calls, capsys):
    """Parts may have runs in common; a stage sees the rows of the one before."""

    def second(rows):
        squares = sorted(row["result"]["square"] for row in rows.values() if "result" in row)
        return {"squared": numbers(calls, *squares)} if squares else {}

    seen = []
    stages = {"runs": lambda rows: parts_of(calls, (2, 3), (3, 13)), "more runs": second, "none": lambda rows: {}}

    def write(parts, out):
        seen.append((parts, out))
        return "a page"

    def said(settings):
        return f"number {settings['number']}"

    run = run_study(Study(tmp_path, square), stages, write, SerialCommunicator(), said)
    run()
    ((parts, out),) = seen
    found = {part: [row.get("result", {}).get("square") for row in rows] for part, rows in parts.items()}
    assert found == {"part 0": [4, 9], "part 1": [9, None], "squared": [16, 81]} and out == tmp_path
    printed = capsys.readouterr()
    assert printed.err == "number 13: the number 13 is not squared\n"
    assert printed.out.splitlines() == [
        "3 runs, 0 of them over, by 1 worker(s)",
        "2 more runs, 0 of them over, by 1 worker(s)",
        "a page",
        f"5 runs in {tmp_path / RUNS}; tables in {tmp_path / PAGE}",
    ]
    run()
    assert len(made(calls)) == 5 and "3 runs, 3 of them over" in capsys.readouterr().out


def test_more_ranks_are_refused(tmp_path):
    with pytest.raises(ValueError, match="^2 ranks: the study has workers of its own; start it without mpirun$"):
        run_study(Study(tmp_path, square), {}, lambda *_: None, SimpleNamespace(size=2))


def test_settings_of_runs():
    """What says where a run is makes no other run of it; each seed is there for all cases before the next one."""
    base = CirclesOptions(num_layers=16)
    assert settings_of(base) == settings_of(replace(base, out=Path("elsewhere"), keep=9, resume="auto"))
    assert from_dict(CirclesOptions, json.loads(json.dumps(settings_of(base)))) == base
    found = of_seeds([base, replace(base, beta=0.5), base], range(2), problem="circles")
    assert [(each["seed"], each["beta"], each["problem"]) for each in found] == [
        (seed, beta, "circles") for seed in (0, 1) for beta in (1e-4, 0.5)
    ]


@pytest.mark.parametrize("name", ["workers", "seeds"])
def test_options_of_every_study(name):
    with pytest.raises(ValueError, match=f"^{name}=0 must be at least 1; use 2$"):
        StudyOptions(**{name: 0})
