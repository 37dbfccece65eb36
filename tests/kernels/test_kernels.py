"""Kernels against a literal reference by autograd, over random shapes: torch, and native code of every instruction set.

Shape letters: `m` layers or intervals, `c` steps of an interval, `B` samples.
"""

from __future__ import annotations

from itertools import product

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import assume, given, settings
from kernel_cases import (
    DTYPES,
    LAYOUTS,
    NAMES,
    SETS,
    NoFallback,
    Recorder,
    around,
    cases,
    literal_relax,
    literal_relax_adjoint,
    literal_step,
    literal_vjp,
    near_corner,
    needs_native,
    normal,
    placed,
    public_on,
    weights,
)

from xbraid_py import kernels
from xbraid_py.layers.dense import DenseLayer

LAYOUT = st.sampled_from(LAYOUTS)
TERMS = 70  # of a sum over the features, at most


@given(cases(), LAYOUT, LAYOUT, st.booleans(), st.sampled_from([None, "u", "add", *LAYOUTS]))
@settings(max_examples=300)
def test_step(case, layout, row_layout, with_add, target):
    layer = case.layer
    theta, u, add = case.weights(case.m), case.states(case.m, 1), case.states(case.m, 2, layer.outputs)
    literal = [
        literal_step(layer, row, x, h, case.scheme, case.residual)
        for row, x, h in zip(theta.double(), u.double(), case.sizes(case.m).double(), strict=True)
    ]
    expected = torch.stack(literal) if literal else add.double()
    expected = expected + add if with_add else expected
    assume(target != "u" or layer.inputs == layer.outputs)
    assume(target != "add" or with_add)
    for name in NAMES:
        given_u, given_add = placed(u, layout), placed(add, layout) if with_add else None
        if target in ("u", "add"):
            out = given_u if target == "u" else given_add
        else:
            out = None if target is None else placed(torch.zeros_like(add), target)
        options = {"h": case.given_h(case.m, row_layout), "scheme": case.scheme, "residual": case.residual}
        with public_on(name) as kernels:
            found = kernels.step(layer, placed(theta, row_layout), given_u, **options, add=given_add, out=out)
        case.close(found, expected, TERMS, u)
        assert out is None or (found is out and around(out) == 0)
        assert target == "u" or torch.equal(given_u, u)
        assert target == "add" or given_add is None or torch.equal(given_add, add)


@given(cases(), LAYOUT, LAYOUT, st.booleans(), st.booleans(), st.sampled_from([None, "u", "v", "add", *LAYOUTS, "no"]))
@settings(max_examples=300)
def test_adjoint(case, layout, row_layout, with_add, with_gradient, target):
    layer, m = case.layer, case.m
    theta, u, add = case.weights(m), case.states(m, 1), case.states(m, 2)
    v = case.states(m, 3, layer.outputs)
    assume(not near_corner(case, theta, u))
    assume(target != "v" or layer.inputs == layer.outputs)
    assume(target != "add" or with_add)
    rows = zip(theta.double(), u.double(), v.double(), case.sizes(m).double(), strict=True)
    literal = [literal_vjp(layer, *each, case.scheme, case.residual) for each in rows]
    expected, slopes = map(torch.stack, zip(*literal, strict=True)) if m else (add.double(), theta.double())
    expected = expected + add if with_add else expected
    for name in NAMES:
        arrays = {"u": placed(u, layout), "v": placed(v, layout), "add": placed(add, layout) if with_add else None}
        out = placed(torch.zeros_like(u), target) if target in LAYOUTS else arrays.get(target)
        gradient = placed(torch.full_like(theta, torch.nan), row_layout) if with_gradient else None
        options = {"h": case.given_h(m, row_layout), "scheme": case.scheme, "residual": case.residual}
        options |= {"add": arrays["add"], "out": out}
        places = placed(theta, row_layout), arrays["u"], arrays["v"]
        with public_on(name) as kernels:
            found = kernels.adjoint(layer, *places, **options, gradient=gradient, back=target != "no")
        if target == "no":
            assert found is None
        else:
            case.close(found, expected, TERMS, u, v)
            assert out is None or (found is out and around(out) == 0)
        if with_gradient:
            case.close(gradient, slopes, TERMS + case.batch, u, v)
            assert around(gradient) == 0
        for key, before in (("u", u), ("v", v), ("add", add)):
            assert target == key or arrays[key] is None or torch.equal(arrays[key], before)


