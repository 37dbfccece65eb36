"""Steps of torch modules: values, transposed Jacobians, kept graphs and masks, against autograd row by row.

Shape letters: `n` rows, `c` rows of an interval, `m = n / c` intervals, `S` shape of a state, `p` numbers of a row.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import reference as ref
import torch
from blocks import CASES, UNCHECKED, B, C, Case, distance, gradients, loss_of
from torch import nn

from xbraid_py import MGRIT, DenseBlock, GradientControl, LayerGrid, ResidualSteps
from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.module_steps import ModuleSteps, Tape, has_batched_form
from xbraid_py.layers.norm_dropout import at_position
from xbraid_py.nn import Dropout

n, c, h = 8, 4, 0.3
KINDS = ["mlp", "convolution", "attention", "tied", "frozen"]
BOTH = pytest.mark.parametrize("vmap", [False, True])
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def made(name: str, **options) -> tuple[ModuleSteps, Case]:
    """Rows of other weights each."""
    case = CASES[name]
    torch.manual_seed(4)
    block = ModuleBlock(case.block())
    blocks = [case.block() for _ in range(n)]
    theta = torch.cat([block.join([tensor[None] for tensor in block.tensors_of(module)]) for module in blocks])
    return ModuleSteps(block, theta, h, tuple(range(n)), **options), case


def increment(steps: ModuleSteps, case: Case, row: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """h F(x) or h F(x + h/2 F(x)) with a row (p,) of weights, in a module of its own."""
    parts = row.split([column.size for column in steps.block.columns])
    # Statistics have no derivative.
    weights = {
        column.name: (part if column.is_parameter else part.detach()).reshape(column.shape)
        for column, part in zip(steps.block.columns, parts, strict=True)
    }
    module = case.block()

    def field_of(x):
        return torch.func.functional_call(module, weights, (x,))

    return steps.h * (field_of(x) if steps.scheme == "euler" else field_of(x + steps.h / 2 * field_of(x)))


@BOTH
@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize(("scheme", "parts"), [("euler", 1), ("midpoint", 1), ("euler", 2)])
@pytest.mark.parametrize("corrected", [False, True])
def test_relaxation_and_its_adjoint(name, scheme, parts, corrected, vmap):
    """Intervals of 4 rows: 4 steps, or 2 of two parts each; adjoints at states that belong to no trajectory."""
    steps, case = made(name, scheme=scheme, parts=parts, vmap=vmap)
    length, m = c // parts, n // c
    points, states = ref.random(m, *case.shape, seed=1), ref.random(n, *case.shape, seed=2)
    tau = 0.1 * ref.random(m * length, *case.shape, seed=3) if corrected else None
    empty = torch.empty(m * length, *case.shape, dtype=torch.float64)
    inputs, wanted = empty.clone(), empty.clone()
    ends = points.clone()
    for step in range(m * length):
        wanted[step] = ends[step // length]
        for row in range(step * parts, (step + 1) * parts):
            ends[step // length] += increment(steps, case, steps.theta[row], ends[step // length]).detach()
        if corrected:
            ends[step // length] += tau[step]
    assert distance(steps.relax(points, length, tau, inputs), ends) < 1e-13 and distance(inputs, wanted) < 1e-13

    gradient = exact = torch.full_like(steps.theta, torch.nan)
    gradient = exact.clone()
    ends = points.clone()
    for step in reversed(range(m * length)):
        wanted[step] = ends[step // length]
        for row in reversed(range(step * parts, (step + 1) * parts)):
            u, theta = states[row].clone().requires_grad_(), steps.theta[row].clone().requires_grad_()
            back, exact[row] = torch.autograd.grad(increment(steps, case, theta, u), (u, theta), ends[step // length])
            ends[step // length] += back
        if corrected:
            ends[step // length] += tau[step]
    assert distance(steps.relax_adjoint(states, points, length, tau, inputs, gradient), ends) < 1e-13
    assert distance(inputs, wanted) < 1e-13 and distance(gradient, exact) < 1e-13
    assert distance(steps.relax_adjoint(states, points, length, tau), ends) < 1e-13


@BOTH
@pytest.mark.parametrize("name", KINDS)
def test_kept_graphs_give_the_same_as_another_evaluation(name, vmap):
    """Also when intervals of the adjoint are made of several graphs, and after another relaxation was recorded."""
    steps, case = made(name, vmap=vmap)
    taped = replace(steps, tape=Tape())
    for length, longer in ((c, c), (2, 2), (2, c)):
        m = n // length
        points, adjoints = ref.random(m, *case.shape, seed=length), ref.random(n // longer, *case.shape, seed=2)
        states = torch.empty(n, *case.shape, dtype=torch.float64)
        if longer > length:  # one trajectory through all intervals of the longer kind
            steps.relax(points[: n // longer], longer, None, states)
            points = states[::length].clone()
        ends = taped.relax(points, length, None, states, record=True)
        assert ends.equal(steps.relax(points, length)) and taped.tape.graphs
        found, wanted = torch.empty_like(steps.theta), torch.empty_like(steps.theta)
        v = taped.relax_adjoint(states, adjoints, longer, gradient=found)
        assert distance(v, steps.relax_adjoint(states, adjoints, longer, gradient=wanted)) < 1e-13
        assert distance(found, wanted) < 1e-13
        assert distance(taped.relax_adjoint(states, adjoints, longer), v) < 1e-13, "more than once"


@BOTH
@pytest.mark.parametrize("weights", ["inject", "average"])
@pytest.mark.parametrize(("scheme", "parts"), [("euler", 1), ("midpoint", 1), ("euler", 2)])
def test_the_same_as_the_native_steps_of_a_dense_block(weights, scheme, parts, vmap):
    """Both levels; the state of the native steps has the features first, and a row has the weights in its order."""
    torch.manual_seed(4)
    dense = DenseBlock(C, "tanh").double()
    block = ModuleBlock(dense)
    theta = ref.random(n, block.row_size, seed=1)
    points, gradients_of = ref.random(n // c, 5, C, seed=2), []
    for steps, way in (
        (ModuleSteps(block, theta, h, tuple(range(n)), vmap=vmap), lambda x: x),
        (ResidualSteps(dense.layer, theta, h), lambda x: x.transpose(-1, -2).contiguous()),
    ):
        coarse = steps.coarsen(c, weights, scheme, parts)
        states = ref.random(parts * n // c, 5, C, seed=3)
        gradient = torch.empty_like(coarse.theta)
        ends = coarse.relax(way(points), 1, None, None)
        back = coarse.relax_adjoint(way(states), way(points), 1, None, None, gradient)
        fine = steps.relax(way(points), c, None, None)
        gradients_of.append((way(ends), way(back), gradient, way(fine), torch.tensor(coarse.cost)))
    assert all(distance(a, b) < 1e-13 for a, b in zip(*gradients_of, strict=True))


def test_coarse_steps_of_long_intervals_are_of_first_order():
    """Halving the step halves the distance of the coarse step to the fine ones, divided by its length."""
    case = CASES["mlp"]
    errors = []
    for N in (256, 512):
        block = ModuleBlock(case.block())
        row = 0.3 * ref.random(block.row_size, seed=1)
        # Weights that are smooth in depth, the same function of time at both depths.
        grid = LayerGrid(N, 4.0)
        theta = row * torch.cos(torch.arange(N, dtype=torch.float64) * grid.h)[:, None]
        steps = ModuleSteps(block, theta, grid.h, tuple(range(N)))
        x = ref.random(1, *case.shape, seed=2)
        fine, coarse = steps.relax(x, 4), steps.coarsen(4, "inject", "euler").relax(x, 1)
        errors.append(float((fine - coarse).norm()))
    assert 3.5 < errors[0] / errors[1] < 4.5, "of second order in one step"


def test_columns_of_a_block():
    block = ModuleBlock(CASES["tied"].block())
    names = {column.name: tuple(column.shape) for column in block.columns}
    assert names == {"factor": (), "first.weight": (C, C), "first.bias": (C,), "second.bias": (C,)}
    theta = ref.random(3, block.row_size, seed=1)
    assert [tuple(x.shape) for x in block.split(theta)] == [(3, *shape) for shape in names.values()]
    assert block.join(block.split(theta)).equal(theta) and block.join(block.split(theta[:0])).shape == theta[:0].shape
    before = {name: p for name, p in block.module.named_parameters()}
    block([x[0] for x in block.split(theta)], CASES["tied"].input())
    after = dict(block.module.named_parameters())
    assert all(after[name] is p for name, p in before.items()), "the module is left as it was"
    with pytest.raises(RuntimeError):
        block([x[0] for x in block.split(theta)], torch.zeros(2, C + 1, dtype=torch.float64))
    assert all(dict(block.module.named_parameters())[name] is p for name, p in before.items()), "after an error too"


class Looking(nn.Module):
    """Looks at a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(C, C)

    def forward(self, u):
        return self.linear(u) if u.sum().item() > 0 else -self.linear(u)


