"""Studies: every run once, whatever happens between; statistics of their results."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import scipy.stats
from studies.statistics import Summary, deviation_ratio
from studies.study import RUNS, Study, key
from study_work import die, square

from xbraid_py.comm.agreement import RunError


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
