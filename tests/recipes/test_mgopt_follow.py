"""Runs of MG/OPT in their folders: stopped by a signal and resumed, on any number of ranks; drawn again if killed."""

import contextlib
import itertools
import json
import signal

import pytest
from mgopt_runs import mgopt

from xbraid_py import RunError
from xbraid_py.data import circles
from xbraid_py.recipes.mgopt import Job
from xbraid_py.recipes.mgopt_follow import Following, follow
from xbraid_py.run import signals
from xbraid_py.run.folder import claim
from xbraid_py.run.record import read
from xbraid_py.run.store.write import file_name

CONFIGURATION = {"num_layers": 16, "out": "here"}


def run(comm, out, resume=None, max_cycles=6, finish=None, at=lambda cycle: None):
    """A run of a few cycles; `at(cycle)` is called at every validation. Its rows without the clock, on rank 0."""
    validation = circles.generate(60, 40, seed=1)[1]

    cycles = itertools.count()

    class Watched(Job):
        def accuracy(self):
            at(next(cycles))
            return super().accuracy()

    job = Watched(mgopt(comm), (validation.features, validation.labels))
    following = Following(goal=1.0, max_cycles=max_cycles, checkpoint_every=2)
    folder = claim(out, comm)
    try:
        follow(job, following, folder, CONFIGURATION, "V", resume=resume, finish=finish)()
    finally:
        comm.barrier()
        signals.forget()
    if comm.rank == 0:
        # Counts are sums of floating-point numbers, which begin anew.
        return [{k: v for k, v in row.items() if k not in ("seconds", "counted_work")} for row in rows_of(out)]


def rows_of(out):
    return [row for row in read(out / "metrics.jsonl") if row["kind"] == "update"]


@pytest.mark.ranks(1, 2, 3)
def test_after_a_signal(spmd, shared_tmp_path):
    expected = spmd(lambda comm: run(comm, shared_tmp_path / "undisturbed"))[0]
    out = shared_tmp_path / "run"

    def stopped(comm):
        def at(cycle):
            if cycle == 3 and comm.rank == comm.size - 1:
                signals.note(signal.SIGUSR1)

        with pytest.raises(signals.Stopped, match="^stopped by SIGUSR1 after update 3; --resume auto goes on from "):
            run(comm, out, at=at)

    spmd(stopped)
    assert json.loads((out / "status.json").read_text())["state"] == "stopped"
    assert spmd(lambda comm: run(comm, out, "auto"))[0] == expected
    assert [row["update"] for row in expected] == list(range(7)) and expected[-1]["final"]


@pytest.mark.ranks(1, 2)
def test_a_run_that_died_while_it_drew_draws_again(spmd, shared_tmp_path):
    out = shared_tmp_path / "run"

    def dies(rows):
        raise RunError("a crash")

    def body(comm):
        drawn = []
        with contextlib.suppress(RunError):
            run(comm, out, finish=dies)
        comm.barrier()
        run(comm, out, "auto", finish=lambda rows: drawn.append(len(rows)))
        return drawn

    drawn, *others = spmd(body)
    assert drawn == [7] and all(each == [0] for each in others)
    assert [row["update"] for row in rows_of(out)] == list(range(7))


@pytest.mark.ranks(1, 2)
def test_a_run_that_is_over_is_left_alone(spmd, shared_tmp_path, capsys):
    out = shared_tmp_path / "run"
    spmd(lambda comm: run(comm, out))
    before = (out / "metrics.jsonl").read_bytes()
    spmd(lambda comm: run(comm, out, "auto", finish=lambda rows: pytest.fail("drawn again")))
    assert (out / "metrics.jsonl").read_bytes() == before
    assert (out / "checkpoints" / "mgopt" / file_name(6)).exists()
    more = spmd(lambda comm: run(comm, out, "auto", max_cycles=8))[0]
    assert [row["update"] for row in more] == list(range(9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"goal": 0.0}, "^goal=0.0 must be above 0 and at most 1; use 0.93$"),
        ({"max_cycles": 0}, "^max_cycles=0 must be at least 1; use 100$"),
        ({"keep": 0}, "^keep=0 must be at least 1; use 100$"),
    ],
)
def test_bad_options(changes, message):
    with pytest.raises(ValueError, match=message):
        Following(**{"goal": 0.9, "max_cycles": 3} | changes)