INTERVALS = st.tuples(st.integers(1, 5), st.integers(1, 3))


@given(cases(square=True), INTERVALS, LAYOUT, LAYOUT, st.booleans(), st.sampled_from([None, "own", "points", "ends"]))
@settings(max_examples=300)
def test_relax(case, interval, layout, row_layout, with_tau, target):
    """`target`: nothing is recorded; inputs and ends of their own; inputs that hold the points; ends over points."""
    cfactor, parts = interval
    theta, points = case.weights(case.m * cfactor * parts), case.states(case.m, 1)
    tau = case.states(case.m * cfactor, 2) * (0.1 if with_tau else 0.0)
    doubles = theta.double(), points.double(), tau.double()
    expected, expected_inputs, _ = literal_relax(case, cfactor, parts, *doubles)
    for name in NAMES:
        given_points = placed(points, layout)
        inputs = ends = None
        if target in ("own", "points"):
            inputs = placed(torch.full_like(tau, torch.nan), layout)
        if target == "points":
            inputs[::cfactor] = points
            given_points = inputs[::cfactor]
        if target in ("own", "ends"):
            ends = given_points if target == "ends" else placed(torch.full_like(points, torch.nan), layout)
        given_tau = placed(tau, layout) if with_tau else None
        options = {"h": case.given_h(len(theta), row_layout), "scheme": case.scheme, "parts": parts}
        options |= {"tau": given_tau, "inputs": inputs, "ends": ends}
        with public_on(name) as kernels:
            found = kernels.relax(case.layer, placed(theta, row_layout), given_points, cfactor, **options)
        case.close(found, expected, TERMS * cfactor * parts, points)
        assert ends is None or found is ends
        assert target == "ends" or torch.equal(given_points, points)
        if inputs is not None:
            case.close(inputs, expected_inputs, TERMS * cfactor * parts, points)
        assert all(around(each) == 0 for each in (inputs, ends) if each is not None)


@given(
    cases(square=True),
    INTERVALS,
    LAYOUT,
    LAYOUT,
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, "own", "points", "ends"]),
)
@settings(max_examples=300)
def test_relax_adjoint(case, interval, layout, row_layout, with_tau, with_gradient, target):
    cfactor, parts = interval
    theta, points = case.weights(case.m * cfactor * parts), case.states(case.m, 1)
    states = case.states(len(theta), 3)
    assume(not near_corner(case, theta, states))
    tau = case.states(case.m * cfactor, 2) * (0.1 if with_tau else 0.0)
    doubles = theta.double(), states.double(), points.double(), tau.double()
    expected, expected_inputs, slopes = literal_relax_adjoint(case, cfactor, parts, *doubles)
    steps = cfactor * parts
    for name in NAMES:
        given_points = placed(points, layout)
        inputs = ends = None
        if target in ("own", "points"):
            inputs = placed(torch.full_like(tau, torch.nan), layout)
        if target == "points":
            inputs[cfactor - 1 :: cfactor] = points
            given_points = inputs[cfactor - 1 :: cfactor]
        if target in ("own", "ends"):
            ends = given_points if target == "ends" else placed(torch.full_like(points, torch.nan), layout)
        given_tau = placed(tau, layout) if with_tau else None
        gradient = placed(torch.full_like(theta, torch.nan), row_layout) if with_gradient else None
        options = {"h": case.given_h(len(theta), row_layout), "scheme": case.scheme, "parts": parts}
        options |= {"tau": given_tau, "inputs": inputs, "ends": ends}
        arrays = placed(theta, row_layout), placed(states, layout), given_points
        with public_on(name) as kernels:
            found = kernels.relax_adjoint(case.layer, *arrays, cfactor, **options, gradient=gradient)
        case.close(found, expected, TERMS * steps, points)
        assert ends is None or found is ends
        assert target == "ends" or torch.equal(given_points, points)
        assert torch.equal(arrays[1], states)
        if inputs is not None:
            case.close(inputs, expected_inputs, TERMS * steps, points)
        if with_gradient:
            case.close(gradient, slopes, TERMS * steps + case.batch, states, expected_inputs)
        assert all(around(each) == 0 for each in (inputs, ends, gradient) if each is not None)


