"""Interpolation in depth of residual networks for images: figure 5 literally, and orders in the step size."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from image_networks import network, random

from xbraid_py.layers.image_resnet import ImageResNet, residual_norms, with_blocks
from xbraid_py.multilevel.depth.transfer import prolong_rows
from xbraid_py.multilevel.resnet.refinement import perturb, refine, refined_tensors

DEPTHS = (2, 4, 8, 16, 32)
# Old blocks whose mean a new one is, of a stage of 1, 2 and 3 blocks (figure 5, appendix B).
FIRST_STAGE = {
    "constant": {1: [0, 0], 2: [0, 0, 1, 1], 3: [0, 0, 1, 1, 2, 2]},
    "linear": {1: [0, 0], 2: [0, (0, 1), 1, 1], 3: [0, (0, 1), 1, (1, 2), 2, 2]},
}
WITH_TRANSITION = {
    "constant": {2: [0, 1, 1, 1], 3: [0, 1, 1, 1, 2, 2]},
    "linear": {2: [0, 1, 1, 1], 3: [0, 1, 1, (1, 2), 2, 2]},
}


def smooth(blocks: int, norm: str, T: float = 0.25) -> ImageResNet:
    """A network whose weights and statistics are values of smooth functions of t in every stage, h = T / blocks."""
    net = ImageResNet((blocks,) * 3, (4, 4, 8), 3, step_size=T / blocks, norm=norm, groups=2).double()
    with torch.no_grad():
        for number, (name, tensor) in enumerate(
            (name, tensor) for name, tensor in net.state_dict().items() if not name.startswith("stages")
        ):
            if tensor.is_floating_point():
                tensor.copy_(_value(tensor.shape, name, number, 0.0))
        for s, stage in enumerate(net.stages):
            for j, block in enumerate(stage):
                # A transition is one block on all grids; its weights are no part of the function.
                of = 50 * (2 * s + block.is_transition) + 100
                for number, (name, tensor) in enumerate(block.state_dict().items()):
                    if tensor.is_floating_point():
                        tensor.copy_(_value(tensor.shape, name, of + number, j / blocks * (not block.is_transition)))
    return net.eval() if norm == "batch" else net


def _value(shape: torch.Size, name: str, seed: int, t: float) -> torch.Tensor:
    """One of the functions at t: positive around 1 for factors and variances of normalizations."""
    a, b = random(*shape, seed=seed), random(*shape, seed=seed + 1000)
    value = a * math.cos(t) + b * math.sin(t)
    if name.endswith(("running_var", "norm1.weight", "norm2.weight", "norm.weight")):
        return 1 + 0.4 * value.tanh()
    return value * (2 / math.prod(shape[1:])) ** 0.5 if len(shape) > 1 else 0.5 * value


def slope(sizes: list[float]) -> float:
    """Of log size over log h, h = 1 / depth."""
    return np.polyfit(-np.log(DEPTHS), np.log(sizes), 1)[0]


@pytest.mark.parametrize("norm", ["batch", "group", "none"])
@pytest.mark.parametrize("interpolation", ["constant", "linear"])
def test_the_change_of_the_output_falls_with_the_step_size(norm, interpolation):
    images = random(4, 3, 8, 8)
    changes = []
    with torch.no_grad():
        for blocks in DEPTHS:
            coarse = smooth(blocks, norm)
            before = coarse(images)
            change = (refine(coarse, interpolation)(images) - before).norm(dim=1).mean()
            changes.append(float(change / before.norm(dim=1).mean()))
    assert 0.8 < slope(changes) < 1.2, changes
    assert changes[-1] < 0.1


def test_a_network_that_keeps_its_step_size_is_another_one():
    """The order is that of halving h: doubled blocks alone change the output, however deep the network is."""
    images = random(4, 3, 8, 8)
    changes = []
    with torch.no_grad():
        for blocks in DEPTHS:
            fine = refine(smooth(blocks, "group"))
            for block in (block for stage in fine.stages for block in stage):
                block.step_size *= 2
            changes.append(float((fine(images) - smooth(blocks, "group")(images)).norm()))
    assert slope(changes) < 0.3


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_norms_of_residual_modules_fall_as_one_over_the_depth(norm):
    """Paper 003, eq. 5 and figure 3."""
    images = random(4, 3, 8, 8)
    gammas = [np.mean([each.residual for each in residual_norms(smooth(n, norm), images)]) for n in DEPTHS]
    assert 0.85 < slope(gammas) < 1.15, gammas


@pytest.mark.parametrize("norm", ["batch", "group", "frozen"])
@pytest.mark.parametrize("interpolation", ["constant", "linear"])
@pytest.mark.parametrize("blocks", [(1, 2, 3), (3, 3, 2)])
def test_new_blocks_are_those_of_figure_5(norm, interpolation, blocks):
    coarse = network(norm=norm, blocks=blocks, step_size=0.5)
    for number, (name, tensor) in enumerate(coarse.state_dict().items()):
        if name.endswith("num_batches_tracked"):
            tensor.fill_(number)
    state = copy.deepcopy(coarse.state_dict())
    fine = refine(coarse, interpolation)
    found = fine.state_dict()
    assert fine.options() == {**coarse.options(), "blocks": tuple(2 * n for n in blocks), "step_size": 0.25}
    assert {block.step_size for stage in fine.stages for block in stage} == {0.25}
    wanted = {name: tensor for name, tensor in state.items() if not name.startswith("stages")}
    for s, count in enumerate(blocks):
        sources = (WITH_TRANSITION if s else FIRST_STAGE)[interpolation][count]
        for k, source in enumerate(sources):
            first, second = source if isinstance(source, tuple) else (source, source)
            for key in coarse.stages[s][first].state_dict():
                a, b = (state[f"stages.{s}.{j}.{key}"] for j in (first, second))
                wanted[f"stages.{s}.{k}.{key}"] = a if key.endswith("tracked") else (a + b) / 2
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]) and tensor.dtype == wanted[name].dtype, name
    assert all(torch.equal(tensor, state[name]) for name, tensor in coarse.state_dict().items())


def test_the_refined_network_is_on_its_own():
    coarse = network(norm="batch").train()
    random_state = torch.random.get_rng_state()
    fine = refine(coarse)
    assert torch.equal(torch.random.get_rng_state(), random_state), "a resumed run would draw other samples"
    kept = {tensor.data_ptr() for tensor in coarse.state_dict().values()}
    places = [tensor.data_ptr() for tensor in fine.state_dict().values()]
    assert not kept & set(places) and len(set(places)) == len(places)
    assert fine.training and all(p.requires_grad and p.is_leaf for p in fine.parameters())
    assert not refine(coarse.eval()).training
    optimizer = torch.optim.SGD(fine.parameters(), 0.1)
    fine(random(4, 3, 8, 8)).square().sum().backward()
    optimizer.step()
    pair = [fine.state_dict()[f"stages.0.{j}.residual.conv1.weight"] for j in (0, 1)]
    assert not torch.equal(*pair)


def test_noise_is_on_the_weights_of_inserted_blocks_alone():
    coarse = network(blocks=(2, 2), filters=(4, 8))
    plain, noisy, again = (refine(coarse) for _ in range(3))
    perturb(noisy, 0.1, torch.Generator().manual_seed(3))
    perturb(again, 0.1, torch.Generator().manual_seed(3))
    moved = 0
    for (name, before), after, same in zip(
        plain.state_dict().items(), noisy.state_dict().values(), again.state_dict().values(), strict=True
    ):
        assert torch.equal(after, same), "of the generator alone"
        _, _, block, *_ = [*name.split("."), "", ""]
        if name.startswith("stages") and int(block) % 2 and before.dim() > 1:
            moved += 1
            relative = float((after - before).std() / before.std())
            assert 0.03 < relative < 0.3, name
        else:
            assert torch.equal(before, after), name
    assert moved == 2 * 2 * 2, "two stages, two inserted blocks, two convolutions"


def test_momentum_is_interpolated_as_the_weights_are():
    coarse = network(norm="group")
    momentum = {name: random(*p.shape, seed=k) for k, (name, p) in enumerate(coarse.named_parameters())}
    fine = refine(coarse)
    found = refined_tensors(coarse, momentum, "linear")
    assert found.keys() == dict(fine.named_parameters()).keys()
    key = "residual.conv2.weight"
    assert torch.equal(found[f"stages.0.1.{key}"], (momentum[f"stages.0.0.{key}"] + momentum[f"stages.0.1.{key}"]) / 2)
    assert torch.equal(found[f"stages.1.1.{key}"], momentum[f"stages.1.1.{key}"])
    assert found["head.linear.bias"] is not momentum["head.linear.bias"]
    assert refined_tensors(coarse, {}) == {}
    with pytest.raises(ValueError, match="tensors holds 'stem.bias', which the network does not"):
        refined_tensors(coarse, {"stem.bias": random(4)})
    del momentum[f"stages.2.1.{key}"]
    with pytest.raises(ValueError, match=f"tensors lacks 'stages.2.1.{key}', but holds the same of other blocks"):
        refined_tensors(coarse, momentum)


def test_rows_behind_the_last_one():
    rows = torch.tensor([[0.0, 1.0], [2.0, 5.0]])
    constant = [[0.0, 1.0], [0.0, 1.0], [2.0, 5.0], [2.0, 5.0]]
    assert prolong_rows(rows, "constant", torch.ones(1, 2)).tolist() == constant
    assert prolong_rows(rows, "linear").tolist() == [[0.0, 1.0], [1.0, 3.0], [2.0, 5.0], [2.0, 5.0]]
    assert prolong_rows(rows, "linear", torch.tensor([[4.0, 5.0]]))[-1].tolist() == [3.0, 5.0]
    assert prolong_rows(rows[:0], "linear", rows[:1]).shape == (0, 2)


def test_what_cannot_be_refined_is_refused():
    with pytest.raises(ValueError, match=r"blocks=\(1, 2, 1\): stage 2 is a transition alone.*; use \(2, 2, 2\)$"):
        refine(network(blocks=(1, 2, 1)))
    with pytest.raises(ValueError, match="^interpolation='cubic' must be constant or linear; use constant$"):
        refine(network(), "cubic")
    for order in ([[0, 1], [1, 2], [0, 1, 2]], [[], [0, 1], [0, 1]]):
        with pytest.raises(ValueError, match="^network lacks a transition, or a stage, which with_blocks has left out"):
            refine(with_blocks(network(), order))
