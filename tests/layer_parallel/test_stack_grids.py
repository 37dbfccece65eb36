"""Stacks on grids whose steps differ in length, and with fewer pixels on coarse levels: against the loop, and errors.

Shape letters: `N` layers.
"""

from __future__ import annotations

import warnings

import pytest
import torch
from blocks import CASES, UNCHECKED, C, Case, distance, gradients, loop_gradients, loss_of, reduced, unstacked
from torch import nn
from torch.utils.checkpoint import checkpoint

from xbraid_py import MGRIT, LayerGrid, LayerParallel, SpatialCoarsening, to_sequential, world

RANKS = pytest.mark.ranks(1, 2, 3, 5)
LENGTHS = (3, 1, 1, 2, 1, 4, 4, 1, 2, 2, 1, 1)
GRID = LayerGrid.of_lengths(LENGTHS, 2.0)
V = {"cycle": "V", "min_coarse": 1, "tol": 1e-14, "max_iter": 25}
SOLVES = {
    "exact": MGRIT(max_levels=1),
    "V": MGRIT(cfactor=(2, 3), max_levels=3, **V),
    "F midpoint": MGRIT(cfactor=3, max_levels=2, **{**V, "cycle": "F"}),
    "lagged": MGRIT(cfactor=3, max_levels=2, min_coarse=1, tol=1e-15, max_iter=12),
}


def looped(state, case, u, sizes):
    """Output, gradients of input and weights of u_{n+1} = u_n + h_n F_n(u_n)."""
    modules = unstacked(state, case)
    start = u.clone().requires_grad_()
    x = start
    for module, h in zip(modules, sizes, strict=True):
        x = x + h * module(x)
    loss_of(x).backward()
    return x.detach(), start.grad, loop_gradients(modules)


def solved(stack, u):
    start = u.clone().requires_grad_()
    output = stack(start)
    loss_of(output).backward()
    return output.detach(), start.grad, gradients(stack)


def far(found, wanted) -> float:
    return max(distance(a, b) for a, b in zip(found, wanted, strict=True))


@RANKS
@pytest.mark.parametrize("solve", SOLVES)
@pytest.mark.parametrize("block", ["dense", "mlp", "convolution"])
def test_grids_with_steps_of_all_lengths(spmd, block, solve):
    """The dense block steps through the kernels, the others through modules."""
    case = CASES[block]

    def body(comm):
        stack = LayerParallel(case.block, GRID, comm=comm, mgrit=SOLVES[solve], accuracy=UNCHECKED, vmap=False)
        state = stack.state_dict()
        found, exact = solved(stack, case.input()), looped(state, case, case.input(), GRID.sizes())
        plain = to_sequential(stack)
        with torch.no_grad():
            end = plain(case.input())
            evaluated = stack.eval()(case.input())
        return far(found, exact), distance(end, exact[0]), distance(evaluated, exact[0])

    for error, exported, evaluated in spmd(body):
        assert error < 1e-10 and exported < 1e-13 and evaluated < 1e-13


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_all_intervals_at_once():
    case = CASES["convolution"]
    stack = LayerParallel(case.block, GRID, mgrit=SOLVES["V"], accuracy=UNCHECKED, vmap=True)
    assert far(solved(stack, case.input()), looped(stack.state_dict(), case, case.input(), GRID.sizes())) < 1e-10


@RANKS
def test_equal_lengths_are_no_lengths(spmd):
    """The same bits as with a number of layers."""
    case = CASES["mlp"]

    def body(comm):
        grids = (12, 2.0), (LayerGrid.of_lengths((5,) * 12, 2.0),)
        stacks = [LayerParallel(case.block, *grid, comm=comm, accuracy=UNCHECKED, vmap=False) for grid in grids]
        first, second = (solved(stack, case.input()) for stack in stacks)
        return torch.equal(first[0], second[0]) and all(torch.equal(first[2][n], second[2][n]) for n in first[2])

    assert all(spmd(body))


