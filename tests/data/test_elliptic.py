"""The solvers of elliptic problems: literal references, exact solutions, and orders of convergence."""

import math

import numpy as np
import pytest

from xbraid_py.data.elliptic import (
    apply_stiffness,
    element_pattern,
    face_pattern,
    solve_darcy,
    solve_poisson,
    transmissibilities,
)


def nodes(n):
    line = np.linspace(0, 1, n)
    return np.meshgrid(line, line)


def middles(n):
    line = (np.arange(n) + 0.5) / n
    return np.meshgrid(line, line)


def smooth(x, y):
    """A coefficient; its derivatives are 0.5 and 0.6 y."""
    return 1 + 0.5 * x + 0.3 * y**2


def orders(errors):
    return [math.log2(coarse / fine) for coarse, fine in zip(errors, errors[1:], strict=False)]


def norm(values, h):
    """L2 on the unit square."""
    return float(h * np.sqrt(np.sum(np.square(values))))


def random_coefficient(n, seed=0):
    return np.exp(np.random.default_rng(seed).normal(size=(n, n)))


def literal_stiffness(kappa):
    """The stiffness matrix of all nodes: elements one after another, Gauss points one after another."""
    n = len(kappa)
    h = 1 / (n - 1)
    gauss = [0.5 - 0.5 / math.sqrt(3), 0.5 + 0.5 / math.sqrt(3)]
    matrix = np.zeros((n * n, n * n))
    for row in range(n - 1):
        for column in range(n - 1):
            corners = [(row, column), (row, column + 1), (row + 1, column), (row + 1, column + 1)]
            mean = sum(kappa[corner] for corner in corners) / 4
            for s in gauss:
                for t in gauss:
                    slopes = [(-(1 - t), -(1 - s)), (1 - t, -s), (-t, 1 - s), (t, s)]
                    for i in range(4):
                        for j in range(4):
                            product = (slopes[i][0] * slopes[j][0] + slopes[i][1] * slopes[j][1]) / h**2
                            place = tuple(corners[at][0] * n + corners[at][1] for at in (i, j))
                            matrix[place] += mean * product * h**2 / 4
    return matrix


def literal_mixed(k, left, right):
    """Pressure and outflow by eq. 42: fluxes and pressures together, mass matrix by the trapezoidal rule."""
    n = len(k)
    h = 1 / n
    faces = [("x", row, column) for row in range(n) for column in range(n + 1)]
    faces += [("y", row, column) for row in range(1, n) for column in range(n)]
    size = len(faces) + n * n
    matrix, load = np.zeros((size, size)), np.zeros(size)
    for at, (kind, row, column) in enumerate(faces):
        low, high = ((row, column - 1), (row, column)) if kind == "x" else ((row - 1, column), (row, column))
        for sign, cell in ((1, low), (-1, high)):
            if 0 <= cell[1] < n:
                place = len(faces) + cell[0] * n + cell[1]
                matrix[at, at] += h**2 / 2 / k[cell]
                matrix[at, place] = -sign * h  # -(div s, p)
                matrix[place, at] = sign * h  # (div q, w)
            else:  # - integral of p_D s . n
                load[at] = h * (left if cell[1] < 0 else -right)
    found = np.linalg.solve(matrix, load)
    outflow = [found[at] for at, (kind, _, column) in enumerate(faces) if kind == "x" and column == n]
    return found[len(faces) :].reshape(n, n), sum(outflow) * h


def inner_of(n):
    return [row * n + column for row in range(1, n - 1) for column in range(1, n - 1)]


def element_means(kappa):
    return (kappa[1:, 1:] + kappa[1:, :-1] + kappa[:-1, 1:] + kappa[:-1, :-1]) / 4


@pytest.mark.parametrize("n", [3, 4, 6])
def test_stiffness_is_the_literal_one(n):
    kappa = random_coefficient(n)
    expected = literal_stiffness(kappa)
    inner = inner_of(n)
    found = element_pattern(n).matrix(element_means(kappa).ravel()).toarray()
    np.testing.assert_allclose(found, expected[np.ix_(inner, inner)], rtol=1e-13, atol=1e-13)
    values = np.random.default_rng(1).normal(size=(2, n, n))
    applied = apply_stiffness(element_means(kappa), values)
    np.testing.assert_allclose(applied.reshape(2, -1), values.reshape(2, -1) @ expected, rtol=1e-12, atol=1e-12)


def test_poisson_solves_the_literal_system():
    n = 6
    kappa, x = random_coefficient(n), nodes(n)[0]
    boundary = np.random.default_rng(2).normal(size=(n, n))
    whole, inner = literal_stiffness(kappa), inner_of(n)
    mass = np.diag(np.full(n, 4.0)) + np.diag(np.ones(n - 1), 1) + np.diag(np.ones(n - 1), -1)
    load = (np.kron(mass, mass) @ x.ravel() / 36 / (n - 1) ** 2)[inner]
    edge = boundary.ravel().copy()
    edge[inner] = 0
    expected = np.linalg.solve(whole[np.ix_(inner, inner)], load - (whole @ edge)[inner])
    found = solve_poisson(kappa, x, boundary)
    np.testing.assert_allclose(found.ravel()[inner], expected, rtol=1e-12)
    outside = np.setdiff1d(np.arange(n * n), inner)
    assert np.array_equal(found.ravel()[outside], boundary.ravel()[outside])


@pytest.mark.parametrize("n", [2, 3, 5])
def test_darcy_is_the_literal_mixed_method(n):
    k = random_coefficient(n)
    pressure, outflow = solve_darcy(k, 1.5, -0.5)
    expected, expected_outflow = literal_mixed(k, 1.5, -0.5)
    np.testing.assert_allclose(pressure, expected, rtol=1e-12, atol=1e-13)
    assert outflow == pytest.approx(expected_outflow, rel=1e-12)


