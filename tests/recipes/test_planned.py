"""Plans of minibatch jobs: by rule where no solver is given, and as they were begun when they go on."""

from __future__ import annotations

import pytest
from kinds import KINDS, draw_nothing, run, updates_of

from xbraid_py.comm import SerialCommunicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.recipes.planned import replicas_of
from xbraid_py.run.store.read import load, numbered

SERIAL = SerialCommunicator()
MODULES = ["digits", "sequences", "text"]


def solver_of(out) -> dict:
    """Of the options in the last checkpoint."""
    with load(numbered(out / "checkpoints")[-1][1]) as checkpoint:
        return checkpoint.meta["configuration"]["mgrit"]


@pytest.mark.parametrize("kind", MODULES)
@pytest.mark.ranks(1, 2, 4)
def test_modules_go_by_the_rule_on_any_number_of_ranks(spmd, tmp_path, shared_tmp_path, monkeypatch, kind):
    draw_nothing(monkeypatch)
    spmd(lambda comm: run(KINDS[kind], comm, shared_tmp_path / "many", "--mgrit=null") and None)
    run(KINDS[kind], SERIAL, tmp_path / "one", "--mgrit=null")
    assert "plan: " in (tmp_path / "one" / "log.txt").read_text()
    assert solver_of(tmp_path / "one")["cycle"] == "pipeline"
    for ours, theirs in zip(updates_of(shared_tmp_path / "many"), updates_of(tmp_path / "one"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)


def test_a_plan_is_kept_and_replicas_are_chosen_again(tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    run(KINDS["digits"], SERIAL, tmp_path, "--mgrit=null")
    whole, (first, *later) = updates_of(tmp_path), [path for _, path in reversed(numbered(tmp_path / "checkpoints"))]
    for path in later:
        path.unlink()
    (tmp_path / "checkpoints" / "best.h5").unlink(missing_ok=True)
    run(KINDS["digits"], SERIAL, tmp_path, "--mgrit=null", "--resume=auto")
    assert updates_of(tmp_path) == whole and first.exists()
    assert "plan: as begun, 1 replica" in (tmp_path / "log.txt").read_text()


def test_replicas_that_fit_a_solver():
    pipeline = MGRIT(cycle="pipeline")
    assert [replicas_of(pipeline, 5000, ranks) for ranks in (1, 2, 3, 4, 6, 8, 12, 32)] == [1, 2, 3, 4, 6, 8, 6, 8]
    assert replicas_of(pipeline, 20, 8) == 2 and replicas_of(MGRIT(), 5000, 8) == 1
    assert replicas_of(MGRIT(portions=4), 5000, 8) == 4 and replicas_of(pipeline, 5000, 8, most=1) == 1
