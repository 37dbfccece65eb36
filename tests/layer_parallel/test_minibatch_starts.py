"""Minibatch training whose tolerances go by the noise of the minibatch's gradient: the noise, the rule, whole runs."""

from __future__ import annotations

import math

import pytest
import reference as ref
import torch
from blocks import CASES, Case, distance, gradients, loop, loop_gradients, unstacked

import xbraid_py
from xbraid_py import MGRIT, GradientControl
from xbraid_py.layer_parallel.accuracy import Controller

UPDATES = 12
NOISY = GradientControl(noise=0.25, check=5)
WIDE = Case(lambda: xbraid_py.DenseBlock(4, "tanh", 1.5), (9, 4))


def controller(**accuracy) -> Controller:
    return Controller(GradientControl(**{"noise": 0.5, "check": 4, "max_level": 2, **accuracy}), True)


def norm_of(found: dict) -> float:
    """2-norm of all of them together."""
    return math.sqrt(sum(float(value.square().sum()) for value in found.values()))


def relative(found: dict, exact: dict) -> float:
    return norm_of({name: found[name] - exact[name] for name in exact}) / norm_of(exact)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1.0}, "noise=-1.0 must be at least 0 and finite; use 0.25, or 0 for gradient_error"),
        ({"noise": float("nan")}, "noise=nan must be at least 0 and finite; use 0.25, or 0 for gradient_error"),
        ({"noise": 0.25, "check": 0}, "noise=0.25 with check=0: nothing would ever be measured; use check=100"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError) as caught:
        GradientControl(**options)
    assert str(caught.value) == message


# ---- The rule


def test_looser_while_errors_are_far_below_the_noise():
    made = controller()
    assert made.bound == 0.1, "as long as nothing is known of the noise"
    _, event = made.observe(0.01, 0.05, (3, 2), 0.8)
    assert made.bound == 0.4 and made.level == -1 and made.checks_now, "what has changed is measured"
    assert event == "gradient error 0.05 below 0.5 of 0.4: 1 loosening(s)"
    assert made.observe(0.05, 0.21, (2, 2), 0.8)[1] == "" and made.level == -1 and not made.checks_now
    assert made.observe(0.05, None, (2, 2))[1] == "", "an estimate loosens nothing"
    made.observe(0.05, None, (2, 2))
    made.observe(0.05, 0.1, (2, 2), 0.8)
    made.observe(0.05, 0.1, (2, 2), 0.8)
    assert made.level == -2, "not below -max_level"


def test_one_sweep_is_as_loose_as_it_gets():
    made = controller()
    assert made.observe(0.01, 0.001, (1, 1), 0.8)[1] == "" and made.level == 0 and not made.checks_now


def test_it_does_not_go_to_and_fro():
    made = controller()
    made.observe(0.01, 0.05, (2, 2), 0.8)
    assert made.level == -1
    assert made.observe(0.5, 0.5, (1, 1), 0.8)[1] == "gradient error 0.5 above 0.4: 0 tightening(s)"
    assert made.level == 0 and made.checks_now
    assert made.observe(0.01, 0.05, (2, 2), 0.8)[1] == "" and made.level == 0 and not made.checks_now
    assert made.observe(0.01, None, (2, 2))[1] == ""
    assert made.observe(0.01, 0.05, (2, 2), 0.8)[1].endswith("1 loosening(s)"), "the next regular measurement"


@pytest.mark.parametrize("noise", [None, 0.0, float("nan"), float("inf")])
def test_without_a_noise_the_bound_is_that_of_the_error(noise):
    made = controller()
    assert made.observe(0.01, 1e-4, (3, 2), noise)[1] == "" and made.bound == 0.1 and made.level == 0
    assert made.observe(0.01, 0.2, (3, 2), noise)[1].endswith("1 tightening(s)")


def test_a_small_noise_asks_for_nothing_more():
    made = controller()
    assert made.observe(0.01, 0.08, (3, 2), 1e-3)[1] == "" and made.bound == 0.1 and made.level == 0


def test_without_asking_for_it_or_adapting_nothing_is_loosened():
    for options in ({"noise": 0.0}, {"adapt": False}):
        made = controller(**options)
        made.observe(0.01, 1e-4, (3, 2), 0.8)
        assert made.level == 0


def test_states_of_checkpoints():
    made, other = controller(), controller()
    for residuals, measured in [(0.01, 0.05), (0.5, 0.5), (0.02, 0.05)]:
        made.observe(residuals, measured, (2, 2), 0.8)
        other.restore(made.state())
        assert other.state() == made.state() and other.bound == made.bound
        assert other.checks_now == made.checks_now
    for measured in (None, 0.05, 0.05):
        assert made.observe(0.01, measured, (2, 2), 0.7) == other.observe(0.01, measured, (2, 2), 0.7)
    old = {name: value for name, value in made.state().items() if name not in ("noise", "tightened")}
    other.restore(old)
    assert other.noise == 0.0 and other.level == made.level, "of an earlier version"


