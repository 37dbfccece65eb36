"""Residual networks for images: parameter counts of the paper, a literal forward pass, norms, lesions, refusals."""

from __future__ import annotations

import copy

import pytest
import torch
from image_networks import SMALL, network, random
from torch.nn import functional

from xbraid_py.layers.image_resnet import ImageResNet, residual_norms, with_blocks

NARROW, WIDE = (16, 32, 64), (32, 64, 128)
# Paper 003, table 5: CIFAR-10, CIFAR-100, STL-10 (its "19,22,394" is 1,922,394).
TABLE_5 = [
    (NARROW, 2, (172_506, 178_356, 172_506)),
    (NARROW, 8, (755_802, 761_652, 755_802)),
    (NARROW, 5, (464_154, 470_004, 464_154)),
    (NARROW, 20, (1_922_394, 1_928_244, 1_922_394)),
    (WIDE, 2, (685_994, 697_604, 685_994)),
    (WIDE, 8, (3_013_802, 3_025_412, 3_013_802)),
    (WIDE, 5, (1_849_898, 1_861_508, 1_849_898)),
    (WIDE, 20, (7_669_418, 7_681_028, 7_669_418)),
]


def literal(net: ImageResNet, images: torch.Tensor) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    """Logits in evaluation mode from the numbers of the state alone; of every block its input and h F."""
    state = net.state_dict()
    seen = []

    def normalized(y, name):
        if net.norm == "none":
            return y
        factor, shift = state[f"{name}.weight"][:, None, None], state[f"{name}.bias"][:, None, None]
        if net.norm == "group":
            grouped = y.unflatten(1, (net.groups, -1))
            mean = grouped.mean((2, 3, 4), keepdim=True)
            var = grouped.var((2, 3, 4), unbiased=False, keepdim=True)
            return ((grouped - mean) / (var + 1e-5).sqrt()).flatten(1, 2) * factor + shift
        mean, var = state[f"{name}.running_mean"][:, None, None], state[f"{name}.running_var"][:, None, None]
        return (y - mean) / (var + 1e-5).sqrt() * factor + shift

    y = functional.conv2d(images, state["stem.weight"], stride=net.stem_stride, padding=1)
    for s, count in enumerate(net.blocks):
        for j in range(count):
            name, halves = f"stages.{s}.{j}.residual", s > 0 and j == 0
            z = normalized(y, f"{name}.norm1").clamp(min=0)
            z = functional.conv2d(z, state[f"{name}.conv1.weight"], stride=1 + halves, padding=1)
            z = normalized(z, f"{name}.norm2").clamp(min=0)
            z = net.step_size * functional.conv2d(z, state[f"{name}.conv2.weight"], padding=1)
            seen.append((y, z))
            if halves:
                pooled = functional.interpolate(y, scale_factor=0.5, mode="area")
                y = torch.zeros_like(z)
                y[:, [0, 2, 4, 6] if s == 1 else range(8)] = pooled  # 4 channels to 8, 8 to 12
            y = y + z
    pooled = normalized(y, "head.norm").clamp(min=0).mean((2, 3))
    return pooled @ state["head.linear.weight"].T + state["head.linear.bias"], seen


@pytest.mark.parametrize(("filters", "blocks", "counts"), TABLE_5)
def test_parameters_are_those_of_table_5(filters, blocks, counts):
    for classes, wanted in zip((10, 100, 10), counts, strict=True):
        with torch.device("meta"):
            net = ImageResNet((blocks,) * 3, filters, classes)
        assert sum(p.numel() for p in net.parameters()) == wanted


