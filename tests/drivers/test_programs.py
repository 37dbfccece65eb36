"""The drivers as programs on several ranks: each is the run of one rank, and says at its end how good it is."""

from __future__ import annotations

import re

import pytest
from kinds import KINDS, finished, updates_of, words_of
from processes import PROJECT

# What a program prints at its end, by the last row of the record.
SAID = {
    "digits": lambda row: f"\ntest accuracy: {100 * row['val_accuracy']:.2f} %, .*\n$",
    "sequences": lambda row: f"\ntest accuracy: {100 * row['val_accuracy']:.2f} %, .*\n$",
    "text": lambda row: (
        rf"\nvalidation loss: {row['val_loss']:.4f} nats per character \(entropy rate 0\.\d+\), .* seconds .*\n$"
    ),
    "images": lambda row: r"\n\| ResNet-26-i \(4-8\) \|",
    "lesion": lambda row: r"\n\| 2-2, h = 1 \|",
    "width": lambda row: (
        rf"\nvalidation L2 .* after {row['cycle']} cycles, {row['work']:.0f} work units \(without tau .*, counted .*\n$"
    ),
}


@pytest.mark.job
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", SAID)
def test_a_program_on_three_ranks_is_the_run_of_one(name, run_job, tmp_path):
    kind, out = KINDS[name], tmp_path / KINDS[name].folder
    job = run_job([PROJECT / "drivers" / f"{kind.driver}.py", *words_of(kind, out)], 3, timeout=140)
    assert job.returncode == 0, job.stderr
    rows, expected = updates_of(out), updates_of(finished(name))
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in expected], rel=1e-3)
    assert re.search(SAID[name](rows[-1]), job.stdout), job.stdout
    assert all(path.read_bytes()[:4] == b"\x89PNG" for path in (out / "figures").iterdir())
    if name == "text":
        assert (out / "sample.txt").read_text()[16:] in job.stdout