@given(st.integers(0, 4), st.sampled_from([(), (3,), (4, 33), (5, 0), (2, 3, 70)]), LAYOUT, st.sampled_from(DTYPES))
@settings(max_examples=100)
def test_distances(m, shape, layout, dtype):
    a, b = normal(m, *shape, seed=1, dtype=dtype), normal(m, *shape, seed=2, dtype=dtype)
    rows = zip(a.double(), b.double(), strict=True)
    sums = [[float(((x - y) ** 2).sum()), float((x**2).sum())] for x, y in rows]
    expected = torch.tensor(sums, dtype=torch.float64).reshape(m, 2)
    for name in NAMES:
        layout = layout if shape else "plain"
        with public_on(name) as kernels:
            found = kernels.distances(placed(a, layout), placed(b, layout))
        assert found.shape == (m, 2) and found.dtype == dtype
        bound = 4 * torch.finfo(dtype).eps * a[:1].numel()
        assert ((found - expected).abs() <= bound * expected).all()


@given(st.integers(0, 4), st.sampled_from([(), (3,), (4, 33), (5, 0), (2, 3, 70)]), LAYOUT, st.sampled_from(DTYPES))
@settings(max_examples=100)
def test_a_change_and_its_size(m, shape, layout, dtype):
    layout = layout if shape else "plain"
    a, b, c = (normal(m, *shape, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    bound = 4 * torch.finfo(dtype).eps * a[:1].numel()
    for other, kept, name in product((None, c), (None, "b", "own"), NAMES):
        x, y = placed(a.clone(), layout), placed(b.clone(), layout)
        difference = {None: None, "b": y, "own": placed(torch.empty_like(b), layout)}[kept]
        change = b if other is None else b - c
        with public_on(name) as kernels:
            found = kernels.move(x, y, None if other is None else placed(c, layout), difference=difference)
        assert torch.equal(x, a + change) and (difference is None or torch.equal(difference, change))
        sums = [[float((each.double() ** 2).sum()) for each in row] for row in zip(change, a + change, strict=True)]
        expected = torch.tensor(sums, dtype=torch.float64).reshape(m, 2)
        assert found.shape == (m, 2) and found.dtype == dtype
        assert ((found - expected).abs() <= bound * expected).all()


@needs_native
@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_native_code_does_it_all(monkeypatch, name, dtype):
    """Up to the width from which on torch is faster, whole features in rows at any distance never go to torch."""
    with public_on(name) as kernels:
        native = kernels.implementation
        monkeypatch.setattr(native, "fallback", NoFallback())
        for width in (1, 7, native.max_width()):
            layer, m, c = DenseLayer(width, width), 2, 3
            theta = placed(weights(layer, m * c, 1, dtype), "rows")
            states = placed(normal(m * c, width, 5, seed=2, dtype=dtype), "rows")
            points, gradient = states[::c], torch.empty_like(theta)
            for h in (0.1, placed(torch.full((m * c,), 0.1, dtype=dtype), "spread")):
                kernels.step(layer, theta, states, h=h, add=states)
                kernels.adjoint(layer, theta, states, states, h=h, gradient=gradient)
                kernels.relax(layer, theta, points, c, h=h, tau=states, inputs=states.clone())
                kernels.relax_adjoint(layer, theta, states, points, c, h=h, tau=states, gradient=gradient)
            kernels.distances(points, points)
            kernels.move(states.clone(), states, states, difference=torch.empty_like(states))


@needs_native
@pytest.mark.parametrize("kind", ["wide", "outputs", "half", "slope", "features", "samples"])
def test_torch_does_the_rest(monkeypatch, kind):
    """Wide layers, other types, arrays that need a slope, and arrays in another order."""
    with public_on(SETS[0]) as kernels:
        native = kernels.implementation
        wide = native.max_width() + 1
        inputs, outputs = {"wide": (wide, wide), "outputs": (3, wide)}.get(kind, (3, 3))
        layer, residual = DenseLayer(inputs, outputs, "tanh"), inputs == outputs
        theta, u = weights(layer, 2, 1), normal(2, inputs, 4, seed=2)
        if kind == "half":
            theta, u = theta.bfloat16(), u.bfloat16()
        elif kind == "features":
            u = u.transpose(1, 2).contiguous().transpose(1, 2)
        elif kind == "samples":
            u = u[:, :, ::2]
        theta.requires_grad_(kind == "slope")
        asked = []
        monkeypatch.setattr(native, "fallback", Recorder(asked))
        found = kernels.step(layer, theta, u, residual=residual)
        kernels.adjoint(layer, theta.detach(), u, found.detach(), residual=residual)
        assert asked[0] == "step" and found.dtype == theta.dtype
        assert asked[1:] == ([] if kind == "slope" else ["adjoint"])
        if kind == "slope":
            assert found.requires_grad
            with torch.no_grad():
                assert torch.allclose(kernels.step(layer, theta, u), found, atol=1e-14)
            assert len(asked) == 1, "without slopes native code can do it"


@pytest.mark.parametrize("implementation", ["native", "torch"])
def test_a_prepared_call_sees_what_the_arrays_hold(monkeypatch, implementation):
    if implementation == "torch":
        monkeypatch.setattr(kernels, "implementation", kernels.fallback)
    layer, count, batch = DenseLayer(3, 3, "tanh"), 4, 11
    theta, states = torch.empty(count, layer.num_parameters), torch.empty(count, 3, batch)
    end, back, gradient = torch.empty(1, 3, batch), torch.empty(1, 3, batch), torch.empty_like(theta)
    labels, slope = torch.arange(batch) % 3, torch.empty(3, batch)
    linear, row = DenseLayer(3, 3, "identity"), torch.empty(1, 12)
    calls = [
        kernels.prepared(kernels.step, layer, row, states[:1], residual=False, out=end),
        kernels.prepared(kernels.relax, layer, theta, states[:1], count, h=0.1, inputs=states, ends=end),
        kernels.prepared(kernels.cross_entropy, linear, row, end, labels, slope=slope),
        kernels.prepared(kernels.adjoint, linear, row, end, slope[None], h=0.5, residual=False, out=back),
        kernels.prepared(kernels.relax_adjoint, layer, theta, states, back, count, h=0.1, gradient=gradient, ends=back),
    ]
    for seed in (1, 2):
        torch.manual_seed(seed)
        for array in (theta, states, row):
            array.normal_()
        start = states[:1].clone()
        calls[0]()
        assert torch.equal(end, kernels.step(layer, row, start, residual=False))
        calls[1]()
        assert torch.equal(end, kernels.relax(layer, theta, start, count, h=0.1))
        other = torch.empty_like(slope)
        assert calls[2]() == kernels.cross_entropy(linear, row, end, labels, slope=other)
        assert torch.equal(slope, other)
        calls[3]()
        expected = kernels.adjoint(linear, row, end, slope[None], h=0.5, residual=False)
        assert torch.equal(back, expected)
        found = torch.empty_like(gradient)
        expected = kernels.relax_adjoint(layer, theta, states, expected, count, h=0.1, gradient=found)
        calls[4]()
        assert torch.equal(back, expected) and torch.equal(gradient, found)


def test_a_prepared_call_is_checked_once():
    layer, theta = DenseLayer(3, 3), torch.zeros(4, 12)
    with pytest.raises(ValueError, match="points.shape"):
        kernels.prepared(kernels.relax, layer, theta, torch.zeros(1, 5, 7), 4, h=0.1)
    with pytest.raises(ValueError, match="label"):
        wrong = torch.full((7,), 9)
        kernels.prepared(
            kernels.cross_entropy, DenseLayer(3, 3, "identity"), torch.zeros(1, 12), torch.zeros(1, 3, 7), wrong
        )()
