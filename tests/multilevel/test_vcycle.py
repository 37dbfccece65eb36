"""The cycle on objectives that are no networks: it knows nothing but value, gradient and transfers."""

import pytest
import torch
from objectives import evaluation, numbers, plain_dots

from xbraid_py.multilevel.vcycle import Damping, VCycle
from xbraid_py.optim import Armijo, FixedStep, QuasiNewton
from xbraid_py.optim.levels import GradientDescent, Point, QuasiNewtonOptimizer, TorchOptimizer
from xbraid_py.optim.objective import ShiftedObjective


class Membrane:
    """h sum ((x_{i+1} - x_i) / h)^2 / 2 + h sum (exp(x_i) - f_i x_i), 0 at both ends: n points, h = 1 / (n + 1).

    A nonlinear elliptic problem, for which multigrid is made.
    """

    shift = None

    def __init__(self, n: int):
        self.h, self.n, self.gradients, self.evaluations = 1 / (n + 1), n, 0, 0
        self.f = torch.sin(torch.arange(1, n + 1).double() * self.h * 3) * 40

    def evaluate(self, x, max_iter=None, error=None):
        self.evaluations += 1
        jumps = torch.nn.functional.pad(x, (1, 1)).diff() / self.h
        return evaluation(float(self.h * (jumps.square().sum() / 2 + (x.exp() - self.f * x).sum())))

    def gradient(self, x, max_iter=None, exact=False):
        self.gradients += 1
        second = torch.nn.functional.pad(x, (1, 1)).diff().diff() / self.h
        return self.h * (x.exp() - self.f) - second

    dots = staticmethod(plain_dots)


class Line:
    """Linear interpolation between n and 2 n + 1 points; values at the coarse points are injected."""

    def __init__(self, n: int):
        self.I = torch.zeros(2 * n + 1, n, dtype=torch.float64)
        for k in range(n):
            self.I[2 * k : 2 * k + 3, k] = torch.tensor([0.5, 1.0, 0.5])

    def prolong(self, x):
        return self.I @ x

    def restrict(self, x):
        return x[1::2].clone()

    def restrict_gradient(self, gradient):
        return self.I.T @ gradient

    def renewed(self, x):
        return self


