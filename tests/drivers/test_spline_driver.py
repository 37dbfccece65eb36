"""drivers/peaks.py with spline weights: the same run on one and on two ranks, resumed on others, exported."""

from __future__ import annotations

import re

import pytest
import torch
from kinds import KINDS, Kind, draw_nothing, run, updates_of

from xbraid_py.comm import SerialCommunicator
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.layers.splines import Splines
from xbraid_py.recipes.options.classification import ClassificationOptions
from xbraid_py.run.options import OptionError, parse
from xbraid_py.run.store.read import Checkpoint, CheckpointError

WORDS = ("--network.splines.num=7", "--network.splines.degree=3", "--nested.spline_refine", "--network.width=3")
SPLINES = Kind("peaks", (*KINDS["nested"].words, *WORDS), "")


@pytest.mark.ranks(2)
def test_a_run_goes_on_from_one_number_of_ranks_to_another(spmd, shared_tmp_path, tmp_path, monkeypatch):
    draw_nothing(monkeypatch)
    run(SPLINES, SerialCommunicator(), tmp_path / "one")
    spmd(lambda comm: run(SPLINES, comm, shared_tmp_path / "two") and None)
    rows = updates_of(tmp_path / "one")
    assert rows == updates_of(shared_tmp_path / "two") and [row["num_layers"] for row in rows] == [8] * 4 + [16] * 5
    path = shared_tmp_path / "two" / "checkpoints" / "update_000002.h5"
    run(SPLINES, SerialCommunicator(), tmp_path / "there", f"--resume={path}")
    assert updates_of(tmp_path / "there") == rows[3:]
    plain = to_sequential(tmp_path / "there" / "checkpoints" / "update_000008.h5")
    assert len(plain[1]) == 16 and plain(torch.zeros(5, 2, dtype=torch.float64)).shape == (5, 5)


def test_a_file_that_names_a_million_layers(tmp_path, monkeypatch):
    """Few coefficients could be those of any number: as many as make sense are made."""
    draw_nothing(monkeypatch)
    run(SPLINES, SerialCommunicator(), tmp_path / "run")
    whole = Checkpoint.__init__

    def changed(self, *args):
        whole(self, *args)
        self.meta["state"]["num_layers"] = 10**6

    monkeypatch.setattr(Checkpoint, "__init__", changed)
    with pytest.raises(CheckpointError, match="says num_layers=1000000, too many for its coefficients"):
        to_sequential(tmp_path / "run" / "checkpoints" / "update_000008.h5")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network.splines.num=3"], "num=3 must be at least 4, one more than degree=3; use 8"),
        (["--network.splines.degree=3"], "--network.splines.num must be given"),
        (["--nested.spline_refine"], "spline_refine=True needs a network with splines; give network.splines.num"),
        (["--network.splines.num=8", "--nested.spline_refine"], "num=8 makes num - degree = 5 intervals, not a"),
        (["--network.splines.num=6", "--network.splines.knots=0,0.5,0.2,1"], "must be num - degree + 1 = 4 numbers"),
    ],
)
def test_bad_options_name_what_works(words, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        parse(ClassificationOptions, words)


def test_options_of_the_command_line():
    words = ["--network.splines.num=6", "--network.splines.knots=0,0.2,0.5,1", "--network.splines.degree=3"]
    options = parse(ClassificationOptions, words)
    assert options.network.splines == Splines(6, 3, (0.0, 0.2, 0.5, 1.0))
    assert parse(ClassificationOptions, ["--network.splines.num=6"]).network.splines == Splines(6)
    assert parse(ClassificationOptions, []).network.splines is None
