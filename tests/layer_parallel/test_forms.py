"""Blocks that give the next state, sum included, against the plain loop over them: exact, pipelined, by MGRIT."""

from __future__ import annotations

from functools import partial

import pytest
import reference as ref
import torch
from blocks import (
    SOLVES,
    UNCHECKED,
    B,
    C,
    L,
    Mlp,
    Tied,
    distance,
    gradients,
    loop_gradients,
    loss_of,
    reduced,
)
from torch import nn

import xbraid_py.nn
from xbraid_py import MGRIT, LayerGrid, LayerParallel, Splines

RANKS = pytest.mark.ranks(1, 2, 3)


class Own(nn.Module):
    """u + F(u) / 8."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, u):
        return u + self.inner(u) / 8


def encoder(norm_first: bool) -> nn.Module:
    return nn.TransformerEncoderLayer(C, 2, 2 * C, 0.0, batch_first=True, norm_first=norm_first)


KINDS = {
    "mlp": lambda: Own(Mlp()),
    "tied": lambda: Own(Tied()),
    "library encoder": partial(encoder, True),
    "library encoder, norm last": partial(encoder, False),
    "dense": lambda: xbraid_py.DenseBlock(C, "tanh"),
}
PIPELINE = MGRIT(cycle="pipeline", portions=3)


def double(kind: str):
    return lambda: KINDS[kind]().double()


def input_of(seed: int = 1) -> torch.Tensor:
    return ref.random(B, L, C, seed=seed)


def plain(state: dict, kind: str) -> nn.ModuleList:
    """One block for each layer with the weights of a stack's state."""
    own = {key.removeprefix("layers."): value for key, value in state.items()}
    modules = nn.ModuleList()
    for n in range(len(next(iter(own.values())))):
        modules.append(double(kind)())
        modules[n].load_state_dict({key: value[n] for key, value in own.items()}, strict=False)
    return modules


def solved(stack, u) -> dict:
    u = u.clone().requires_grad_()
    output = stack(u)
    loss_of(output).backward()
    weights = gradients(stack)
    with torch.no_grad():
        inference = stack.eval()(u)
    return {
        "output": output.detach(),
        "input": u.grad,
        "weights": weights,
        "inference": inference,
        "state": stack.state_dict(),
    }


def wanted(state, kind, u) -> dict:
    modules = plain(state, kind)
    u = u.clone().requires_grad_()
    x = u
    for module in modules:
        x = module(x)
    loss_of(x).backward()
    found = {"output": x.detach(), "input": u.grad, "weights": loop_gradients(modules), "inference": x.detach()}
    return found


# Kind, layers, options.
EQUAL = [
    ("mlp", 5, {"mgrit": SOLVES["exact"]}),
    ("mlp", 8, {"mgrit": PIPELINE}),
    ("mlp", 8, {"mgrit": PIPELINE, "recompute": True}),
    ("mlp", 8, {"mgrit": PIPELINE, "windows": 2}),
    ("mlp", 9, {"mgrit": SOLVES["V"]}),
    ("mlp", 9, {"mgrit": SOLVES["V"], "recompute": "all"}),
    ("mlp", 12, {"mgrit": SOLVES["V 3 levels"], "windows": 2}),
    ("mlp", 9, {"mgrit": SOLVES["V"], "vmap": True}),
    ("mlp", 10, {"mgrit": SOLVES["lagged"], "vmap": True, "recompute": True}),
    ("mlp", 8, {"mgrit": SOLVES["F"]}),
    ("mlp", 8, {"mgrit": SOLVES["one-shot parts"]}),
    ("tied", 10, {"mgrit": SOLVES["lagged"]}),
    ("library encoder", 9, {"mgrit": SOLVES["V"]}),
    ("library encoder", 8, {"mgrit": SOLVES["one-shot parts"], "recompute": True}),
    ("library encoder, norm last", 9, {"mgrit": SOLVES["V"]}),
    ("library encoder, norm last", 9, {"mgrit": PIPELINE}),
    ("dense", 6, {"mgrit": PIPELINE}),
    ("dense", 9, {"mgrit": SOLVES["V"]}),
]


@RANKS
@pytest.mark.parametrize(("kind", "num_layers", "options"), EQUAL)
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_maps_equal_the_plain_loop(spmd, kind, num_layers, options):
    def body(comm):
        # T is no part of a map.
        stack = LayerParallel(
            double(kind), num_layers, 3.0, comm, form="map", accuracy=UNCHECKED, **{"vmap": False, **options}
        )
        return solved(stack, input_of())

    results = spmd(body)
    exact = wanted(results[0]["state"], kind, input_of())
    for found in results:
        for key, value in exact.items():
            assert distance(found[key], value) < 1e-12, key


