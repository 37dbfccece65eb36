"""The self-test of propagators: the library's own pass, and each broken one fails the check that it breaks.

Shape letters: `n` rows (steps), `S` shape of a state.
"""

from __future__ import annotations

import doctest
import math
from dataclasses import replace

import pytest
import reference as ref
import torch
from blocks import CASES, C, Case, Dropped
from broken_propagators import FAILS, B, Own, broken, dense, n

import xbraid_py
from xbraid_py import Adjoint, Forward, check_propagator
from xbraid_py.layers.checking import Check, PropagatorReport
from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.module_steps import ModuleSteps, Tape

FORWARD = [
    "methods",
    "shapes and types",
    "arguments kept",
    "the same twice",
    "rows apart",
    "relax",
    "relax with tau",
    "inputs",
]
FORWARD += ["recorded states", "coarse propagator", "coarse step", "coarse step with h halved", "redistribute"]
FORWARD += ["ranks without rows"]
ADJOINT = [name for name in FORWARD if name not in ("recorded states", "coarse step with h halved")]
ALL = {f"forward: {name}" for name in FORWARD} | {f"adjoint: {name}" for name in ADJOINT}
ALL |= {f"adjoint: {name}" for name in ("linear", "transposed Jacobian", "gradient of the weights")}
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


def names(checks) -> set[str]:
    return {check.name for check in checks}


# ---- The library's own.


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("scheme", ["euler", "midpoint"])
@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("activation", ["tanh", "smooth_relu", "relu", "identity"])
def test_dense_steps(activation, scheme, parts, dtype):
    sizes = torch.linspace(0.02, 0.15, n * parts, dtype=dtype)
    for h in (0.1, sizes):
        steps = dense(activation, n * parts, dtype, h=h, scheme=scheme, parts=parts)
        report = check_propagator(steps, cfactor=4)
        report.require()
        # In single precision the coarse step may be right to rounding.
        missing = {name for name, why in report.left_out if why == "the coarse step is exact"}
        assert report.passed and names(report.checks) == ALL - missing and len(report.left_out) == len(missing)
        assert not missing or dtype == torch.float32


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_any_intervals(rows):
    for cfactor in range(1, rows + 1):
        if rows % cfactor == 0:
            report = check_propagator(dense(rows=rows), cfactor=cfactor)
            assert report.passed and names(report.checks) == ALL


