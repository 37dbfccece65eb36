"""Where a run goes on: what `--resume` names, and what it refuses; no training is needed to tell."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import torch

from xbraid_py.comm import SerialCommunicator
from xbraid_py.run.engine import find_start, resumed_configuration
from xbraid_py.run.options import flat, to_dict
from xbraid_py.run.run_options import RunOptions, free
from xbraid_py.run.store.read import CheckpointError, file_name
from xbraid_py.run.store.write import CheckpointStore, Shard, save

SERIAL = SerialCommunicator()
ARRAYS = {"w": Shard(torch.zeros(3), 0, 3)}


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    memory: int = 2
    fixed_step: float | None = None


@dataclass(frozen=True, kw_only=True)
class Options(RunOptions):
    num_layers: int = 32
    dtype: str = field(default="float64", metadata={"instead": "--convert_dtype"})
    data_dir: Path | None = free(None)
    optim: Optimizer = Optimizer()


def written(options, number, **changes):
    """A checkpoint of a run with these options; `changes` are made to its meta data."""
    meta = {"run": "nested", "update": number, "row": {"update": number, "final": False}, "state": {}}
    meta |= {"configuration": to_dict(options)} | changes
    return CheckpointStore(options.out / "checkpoints", keep=9).save(SERIAL, number, ARRAYS, meta)


@pytest.fixture
def options(tmp_path):
    return Options(out=tmp_path, resume="auto")


def refusal(options, kind="nested") -> str:
    with pytest.raises(CheckpointError) as caught:
        find_start(kind, options)
    return str(caught.value)


def test_auto_takes_the_newest_good_one(options):
    assert find_start("nested", options) is None and resumed_configuration(options) is None
    for update in (1, 2, 3):
        path = written(options, update)
    path.write_bytes(path.read_bytes()[:1000])
    start = find_start("nested", options)
    assert (start.update, start.path.name) == (2, file_name(2))
    assert find_start("nested", replace(options, resume=None)) is None
    assert find_start("nested", replace(options, resume=str(path.with_name(file_name(1))))).update == 1
    assert resumed_configuration(options) == to_dict(options)


def test_what_may_differ(options):
    written(options, 3)
    other = replace(options, data_dir=Path("elsewhere"), keep=1, checkpoint_every=7, record_every=5, tensorboard=True)
    assert find_start("nested", other).update == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_layers": 64}, "num_layers=32, but this run has num_layers=64; give --num_layers 32, or"),
        ({"optim": Optimizer(memory=3)}, "optim.memory=2, but this run has optim.memory=3; give --optim.memory 2, or"),
        (
            {"dtype": "float32"},
            "dtype=float64, but this run has dtype=float32; give --dtype float64, or --convert_dtype, or",
        ),
    ],
)
def test_another_configuration(options, change, said):
    path = written(options, 3)
    assert refusal(replace(options, **change)) == f"{path} was written with {said} start without --resume"


def test_an_option_that_is_new_is_another_configuration(options):
    configuration = to_dict(options)
    del configuration["optim"]["memory"]
    path = written(options, 3, configuration=configuration)
    assert refusal(options).startswith(f"{path} was written with optim.memory=None, but this run has optim.memory=2;")
    assert flat({"a": {"b": {"c": 1}}, "d": None}) == {"a.b.c": 1, "d": None}


def test_another_kind_of_run(options):
    path = written(options, 3)
    assert f"{path} holds no state of a training run (its run is 'nested', not mgopt)" in refusal(options, "mgopt")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"row": {"update": 2, "final": False}}, "update=2, final=False"),
        ({"row": {"update": 3}}, "update=3, final=None"),
        ({"row": []}, "row=[]"),
        ({"state": None}, "state=None"),
        ({"configuration": "none"}, "configuration='none'"),
        ({"update": True}, "update=3, final=False"),
    ],
)
def test_meta_data_of_something_else(options, changes, said):
    path = written(options, 3, **changes)
    expected = f"{path} holds no state of a training run ({said}); give one of a run's checkpoints folder"
    assert refusal(replace(options, resume=str(path))) == expected


def test_a_file_of_something_else(options, tmp_path):
    path = tmp_path / "else.h5"
    save(path, SERIAL, ARRAYS, {"update": 1})
    assert refusal(replace(options, resume=str(path))).startswith(f"{path} holds no state of a training run (no run)")


def test_a_truncated_or_missing_file(options, tmp_path):
    good = written(options, 3).read_bytes()
    cut = tmp_path / "cut.h5"
    for size in (0, 100, len(good) // 2, len(good) - 1):
        cut.write_bytes(good[:size])
        said = refusal(replace(options, resume=str(cut)))
        assert said.startswith(f"checkpoint {cut}: truncated, damaged or no HDF5 file")
    missing = tmp_path / "missing.h5"
    said = refusal(replace(options, resume=str(missing)))
    assert said.startswith(f"checkpoint {missing}: No such file or directory; give another file")
