"""Activations, dense layers and the flat vector of weights, against literal forms and autograd."""

from __future__ import annotations

import re
from itertools import pairwise

import pytest
import reference as ref
import torch

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.partition import Partition
from xbraid_py.kernels.activation import ACTIVATIONS, activation
from xbraid_py.layers.dense import DenseLayer
from xbraid_py.layers.parameters import Layout, Stack
from xbraid_py.mgrit.grid import LayerGrid
from xbraid_py.problem.network import DenseResNet
from xbraid_py.problem.options import InitialScales

NAMES = sorted(ACTIVATIONS)
CORNERS = [-0.1, 0.0, 0.1]


def grid_without_corners() -> torch.Tensor:
    z = torch.linspace(-3.0, 3.0, 1201, dtype=torch.float64)
    near = torch.tensor([[corner - 1e-5, corner + 1e-5] for corner in CORNERS], dtype=torch.float64)
    return torch.cat([z[(z[:, None] - torch.tensor(CORNERS)).abs().amin(1) > 1e-6], near.flatten()])


@pytest.mark.parametrize("name", NAMES)
def test_values_and_slopes_against_the_literal_form(name):
    z = grid_without_corners().requires_grad_()
    literal = ref.ACTIVATIONS[name](z)
    slopes = torch.autograd.grad(literal.sum(), z)[0]
    kept = z.detach().clone()
    assert (activation(name).value(kept) - literal).abs().max() < 1e-15
    assert (activation(name).slope(kept) - slopes).abs().max() < 4e-15
    assert torch.equal(kept, z), "the argument must not be overwritten"


@pytest.mark.parametrize("name", NAMES)
def test_slopes_against_finite_differences(name):
    z, eps = grid_without_corners(), 1e-6
    function = activation(name)
    difference = (function.value(z + eps) - function.value(z - eps)) / (2 * eps)
    # Nowhere closer than 1e-5 to a corner, so the difference sees one branch only.
    assert (function.slope(z) - difference).abs().max() < 1e-8


