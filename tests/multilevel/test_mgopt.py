"""MG/OPT in depth on nonlinear networks: against a literal reference, its invariants, its cost, and ranks."""

from functools import cache

import pytest
import torch
from mgopt_runs import by_autograd, last, mgopt, pairwise, problem, split

from xbraid_py.comm import SerialCommunicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.multilevel.depth.mgopt import MGOpt
from xbraid_py.multilevel.depth.options import LevelOptions, MGOptOptions
from xbraid_py.optim import OneShot, OneShotOptions
from xbraid_py.optim.levels import Point
from xbraid_py.problem.problem import perceptron_weights
from xbraid_py.recipes.mgopt import training_of
from xbraid_py.recipes.options.mgopt import CirclesOptions
from xbraid_py.run.engine import rows_of

SERIAL = SerialCommunicator()
GD = LevelOptions(learning_rate=(0.3, 0.2, 0.1))
ARMIJO = LevelOptions(method=("lbfgs",), learning_rate=(1.0,), line_search=True)


def prolonged(x):
    """I x, constant."""
    return pairwise(x, lambda t: t.repeat_interleave(2, 0))


# Restrictions of the weights; the last is I^T.
RESTRICT = {
    "inject": lambda x: pairwise(x, lambda t: t[0::2]),
    "average": lambda x: pairwise(x, lambda t: (t[0::2] + t[1::2]) / 2),
    "transpose": lambda x: pairwise(x, lambda t: t[0::2] + t[1::2]),
}