@pytest.mark.parametrize("norm", ["batch", "moving", "group", "frozen", "none"])
@pytest.mark.parametrize(("step_size", "stem_stride"), [(1.0, 1), (0.25, 2)])
def test_logits_and_norms_are_the_literal_ones(norm, step_size, stem_stride):
    net = network(norm=norm, step_size=step_size, stem_stride=stem_stride).eval()
    images = random(4, 3, 16, 8)
    logits, seen = literal(net, images)
    assert torch.allclose(net(images), logits, rtol=1e-10, atol=1e-10)
    norms = residual_norms(net, images)
    assert [(each.stage, each.block) for each in norms] == [(s, j) for s, n in enumerate(net.blocks) for j in range(n)]
    for found, (y, z) in zip(norms, seen, strict=True):
        for size, tensor in ((found.input, y), (found.residual, z)):
            assert size == pytest.approx(tensor.square().sum((1, 2, 3)).sqrt().mean().item(), rel=1e-10)


def test_odd_images_are_halved_upwards():
    net = network(norm="group")
    assert net(random(2, 3, 14, 7)).shape == (2, 5)
    pooled = net.stages[1][0].shortcut(torch.ones(1, 4, 7, 5, dtype=torch.float64))
    assert pooled.shape == (1, 8, 4, 3)
    assert torch.equal(pooled[:, ::2], torch.ones(1, 4, 4, 3)) and not pooled[:, 1::2].any()


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_channels_last_stays_so(norm):
    net = network(norm=norm).eval().to(memory_format=torch.channels_last)
    images = random(2, 3, 8, 8)
    y = net.stem(images.contiguous(memory_format=torch.channels_last))
    for block in (block for stage in net.stages for block in stage):
        y = block(y)
        assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(net.head(y), network(norm=norm).eval()(images), rtol=1e-12)


def test_norms_are_those_of_evaluation_and_leave_all_modes():
    net = network(norm="batch").train()
    net.stages[1].eval()
    modes, state = [part.training for part in net.modules()], copy.deepcopy(net.state_dict())
    images = random(4, 3, 8, 8)
    norms = residual_norms(net, images)
    assert [part.training for part in net.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in net.state_dict().items())
    assert norms == residual_norms(net.eval(), images)


def test_frozen_statistics_stay_and_are_used_in_training():
    moving = network(norm="batch")
    images = random(6, 3, 8, 8)
    with torch.no_grad():
        moving(images)  # in training mode: the statistics move
    frozen = ImageResNet(**{**moving.options(), "norm": "frozen"}).double()
    frozen.load_state_dict(moving.state_dict())
    before = copy.deepcopy(frozen.state_dict())
    logits = frozen.train()(images)
    assert torch.equal(logits, moving.eval()(images))
    logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in frozen.parameters())
    assert all(torch.equal(value, before[name]) for name, value in frozen.state_dict().items())
    assert not torch.allclose(moving.train()(images), logits)


def test_options_make_the_network_again():
    net = network(norm="group", step_size=0.5, stem_stride=2, in_channels=1)
    again = ImageResNet(**net.options()).double()
    again.load_state_dict(net.state_dict())
    images = random(2, 1, 16, 16)
    assert torch.equal(again(images), net(images)) and again.options() == net.options()
    with pytest.raises(AttributeError):
        net.step_size = 0.1  # the blocks would not know


def removed(net: ImageResNet, stage: int, block: int) -> ImageResNet:
    """The network with the second convolution of one block set to zero: the residual module yields nothing."""
    found = copy.deepcopy(net)
    with torch.no_grad():
        found.stages[stage][block].residual.conv2.weight.zero_()
    return found


@pytest.mark.parametrize(("stage", "block"), [(0, 0), (0, 1), (1, 0), (1, 2), (2, 0)])
def test_a_lesion_is_a_residual_module_that_yields_nothing(stage, block):
    net = network(norm="batch").eval()
    order = [[j for j in range(n) if (s, j) != (stage, block)] for s, n in enumerate(net.blocks)]
    lesioned = with_blocks(net, order)
    images = random(4, 3, 8, 8)
    assert torch.allclose(lesioned(images), removed(net, stage, block)(images), rtol=1e-12)
    assert not torch.allclose(lesioned(images), net(images))
    norms = residual_norms(lesioned, images)
    assert len(norms) == sum(lesioned.blocks) and all(each.input > 0 for each in norms)
    assert (min(each.residual for each in norms) == 0.0) == (stage > 0 and block == 0)


