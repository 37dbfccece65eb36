"""Stacks whose parameters are spline coefficients: against the loop over modules, states, clipping, checkpoints."""

from __future__ import annotations

from functools import partial

import pytest
import reference as ref
import torch
from blocks import CASES, distance, linear, loss_of, reduced
from spline_cases import matrix, middles
from torch import nn

from xbraid_py import LayerParallel, Splines, broadcast_loss, clip_grad_norm_, to_sequential
from xbraid_py.comm import SerialCommunicator
from xbraid_py.layer_parallel.minibatch.state import MinibatchState
from xbraid_py.layer_parallel.minibatch.updates import check_alike
from xbraid_py.run.store.read import load
from xbraid_py.run.store.write import save

RANKS = pytest.mark.ranks(1, 2, 3, 5)
T = 2.0
SPLINES = {
    "cubic": Splines(6, 3),
    "linear, own knots": Splines(4, 1, (0.0, 0.2, 0.7, 1.0)),
    "constant": Splines(5, 0),
    "more than layers": Splines(14, 2),
}
# 9 layers in intervals of 3 leave two of 5 ranks without a layer.
EQUAL = [
    ("dense", 12, "V 3 levels", "cubic", {}),
    ("dense", 9, "one-shot 3", "more than layers", {}),
    ("mlp", 9, "V", "cubic", {"vmap": True}),
    ("mlp", 10, "lagged", "linear, own knots", {"recompute": True}),
    ("convolution", 9, "V", "constant", {"recompute": "states"}),
    ("attention", 5, "exact", "cubic", {}),
    ("tied", 9, "V", "cubic", {}),
    ("frozen", 9, "V", "cubic", {}),
]


def parts_of(stack: LayerParallel) -> tuple[dict, dict]:
    """Coefficients, and buffers of all layers, by their names."""
    state, names = stack.layers.state_dict(), dict(stack.layers.named_parameters())
    return ({k: v for k, v in state.items() if k in names}, {k: v for k, v in state.items() if k not in names})


def reference(case, splines, coefficients, buffers, u, num_layers):
    """Output and gradients of the literal loop, with coefficients as the leaves of autograd's graph."""
    leaves = {name: value.clone().requires_grad_() for name, value in coefficients.items()}
    u, B = u.clone().requires_grad_(), matrix(splines, middles(num_layers))
    theta = {name: torch.einsum("nj,j...->n...", B, leaf) for name, leaf in leaves.items()}
    modules = [case.block() for _ in range(num_layers)]
    state = u
    for n, module in enumerate(modules):
        weights = {name: value[n] for name, value in (*theta.items(), *buffers.items())}
        state = state + T / num_layers * torch.func.functional_call(module, weights, (state,))
    loss_of(state).backward()
    return {"output": state.detach(), "input": u.grad, "weights": {name: leaf.grad for name, leaf in leaves.items()}}


def solved(stack, u, loss=loss_of) -> dict:
    u = u.clone().requires_grad_()
    output = stack(u)
    loss(output).backward()
    weights = {name: p.grad.clone() for name, p in stack.layers.named_parameters()}
    return {"output": output.detach(), "input": u.grad, "weights": weights}


@RANKS
@pytest.mark.parametrize(("block", "num_layers", "solve", "splines", "options"), EQUAL)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_equals_serial_autograd(spmd, block, num_layers, solve, splines, options):
    case, splines = CASES[block], SPLINES[splines]

    def body(comm):
        stack = case.stack(comm, num_layers, T, solve, splines=splines, **options)
        found = solved(stack, case.input())
        rows = {len(p) for p in stack.layers.parameters()}
        with torch.no_grad():
            exact = stack.eval()(case.input())
        return found, parts_of(stack), rows, exact

    results = spmd(body)
    expected = reference(case, splines, *results[0][1], case.input(), num_layers)
    for found, _, rows, exact in results:
        assert rows == {splines.num}
        for key, value in expected.items():
            assert distance(found[key], value) < 1e-12, key
            assert (
                torch.equal(found[key], results[0][0][key])
                if key != "weights"
                else all(torch.equal(found[key][name], same) for name, same in results[0][0][key].items())
            ), "every rank has the same"
        assert distance(exact, expected["output"]) < 1e-12
    alone = body(SerialCommunicator())[0]["weights"]
    assert distance(results[0][0]["weights"], alone) < 1e-13