def membrane(levels: int, finest: int, **options) -> VCycle:
    sizes = [finest]
    for _ in range(levels - 1):
        sizes.append((sizes[-1] - 1) // 2)
    objectives = [Membrane(n) for n in sizes]
    smoothers = [GradientDescent(0.3 * each.h) for each in objectives]  # the Hessian is about 4 / h
    return VCycle(
        objectives,
        [Line(n) for n in sizes[1:]],
        smoothers,
        [2] * (levels - 1),
        [2] * (levels - 1),
        60,
        **options,
    )


@pytest.mark.parametrize("cycle", ["V", "W"])
def test_multigrid_rates_do_not_depend_on_the_size(cycle):
    rates = []
    for levels, finest in ((3, 31), (4, 63), (5, 127))[: 3 if cycle == "V" else 2]:
        multigrid = membrane(levels, finest, cycle=cycle)
        point, fine, norms = Point(torch.zeros(finest).double()), multigrid.objectives[0], []
        for _ in range(9):
            point = multigrid.run(point)
            norms.append(float(fine.gradient(point.x).norm()))
        rates.append((norms[-1] / norms[3]) ** 0.2)
    assert max(rates) < 0.25
    # Gradient descent alone, for comparison: five steps for the four and one of a cycle.
    plain, x = Membrane(31), torch.zeros(31).double()
    norms = []
    for _ in range(45):
        x = x - 0.3 * plain.h * plain.gradient(x)
        norms.append(float(plain.gradient(x).norm()))
    assert (norms[44] / norms[19]) ** 0.2 > 0.8


def test_full_multigrid_reaches_the_error_of_the_grid():
    multigrid = membrane(4, 63)
    exact = membrane(4, 63)
    point = Point(torch.zeros(63).double())
    for _ in range(30):
        point = exact.run(point)
    started = multigrid.full_multigrid(torch.zeros(63).double())
    one_cycle = membrane(4, 63).run(Point(torch.zeros(63).double()))
    # One cycle on the finest level in both; the nested start brings the rest.
    assert (started.x - point.x).norm() < (one_cycle.x - point.x).norm() / 5
    assert (started.x - point.x).norm() / point.x.norm() < 5e-3


def test_a_point_is_evaluated_once():
    multigrid = membrane(2, 7)
    fine, coarse = multigrid.objectives
    multigrid.run(Point(numbers(7, seed=1)).complete(fine))
    assert (fine.evaluations, fine.gradients) == (5, 5)  # 2 before, 1 for the coupling, 2 after
    assert (coarse.evaluations, coarse.gradients) == (60, 60)  # the first one is that of the coupling


def test_shifted_objective():
    objective, shift, x = Membrane(5), numbers(5, seed=1), numbers(5, seed=2)
    shifted = ShiftedObjective(objective, shift)
    plain, found = objective.evaluate(x), shifted.evaluate(x)
    assert found.value == pytest.approx(plain.value + float(shift @ x)) and found.loss == plain.loss
    assert torch.equal(shifted.gradient(x), objective.gradient(x) + shift)


@pytest.mark.parametrize("method", ["lbfgs", "steepest"])
def test_pairs_hold_from_one_coupling_term_to_the_next(method):
    """Minimizing with another shift in every call, the pairs are those of the unshifted objective."""
    objective = Membrane(6)
    seen = QuasiNewton(method, plain_dots)
    optimizer = QuasiNewtonOptimizer(seen, Armijo())
    x, points = Point(numbers(6, seed=3)), []
    for seed in range(5):
        shifted = ShiftedObjective(objective, 0.1 * numbers(6, seed=seed))
        points.append(x.x)
        x = Point(optimizer.minimize(shifted, x, 1).x)
    gradients = [objective.gradient(each) for each in points]
    wanted = [b - a for a, b in zip(gradients, gradients[1:], strict=False)]
    assert len(seen.y) == (4 if method == "lbfgs" else 0)
    for y, each in zip(seen.y, wanted, strict=False):
        torch.testing.assert_close(y, each, rtol=1e-9, atol=1e-10)


def test_optimizers_forget_when_asked():
    objective, start = Membrane(6), Point(numbers(6, seed=3))
    for make in (
        lambda: TorchOptimizer(lambda weights: torch.optim.Adam(weights, lr=0.1)),
        lambda: QuasiNewtonOptimizer(QuasiNewton("lbfgs", plain_dots), FixedStep(0.1)),
    ):
        optimizer = make()
        first = optimizer.minimize(objective, start, 3).x
        optimizer.reset()
        assert torch.equal(optimizer.minimize(objective, start, 3).x, first)
        assert not torch.equal(optimizer.minimize(objective, start, 3).x, first)


def test_an_optimizer_without_descent_stays():
    objective = Membrane(6)
    uphill = QuasiNewtonOptimizer(QuasiNewton("steepest", plain_dots), Armijo(max_backtracks=0), learning_rate=1e6)
    start = Point(numbers(6, seed=3))
    assert torch.equal(uphill.minimize(objective, start, 4).x, start.x)


def test_lists_that_do_not_fit_are_refused():
    objectives, smoother = [Membrane(7), Membrane(3)], GradientDescent(0.1)
    with pytest.raises(ValueError, match=r"^len\(transfers\)=0 must be 1 for 2 levels; use 1$"):
        VCycle(objectives, [], [smoother] * 2, [1], [1], 1)
    with pytest.raises(ValueError, match=r"^len\(smoothers\)=1 must be 2 for 2 levels; use 2$"):
        VCycle(objectives, [Line(3)], [smoother], [1], [1], 1)
    with pytest.raises(ValueError, match=r"^len\(pre\)=2 must be 1 for 2 levels; use 1$"):
        VCycle(objectives, [Line(3)], [smoother] * 2, [1, 1], [1, 1], 1)
    with pytest.raises(ValueError, match="^cycle='F' must be V or W; use V$"):
        VCycle(objectives, [Line(3)], [smoother] * 2, [1], [1], 1, cycle="F")


def sgd(scale=None):
    return TorchOptimizer(lambda weights: torch.optim.SGD(weights, lr=0.02, momentum=0.9), scale)


def damped_by_hand(x, m, coarse_m, cycles, damping, scales):
    """Two levels, one step before and after and two below, written out: paper 002, algorithm 2, eq. 4 and 36."""
    fine, coarse, line = Membrane(7), Membrane(3), Line(3)
    (D, Dc), rate = scales, 0.02

    def step(x, m, gradient, D):
        m = D.sqrt() * gradient if m is None else 0.9 * m + D.sqrt() * gradient
        return x - rate * D.sqrt() * m, m

    for _ in range(cycles):
        x, m = step(x, m, fine.gradient(x), D)
        xc = start = line.restrict(x)
        tau = coarse.gradient(xc) - line.restrict_gradient(fine.gradient(x))
        mc = coarse_m
        if damping.momentum:
            mc = sent = line.restrict(D.sqrt() * m) / Dc.sqrt()
        for _ in range(2):
            xc, mc = step(xc, mc, coarse.gradient(xc) - damping.coupling * tau, Dc)
        coarse_m = mc
        x = x + damping.correction * line.prolong(xc - start)
        if damping.momentum:
            m = m + damping.momentum * line.prolong(Dc.sqrt() * (mc - sent)) / D.sqrt()
        x, m = step(x, m, fine.gradient(x), D)
    return x


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "damping", [Damping(), Damping(0.25, 0.5, 0.0), Damping(1.0, 1.0, 1.0), Damping(0.0, 0.7, 0.2)]
)
def test_damping_and_momentum_between_levels(damping, scaled):
    scales = [1.0 + numbers(n, seed=n).square() if scaled else torch.ones(n).double() for n in (7, 3)]
    smoothers = [sgd(each if scaled else None) for each in scales]
    cycle = VCycle([Membrane(7), Membrane(3)], [Line(3)], smoothers, [1], [1], 2, damping=damping)
    start = numbers(7, seed=5)
    point = Point(start)
    for _ in range(3):
        point = cycle.run(point)
    expected = damped_by_hand(start, None, None, 3, damping, scales)
    torch.testing.assert_close(point.x, expected, rtol=1e-12, atol=1e-13)


