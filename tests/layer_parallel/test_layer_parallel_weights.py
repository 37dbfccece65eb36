"""The weights of a stack: where they are, how they start, and how they are saved, whatever the number of ranks."""

from __future__ import annotations

import pytest
import torch
from blocks import CASES, SOLVES, C, Case, distance, gradients, linear, loop, loss_of, reduced, unstacked
from torch import nn

from xbraid_py import LayerParallel, clip_grad_norm_
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.testing import run_threads

RANKS = pytest.mark.ranks(1, 2, 3, 4)
# With learnable weights and statistics, with a number, with two places for one matrix.
KINDS = ["dense", "convolution", "tied", "frozen"]


@RANKS
@pytest.mark.parametrize("block", KINDS)
@pytest.mark.parametrize("num_layers", [9, 12])
def test_every_layer_lives_on_one_rank(spmd, block, num_layers):
    case = CASES[block]

    def body(comm):
        stack = case.stack(comm, num_layers, solve="V")
        shapes = {name: tuple(p.shape) for name, p in stack.named_parameters()}
        return shapes, list(stack.own_layers), stack.first_rank, stack.last_rank

    results = spmd(body)
    assert [n for _, own, _, _ in results for n in own] == list(range(num_layers))
    for shapes, own, first, last in results:
        wanted = {f"layers.{name}": (len(own), *p.shape) for name, p in case.block().named_parameters()}
        assert shapes == wanted
        assert 0 in results[first][1] and num_layers - 1 in results[last][1]


@RANKS
@pytest.mark.parametrize("block", KINDS)
def test_state_is_global_and_can_be_loaded_on_any_number_of_ranks(spmd, block):
    case = CASES[block]

    def body(comm):
        model = nn.Sequential(case.stack(comm, 9, seed=1))
        other = case.stack(comm, 9, seed=2)
        before = {key: value.clone() for key, value in other.state_dict().items()}
        found = model.state_dict()
        loaded = other.load_state_dict({key.removeprefix("0."): value for key, value in found.items()})
        assert not loaded.missing_keys and not loaded.unexpected_keys
        with torch.no_grad():
            output = other.eval()(case.input())
        return found, before, other.state_dict(), output

    # Written by one process, read by the ranks; the other way round below.
    serial = case.stack(None, 9, seed=1)
    weights = serial.state_dict()
    exact = loop(unstacked(weights, case), case.input()).detach()
    for found, before, after, output in spmd(body):
        assert found.keys() == {f"0.{key}" for key in weights}
        assert any(not before[key].equal(value) for key, value in weights.items())
        for key, value in weights.items():
            assert found[f"0.{key}"].equal(value) and after[key].equal(value) and value.shape[0] == 9
        assert distance(output, exact) < 1e-14
        alone = case.stack(None, 9, seed=3)
        alone.load_state_dict(after)
        assert all(alone.state_dict()[key].equal(value) for key, value in weights.items())


@RANKS
def test_state_of_another_depth_or_block_is_refused(spmd):
    case = CASES["mlp"]

    def body(comm):
        stack = case.stack(comm, 9)
        deeper = case.stack(comm, 12).state_dict()
        other = CASES["tied"].stack(comm, 9).state_dict()
        part = stack.state_dict()
        del part["layers.net.1.weight"]
        before = stack.state_dict()
        before = {key: value.clone() for key, value in before.items()}
        wrong = [reduced(comm, lambda state=state: stack.load_state_dict(state)) for state in (deeper, other, part)]
        partly = stack.load_state_dict(part, strict=False)
        return wrong, partly.missing_keys, all(stack.state_dict()[key].equal(value) for key, value in before.items())

    for (deeper, other, part), missing, unchanged in spmd(body):
        assert deeper.startswith("RuntimeError: Error(s) in loading state_dict")
        assert "layers.net.1.weight has 12 layers, the stack has 9" in deeper
        assert "Unexpected key" in other and "layers.factor" in other
        assert "Missing key" in part and "layers.net.1.weight" in part
        assert missing == ["layers.net.1.weight"] and unchanged


@RANKS
@pytest.mark.parametrize("block", KINDS)
def test_first_weights_depend_on_seed_and_layer_alone(spmd, block):
    case = CASES[block]

    def body(comm):
        return {(N, seed): case.stack(comm, N, seed=seed).state_dict() for N, seed in [(9, 0), (12, 0), (9, 1)]}

    serial = body(None)
    drawn = [key for key, value in serial[9, 0].items() if not (value[0].equal(value[1]))]
    assert drawn, "some weights are drawn at random"
    for found in spmd(body):
        for which, state in serial.items():
            assert all(found[which][key].equal(value) for key, value in state.items())
        for key in drawn:
            rows = found[9, 0][key].flatten(1) if found[9, 0][key].dim() > 1 else found[9, 0][key][:, None]
            assert len({tuple(row.tolist()) for row in rows}) == 9
            assert found[12, 0][key][:9].equal(found[9, 0][key]), "a deeper stack begins like this one"
            assert not (found[9, 0][key] == found[9, 1][key]).any()


def test_a_stack_leaves_the_random_numbers_of_its_caller_alone():
    wanted = torch.manual_seed(5) and torch.rand(3)
    torch.manual_seed(5)
    stack = CASES["dropout"].stack(None, 8, solve="one-shot parts", vmap=None)
    loss_of(stack(CASES["dropout"].input())).backward()
    CASES["mlp"].stack(None, 8, solve="one-shot parts", vmap=None)(CASES["mlp"].input())
    assert torch.rand(3).equal(wanted)