@pytest.mark.parametrize(("name", "found"), [("mlp", True), ("convolution", True), ("attention", False), (None, False)])
def test_which_blocks_have_a_batched_form(name, found, recwarn):
    case = CASES[name] if name else Case(Looking, (B, C))
    assert has_batched_form(ModuleBlock(case.block()), case.input()) is found
    assert not recwarn.list


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_the_share_of_dropout_is_checked(p):
    with pytest.raises(ValueError, match="must be at least 0 and below 1; use 0.1"):
        Dropout(p)


def mask(layer: int = 0, draw: int = 0, seed: int = 0, number: int = 0) -> tuple:
    part = Dropout(0.4)
    part.number = number
    with at_position(seed, draw, layer):
        first, second = part(torch.ones(50)), part(torch.ones(50))
    assert first.equal(second), "the same at the same place"
    assert set(first.unique().tolist()) == set(torch.tensor([0.0, 1.0 / 0.6]).tolist())
    return tuple(first.tolist())


def test_masks_differ_between_layers_updates_seeds_and_places():
    places = [{}, {"layer": 1}, {"layer": 2}, {"draw": 1}, {"draw": 2}, {"seed": 1}, {"number": 1}]
    assert len({mask(**place) for place in places}) == len(places)


def test_share_of_zeros_and_the_mean_are_kept():
    with at_position(0, 1, 2):
        found = Dropout(0.3)(torch.ones(20000))
    assert (found == 0).double().mean() == pytest.approx(0.3, abs=0.02) and found.mean() == pytest.approx(1, abs=0.03)
    u = torch.ones(10)
    assert Dropout(0.3).eval()(u) is u and Dropout(0.0)(u) is u