@RANKS
def test_output_on_the_last_rank_alone(spmd):
    case, splines = CASES["mlp"], SPLINES["cubic"]

    def body(comm):
        stack = case.stack(comm, 9, T, "V", splines=splines, output="last")
        found = solved(stack, case.input(), lambda output: broadcast_loss(loss_of(output), comm, stack.last_rank))
        return found["weights"], parts_of(stack)

    results = spmd(body)
    expected = reference(case, splines, *results[0][1], case.input(), 9)["weights"]
    assert all(distance(found, expected) < 1e-12 for found, _ in results)


@RANKS
@pytest.mark.parametrize("block", ["mlp", "frozen"])
def test_as_many_functions_as_layers_are_free_weights(spmd, block):
    """Of degree 0, the same bits: initial weights, output and, gathered, gradients."""
    case = CASES[block]

    def body(comm):
        free, stack = (case.stack(comm, 9, T, "V", splines=each, seed=3) for each in (None, Splines(9, 0)))
        states = free.state_dict(), stack.state_dict()
        same = [states[0].keys() == states[1].keys(), *(torch.equal(v, states[1][k]) for k, v in states[0].items())]
        found, other = solved(stack, case.input()), solved(free, case.input())
        same += [torch.equal(found[key], other[key]) for key in ("output", "input")]
        same += [torch.equal(free.layers.gathered(v), found["weights"][k]) for k, v in other["weights"].items()]
        return same

    for same in spmd(body):
        assert all(same) and len(same) > 7


@RANKS
def test_states_are_loaded_on_any_number_of_ranks_and_wrong_ones_refused(spmd):
    case, splines = CASES["frozen"], SPLINES["cubic"]
    make = partial(case.stack, num_layers=9, T=T, splines=splines)

    def body(comm):
        stack, other = make(comm, seed=1), make(comm, seed=2)
        state, u = stack.state_dict(), case.input()
        alone = make(seed=5)
        alone.load_state_dict(state)
        other.load_state_dict(alone.state_dict())
        same = [torch.equal(value, state[name]) for name, value in other.state_dict().items()]
        lengths = {name: len(value) for name, value in state.items()}
        wrong = {name: value[:-1] for name, value in state.items()}
        message = reduced(comm, lambda: stack.load_state_dict(wrong))
        with torch.no_grad():
            plain = distance(to_sequential(stack)(u), stack.eval()(u))
        wants = {p.requires_grad for p in to_sequential(stack).parameters()}
        return same, lengths, message, plain, wants, reduced(comm, lambda: case.stack(comm, 9, T, splines=8))

    for same, lengths, message, plain, wants, error in spmd(body):
        assert all(same) and plain < 1e-13 and wants == {True}
        assert {name.split(".")[-1]: n for name, n in lengths.items()} == {
            **{"weight": 6, "bias": 6},
            **{"running_mean": 9, "running_var": 9},
        }
        assert "has 5 coefficients, the splines have 6" in message and "has 8 layers, the stack has 9" in message
        assert error == "TypeError: splines=8 must be Splines or None; use Splines(8)"


def test_in_windows_they_are_refused():
    with pytest.raises(ValueError, match=r"^splines=Splines\(.*must be None with windows=3; use windows=1"):
        CASES["mlp"].stack(None, 9, T, splines=Splines(4), windows=3)


def model_of(comm, seed: int = 0) -> nn.Sequential:
    stack = CASES["frozen"].stack(comm, 9, T, "V", splines=SPLINES["cubic"], seed=seed)
    return nn.Sequential(linear(4, 4, seed=seed + 1), stack, linear(4, 2, seed=seed + 2))


