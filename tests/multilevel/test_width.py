"""Transfers in width against explicit matrices, and networks that coarsen without changing their function."""

import math
from functools import reduce

import numpy as np
import pytest
import torch
from torch import nn
from width_networks import F64, NETWORKS, dense, made, mixed, weight_layers

from xbraid_py.multilevel.width.matching import Matching
from xbraid_py.multilevel.width.options import SCALINGS, WidthOptions
from xbraid_py.multilevel.width.transfer import WidthLayout, WidthTransfer, coarsen, hierarchy, match_layers, renewed


def layer_matrix_pair(matching: Matching | None, width: int, scaling: str, rows: torch.Tensor):
    """pi and P of one layer by eq. 32 or 34 with dense matrices; rows (n, d) hold the bias in their last column."""
    if matching is None:
        return torch.eye(width, dtype=F64), torch.eye(width, dtype=F64)
    E = torch.zeros(width, matching.num_coarse, dtype=F64)
    for i, aggregate in enumerate(matching.aggregate.tolist()):
        E[i, aggregate] = 1
    lengths = [math.sqrt(sum(float(v) ** 2 for v in row)) or 1.0 for row in rows]
    D = torch.eye(width, dtype=F64) if scaling == "mean" else torch.diag(torch.tensor(lengths, dtype=F64))
    S = E.T @ D @ E
    return (E.T, D @ E @ torch.linalg.inv(S)) if scaling == "sums" else (torch.linalg.inv(S) @ E.T, D @ E)


def kron(*factors: torch.Tensor) -> torch.Tensor:
    return torch.from_numpy(reduce(np.kron, [factor.numpy() for factor in factors]))


