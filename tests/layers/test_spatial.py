"""Coarser pixels on coarse levels: solves against the textbook and against serial propagation.

Shape letters: `N` layers, `B` batch, `C` channels, `H`, `W`, `D` pixels.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference as ref
import torch
from spatial_cases import RESTRICT, N, made

from xbraid_py import MGRIT, Adjoint, Forward, Hierarchy, LayerGrid, Solver, SpatialCoarsening
from xbraid_py.comm import SerialCommunicator
from xbraid_py.layers.module_steps import ModuleSteps
from xbraid_py.layers.pixels import galerkin_rows


def solve(comm, dims: int, options: MGRIT, spatial: SpatialCoarsening | None, T: float = 1.0, vmap: bool = False):
    """States, adjoints, gradient and both solutions of one rank, and its rows."""
    block, theta, u0, vN = made(dims)
    hierarchy = Hierarchy.plan(options, LayerGrid(N, T), comm.size)
    first = hierarchy.partition.first(comm.rank)
    rows = slice(first, first + hierarchy.partition.count(comm.rank))
    steps = ModuleSteps(block, theta[rows], T / N, tuple(range(N))[rows], vmap=vmap)
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
        for cycle in ("V", "F", "lagged")
        if cycle != "lagged" or spatial.states == "carry"
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


@pytest.mark.ranks(3, long=(1,))
@pytest.mark.parametrize("cycle", ["V", "F"])
@pytest.mark.parametrize("choice", PLANE)
def test_every_iteration_is_the_textbooks(spmd, choice, cycle):
    """FAS with restricted states, written out, C-points and residuals from the first guess on."""
    levels, dims, spatial = CHOICES[choice]
    cfactors = [3] if levels == 2 else [2, 3]
    block, theta, u0, vN = made(dims)
    exact = serial(dims)[0]
    transfers = spatial.transfers(u0.shape, levels)
    for start, norm in (("coarsest", "max"), ("full", 2)):
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
@pytest.mark.parametrize(("states", "vmap"), [("carry", True), ("carry", False), ("restrict", True)])
def test_details_that_coarse_pixels_do_not_show(states, vmap):
    """A checkerboard is not seen on coarse pixels: carried along, or left to relaxation. All intervals at once, too."""
    options = MGRIT(cycle="V", cfactor=2, max_levels=2, min_coarse=1, tol=1e-13, max_iter=30)
    spatial = SpatialCoarsening(states=states)
    found = solve(SerialCommunicator(), 2, options, spatial, T=0.2, vmap=vmap)
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
