"""Directions and line searches against dense matrices and the inequalities that define them."""

import math

import pytest
import torch
from objectives import Valleys, dense_inverse, numbers, plain_dots

from xbraid_py.comm import SerialCommunicator
from xbraid_py.layers.parameters import Layout, Stack
from xbraid_py.optim import Armijo, FixedStep, OneShot, OneShotOptions, QuasiNewton


def pairs(count: int, size: int = 6, seed: int = 0):
    """Steps and gradient differences of a function whose Hessian is positive definite, and changes."""
    root = numbers(size, size, seed=seed)
    steps = numbers(count, size, seed=seed + 1)
    slow = [root @ root.T + (1.0 + 0.1 * k) * torch.eye(size, dtype=root.dtype) for k in range(count)]
    return [(s, A @ s) for s, A in zip(steps, slow, strict=True)]


def filled(method: str, given, memory: int = 10, curvature_check: bool = True) -> QuasiNewton:
    found = QuasiNewton(method, plain_dots, memory, curvature_check)
    for s, y in given:
        found.add(s, y)
    return found


@pytest.mark.parametrize("count", [1, 2, 5, 6, 13])
@pytest.mark.parametrize("memory", [1, 5, 20])
def test_lbfgs_is_the_dense_matrix_of_its_pairs(count, memory):
    given = pairs(count)
    newest = given[-memory:]
    s, y = newest[-1]
    H = dense_inverse(newest, (s @ y) / (y @ y))
    gradient = numbers(6, seed=9)
    torch.testing.assert_close(
        filled("lbfgs", given, memory).direction(gradient)[0], H @ gradient, rtol=1e-11, atol=1e-12
    )


def test_bfgs_is_the_dense_update_over_20_updates():
    given = pairs(20)
    s, y = given[0]
    found = QuasiNewton("bfgs", plain_dots, memory=3)
    for count in range(1, 21):
        found.add(*given[count - 1])
        H = dense_inverse(given[:count], (s @ y) / (y @ y))
        gradient = numbers(6, seed=count)
        torch.testing.assert_close(found.direction(gradient)[0], H @ gradient, rtol=1e-10, atol=1e-11)


def test_minimization_by_bfgs_is_the_one_with_a_dense_matrix():
    objective = Valleys(3)
    x, gradient = objective.start, objective.gradient_at(objective.start)
    literal, H = [], torch.eye(len(x), dtype=x.dtype)
    for k in range(20):
        direction, step = H @ gradient, 1.0
        while objective.value_at(x - step * direction) > objective.value_at(x) - 1e-4 * step * gradient @ direction:
            step /= 2
        s = -step * direction
        y = objective.gradient_at(x + s) - gradient
        H = (s @ y) / (y @ y) * torch.eye(len(x), dtype=x.dtype) if k == 0 else H
        V = torch.eye(len(x), dtype=x.dtype) - torch.outer(y, s) / (s @ y)
        H = V.T @ H @ V + torch.outer(s, s) / (s @ y)
        x, gradient = x + s, gradient + y
        literal.append((x, step))
    one_shot = OneShot(objective, OneShotOptions(method="bfgs"), objective.start)
    for update in one_shot.run(21):
        if update.number:
            torch.testing.assert_close(one_shot.x, literal[update.number - 1][0], rtol=1e-8, atol=1e-8)
            assert update.step == literal[update.number - 1][1]
    assert one_shot.number == 21


def test_without_pairs_the_direction_is_the_gradient():
    gradient = numbers(6, seed=3)
    for method in ("lbfgs", "bfgs", "steepest"):
        assert torch.equal(QuasiNewton(method, plain_dots).direction(gradient)[0], gradient)
    assert torch.equal(filled("steepest", pairs(4)).direction(gradient)[0], gradient)
    forgetful = filled("lbfgs", pairs(4))
    forgetful.clear()
    assert torch.equal(forgetful.direction(gradient)[0], gradient)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_restart_keeps_the_length_of_steps(sign):
    """Along a straight line of curvature 4 or -4 the next step without pairs is a quarter of the gradient."""
    found = QuasiNewton("lbfgs", plain_dots, curvature_check=False)
    gradient = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found.add(gradient, sign * 4.0 * gradient)
    found.restart()
    assert not found.s and found.scale == pytest.approx(0.25, rel=1e-14)
    direction, slope = found.direction(gradient)
    assert torch.allclose(direction, gradient / 4, rtol=1e-14) and slope == pytest.approx(
        float(gradient @ gradient) / 4
    )
    found.restart()
    assert found.scale == pytest.approx(0.25, rel=1e-14), "twice in a row"
    found.clear()
    assert found.direction(gradient)[1] == pytest.approx(float(gradient @ gradient))


