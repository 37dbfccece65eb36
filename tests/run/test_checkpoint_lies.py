"""Files made to deceive are refused, soon and without much memory, before HDF5 reads anything that could hurt it."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from hdf5_lies import LIES, sound_files, tell
from hdf5_tables import LAYOUT, blocks, messages, put, seal
from processes import PROJECT
from read_lies import content, same

from xbraid_py.run.store.read import CheckpointError, file_name, load, newest_good, verify

# Of these, some change nothing that is read; all others have to be refused.
MAY_BE_HARMLESS = ("table_", "chunk_index", "large_group", "cut_and_grown")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """Folder and contents of sound files."""
    folder = tmp_path_factory.mktemp("sound")
    return folder, sound_files(folder)


def test_one_lie_of_each_kind(run_job):
    """Each in a process with 1 GB and 5 s: none ends it, none is believed, and the checkpoint before it is taken."""
    job = run_job([PROJECT / "tests" / "helpers" / "read_lies.py", 1, len(LIES)], timeout=300)
    assert job.returncode == 0, job.stderr
    said = [json.loads(line) for line in job.stdout.splitlines()]
    assert {each["kind"] for each in said} == LIES.keys() and len(LIES) > 60
    for each in said:
        harmless = each["verdict"] == "harmless" and each["kind"].startswith(MAY_BE_HARMLESS)
        assert each["verdict"] == "refused" or harmless, each
    assert sum(each["verdict"] == "refused" for each in said) > len(LIES) - 15


def test_sound_files_are_read(sound, tmp_path):
    folder, truths = sound
    for name, truth in truths.items():
        if name != "old.h5":
            assert same(content(folder / name), truth), name
        # What renews checksums finds the right ones.
        data = (folder / name).read_bytes()
        again = bytearray(data)
        for block in blocks(data):
            seal(again, block)
        assert bytes(again) == data and len(blocks(data)) > 10
    # No writer has ever made those.
    with pytest.raises(CheckpointError, match="of a kind that checkpoints have not"):
        load(folder / "old.h5")


@pytest.mark.parametrize(
    ("table", "at", "size"), [("BTHD", 10, 2), ("BTHD", 24, 2), ("FAHD", 6, 1), ("layout", 3, 1)], ids=str
)
def test_what_ended_the_process(sound, tmp_path, table, at, size):
    """HDF5 divides by the zero that is written here, or sorts names that are not there."""
    path, data = tmp_path / file_name(2), bytearray((sound[0] / "many.h5").read_bytes())
    if table == "layout":
        block, first = next((each.block, each.at) for each in messages(data, LAYOUT) if data[each.at + 1] == 2)
    else:
        block = next(each for each in blocks(data) if each.name == table)
        first = block.first
    put(data, first + at, size, 0)
    seal(data, block)
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=path.name):
        verify(path)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("short", "'weights/a' is not an array of this format, stored whole with checksums"),
        ("mask", "'weights/a' is not an array of this format, stored whole with checksums"),
        ("meta_huge", "'meta' is not an array of this format, stored whole with checksums"),
        ("meta_group", "'meta' is not an array of this format, stored whole with checksums"),
        ("meta_missing", "it has no meta data"),
        ("nested", "its names have more than 16 parts"),
        ("many_names", "it holds more than 4000 names"),
        ("second_name", "an object of it has a table that checkpoints have not"),  # which counts its names
        ("self_link", "an object of it has a table that checkpoints have not"),
        ("fan_of_links", "an object of it has a table that checkpoints have not"),
        ("table_link_target", "is a second name"),
        ("behind_other_bytes", "no HDF5 file of a checkpoint's layout"),
        ("holes", "of its [0-9]+ bytes the disk holds next to none"),
        ("name", "it holds a name that no array has|damaged"),
        ("not_a_truth", "they are neither true nor false"),
    ],
)
def test_what_is_said(sound, tmp_path, kind, what):
    path = tmp_path / file_name(2)
    tell(kind, sound[0], 3, path)
    with pytest.raises(CheckpointError, match=what) as caught:
        verify(path)
    assert "\n" not in str(caught.value) and str(caught.value).isprintable()


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)  # a socket's name is short
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name)
    os.chdir(here)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "make",
    [
        *(_pipe, _socket, Path.mkdir),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), id="device"),
        pytest.param(lambda path: path.symlink_to(path), id="link_to_itself"),
        pytest.param(lambda path: path.symlink_to("nowhere"), id="link_to_nothing"),
    ],
)
def test_only_files_are_opened(sound, tmp_path, make):
    before, path = tmp_path / file_name(1), tmp_path / file_name(2)
    shutil.copyfile(sound[0] / "few.h5", before)
    make(path)
    with pytest.raises(CheckpointError, match="not a file|No such file|Too many levels"):
        load(path)
    assert newest_good(tmp_path) == before
