"""`check_propagator` of what lacks a method, or has one that raises or gives nonsense; and of a `TimeStepper`.

Nothing of it raises: each is a failed check that names the method and what that is to do.
"""

from __future__ import annotations

import numpy as np
import pytest
import reference as ref
import torch
from broken_propagators import B, Own, dense, n

from xbraid_py import Adjoint, Forward, TimeStepper, check_propagator
from xbraid_py.layers.checking.methods import PROPAGATOR, STEPS

STATES = ref.random(n, 4, B, seed=1)
T = np.linspace(0, 1, n + 1) ** 2


def propagators() -> tuple[Own, Own]:
    steps = dense()
    return Own(Forward(steps, None, STATES[0])), Own(Adjoint(steps, STATES, None))


class OwnSteps:
    """Steps with nothing but what the protocol asks for, some of it missing or other."""

    def __init__(self, without: str = "", **other):
        kept = dense()
        for name in STEPS:
            if name != without:
                setattr(self, name, other.get(name, getattr(kept, name)))


def failed(report) -> str:
    """The only check that has failed, in words."""
    (failure,) = report.failures
    with pytest.raises(ValueError, match="failed 1 check"):
        report.require()
    assert str(report).count("FAILED") == 1
    return f"{failure.name}: {failure.note}"


def other(given: Own, name: str, value) -> Own:
    """With another attribute, or without it."""
    kind = type("Other", (Own,), {})
    if value is None and name in vars(Own):
        members = {key: each for key, each in vars(Own).items() if key != name and not key.startswith("__")}
        kind = type("Other", (), members | {"__init__": Own.__init__})
    made = kind(given._kept)
    if value is not None:
        setattr(made, name, value)
    elif name in vars(made):
        delattr(made, name)
    return made


def test_what_is_whole_passes():
    for forward, adjoint in (propagators(), (OwnSteps(), None)):
        report = check_propagator(forward, adjoint, states=STATES)
        report.require()
        assert report["forward: methods"].passed and report["adjoint: methods"].passed


@pytest.mark.parametrize("name", PROPAGATOR)
def test_a_propagator_that_lacks_something(name):
    forward, adjoint = propagators()
    report = check_propagator(other(forward, name, None), adjoint, states=STATES)
    assert failed(report) == f"forward: methods: {name} is missing: {PROPAGATOR[name][1]}"
    assert report.left_out == (("all others", "the methods have to be there first"),)
    report = check_propagator(forward, other(adjoint, name, None), states=STATES)
    assert failed(report) == f"adjoint: methods: {name} is missing: {PROPAGATOR[name][1]}"


@pytest.mark.parametrize("name", STEPS)
def test_steps_that_lack_something(name):
    for given in (OwnSteps(without=name), Forward(OwnSteps(without=name), None, STATES[0])):
        report = check_propagator(given)  # nor need the states be known
        assert failed(report) == f"forward: methods: {name} is missing: {STEPS[name][1]}"


def test_what_is_no_propagator_at_all():
    for neither in (other, torch.nn.Linear(4, 4), None, "step"):
        text = failed(check_propagator(neither, states=STATES))
        assert text.startswith("forward: methods: ") and "step is missing: step(x) takes states x (n, *S)" in text


def test_what_cannot_be_called():
    forward, adjoint = propagators()
    text = failed(check_propagator(other(forward, "coarsen", lambda cfactor: None), adjoint, states=STATES))
    assert text.startswith(
        "forward: methods: coarsen cannot be called with 4 arguments (too many positional arguments): "
    )
    assert "coarsen(cfactor, weights, scheme, parts) gives a propagator" in text
    text = failed(check_propagator(OwnSteps(relax=3), states=STATES))
    assert text.startswith("forward: methods: relax is int and no method: relax(points, cfactor, tau, inputs, record)")
    text = failed(check_propagator(OwnSteps(theta=[1.0], parts=0), states=STATES))
    assert "theta is list: the weights, a tensor" in text and "parts is 0: how many smaller steps" in text


def raising(*arguments):
    raise ZeroDivisionError("nothing\nto divide")


# The check that fails if a method raises, or gives None.
FAILS = {
    "step": "forward: shapes and types",
    "relax": "forward: shapes and types",
    "empty": "forward: shapes and types",
    "coarsen": "forward: coarse propagator",
    "redistribute": "forward: redistribute",
}


