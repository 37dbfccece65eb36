"""The study of nested iteration on Indian Pines: it runs on a small scene, goes on, and its page says what is there."""

from __future__ import annotations

import gzip
import json
import os
import signal

import numpy as np
import pytest
from kinds import draw_nothing
from processes import PROJECT, finish_job, start_job
from scenes import scene, write, write_split
from served import until
from studies.comparison import depth
from studies.indian_pines import page
from studies.indian_pines.options import PinesStudyOptions, options_of
from studies.indian_pines.runs import train
from studies.study import LEFT, key

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


def kind_of(rows, **kind):
    return [{"settings": each["settings"] | kind, "result": each["result"] | {"ranks": 2}} for each in rows]


def test_other_pixels_and_other_propagations_have_tables_of_their_own(tmp_path, monkeypatch):
    usual = [row("non-nested", [20, 20, 20], 0, 0.7, 1.0), row("nested", [20, 20, 20], 0, 0.9, 0.5)]
    others = kind_of(usual, propagation="V") + kind_of(usual, propagation="lagged", split="published")
    drawn = set()
    monkeypatch.setattr(page, "_curves", lambda *given: drawn.add(given[-1].name))
    monkeypatch.setattr(page, "scene_map", lambda *given: drawn.add(given[-1].name))
    page.write([*usual, *others], tmp_path, ["corn", "oats"], np.array([[0, 1], [-1, 0]]))
    plain, second, third = (tmp_path / page.PAGE).read_text().split("\n# ")
    assert second.startswith("V, pixels drawn at random: seeds 0, 2 rank(s)\n")
    assert third.startswith("lagged, the published pixels: seeds 0, 2 rank(s)\n")
    assert all(part.count("| nested 20/20/20 (1) | 90.00") == 1 for part in (plain, second, third))
    assert {"accuracy_over_work.png", "accuracy_over_work_published_lagged.png"} < drawn and len(drawn) == 9


def test_layer_parallel_rows_have_lines_in_the_table_of_the_papers(monkeypatch):
    usual = [row("nested", [200, 100, 50], 10, 0.9, 0.3), row("non-nested", [200, 200, 200], 10, 0.5, 5.0)]
    rows = [*kind_of(usual, propagation="V"), {"settings": usual[0]["settings"], "failure": "not finite"}]
    monkeypatch.setattr(depth, "later", lambda name: tuple(rows) if "parallel" in name else ())
    (line,) = [line for line in depth.paper_001() if "V, random" in line.item]
    assert line.item.startswith("figure 5, top") and line.color == "yellow" and line.seeds == "1"
    assert "V-cycles, 2 iterations and 10 after a refinement on 2 ranks" in line.size


def test_what_is_asked_for_is_what_is_run():
    study = PinesStudyOptions(propagations=("V", "lagged"), splits=("random", "published"), first_seed=10, seeds=3)
    settings = study.settings()
    assert len(settings) == 3 * 4 * 3 and {each["seed"] for each in settings} == {10, 11, 12}
    options = [options_of(each) for each in settings]
    assert {(each.split, each.mgrit.cycle, each.mgrit.max_iter) for each in options} == {
        (split, cycle, most) for split in ("random", "published") for cycle, most in (("V", 2), ("lagged", None))
    }
    assert {(each.optim.boost_updates, each.optim.boost_iter) for each in options} == {(3, 10)}


@pytest.mark.ranks(2)
@pytest.mark.parametrize("propagation", ["V", "lagged"])
def test_a_run_on_several_ranks_is_that_on_one(spmd, shared_tmp_path, propagation):
    """The published pixels, inexact: fewer iterations than there are to be exact."""
    small = {"num_layers": 64, "width": 8, "schedules": (4, 4, 6), "validate_every": 5, "dtype": "float64"}
    kind = {"propagations": (propagation,), "splits": ("published",), "first_seed": 10, "seeds": 1}
    _, nested = PinesStudyOptions(**small, **kind, data_dir=shared_tmp_path).settings()

    def body(comm):
        if comm.rank == 0:
            write(shared_tmp_path, *scene())
            write_split(shared_tmp_path, scene()[1], 60, 30)
        comm.barrier()
        return train(nested, comm)

    found = spmd(body)
    alone, exact = train(nested), train({**nested, "propagation": "exact"})
    for each in found:
        assert each["ranks"] == len(found) and each["updates"] == 14 and len(each["scores"]["class_accuracy"]) == 4
        assert each["objective"] == pytest.approx(alone["objective"], rel=1e-9)
        assert each["objective"] != pytest.approx(exact["objective"], rel=1e-12)


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


@pytest.mark.job
@pytest.mark.timeout(180)
def test_the_driver_on_two_ranks_goes_on_where_it_was(run_job, tmp_path):
    write(tmp_path, *scene())
    words = ["--smoke", "--seeds=1", "--first_seed=10", "--num_train=60", "--schedules=2,2,2", "--propagations=[V]"]
    words += [f"--data_dir={tmp_path}", f"--out={tmp_path / 'out'}"]
    first = run_job([DRIVER, *words, "--num_layers=32"], ranks=2, timeout=120)
    assert first.returncode == 0, first.stderr
    rows = (tmp_path / "out" / "runs.jsonl").read_text()
    assert [json.loads(line)["result"]["ranks"] for line in rows.splitlines()] == [2, 2]
    assert "# V, pixels drawn at random: seeds 10, 2 rank(s)" in (tmp_path / "out" / page.PAGE).read_text()
    again = run_job([DRIVER, *words, "--num_layers=32"], ranks=2, timeout=120)
    assert again.returncode == 0 and (tmp_path / "out" / "runs.jsonl").read_text() == rows


@pytest.mark.job
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_ends_the_driver_within_a_run(ranks, tmp_path):
    write(tmp_path, *scene())
    words = ["--smoke", "--seeds=1", "--num_train=60", "--num_layers=32", "--schedules=100000,2,2"]
    out = tmp_path / "out"
    job = start_job([DRIVER, *words, "--propagations=[V]", f"--data_dir={tmp_path}", f"--out={out}"], ranks)
    begun = out / ("study.json" if ranks == 1 else "lock")
    until(lambda: begun.exists() or job.poll() is not None)
    os.kill(job.pid, signal.SIGTERM)  # a launcher hands it on
    done = finish_job(job)
    assert done.stderr.splitlines()[-1] == LEFT and done.returncode == 75
    rows = out / "runs.jsonl"
    assert not rows.exists() or rows.read_text() == ""


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"propagations": ("W",)},
            r"^propagations=\['W'\] must be different ones of exact, lagged, V; use \['exact'\]$",
        ),
        ({"splits": ("random", "random")}, "^splits=.* must be different ones of random, published; use"),
        ({"first_seed": -1}, "^first_seed=-1 must be at least 0; use 10$"),
        ({"schedules": (1, 2)}, r"^schedules=\[1, 2\] must be updates on three levels; use 200,100,50$"),
        ({"validate_every": 0}, "^validate_every=0 must be at least 1; use 5$"),
        ({"num_layers": 30}, "^num_layers=30 is not a multiple of"),
    ],
)
def test_wrong_options(changes, message):
    with pytest.raises(ValueError, match=message):
        PinesStudyOptions(**changes)
