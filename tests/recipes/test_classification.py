"""Nested iteration as a job, on peaks: validations, the run of comparison, and bad input."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from bad_input import BAD, make_inputs
from kinds import KINDS, Kind, draw_nothing, run, updates_of

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.planner import Plan, choose
from xbraid_py.recipes import planned
from xbraid_py.run.options import OptionError
from xbraid_py.run.store.read import load, numbered

SERIAL = SerialCommunicator()
# 16 layers by the lagged cycle, 8 one after the other.
TINY = Kind("peaks", (*KINDS["nested"].words, "--network.width=3", "--mgrit.min_coarse=2", "--validate_every=2"), "")
SHORT = "--nested.updates=3,2"


def test_validations_are_made_as_often_as_asked_for(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    run(TINY, SERIAL, tmp_path)
    rows = updates_of(tmp_path)
    assert [row["update"] for row in rows if "val_accuracy" in row] == [0, 2, 4, 6, 8]
    # Of 40 points for validation; of the 50 for training it would be another share.
    right = [40 * row["val_accuracy"] for row in rows if "val_accuracy" in row]
    assert right == pytest.approx([round(count) for count in right], abs=1e-9)
    assert any(50 * row["val_accuracy"] % 1 > 0.01 for row in rows[::2])
    best = max(rows[::2], key=lambda row: (row["val_accuracy"], -row["objective"]))
    with load(tmp_path / "checkpoints" / "best.h5") as file:
        assert file.meta["update"] == best["update"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """The folder of a run with its run of comparison."""
    out = tmp_path_factory.mktemp("compared")
    run(TINY, SERIAL, out, SHORT, "--compare")
    return out


def test_the_run_of_comparison_has_as_much_work(compared):
    nested, alone = updates_of(compared), updates_of(compared / "non-nested")
    assert [(row["run"], row["update"]) for row in nested] == [("nested", update) for update in range(6)]
    assert [(row["run"], row["update"]) for row in alone] == [("non-nested", update) for update in range(5)]
    assert {row["num_layers"] for row in alone} == {16} and alone[-1]["final"]
    for out in (compared, compared / "non-nested"):
        assert json.loads((out / "status.json").read_text())["state"] == "finished"
        assert {"accuracy.png", "convergence.png"} <= {path.name for path in (out / "figures").iterdir()}


def test_a_job_goes_on_in_either_of_its_runs(compared, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    run(TINY, SERIAL, tmp_path, SHORT, "--compare")
    for killed, at in ((tmp_path / "non-nested", 2), (tmp_path, 4)):
        for number, path in numbered(killed / "checkpoints"):
            if number > at:
                path.unlink()
        (killed / "checkpoints" / "best.h5").unlink()
        run(TINY, SERIAL, tmp_path, SHORT, "--compare", "--resume=auto")
        assert updates_of(tmp_path) == updates_of(compared)
        assert updates_of(tmp_path / "non-nested") == updates_of(compared / "non-nested")


def test_a_run_is_compared_later(compared, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    run(TINY, SERIAL, tmp_path, SHORT)
    run(TINY, SERIAL, tmp_path, SHORT, "--compare", "--resume=auto")
    assert updates_of(tmp_path / "non-nested") == updates_of(compared / "non-nested")


PLANNED = Kind("peaks", (*(word for word in TINY.words if not word.startswith("--mgrit")), "--mgrit=null"), "")


def test_a_planned_job_goes_on_as_it_was_planned(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    choice = choose(16, 50, 4, cycles=())
    lagged = replace(choice, plan=Plan(cfactors=(4,)))
    monkeypatch.setattr(planned, "measured", lambda workload, comm: lagged)
    run(PLANNED, SERIAL, tmp_path, "--plan=measured")
    with load(numbered(tmp_path / "checkpoints")[0][1]) as checkpoint:
        assert checkpoint.meta["configuration"]["mgrit"]["cycle"] == "lagged"
    expected = updates_of(tmp_path)
    for number, path in numbered(tmp_path / "checkpoints"):
        if number > 3:
            path.unlink()
    monkeypatch.setattr(planned, "measured", lambda *_: pytest.fail("planned again"))
    run(PLANNED, SERIAL, tmp_path, "--plan=measured", "--resume=auto")
    assert updates_of(tmp_path) == expected


@pytest.mark.ranks(1, 2, 3, 4)
def test_the_plan_by_rule_gives_the_same_numbers_on_any_number_of_ranks(spmd, tmp_path, shared_tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    spmd(lambda comm: run(PLANNED, comm, shared_tmp_path / "many", "--num_train=65") and None)
    run(PLANNED, SERIAL, tmp_path / "one", "--num_train=65")
    assert updates_of(shared_tmp_path / "many") == updates_of(tmp_path / "one")
    assert "plan: " in (tmp_path / "one" / "log.txt").read_text()
    with load(numbered(tmp_path / "one" / "checkpoints")[0][1]) as checkpoint:
        assert checkpoint.meta["configuration"]["mgrit"]["cycle"] == "pipeline"


@pytest.mark.ranks(4)
@pytest.mark.parametrize("solver", [("--mgrit.cycle=pipeline",), ("--mgrit.portions=4", "--mgrit.intervals=4")])
def test_a_run_goes_on_with_other_replicas(spmd, shared_tmp_path, monkeypatch, solver):
    """With 4 replicas of a rank, then cut and gone on with 1 and 2 replicas of 4 and 2 ranks: the same run."""
    draw_nothing(monkeypatch)
    whole, cut = shared_tmp_path / "whole", shared_tmp_path / "cut"

    def made(out, *more):
        words = ("--num_train=65", *solver, *more)
        spmd(lambda comm: run(PLANNED, comm, out, *words) and None)

    for out in (whole, cut):
        made(out, "--replicas=4")
    for replicas in ("--replicas=1", "--replicas=2"):
        spmd(lambda comm: keep_until(cut, 3) if comm.rank == 0 else None)
        made(cut, replicas, "--resume=auto")
        for ours, theirs in zip(updates_of(cut), updates_of(whole), strict=True):
            assert ours["loss"] == theirs["loss"] and ours["grad_norm"] == theirs["grad_norm"]


def keep_until(out, last: int) -> None:
    """Leave no checkpoint behind that update."""
    for number, path in numbered(out / "checkpoints"):
        if number > last:
            path.unlink()
    (out / "checkpoints" / "best.h5").unlink(missing_ok=True)


@pytest.mark.parametrize("dtypes", [("float64", "float32"), ("float32", "float64")])
def test_another_precision_only_when_asked(tmp_path, monkeypatch, dtypes):
    draw_nothing(monkeypatch)
    first, second = dtypes
    run(TINY, SERIAL, tmp_path, f"--dtype={first}", "--nested.updates=4,4")
    for number, path in numbered(tmp_path / "checkpoints"):
        if number > 3:
            path.unlink()
    expected = updates_of(tmp_path)
    message = f"was written with dtype={first}, .* give --dtype {first}, or --convert_dtype, or start without --resume"
    with pytest.raises(ValueError, match=message):
        run(TINY, SERIAL, tmp_path, f"--dtype={second}", "--resume=auto")
    run(TINY, SERIAL, tmp_path, f"--dtype={second}", "--resume=auto", "--convert_dtype")
    for row, other in zip(updates_of(tmp_path), expected, strict=True):
        assert row["loss"] == pytest.approx(other["loss"], rel=1e-3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Files that are wrong, and a checkpoint of other options."""
    folder = tmp_path_factory.mktemp("inputs")
    make_inputs(folder)
    with pytest.MonkeyPatch.context() as patch:
        draw_nothing(patch)
        run(TINY, SERIAL, folder / "smoke_1", "--mgrit.intervals=8", "--nested.updates=2,9")
    return folder


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_message(inputs, tmp_path, name):
    word, status, message = BAD[name]
    pattern = re.escape(message.replace("FOLDER", str(inputs))).replace(r"\.\.\.", ".*")
    with pytest.raises(RunError if status == 1 else (ValueError, OptionError), match=f"^{pattern}$"):
        run(TINY, SERIAL, tmp_path, word.replace("FOLDER", str(inputs)))
    assert not (tmp_path / "figures").exists()