def test_blocks_of_ranks_that_are_threads_do_not_mix_their_random_numbers():
    def body(comm):
        found = []
        for seed in range(40):
            with own_random_numbers(seed):
                found.append([torch.rand(3).tolist() for _ in range(10)])
        return found

    assert run_threads(4, body) == [body(None)] * 4


@RANKS
def test_frozen_weights_get_no_gradient(spmd):
    def make():
        block = CASES["mlp"].make()
        block.net[1].weight.requires_grad_(False)
        return block

    case = Case(make, CASES["mlp"].shape)

    def body(comm):
        stack = case.stack(comm, 9)
        free = CASES["mlp"].stack(comm, 9)
        u = case.input().requires_grad_()
        for part in (stack, free):
            loss_of(part(u)).backward()
        nothing = CASES["mlp"].stack(comm, 9)
        nothing.requires_grad_(False)
        loss_of(nothing(u)).backward()
        alone = nothing(case.input())
        frozen = stack.layers.get_parameter("net.1.weight")
        last = stack.layers.get_parameter("net.3.weight")
        others = [p.grad for p in nothing.parameters()], alone.requires_grad
        full = gradients(free)["net.3.weight"]
        return frozen.grad, distance(stack.layers.gathered(last.grad), full), others, u.grad, frozen.requires_grad

    exact = case.input().requires_grad_()
    stack = CASES["mlp"].stack(None, 9)
    loss_of(loop(unstacked(stack.state_dict(), CASES["mlp"]), exact)).backward()
    for gradient, same, (others, differentiable), of_input, requires_grad in spmd(body):
        assert gradient is None and not requires_grad and same == 0.0
        assert others == [None] * 6 and not differentiable
        assert distance(of_input, 3 * exact.grad) < 1e-12


@RANKS
@pytest.mark.parametrize("block", ["dense", "convolution"])
def test_an_input_without_gradient(spmd, block):
    case = CASES[block]

    def body(comm):
        stack = case.stack(comm, 9)
        loss_of(stack(case.input())).backward()
        first = gradients(stack)
        stack.zero_grad()
        loss_of(stack(case.input().requires_grad_())).backward()
        return first, gradients(stack)

    for without, with_gradient in spmd(body):
        assert all(without[name].equal(value) and value.any() for name, value in with_gradient.items())


@RANKS
def test_statistics_of_a_frozen_norm_are_kept(spmd):
    case = CASES["frozen"]
    names = ("layers.norm.running_mean", "layers.norm.running_var")

    def body(comm):
        model = nn.Sequential(case.stack(comm, 9))
        stack = model[0]
        first = {name: stack.state_dict()[name].clone() for name in names}
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for mode in (True, False, True):
            model.train(mode)
            optimizer.zero_grad()
            loss_of(model(case.input())).backward()
            optimizer.step()
        own = len(list(stack.buffers())), {b.requires_grad for b in stack.buffers()}
        return first, stack.state_dict(), own

    for first, last, (count, requires_grad) in spmd(body):
        assert count == 2 and requires_grad == {False}
        for name in names:
            assert last[name].equal(first[name])
            assert len({tuple(row.tolist()) for row in first[name]}) == 9, "others in every layer"


def test_the_size_of_intervals_is_the_unit_of_ownership():
    """5 intervals of 2 layers on 3 ranks: 2, 2 and 1."""
    stacks = run_threads(3, lambda comm: list(CASES["mlp"].stack(comm, 10, solve="lagged").own_layers))
    assert [len(own) for own in stacks] == [4, 4, 2]
    sequential = run_threads(
        3, lambda comm: list(LayerParallel(CASES["mlp"].block, 10, 1.0, comm, mgrit=SOLVES["exact"]).own_layers)
    )
    assert [len(own) for own in sequential] == [4, 3, 3]


def test_a_stack_without_a_communicator_is_serial():
    case = CASES["mlp"]
    stack = LayerParallel(case.block, 8, 2.0)
    assert stack.comm.size == 1 and list(stack.own_layers) == list(range(8))
    assert "num_layers=8" in repr(stack) and "own_layers=0..7" in repr(stack)
    assert "8" in stack.table()


@RANKS
def test_clipping_counts_every_weight_once(spmd):
    case = CASES["tied"]

    def body(comm):
        model = nn.Sequential(linear(C, C, seed=1), case.stack(comm, 9, 2.0, "V"), linear(C, C, seed=2))
        (10 * loss_of(model(case.input()))).backward()
        others = [*model[0].parameters(), *model[2].parameters()]
        before = [*(p.grad.clone() for p in others), *gradients(model[1]).values()]
        norm = clip_grad_norm_(model, 0.5)
        return before, norm, [*(p.grad for p in others), *gradients(model[1]).values()], clip_grad_norm_(model, 0.5)

    for before, norm, after, norm_after in spmd(body):
        exact = torch.cat([gradient.flatten() for gradient in before]).norm().item()
        assert norm == pytest.approx(exact, rel=1e-12) and norm > 0.5 and norm_after == pytest.approx(0.5)
        assert all(distance(b, a * (0.5 / norm)) < 1e-14 for b, a in zip(after, before, strict=True))