@pytest.mark.parametrize("contrast", [1, 1e4])
def test_matrices_are_symmetric_and_positive_definite(contrast):
    n = 6
    k = random_coefficient(n) ** math.log10(10 * contrast)
    for matrix in (
        element_pattern(n).matrix(element_means(k).ravel()).toarray(),
        face_pattern(n).matrix(transmissibilities(k)).toarray(),
    ):
        assert np.array_equal(matrix, matrix.T)
        assert np.linalg.eigvalsh(matrix).min() > 0


def zero_on_the_boundary(x, y):
    s, t = np.pi * x, 2 * np.pi * y
    u = np.sin(s) * np.sin(t)
    u_x, u_y = np.pi * np.cos(s) * np.sin(t), 2 * np.pi * np.sin(s) * np.cos(t)
    return u, -(0.5 * u_x + 0.6 * y * u_y + smooth(x, y) * -5 * np.pi**2 * u)


def other_on_the_boundary(x, y):
    u, u_y = np.exp(x) * np.sin(2 * y + 0.3), 2 * np.exp(x) * np.cos(2 * y + 0.3)
    return u, -(0.5 * u + 0.6 * y * u_y + smooth(x, y) * -3 * u)


@pytest.mark.parametrize("solution", [zero_on_the_boundary, other_on_the_boundary])
def test_order_of_poisson(solution):
    errors = []
    for n in (9, 17, 33):
        x, y = nodes(n)
        u, f = solution(x, y)
        errors.append(norm(solve_poisson(smooth(x, y), f, u) - u, 1 / (n - 1)))
    assert all(1.9 < order < 2.2 for order in orders(errors)), errors


def test_order_of_darcy():
    errors, outflow_errors = [], []
    # p_y = 0 at y = 0 and y = 1; Q is the integral of -k p_x over x = 1.
    exact_outflow = -(1.6 * math.e - 1.2 / math.pi**2)
    for n in (8, 16, 32):
        x, y = middles(n)
        wave, bump = np.cos(np.pi * y), np.exp(x)
        p = (1 + x**2) * wave + bump
        p_y = -np.pi * (1 + x**2) * np.sin(np.pi * y)
        curved = 2 * wave + bump - np.pi**2 * (1 + x**2) * wave
        f = -(0.5 * (2 * x * wave + bump) + 0.6 * y * p_y + smooth(x, y) * curved)
        pressure, outflow = solve_darcy(smooth(x, y), wave[:, 0] + 1, 2 * wave[:, 0] + math.e, f)
        errors.append(norm(pressure - p, 1 / n))
        outflow_errors.append(abs(outflow - exact_outflow))
    assert all(1.9 < order < 2.2 for order in orders(errors)), errors
    assert all(order > 1.7 for order in orders(outflow_errors)), outflow_errors


def test_constant_permeability_has_a_linear_pressure():
    x, _ = middles(7)
    pressure, outflow = solve_darcy(np.full((7, 7), 2.5), 3.0, 1.0)
    np.testing.assert_allclose(pressure, 3 - 2 * x, rtol=1e-13)
    assert outflow == pytest.approx(5.0, rel=1e-13)


def test_layers_of_permeability():
    layers = np.array([1.0, 4.0, 0.25, 10.0])
    _, along = solve_darcy(np.tile(layers[:, None], (1, 4)))
    _, across = solve_darcy(np.tile(layers, (4, 1)))
    assert along == pytest.approx(layers.mean(), rel=1e-12)
    assert across == pytest.approx(4 / (1 / layers).sum(), rel=1e-12)


def test_samples_are_solved_each_by_itself():
    k = np.stack([random_coefficient(5, seed) for seed in range(6)]).reshape(2, 3, 5, 5)
    u = solve_poisson(k, 1.0)
    pressure, outflow = solve_darcy(k)
    assert u.shape == pressure.shape == (2, 3, 5, 5) and outflow.shape == (2, 3)
    for place in np.ndindex(2, 3):
        assert np.array_equal(u[place], solve_poisson(k[place], 1.0))
        alone = solve_darcy(k[place])
        assert np.array_equal(pressure[place], alone[0]) and outflow[place] == alone[1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: solve_poisson(np.ones((3, 4)), 1.0), r"kappa.shape=\(3, 4\) must end in \(n, n\), n at least 3"),
        (lambda: solve_poisson(np.ones((2, 2)), 1.0), r"kappa.shape=\(2, 2\) .*; use \(32, 32\)"),
        (lambda: solve_poisson(-np.eye(3), 1.0), r"kappa\[0, 0\]=-1.0 must be positive and finite; use 1.0"),
        (lambda: solve_poisson(np.ones((3, 3)), np.ones(4)), r"source.shape=\(4,\) must fit kappa, \(3, 3\)"),
        (lambda: solve_poisson(np.ones((3, 3)), np.nan), r"source\[0, 0\]=nan must be finite"),
        (lambda: solve_darcy(np.full((3, 3), np.inf)), r"k\[0, 0\]=inf must be positive and finite"),
        (lambda: solve_darcy(np.ones((3, 3)), left=np.ones(2)), r"left.shape=\(2,\) must fit a row of k, \(3,\)"),
        (lambda: solve_darcy(np.ones((3, 3)), right=np.inf), r"right\[0\]=inf must be finite"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_what_cannot_be_solved_is_said():
    pattern = element_pattern(3)
    with pytest.raises(ValueError, match="for a solve .*positive definite.*; use ratios below 1e12"):
        pattern.solve(-np.ones(4), np.ones(1))
    with pytest.raises(ValueError, match="for a solve .overflow.; use values near 1"):
        pattern.solve(np.full(4, 1e-300), np.full(1, 1e300))
