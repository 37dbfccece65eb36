"""Parallel HDF5: what all ranks write together is what one writes for all; skipped where h5py is serial."""

import errno
import os
import resource

import h5py
import pytest
import torch
from global_arrays import META, agrees, error_of, make_arrays, shards_of

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.store import hdf5_writer
from xbraid_py.run.store.hdf5_writer import writes_together
from xbraid_py.run.store.read import file_name, verify
from xbraid_py.run.store.write import Shard, save

parallel = pytest.mark.skipif(
    not h5py.get_config().mpi, reason="h5py is serial here: build it with HDF5_MPI=ON to test parallel HDF5"
)


def test_threads_and_single_ranks_do_not_write_together(spmd, monkeypatch):
    monkeypatch.setenv("XBRAID_PARALLEL_HDF5", "0")
    assert not any(spmd(writes_together))
    assert not writes_together(SerialCommunicator())


@parallel
@pytest.mark.ranks(2)
def test_ranks_of_mpi_do(spmd):
    found = spmd(lambda comm: (hasattr(comm, "mpi"), writes_together(comm)))
    assert all(together == over_mpi for over_mpi, together in found)


@parallel
@pytest.mark.ranks(2)
def test_the_file_is_the_same(spmd, shared_tmp_path, monkeypatch):
    arrays = make_arrays()
    paths = [shared_tmp_path / name for name in ("together.h5", "one.h5")]
    for path, choice in zip(paths, "10", strict=True):
        monkeypatch.setenv("XBRAID_PARALLEL_HDF5", choice)
        spmd(lambda comm, path=path: save(path, comm, shards_of(comm, arrays), META))
        verify(path)
        assert agrees(path, arrays)
    with h5py.File(paths[0], "r") as ours, h5py.File(paths[1], "r") as other:
        for name in arrays:
            assert (ours[name].chunks, ours[name].fletcher32) == (other[name].chunks, other[name].fletcher32)
    assert sorted(entry.name for entry in shared_tmp_path.iterdir()) == ["one.h5", "together.h5"]


@parallel
@pytest.mark.ranks(2)
def test_chunks_that_several_ranks_share(spmd, shared_tmp_path, monkeypatch):
    # Every chunk holds rows of all ranks; one rank has none.
    rows = torch.arange(7000.0, dtype=torch.float64).reshape(1000, 7)
    path = shared_tmp_path / file_name(1)

    def body(comm):
        per = 1000 // (comm.size - 1)
        first = comm.rank * per
        last = 1000 if comm.rank == comm.size - 2 else first + per
        own = rows[first:last] if comm.rank < comm.size - 1 else rows[:0]
        save(path, comm, {"w": Shard(own, first, 1000)}, META)

    spmd(body)
    assert agrees(path, {"w": rows})


@parallel
@pytest.mark.ranks(2)
def test_a_full_disk_is_one_error_before_anything_is_written(spmd, shared_tmp_path):
    arrays = make_arrays()
    path = shared_tmp_path / file_name(40)
    spmd(lambda comm: save(path, comm, shards_of(comm, arrays), META))
    large = {"a": torch.zeros(100_000, 80)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000_000, before[1]))
    try:
        errors = spmd(lambda comm: error_of(save, path, comm, shards_of(comm, large), META))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert all(isinstance(error, OSError) and error.errno == errno.EFBIG for error in errors)
    assert [entry.name for entry in shared_tmp_path.iterdir()] == [path.name] and agrees(path, arrays)


@parallel
@pytest.mark.ranks(2)
@pytest.mark.parametrize("function", ["_make_room", "_open", "_put"])
def test_an_error_on_one_rank_is_one_of_all(spmd, shared_tmp_path, monkeypatch, function):
    # The other ranks must not be inside a collective call meanwhile, so all fail, one of them with another error.
    arrays = make_arrays()
    path = shared_tmp_path / file_name(40)
    spmd(lambda comm: save(path, comm, shards_of(comm, arrays), META))

    def refuse(self, *_):
        number = errno.EIO if self.comm.rank == 0 else errno.ENOSPC
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(hdf5_writer.ParallelWriter, function, refuse)
        errors = spmd(lambda comm: error_of(save, path, comm, shards_of(comm, arrays), META))
    assert all(isinstance(error, OSError) and error.errno == errno.EIO for error in errors)
    assert [entry.name for entry in shared_tmp_path.iterdir()] == [path.name] and agrees(path, arrays)