@pytest.mark.parametrize("corner", [-0.1, 0.1])
def test_the_smoothed_relu_has_no_corner(corner):
    function = activation("smooth_relu")
    for eps in (1e-3, 1e-6, 1e-9):
        left, right = torch.tensor([[corner - eps], [corner + eps]], dtype=torch.float64)
        # A step of size eps changes the value by slope * eps <= eps, and the slope by eps / (2 eta).
        assert (function.value(right) - function.value(left)).abs() <= 2 * eps * (1 + 1e-6)
        assert (function.slope(right) - function.slope(left)).abs() <= 2 * eps / 0.2 * (1 + 1e-6)
    assert function.value(torch.tensor([0.0], dtype=torch.float64)).item() == pytest.approx(0.025, abs=1e-16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", NAMES)
def test_nan_infinity_and_dtype(name, dtype):
    z = torch.tensor([float("nan"), 1e30, -1e30], dtype=dtype)
    function = activation(name)
    value, slope = function.value(z), function.slope(z)
    assert value.dtype == slope.dtype == dtype and value.shape == slope.shape == z.shape
    assert value.isnan().tolist() == [True, False, False]
    # The identity's slope is 1 whatever its argument; its value already carries the NaN.
    assert slope.isnan().tolist() == [name != "identity", False, False]
    if "relu" in name:
        assert slope[1:].tolist() == [1.0, 0.0] and value[2] == 0.0 and value[1] == z[1]


def test_unknown_activation_names_those_there_are():
    with pytest.raises(ValueError, match=re.escape("activation='sigmoid' must be one of smooth_relu, relu, tanh")):
        activation("sigmoid")
    with pytest.raises(ValueError, match="activation='elu' .* use smooth_relu"):
        DenseLayer(2, 2, "elu")


def test_bad_layers_name_what_works():
    with pytest.raises(ValueError, match="bias='none' must be vector or scalar; use vector"):
        DenseLayer(2, 2, bias="none")
    with pytest.raises(ValueError, match="inputs=0 and outputs=2 must be at least 1; use 8"):
        DenseLayer(0, 2)
    with pytest.raises(ValueError, match="outputs=-1 must be at least 1"):
        DenseLayer(2, -1)


@pytest.mark.parametrize("bias", ["vector", "scalar"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "inputs", "outputs", "batch"), [(1, 2, 5, 7), (4, 3, 3, 1), (3, 5, 2, 40), (0, 3, 2, 4)])
def test_layer_against_autograd(name, bias, n, inputs, outputs, batch):
    layer = DenseLayer(inputs, outputs, name, bias)
    assert layer.shapes == {"weight": (outputs, inputs), "bias": (outputs if bias == "vector" else 1,)}
    theta = ref.random(n, layer.num_parameters, seed=1).requires_grad_()
    u = ref.random(n, inputs, batch, seed=2).requires_grad_()
    v = ref.random(n, outputs, batch, seed=3)
    literal = [ref.dense(row, x, outputs, name) for row, x in zip(theta, u, strict=True)]
    literal = torch.stack(literal) if n else torch.empty(0, outputs, batch, dtype=torch.float64)
    plain_theta, plain_u, plain_v = theta.detach(), u.detach(), v.clone()
    value = layer.forward(plain_theta, plain_u)
    assert value.shape == (n, outputs, batch) and torch.allclose(value, literal.detach(), rtol=1e-13, atol=1e-14)
    back, none = layer.vjp(plain_theta, plain_u, plain_v, with_gradient=False)
    again, gradient = layer.vjp(plain_theta, plain_u, plain_v, with_gradient=True)
    assert none is None and torch.equal(back, again) and torch.equal(plain_v, v)
    assert back.shape == u.shape and gradient.shape == theta.shape
    if n:
        expected_u, expected_theta = torch.autograd.grad(literal, [u, theta], v)
        assert torch.allclose(back, expected_u, rtol=1e-12, atol=1e-13)
        assert torch.allclose(gradient, expected_theta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("bias", ["vector", "scalar"])
def test_layer_in_float32(bias):
    layer = DenseLayer(4, 3, "smooth_relu", bias)
    theta, u, v = (
        ref.random(*shape, seed=s) for s, shape in ((1, (2, layer.num_parameters)), (2, (2, 4, 9)), (3, (2, 3, 9)))
    )
    narrow = [tensor.float() for tensor in (theta, u, v)]
    results = [layer.forward(*narrow[:2]), *layer.vjp(*narrow, with_gradient=True)]
    for result, wide in zip(results, [layer.forward(theta, u), *layer.vjp(theta, u, v, True)], strict=True):
        assert result.dtype == torch.float32
        assert (result - wide).abs().max() < 1e-5 * wide.abs().max()


@pytest.mark.parametrize(("width", "batch"), [(3, 2), (8, 33), (8, 1500), (17, 257)])
def test_a_layer_gives_the_same_bits_in_any_company(width, batch):
    """Ranks own different numbers of intervals, and cut them out of their rows in different ways."""
    layer = DenseLayer(width, width, "tanh")
    theta, u, v = ref.random(12, layer.num_parameters, seed=1), *ref.random(2, 12, width, batch, seed=2)
    value, (back, gradient) = layer.forward(theta, u), layer.vjp(theta, u, v, with_gradient=True)
    for rows in [slice(i, i + 1) for i in range(12)] + [
        slice(2, 7),
        slice(1, None, 4),
        slice(0, 12, 3),
        slice(5, 6, 4),
    ]:
        some = layer.forward(theta[rows], u[rows]), *layer.vjp(theta[rows].clone(), u[rows].clone(), v[rows], True)
        same = [torch.equal(a, b[rows]) for a, b in zip(some, (value, back, gradient), strict=True)]
        assert same == [True, True, True], rows


def example_layout() -> Layout:
    opening, block = DenseLayer(2, 3).shapes, DenseLayer(3, 3).shapes
    return Layout((Stack("opening", opening, 1, 0, 1), Stack("layers", block, 9, 2, 4), Stack("last", block, 1, 1, 0)))


def test_layout_sizes_and_views():
    layout = example_layout()
    assert layout.size == 9 + 4 * 12 and layout.num_parameters == 9 + 9 * 12 + 12
    flat = torch.arange(layout.size, dtype=torch.float64)
    named = layout.named(flat)
    assert {name: tuple(view.shape) for name, view in named.items()} == {
        "opening.weight": (1, 3, 2),
        "opening.bias": (1, 3),
        "layers.weight": (4, 3, 3),
        "layers.bias": (4, 3),
        "last.weight": (0, 3, 3),
        "last.bias": (0, 3),
    }
    joined = [named["opening.weight"].flatten(), named["opening.bias"].flatten()]
    for i in range(4):
        joined += [named["layers.weight"][i].flatten(), named["layers.bias"][i]]
    assert torch.equal(torch.cat(joined), flat), "rows come one after the other, weight before bias"
    for view in (*named.values(), *layout.rows(flat).values()):
        view.fill_(-1.0)
    assert torch.equal(flat, torch.full_like(flat, -1.0)), "everything is a view of the flat vector"
    zeros = example_layout().zeros()
    assert zeros.dtype == torch.float64 and zeros.shape == flat.shape and not zeros.any()


def test_a_layers_row_is_what_the_layer_reads():
    layer = DenseLayer(2, 3)
    rows = ref.random(4, 9, seed=1)
    unpacked = Stack("opening", layer.shapes, 4, 0, 4).unpack(rows)
    weight, bias = layer.unpack(rows)
    assert torch.equal(unpacked["weight"], weight) and torch.equal(unpacked["bias"], bias[:, :, 0])


@pytest.mark.parametrize(("parts", "ends"), [(1, [57]), (2, [33, 57]), (4, [21, 33, 45, 57])])
def test_dots_in_shares_of_the_layers(parts, ends):
    """One opening layer of 9 parameters and 4 layers of 12: the opening layer belongs to the first share."""
    layout = example_layout()
    a, b = ref.random(2, layout.size, seed=1)
    expected = [sum(a[i] * b[i] for i in range(*span)) for span in zip([0, *ends], ends, strict=False)]
    found = layout.dots([a, b], [b], parts)
    assert found.shape == (2, 1, parts)
    assert torch.allclose(found[0, 0], torch.stack(expected), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("dtype", "width", "parts"), [("float64", 5, 4), ("float32", 17, 8), ("float64", 8, 1)])
def test_products_do_not_depend_on_how_many_are_made_at_once(dtype, width, parts):
    shapes = {"weight": (width, width), "bias": (width,)}
    stacks = [Stack(name, shapes, n, 0, n) for name, n in (("opening", 1), ("layers", 16), ("end", 1))]
    layout = Layout(tuple(stacks), getattr(torch, dtype))
    vectors = list(ref.random(6, layout.size, seed=1).to(layout.dtype))
    found = layout.dots(vectors[:2], vectors[1:], parts)
    row = width * width + width
    ends = [0, *(row + 16 // parts * part * row for part in range(1, parts)), layout.size]
    for i, a in enumerate(vectors[:2]):
        for j, b in enumerate(vectors[1:]):
            assert torch.equal(found[i, j], layout.dots([a], [b], parts)[0, 0])
            alone = torch.stack(
                [(x * y).sum() for x, y in zip(a.split(_sizes(ends)), b.split(_sizes(ends)), strict=True)]
            )
            torch.testing.assert_close(found[i, j], alone)


def _sizes(ends: list[int]) -> list[int]:
    return [b - a for a, b in pairwise(ends)]


def network_on(comm, num_layers=6) -> DenseResNet:
    partition = Partition.balanced(num_layers, comm.size)
    layers = DenseLayer(2, 4), DenseLayer(4, 4), DenseLayer(4, 3, "identity")
    return DenseResNet(*layers, LayerGrid(num_layers, 1.0), partition, comm)


@pytest.mark.ranks(1, 2, 3, 5, 8)
def test_initial_weights_depend_on_seed_and_layer_only(spmd):
    scales = InitialScales(opening=2.0, layers=0.5, classification=0.25)
    serial = network_on(SerialCommunicator())
    expected = serial.initial(scales, 7)
    assert torch.equal(torch.cat(spmd(lambda comm: network_on(comm).initial(scales, 7))), expected)
    named, other = serial.layout.named(expected), serial.layout.named(serial.initial(scales, 8))
    same = serial.layout.named(serial.initial(InitialScales(1.0, 1.0, 1.0), 7))
    rows = [*same["opening.weight"], *same["layers.weight"], *same["classification.weight"]]
    flat = [row.flatten()[:8] for row in rows]
    assert all(not torch.equal(a, b) for i, a in enumerate(flat) for b in flat[:i])
    assert not any(named[name].any() for name in named if name.endswith("bias"))
    assert all(not torch.equal(named[name], other[name]) for name in named if name.endswith("weight"))
    # The layers that two depths share have the same weights.
    deeper = network_on(SerialCommunicator(), 9)
    assert torch.equal(deeper.layout.named(deeper.initial(scales, 7))["layers.weight"][:6], named["layers.weight"])


def test_initial_weights_have_the_scales_asked_for():
    network = network_on(SerialCommunicator(), 400)
    one = network.layout.named(network.initial(InitialScales(1.0, 1.0, 1.0), 1))
    scaled = network.layout.named(network.initial(InitialScales(2.0, 0.5, 0.0), 1))
    assert one["layers.weight"].std() == pytest.approx(1.0, abs=0.05)
    for name, factor in (("opening", 2.0), ("layers", 0.5), ("classification", 0.0)):
        assert torch.equal(scaled[f"{name}.weight"], factor * one[f"{name}.weight"])


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_bad_scales_name_what_works(value):
    with pytest.raises(ValueError, match=rf"layers={value} must be at least 0 and finite; use {InitialScales.layers}$"):
        InitialScales(layers=value)
