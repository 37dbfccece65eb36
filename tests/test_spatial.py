"""Coarser pixels on coarse levels: the transfers as loops, solves against the textbook and against serial propagation.

Shape letters: `N` layers, `B` batch, `C` channels, `H`, `W`, `D` pixels.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
import reference as ref
import torch
from torch import nn

from xbraid_py import MGRIT, Adjoint, Forward, Hierarchy, LayerGrid, Solver, SpatialCoarsening
from xbraid_py.comm import SerialCommunicator
from xbraid_py.module_steps import ModuleSteps
from xbraid_py.networks.module_block import ModuleBlock, own_random_numbers
from xbraid_py.spatial import PixelTransfer, axis_matrices, galerkin_rows, kernel_matrix

N, B, C = 12, 2, 2
SIZES = {2: (6, 7), 3: (4, 5, 4)}  # odd numbers too
RESTRICT = {"states": "restrict"}


class Diffusing(nn.Module):
    """tanh of a convolution; u (B, C, X...)."""

    def __init__(self, dims: int):
        super().__init__()
        kind = {2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.convolution = kind(C, C, 3, padding=1, dtype=torch.float64)

    def forward(self, u):
        return torch.tanh(self.convolution(u))


def made(dims: int) -> tuple[ModuleBlock, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The block, weights of all layers, the first state and the last adjoint."""
    with own_random_numbers(dims):
        block = ModuleBlock(Diffusing(dims))
    theta = ref.smooth_weights(N, block.row_size, 0.3, seed=3)
    shape = (B, C, *SIZES[dims])
    return block, theta, ref.random(*shape, seed=1), ref.random(*shape, seed=2)


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
    """1x1 kernels, strides, kernels without padding, biases, normalisations; and everything if asked for."""
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


# ---- Solves


def solve(comm, dims: int, options: MGRIT, spatial: SpatialCoarsening | None, T: float = 1.0, batched: bool = False):
    """States, adjoints, gradient and both solutions of one rank, and its rows."""
    block, theta, u0, vN = made(dims)
    hierarchy = Hierarchy.plan(options, LayerGrid(N, T), comm.size)
    first = hierarchy.partition.first(comm.rank)
    rows = slice(first, first + hierarchy.partition.count(comm.rank))
    steps = ModuleSteps(block, theta[rows], T / N, tuple(range(N))[rows], batched=batched)
    transfers = spatial.transfers(u0.shape, len(hierarchy.levels)) if spatial else ()
    states = u0.new_empty((rows.stop - rows.start, *u0.shape))
    gradient = torch.empty_like(theta[rows])
    solver = Solver(options, hierarchy, comm)
    forward = solver.solve(Forward(steps, states, u0, transfers), u0)
    back = tuple(transfer and transfer.transposed() for transfer in transfers)
    adjoint = solver.solve(Adjoint(steps, states, gradient, back), vN)
    return forward, adjoint, states, gradient, rows


def serial(dims: int, T: float = 1.0):
    """States, adjoint of the first state and gradient, layer after layer, by autograd."""
    block, theta, u, vN = made(dims)
    weights, u0 = theta.clone().requires_grad_(), u.clone().requires_grad_()
    states, u = [], u0
    for row in weights:
        states.append(u)
        u = u + T / N * block([part[0] for part in block.split(row[None])], u)
    v0, gradient = torch.autograd.grad(u, (u0, weights), vN)
    return torch.stack(states).detach(), u.detach(), v0, gradient


