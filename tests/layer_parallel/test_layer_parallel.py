"""Stacks against the loop over their modules: outputs, gradients of inputs and weights, on any number of ranks."""

from __future__ import annotations

import pytest
import torch
from blocks import (
    CASES,
    SOLVES,
    distance,
    gradients,
    loop,
    loop_gradients,
    loss_of,
    reduced,
    unstacked,
)
from torch import nn

from xbraid_py import MGRIT, broadcast_loss, clip_grad_norm_

RANKS = pytest.mark.ranks(1, 2, 3, 4)
T = 2.0
# Block, layers, solve, batched over intervals, evaluated again for the adjoints. 9 layers in intervals of 3 leave one
# of 4 ranks without a layer, 10 of 2 are no multiple of the ranks.
EQUAL = [
    ("dense", 12, "V 3 levels", False, False),
    ("dense", 9, "one-shot 3", False, False),
    ("dense", 5, "exact", False, False),
    ("dense sequences", 8, "one-shot parts", False, False),
    ("mlp", 8, "F", False, False),
    ("mlp", 9, "V", True, False),
    ("mlp", 10, "lagged", False, True),
    ("mlp", 1, "exact", True, True),
    ("convolution", 9, "V", False, True),
    ("convolution", 10, "lagged", False, False),
    ("convolution", 5, "exact", False, True),
    ("convolution", 8, "one-shot parts", True, True),
    ("attention", 9, "one-shot 3", False, False),
    ("attention", 8, "F", False, False),
    ("attention", 5, "exact", True, False),
    ("library attention", 9, "V", False, False),
    ("decoder", 8, "one-shot parts", False, False),
    ("library attention", 8, "one-shot parts", False, True),
    ("tied", 9, "V", False, False),
    ("tied", 10, "lagged", True, False),
    ("frozen", 9, "V", True, True),
    ("frozen", 8, "one-shot parts", False, False),
]


def solved(stack, u, call=None, loss=loss_of) -> dict:
    """Output, gradients of the input and of all weights, and the weights."""
    u = u.clone().requires_grad_()
    output = (call or stack)(u)
    loss(output).backward()
    return {"output": output.detach(), "input": u.grad, "weights": gradients(stack), "state": stack.state_dict()}


def wanted(state, case, u, call=None, loss=loss_of) -> dict:
    """The same of the loop over modules."""
    modules = unstacked(state, case)
    u = u.clone().requires_grad_()
    output = call(lambda x: loop(modules, x, T))(u) if call else loop(modules, u, T)
    loss(output).backward()
    return {"output": output.detach(), "input": u.grad, "weights": loop_gradients(modules)}


def compare(found: dict, exact: dict, bound: float = 1e-12) -> None:
    """Each of them is equal to the reference's."""
    for key, value in exact.items():
        assert distance(found[key], value) < bound, key


@RANKS
@pytest.mark.parametrize(("block", "num_layers", "solve", "vmap", "recompute"), EQUAL)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_equals_serial_autograd(spmd, block, num_layers, solve, vmap, recompute):
    case = CASES[block]

    def body(comm):
        stack = case.stack(comm, num_layers, T, solve, vmap=vmap, recompute=recompute)
        return solved(stack, case.input())

    results = spmd(body)
    exact = wanted(results[0]["state"], case, case.input())
    for found in results:
        compare(found, exact)


@RANKS
@pytest.mark.parametrize(("block", "num_layers", "solve"), [("convolution", 9, "V"), ("dense", 10, "lagged")])
def test_output_on_the_last_rank_alone(spmd, block, num_layers, solve):
    case = CASES[block]

    def body(comm):
        stack = case.stack(comm, num_layers, T, solve, output="last")
        losses = []
        bias = torch.zeros((), dtype=torch.float64, requires_grad=True)  # of a head

        def shared(output):
            losses.append(broadcast_loss(loss_of(output + bias), comm, stack.last_rank))
            return losses[0]

        found = solved(stack, case.input(), loss=shared)
        with torch.no_grad():
            found["inference"] = stack.eval()(case.input())
        return found | {"loss": losses[0].item(), "bias": bias.grad, "ends": (stack.first_rank, stack.last_rank)}

    results = spmd(body)
    exact = wanted(results[0]["state"], case, case.input())
    for rank, found in enumerate(results):
        first, last = found["ends"]
        assert bool(found["bias"]) == (rank == last), "what other ranks make of it does not count"
        assert distance(found["weights"], exact["weights"]) < 1e-12
        for key, owner in (("output", last), ("inference", last), ("input", first)):
            value = exact["output" if key == "inference" else key]
            assert distance(found[key], value) < 1e-12 if rank == owner else not found[key].any(), key
        assert found["loss"] == pytest.approx(loss_of(exact["output"]).item(), rel=1e-12)


@RANKS
@pytest.mark.parametrize("block", ["dense", "convolution", "frozen"])
def test_single_precision_and_back(spmd, block):
    case = CASES[block]

    def body(comm):
        stack = case.stack(comm, 9, T, "V").to(torch.float32)
        single = solved(stack, case.input().float())
        stack.zero_grad()
        return single, solved(stack.double(), case.input())

    for single, double in spmd(body):
        assert single["output"].dtype == single["input"].dtype == torch.float32
        assert {value.dtype for value in single["state"].values()} == {torch.float32}
        exact = wanted(double["state"], case, case.input())
        compare(double, exact)
        assert distance(single["output"].double(), exact["output"]) < 1e-5
        for name, gradient in exact["weights"].items():
            assert single["weights"][name].dtype == torch.float32
            assert distance(single["weights"][name].double(), gradient) < 1e-4


