"""Generated pairs: what a translation is, and that all ranks draw the same."""

from __future__ import annotations

import pytest
import torch

from xbraid_py.data.pairs import START, pairs, shifted


@pytest.mark.parametrize(("task", "made"), [("reverse", lambda row: row[::-1]), ("sort", sorted)])
def test_translations(task, made):
    sources, targets = pairs(task, 9, 6, 5, 1, 2)
    assert sources.shape == targets.shape == (5, 6) and sources.dtype == targets.dtype == torch.int64
    assert [made(row) for row in sources.tolist()] == targets.tolist()
    assert sources.min() >= 1 and sources.max() <= 9
    assert [row[1:] for row in shifted(targets).tolist()] == [row[:-1] for row in targets.tolist()]
    assert set(shifted(targets)[:, 0].tolist()) == {START}


def test_draws_depend_on_seed_and_step_alone():
    first, again = pairs("sort", 9, 6, 5, 1, 2), pairs("sort", 9, 6, 5, 1, 2)
    assert all(map(torch.equal, first, again))
    for seed, step in ((2, 2), (1, 3)):
        assert not torch.equal(first[0], pairs("sort", 9, 6, 5, seed, step)[0])


def test_bad_input():
    with pytest.raises(ValueError, match="task='copy' must be reverse or sort"):
        pairs("copy", 9, 6, 5, 1, 2)
    with pytest.raises(ValueError, match="length=0"):
        pairs("sort", 9, 0, 5, 1, 2)