def algorithm_1(x, num_layers, shift, steps, rates, restriction):
    """Algorithm 1 of paper 000, literally, with algorithm 2 for all levels; `steps` as (pre, post) or coarse."""

    def gradient(x):
        found = by_autograd(x, num_layers, torch.tanh, 2e-2)[1]
        return found if shift is None else found + shift

    (now, *later), (rate, *rates) = steps, rates
    if not later:
        for _ in range(now):
            x = x - rate * gradient(x)
        return x
    for _ in range(now[0]):
        x = x - rate * gradient(x)
    start = RESTRICT[restriction](x)
    coarse = by_autograd(start, num_layers // 2, torch.tanh, 2e-2)[1]
    below = RESTRICT["transpose"](gradient(x)) - coarse  # eq. 9
    end = algorithm_1(start, num_layers // 2, below, later, rates, restriction)
    x = x + prolonged(end - start)
    for _ in range(now[1]):
        x = x - rate * gradient(x)
    return x


@pytest.mark.parametrize("activation, function", [("relu", torch.relu), ("tanh", torch.tanh)])
@pytest.mark.parametrize("level", [0, 1])
def test_objectives_of_the_levels_against_autograd(activation, function, level):
    run = mgopt(others={"activation": activation})
    objective = run.objectives[level]
    x = perceptron_weights(objective.network, seed=5) + 0.1
    value, gradient = by_autograd(x, 16 >> level, function, 2e-2)
    assert objective.evaluate(x).value == pytest.approx(value, rel=1e-13)
    torch.testing.assert_close(objective.gradient(x), gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("restriction", RESTRICT)
@pytest.mark.parametrize("schedule, steps", [("[(1), 2, {3}]", [(1, 0), (2, 2), 3]), ("[0/2, {1}]", [(0, 2), 1])])
def test_cycles_are_algorithm_1(restriction, schedule, steps):
    run = mgopt(schedule=schedule, restriction=restriction, optim=GD)
    x = run.x
    for _ in range(2):
        x = algorithm_1(x, 16, None, steps, GD.learning_rate, restriction)
    last(run, 2)
    torch.testing.assert_close(run.x, x, rtol=1e-11, atol=1e-12)


def test_initial_weights():
    x = perceptron_weights(problem(width=10).network(400), seed=1)
    Q, theta, head = x.split([20, 400 * 110, 22])
    weights, biases = theta.view(400, 110).split([100, 10], 1)
    assert abs(weights.std() - 1) < 0.02 and abs(weights.mean()) < 0.02
    assert not biases.any() and not head[20:].any()
    for uniform in (Q, head[:20]):
        assert 0.5 < uniform.abs().max() <= (6 / 12) ** 0.5


@pytest.mark.parametrize("interpolation", ["constant", "linear"])
@pytest.mark.parametrize("restriction", RESTRICT)
def test_first_order_consistency(interpolation, restriction):
    run = mgopt(interpolation=interpolation, restriction=restriction, others={"activation": "relu"})
    point = Point(run.x).complete(run.objectives[0])
    for level in (0, 1):
        coarse, start = run.cycle.coupled(level, point)
        restricted = run.cycle.transfers[level].restrict_gradient(point.gradient)
        evaluation = coarse.evaluate(start.x)
        assert torch.equal(start.gradient, restricted)  # what the cycle goes on with
        torch.testing.assert_close(coarse.gradient(start.x), restricted, rtol=1e-12, atol=1e-12)
        assert evaluation.value == pytest.approx(start.evaluation.value, rel=1e-14)
        # To first order, H changes along e as the finer objective along I e: (H(e) - H(-e)) / 2 t.
        e, t = torch.randn(len(start.x), generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1e-5
        slope = (coarse.evaluate(start.x + t * e).value - coarse.evaluate(start.x - t * e).value) / (2 * t)
        assert slope == pytest.approx(float(point.gradient @ run.cycle.transfers[level].prolong(e)), rel=1e-4)
        point = start


@cache
def minimizer():
    """A minimum of the objective with 8 layers, by L-BFGS alone."""
    run = mgopt(num_layers=8)
    plain = OneShot(run.objectives[0], OneShotOptions(gtol=1e-7), run.x)
    for _ in plain.run(1000):
        pass
    return plain.x


@pytest.mark.parametrize("cycle", ["V", "W"])
@pytest.mark.parametrize("interpolation, restriction", [("constant", "inject"), ("linear", "average")])
def test_a_minimum_is_a_fixed_point(cycle, interpolation, restriction):
    run = mgopt(num_layers=8, interpolation=interpolation, restriction=restriction, cycle=cycle, optim=GD)
    minimum = minimizer()
    run.objectives[0].evaluate(minimum)
    assert run.objectives[0].gradient(minimum).norm() <= 1e-7
    assert split(minimum)[1].abs().max() > 1e-2  # not the trivial one
    run.x = minimum
    last(run, 2)
    assert (run.x - minimum).abs().max() < 1e-6
    run.x = minimum + 1e-2  # nearby the same cycles move
    last(run, 2)
    assert (run.x - minimum - 1e-2).abs().max() > 1e-5


@pytest.mark.parametrize("optim", [ARMIJO, LevelOptions(learning_rate=(4.0,), line_search=True)])
@pytest.mark.parametrize("restriction", RESTRICT)
def test_the_objective_goes_down_with_line_searches(restriction, optim):
    run = mgopt(levels=4, line_search=True, restriction=restriction, optim=optim, others={"activation": "relu"})
    values = [record.evaluation.value for record in run.run(12)]
    assert all(b <= a for a, b in zip(values, values[1:], strict=False))
    assert values[-1] < values[0] / 2


def test_a_line_search_stops_a_correction_that_is_too_long():
    rates = LevelOptions(learning_rate=(1e-3, 300.0))
    without, with_search = (mgopt(levels=2, line_search=search, optim=rates) for search in (False, True))
    start = next(iter(without.run(1))).evaluation.value
    assert last(without, 1).evaluation.value > start
    assert last(with_search, 1).evaluation.value < start


@pytest.mark.parametrize("levels, cycle", [(1, "V"), (2, "V"), (4, "V"), (4, "W")])
def test_counted_work_is_equation_10(levels, cycle):
    run = mgopt(levels=levels, cycle=cycle, optim=LevelOptions(learning_rate=(1e-3,)))
    record = last(run, 3)
    assert record.work == pytest.approx(3 * run.schedule.work(cycle), rel=1e-14)
    assert record.counted == pytest.approx(record.work, rel=1e-14)
    assert sum(count / 2**level for level, count in enumerate(record.gradients)) == pytest.approx(record.work)


def test_line_searches_are_counted():
    run = mgopt(levels=2, line_search=True, optim=LevelOptions(learning_rate=(0.01,)))
    record = last(run, 3)
    assert record.counted == pytest.approx(
        3 * 3 + 1 / 3
    )  # a trial is the first evaluation of the next cycle, but for the last


@pytest.mark.parametrize("cycles", [1, 2])
def test_full_multigrid_start(cycles):
    run = mgopt(full_multigrid=cycles, optim=GD, schedule="[(1), 2, {3}]")
    first = run.x
    record = last(run, 2)
    assert record.work == pytest.approx(run.schedule.full_multigrid_work(cycles) + run.schedule.work())
    assert record.counted == pytest.approx(record.work + 1 / 3)  # the start is evaluated for its record alone
    # Literally: the coarsest network alone, then cycles on every level, prolonged in between.
    x = RESTRICT["inject"](RESTRICT["inject"](first))
    x = algorithm_1(x, 4, None, [3], GD.learning_rate[2:], "inject")
    for level, steps in ((1, [(2, 2), 3]), (0, [(1, 0), (2, 2), 3])):
        x = prolonged(x)
        for _ in range(cycles + (level == 0)):
            x = algorithm_1(x, 16 >> level, None, steps, GD.learning_rate[level:], "inject")
    torch.testing.assert_close(run.x, x, rtol=1e-11, atol=1e-12)


def test_the_circles_job_begins_on_the_coarsest_network_if_asked_to():
    """With work units that say what the start has cost; to 90 % of these points it costs less than without."""
    found = []
    for cycles in (0, 1):
        how = {"num_layers": 64, "num_train": 200, "num_val": 100, "seed": 1, "goal": 0.9}
        options = CirclesOptions(**how, mgopt=MGOptOptions(levels=4, full_multigrid=cycles))
        training = training_of(options, SERIAL)
        found.append(list(rows_of(training)))
        assert training.has_reached(found[-1][-1])
    without, with_start = found
    assert without[0]["loss"] == with_start[0]["loss"] and without[1]["loss"] != with_start[1]["loss"]
    # The coarsest network, and a cycle from each of the others, the last of which is that of a run without.
    assert (without[1]["work"], with_start[1]["work"]) == (5.0, 0.25 + 1.5 + 3.0 + 5.0)
    assert with_start[-1]["work"] < without[-1]["work"]


def test_w_cycles_go_on_where_the_first_visit_ended():
    """Two visits of a level, each of one step and the coarsest level: by hand on three levels without post steps."""
    run = mgopt(cycle="W", optim=GD, schedule="[(0), (1), {1}]")
    point = Point(run.x).complete(run.objectives[0])
    below, start = run.cycle.coupled(0, point)
    end = start.x
    for _ in range(2):
        below.evaluate(end)
        middle = Point(end - 0.2 * below.gradient(end)).complete(below)
        coarsest, bottom = run.cycle.coupled(1, middle)
        coarsest.evaluate(bottom.x)
        change = -0.1 * coarsest.gradient(bottom.x)
        end = middle.x + prolonged(change)
    expected = run.x + prolonged(end - start.x)
    last(run, 1)
    torch.testing.assert_close(run.x, expected, rtol=1e-11, atol=1e-12)


def test_regularization_of_coarse_levels():
    for measure in ("sum", "integral"):
        run = mgopt(others={"measure": measure})
        values = []
        for objective in run.objectives:
            x = pairwise(torch.zeros(6 + 12 * objective.network.grid.num_layers + 8).double(), lambda t: t + 1)
            evaluation = objective.evaluate(x)
            values.append(evaluation.value - evaluation.loss)
        assert values == pytest.approx([values[0]] * 3)


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"^num_layers=20 is not a multiple of 2\^\(levels - 1\)=8; use 16 or 24$"):
        MGOpt(problem(), 20, MGOptOptions(levels=4))
    with pytest.raises(ValueError, match="^restriction='full' must be inject or average or transpose; use inject$"):
        MGOptOptions(restriction="full")
    with pytest.raises(ValueError, match=r"^schedule='\[1\]': entry 1, '1': the last entry"):
        MGOptOptions(schedule="[1]")
    with pytest.raises(ValueError, match="^full_multigrid=-1 must be at least 0; use 1$"):
        MGOptOptions(full_multigrid=-1)
    with pytest.raises(ValueError, match=r"^carry_momentum=1.5 must lie in \[0, 1\]; use 0.2$"):
        MGOptOptions(carry_momentum=1.5)
    with pytest.raises(
        ValueError, match="^carry_momentum=0.2 is for optimizers that keep momentum, not optim.method=gd"
    ):
        MGOptOptions(carry_momentum=0.2)
    with pytest.raises(ValueError, match="^line_search=True is for gd and lbfgs, not method=adam; use False$"):
        LevelOptions(method=("gd", "adam"), line_search=True)
    with pytest.raises(ValueError, match=r"^learning_rate=\[0.1, -1.0\] must be positive and finite; use 0.1$"):
        LevelOptions(learning_rate=(0.1, -1.0))


def test_divergence_is_said():
    run = mgopt(others={"activation": "relu"}, optim=LevelOptions(learning_rate=(1e30,)))
    with pytest.raises(RunError, match=r"after \d+ cycles: it must be finite; use a smaller step size"):
        last(run, 50)