@pytest.mark.parametrize("vmap", [False, True])
@pytest.mark.parametrize("name", ["mlp", "convolution", "attention", "tied", "frozen", "dropout"])
def test_module_steps(name, vmap):
    """Also where graphs of the recorded relaxation serve the adjoint, and steps have two parts."""
    if name == "dropout" and vmap:
        pytest.skip("layers with masks of their own are evaluated one by one")
    case = CASES[name] if name in CASES else Case(Dropped, (B, C))
    torch.manual_seed(4)
    block = ModuleBlock(case.block())
    theta = torch.cat([block.join([part[None] for part in block.tensors_of(case.block())]) for _ in range(4)])
    assert name != "dropout" or block.is_random
    made = ModuleSteps(block, theta, 0.1, tuple(range(4)), vmap=vmap)
    for options in [{"tape": Tape()}] + [{"scheme": "midpoint", "parts": 2}, {}] * (name == "tied"):
        steps = replace(made, **options)
        states = ref.random(4 // steps.parts, *case.shape, seed=1)
        report = check_propagator(steps, states=states)
        report.require()
        assert names(report.checks) == ALL and not report.left_out


def test_states_of_propagators_and_what_is_recorded_in_them():
    """Without states: those of the adjoint, or random ones; `states` and `gradient` are put back."""
    steps, states = dense(), ref.random(n, 4, B, seed=1)
    kept, gradient = states.clone(), ref.random(*steps.theta.shape, seed=2)
    before = gradient.clone()
    forward, adjoint = Forward(steps, states, states[0]), Adjoint(steps, states, gradient)
    for given in ({}, {"states": states}):
        report = check_propagator(forward, adjoint, **given)
        assert report.passed and names(report.checks) == ALL
        assert torch.equal(states, kept) and torch.equal(gradient, before)
    alone = check_propagator(Forward(steps, None, states[0]))
    assert alone.passed and names(alone.checks) == {f"forward: {name}" for name in FORWARD} - {
        "forward: recorded states"
    }
    assert [name for name, _ in alone.left_out] == ["forward: recorded states"]
    without = check_propagator(forward, replace(adjoint, gradient=None))
    assert without.passed and without.left_out == (
        ("adjoint: gradient of the weights", "the adjoint has no attribute `gradient`"),
    )


def test_propagators_that_keep_everything_to_themselves():
    """What is not in an attribute is left out, and said to be."""
    steps, states = dense(), ref.random(n, 4, B, seed=1)
    report = check_propagator(Own(Forward(steps, None, states[0])), Own(Adjoint(steps, states, None)), states=states)
    out = {"forward: recorded states", "forward: coarse step with h halved", "adjoint: gradient of the weights"}
    assert report.passed and names(report.checks) == ALL - out and {name for name, _ in report.left_out} == out
    with pytest.raises(ValueError, match=r"states=None, but .*; use states=torch.randn\(n, \*S\), n layers"):
        check_propagator(Own(Forward(steps, None, states[0])))


def test_the_order_of_the_differences_is_seen():
    """2 for a smooth step; 0 for an adjoint that is wrong, however small the differences."""
    good = check_propagator(dense())["adjoint: transposed Jacobian"]
    assert "order 2.0" in good.note and good.measured < 1e-9
    bad = check_propagator(*broken()["sign"])["adjoint: transposed Jacobian"]
    assert "order 0.0" in bad.note
    assert bad.measured > 1e-3


def test_the_example_of_the_docstring():
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(check_propagator, "check_propagator", globs={})
    failed, attempted = doctest.DocTestRunner().run(test)
    assert attempted >= 8 and failed == 0


# ---- Broken ones.


@pytest.mark.parametrize("kind", FAILS)
def test_what_is_broken_fails_the_check_that_it_breaks(kind):
    forward, adjoint = broken()[kind]
    states = ref.random(n, 4, B, seed=1)
    report = check_propagator(forward, adjoint, states=states)
    assert names(report.failures) == {FAILS[kind]} and not report.passed, str(report)
    with pytest.raises(ValueError, match="failed 1 check") as raised:
        report.require()
    (failure,) = report.failures
    for text in (str(raised.value), str(report)):
        flat = " ".join(text.split())
        assert f"{failure.name}: {failure.meaning}" in flat and failure.note in flat
    assert failure.meaning and (failure.measured > failure.bound or math.isnan(failure.measured))


# ---- The report, and arguments that do not fit.


def test_the_table():
    checks = (Check("forward: relax", 2.5e-13, 2e-12, True), Check("adjoint: linear", 3.0, 0.0, False, "seen", "meant"))
    report = PropagatorReport("check_propagator(Mine)", checks, (("adjoint: relax", "needs 'linear'"),))
    assert str(report).split("\n") == [
        "check_propagator(Mine): 2 checks, 1 failed",
        "                    measured      bound",
        "  forward: relax     2.5e-13    2.0e-12  ok",
        "  adjoint: linear          3          0  FAILED",
        "  adjoint: linear: meant (seen)",
        "  left out: adjoint: relax (needs 'linear')",
    ]
    assert not report.passed and report["adjoint: linear"] is checks[1] and report.failures == checks[1:]
    with pytest.raises(KeyError, match="forward: inputs"):
        report["forward: inputs"]
    with pytest.raises(ValueError, match=r"check_propagator\(Mine\) failed 1 check\n  adjoint: linear: meant \(seen\)"):
        report.require()
    replace(report, checks=checks[:1]).require()


def test_a_tolerance_of_ones_own():
    """Below rounding nothing passes that is not the same bits."""
    steps, states = dense(), ref.random(n, 4, B, seed=1)
    adjoint = Adjoint(steps, states, None)
    strict = check_propagator(Forward(steps, None, states[0]), adjoint, tolerance=1e-18)
    assert "adjoint: linear" in names(strict.failures)
    assert check_propagator(*broken()["rows"], states=states, tolerance=0.1)["forward: rows apart"].passed


def test_the_same_seed_gives_the_same_report():
    assert str(check_propagator(dense(), seed=3)) == str(check_propagator(dense(), seed=3))
    assert check_propagator(dense(), seed=3).checks != check_propagator(dense(), seed=4).checks


def test_arguments_that_do_not_fit():
    steps, states = dense(), ref.random(n, 4, B, seed=1)
    with pytest.raises(ValueError, match=r"len\(states\)=8 is not a multiple of cfactor=3; use 6 or 9"):
        check_propagator(steps, cfactor=3)
    with pytest.raises(ValueError, match="cfactor=0 must be at least 1; use 2"):
        check_propagator(steps, cfactor=0)
    with pytest.raises(ValueError, match="adjoint must be None beside steps"):
        check_propagator(steps, Adjoint(steps, states, None))
    for wrong in (states[0, 0, 0], states.long()):
        with pytest.raises(ValueError, match=r"states=.* must be numbers \(n, \*S\); use"):
            check_propagator(steps, states=wrong)
    with pytest.raises(ValueError, match=r"states.shape=\(0, 4, 5\) has no rows"):
        check_propagator(steps, states=states[:0])
    block = ModuleBlock(Dropped().double())
    with pytest.raises(ValueError, match="states=None, but the shape of a state is not known"):
        check_propagator(ModuleSteps(block, torch.zeros(n, block.row_size), 0.1, tuple(range(n))))
    assert xbraid_py.check_propagator is check_propagator