def test_a_direction_leaves_gradient_and_pairs_alone():
    given = pairs(4)
    gradient = numbers(6, seed=3)
    before = [gradient.clone(), *(v.clone() for pair in given for v in pair)]
    found = filled("lbfgs", given)
    found.direction(gradient)[0]
    after = [gradient, *(v for pair in zip(found.s, found.y, strict=True) for v in pair)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_only_lbfgs_forgets():
    given = pairs(7)
    limited = filled("lbfgs", given, memory=3)
    assert [s is t for s, (t, _) in zip(limited.s, given[-3:], strict=True)] == [True] * 3
    assert [y is t for y, (_, t) in zip(limited.y, given[-3:], strict=True)] == [True] * 3
    assert len(filled("bfgs", given, memory=3).s) == 7
    assert len(filled("steepest", given).s) == 0


@pytest.mark.parametrize("method", ["lbfgs", "bfgs"])
@pytest.mark.parametrize("cosine, kept", [(-1.0, False), (0.0, False), (9e-11, False), (2e-10, True), (1.0, True)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_curvature_is_checked_relative_to_the_pair(method, cosine, kept, scale):
    s = scale * torch.tensor([1.0, 0.0], dtype=torch.float64)
    y = torch.tensor([cosine, math.sqrt(1 - cosine**2)], dtype=torch.float64)
    assert len(filled(method, [(s, y)]).s) == kept
    # Unchecked, every pair that the formulas can take is taken.
    assert len(filled(method, [(s, y)], curvature_check=False).s) == (cosine != 0.0)
    assert len(filled(method, [(s, 0 * y)], curvature_check=False).s) == 0


def test_a_pair_too_small_to_square_is_refused():
    s, y = (torch.tensor([size, 0.0], dtype=torch.float64) for size in (1.0, 1e-170))
    assert not filled("lbfgs", [(s, y)]).s and not filled("lbfgs", [(s, y)], curvature_check=False).s


def test_a_refused_pair_costs_no_other_one():
    given = pairs(3)
    found = filled("lbfgs", [*given, (given[0][0], -given[0][1])], memory=3)
    assert [s is t for s, (t, _) in zip(found.s, given, strict=True)] == [True] * 3


@pytest.mark.parametrize("method", ["lbfgs", "bfgs"])
def test_restored_pairs_go_on_bitwise(method):
    given = pairs(9)
    first = filled(method, given[:7], memory=4)
    second = filled(method, given[3:5], memory=4)
    second.restore([s.clone() for s in first.s], [y.clone() for y in first.y])
    gradient = numbers(6, seed=4)
    for pair in (None, *given[7:]):
        if pair is not None:
            first.add(*pair)
            second.add(*pair)
        assert torch.equal(first.direction(gradient)[0], second.direction(gradient)[0])
        assert len(first.s) == len(second.s) == len(second.y)


class Bowl(Valleys):
    """A quadratic with eigenvalues from 1 to 100; its minimum is at 0."""

    def value_at(self, x):
        return float((self._eigenvalues * x * x).sum() / 2)

    def gradient_at(self, x):
        return self._eigenvalues * x

    @property
    def _eigenvalues(self):
        return torch.logspace(0, 2, 2 * self.rows, dtype=torch.float64)


def distances(objective, method: str, minimum: float, updates: int) -> list[float]:
    """Distances from the minimum before every update."""
    one_shot = OneShot(objective, OneShotOptions(method=method), objective.start)
    return [float((one_shot.x - minimum).norm()) for _ in one_shot.run(updates)]


def mean_rate(distances: list[float]) -> float:
    """Factor by which the distance shrinks in an update, on average."""
    return (distances[-1] / distances[0]) ** (1 / (len(distances) - 1))


# Around 0 the distance may become as small as it likes, around 1 rounding ends it.
@pytest.mark.parametrize("kind, rows, minimum, rounding", [(Bowl, 3, 0.0, 1e-60), (Valleys, 1, 1.0, 1e-11)])
def test_bfgs_converges_superlinearly_and_steepest_descent_does_not(kind, rows, minimum, rounding):
    near = [d for d in distances(kind(rows), "bfgs", minimum, 60) if rounding < d < 0.5]
    half = len(near) // 2
    assert half >= 4 and mean_rate(near[half:]) < mean_rate(near[: half + 1]) / 10
    steepest = distances(kind(rows), "steepest", minimum, 60)
    assert len(steepest) == 60 and 0.9 < mean_rate(steepest[30:]) < 1.0


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Armijo(decrease=0.0), "decrease=0.0 must be between 0 and 1; use 1e-4"),
        (lambda: Armijo(factor=1.0), "factor=1.0 must be between 0 and 1; use 0.5"),
        (lambda: Armijo(factor=math.nan), "factor=nan must be between 0 and 1; use 0.5"),
        (lambda: Armijo(max_backtracks=-1), "max_backtracks=-1 must be at least 0; use 15"),
        (lambda: FixedStep(0.0), "step=0.0 must be positive and finite; use 0.1"),
        (lambda: OneShotOptions(fixed_step=math.inf), "fixed_step=inf must be positive and finite; use 0.1"),
        (lambda: OneShotOptions(method="newton"), "method='newton' must be lbfgs, bfgs or steepest; use lbfgs"),
        (lambda: OneShotOptions(memory=0), "memory=0 must be at least 1; use 10"),
        (lambda: OneShotOptions(boost_updates=-1), "boost_updates=-1 must be at least 0; use 10"),
        (lambda: OneShotOptions(boost_iter=0), "boost_iter=0 must be at least 1; use 10"),
        (lambda: OneShotOptions(gtol=-1e-9), "gtol=-1e-09 must be at least 0; use 1e-9"),
        (lambda: OneShotOptions(gtol=math.nan), "gtol=nan must be at least 0; use 1e-9"),
    ],
)
def test_bad_options_are_named(make, message):
    with pytest.raises(ValueError) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize("method", ["lbfgs", "bfgs", "steepest"])
