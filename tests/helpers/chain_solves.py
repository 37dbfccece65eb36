"""Chains of dense layers, solved by MGRIT on the ranks of a communicator and by the literal references."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import pytest
import reference as ref
import torch
from torch import Tensor

from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.mgrit import MGRIT, Hierarchy, Solution, Solver
from xbraid_py.mgrit.equations import Adjoint, Forward
from xbraid_py.mgrit.grid import LayerGrid

ALL_RANKS = pytest.mark.ranks(1, 2, 3, 5, 8)


@cache
def chain(num_layers: int, activation="tanh", T=1.0, rough=0.3, width=3, batch=2, scale=0.7) -> ref.Chain:
    """A random network with its literal solution."""
    theta = ref.smooth_weights(num_layers, width * width + width, scale, seed=1, rough=rough)
    u0, vN = ref.random(2, width, batch, seed=2)
    made = ref.Chain(theta, T / num_layers, activation, u0, vN)
    assert len(made.solved[0]) == num_layers + 1  # solved here, before any thread asks for it
    return made


@dataclass
class Solved:
    """What one rank has of a state and an adjoint solve."""

    forward: Solution
    adjoint: Solution
    states: Tensor
    gradient: Tensor
    rows: slice
    """Rows of the network that are owned here."""


def options_for(**options) -> MGRIT:
    return MGRIT(**{"cycle": "V", "min_coarse": 1, "coarse_step": "euler", **options})


def solve(comm, options: MGRIT, case: ref.Chain, guess=None, max_iter=None) -> Solved:
    """States and adjoints of a chain; `guess` are C-points of both owned here."""
    count, (width, _) = len(case.theta), case.u0.shape
    hierarchy = Hierarchy.plan(options, LayerGrid(count, case.h * count), comm.size)
    first = hierarchy.partition.first(comm.rank)
    rows = slice(first, first + hierarchy.partition.count(comm.rank))
    block = DenseLayer(width, width, case.activation)
    steps = ResidualSteps(block, case.theta[rows], case.h)
    states = torch.full((rows.stop - rows.start, *case.u0.shape), torch.nan, dtype=torch.float64)
    gradient = torch.full((rows.stop - rows.start, block.num_parameters), torch.nan, dtype=torch.float64)
    made = Solver(options, hierarchy, comm)
    # The first state is only looked at where the first layer is, the last adjoint where the last one is.
    u0 = case.u0 if rows.start == 0 and rows.stop > 0 else None
    vN = case.vN if rows.stop == count and rows.start < count else None
    guesses = tuple((points,) for points in guess) if guess else (None, None)
    forward = made.solve(Forward(steps, states, case.u0), u0, guesses[0], max_iter=max_iter)
    adjoint = made.solve(Adjoint(steps, states, gradient), vN, guesses[1], max_iter=max_iter)
    return Solved(forward, adjoint, states, gradient, rows)


def joined(parts: list[Tensor | None]) -> Tensor:
    return torch.cat([part for part in parts if part is not None])


def same_bits(parts: list[Tensor | None], expected: Tensor) -> bool:
    """Whether what the ranks have of something is, joined, what a serial run has."""
    return torch.equal(joined(parts), expected)


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max()) if found.numel() else 0.0


def deviation(solved: Solved, case: ref.Chain) -> float:
    """Largest relative error of states, outputs and gradient owned here."""
    states, adjoints, gradient = case.solved
    errors = [error(solved.states, states[solved.rows]), error(solved.gradient, gradient[solved.rows])]
    if solved.forward.end is not None:
        errors.append(error(solved.forward.end, states[-1]))
    if solved.adjoint.end is not None:
        errors.append(error(solved.adjoint.end, adjoints[0]))
    # NaN must not get lost in the maximum.
    return max((e if e == e else float("inf")) for e in errors)


def chains_and_states(options, case):
    """The chain and its exact states on every level, and what the textbook calls the shape of a solve."""
    grid = LayerGrid(len(case.theta), case.h * len(case.theta))
    levels = Hierarchy.plan(options, grid, 1).levels[:-1]
    chains, states = [case], [case.solved[0][:-1]]
    for level in levels:
        chains.append(chains[-1].coarsen(level.cfactor, options.coarse_weights, options.coarse_step))
        states.append(states[-1][:: level.cfactor])
    return chains, states, ([level.cfactor for level in levels], [level.nrelax for level in levels], options.cycle)


def both_solves(comm, options, case):
    """States, and adjoints linearized at the literal states, so that both can be looked at alone."""
    count, width = len(case.theta), len(case.u0)
    hierarchy = Hierarchy.plan(options, LayerGrid(count, case.h * count), comm.size)
    first = hierarchy.partition.first(comm.rank)
    rows = slice(first, first + hierarchy.partition.count(comm.rank))
    steps = ResidualSteps(DenseLayer(width, width, case.activation), case.theta[rows], case.h)
    exact, made = case.solved[0][:-1][rows], Solver(options, hierarchy, comm)
    forward = made.solve(Forward(steps, torch.empty_like(exact), case.u0), case.u0)
    return forward, made.solve(Adjoint(steps, exact, torch.empty_like(case.theta[rows])), case.vN)
