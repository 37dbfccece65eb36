"""Runs of multilevel training in width in their folders: stopped and resumed, on any number of ranks; and pictures."""

from __future__ import annotations

import contextlib
import json
import signal

import pytest
from width_runs import job

from xbraid_py import RunError
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.recipes.pictures.width_curves import fields, over_work, smoothed
from xbraid_py.recipes.width import Job
from xbraid_py.recipes.width_follow import Following, follow
from xbraid_py.recipes.width_networks import WidthNetwork
from xbraid_py.run import signals
from xbraid_py.run.folder import claim
from xbraid_py.run.record import read
from xbraid_py.run.store.write import CheckpointError, file_name

CONFIGURATION = {"mesh": 8, "out": "here"}


def run(comm, out, resume=None, max_work=42.0, finish=None, stop_at=None, configuration=CONFIGURATION, **changes):
    """A run of six cycles of 7 units; a signal arrives in cycle `stop_at`. Its rows without the clock, on rank 0."""

    class Watched(Job):
        def run(self, *arguments):
            for record, errors, over in super().run(*arguments):
                if record.cycle == stop_at and comm.rank == comm.size - 1:
                    signals.note(signal.SIGUSR1)
                yield record, errors, over

    def make():
        found = job(ProcessGrid(comm, comm.size), **changes)
        return Watched(found.training, found.seen, found.unseen)

    folder = claim(out, comm)
    following = Following(max_work=max_work, validate_every=14.0, checkpoint_every=2)
    try:
        follow(make, job().training.options, following, folder, configuration, resume, finish)()
    finally:
        comm.barrier()
        folder.release()
        signals.forget()
    if comm.rank == 0:
        left_out = ("seconds", "matching_seconds", "counted")  # clocks; sums that begin anew
        return [{k: v for k, v in row.items() if k not in left_out} for row in rows_of(out)]


def rows_of(out):
    return [row for row in read(out / "metrics.jsonl") if row["kind"] == "update"]


@pytest.mark.ranks(1, 2, 5)
def test_after_a_signal(spmd, shared_tmp_path):
    expected = spmd(lambda comm: run(comm, shared_tmp_path / "undisturbed"))[0]
    out = shared_tmp_path / "run"

    def stopped(comm):
        with pytest.raises(signals.Stopped, match="^stopped by SIGUSR1 after update 3; --resume auto goes on from "):
            run(comm, out, stop_at=3)

    spmd(stopped)
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert spmd(lambda comm: run(comm, out, "auto"))[0] == expected
    assert [row["update"] for row in expected] == list(range(1, 7)) and expected[-1]["final"]
    assert [row["update"] for row in expected if "val_l2" in row] == [1, 3, 5, 6]


@pytest.mark.ranks(1, 2)
def test_a_run_that_died_while_it_drew_draws_again(spmd, shared_tmp_path):
    out = shared_tmp_path / "run"

    def dies(found, rows):
        raise RunError("a crash")

    def body(comm):
        drawn = []
        with contextlib.suppress(RunError):
            run(comm, out, finish=dies)
        comm.barrier()
        run(comm, out, "auto", finish=lambda _, rows: drawn.append(len(rows)))
        return drawn

    found = spmd(body)
    assert found == [[4], *[[0]] * (len(found) - 1)]


def test_a_run_that_is_over_is_left_alone(tmp_path, capsys):
    from xbraid_py.comm import SerialCommunicator

    comm, out = SerialCommunicator(), tmp_path / "run"
    run(comm, out)
    assert "validation L2 " in (last := capsys.readouterr().out.splitlines()[-1])
    assert "after 6 cycles, 42 work units (without tau 27, counted " in last
    before = (out / "metrics.jsonl").read_bytes()
    run(comm, out, "auto", finish=lambda *_: pytest.fail("drawn again"))
    assert (out / "metrics.jsonl").read_bytes() == before
    assert f"the run in {out} is finished; for more cycles give another --max_work" in capsys.readouterr().out
    assert (out / "checkpoints" / "width" / file_name(6)).exists()
    more = run(comm, out, "auto", max_work=56.0)
    assert [row["update"] for row in more] == list(range(1, 9))
    with pytest.raises(CheckpointError, match="was written with mesh=8, but this run has mesh=9"):
        run(comm, out, "auto", max_work=70.0, configuration={"mesh": 9})
    with pytest.raises(RunError, match="holds no state of a training run"):
        run(comm, out, "auto", max_work=70.0, network=WidthNetwork(widths=(16, 11)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_work": 0.0}, "^max_work=0.0 must be positive and finite; use 50$"),
        ({"validate_every": -1.0}, "^validate_every=-1.0 must be positive and finite; use 50$"),
        ({"keep": 0}, "^keep=0 must be at least 1; use 3$"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        Following(**{"max_work": 10.0} | changes)


def test_pictures(tmp_path):
    names = [f"{samples}_{norm}" for samples in ("val", "train", "aux_val") for norm in ("l2", "linf")]
    rows = [{"work": 7.0 * k, "counted": 8.0 * k, **dict.fromkeys(names, 1 / k)} for k in range(1, 5)]
    single = [row | {"aux_val_l2": None, "aux_val_linf": None} for row in rows]
    lines = [("val", "-", ""), ("aux_val", "--", "aux")]
    over_work({"two": rows, "one": single}, tmp_path / "a.png", over="counted", lines=lines, window=3)
    fields([[0.0, 1.0], [2.0, 3.0]], [[0.0, 1.0], [2.0, 4.0]], tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert smoothed([1.0, 3.0, 5.0, 7.0], 3) == [1.0, 2.0, 3.0, 5.0]
    with pytest.raises(ValueError, match="^runs holds no run"):
        over_work({}, tmp_path / "c.png")
    with pytest.raises(ValueError, match=r"^exact.shape=\(2, 2\) and learned.shape=\(1, 2\) must be square"):
        fields([[0, 1], [2, 3]], [[0, 1]], tmp_path / "c.png")