@RANKS
@pytest.mark.parametrize(
    ("block", "num_layers", "mgrit"),
    [
        ("dense", 12, MGRIT(cfactor=2)),
        ("mlp", 8, MGRIT(cycle="F", cfactor=2, max_levels=3, min_coarse=1, max_iter=2)),
        ("convolution", 9, MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=1)),
        ("dropout", 8, MGRIT(cfactor=2, max_iter=2)),
        ("attention", 5, SOLVES["exact"]),
    ],
)
def test_same_bits_on_any_number_of_ranks(spmd, block, num_layers, mgrit):
    """Far from converged, in two updates, gradients clipped."""
    case = CASES[block]

    def body(comm):
        stack = case.stack(comm, num_layers, T, mgrit=mgrit)
        model = nn.Sequential(stack)
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        record = []
        for update in range(2):
            optimizer.zero_grad()
            found = solved(stack, case.input(update))
            norm = clip_grad_norm_(model, 0.1)
            record.append((found, norm, gradients(stack), stack.record))
            optimizer.step()
        return record, stack.state_dict()

    # The loops of a block are those of a process, so the serial run is made by each.
    serial, weights = body(None)
    for record, found_weights in spmd(body):
        for (found, norm, clipped, said), (exact, exact_norm, exact_clipped, exact_said) in zip(
            record, serial, strict=True
        ):
            assert found["output"].equal(exact["output"]) and found["input"].equal(exact["input"])
            assert all(found["weights"][name].equal(value) for name, value in exact["weights"].items())
            assert norm == exact_norm and said == exact_said
            assert all(clipped[name].equal(value) for name, value in exact_clipped.items())
        assert all(found_weights[name].equal(value) for name, value in weights.items())


@RANKS
def test_gradients_accumulate_jointly_and_one_by_one(spmd):
    case = CASES["mlp"]
    a, b = case.input(1), case.input(2, batch=4)

    def body(comm):
        stack = case.stack(comm, 9, T, "V")
        found = []
        for jointly in (True, False):
            stack.zero_grad()
            first, second = stack(a), stack(b)  # both before any backward
            losses = [loss_of(second), loss_of(first, 8)]
            for loss in [sum(losses)] if jointly else losses:
                loss.backward()
            found.append(gradients(stack))
        return found, stack.state_dict()

    for found, state in spmd(body):
        modules = unstacked(state, case)
        (loss_of(loop(modules, b)) + loss_of(loop(modules, a), 8)).backward()
        assert all(distance(each, loop_gradients(modules)) < 1e-12 for each in found)


@RANKS
def test_one_stack_twice_in_one_graph(spmd):
    case = CASES["convolution"]

    def twice(part):
        return lambda x: part(torch.tanh(part(x)) + x)

    def body(comm):
        stack = case.stack(comm, 9, T, "one-shot 3")
        return solved(stack, case.input(), twice(stack))

    results = spmd(body)
    exact = wanted(results[0]["state"], case, case.input(), twice)
    for found in results:
        compare(found, exact)


@RANKS
def test_backward_twice_through_a_retained_graph(spmd):
    case = CASES["mlp"]

    def body(comm):
        stack = case.stack(comm, 9, T, "V")
        loss = loss_of(stack(case.input()))
        loss.backward(retain_graph=True)
        once = gradients(stack)
        loss.backward()
        return once, gradients(stack)

    for once, both in spmd(body):
        assert all(distance(both[name], 2 * value) < 1e-14 for name, value in once.items())


@RANKS
@pytest.mark.filterwarnings("ignore:Using backward")
def test_second_derivatives_and_a_second_backward_pass_without_the_graph_are_refused(spmd):
    case = CASES["mlp"]

    def body(comm):
        stack = case.stack(comm, 9, T, "V")
        losses = [loss_of(stack(case.input().requires_grad_())) for _ in range(2)]
        losses[1].backward()
        return reduced(comm, lambda: losses[0].backward(create_graph=True)), reduced(comm, losses[1].backward)

    for second, again in spmd(body):
        assert second.startswith("RuntimeError") and "second derivatives" in second and "to_sequential" in second
        assert again.startswith("RuntimeError") and "retain_graph=True" in again


@RANKS
@pytest.mark.parametrize("block", ["dense", "dense sequences", "convolution", "library attention"])
def test_inference_is_exact_and_training_mode_is_not(spmd, block):
    """One rough iteration: whoever propagates exactly in its place is seen."""
    case = CASES[block]
    rough = MGRIT(cycle="V", cfactor=3, max_levels=2, min_coarse=1, max_iter=1, nrelax=0)

    def body(comm):
        stack = case.stack(comm, 9, T, mgrit=rough)
        found = {"trained": stack(case.input(batch=5)).detach()}
        with torch.no_grad():
            found["no_grad"] = stack(case.input(batch=5))
            found["eval"] = stack.eval()(case.input(batch=5))
            found["one sample"] = stack(case.input(batch=5)[:1])
        found["eval with gradients"] = stack(case.input(batch=5)).detach()
        stack.train()
        return found | {"again": stack(case.input(batch=5)).detach(), "record": stack.record}, stack.state_dict()

    for found, state in spmd(body):
        exact = loop(unstacked(state, case), case.input(batch=5)).detach()
        assert distance(found["eval"], exact) < 1e-14 and distance(found["one sample"], exact[:1]) < 1e-14
        assert distance(found["trained"], exact) > 1e-8
        # `nn.MultiheadAttention` takes another path in evaluation mode.
        for key in ("no_grad", "eval with gradients", "again"):
            assert distance(found[key], found["trained"]) < 1e-14, key
        assert found["record"] is None