def test_the_first_moment_of_adam_is_carried_once_the_coarse_level_has_second_ones():
    def adam():
        return TorchOptimizer(lambda weights: torch.optim.Adam(weights, lr=0.01))

    def run(cycles, **damping):
        smoothers = [adam(), adam()]
        cycle = VCycle([Membrane(7), Membrane(3)], [Line(3)], smoothers, [1], [1], 2, damping=Damping(**damping))
        point = Point(numbers(7, seed=5))
        for _ in range(cycles):
            point = cycle.run(point)
        return point.x, smoothers

    assert torch.equal(run(1, momentum=1.0)[0], run(1)[0])
    assert not torch.equal(run(2, momentum=1.0)[0], run(2)[0])
    fine, coarse = run(2)[1]
    assert fine.momentum.shape == (7,) and coarse.momentum.shape == (3,) and coarse.takes_momentum
    assert not adam().takes_momentum and adam().momentum is None


def test_what_has_no_momentum_takes_none():
    plain = [GradientDescent(0.01), GradientDescent(0.01)]
    found = [
        VCycle([Membrane(7), Membrane(3)], [Line(3)], plain, [1], [1], 2, damping=Damping(momentum=share))
        .run(Point(numbers(7, seed=5)))
        .x
        for share in (0.0, 1.0)
    ]
    assert torch.equal(*found)
    bare = TorchOptimizer(lambda weights: torch.optim.SGD(weights, lr=0.1))
    assert bare.momentum is None and not bare.takes_momentum


@pytest.mark.parametrize("name", ["coupling", "correction", "momentum"])
def test_factors_outside_0_and_1_are_refused(name):
    with pytest.raises(ValueError, match=rf"^{name}=1.5 must lie in \[0, 1\]; use "):
        Damping(**{name: 1.5})
