"""Windows that cannot be, and how layers are dealt to those that can."""

from __future__ import annotations

import pytest
from blocks import CASES, SOLVES, reduced

from xbraid_py import MGRIT, LayerParallel

T = 2.0


def test_windows_differ_by_one_layer_or_one_interval():
    def counts(num_layers, windows, **options):
        model = LayerParallel(CASES["mlp"].block, num_layers, T, windows=windows, mgrit=MGRIT(**options))
        return [len(window.sizes) for window in model.windows]

    assert counts(11, 3, max_levels=1) == counts(11, 3) == [4, 4, 3]
    assert counts(28, 3, cfactor=4, min_coarse=1) == [12, 8, 8]
    assert counts(24, 2, cycle="V", cfactor=(2, 3), min_coarse=1) == [12, 12]
    assert counts(40, 3, cycle="V") == [16, 12, 12]


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"windows": 0}, "windows=0 must be at least 1, and at most the 12 layers of num_layers=12; use 1"),
        ({"windows": 13}, "at most the 12 layers of num_layers=12; use 12"),
        ({"windows": 7, "mgrit": SOLVES["V"]}, "at most the 4 intervals of 3 layers of num_layers=12; use 4"),
        ({"windows": 2.0}, "TypeError: windows=2.0 must be an integer; use 4"),
        ({"windows": 2, "mgrit": MGRIT(cfactor=5)}, "num_layers=12 is not a multiple of cfactor=5; use 10 or 15"),
        ({"windows": 2, "output": "first"}, "output='first' must be all or last; use all"),
    ],
)
def test_windows_that_cannot_be(spmd, given, message):
    def body(comm):
        return reduced(comm, lambda: LayerParallel(CASES["mlp"].block, 12, T, comm, **given))

    assert all(message in found for found in spmd(body))


def test_a_way_to_recompute_that_there_is_not():
    with pytest.raises(ValueError, match="recompute='state' must be False, True, states or all; use False"):
        CASES["mlp"].stack(None, 9, recompute="state")


@pytest.mark.ranks(2, 3)
def test_ranks_that_ask_for_other_windows(spmd):
    def split(comm):
        windows = 2 + (comm.rank == 1)
        return LayerParallel(CASES["mlp"].block, 12, T, comm, windows=windows, mgrit=SOLVES["V"])

    found = spmd(lambda comm: reduced(comm, lambda: split(comm)))
    assert all("arguments: windows=2 on " in message and "3 on rank 1" in message for message in found)
