"""Batch normalization in stacks: its statistics move once per update, and nothing else changes.

Shape letters: `N` layers.
"""

from __future__ import annotations

import pytest
import torch
from blocks import Case, distance, gradients, loss_of
from normed import SHAPES, Literal, N, Normed, T, batch, case_of, equal, reference, trained
from torch import nn

from xbraid_py import MGRIT, GradientControl, to_sequential

ROUGH = MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=1, nrelax=0)
BATCHED = pytest.mark.filterwarnings("ignore:There is a performance drop")


@BATCHED
@pytest.mark.parametrize(
    ("dims", "solve", "vmap", "recompute"),
    [
        (1, "exact", False, False),
        (1, "V", True, False),
        (1, "V", False, "states"),
        (2, "one-shot 3", False, True),
        (2, "V", True, "all"),
        (3, "V", False, False),
    ],
)
def test_three_updates_equal_the_literal_loop(spmd, dims, solve, vmap, recompute):
    case = case_of(dims)

    def body(comm):
        return trained(case.stack(comm, N, T, solve, vmap=vmap, recompute=recompute), case)

    results = spmd(body)
    exact = reference(results[0][0], case, dims)
    names = [name for name in exact[0]["state"] if "running" in name]
    assert all(distance(exact[0]["state"][name], exact[2]["state"][name]) > 1e-2 for name in names), "they move"
    for _, found in results:
        equal(found, exact)


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("options", [{"momentum": None}, {"momentum": 1.0}, {"affine": False}])
def test_momentum_and_weights_of_the_norm(spmd, options):
    case = case_of(1, **options)
    results = spmd(lambda comm: trained(case.stack(comm, N, T, "V"), case))
    exact = reference(results[0][0], case, 1, options.get("momentum", 0.3))
    for _, found in results:
        equal(found, exact)


@BATCHED
@pytest.mark.ranks(2, 3, 5)
@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("mgrit", [ROUGH, MGRIT(cfactor=3, max_iter=1)])
def test_same_bits_on_any_number_of_ranks(spmd, vmap, mgrit):
    """Far from converged, with the exact gradient of every update beside."""
    case = case_of(2)

    def body(comm):
        options = {"mgrit": mgrit, "accuracy": GradientControl(check=1, adapt=False), "vmap": vmap}
        return trained(case.stack(comm, N, T, **options), case)[1]

    serial = body(None)
    for found in spmd(body):
        for mine, wanted in zip(found, serial, strict=True):
            assert mine["output"].equal(wanted["output"]) and mine["input"].equal(wanted["input"])
            assert all(mine["state"][name].equal(value) for name, value in wanted["state"].items())


@pytest.mark.ranks(1, 3)
@BATCHED
@pytest.mark.parametrize("options", [{}, {"recompute": True}, {"recompute": "states"}, {"vmap": True}])
def test_statistics_move_once_however_often_the_layers_are_evaluated(spmd, options):
    """A tolerance, so that many sweeps are recorded; an exact gradient, retained graphs, a second backward pass."""
    case = case_of()
    many = MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=5, tol=1e-13)

    def body(comm):
        stack = case.stack(comm, N, T, mgrit=many, accuracy=GradientControl(check=1, adapt=False), **options)
        start = {name: value.clone() for name, value in stack.state_dict().items()}
        loss = loss_of(stack(batch(case, 0)))
        before = {name: value.clone() for name, value in stack.state_dict().items()}
        loss.backward(retain_graph=True)
        once = gradients(stack)
        loss.backward()
        after = stack.state_dict()
        return start, before, all(after[name].equal(value) for name, value in before.items()), once, gradients(stack)

    results = spmd(body)
    literal = Literal(results[0][0], 1)
    loss_of(literal.propagate(batch(case, 0))).backward()
    for _, before, unchanged, once, twice in results:
        assert unchanged and before["layers.norm.num_batches_tracked"].tolist() == [1] * N
        assert distance(before["layers.norm.running_var"], literal.variance) < 1e-10
        for name, value in once.items():
            assert distance(value, literal.weights[f"layers.{name}"].grad) < 1e-10
            assert distance(twice[name], 2.0 * value) < 1e-12


