"""A run that goes on from one number of ranks to the next is the uninterrupted run; in the other precision if asked."""

import json

import pytest
import torch
from processes import PROJECT, finish_job, start_job
from small_runs import gathered, nested, same_bits, timeless

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.errors import RunError
from xbraid_py.multilevel.depth.nested_state import save_run
from xbraid_py.recipes.classification_training import prepare
from xbraid_py.run.record import read
from xbraid_py.recipes.old_resume import checkpoint_folder, read_resumed
from xbraid_py.run.store.keep import CheckpointStore
from xbraid_py.run.store.read import numbered
from xbraid_py.run.store.write import CheckpointError, file_name, load
from xbraid_py.testing import run_threads

UPDATES = (3, 2, 4)
RANKS = (1, 2, 3, 5, 8, 1)
CONFIGURATION = {"num_layers": 32, "dtype": "float64"}
DRIVER = PROJECT / "drivers" / "peaks.py"


def on_ranks(size, body):
    return run_threads(size, body) if size > 1 else [body(SerialCommunicator())]


def part(out, size, updates, convert=False, **others):
    """Go on from the newest checkpoint on so many ranks for some updates; the records, and the weights at the end."""
    configuration = {**CONFIGURATION, "dtype": str(others.get("dtype", "float64")).removeprefix("torch.")}

    def body(comm):
        run = nested(comm, UPDATES, **others)
        resumed = read_resumed("auto", out, {"nested": run}, configuration, (), convert)
        store = CheckpointStore(checkpoint_folder(out, "nested"), 2)
        records = []
        for record in run.run(resumed.get("nested")):
            records.append(timeless(record))
            save_run(store, run, record.update, "nested", configuration)
            if len(records) == updates:
                break
        return records, gathered(run.network, run.weights)

    return on_ranks(size, body)[0]


def test_from_one_number_of_ranks_to_the_next(tmp_path):
    expected, weights = part(tmp_path / "whole", 1, 100)
    assert len(expected) == 1 + sum(UPDATES)
    found = []
    for index, size in enumerate(RANKS):
        records, last = part(tmp_path / "parts", size, 2 if index < len(RANKS) - 1 else 100)
        found += records
    assert found[: len(expected)] == expected and same_bits(last, weights)


@pytest.mark.parametrize("first, second", [(torch.float64, torch.float32), (torch.float32, torch.float64)])
@pytest.mark.parametrize("sizes", [(1, 3), (2, 1)])
def test_another_precision_only_when_asked(tmp_path, first, second, sizes):
    part(tmp_path, sizes[0], 5, dtype=first)
    path = checkpoint_folder(tmp_path, "nested") / file_name(4)
    names = [str(dtype).removeprefix("torch.") for dtype in (first, second)]
    with pytest.raises(CheckpointError) as caught:
        part(tmp_path, sizes[1], 1, dtype=second)
    assert str(caught.value) == (
        f"{path} was written with dtype={names[0]}, but this run has dtype={names[1]}; "
        f"give --dtype {names[0]}, or --convert_dtype, or start without --resume"
    )
    run = nested(SerialCommunicator(), UPDATES, dtype=second)
    with pytest.raises(CheckpointError, match=f"holds {first}, but this run has {second}; give --convert_dtype"):
        read_resumed(str(path), tmp_path, {"nested": run}, {**CONFIGURATION, "dtype": names[0]}, ())
    snapshot = read_resumed(
        str(path), tmp_path, {"nested": run}, {**CONFIGURATION, "dtype": names[1]}, (), convert_dtype=True
    )["nested"]
    vectors = [flat for flats in snapshot.vectors.values() for flat in flats]
    warm = [rows for levels in snapshot.warm.values() for rows in levels]
    assert len(vectors) > 3 and warm and {rows.dtype for rows in (*vectors, *warm)} == {second}
    with load(path) as checkpoint:
        stored = checkpoint.rows("weights/layers.weight")
    layout = run.problem.network(snapshot.numbers["num_layers"]).layout
    assert torch.equal(layout.named(snapshot.vectors["weights"][0])["layers.weight"], stored.to(second))


def test_the_rest_in_the_other_precision_is_close(tmp_path):
    expected, _ = part(tmp_path / "whole", 1, 100)
    part(tmp_path / "parts", 2, 7)
    records, _ = part(tmp_path / "parts", 3, 100, convert=True, dtype=torch.float32)
    assert [record.update for record in records] == [7, 8, 9]
    for record, other in zip(records, expected[7:], strict=True):
        assert record.evaluation.value != other.evaluation.value
        assert record.evaluation.value == pytest.approx(other.evaluation.value, rel=1e-3)


