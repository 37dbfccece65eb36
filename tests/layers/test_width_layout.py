"""What a hierarchy in width reads from a network, what it makes of it, and the networks it refuses."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from xbraid_py.multilevel.width.transfer import WidthLayout


def network() -> nn.Sequential:
    parts = OrderedDict(
        conv=nn.Conv2d(3, 6, 3, stride=2, padding="valid", dilation=1),
        act=nn.LeakyReLU(0.1),
        more=nn.Conv2d(6, 4, (1, 3), padding=(0, 1), padding_mode="reflect", bias=False),
        pool=nn.AvgPool2d(2),
        flat=nn.Flatten(),
        first=nn.Linear(4 * 4, 5),
        tanh=nn.Tanh(),
        second=nn.Linear(5, 8, bias=False),
        image=nn.Unflatten(1, (2, 4)),
    )
    return nn.Sequential(parts)


def test_layers_lie_in_the_order_of_the_parameters():
    given = network()
    layout = WidthLayout.of(given)
    x = layout.vector(given)
    assert torch.equal(x, torch.nn.utils.parameters_to_vector(given.parameters()))
    sizes = [(layer.outputs, layer.inputs, layer.block) for layer in layout.layers]
    assert sizes == [(6, 3, 9), (4, 6, 3), (5, 4, 4), (8, 5, 1)]
    assert layout.widths == (6, 4, 5) and layout.size == len(x)
    assert [layer.inhomogeneous for layer in layout.layers] == ["", "", "Tanh", ""]
    for layer, name in zip(layout.layers, ("conv", "more", "first", "second"), strict=True):
        part = getattr(given, name)
        assert torch.equal(layer.weight(x).flatten(), part.weight.flatten())
        bias = layer.bias(x)
        assert bias is None if part.bias is None else torch.equal(bias, part.bias)
        rows = part.weight.flatten(1)
        rows = rows if part.bias is None else torch.cat([rows, part.bias[:, None]], 1)
        assert torch.equal(layer.rows(x), rows)
        torch.testing.assert_close(layer.norms(x), rows.double().norm(dim=1))
        torch.testing.assert_close(layer.norms(x, False), part.weight.flatten(1).double().norm(dim=1))
    # Column (c, p) of the dense layer belongs to channel c: what the convolution's channel 2 feeds.
    assert torch.equal(layout.layers[2].weight(x)[:, 2], given.first.weight[:, 8:12])


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_network_made_of_its_weights_is_the_same_and_shares_none(dtype):
    given = network().to(dtype)
    layout = WidthLayout.of(given)
    x = layout.vector(given)
    made = layout.module(x)
    inputs = torch.randn(2, 3, 10, 10, dtype=dtype)
    assert torch.equal(made(inputs), given(inputs))
    assert list(made.state_dict()) == list(given.state_dict()) and str(made) == str(given)
    kept = x.clone()
    with torch.no_grad():
        for parameter in made.parameters():
            assert parameter.requires_grad
            parameter.zero_()
    assert torch.equal(x, kept) and torch.equal(layout.vector(given), kept)
    layout.load(made, x)
    assert torch.equal(made(inputs), given(inputs))


def test_making_a_network_draws_no_random_numbers():
    layout = WidthLayout.of(network())
    before = torch.get_rng_state()
    layout.module(torch.zeros(layout.size))
    assert torch.equal(before, torch.get_rng_state())


def test_narrowed_networks_keep_inputs_outputs_and_options():
    layout = WidthLayout.of(network())
    coarse = layout.narrowed((3, 2, 4))
    assert [(layer.outputs, layer.inputs, layer.block) for layer in coarse.layers] == [
        (3, 3, 9),
        (2, 3, 3),
        (4, 2, 4),
        (8, 4, 1),
    ]
    made = coarse.module(torch.randn(coarse.size))
    assert made(torch.randn(2, 3, 10, 10)).shape == (2, 2, 4)
    assert made.more.padding_mode == "reflect" and made.conv.stride == (2, 2) and made.act.negative_slope == 0.1
    assert WidthLayout.of(made).layers == coarse.layers


@pytest.mark.parametrize("dimensions", (1, 3))
def test_convolutions_of_other_dimensions(dimensions):
    conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1]
    layout = WidthLayout.of(nn.Sequential(conv(2, 6, 3), nn.ReLU(), conv(6, 2, 1)))
    coarse = layout.narrowed((3,))
    assert layout.layers[0].block == 3**dimensions
    assert coarse.module(torch.randn(coarse.size))(torch.randn(1, 2, *[5] * dimensions)).shape[1] == 2


SHARED = nn.Linear(4, 4)
REFUSED = [
    (nn.Linear(2, 2), "network=Linear must be a torch.nn.Sequential"),
    (nn.Sequential(nn.ReLU()), "network has no layer with weights"),
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), r"network\[1\]=BatchNorm2d is none of the modules"),
    (nn.Sequential(nn.Linear(1, 4), nn.PReLU()), r"network\[1\]=PReLU is none of the modules"),
    (nn.Sequential(nn.Linear(1, 4), nn.Softmax(1)), r"network\[1\]=Softmax is none of the modules"),
    (nn.Sequential(nn.Sequential(nn.Linear(1, 4))), r"network\[0\]=Sequential is none of the modules"),
    (nn.Sequential(nn.Conv2d(4, 4, 3, groups=2)), r"network\[0\]=Conv2d has groups=2, must have every channel in one"),
    (nn.Sequential(nn.Linear(1, 4), nn.Linear(5, 2)), r"network\[1\]=Linear takes 5 inputs, must fit 4 outputs"),
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(5, 2, 3)), r"network\[1\]=Conv2d takes 5 inputs, must fit 4"),
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(9, 2)), r"network\[2\]=Linear takes 9 inputs"),
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Linear(4, 2)), r"network\[1\]=Linear acts on one axis of the channels"),
    (nn.Sequential(nn.Linear(1, 4), nn.Conv1d(4, 2, 1)), r"network\[1\]=Conv1d stands behind a dense layer"),
    (nn.Sequential(nn.Linear(1, 4), nn.Flatten(), nn.Linear(8, 1)), r"network\[2\]=Linear takes 8 inputs"),
    (nn.Sequential(nn.Linear(1, 4), nn.Unflatten(1, (2, 2)), nn.Linear(2, 1)), r"network\[2\]=Linear .* Unflatten"),
    (nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(2), nn.Linear(4, 2)), r"network\[1\]=Flatten has start_dim=2"),
    (nn.Sequential(nn.Linear(1, 4), nn.MaxPool1d(2)), r"network\[1\]=MaxPool1d would pool neurons"),
    (nn.Sequential(SHARED, nn.ReLU(), SHARED), "network uses the same weights twice"),
    (nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(1, 2))), r"network\[0\]=Parametrized.* is none"),
]


@pytest.mark.parametrize("given, message", REFUSED)
def test_networks_of_which_neurons_cannot_be_paired_are_refused(given, message):
    with pytest.raises(ValueError, match=f"^{message}.*; use "):
        WidthLayout.of(given)


def test_vectors_of_another_network_are_refused():
    layout = WidthLayout.of(network())
    for use in (layout.module, lambda x: layout.load(network(), x)):
        with pytest.raises(ValueError, match=rf"^x has the shape \(3,\), must be flat .*; use \({layout.size},\)$"):
            use(torch.zeros(3))