def test_the_same_path_on_any_number_of_ranks(spmd, method):
    def path(comm):
        objective = Valleys(7, comm)
        one_shot = OneShot(objective, OneShotOptions(method=method, memory=4), objective.start)
        return [
            (update, comm.allgather(one_shot.x.view(-1, 2), objective.counts).tolist()) for update in one_shot.run(25)
        ]

    expected = path(SerialCommunicator())
    assert len(expected) == 25
    assert all(found == expected for found in spmd(path))


def test_restored_pairs_have_the_same_products():
    """Bit by bit, by the sums of a real network: a resumed run is the uninterrupted one."""
    shapes = {"weight": (8, 8), "bias": (8,)}
    layout = Layout(tuple(Stack(name, shapes, n, 0, n) for name, n in (("opening", 1), ("layers", 32), ("end", 1))))

    def dots(a, b):
        return layout.dots(a, b, 32).permute(2, 0, 1).contiguous().sum(0)

    draw = torch.Generator().manual_seed(0)
    run, resumed = (QuasiNewton("lbfgs", dots, curvature_check=False) for _ in range(2))
    for _ in range(7):
        run.add(*torch.randn(2, layout.size, generator=draw, dtype=torch.float64))
    resumed.restore(run.s, run.y)
    gradient = torch.randn(layout.size, generator=draw, dtype=torch.float64)
    (direction, slope), (again, same) = run.direction(gradient), resumed.direction(gradient)
    assert again.equal(direction) and same == slope
