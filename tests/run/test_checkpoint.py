"""Checkpoints: what any number of ranks writes, any other reads, bit by bit."""

import pytest
import torch
from global_arrays import META, agrees, error_of, make_arrays, same_bits, shards_of

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.partition import Partition
from xbraid_py.run.store import read as checkpoint_read
from xbraid_py.run.store.read import CheckpointError, file_name, load, newest_good, verify
from xbraid_py.run.store.write import Shard, save


@pytest.mark.parametrize("readers", [1, 2, 3, 5])
def test_any_number_of_ranks_reads_what_any_other_wrote(spmd, shared_tmp_path, readers):
    arrays = make_arrays()
    path = shared_tmp_path / "new" / "folder" / file_name(40)

    def body(comm):
        save(path, comm, shards_of(comm, arrays), META)
        comm.barrier()
        right = []
        with load(path) as file:
            right += [file.meta == META, file.names() == tuple(sorted(arrays)), file.versions["torch"] is not None]
            for name, rows in arrays.items():
                right += [file.shape(name) == tuple(rows.shape), file.total(name) == len(rows)]
                part = Partition.balanced(len(rows), readers)
                for reader in range(readers):
                    first, count = part.first(reader), part.count(reader)
                    right.append(same_bits(file.rows(name, first, count), rows[first : first + count]))
        return right

    assert all(all(right) for right in spmd(body))
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_small_pieces(spmd, shared_tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint_read, "PIECE_BYTES", 100)
    arrays = make_arrays()
    path = shared_tmp_path / file_name(1)
    spmd(lambda comm: save(path, comm, shards_of(comm, arrays), META))
    verify(path)
    assert agrees(path, arrays)


def test_pieces_cover_all_rows_within_the_limit(monkeypatch):
    monkeypatch.setattr(checkpoint_read, "PIECE_BYTES", 100)
    for count, row_bytes in [(0, 8), (1, 8), (25, 8), (7, 33), (5, 1000)]:
        parts = list(checkpoint_read.pieces(count, row_bytes))
        assert [row for part in parts for row in range(part.start, part.stop)] == list(range(count))
        assert all((part.stop - part.start) * row_bytes <= max(100, row_bytes) for part in parts)


def test_a_rank_may_leave_out_names_and_hand_in_any_memory(spmd, shared_tmp_path):
    path = shared_tmp_path / file_name(1)
    rows = torch.arange(12.0).reshape(3, 4)
    weight = torch.nn.Parameter(rows.T)  # neither contiguous nor without a gradient

    def body(comm):
        save(path, comm, {"opening": Shard(weight, 0, 4)} if comm.rank == comm.size - 1 else {}, {})

    spmd(body)
    with load(path) as file:
        assert torch.equal(file.rows("opening"), rows.T)


@pytest.mark.parametrize(
    ("firsts", "total", "message"),
    [((0, 2), 5, "rows 4 to 4 belong to no rank"), ((0, 1), 3, "row 1 of rank 1 has another owner")],
)
@pytest.mark.ranks(2)
def test_every_row_needs_one_owner(spmd, shared_tmp_path, firsts, total, message):
    def body(comm):
        owned = {"w": Shard(torch.zeros(2, 3), firsts[comm.rank], total)} if comm.rank < 2 else {}
        return error_of(save, shared_tmp_path / file_name(1), comm, owned, {})

    errors = spmd(body)
    assert all(isinstance(error, ValueError) and message in str(error) for error in errors)
    assert list(shared_tmp_path.iterdir()) == []


@pytest.mark.ranks(2)
def test_ranks_that_disagree(spmd, shared_tmp_path):
    def body(comm):
        rows = torch.zeros(1, 3, dtype=torch.float64 if comm.rank else torch.float32)
        return error_of(
            save, shared_tmp_path / file_name(1), comm, {"w": Shard(rows, comm.rank, max(2, comm.size))}, {}
        )

    assert all("shards['w']: the ranks differ" in str(error) for error in spmd(body))


@pytest.mark.parametrize("names", [("meta",), ("meta/a",), ("a", "a/b"), ("",), ("/a",), ("a//b",), ("a/./b",)])
def test_unusable_names(tmp_path, names):
    shards = {name: Shard(torch.zeros(1), 0, 1) for name in names}
    with pytest.raises(ValueError, match="no usable name"):
        save(tmp_path / file_name(1), SerialCommunicator(), shards, {})


def test_bad_shards_name_what_works():
    with pytest.raises(TypeError, match=r"rows.dtype=torch.complex64 .* use torch.float64"):
        Shard(torch.zeros(1, dtype=torch.complex64), 0, 1)
    with pytest.raises(ValueError, match=r"first=3 with 2 rows does not fit into total=4"):
        Shard(torch.zeros(2), 3, 4)
    with pytest.raises(ValueError, match=r"use rows.reshape\(1\)"):
        Shard(torch.tensor(1.0), 0, 1)
    with pytest.raises(ValueError, match="update=-1"):
        file_name(-1)


def test_meta_that_is_no_json_fails_everywhere(spmd, shared_tmp_path):
    errors = spmd(lambda comm: error_of(save, shared_tmp_path / file_name(1), comm, {}, {"a": object()}))
    assert all(isinstance(error, TypeError) for error in errors)


def test_asking_for_what_is_not_there(tmp_path):
    path = tmp_path / file_name(40)
    save(path, SerialCommunicator(), shards_of(SerialCommunicator(), make_arrays()), META)
    with load(path) as file:
        with pytest.raises(CheckpointError, match=r"holds no 'weights/other', but mask, .*; give another file"):
            file.rows("weights/other")
        for first, count in [(0, 18), (17, 1), (-1, 2), (3, -1)]:
            with pytest.raises(CheckpointError, match=f"has 17 rows, not first={first} and count={count}"):
                file.rows("weights/layers.bias", first, count)
        assert file.rows("weights/layers.bias", 17, 0).shape == (0, 3)


def test_newest_good_goes_by_the_number_and_skips_damage(tmp_path, caplog):
    comm = SerialCommunicator()
    assert newest_good(tmp_path / "missing") is None and newest_good(tmp_path) is None
    for update in (999_999, 1_000_000, 5, 2_000_000):
        save(tmp_path / file_name(update), comm, {"w": Shard(torch.zeros(9), 0, 9)}, {})
    save(tmp_path / "other.h5", comm, {}, {})
    (tmp_path / (file_name(3_000_000) + ".tmp")).write_bytes((tmp_path / file_name(5)).read_bytes())
    damaged = tmp_path / file_name(2_000_000)
    damaged.write_bytes(damaged.read_bytes()[:-1])
    assert newest_good(tmp_path).name == "update_1000000.h5"
    assert [str(damaged) in record.getMessage() for record in caplog.records] == [True]
