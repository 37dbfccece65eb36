"""`solve`: iterates of a literal MGRIT and of PyMGRIT, any number of steps, what comes back, and the programs of docs.

Shape letters: `N` steps, `S` shape of a state.
"""

from __future__ import annotations

import importlib.util
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from processes import PROJECT

from xbraid_py import MGRIT, TimeStepper, solve
from xbraid_py.comm import SerialCommunicator

RANKS = pytest.mark.ranks(1, 2, 3, long=(5,))
EXACT = MGRIT(cycle="V", tol=1e-13)


def uneven(steps: int, end: float, start: float = 0.0) -> np.ndarray:
    """Times at distances that grow, with a jitter."""
    lengths = np.linspace(1, 3, steps) + np.random.default_rng(0).uniform(0, 0.5, steps)
    return start + end * np.concatenate([[0.0], lengths.cumsum() / lengths.sum()])


def dahlquist(u, t0, t1):
    return u / (1 + t1 - t0)


X = np.linspace(0, 1, 22)[1:-1]
SECOND = (np.diag(np.ones(19), 1) + np.diag(np.ones(19), -1) - 2 * np.eye(20)) * 21**2


def heat(u, t0, t1):
    b = -np.sin(np.pi * X) * (np.sin(t1) - np.pi**2 * np.cos(t1))
    return np.linalg.solve(np.eye(20) - (t1 - t0) * SECOND, u + (t1 - t0) * b)


def lorenz(u, t0, t1):
    def field(u):
        return np.array([10 * (u[1] - u[0]), u[0] * (28 - u[2]) - u[1], u[0] * u[1] - 8 / 3 * u[2]])

    h, a = t1 - t0, field(u)
    b = field(u + h / 2 * a)
    c = field(u + h / 2 * b)
    return u + h / 6 * (a + 2 * b + 2 * c + field(u + h * c))


PROBLEMS = {
    "dahlquist": (dahlquist, np.ones(()), uneven(48, 5.0)),
    "heat": (heat, np.sin(np.pi * X), uneven(48, 2.0)),
    "lorenz": (lorenz, np.array([1.0, 1.0, 20.0]), uneven(48, 0.5)),
}


def marched(step, u0, t):
    """All states, one step after the other; arrays or tensors."""
    states = [u0]
    for t0, t1 in pairwise(t.tolist()):
        states.append(step(states[-1], t0, t1))
    return torch.stack(states) if isinstance(u0, torch.Tensor) else np.stack(states)


def two_levels(step, u0, t, c: int, relaxations: int, iterations: int):
    """States after so many two-level V-cycles with FAS, and the norms of the residuals at the C-points but the last."""
    N, t = len(t) - 1, t.tolist()

    def fine(i):  # the step to point i
        return step(u[i - 1], t[i - 1], t[i])

    def relax_f():
        for i in range(1, N + 1):
            if i % c:
                u[i] = fine(i)

    u, norms = [u0] * (N + 1), []
    for k in range(c, N + 1, c):
        u[k] = step(u[k - c], t[k - c], t[k])  # the first guess, on the coarse level
    relax_f()
    norms.append(np.linalg.norm([fine(k) - u[k] for k in range(c, N, c)]))
    for _ in range(iterations):
        for _ in range(relaxations):
            for k in range(c, N + 1, c):
                u[k] = fine(k)
            relax_f()
        tau = {k: fine(k) - step(u[k - c], t[k - c], t[k]) for k in range(c, N + 1, c)}
        for k in range(c, N + 1, c):
            u[k] = step(u[k - c], t[k - c], t[k]) + tau[k]
        relax_f()
        norms.append(np.linalg.norm([fine(k) - u[k] for k in range(c, N, c)]))
    u[N] = fine(N)
    return np.stack(u), norms


# ---- Iterates.


@RANKS
@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("relaxations", [0, 1])
def test_every_iteration_is_that_of_a_literal_solve(spmd, name, relaxations):
    step, u0, t = PROBLEMS[name]

    def body(comm):
        found = []
        for iterations in range(4):
            options = MGRIT(
                cycle="V", cfactor=4, max_levels=2, nrelax=relaxations, max_iter=iterations, tol=0.0, min_coarse=1
            )
            found.append(solve(TimeStepper(step), u0, t, comm, mgrit=options))
        return found

    expected = [two_levels(step, u0, t, 4, relaxations, iterations) for iterations in range(4)]
    for of_rank in spmd(body):
        for iterations, (found, (states, norms)) in enumerate(zip(of_rank, expected, strict=True)):
            assert isinstance(found.states, np.ndarray) and found.states.shape == (49, *u0.shape)
            assert np.allclose(found.states, states, rtol=1e-13, atol=1e-14)
            assert found.norms == pytest.approx(norms, rel=1e-6, abs=1e-13)
            assert found.iterations == iterations and found.converged is None
    # They are no converged ones.
    assert abs(expected[1][0] - marched(step, u0, t)).max() > 1e-8


