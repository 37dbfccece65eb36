"""The study of nested iteration on Indian Pines: it runs on a small scene, goes on, and its page says what is there."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from kinds import draw_nothing
from processes import PROJECT
from scenes import scene, write
from studies.indian_pines import page
from studies.indian_pines.runs import PinesStudyOptions
from studies.study import key

from xbraid_py.data import indian_pines

DRIVER = PROJECT / "drivers" / "indian_pines_study.py"


def row(run, updates, seed, accuracy, speed):
    """A run whose accuracy rises evenly, `speed` seconds an update."""
    scores = {
        "overall_accuracy": accuracy,
        "average_accuracy": accuracy / 2,
        "kappa": 0.5,
        "class_accuracy": [accuracy, None],
    }
    total = sum(updates) if run == "nested" else 20
    curve = [[0, 8, k, speed * k, speed * k, accuracy * k / total] for k in range(total + 1)]
    result = {"val_accuracy": accuracy, "train_accuracy": 1.0, "work": speed * total, "seconds": speed * total}
    result |= {"updates": total, "curve": curve, "scores": scores, "classes": [0, 1, 1, 0] if seed == 0 else None}
    return {"settings": {"run": run, "updates": updates, "seed": seed}, "result": result}


def test_the_page(tmp_path):
    rows = [row("non-nested", [20, 20, 20], seed, accuracy, 1.0) for seed, accuracy in enumerate((0.7, 0.8))]
    rows += [row("nested", [20, 20, 20], seed, accuracy, 0.5) for seed, accuracy in enumerate((0.9, 0.8))]
    page.write(rows, tmp_path, ["corn", "oats"], np.array([[0, 1], [-1, 0]]))
    text = (tmp_path / page.PAGE).read_text()
    assert (
        "| nested 20/20/20 (2) | 85.00 ± 7.07 | 42.50 ± 3.54 | 0.5000 ± 0.0000 | 100.00 ± 0.00 | 30.0 ± 0.0 |" in text
    )
    assert "| corn | 85.0 ± 7.1 | 75.0 ± 7.1 |" in text and "| oats | - | - |" in text
    # After 10 seconds 20 of 60 updates of the nested runs are over, and 10 of 20 of the others.
    assert "| 10 work units | 28.3 ± 2.4 | 37.5 ± 3.5 |" in text
    assert "| 25 work units | 70.8 ± 5.9 | over |" in text
    names = {"accuracy_over_work.png", "classes_nested_20-20-20.png", "classes_non-nested.png"}
    assert {path.name for path in (tmp_path / "figures").iterdir()} == names


def test_a_page_of_nothing(tmp_path):
    page.write([{"settings": {}, "failure": "not finite"}], tmp_path, ["corn"], np.array([[0]]))
    assert (tmp_path / page.PAGE).read_text() == "0 runs, 1 failed.\n"


def test_results_that_are_kept_make_their_page(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    kept = PROJECT / "benchmarks" / "results" / "nested"
    with gzip.open(kept / "indian_pines_runs.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file]
    assert {key(each["settings"]) for each in rows} == {key(each) for each in PinesStudyOptions().settings()}
    monkeypatch.setattr(page, "scene_map", lambda *_: None)  # without the scene
    page.write(rows, tmp_path, indian_pines.names(16), np.zeros((145, 145), dtype=int))
    assert (tmp_path / page.PAGE).read_text() == (kept / "indian_pines.md").read_text()


@pytest.mark.job
@pytest.mark.long
def test_the_driver_goes_on_where_it_was(run_job, tmp_path):
    write(tmp_path, *scene())
    words = ["--smoke", "--seeds=1", "--num_train=60", "--schedules=4,2,2"]
    words += [f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}"]
    first = run_job([DRIVER, *words])
    assert first.returncode == 0, first.stderr
    rows = (tmp_path / "out" / "runs.jsonl").read_text()
    updates = {row["settings"]["run"]: row["result"]["updates"] for row in map(json.loads, rows.splitlines())}
    assert updates == {"nested": 8, "non-nested": 4}
    again = run_job([DRIVER, *words])
    assert again.returncode == 0 and (tmp_path / "out" / "runs.jsonl").read_text() == rows


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedules": (1, 2)}, r"^schedules=\[1, 2\] must be updates on three levels; use 200,100,50$"),
        ({"validate_every": 0}, "^validate_every=0 must be at least 1; use 5$"),
        ({"num_layers": 30}, "^num_layers=30 is not a multiple of"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        PinesStudyOptions(**changes)