def explicit(network: nn.Sequential, transfer: WidthTransfer):
    """Pi and P on the flat vectors as matrices: Kronecker products for every weight, in the order of parameters()."""
    parts = weight_layers(network)
    pairs = []
    for part, matching in zip(parts, (*transfer.matchings, None), strict=True):
        rows = part.weight.detach().flatten(1)
        if part.bias is not None:
            rows = torch.cat([rows, part.bias.detach()[:, None]], 1)
        pairs.append(layer_matrix_pair(matching, len(rows), transfer.options.scaling, rows))
    first = parts[0].weight.shape[1]
    before = (torch.eye(first, dtype=F64), torch.eye(first, dtype=F64))
    down, up = [], []
    for part, (pi, P) in zip(parts, pairs, strict=True):
        block = torch.eye(part.weight[0].numel() // len(before[0].T), dtype=F64)
        down.append(kron(pi, before[1].T, block))  # vec(pi W P)
        up.append(kron(P, before[0].T, block))  # vec(P W pi)
        if part.bias is not None:
            down.append(pi)
            up.append(P)
        before = pi, P
    return torch.block_diag(*down), torch.block_diag(*up)


@pytest.mark.parametrize("bias", (True, False))
@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_transfers_are_their_matrices(name, scaling, bias):
    network, _ = made(name, bias=bias)
    layout = WidthLayout.of(network)
    x = layout.vector(network)
    kept = x.clone()
    transfer, coarse = coarsen(layout, x, WidthOptions(scaling=scaling))
    assert coarse is transfer.coarse and coarse.size < layout.size
    Pi, P = explicit(network, transfer)
    fine, narrow = torch.randn(layout.size, dtype=F64), torch.randn(coarse.size, dtype=F64)
    close = {"rtol": 1e-12, "atol": 1e-13}
    torch.testing.assert_close(transfer.restrict(fine), Pi @ fine, **close)
    torch.testing.assert_close(transfer.prolong(narrow), P @ narrow, **close)
    torch.testing.assert_close(transfer.restrict_gradient(fine), P.T @ fine, **close)
    # Pi P = I, R = P^T, P Pi a projection: of the operators themselves
    torch.testing.assert_close(transfer.restrict(transfer.prolong(narrow)), narrow, **close)
    projected = transfer.prolong(transfer.restrict(fine))
    torch.testing.assert_close(transfer.prolong(transfer.restrict(projected)), projected, **close)
    assert not torch.allclose(projected, fine)
    assert float(fine @ transfer.prolong(narrow)) == pytest.approx(float(transfer.restrict_gradient(fine) @ narrow))
    assert torch.equal(x, kept)


@pytest.mark.parametrize("seed", range(6))
def test_transfers_of_random_shapes_are_their_matrices(seed):
    numbers = torch.Generator().manual_seed(seed)

    def some(count, low=1, high=9):
        return torch.randint(low, high, (count,), generator=numbers).tolist()

    torch.manual_seed(seed)
    network = mixed(*some(3), neurons=tuple(some(2)) + (2,)) if seed % 2 else dense(*some(5))
    layout = WidthLayout.of(network)
    x = layout.vector(network)
    options = WidthOptions(scaling=SCALINGS[seed % 3], threshold=-1.0, matching=("greedy", "mutual")[seed // 3])
    transfer = WidthTransfer.of(layout, match_layers(layout, x, options), x, options)  # perhaps without any pair
    Pi, P = explicit(network, transfer)
    narrow = torch.randn(transfer.coarse.size, dtype=F64)
    torch.testing.assert_close(transfer.restrict(x), Pi @ x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(transfer.prolong(narrow), P @ narrow, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(transfer.restrict_gradient(x), P.T @ x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(Pi @ P, torch.eye(transfer.coarse.size, dtype=F64), rtol=1e-12, atol=1e-12)


def test_channels_are_averaged_by_hand():
    """Two channels, one pair, a dense layer behind: no Kronecker product, no view, one number after the other."""
    network = nn.Sequential(nn.Conv2d(1, 2, 2), nn.ReLU(), nn.Flatten(), nn.Linear(8, 1)).double()
    layout = WidthLayout.of(network)
    transfer, coarse = coarsen(layout, layout.vector(network), WidthOptions(scaling="mean", threshold=-1.0))
    small = coarse.module(transfer.restrict(layout.vector(network)))
    conv, linear = network[0], network[3]
    assert coarse.widths == (1,) and small[3].weight.shape == (1, 4)
    for i in range(2):
        for j in range(2):
            assert small[0].weight[0, 0, i, j] == (conv.weight[0, 0, i, j] + conv.weight[1, 0, i, j]) / 2
    for position in range(4):
        assert small[3].weight[0, position] == linear.weight[0, position] + linear.weight[0, 4 + position]
    assert small[0].bias[0] == conv.bias.mean() and small[3].bias[0] == linear.bias[0]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_restricted_gradients_are_derivatives_along_prolonged_directions(name, scaling):
    network, inputs = made(name)
    layout = WidthLayout.of(network)
    x = layout.vector(network)
    transfer, coarse = coarsen(layout, x, WidthOptions(scaling=scaling))
    direction = torch.randn(coarse.size, dtype=F64)
    network(inputs).square().sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters()])

    def value(step):
        return float(layout.module(x + step * transfer.prolong(direction))(inputs).detach().square().sum())

    slope = (value(1e-6) - value(-1e-6)) / 2e-6
    assert float(transfer.restrict_gradient(gradient) @ direction) == pytest.approx(slope, rel=1e-5)


@pytest.mark.parametrize("dtype", (torch.float32, F64))
def test_inputs_and_outputs_and_layers_that_opt_out_keep_their_widths(dtype):
    network = mixed(3, 8, 6, neurons=(10, 12, 4)).to(dtype)
    layout = WidthLayout.of(network)
    x = layout.vector(network)
    assert layout.widths == (8, 6, 10, 12)
    for chosen in ((True, False, True, False), (False, True, False, False), (False, False, False, True)):
        options = WidthOptions(coarsen=chosen, threshold=-1.0)
        y = x
        for transfer, halves in zip(hierarchy(layout, x, 3, options), (2, 4), strict=True):
            coarse = transfer.coarse
            expected = [-(-w // halves) if narrow else w for w, narrow in zip(layout.widths, chosen, strict=True)]
            assert list(coarse.widths) == expected
            assert [m is not None for m in transfer.matchings] == list(chosen)
            assert coarse.layers[0].inputs == 3 and coarse.layers[-1].outputs == 4
            y = transfer.restrict(y)
        assert coarse.module(y)(torch.randn(2, 3, 9, 9, dtype=dtype)).shape == (2, 2, 2)
        assert y.dtype == transfer.prolong(y).dtype == transfer.restrict_gradient(transfer.prolong(y)).dtype == dtype
        untouched = [k for k in range(4) if not chosen[k] and (k == 0 or not chosen[k - 1])]
        for k in untouched:
            assert torch.equal(coarse.layers[k].weight(y), layout.layers[k].weight(x))
    with pytest.raises(
        ValueError, match=r"^coarsen=\(True,\) must have one entry for each of 4 hidden layers; use \(T"
    ):
        coarsen(layout, x, WidthOptions(coarsen=(True,)))


def test_renewed_norms_are_those_of_the_new_weights_with_the_old_pairs():
    network, _ = made("mixed")
    layout = WidthLayout.of(network)
    x = layout.vector(network)
    transfers = hierarchy(layout, x, 3)
    y = x * torch.linspace(0.5, 2, layout.size, dtype=F64)
    again = renewed(transfers, y)
    for old, new in zip(transfers, again, strict=True):
        assert new.matchings == old.matchings and new.coarse == old.coarse
        network = new.fine.module(y)
        Pi, P = explicit(network, new)
        torch.testing.assert_close(new.restrict(y), Pi @ y, rtol=1e-12, atol=1e-13)
        assert not torch.allclose(new.restrict(y), old.restrict(y))
        y = new.restrict(y)


def test_rows_without_bias_have_other_norms_and_pairs():
    network = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)).double()
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([[3.0, 4.0], [1.0, 0.0], [6.0, 8.0], [0.0, 0.0]]))
        network[0].bias.copy_(torch.tensor([12.0, 5.0, -30.0, 1.0]))
    layout = WidthLayout.of(network)
    x = layout.vector(network)
    with_bias, without = (coarsen(layout, x, WidthOptions(with_bias=kept))[0].matrices[0] for kept in (True, False))
    assert with_bias.matching.partner.tolist() == [1, 0, 2, 3]
    assert without.matching.partner.tolist() == [2, 1, 0, 3]
    assert with_bias.P.tolist() == pytest.approx([13, math.sqrt(26), math.sqrt(1000), 1])
    assert without.P.tolist() == pytest.approx([5, 1, 10, 1])  # a row of zeros has the norm 1
    assert without.pi.tolist() == pytest.approx([1 / 15, 1, 1 / 15, 1])


def test_a_hierarchy_ends_where_nothing_is_left():
    network, _ = made("dense")  # widths 7 and 6
    layout = WidthLayout.of(network)
    x = layout.vector(network)
    options = WidthOptions(threshold=-1.0)
    assert [t.coarse.widths for t in hierarchy(layout, x, 4, options)] == [(4, 3), (2, 2), (1, 1)]
    assert hierarchy(layout, x, 1) == []
    with pytest.raises(ValueError, match=r"^levels=6: the hidden layers of level 4, of widths \(1, 1\), have no pair"):
        hierarchy(layout, x, 6, options)
    with pytest.raises(ValueError, match="threshold=1 and coarsen=None; use levels=1 or a lower threshold$"):
        coarsen(layout, x, WidthOptions(threshold=1))
    with pytest.raises(ValueError, match="^levels=0 must be at least 1; use 2$"):
        hierarchy(layout, x, 0)
    # a layer of one neuron stays, the others go on
    narrow = WidthLayout.of(dense(3, 1, 8, 2))
    assert coarsen(narrow, torch.randn(narrow.size), options)[1].widths == (1, 4)


def test_options_and_weights_that_do_not_fit_are_refused():
    for wrong, message in (
        ({"threshold": 2.0}, "threshold=2.0 must be between -1 and 1, as cosines are; use 0"),
        ({"matching": "best"}, "matching='best' must be greedy or mutual; use greedy"),
        ({"scaling": "eq34"}, "scaling='eq34' must be mean or norms or sums; use norms"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            WidthOptions(**wrong)
    network = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 1))
    layout = WidthLayout.of(network)
    x = layout.vector(network)
    with pytest.raises(ValueError, match=r"^scaling='norms' needs .* hidden layer 0 has Tanh; use mean$"):
        coarsen(layout, x)
    assert coarsen(layout, x, WidthOptions(coarsen=(False, True)))[1].widths[0] == 6
    transfer, coarse = coarsen(layout, x, WidthOptions(scaling="mean"))
    with pytest.raises(ValueError, match=rf"^x has the shape \({coarse.size},\), must be .*; use \({layout.size},\)$"):
        transfer.restrict(transfer.restrict(x))
    with pytest.raises(ValueError, match=r"^matchings are of \(6,\) neurons, must be of \(6, 6\); use match_layers$"):
        WidthTransfer.of(layout, transfer.matchings[:1], x)
    x[3] = math.nan
    with pytest.raises(ValueError, match=r"^rows\[1\] has NaN or inf in it"):
        coarsen(layout, x)