def test_residuals_that_pymgrit_has_published():
    """Its README: Dahlquist, 101 points on [0, 5], two levels. It counts the residual at 5 as well: so one interval
    more."""
    published = [7.186185937031941e-05, 1.2461067076355103e-06, 2.1015566145245807e-08]
    published += [3.144127445017594e-10, 3.975214076032893e-12]
    options = MGRIT(cycle="V", cfactor=2, max_levels=2, tol=0.0, max_iter=5)
    found = solve(TimeStepper(dahlquist), 1.0, np.arange(103) * 0.05, mgrit=options)
    assert found.norms[1:4] == pytest.approx(published[:3], rel=1e-7)
    assert found.norms[4:] == pytest.approx(published[3:], rel=1e-3)  # rounding of states of the size 1
    assert found.factors[1:] == pytest.approx([b / a for a, b in pairwise(published)], rel=1e-3)


# Norms after each iteration by PyMGRIT 1.0.6, as `benchmarks/equations.py` prints them.
PEER = {
    ("dahlquist", "V", 2, 2): (7.19615e-05, 1.26278e-06, 2.21286e-08, 3.55152e-10),
    ("dahlquist", "V", 4, 3): (1.59304e-03, 8.97760e-05, 3.82797e-06, 1.12599e-07),
    ("dahlquist", "F", 4, 3): (6.82548e-04, 2.94599e-05, 1.25407e-06, 4.47457e-08),
    ("heat", "V", 2, 2): (8.10912e-04, 4.14355e-05, 2.11099e-06, 1.05091e-07),
    ("heat", "V", 4, 3): (3.33220e-03, 2.08383e-04, 1.19956e-05, 5.83569e-07),
    ("heat", "F", 4, 3): (3.31848e-03, 2.07183e-04, 1.19717e-05, 5.83569e-07),
    ("lorenz", "V", 4, 3): (1.31337e-03, 3.63737e-06, 1.62617e-09),
    ("lorenz", "F", 4, 3): (3.44534e-05, 7.08649e-09),
}


@pytest.mark.parametrize("case", PEER, ids=str)
def test_residuals_are_those_of_pymgrit(case, benchmark_equations):
    name, cycle, cfactor, levels = case
    norms = benchmark_equations.ours(getattr(benchmark_equations, name)(), cycle, cfactor, levels, len(PEER[case]))
    assert norms[1:] == pytest.approx(PEER[case], rel=1e-5)


