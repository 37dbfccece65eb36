"""The checkpoint store: the newest good files and the best stay, and nothing goes before the new one is there."""

import errno
import os
import shutil

import pytest
import torch
from refusal import refusal

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.run.store import write as checkpoint_store
from xbraid_py.run.store.read import file_name, load, newest_good, verify
from xbraid_py.run.store.write import CheckpointStore, Score, Shard, clear_rest, score_of

COMM = SerialCommunicator()


def shards(value, comm=COMM):
    """A small array that tells one checkpoint from another; rank 0 has all of it."""
    rows = torch.full((9, 2), float(value))
    return {"w": Shard(rows if comm.rank == 0 else rows[:0], 0, 9)}


def put(store, update, accuracy=None, objective=None, comm=COMM):
    return store.save(
        comm, update, shards(update, comm), {"update": update}, Score(accuracy=accuracy, objective=objective)
    )


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def value_of(path) -> float:
    with load(path) as checkpoint:
        return float(checkpoint.rows("w")[0, 0])


def damage(path):
    """Other bytes in the same file."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    path.write_bytes(content)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_newest_stay(spmd, shared_tmp_path, keep):
    def body(comm):
        store = CheckpointStore(shared_tmp_path, keep)
        return [put(store, update, comm=comm).name for update in (2, 4, 6, 10, 1_000_000)]

    assert spmd(body)[0] == [file_name(update) for update in (2, 4, 6, 10, 1_000_000)]
    expected = [file_name(update) for update in (6, 10, 1_000_000)][-keep:]
    # Without any score none is the best.
    assert names(shared_tmp_path) == sorted(expected)


def test_single_numbers_of_strided_tensors(spmd, shared_tmp_path):
    """Torch calls a tensor of one number contiguous, whatever its strides are."""

    def body(comm):
        one = torch.full((4, 4), float(comm.rank)).T[3:4, 2:3][0, ::2]
        checkpoint_store.save(shared_tmp_path / "one.h5", comm, {"w": Shard(one, comm.rank, comm.size)}, {})

    size = len(spmd(body))
    with load(shared_tmp_path / "one.h5") as checkpoint:
        assert checkpoint.rows("w").tolist() == [float(rank) for rank in range(size)]


def test_keep_must_be_positive(tmp_path):
    with pytest.raises(ValueError, match="keep=0 must be at least 1; use 3"):
        CheckpointStore(tmp_path, 0)


@pytest.mark.parametrize(
    "better, worse",
    [
        ({"accuracy": 0.9}, {"accuracy": 0.8}),
        ({"objective": 0.1}, {"objective": 0.2}),
        ({"accuracy": 0.1, "objective": 9.0}, {"objective": 0.1}),
        ({"accuracy": 0.9, "objective": 9.0}, {"accuracy": 0.8, "objective": 0.1}),
        ({"accuracy": 0.9, "objective": 0.1}, {"accuracy": 0.9, "objective": 0.2}),
        ({"objective": 0.1}, {}),
    ],
)
def test_what_is_better(better, worse):
    assert Score(**better).beats(Score(**worse))
    assert not Score(**worse).beats(Score(**better))
    assert not Score(**better).beats(Score(**better))


@pytest.mark.parametrize("links", [True, False])
def test_the_best_stays_and_is_remembered(tmp_path, monkeypatch, links):
    if not links:

        def refuse(*_):
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", refuse)
    accuracies = {1: 0.2, 2: 0.8, 3: 0.5, 4: None, 5: 0.8, 6: 0.1}
    for update, accuracy in accuracies.items():
        # A new store each time, as after a restart: what is best is in the file.
        put(CheckpointStore(tmp_path, 2), update, accuracy, objective=1.0)
    assert names(tmp_path) == ["best.h5", file_name(5), file_name(6)]
    assert value_of(tmp_path / "best.h5") == 2 and score_of(tmp_path / "best.h5") == Score(accuracy=0.8, objective=1.0)
    put(CheckpointStore(tmp_path, 2), 7, 0.9)
    assert value_of(tmp_path / "best.h5") == 7
    assert os.path.samefile(tmp_path / "best.h5", tmp_path / file_name(7)) == links


def test_a_damaged_best_is_replaced(tmp_path, caplog):
    put(CheckpointStore(tmp_path, 1), 1, 0.9)
    put(CheckpointStore(tmp_path, 1), 2, 0.1)
    damage(tmp_path / "best.h5")
    put(CheckpointStore(tmp_path, 1), 3, 0.2)
    assert value_of(tmp_path / "best.h5") == 3 and "best checkpoint is damaged" in caplog.text


def test_damaged_files_do_not_count(tmp_path):
    store = CheckpointStore(tmp_path, 2)
    for update in (1, 2, 3):
        put(store, update)
    damage(tmp_path / file_name(3))
    put(store, 4)
    # 4 and 2 are the two good ones.
    assert names(tmp_path) == [file_name(2), file_name(3), file_name(4)]
    put(store, 5)
    assert names(tmp_path) == [file_name(4), file_name(5)]


def test_the_one_before_a_damaged_one_is_taken_and_said(tmp_path, caplog):
    store = CheckpointStore(tmp_path)
    for update in (1, 2, 3):
        put(store, update, accuracy=1.0 / update)
    assert store.newest_good() == tmp_path / file_name(3) and not caplog.records
    damage(tmp_path / file_name(3))
    assert store.newest_good() == tmp_path / file_name(2)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    said = caplog.records[0].getMessage()
    assert said.startswith(f"damaged, so the one before is taken: checkpoint {tmp_path / file_name(3)}: ")


def test_the_best_is_the_last_resort(tmp_path, caplog):
    store = CheckpointStore(tmp_path, 1)
    put(store, 1, 0.9)
    put(store, 2, 0.5)
    damage(tmp_path / file_name(2))
    assert newest_good(tmp_path) == tmp_path / "best.h5"
    damage(tmp_path / "best.h5")
    assert newest_good(tmp_path) is None and "no checkpoint in" in caplog.text


def test_nothing_is_removed_before_the_new_one_is_there(spmd, shared_tmp_path, monkeypatch):
    def fill(comm):
        store = CheckpointStore(shared_tmp_path, 2)
        for update in (1, 2):
            put(store, update, 0.5, comm=comm)

    spmd(fill)
    before = names(shared_tmp_path)

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)

    for message in spmd(lambda comm: refusal(RunError, put, CheckpointStore(shared_tmp_path, 2), 3, 0.9, comm=comm)):
        assert message.startswith(f"the checkpoint {shared_tmp_path / file_name(3)} could not be written: ")
        assert "No space left" in message and message.endswith("; make room, or give another --out")
    monkeypatch.undo()
    assert names(shared_tmp_path) == before
    for name in before:
        verify(shared_tmp_path / name)


def test_a_best_that_cannot_be_written_ends_nothing(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copyfileobj", full)
    path = put(CheckpointStore(tmp_path), 1, 0.5)
    assert names(tmp_path) == [path.name] and "No space left" in caplog.text


def test_files_and_the_folder_removed_under_a_run(tmp_path):
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, 2)
    for update in (1, 2, 3):
        put(store, update, 1.0 / update)
    (folder / file_name(3)).unlink()
    (folder / "best.h5").unlink()
    put(store, 4, 0.1)
    assert names(folder) == ["best.h5", file_name(2), file_name(4)]
    shutil.rmtree(folder)
    put(store, 5, 0.1)
    assert names(folder) == ["best.h5", file_name(5)]


def test_a_temporary_file_removed_while_it_is_written(tmp_path, monkeypatch):
    store = CheckpointStore(tmp_path, 1)
    put(store, 1)
    replace = os.replace

    def removed(source, target):
        os.unlink(source)
        replace(source, target)

    monkeypatch.setattr(os, "replace", removed)
    with pytest.raises(RunError, match="No such file"):
        put(store, 2)
    assert names(tmp_path) == [file_name(1)] and value_of(tmp_path / file_name(1)) == 1


def test_what_a_killed_writer_left_is_cleared(tmp_path):
    put(CheckpointStore(tmp_path), 1)
    (tmp_path / (file_name(2) + ".tmp")).write_bytes(b"half")
    (tmp_path / "best.h5.tmp").write_bytes(b"half")
    (tmp_path / "notes.tmp").write_text("mine")
    clear_rest(tmp_path)
    clear_rest(tmp_path / "missing")
    assert names(tmp_path) == ["notes.tmp", file_name(1)]


def test_what_cannot_be_cleared_is_said(tmp_path, caplog):
    (tmp_path / "best.h5.tmp").mkdir()
    clear_rest(tmp_path)
    assert "what a killed job has left in" in caplog.text and names(tmp_path) == ["best.h5.tmp"]


@pytest.mark.parametrize("has_links", [True, False])
def test_links_in_the_place_of_temporary_files_are_not_followed(tmp_path, monkeypatch, has_links):
    folder, mine = tmp_path / "checkpoints", tmp_path / "mine"
    folder.mkdir()
    mine.write_text("precious")
    (folder / f"{file_name(1)}.tmp").symlink_to(mine)
    os.link(mine, folder / f"{file_name(2)}.tmp")
    (folder / "best.h5.tmp").symlink_to(mine)

    def none(*_):
        # Whoever plants a link may do so at any time.
        (folder / "best.h5.tmp").symlink_to(mine)
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    if not has_links:
        monkeypatch.setattr(os, "link", none)
    store = CheckpointStore(folder)
    put(store, 1, 0.5)
    put(store, 2, 0.6)
    assert mine.read_text() == "precious" and mine.stat().st_nlink == 1
    assert names(folder) == ["best.h5", file_name(1), file_name(2)] and value_of(folder / "best.h5") == 2


def test_a_link_among_the_checkpoints_is_judged_by_what_it_leads_to(tmp_path):
    # A link of one's own, to a run elsewhere, is read as the file; whoever plants one could plant a copy as well.
    folder, other = tmp_path / "checkpoints", tmp_path / "other.h5"
    store = CheckpointStore(folder)
    put(store, 1)
    shutil.copyfile(folder / file_name(1), other)
    (folder / file_name(2)).symlink_to(other)
    assert newest_good(folder) == folder / file_name(2) and value_of(newest_good(folder)) == 1
    damage(other)
    assert newest_good(folder) == folder / file_name(1)
    # Writing takes the link's place, and removing takes the link.
    content = other.read_bytes()
    put(store, 2)
    assert value_of(folder / file_name(2)) == 2 and other.read_bytes() == content


def test_files_written_here_are_not_read_again(tmp_path, monkeypatch):
    read = []
    monkeypatch.setattr(checkpoint_store, "verify", lambda path: read.append(path.name))
    store = CheckpointStore(tmp_path, 2)
    for update in range(6):
        put(store, update, update / 10)
    assert read == []
    # After a restart each file is read once.
    store = CheckpointStore(tmp_path, 2)
    for update in range(6, 9):
        put(store, update, update / 10)
    assert sorted(read) == ["best.h5", file_name(5)]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files here")
def test_no_file_stays_open(tmp_path):
    store = CheckpointStore(tmp_path, 2)
    put(store, 0, 0.5)
    before = len(os.listdir("/proc/self/fd"))
    for update in range(1, 6):
        put(store, update, 0.5 + update / 100)
        damage(tmp_path / file_name(update))
        newest_good(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == before
