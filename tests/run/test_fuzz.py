"""Whatever a reader is given, it reads it or says what is wrong, by the documented errors; it never executes any of it.

Here options and data; runs and checkpoints are in `test_fuzz_runs.py`.
"""

from __future__ import annotations

import contextlib
import gzip
import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from fuzz_inputs import JSON, NASTY, also, fuzzed, near, only, working_folder
from hypothesis import given
from hypothesis import strategies as st

from xbraid_py.cli import main
from xbraid_py.data import mnist, peaks, text
from xbraid_py.data.dataset import read_features, read_idx, read_labels
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.optim import OneShotOptions
from xbraid_py.run.options import OptionError, parse, to_yaml


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of all kinds."""

    num_layers: int = 8
    rate: float = 0.1
    smoke: bool = False
    dtype: Literal["float64", "float32"] = "float64"
    data_dir: Path | None = None
    resume: str | None = None
    tol: float | None = None
    nested: NestedOptions = field(default_factory=NestedOptions)
    optim: OneShotOptions = field(default_factory=OneShotOptions)
    mgrit: MGRIT = field(default_factory=MGRIT)


GOOD_YAML = to_yaml(Options())
SHORT_YAML = """# a run
num_layers: 8
rate: 0.5
dtype: float32
data_dir: null
nested: {refinements: 1, updates: [4, 6]}
mgrit:
  cycle: V
  cfactor: [4, 2]
"""
NAMES = [f"--{line.split(':')[0].strip()}" for line in GOOD_YAML.splitlines()]
NAMES += [f"--{group}.{name[2:]}" for group in ("nested", "optim", "mgrit") for name in NAMES]
VALUES = st.sampled_from((*NASTY, "1", "0.5", "V", "[1,2]", "1,2", "float32", "no", "{cycle: F}", "")) | st.text(
    max_size=9
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of these tests."""
    yield from working_folder(tmp_path_factory)


def parsed(words):
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return parse(Options, words, prog="fuzz")
        except SystemExit as end:
            assert not end.code
            return None


@fuzzed(0.1)
@given(content=near(SHORT_YAML))
def test_configuration_files(folder, content):
    (folder / "options.yaml").write_bytes(content)
    with only(OptionError):
        parsed(["--config=options.yaml"])


@fuzzed(0.08)
@given(
    content=st.dictionaries(st.sampled_from([name[2:] for name in NAMES]) | st.text(max_size=4), JSON, max_size=4)
    | JSON
)
def test_configuration_values(folder, content):
    (folder / "values.yaml").write_text(yaml.safe_dump(content))
    with only(OptionError):
        parsed(["--config=values.yaml"])


@fuzzed(0.1)
@given(
    words=st.lists(
        st.sampled_from(NAMES) | VALUES | st.builds("{}={}".format, st.sampled_from(NAMES), VALUES), max_size=4
    )
)
def test_command_lines(folder, words):
    with only(OptionError):
        parsed(words)


@fuzzed(0.04)
@given(
    words=st.lists(st.sampled_from(("status", "plan", "folder", "--json", "--stale=1", "--ranks")) | VALUES, max_size=4)
)
def test_command_lines_of_the_cli(folder, words):
    with only():
        # What plans is slow, and a terminal that is watched has no end.
        quiet = contextlib.redirect_stderr(io.StringIO())
        with contextlib.redirect_stdout(io.StringIO()), quiet:
            words = [word for word in words if word not in ("plan", "watch")]
            with contextlib.suppress(SystemExit):
                assert main(words[:1] if words[:1] != ["status"] else words) in (0, 1, 2, 3, 4)


IDX = b"\0\0\x08\x03\0\0\0\2\0\0\0\x1c\0\0\0\x1c" + bytes(range(256)) * 6 + bytes(32)


@fuzzed(0.14)
@given(content=near(IDX) | near(gzip.compress(IDX, mtime=0)))
def test_idx_files(folder, content):
    (folder / "images").write_bytes(content)
    with only(ValueError):
        found = read_idx(folder / "images")
        assert found.size * found.itemsize <= max(len(content), 2000)


@fuzzed(0.05)
@given(which=st.integers(0, 3), data=st.data())
def test_mnist_folders(folder, which, data):
    labels = b"\0\0\x08\x01\0\0\0\2\x03\x09"
    contents = [IDX, labels, IDX, labels]
    contents[which] = data.draw(near(contents[which]))
    (folder / "mnist").mkdir(exist_ok=True)
    for name, content in zip(mnist.PUBLISHED, contents, strict=True):
        (folder / "mnist" / name).write_bytes(content)
    with only(ValueError):
        found = mnist.load(folder / "mnist")
        assert found.train_images.shape[1:] == (28, 28) and int(found.test_labels.max()) <= 9


FEATURES, LABELS = "0.5 -1.25\n1.5 0.25\n-2.5 0.75\n", "1 0 0 0 0\n0 0 1 0 0\n0 0 0 0 1\n"


@fuzzed(0.1)
@given(features=near(FEATURES), labels=near(LABELS), both=st.booleans())
def test_points(folder, features, labels, both):
    contents = (features, labels if both else LABELS.encode(), FEATURES.encode(), LABELS.encode())
    (folder / "peaks").mkdir(exist_ok=True)
    for name, content in zip(peaks.PUBLISHED, contents, strict=True):
        (folder / "peaks" / name).write_bytes(content)
    with only(ValueError):
        train, _ = peaks.load(folder / "peaks")
        assert torch.isfinite(train.features).all() and train.features.shape[0] == 2
    paths = [folder / "peaks" / name for name in peaks.PUBLISHED]
    with also(ValueError):
        assert torch.isfinite(read_features(paths[0])).all()
    with also(ValueError):
        found, classes = read_labels(paths[1])
        assert 0 <= int(found.min()) <= int(found.max()) < classes


@fuzzed(0.08)
@given(content=near("a line of text\r\nand another: ü\n"), number=st.none() | st.integers(-1, 40))
def test_texts(folder, content, number):
    (folder / "text").write_bytes(content)
    with only(ValueError):
        found = text.load(folder / "text", number)
        assert found.decode(found.encode(found.text)) == found.text and len(found.characters) <= 96


def test_good_inputs_are_read(folder):
    """What the inputs are changed from is not refused itself."""
    (folder / "good.yaml").write_text(GOOD_YAML)
    assert parsed(["--config=good.yaml"]) == Options()
    (folder / "good.yaml").write_text(SHORT_YAML)
    assert parsed(["--config=good.yaml"]).mgrit.cfactor == (4, 2)
    (folder / "images").write_bytes(IDX)
    assert read_idx(folder / "images").shape == (2, 28, 28)
