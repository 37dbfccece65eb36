"""Files that would have a careless reader execute something, or read other files: all of them are refused.

A pickle, YAML that names Python objects, and HDF5 files with types, links and filters that checkpoints do not have.
"""

import json
import pickle

import h5py
import numpy as np
import pytest
import torch

from xbraid_py.cli.reader import read_run
from xbraid_py.comm import SerialCommunicator
from xbraid_py.optim import OneShotOptions
from xbraid_py.run.options import OptionError, parse
from xbraid_py.run.record import read, truncate_after
from xbraid_py.run.signals import mark_ended
from xbraid_py.run.store.read import CheckpointError, file_name, load, newest_good, verify
from xbraid_py.run.store.write import Shard, save

ROWS = np.arange(6.0).reshape(3, 2)
CHECKED = {"chunks": (3, 2), "fletcher32": True}


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.fixture
def good(tmp_path):
    """A complete checkpoint."""
    path = tmp_path / file_name(1)
    save(path, SerialCommunicator(), {"weights/a": Shard(torch.from_numpy(ROWS), 0, 3)}, {"update": 1})
    return path


def test_a_pickle_is_not_unpickled(tmp_path):
    path, made = tmp_path / file_name(1), tmp_path / "made"
    for content in (pickle.dumps(Touch(made)), pickle.dumps(Touch(made), protocol=0)):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match="no HDF5 file"):
            load(path)
    torch.save({"weights": Touch(made)}, path)
    with pytest.raises(CheckpointError, match="no HDF5 file"):
        verify(path)
    assert newest_good(tmp_path) is None and not made.exists()


def _pickled(file, other, made):
    # What h5py offers for objects: bytes of any content, which nothing here may take for a pickle.
    file["weights/b"] = np.void(pickle.dumps(Touch(made)))


def _as_string(file, other, made):
    file.create_dataset("weights/b", (1,), h5py.string_dtype(), data=["a"], chunks=(1,))


def _ragged(file, other, made):
    file.create_dataset("weights/b", (2,), h5py.vlen_dtype(np.float64), chunks=(2,))


def _reference(file, other, made):
    file.create_dataset("weights/b", (1,), h5py.ref_dtype, data=[file["weights/a"].ref], chunks=(1,), fletcher32=True)


def _region(file, other, made):
    region = file["weights/a"].regionref[:1]
    file.create_dataset("weights/b", (1,), h5py.regionref_dtype, data=[region], chunks=(1,), fletcher32=True)


def _compound(file, other, made):
    file.create_dataset("weights/b", (2,), [("x", "f8"), ("y", "i8")], chunks=(2,), fletcher32=True)


def _external_link(file, other, made):
    file["weights/b"] = h5py.ExternalLink(str(other), "/weights/a")


def _external_group(file, other, made):
    file["optimizer"] = h5py.ExternalLink(str(other), "/")


def _soft_link(file, other, made):
    file["weights/b"] = h5py.SoftLink("/weights/a")


def _meta_elsewhere(file, other, made):
    del file["meta"]
    file["meta"] = h5py.ExternalLink(str(other), "/meta")


def _virtual(file, other, made):
    layout = h5py.VirtualLayout((3, 2), np.float64)
    layout[:] = h5py.VirtualSource(str(other), "weights/a", shape=(3, 2))
    file.create_virtual_dataset("weights/b", layout)


def _raw_file(file, other, made):
    file.create_dataset("weights/b", (3, 2), np.float64, external=[(str(other), 0, 48)])


def _compressed(file, other, made):
    file.create_dataset("weights/b", data=ROWS, compression="gzip", **CHECKED)


def _unknown_filter(file, other, made):
    # Filter 32000 is a plug-in, a library that HDF5 would look for and load. It is optional, so the file can be made.
    made_by = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    made_by.set_chunk((3, 2))
    made_by.set_filter(32000, h5py.h5z.FLAG_OPTIONAL)
    space = h5py.h5s.create_simple((3, 2))
    h5py.h5d.create(file["weights"].id, b"b", h5py.h5t.NATIVE_DOUBLE, space, made_by)


def _not_stored(file, other, made):
    # Ten million million rows that nobody has written, and that would be read as zeros.
    file.create_dataset("weights/b", (10**13, 2), np.float64, chunks=(10**6, 2), fletcher32=True)


def _named_type(file, other, made):
    file["weights/b"] = np.dtype("f8")


def _texts_as_meta(file, other, made):
    del file["meta"]
    file.create_dataset("meta", (1,), h5py.string_dtype(), data=["{}"], chunks=(1,))


def _list_as_meta(file, other, made):
    text = b'{"meta": [], "versions": {}}'
    del file["meta"]
    file.create_dataset("meta", (1,), f"S{len(text)}", data=[text], chunks=(1,), fletcher32=True)


@pytest.mark.parametrize(
    "change",
    [
        *(_pickled, _as_string, _ragged, _reference, _region, _compound),
        *(_external_link, _external_group, _soft_link, _meta_elsewhere, _virtual, _raw_file),
        *(_compressed, _unknown_filter, _not_stored, _named_type, _texts_as_meta, _list_as_meta),
    ],
    ids=lambda change: change.__name__.strip("_"),
)
def test_what_checkpoints_do_not_have(tmp_path, good, change):
    other, made, path = tmp_path / "other.h5", tmp_path / "made", tmp_path / file_name(2)
    content = good.read_bytes()
    other.write_bytes(content)
    path.write_bytes(content)
    with h5py.File(path, "r+", libver=("v110", "v110")) as file:
        change(file, other, made)
    with pytest.raises(CheckpointError, match=path.name):
        load(path)
    assert newest_good(tmp_path) == good and not made.exists()


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.system ['touch made']",
        "!!python/object/new:os.system ['touch made']",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!Own {x: 1}",
    ],
)
def test_yaml_makes_no_objects(tmp_path, monkeypatch, value):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text(f"memory: {value}\n")
    with pytest.raises(OptionError, match="config.yaml is not YAML: could not determine a constructor"):
        parse(OneShotOptions, ["--config=config.yaml"])
    assert "config.yaml is damaged or half-written" in read_run(tmp_path).flaws
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("value", ["2020-13-45", "[" * 3000, "9" * 5000], ids=["date", "deep", "long"])
def test_what_yaml_itself_stumbles_over(tmp_path, value):
    path = tmp_path / "config.yaml"
    path.write_text(f"memory: {value}\n")
    with pytest.raises(OptionError, match="is not YAML"):
        parse(OneShotOptions, [f"--config={path}"])


DEEP = "[" * 100_000


@pytest.mark.parametrize("row", ['{"update": null}', '{"update": "3"}', '{"update": [1]}', '{"run": {}}'])
def test_rows_of_other_kinds_stay_in_a_record(tmp_path, row):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "header"}\n{"update": 2}\n' + row + "\n")
    assert truncate_after(path, 1) == 1 and read(path) == [{"kind": "header"}, json.loads(row)]


def test_deep_nesting_is_damage(tmp_path):
    record, status = tmp_path / "metrics.jsonl", tmp_path / "status.json"
    record.write_text('{"kind": "header"}\n' + DEEP + "\n")
    status.write_text(DEEP)
    for reader in (read, lambda path: truncate_after(path, 0)):
        with pytest.raises(ValueError, match="line 2 is no JSON object"):
            reader(record)
    mark_ended(tmp_path, "failed", "it")
    assert status.read_text() == DEEP