# ---- The noise


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("recompute", [False, "states"])
@pytest.mark.parametrize(("block", "samples"), [("dense", 7), ("dense sequences", 5), ("convolution", 4), ("dense", 1)])
def test_noise_from_halves(spmd, block, samples, recompute):
    case = CASES[block]
    slope = ref.random(samples, *case.shape[1:], seed=5)

    def body(comm):
        stack = case.stack(comm, 16, 2.0, mgrit=MGRIT(cfactor=4), accuracy=NOISY, recompute=recompute)
        stack(case.input(batch=samples)).backward(slope)
        return stack.record, gradients(stack), stack.state_dict()

    results = spmd(body)
    modules = unstacked(results[0][2], case)
    u = case.input(batch=samples)
    count = samples - samples // 2
    means = []
    for half in (slice(0, count), slice(count, None)):
        modules.zero_grad()
        if len(u[half]):
            loop(modules, u[half]).backward(slope[half])
            share = len(u[half]) / samples
            means.append({name: value / share for name, value in loop_gradients(modules).items()})
    modules.zero_grad()
    loop(modules, u).backward(slope)
    exact = loop_gradients(modules)
    if samples == 1:
        expected = 0.0
    else:
        apart = norm_of({name: means[0][name] - means[1][name] for name in exact})
        expected = math.sqrt(count * (samples - count)) / samples * apart / norm_of(exact)
    for record, gradient, _ in results:
        assert record == results[0][0] and record.measured, "the same on all ranks"
        assert record.noise == pytest.approx(expected, rel=1e-10)
        assert distance(gradient, exact) < 1e-12


# ---- Training


def train(comm, accuracy, updates=range(UPDATES), state=None):
    """Records of all updates, the true errors of the gradients, the weights, and what a checkpoint would hold."""
    stack = WIDE.stack(comm, 32, 3.0, mgrit=MGRIT(), accuracy=accuracy)
    optimizer = torch.optim.SGD(stack.parameters(), 0.02)
    if state is not None:
        stack.load_state_dict(state[0])
        stack.load_solver_state(state[1])
    exact = WIDE.stack(comm, 32, 3.0, mgrit=MGRIT(max_levels=1))
    records, errors = [], []
    for number in updates:
        u = WIDE.input(seed=number, batch=9)
        exact.load_state_dict(stack.state_dict())
        exact.zero_grad()
        ((exact(u) - torch.sin(3 * u)) ** 2).mean().backward()
        optimizer.zero_grad()
        ((stack(u) - torch.sin(3 * u)) ** 2).mean().backward()
        errors.append(relative(gradients(stack), gradients(exact)))
        records.append(stack.record)
        optimizer.step()
    return records, errors, (stack.state_dict(), stack.solver_state())


def test_fewer_sweeps_and_errors_below_the_bound():
    records, errors, _ = train(None, NOISY)
    usual, _, _ = train(None, GradientControl(check=5))
    settled = range(5, UPDATES)
    assert all(records[n].iterations <= 2 and records[n].adjoint_iterations <= 2 for n in settled)
    total, before = (sum(r.iterations + r.adjoint_iterations for r in each[5:]) for each in (records, usual))
    assert total < before
    assert records[-1].level < 0 == usual[-1].level and usual[-1].noise == 0.0
    for n in settled:
        # An error above the bound is found by the estimate, and then measured.
        bound = max(0.1, 0.25 * records[n].noise)
        assert errors[n] <= bound or records[n].gradient_error > bound
    assert any(errors[n] > 1e-6 for n in settled), "solves are not exact"


@pytest.mark.ranks(1, 2, 3)
def test_the_same_on_any_number_of_ranks(spmd):
    expected, _, (weights, state) = train(None, NOISY)
    for records, _, found in spmd(lambda comm: train(comm, NOISY)):
        for record, other in zip(records, expected, strict=True):
            for name in ("level", "mode", "iterations", "adjoint_iterations", "measured", "event"):
                assert getattr(record, name) == getattr(other, name), (record.update, name)
            assert record.noise == pytest.approx(other.noise, rel=1e-12)
        assert found[1]["accuracy"]["level"] == state["accuracy"]["level"]
        assert all(torch.allclose(found[0][name], weights[name], rtol=1e-12, atol=1e-14) for name in weights)


@pytest.mark.ranks(1, 2, 3)
@pytest.mark.parametrize("cut", [1, 6])
def test_it_goes_on_bit_by_bit(spmd, cut):
    def body(comm):
        records, _, (weights, state) = train(comm, NOISY)
        first, _, kept = train(comm, NOISY, range(cut))
        rest, _, (found, found_state) = train(comm, NOISY, range(cut, UPDATES), kept)
        same = all(torch.equal(found[name], weights[name]) for name in weights)
        return first + rest == records and same and found_state == state

    assert all(spmd(body))


@pytest.mark.ranks(1, 2)
def test_windows_go_by_noises_of_their_own(spmd):
    def body(comm):
        def run(updates, state=None):
            stack = WIDE.stack(comm, 32, 3.0, mgrit=MGRIT(cfactor=4), accuracy=NOISY, windows=2)
            optimizer = torch.optim.SGD(stack.parameters(), 0.02)
            if state is not None:
                stack.load_state_dict(state[0])
                stack.load_solver_state(state[1])
            found = []
            for number in updates:
                optimizer.zero_grad()
                (stack(WIDE.input(seed=number, batch=9)) ** 2).mean().backward()
                optimizer.step()
                found.append(stack.records)
            return found, (stack.state_dict(), stack.solver_state())

        every, _ = run(range(8))
        first, kept = run(range(3))
        rest, _ = run(range(3, 8), kept)
        return first + rest == every, every

    results = spmd(body)
    for same, every in results:
        assert same and every == results[0][1]
        first, second = every[0]
        assert first.noise > 0.0 < second.noise != first.noise
        assert all(record.level < 0 for record in every[-1])
