"""A checkpoint is whole, the previous one, or refused, whatever happens to the file and to its disk."""

import errno
import json
import os
import resource
import shutil
import signal

import h5py
import numpy as np
import pytest
import torch
from global_arrays import META, agrees, error_of, make_arrays, shards_of

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.store.read import CheckpointError, file_name, load, newest_good, verify
from xbraid_py.run.store.write import Shard, save

WORKS = "give another file, or `--resume auto` for the newest good one"


@pytest.fixture
def good(tmp_path):
    """A complete checkpoint, written serially."""
    path = tmp_path / file_name(40)
    save(path, SerialCommunicator(), shards_of(SerialCommunicator(), make_arrays()), META)
    return path


def test_truncated_anywhere(good):
    content = good.read_bytes()
    for size in [*range(10), *np.linspace(10, len(content) - 1, 40).astype(int)]:
        good.write_bytes(content[:size])
        with pytest.raises(CheckpointError, match=str(good)) as caught:
            verify(good)
        assert WORKS in str(caught.value)


def test_no_flipped_bit_is_read_silently(tmp_path):
    # A file small enough to try every other byte of: most of it is tables, which HDF5 by default does not protect.
    path = tmp_path / file_name(40)
    arrays = {"a/b": torch.arange(6.0).reshape(3, 2), "c": torch.tensor([True, False]), "d": torch.zeros(0, 3)}
    save(path, SerialCommunicator(), shards_of(SerialCommunicator(), arrays), META)
    content = path.read_bytes()
    refused = 0
    for position in range(0, len(content), 2):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position // 2 % 8
        path.write_bytes(damaged)
        try:
            verify(path)
        except CheckpointError:
            refused += 1
        else:
            assert agrees(path, arrays), f"byte {position} changes what is read"
    assert refused > len(content) // 8


def test_other_rows_with_right_checksums_are_found(tmp_path):
    """Zeros where nothing was written have a right checksum, and so have two chunks in each other's place."""
    path, sound = tmp_path / file_name(1), torch.arange(140_000.0).reshape(70_000, 2)  # of three chunks

    def stored(rows):
        save(path, SerialCommunicator(), {"a": Shard(rows, 0, len(rows))}, {})
        with h5py.File(path, "r") as file:
            return [file["a"].id.get_chunk_info(number) for number in range(file["a"].id.get_num_chunks())]

    first, second, _ = stored(sound)
    content = path.read_bytes()
    parts = [content[each.byte_offset : each.byte_offset + each.size] for each in (first, second)]
    for changed in ((bytes(first.size), parts[1]), (parts[1], parts[0])):
        damaged = bytearray(content)
        for each, part in zip((first, second), changed, strict=True):
            damaged[each.byte_offset : each.byte_offset + each.size] = part
        path.write_bytes(damaged)
        for read in (verify, lambda path: load(path).rows("a")):
            with pytest.raises(CheckpointError, match="'a' are damaged: they are not those that were written"):
                read(path)
    path.write_bytes(content)
    verify(path)


def test_files_of_before_say_nothing_of_their_arrays(tmp_path, good):
    """And are read all the same; one that does say is refused where it holds others."""
    old, more = tmp_path / "old.h5", tmp_path / "more.h5"
    for path, arrays in ((old, None), (more, {"w": [[3], "float64", 0]})):
        shutil.copyfile(good, path)
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            document = json.loads(file["meta"][0])
            del file["meta"], document["arrays"]
            text = json.dumps(document if arrays is None else {**document, "arrays": arrays}).encode()
            file.create_dataset("meta", (1,), f"S{len(text)}", data=[text], chunks=(1,), fletcher32=True)
    verify(old)
    assert agrees(old, make_arrays())
    with pytest.raises(CheckpointError, match="it does not hold the arrays that were written"):
        load(more)