CHOICES = [
    (2, 2, SpatialCoarsening(levels=(1,), **RESTRICT)),
    (3, 2, SpatialCoarsening(levels=(2,), interpolation="constant", weights="same", **RESTRICT)),
    (3, 2, SpatialCoarsening(levels=(1,), weights="same", **RESTRICT)),
    (2, 2, SpatialCoarsening(levels=(1,))),
    (3, 2, SpatialCoarsening(levels=(2,), interpolation="constant", weights="same")),
    (3, 2, SpatialCoarsening(levels=(1, 2))),
    (2, 3, SpatialCoarsening(levels=(1,), dims=3, **RESTRICT)),
    (2, 3, SpatialCoarsening(levels=(1,), dims=3)),
]
PLANE = range(6)


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("choice", "cycle"),
    [
        (number, cycle)
        for number, (_, _, spatial) in enumerate(CHOICES)
        for cycle in ("V", "F", "one-shot")
        if cycle != "one-shot" or spatial.states == "carry"
    ],
)
def test_converged_solve_is_the_serial_one(spmd, choice, cycle):
    levels, dims, spatial = CHOICES[choice]
    cfactors = 3 if levels == 2 else (2, 3)
    options = MGRIT(cycle=cycle, cfactor=cfactors, max_levels=levels, min_coarse=1, tol=1e-14, max_iter=30)
    states, end, v0, gradient = serial(dims)
    for forward, adjoint, own, of_weights, rows in spmd(lambda comm: solve(comm, dims, options, spatial)):
        assert torch.allclose(own, states[rows], rtol=0, atol=1e-10)
        assert torch.allclose(of_weights, gradient[rows], rtol=0, atol=1e-10)
        assert forward.end is None or torch.allclose(forward.end, end, rtol=0, atol=1e-10)
        assert adjoint.end is None or torch.allclose(adjoint.end, v0, rtol=0, atol=1e-10)
        assert len(forward.residuals) < 15


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("cycle", ["V", "F"])
@pytest.mark.parametrize("choice", PLANE)
def test_every_iteration_is_the_textbooks(spmd, choice, cycle):
    """FAS with restricted states, written out, C-points and residuals from the first guess on."""
    levels, dims, spatial = CHOICES[choice]
    cfactors = [3] if levels == 2 else [2, 3]
    block, theta, u0, vN = made(dims)
    exact = serial(dims)[0]
    transfers = spatial.transfers(u0.shape, levels)
    for start, norm in product(("coarsest", "full"), (2, "max")):
        options = MGRIT(cycle=cycle, cfactor=tuple(cfactors), max_levels=levels, min_coarse=1, start=start, norm=norm)
        options = replace(options, coarse_step="euler", max_iter=2)
        rows, h, steps, back, at, carried = theta, 1.0 / N, [], [], exact, ()
        for level in range(levels):
            if level:
                c = cfactors[level - 1]
                rows, h, at = rows.unflatten(0, (-1, c)).mean(1), h * c, at[::c]
                if (transfer := transfers[level - 1]) is not None:
                    if spatial.weights == "galerkin":
                        rows = galerkin_rows(block, rows, spatial)
                    if spatial.states == "restrict":
                        at = transfer.restrict(at)
                    else:
                        carried = (*carried, transfer)

            def one(u, row, h=h, carried=carried):
                x = u
                for transfer in carried:
                    x = transfer.restrict(x)
                x = block([part[0] for part in block.split(row[None])], x)
                for transfer in carried[::-1]:
                    x = transfer.interpolate(x)
                return u + h * x

            def transposed(v, row, u, one=one):
                u = u.clone().requires_grad_()
                return torch.autograd.grad(one(u, row), u, v)[0]

            steps.append([lambda u, row=row, one=one: one(u, row) for row in rows])
            pairs = list(zip(rows, at, strict=True))[::-1]
            back.append([lambda v, row=row, u=u, f=transposed: f(v, row, u) for row, u in pairs])
        of_states = [None if spatial.states == "carry" else each for each in transfers]
        pairs = [each and (each.restrict, each.interpolate) for each in of_states]
        turned = [each and each.transposed() for each in of_states]
        turned = [each and (each.restrict, each.interpolate) for each in turned]
        shape = (cfactors, [1] * len(cfactors), cycle)
        more = {"full": start == "full", "norm": norm}
        literal = ref.mgrit(steps, *shape, u0, 2, transfers=pairs, **more)
        parts = spmd(lambda comm, o=options: solve(comm, dims, o, spatial))
        found = torch.cat([part[0].warm[0] for part in parts])
        assert torch.allclose(found, literal[0][2], rtol=1e-11, atol=1e-12)
        assert parts[0][0].residuals == pytest.approx(literal[1], rel=1e-6, abs=1e-14)
        (end,) = [part[0].end for part in parts if part[0].end is not None]
        assert torch.allclose(end, literal[2], rtol=1e-11, atol=1e-12)

        def adjoint(comm, options=options):
            hierarchy = Hierarchy.plan(options, LayerGrid(N, 1.0), comm.size)
            first = hierarchy.partition.first(comm.rank)
            rows = slice(first, first + hierarchy.partition.count(comm.rank))
            own = ModuleSteps(block, theta[rows], 1.0 / N, tuple(range(N))[rows])
            propagator = Adjoint(own, exact[rows], None, tuple(each and each.transposed() for each in transfers))
            return Solver(options, hierarchy, comm).solve(propagator, vN)

        literal = ref.mgrit(back, *shape, vN, 2, transfers=turned, **more)
        parts = spmd(adjoint)
        found = torch.cat([part.warm[0] for part in parts])
        assert torch.allclose(found, literal[0][2].flip(0), rtol=1e-11, atol=1e-12)
        assert parts[0].residuals == pytest.approx(literal[1], rel=1e-6, abs=1e-14)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(("states", "batched"), [("carry", True), ("carry", False), ("restrict", True)])
def test_details_that_coarse_pixels_do_not_show(states, batched):
    """A checkerboard is not seen on coarse pixels: carried along, or left to relaxation. All intervals at once, too."""
    options = MGRIT(cycle="V", cfactor=2, max_levels=2, min_coarse=1, tol=1e-13, max_iter=30)
    spatial = SpatialCoarsening(states=states)
    found = solve(SerialCommunicator(), 2, options, spatial, T=0.2, batched=batched)
    wanted = serial(2, T=0.2)
    assert torch.allclose(found[2], wanted[0], rtol=0, atol=1e-11)
    assert torch.allclose(found[3], wanted[3], rtol=0, atol=1e-11)
    # With 6 intervals FCF-relaxation alone is exact after three iterations, or six where a correction spoils the rest.
    first = found[0].residuals[0]
    assert first < 0.02 if states == "carry" else first > 0.1


@pytest.mark.ranks(1, 2, 3, 5)
@pytest.mark.parametrize("states", ["carry", "restrict"])
def test_the_same_bits_on_all_ranks(spmd, states):
    options = MGRIT(cycle="V", cfactor=2, max_levels=3, min_coarse=1, max_iter=2)
    spatial = SpatialCoarsening(levels=(1,), states=states)
    parts = spmd(lambda comm: solve(comm, 2, options, spatial))
    wanted = solve(SerialCommunicator(), 2, options, spatial)
    assert torch.equal(torch.cat([part[2] for part in parts]), wanted[2])
    assert torch.equal(torch.cat([part[3] for part in parts]), wanted[3])
    assert all(part[0].residuals == wanted[0].residuals for part in parts)


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