@RANKS
@pytest.mark.parametrize("mgrit", [SOLVES["exact"], PIPELINE, SOLVES["V"]])
def test_the_same_bits_on_any_number_of_ranks(spmd, mgrit):
    def body(comm):
        return solved(
            LayerParallel(double("mlp"), 9, 1.0, comm, form="map", mgrit=mgrit, accuracy=UNCHECKED), input_of()
        )

    (alone,) = [body(None)]
    for found in spmd(body):
        assert torch.equal(found["output"], alone["output"]) and torch.equal(found["input"], alone["input"])
        assert all(torch.equal(found["weights"][name], each) for name, each in alone["weights"].items())


@RANKS
def test_one_layer_after_the_other_is_the_loop_bit_by_bit(spmd):
    # u + (B(u) - u) would be another number.
    def body(comm):
        stack = LayerParallel(double("mlp"), 7, 1.0, comm, form="map", mgrit=MGRIT(max_levels=1), vmap=False)
        return solved(stack, input_of())

    results = spmd(body)
    exact = wanted(results[0]["state"], "mlp", input_of())
    for found in results:
        assert torch.equal(found["output"], exact["output"]) and torch.equal(found["inference"], exact["output"])


@RANKS
def test_solves_converge_to_their_tolerance(spmd):
    def body(comm):
        stack = LayerParallel(
            double("mlp"), 16, 1.0, comm, form="map", mgrit=MGRIT(cfactor=4, max_iter=10, tol=1e-8), accuracy=UNCHECKED
        )
        return solved(stack, input_of())

    results = spmd(body)
    exact = wanted(results[0]["state"], "mlp", input_of())
    for found in results:
        assert 0.0 < distance(found["output"], exact["output"]) < 1e-6, "approximate, and close"
        assert distance(found["weights"], exact["weights"]) < 1e-5


@RANKS
def test_a_midpoint_step_of_a_map_is_that_of_its_increment(spmd):
    """The coarse steps are those of F(u) = B(u) - u, by which an unconverged solve is the same as of increments."""

    class Increment(Mlp):
        def forward(self, u):
            return super().forward(u) / 8

    def body(comm):
        options = {
            "mgrit": MGRIT(
                cycle="V", cfactor=2, max_levels=2, min_coarse=1, max_iter=1, nrelax=0, coarse_step="midpoint"
            ),
            "accuracy": UNCHECKED,
        }
        maps = LayerParallel(double("mlp"), 12, 1.0, comm, form="map", **options)
        increments = LayerParallel(lambda: Increment().double(), 12, 12.0, comm, form="increment", **options)
        state = {key.replace("layers.", "layers.inner."): value for key, value in increments.state_dict().items()}
        maps.load_state_dict(state)
        found, other = solved(maps, input_of()), solved(increments, input_of())
        return found, other

    for found, other in spmd(body):
        assert distance(found["output"], found["inference"]) > 1e-9, "not converged"
        assert distance(found["output"], other["output"]) < 1e-13
        assert distance(found["input"], other["input"]) < 1e-13


@RANKS
@pytest.mark.parametrize("mgrit", [SOLVES["exact"], SOLVES["V"]])
def test_splines_of_maps(spmd, mgrit):
    def body(comm):
        stack = LayerParallel(
            double("mlp"), 9, 1.0, comm, form="map", mgrit=mgrit, splines=Splines(4), accuracy=UNCHECKED
        )
        u = input_of().requires_grad_()
        output = stack(u)
        loss_of(output).backward()
        tensors = stack.layers.tensors()
        columns = {c.name: stack.layers.gathered(t) for c, t in zip(stack.layers.block.columns, tensors, strict=True)}
        return output.detach(), u.grad, columns

    results = spmd(body)
    exact = wanted({f"layers.{name}": rows for name, rows in results[0][2].items()}, "mlp", input_of())
    for output, back, _ in results:
        assert distance(output, exact["output"]) < 1e-12 and distance(back, exact["input"]) < 1e-12


@RANKS
@pytest.mark.parametrize("kind", ["mlp", "library encoder", "library encoder, norm last"])
def test_a_block_with_its_own_sum_is_no_increment_unless_told(spmd, kind):
    def body(comm):
        doubtful = LayerParallel(double(kind), 6, 1.0, comm)
        told = LayerParallel(double(kind), 6, 1.0, comm, form="increment")
        return reduced(comm, lambda: doubtful(input_of())), reduced(comm, lambda: told(input_of()))

    for error, fine in spmd(body):
        assert "form='map'" in error and "contain its own sum" in error
        assert fine is None


def test_forms_are_checked():
    with pytest.raises(ValueError, match="form='sum' must be increment .* or map"):
        LayerParallel(double("mlp"), 4, form="sum")
    stack = LayerParallel(lambda: nn.Linear(C, 2 * C).double(), 4, form="map")
    with pytest.raises(ValueError, match="form='map': the next state, sum included"):
        stack(input_of())


def test_layers_of_different_lengths_are_no_matter_of_maps():
    grid = LayerGrid(3, 1.0, (2, 1, 1))
    stack = LayerParallel(double("mlp"), grid, form="map")
    with torch.no_grad():
        found = stack.eval()(input_of())
    assert torch.equal(found, wanted(stack.state_dict(), "mlp", input_of())["output"])