TINY = [
    *("--num_layers=16", "--num_train=50", "--num_val=40", "--network.width=3"),
    *("--mgrit.min_coarse=2", "--mgrit.intervals=4", "--nested.refinements=1", "--nested.updates=4,6"),
    *("--optim.boost_updates=1", "--checkpoint_every=2", "--validate_every=2"),
]
# Makes a run stop as a signal does, once it has come to an update.
STOPPING = """
import os, runpy, signal, sys
from xbraid_py.run.folder import RunFolder

at, driver = int(sys.argv[1]), sys.argv[2]
update = RunFolder.update

def stopping(self, number, *others):
    if number == at and self.comm.rank == self.comm.size - 1:
        os.kill(os.getpid(), signal.SIGUSR1)
    return update(self, number, *others)

RunFolder.update = stopping
sys.argv = sys.argv[2:]
runpy.run_path(driver, run_name="__main__")
"""


def rows_of(out):
    rows = read(out / "metrics.jsonl")
    return [{key: row[key] for key in row if key != "seconds"} for row in rows if row["kind"] == "update"]


@pytest.mark.job
@pytest.mark.timeout(300)
def test_over_mpi_from_stop_to_stop(tmp_path):
    """On 1, 2, 5 and 3 ranks, stopped by a signal between them; then the run that is over ends at once."""

    def start(out, ranks, at, *more):
        words = ["-c", STOPPING, at, DRIVER, *TINY, f"--out={out}", *more]
        return finish_job(start_job(words, ranks=ranks), timeout=100)

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert start(whole, 1, -1).returncode == 0
    for ranks, at in ((1, 1), (2, 3), (5, 7)):
        job = start(parts, ranks, at, "--resume=auto")
        assert job.returncode == 75, job.stderr
        path = parts / "checkpoints" / file_name(at)
        assert job.stderr == f"stopped by SIGUSR1 after update {at}; --resume auto goes on from {path}\n"
        status = json.loads((parts / "status.json").read_text())
        assert (status["state"], status["update"], status["ranks"]) == ("stopped", at, ranks)
    last = start(parts, 3, -1, "--resume=auto")
    assert last.returncode == 0 and len(rows_of(parts)) == len(rows_of(whole)) == 11
    for row, expected in zip(rows_of(parts), rows_of(whole), strict=True):
        assert list(row) == list(expected)
        for name, value in expected.items():
            is_float = isinstance(value, float)
            assert row[name] == (pytest.approx(value, rel=1e-9, abs=1e-14) if is_float else value), name
    assert sorted(path.name for path in (parts / "checkpoints").iterdir()) == [
        "best.h5",
        *(file_name(update) for update in (7, 8, 10)),
    ]
    before = (parts / "metrics.jsonl").read_bytes()
    again = start(parts, 2, -1, "--resume=auto")
    said, accuracy = again.stdout.splitlines()
    assert (again.returncode, said) == (0, f"the run in {parts} is finished; to train again, start without --resume")
    assert accuracy == last.stdout.splitlines()[-1] and (parts / "metrics.jsonl").read_bytes() == before


def test_checkpoints_of_later_updates_are_set_aside(spmd, shared_tmp_path):
    spmd(lambda comm: part(shared_tmp_path, 1, 6) if comm.rank == 0 else None)
    folder = checkpoint_folder(shared_tmp_path, "nested")
    (folder / "update_000007.h5.tmp").write_bytes(b"half")
    assert [number for number, _ in numbered(folder)] == [5, 4]

    def body(comm):
        run = nested(comm, UPDATES)
        resumed = read_resumed(str(folder / file_name(4)), shared_tmp_path, {"nested": run}, CONFIGURATION, ())
        prepare(shared_tmp_path, comm, {"nested": run}, resumed)
        return resumed["nested"].next_record

    assert set(spmd(body)) == {5}
    assert [path.name for path in folder.iterdir()] == [file_name(4)]
    assert (shared_tmp_path / "earlier-1" / "checkpoints" / file_name(5)).exists()


@pytest.mark.ranks(2, 3)
def test_ranks_that_see_different_checkpoints_end_together(spmd, shared_tmp_path):
    spmd(lambda comm: part(shared_tmp_path, 1, 6) if comm.rank == 0 else None)

    def body(comm):
        run = nested(comm, UPDATES)
        path = checkpoint_folder(shared_tmp_path, "nested") / file_name(5 if comm.rank else 4)
        resumed = read_resumed(str(path), shared_tmp_path, {"nested": run}, CONFIGURATION, ())
        try:
            prepare(shared_tmp_path, comm, {"nested": run}, resumed)
        except RunError as error:
            return str(error)

    said = set(spmd(body))
    assert len(said) == 1 and said.pop().startswith("resume={'nested': 5} on rank 0 but {'nested': 6} on rank")