@pytest.mark.ranks(1, 3)
@pytest.mark.parametrize("recompute", [False, "states"])
def test_an_adjoint_meets_the_statistics_of_its_own_call(spmd, recompute):
    """Two calls, that is two updates of the statistics, before the gradient of the first one."""
    case = case_of()

    def body(comm):
        stack = case.stack(comm, N, T, "V", recompute=recompute)
        start = {name: value.clone() for name, value in stack.state_dict().items()}
        first, _ = (loss_of(stack(batch(case, update))) for update in range(2))
        first.backward()
        return start, gradients(stack), stack.state_dict()["layers.norm.running_mean"]

    results = spmd(body)
    literal = Literal(results[0][0], 1)
    loss_of(literal.propagate(batch(case, 0))).backward()
    literal.propagate(batch(case, 1))
    for _, found, mean in results:
        assert distance(mean, literal.mean) < 1e-10
        assert distance(found, {name: literal.weights[f"layers.{name}"].grad for name in found}) < 1e-10


@pytest.mark.ranks(1, 3)
def test_where_statistics_stay_as_they_are(spmd):
    case = case_of()

    def body(comm):
        stack = case.stack(comm, N, T, "V")
        start = {name: value.clone() for name, value in stack.state_dict().items()}
        loss_of(stack.eval()(batch(case, 0))).backward()
        with torch.no_grad():
            stack(batch(case, 1))
        evaluated = {name: value.clone() for name, value in stack.state_dict().items()}
        with torch.no_grad():
            output = stack.train()(batch(case, 2))
        return start, all(evaluated[name].equal(value) for name, value in start.items()), output, stack.state_dict()

    results = spmd(body)
    literal = Literal(results[0][0], 1)
    wanted = literal.propagate(batch(case, 2)).detach()
    for _, unchanged, output, after in results:
        assert unchanged
        # As those of torch: training mode moves them, whether there are gradients or not.
        assert distance(output, wanted) < 1e-10 and distance(after["layers.norm.running_mean"], literal.mean) < 1e-10


@pytest.mark.ranks(1, 3)
def test_a_norm_that_is_frozen_before_the_block_is_handed_over_never_moves(spmd):
    def make():
        block = Normed()
        nn.init.uniform_(block.norm.running_mean, -0.5, 0.5)
        block.norm.eval()
        return block

    case = Case(make, SHAPES[1])

    def body(comm):
        stack = case.stack(comm, N, T, "V")
        start, record = trained(stack.eval().train(), case)
        plain = to_sequential(stack).train()
        return start, record, [step.block.norm.training for step in plain]

    for start, record, modes in spmd(body):
        for name in ("layers.norm.running_mean", "layers.norm.running_var", "layers.norm.num_batches_tracked"):
            assert record[-1]["state"][name].equal(start[name])
        assert len({tuple(row.tolist()) for row in start["layers.norm.running_mean"]}) == N and not any(modes)


def test_a_rough_solve_starts_from_the_statistics_of_exact_states(spmd):
    """The pass of the first update is layer after layer, whatever the solver does afterwards."""
    case = case_of(momentum=0.0)

    def body(comm):
        stack = case.stack(comm, N, T, mgrit=ROUGH)
        start = {name: value.clone() for name, value in stack.state_dict().items()}
        stack(batch(case, 0))
        return start, stack.state_dict()

    results = spmd(body)
    literal = Literal(results[0][0], 1, 1e-300)
    literal.propagate(batch(case, 0))
    for _, found in results:
        assert distance(found["layers.norm.running_mean"], literal.mean) < 1e-12
        assert distance(found["layers.norm.running_var"], literal.variance) < 1e-12