def test_shuffled_blocks_share_all_modules():
    net = network().eval()
    shuffled = with_blocks(net, [[1, 0], [0, 2, 1], []])
    assert shuffled.blocks == (2, 3, 1), "of the last stage the shortcut of its transition is left"
    assert shuffled.stages[0][0] is net.stages[0][1] and shuffled.stages[1][1] is net.stages[1][2]
    assert {id(p) for p in shuffled.parameters()} <= {id(p) for p in net.parameters()}
    images = random(4, 3, 8, 8)
    swapped = copy.deepcopy(net)
    for name, tensor in net.state_dict().items():
        for a, b in (("stages.0.0.", "stages.0.1."), ("stages.1.1.", "stages.1.2.")):
            for source, target in ((a, b), (b, a)):
                if name.startswith(source):
                    swapped.state_dict()[name.replace(source, target)].copy_(tensor)
    assert torch.allclose(with_blocks(net, [[1, 0], [0, 2, 1], [0, 1, 2]])(images), swapped(images), rtol=1e-12)
    assert torch.equal(with_blocks(net, [range(n) for n in net.blocks])(images), net(images))
    assert with_blocks(shuffled, [[], [0], [0]])(images).shape == (4, 5)
    assert not with_blocks(net, [[], [0], [0]]).training


@pytest.mark.parametrize(
    ("order", "message"),
    [
        ([[0], [0]], r"order=\[\[0\], \[0\]\] must name 3 stages; use \[\[0, 1\], \[0, 1, 2\], \[0, 1, 2\]\]$"),
        ([[2], [0], [0]], r"order\[0\]=\[2\] must name blocks of \[0, 1\], each at most once; use \[0, 1\]$"),
        ([[0], [0, 1, 1], [0]], r"order\[1\]=\[0, 1, 1\] must name blocks of .* each at most once"),
        ([[0], [0], [2, 0, 1]], r"order\[2\]=\[2, 0, 1\] must begin with 0, the transition, .*; use \[0, 2, 1\]$"),
    ],
)
def test_orders_that_do_not_fit_are_refused(order, message):
    with pytest.raises(ValueError, match=message):
        with_blocks(network(), order)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": (2, 0, 2)}, r"blocks=\(2, 0, 2\) must name .* one block in each; use \(2, 2, 2\)$"),
        ({"blocks": ()}, r"blocks=\(\) must name at least one stage"),
        ({"blocks": (2, 2)}, r"filters=\(4, 8, 12\) must name 2 stages, as blocks=\(2, 2\) does; use \(16, 32\)$"),
        ({"filters": (8, 4, 8)}, r"filters=\(8, 4, 8\) must be positive and not decrease; use \(8, 16, 32\)$"),
        ({"filters": (0, 4, 8)}, r"filters=\(0, 4, 8\) must be positive and not decrease; use \(1, 2, 4\)$"),
        ({"norm": "layer"}, r"norm='layer' must be batch, moving, group, frozen or none; use batch$"),
        ({"norm": "group", "groups": 3}, r"groups=3 .* divide all of filters=\(4, 8, 12\); use 2$"),
        ({"norm": "group", "groups": 0}, r"groups=0 must be at least 1 .*; use 1$"),
        ({"num_classes": 0}, r"num_classes=0 must be at least 1; use 10$"),
        ({"stem_stride": 0}, r"stem_stride=0 must be at least 1; use 1$"),
        ({"step_size": 0.0}, r"step_size=0.0 must be positive and finite; use 1.0$"),
        ({"step_size": float("nan")}, r"step_size=nan must be positive and finite"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageResNet(**{**SMALL, **options})


def test_images_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"images.shape=\(4, 1, 8, 8\) must be \(images, 3, height, width\)"):
        network()(random(4, 1, 8, 8))
