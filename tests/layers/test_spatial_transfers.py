"""Coarser pixels: transfers of states and kernels as loops and matrices; bad input.

Shape letters: `N` layers, `B` batch, `C` channels, `H`, `W`, `D` pixels.
"""

from __future__ import annotations

import pytest
import reference as ref
import torch
from spatial_cases import RESTRICT, SIZES, B, C, N, made
from torch import nn

from xbraid_py import SpatialCoarsening
from xbraid_py.layers.module_block import ModuleBlock, own_random_numbers
from xbraid_py.layers.module_steps import ModuleSteps
from xbraid_py.layers.pixels import PixelTransfer, axis_matrices, galerkin_rows, kernel_matrix

# ---- Transfers


@pytest.mark.parametrize("factor", [2, 3])
@pytest.mark.parametrize("pixels", [6, 7, 8, 9])
def test_matrices_along_an_axis(pixels, factor):
    for interpolation in ("linear", "constant"):
        restriction, prolongation = axis_matrices(pixels, factor, interpolation)
        blocks = [range(first, min(first + factor, pixels)) for first in range(0, pixels, factor)]
        for row, block in zip(restriction, blocks, strict=True):
            wanted = torch.zeros(pixels, dtype=torch.float64)
            wanted[list(block)] = 1 / len(block)
            assert torch.allclose(row, wanted)
        assert torch.allclose(prolongation.sum(1), torch.ones(pixels, dtype=torch.float64)), "constants stay"
        assert (prolongation >= 0).all()
        middles = torch.tensor([sum(block) / len(block) for block in blocks], dtype=torch.float64)
        fine = torch.arange(pixels, dtype=torch.float64)
        inside = (fine >= middles[0]) & (fine <= middles[-1])
        if interpolation == "linear":
            assert torch.allclose((prolongation @ middles)[inside], fine[inside]), "and so do lines"
        else:
            assert all(prolongation[i, k] == (i in block) for k, block in enumerate(blocks) for i in range(pixels))


