"""Armijo backtracking and fixed steps."""

from __future__ import annotations

import math

import pytest
import torch
from objectives import evaluation

from xbraid_py.optim import Armijo, FixedStep


@pytest.mark.parametrize("decrease", [1e-4, 0.3, 0.9])
@pytest.mark.parametrize("factor", [0.5, 0.1, 0.9])
@pytest.mark.parametrize("stretch", [0.3, 1.0, 16.0, 1000.0])
@pytest.mark.parametrize(
    "function, slope",
    [(lambda x: x**2, lambda x: 2 * x), (lambda x: math.cosh(x) - x / 2, lambda x: math.sinh(x) - 0.5)],
)
def test_armijo_takes_the_first_step_that_obeys_the_inequality(function, slope, stretch, factor, decrease):
    x, tried = torch.tensor([1.5], dtype=torch.float64), []
    gradient = slope(1.5)
    direction = torch.tensor([stretch * gradient], dtype=torch.float64)

    allowed = []

    def evaluate(trial, error):
        tried.append(float(trial))
        allowed.append(error)
        return evaluation(function(float(trial)) if abs(trial) < 700 else math.inf)

    search = Armijo(decrease=decrease, factor=factor, max_backtracks=200, resolution=0.3)
    trial = search.search(x, function(1.5), direction, stretch * gradient**2, evaluate)

    def obeys(step, value):
        return value <= function(1.5) - decrease * step * stretch * gradient**2

    steps = [factor**k for k in range(len(tried))]
    assert tried == pytest.approx([1.5 - step * stretch * gradient for step in steps], rel=1e-12, abs=1e-12)
    # The objective may be wrong by a share of what the gradient predicts for that very step.
    assert allowed == pytest.approx([0.3 * step * stretch * gradient**2 for step in steps])
    assert trial.step == pytest.approx(steps[-1]) and trial.backtracks == len(tried) - 1
    assert float(trial.x) == tried[-1] and trial.evaluation.value == function(tried[-1])
    assert obeys(trial.step, trial.evaluation.value)
    assert not any(abs(t) < 700 and obeys(s, function(t)) for s, t in zip(steps[:-1], tried[:-1], strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_armijo_rejects_values_that_are_not_finite(bad):
    x = torch.tensor([1.0], dtype=torch.float64)

    def evaluate(trial, error):
        return evaluation(bad if trial < 0.7 else float(trial) ** 2)

    trial = Armijo().search(x, 1.0, torch.tensor([2.0], dtype=torch.float64), 4.0, evaluate)
    assert (trial.step, trial.backtracks) == (0.125, 3) and trial.evaluation.value == 0.75**2


@pytest.mark.parametrize("slope", [0.0, -1.0, math.nan])
def test_armijo_asks_nothing_along_no_descent(slope):
    x = torch.ones(1)
    assert Armijo().search(x, 1.0, x, slope, lambda *_: pytest.fail("evaluated")) is None


@pytest.mark.parametrize("backtracks", [0, 5])
def test_armijo_gives_up(backtracks):
    tried = []
    x = torch.ones(1)
    search = Armijo(max_backtracks=backtracks)
    assert search.search(x, 1.0, x, 1.0, lambda trial, _: tried.append(trial) or evaluation(2.0)) is None
    assert len(tried) == backtracks + 1


def test_a_fixed_step_is_taken_uphill_too():
    x = torch.ones(2)
    trial = FixedStep(0.25).search(x, 1.0, torch.tensor([1.0, -2.0]), -1.0, lambda *_: evaluation(7.0))
    assert trial.x.tolist() == [0.75, 1.5]
    assert (trial.evaluation.value, trial.step, trial.backtracks) == (7.0, 0.25, 0)
