"""Which networks coarsen in width without changing their function."""

import pytest
import torch
from width_networks import NETWORKS, duplicated, made

from xbraid_py.multilevel.width.options import SCALINGS, WidthOptions
from xbraid_py.multilevel.width.transfer import WidthLayout, coarsen, hierarchy


@pytest.mark.parametrize("levels", (2, 3))
@pytest.mark.parametrize("matching", ("greedy", "mutual"))
@pytest.mark.parametrize("lengths, scaling", [(False, "mean"), (False, "norms"), (True, "norms"), (True, "sums")])
@pytest.mark.parametrize("name", NETWORKS)
def test_duplicated_neurons_coarsen_without_a_change(name, lengths, scaling, matching, levels):
    network, inputs = made(name)
    wide = duplicated(network, 2 ** (levels - 1), lengths)
    layout = WidthLayout.of(wide)
    x = layout.vector(wide)
    expected = wide(inputs)
    for transfer in hierarchy(layout, x, levels, WidthOptions(scaling=scaling, matching=matching, threshold=0.99)):
        y = transfer.restrict(x)
        narrow = transfer.coarse.module(y)
        assert transfer.coarse.widths == tuple(width // 2 for width in transfer.fine.widths)
        torch.testing.assert_close(narrow(inputs), expected, rtol=1e-11, atol=1e-12)
        # The rows are parallel, so Q = P Pi keeps them; the first layer's, as it has the columns of the fine network.
        first = transfer.fine.layers[0]
        torch.testing.assert_close(first.rows(transfer.prolong(y)), first.rows(x), rtol=1e-11, atol=1e-12)
        prolonged = transfer.fine.module(transfer.prolong(y))
        torch.testing.assert_close(prolonged(inputs), expected, rtol=1e-11, atol=1e-12)
        x = y
    assert transfer.coarse.widths == WidthLayout.of(network).widths


def test_averaging_does_change_copies_of_other_lengths():
    network, inputs = made("dense")
    wide = duplicated(network, 2, True)
    layout = WidthLayout.of(wide)
    x = layout.vector(wide)
    transfer, coarse = coarsen(layout, x, WidthOptions(scaling="mean"))
    assert not torch.allclose(coarse.module(transfer.restrict(x))(inputs), wide(inputs), rtol=1e-3)


@pytest.mark.parametrize("name", NETWORKS)
def test_sums_and_norms_are_the_same_coarse_function_by_other_weights(name):
    network, inputs = made(name)
    layout = WidthLayout.of(network)
    x = layout.vector(network)
    found = {}
    for scaling in SCALINGS:
        transfer, coarse = coarsen(layout, x, WidthOptions(scaling=scaling))
        found[scaling] = coarse.module(transfer.restrict(x))(inputs), transfer.restrict(x)
    torch.testing.assert_close(found["sums"][0], found["norms"][0], rtol=1e-11, atol=1e-12)
    assert not torch.allclose(found["sums"][1], found["norms"][1])
    assert not torch.allclose(found["mean"][0], found["norms"][0])