@pytest.mark.parametrize("name", FAILS)
def test_methods_that_raise_or_give_nothing(name):
    forward, adjoint = propagators()

    def method(*arguments):
        return raising(*arguments)

    method.__code__ = method.__code__.replace(co_name=name)
    text = failed(check_propagator(other(forward, name, method), adjoint, states=STATES))
    assert text.startswith(f"{FAILS[name]}: {name} has raised ZeroDivisionError: nothing to divide (test_checking_m")
    assert text.endswith(f"; {PROPAGATOR[name][1]}")
    text = failed(check_propagator(other(forward, name, lambda *arguments: None), adjoint, states=STATES))
    assert text.startswith(FAILS[name]) and "NoneType" in text


@pytest.mark.parametrize(
    ("name", "check"), [("relax", "forward: relax"), ("relax_adjoint", "adjoint: shapes and types")]
)
def test_steps_that_raise(name, check):
    def method(*arguments):
        return raising(*arguments)

    method.__code__ = method.__code__.replace(co_name=name)
    text = failed(check_propagator(OwnSteps(**{name: method}), states=STATES))
    assert text.startswith(f"{check}: {name} has raised ZeroDivisionError: nothing to divide")


def test_properties_that_raise():
    forward, adjoint = propagators()
    for name in ("cost", "direction", "transfer"):
        kind = type("Other", (Own,), {name: property(lambda self: raising()), "__init__": lambda self, kept: None})
        made = kind(None)
        made._kept = forward._kept
        for key in {"cost", "direction", "transfer"} - {name}:
            setattr(made, key, getattr(forward, key))
        report = check_propagator(made, adjoint, states=STATES)
        # How states come to the level is only asked of coarse ones.
        assert report.passed if name == "transfer" else "ZeroDivisionError: nothing to divide" in failed(report)


# ---- Functions step(u, t0, t1).


def decay(u, t0, t1):
    return u / (1 + (t1 - t0) * (1 + u * u))


@pytest.mark.parametrize("shape", [(n,), (n, 3), (n, 4, B)])
def test_time_steppers(shape):
    states = ref.random(*shape, seed=1)
    report = check_propagator(TimeStepper(decay), states=states, t=T)
    report.require()
    assert "adjoint: transposed Jacobian" in {check.name for check in report.checks}
    assert report.subject.startswith(f"check_propagator(TimeStepper), {n} rows of states")
    arrays = check_propagator(TimeStepper(decay), states=states.numpy(), t=list(T), cfactor=4)
    arrays.require()
    assert not [check for check in arrays.checks if check.name.startswith("adjoint")]
    single = check_propagator(TimeStepper(decay), states=states.float(), t=torch.from_numpy(T))
    single.require()


def in_place(u, t0, t1):
    return u.mul_(1 + t0 - t1)


def random(u, t0, t1):
    return u + 1e-6 * torch.rand(())


STEPPERS = {
    "in place": (in_place, "forward: arguments kept", "points was overwritten"),
    "random": (random, "forward: the same twice", "numbers differ"),
    "shape": (lambda u, t0, t1: u[:1], "forward: shapes and types", "ValueError: step(u, 0, 0.015625) gives (1, 5)"),
    "type": (
        lambda u, t0, t1: u.float(),
        "forward: shapes and types",
        "gives (4, 5) float32 on cpu; use a state like u",
    ),
    "nothing": (lambda u, t0, t1: None, "forward: shapes and types", "gives NoneType; use a tensor like u"),
    "raises": (lambda u, t0, t1: raising(), "forward: shapes and types", "ZeroDivisionError: nothing to divide"),
    "arguments": (lambda u, t: u, "forward: shapes and types", "takes 2 positional arguments but 3 were given"),
    "detached": (lambda u, t0, t1: decay(u.detach(), t0, t1), "adjoint: transposed Jacobian", "order 0.0"),
}


@pytest.mark.parametrize("kind", STEPPERS)
def test_time_steppers_that_are_broken(kind):
    step, check, words = STEPPERS[kind]
    text = failed(check_propagator(TimeStepper(step), states=STATES, t=T))
    assert text.startswith(check) and words in text


def test_what_a_time_stepper_does_not_say():
    for given in ({}, {"states": STATES}, {"t": T}):
        with pytest.raises(ValueError, match="states=None or t=None, but a TimeStepper says nothing of either; use"):
            check_propagator(TimeStepper(decay), **given)
    with pytest.raises(ValueError, match=r"t has the shape \(8,\) and must be \(9,\), one more than states"):
        check_propagator(TimeStepper(decay), states=STATES, t=T[1:])
    with pytest.raises(ValueError, match="adjoint must be None beside steps"):
        check_propagator(TimeStepper(decay), propagators()[1], states=STATES, t=T)