@pytest.mark.parametrize("dims", [2, 3])
def test_transfers_of_states(dims):
    """Axis by axis; transposed: the adjoint of the other one; shapes and constants."""
    transfer = PixelTransfer(SIZES[dims], SpatialCoarsening(dims=dims))
    assert transfer.coarse_pixels == tuple(-(-x // 2) for x in SIZES[dims])
    fine, coarse = ref.random(3, B, C, *SIZES[dims], seed=1), ref.random(3, B, C, *transfer.coarse_pixels, seed=2)
    wanted = fine
    for axis, pixels in enumerate(SIZES[dims]):
        wanted = torch.tensordot(wanted, axis_matrices(pixels, 2, "linear")[0], ([3 + axis], [1])).movedim(-1, 3 + axis)
    assert torch.allclose(transfer.restrict(fine), wanted, atol=1e-15)
    assert transfer.interpolate(coarse).shape == fine.shape
    assert torch.allclose(transfer.interpolate(torch.ones_like(coarse)), torch.ones_like(fine))
    back = transfer.transposed()
    assert back.transposed() == transfer
    for a, b, x, y in (
        (transfer.restrict, back.interpolate, fine, coarse),
        (transfer.interpolate, back.restrict, coarse, fine),
    ):
        assert torch.allclose((a(x) * y).sum(), (x * b(y)).sum(), rtol=1e-13)
    assert transfer.restrict(fine[:0]).shape == (0, *coarse.shape[1:])


@pytest.mark.parametrize(("dims", "interpolation"), [(2, "linear"), (3, "linear"), (2, "constant")])
def test_galerkin_kernels_are_r_k_p_inside(dims, interpolation):
    """A convolution with the coarse kernel is R K P u, but for the outermost pixels."""
    kind = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
    pixels = (16,) * dims
    options = SpatialCoarsening(dims=dims, interpolation=interpolation)
    transfer = PixelTransfer(pixels, options)
    for width in (3, 5):
        with own_random_numbers(1):
            part = kind(C, 3, width, padding=width // 2, dtype=torch.float64)
        block = ModuleBlock(part)
        theta = ref.random(2, block.row_size, seed=5)
        coarse = ref.random(2, B, C, *transfer.coarse_pixels, seed=4)
        rows = galerkin_rows(block, theta, options)
        for row in (0, 1):
            fine_weights = [column[row] for column in block.split(theta)]
            coarse_weights = [column[row] for column in block.split(rows)]
            wanted = transfer.restrict(block(fine_weights, transfer.interpolate(coarse)[row])[None])[0]
            inner = (..., *(slice(2, -2),) * dims)
            assert torch.allclose(block(coarse_weights, coarse[row])[inner], wanted[inner], atol=1e-13)


def test_kernels_of_derivatives():
    """Along one axis: the identity and differences, per pixel, come out as they do on a grid half as fine."""
    matrix = kernel_matrix(3, 2, "linear")
    first = matrix @ torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    second = matrix @ torch.tensor([1.0, -2.0, 1.0], dtype=torch.float64)
    position = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    assert torch.allclose(
        (matrix @ torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)).sum(), torch.tensor(1.0).double()
    )
    assert first.sum().abs() < 1e-15 and (first @ position).item() == pytest.approx(0.5)
    assert second.sum().abs() < 1e-15 and (second @ position**2).item() == pytest.approx(2 / 4)


def test_what_is_left_as_it_is():
    """1x1 kernels, strides, kernels without padding, biases, normalizations; and everything if asked for."""
    with own_random_numbers(1):
        module = nn.Sequential(
            nn.Conv2d(C, C, 1), nn.Conv2d(C, C, 3), nn.Conv2d(C, C, 3, padding=1, dilation=2), nn.GroupNorm(1, C)
        )
    block = ModuleBlock(module)
    theta = ref.random(3, block.row_size, seed=1)
    assert torch.equal(galerkin_rows(block, theta, SpatialCoarsening()), theta)
    block, theta, _, _ = made(2)
    steps = ModuleSteps(block, theta, 0.1, tuple(range(N)))
    assert PixelTransfer((6, 7), SpatialCoarsening(weights="same", **RESTRICT)).steps(steps) is steps
    moved = PixelTransfer((6, 7), SpatialCoarsening()).steps(steps).theta
    assert torch.equal(moved[:, -C:], theta[:, -C:]) and not torch.equal(moved, theta)


# ---- Bad input


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"levels": ()}, "levels=() must be different coarse levels"),
        ({"levels": (0,)}, "levels=(0,) must be different coarse levels"),
        ({"levels": (1, 1)}, "levels=(1, 1) must be different"),
        ({"states": "drop"}, "states='drop' must be carry or restrict; use carry"),
        ({"dims": 1}, "dims=1 must be 2 or 3; use 2"),
        ({"factor": 1}, "factor=1 must be at least 2; use 2"),
        ({"interpolation": "cubic"}, "interpolation='cubic' must be linear or constant; use linear"),
        ({"weights": "half"}, "weights='half' must be galerkin or same; use galerkin"),
    ],
)
def test_bad_options(options, words):
    with pytest.raises(ValueError) as caught:
        SpatialCoarsening(**options)
    assert words in str(caught.value)


def test_states_that_cannot_be_coarsened():
    with pytest.raises(ValueError, match="pixels are too few for level 1"):
        SpatialCoarsening().transfers(torch.Size((B, C, 2, 8)), 2)
    with pytest.raises(ValueError, match="dims=3 pixel axes need a state of more axes"):
        SpatialCoarsening(dims=3).transfers(torch.Size((4, 4, 4)), 2)
    found = SpatialCoarsening(levels=(2, 3)).transfers(torch.Size((B, C, 9, 16)), 4)
    assert found[0] is None and found[1].pixels == (9, 16) and found[2].pixels == (5, 8)