@RANKS
@pytest.mark.parametrize("states", ["carry", "restrict"])
@pytest.mark.parametrize("windows", [1, 2])
def test_fewer_pixels_on_coarse_levels(spmd, states, windows):
    case = CASES["convolution"]
    spatial = SpatialCoarsening(states=states, levels=(1,))

    def body(comm):
        how = {"comm": comm, "mgrit": MGRIT(cfactor=2, max_levels=2, **V), "accuracy": UNCHECKED, "vmap": False}
        stack = LayerParallel(case.block, 12, 2.0, windows=windows, spatial=spatial, **how)
        found = solved(stack, case.input())
        records = stack.records
        assert all(len(record.residuals) >= 2 and record.residuals[0] > 1e-4 for record in records)
        assert all(record.residuals[-1] == record.residual < 1e-13 for record in records)
        assert all(record.adjoint_residuals[-1] == record.adjoint_residual for record in records)
        return far(found, looped(stack.state_dict(), case, case.input(), [2.0 / 12] * 12))

    assert max(spmd(body)) < 1e-10


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize(
    ("block", "options", "words"),
    [
        ("convolution", {"spatial": SpatialCoarsening(states="restrict")}, "states='restrict' is for V- and F-cycles"),
        (
            "convolution",
            {"spatial": SpatialCoarsening(states="restrict"), "mgrit": MGRIT(cycle="V", nrelax=0)},
            "nrelax=0 leaves what coarse pixels do not show as it is with states='restrict'; use nrelax=1",
        ),
        ("convolution", {"spatial": SpatialCoarsening(dims=3)}, "cannot be evaluated for states (6, 2, 3, 2)"),
        ("mlp", {"spatial": SpatialCoarsening()}, "dims=2 pixel axes need a state of more axes than (6, 4)"),
        ("attention", {"spatial": SpatialCoarsening()}, "cannot be evaluated for states (6, 2, 2)"),
        ("dense sequences", {"spatial": SpatialCoarsening()}, "a DenseBlock has no pixels"),
    ],
)
def test_bad_choices(spmd, block, options, words):
    case = CASES[block]

    def body(comm):
        made = {"accuracy": UNCHECKED, "vmap": False, "mgrit": MGRIT(cfactor=2), **options}
        return reduced(comm, lambda: LayerParallel(case.block, 12, 2.0, comm, **made)(case.input()))

    found = spmd(body)
    assert len(set(found)) == 1, "the same on all ranks"
    assert found[0] is not None and words in found[0], found[0]


class Checkpointed(nn.Module):
    """A block that saves memory by itself."""

    def __init__(self, use_reentrant: bool):
        super().__init__()
        self.linear, self.use_reentrant = nn.Linear(C, C), use_reentrant

    def forward(self, u):
        return checkpoint(lambda x: torch.tanh(self.linear(x)), u, use_reentrant=self.use_reentrant)


@pytest.mark.ranks(1, 3)
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_blocks_that_are_evaluated_again_backwards(spmd, use_reentrant):
    """They would be, with the weights of another layer, and give a wrong gradient without a word."""
    case = Case(lambda: Checkpointed(use_reentrant), (6, C))
    found = spmd(lambda comm: reduced(comm, lambda: case.stack(comm, num_layers=9)(case.input())))
    assert len(set(found)) == 1 and "block=Checkpointed is evaluated again in the backward pass" in found[0]
    assert "recompute=True" in found[0]


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize(
    ("options", "num_layers", "is_told"),
    [
        ({}, 16, True),
        ({"mgrit": MGRIT(cycle="V")}, 12, True),
        ({}, 32, False),
        ({"mgrit": MGRIT(max_levels=1)}, 16, False),
        ({"mgrit": MGRIT(cycle="pipeline")}, 16, False),
        ({"serial_ends": (2, 2)}, 36, False),
    ],
)
def test_ranks_that_take_turns_are_told_so(spmd, options, num_layers, is_told):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sizes = spmd(lambda comm: (LayerParallel(CASES["mlp"].block, num_layers, comm=comm, **options), comm.size)[1])
        said = [str(each.message) for each in said if "take turns" in str(each.message)]
    # Over MPI ranks have warnings of their own, and the first one is told.
    assert len(said) == (is_told and sizes[0] > 1 and world().rank == 0)
    assert all(f"{num_layers} layers are too few" in each and "cycle='pipeline'" in each for each in said)