def test_flipped_bit_in_data(good):
    content = good.read_bytes()
    position = content.index(make_arrays()["optimizer/s/layers.weight"].numpy().tobytes()[:64])
    good.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
    with load(good) as file, pytest.raises(CheckpointError, match="(?i)checksum.*" + WORKS):
        file.rows("optimizer/s/layers.weight")


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("missing", "No such file"),
        ("folder", "is a folder, a pipe or a device"),
        ("text", "damaged or no HDF5 file"),
        ("foreign", "no xbraid_py checkpoint: its format is 'something else'"),
        ("foreign_text", "no xbraid_py checkpoint: its format is None"),
        ("newer", "its format_number=2 is not 1"),
        ("no_meta", "damaged"),
        ("bad_json", "damaged"),
        ("unchecked", "'weights/more' is not an array of this format"),
    ],
)
def test_foreign_files(tmp_path, good, kind, what):
    path = tmp_path / "other.h5"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("0.5 0.25\n" * 100)
    elif kind != "missing":
        path.write_bytes(good.read_bytes())
        with h5py.File(path, "r+", libver=("v110", "v110")) as file:
            if kind == "foreign":
                file.attrs["format"] = np.bytes_("something else")
            elif kind == "foreign_text":
                file.attrs["format"] = "xbraid_py checkpoint"
            elif kind == "newer":
                file.attrs["format_number"] = 2
            elif kind == "unchecked":
                file["weights/more"] = np.zeros((2, 3))
            else:
                del file["meta"]
                if kind == "bad_json":
                    file["meta"] = np.array([b"{"])
    with pytest.raises(CheckpointError, match=what) as caught:
        load(path)
    assert str(path) in str(caught.value) and WORKS in str(caught.value)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_disk_error_leaves_the_previous_file(spmd, shared_tmp_path, monkeypatch, function):
    arrays = make_arrays()
    path = shared_tmp_path / file_name(40)
    spmd(lambda comm: save(path, comm, shards_of(comm, arrays), META))

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, function, full)
    errors = spmd(lambda comm: error_of(save, path, comm, shards_of(comm, {"other": torch.zeros(9)}), META))
    monkeypatch.undo()
    assert all(isinstance(error, OSError) and error.errno == errno.ENOSPC for error in errors)
    assert all("No space left" in str(error) and str(path) in str(error) for error in errors)
    assert [entry.name for entry in shared_tmp_path.iterdir()] == [path.name] and agrees(path, arrays)


@pytest.mark.parametrize("limit", [100, 5000, 400_000])
def test_a_write_that_really_fails(spmd, shared_tmp_path, limit):
    # A limit on the size of files fails as a full disk does, in the middle of the library's writes.
    arrays = make_arrays()
    path = shared_tmp_path / file_name(40)
    spmd(lambda comm: save(path, comm, shards_of(comm, arrays), META))
    large = {"a": torch.zeros(100_000, 8), "b": torch.zeros(10)}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        errors = spmd(lambda comm: error_of(save, path, comm, shards_of(comm, large), META))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert all(isinstance(error, OSError) and error.errno == errno.EFBIG for error in errors)
    assert [entry.name for entry in shared_tmp_path.iterdir()] == [path.name] and agrees(path, arrays)


def test_a_folder_that_is_a_file(spmd, shared_tmp_path):
    # As root no folder is read-only, but a file is never a folder.
    blocked = shared_tmp_path / "file"
    blocked.write_text("")
    errors = spmd(lambda comm: error_of(save, blocked / file_name(1), comm, shards_of(comm, make_arrays()), META))
    assert all(isinstance(error, OSError) and "Not a directory" in str(error) for error in errors)


_KILLED_WRITER = """
import os, signal, sys, torch
from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.store.write import Shard, save
os.replace = lambda *paths: os.kill(os.getpid(), signal.SIGKILL)
save(sys.argv[1], SerialCommunicator(), {"w": Shard(torch.zeros(9), 0, 9)}, {})
"""


def test_a_killed_writer_leaves_the_previous_file(tmp_path, good, run_job):
    for path in (good, tmp_path / file_name(41)):
        job = run_job(["-c", _KILLED_WRITER, path])
        assert job.returncode == -signal.SIGKILL, job.stderr
        assert path.with_name(path.name + ".tmp").exists()
        assert newest_good(tmp_path) == good and agrees(good, make_arrays())