@RANKS
def test_training_with_clipping_and_a_checkpoint_equals_the_loop(spmd, shared_tmp_path):
    """Ten updates with momentum; the checkpoint of the fifth goes on, written on all ranks and read on one, too."""
    u, target = ref.random(6, 4, seed=1), ref.random(6, 2, seed=2)

    def train(model, optimizer, updates, norms):
        for _ in range(updates):
            optimizer.zero_grad()
            (model(u) - target).square().mean().backward()
            norms.append(clip_grad_norm_(model, 0.5))
            optimizer.step()

    def body(comm):
        model, norms = model_of(comm), []
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        check_alike(model, comm)
        start = model.state_dict()
        start = {name: value.clone() for name, value in start.items()}
        train(model, optimizer, 5, norms)
        trained = MinibatchState(model=model, optimizer=optimizer, comm=comm, update=5)
        path = shared_tmp_path / f"{comm.size}.h5"
        arrays, numbers = trained.state()
        save(path, comm, arrays, {"state": numbers})
        train(model, optimizer, 5, norms)
        end = {name: value.clone() for name, value in model.state_dict().items()}
        ends = []
        for other in (SerialCommunicator(), comm):
            again = model_of(other, seed=7)
            moments = torch.optim.SGD(again.parameters(), 0.05, momentum=0.9)
            with load(path) as checkpoint:
                MinibatchState(model=again, optimizer=moments, comm=other).load(checkpoint)
            train(again, moments, 5, [])
            ends.append(again.state_dict())
        return start, norms, end, ends

    results = spmd(body)
    start, norms, end, _ = results[0]
    # The literal loop.
    case, B = CASES["frozen"], matrix(SPLINES["cubic"], middles(9))
    leaves = {name: value.clone() for name, value in start.items()}
    moving = [leaf.requires_grad_() for name, leaf in leaves.items() if "running" not in name]
    optimizer = torch.optim.SGD(moving, 0.05, momentum=0.9)
    for norm in norms:
        optimizer.zero_grad()
        state = u @ leaves["0.weight"].T + leaves["0.bias"]
        for n in range(9):
            weights = {
                name.removeprefix("1.layers."): value[n] if "running" in name else torch.tensordot(B[n], value, 1)
                for name, value in leaves.items()
                if name.startswith("1.")
            }
            state = state + T / 9 * torch.func.functional_call(case.block(), weights, (state,))
        (state @ leaves["2.weight"].T + leaves["2.bias"] - target).square().mean().backward()
        expected = sum(float(leaf.grad.square().sum()) for leaf in moving) ** 0.5
        assert norm == pytest.approx(expected, rel=1e-10)
        for leaf in moving:
            leaf.grad.mul_(min(1.0, 0.5 / expected))
        optimizer.step()
    for _, found, final, ends in results:
        assert found == norms and final.keys() == end.keys()
        for name, value in end.items():
            assert torch.equal(final[name], value), "the same on every rank"
            assert distance(value, leaves[name].detach()) < 1e-10
            assert all(distance(other[name], value) < 1e-9 for other in ends)


def test_refined_depth_keeps_the_coefficients():
    """More layers of the same function: the output changes by the order of h."""
    case, outputs, state = CASES["convolution"], [], None
    for level in range(6):
        stack = case.stack(None, 8 << level, T, "exact", splines=Splines(5, 2))
        if state is not None:
            stack.load_state_dict(state)
        state = stack.state_dict()
        with torch.no_grad():
            outputs.append(stack.eval()(case.input()))
    changes = [float((b - a).norm()) for a, b in zip(outputs, outputs[1:], strict=False)]
    rates = [a / b for a, b in zip(changes, changes[1:], strict=False)]
    assert changes[0] > 0.01 and rates[-1] == pytest.approx(2, rel=0.02) and all(1.8 < rate < 2.2 for rate in rates[1:])
