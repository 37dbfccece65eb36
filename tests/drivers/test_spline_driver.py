"""drivers/peaks.py with spline weights: the same run on one and on two ranks, resumed on others, exported."""

from __future__ import annotations

import re

import pytest
import torch
from processes import PROJECT

from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.layers.splines import Splines
from xbraid_py.recipes.classification import ClassificationOptions
from xbraid_py.run.options import OptionError, parse
from xbraid_py.run.record import read

PEAKS = PROJECT / "drivers" / "peaks.py"
TINY = [
    *("--num_layers=16", "--num_train=50", "--num_val=40", "--network.width=3"),
    *("--mgrit.min_coarse=2", "--mgrit.intervals=4", "--nested.refinements=1", "--nested.updates=4,4"),
    *("--optim.boost_updates=1", "--checkpoint_every=2", "--validate_every=2", "--keep=9"),
    *("--network.splines.num=7", "--network.splines.degree=3", "--nested.spline_refine"),
]


def rows_of(out) -> list[dict]:
    """The record without the clock."""
    rows = [row for row in read(out / "metrics.jsonl") if row["kind"] == "update"]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


@pytest.mark.job
def test_a_run_goes_on_from_one_number_of_ranks_to_another(run_job, tmp_path):
    outs = {ranks: tmp_path / f"{ranks}" for ranks in (1, 2)}
    for ranks, out in outs.items():
        done = run_job([PEAKS, *TINY, f"--out={out}"], ranks=ranks)
        assert done.returncode == 0, done.stderr
    rows = rows_of(outs[1])
    assert rows == rows_of(outs[2]) and [row["num_layers"] for row in rows] == [8] * 4 + [16] * 5
    path, there = outs[2] / "checkpoints" / "update_000002.h5", tmp_path / "there"
    done = run_job([PEAKS, *TINY, f"--out={there}", f"--resume={path}"])
    assert done.returncode == 0, done.stderr
    assert rows_of(there) == rows[3:]
    path = there / "checkpoints" / "update_000008.h5"
    plain = to_sequential(path)
    assert len(plain[1]) == 16 and plain(torch.zeros(5, 2, dtype=torch.float64)).shape == (5, 5)


@pytest.mark.job
def test_bad_splines_end_the_job_before_it_begins(run_job, tmp_path):
    done = run_job([PEAKS, "--smoke", f"--out={tmp_path / 'out'}", "--network.splines.num=3"], ranks=2)
    assert done.returncode == 2 and not (tmp_path / "out").exists()
    assert "num=3 must be at least 4, one more than degree=3; use 8" in done.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
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
