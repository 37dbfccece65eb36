"""Two undisturbed runs of a kind are the same, bit by bit: no clock decides, and no memory that nobody has written."""

from __future__ import annotations

import random
import time

import pytest
import torch
from kinds import KINDS, arrays_of, draw_nothing, finished, run, updates_of

from xbraid_py.comm import SerialCommunicator


@pytest.mark.parametrize("name", KINDS)
def test_a_run_is_the_same_by_any_clock(name, tmp_path, monkeypatch):
    expected, out, clock = finished(name), tmp_path / KINDS[name].folder, time.perf_counter
    draw_nothing(monkeypatch)
    # Whatever is measured takes at times a thousandth of a second, at times a minute.
    late, source = [0.0], random.Random(name)

    def disturbed() -> float:
        late[0] += source.choice([0.0, 1e-3, 60.0])
        return clock() + late[0]

    for each in ("perf_counter", "monotonic", "time"):
        monkeypatch.setattr(time, each, disturbed)
    torch.empty(10**6).fill_(torch.nan)  # for what reads memory that it has not written
    run(KINDS[name], SerialCommunicator(), out)
    assert updates_of(out) == updates_of(expected)
    last = sorted((expected / "checkpoints").glob("update_*.h5"))[-1]
    theirs, ours = arrays_of(last), arrays_of(out / "checkpoints" / last.name)
    assert theirs.keys() == ours.keys()
    for each, values in theirs.items():
        assert torch.equal(values.view(torch.uint8), ours[each].view(torch.uint8)), each
