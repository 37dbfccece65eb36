"""The optimizers of the levels on networks: one level is the plain optimizer; metrics, frozen weights, momentum."""

import pytest
import torch
from mgopt_runs import by_autograd, last, mgopt, pairwise, problem, split

from xbraid_py.multilevel.depth.options import LevelOptions
from xbraid_py.optim import OneShot, OneShotOptions

ARMIJO = LevelOptions(method=("lbfgs",), learning_rate=(1.0,), line_search=True)


@pytest.mark.parametrize("method", ["gd", "momentum", "adam"])
def test_one_level_is_the_plain_optimizer_bitwise(method):
    run = mgopt(schedule="[{2}]", optim=LevelOptions(method=(method,), learning_rate=(0.05,)))
    weights = torch.nn.Parameter(run.x.clone())
    plain = {
        "gd": lambda: torch.optim.SGD([weights], lr=0.05),
        "momentum": lambda: torch.optim.SGD([weights], lr=0.05, momentum=0.9),
        "adam": lambda: torch.optim.Adam([weights], lr=0.05),
    }[method]()
    objective = problem().objective(16)
    last(run, 5)
    for _ in range(10):
        objective.evaluate(weights.data)
        weights.grad = objective.gradient(weights.data)
        plain.step()
    assert torch.equal(run.x, weights.data)


def test_one_level_is_lbfgs_bitwise():
    run = mgopt(schedule="[{1}]", optim=ARMIJO)
    plain = OneShot(problem().objective(16), OneShotOptions(), run.x)
    for _ in plain.run(15):
        pass
    last(run, 15)
    # s is the difference of the same two points, the fallback of neither was needed.
    assert torch.equal(run.x, plain.x)


@pytest.mark.parametrize("method", ["gd", "momentum", "adam", "lbfgs"])
def test_frozen_weights_stay_and_the_metric_scales_the_layers(method):
    optim = LevelOptions(method=(method,), learning_rate=(0.01,), line_search=method == "lbfgs")
    for fine, coarse, stays in (("ends", "ends", 1), ("layers", "layers", 0)):
        run = mgopt(fine_moves=fine, coarse_moves=coarse, optim=optim)
        start = split(run.x)
        last(run, 2)
        moved = [not torch.equal(a, b) for a, b in zip(start, split(run.x), strict=True)]
        assert moved == [stays == 1, stays == 0, stays == 1]


def test_gradient_descent_in_l2():
    run = mgopt(schedule="[{1}]", metric="L2", optim=LevelOptions(learning_rate=(0.01,)))
    gradient = by_autograd(run.x, 16, torch.tanh, 2e-2)[1]
    expected = run.x - 0.01 * pairwise(gradient, lambda theta: 16 * theta)  # 1/h = 16
    last(run, 1)
    torch.testing.assert_close(run.x, expected, rtol=1e-12, atol=1e-13)


def test_lbfgs_in_a_metric_is_lbfgs_in_scaled_variables():
    run = mgopt(schedule="[{1}]", metric="L2", optim=ARMIJO)
    root = pairwise(torch.ones_like(run.x), lambda theta: 4 * theta)
    inner = problem().objective(16)

    class Scaled:
        def evaluate(self, z, max_iter=None, error=None):
            return inner.evaluate(root * z, max_iter, error)

        def gradient(self, z, max_iter=None, exact=False):
            return root * inner.gradient(root * z, max_iter, exact)

        dots = staticmethod(inner.dots)

    plain = OneShot(Scaled(), OneShotOptions(), run.x / root)
    for _ in plain.run(8):
        pass
    last(run, 8)
    torch.testing.assert_close(run.x, root * plain.x, rtol=1e-8, atol=1e-9)


def test_momentum_is_carried_or_forgotten():
    once, kept, forgotten = (
        mgopt(schedule="[{1}]", optim=LevelOptions(method=(method,), keep=keep))
        for method, keep in (("gd", True), ("momentum", True), ("momentum", False))
    )
    for run in (once, kept, forgotten):
        last(run, 3)
    assert torch.equal(forgotten.x, once.x) and not torch.equal(kept.x, once.x)


def test_momentum_in_a_metric_is_momentum_in_scaled_variables():
    run = mgopt(schedule="[{1}]", metric="L2", optim=LevelOptions(method=("momentum",), learning_rate=(0.01,)))
    root = pairwise(torch.ones_like(run.x), lambda theta: 4 * theta)
    x, velocity = run.x, torch.zeros_like(run.x)
    for _ in range(4):
        velocity = 0.9 * velocity + root * by_autograd(x, 16, torch.tanh, 2e-2)[1]
        x = x - 0.01 * root * velocity
    last(run, 4)
    torch.testing.assert_close(run.x, x, rtol=1e-11, atol=1e-12)