@pytest.fixture
def benchmark_equations(monkeypatch):
    """The module benchmarks/equations.py."""
    monkeypatch.syspath_prepend(PROJECT / "benchmarks")
    spec = importlib.util.spec_from_file_location("equations_benchmark", PROJECT / "benchmarks" / "equations.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(__import__("sys").modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@RANKS
@pytest.mark.filterwarnings("ignore:t has .* points, too few")
@pytest.mark.parametrize("steps", [1, 2, 7, 16, 37, 101])
def test_any_number_of_steps_has_the_states_of_a_loop_and_the_same_bits_on_any_ranks(spmd, steps):
    """Coarsening factors that do not divide the number, on 2 to 4 levels, by all cycles; times that fall."""
    chosen = [EXACT, MGRIT(cycle="F", cfactor=(2, 3), max_levels=3, tol=1e-13), MGRIT(tol=1e-12, cfactor=3)]
    chosen += [MGRIT(cycle="V", cfactor=2, max_levels=4, tol=1e-13, start="full"), MGRIT(max_levels=1)]

    def body(comm, t):
        return [solve(TimeStepper(lorenz), PROBLEMS["lorenz"][1], t, comm, mgrit=each) for each in chosen]

    for t in (uneven(steps, 0.5), uneven(steps, 0.5, start=-1.0)[::-1] / 10):
        serial = body(SerialCommunicator(), t)
        expected = marched(lorenz, PROBLEMS["lorenz"][1], t)
        for of_rank in spmd(lambda comm, t=t: body(comm, t)):
            for found, alone in zip(of_rank, serial, strict=True):
                assert found.converged and np.array_equal(found.t, t)
                assert np.allclose(found.states, expected, rtol=1e-10, atol=1e-10)
                assert np.array_equal(found.states, alone.states) and found.residuals == alone.residuals
                assert np.array_equal(found.end, found.states[-1]) and found.iterations <= 40


@RANKS
def test_outputs(spmd):
    """ "own" are the rows of "all", each on one rank, and "end" the last one."""
    step, u0, t = PROBLEMS["heat"]

    def body(comm):
        return [solve(TimeStepper(step), u0, t, comm, output=output) for output in ("all", "own", "end")]

    found = spmd(body)
    for every, _, end in found:
        assert np.array_equal(end.states, every.states[-1:]) and np.array_equal(end.t, t[-1:])
    assert np.array_equal(np.concatenate([own.states for _, own, _ in found]), found[0][0].states)
    assert np.array_equal(np.concatenate([own.t for _, own, _ in found]), t)


def test_types_of_what_is_given_are_those_of_what_comes_back():
    t = torch.linspace(0, 1, 33)
    for dtype in (torch.float32, torch.float64):
        found = solve(TimeStepper(dahlquist), torch.ones(2, 3, dtype=dtype), t)
        assert found.states.dtype == dtype and found.t.dtype == torch.float32 and found.converged
        assert found.states.shape == (33, 2, 3) and found.residuals[-1] <= (1e-5 if dtype == torch.float32 else 1e-9)
    for one in (1.0, np.float64(1.0), torch.tensor(1.0).double()):
        found = solve(TimeStepper(dahlquist), one, t.tolist())
        assert found.states.shape == (33,) and float(found.end) == pytest.approx((1 + 1 / 32) ** -32, rel=1e-8)
        assert isinstance(found.states, torch.Tensor if isinstance(one, torch.Tensor) else np.ndarray)
    single = solve(TimeStepper(lambda u, t0, t1: u / np.float32(1 + t1 - t0)), np.ones(2, np.float32), t.numpy())
    assert single.states.dtype == np.float32


def test_coarse_functions_serve_their_levels_and_change_no_result():
    """The exact flow as the coarse step; by level, and the last one for all further levels."""
    calls = {"step": [], "one": [], "two": []}

    def function(name, flow):
        def step(u, t0, t1):
            calls[name].append(round((t1 - t0) * 64))
            return flow(u, t0, t1)

        return step

    def exact(u, t0, t1):
        return u * np.exp(t0 - t1)

    step = function("step", lambda u, t0, t1: u / (1 + t1 - t0))
    t, options = np.arange(65) / 64, MGRIT(cycle="V", cfactor=2, max_levels=4, tol=1e-12)
    stepper = TimeStepper(step, coarse=[function("one", exact), function("two", exact)])
    found = solve(stepper, 1.0, t, mgrit=options)
    lengths = {name: set(each) for name, each in calls.items()}
    assert lengths == {"step": {1}, "one": {1, 2}, "two": {1, 4, 8}}  # 1 is the trial
    assert found.converged and found.end == pytest.approx((1 + 1 / 64) ** -64, rel=1e-10)
    one = solve(TimeStepper(step, coarse=exact), 1.0, t, mgrit=options)
    assert one.norms == found.norms != solve(TimeStepper(step), 1.0, t, mgrit=options).norms


# ---- The programs of docs/examples.


@pytest.mark.job
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["dahlquist", "heat", "lorenz"])
def test_a_program_that_users_copy(run_job, name, ranks):
    path = PROJECT / "docs" / "examples" / f"{name}.py"
    assert len(path.read_text().splitlines()) <= 25
    job = run_job([path], ranks, timeout=60)
    assert job.returncode == 0 and job.stderr == "", job.stderr
    numbers = [float(each) for each in re.findall(r"-?\d+\.\d+(?:e-\d+)?", job.stdout)]
    if name == "dahlquist":
        assert numbers[1:8:2] == [0.015, 0.017, 0.017, 0.015] and "u(5) = 0.007604, of the" in job.stdout
    elif name == "heat":
        assert numbers[1:8:2] == [0.050, 0.051, 0.051, 0.050] and "error at t = 2: 4.7e-04" in job.stdout
    else:
        u0 = torch.tensor([1.0, 1.0, 20.0]).double().requires_grad_()
        constants = torch.tensor([10.0, 28.0, 8 / 3], dtype=torch.float64, requires_grad=True)

        def step(u, t0, t1):
            def field(u):
                x, y, z, sigma, rho, beta = *u, *constants
                return torch.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])

            h, a = t1 - t0, field(u)
            b = field(u + h / 2 * a)
            c = field(u + h / 2 * b)
            return u + h / 6 * (a + 2 * b + 2 * c + field(u + h * c))

        end = marched(step, u0, torch.linspace(0, 1, 129).double())[-1]
        slopes = torch.autograd.grad(end[0], [u0, constants])
        assert numbers[-9:] == pytest.approx([*end.tolist(), *slopes[0].tolist(), *slopes[1].tolist()], rel=1e-8)