def test_elsewhere_it_is_the_dropout_of_torch():
    torch.manual_seed(0)
    found = Dropout(0.5)(torch.ones(40))
    torch.manual_seed(0)
    assert found.equal(torch.nn.functional.dropout(torch.ones(40), 0.5)) and (found == 0).any()


# ---- Dropout in a stack


def update(stack, u) -> tuple[torch.Tensor, dict]:
    """Output and gradients of one update."""
    stack.zero_grad()
    output = stack(u)
    loss_of(output).backward()
    return output.detach(), gradients(stack)


@pytest.mark.ranks(1, 2)
def test_an_exact_gradient_is_that_of_the_same_update(spmd):
    """Two calls before the first adjoint solve, which measures its error: its masks are those of its own call."""
    case = CASES["dropout"]
    rough = MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=1, nrelax=0)

    def body(comm):
        found = []
        options = (
            {"mgrit": rough, "accuracy": GradientControl(check=1, adapt=False)},
            {"solve": "exact", "accuracy": UNCHECKED},
        )
        slope = ref.random(*case.shape, seed=5)
        for own in options:
            stack = case.stack(comm, 9, **own)
            first, _ = stack(case.input(1)), stack(case.input(2))
            first.backward(slope)
            found.append(gradients(stack))
        return found

    for measured, exact in spmd(body):
        assert distance(measured, exact) < 1e-12
