"""Equations by one function step(u, t0, t1): residuals of MGRIT, iteration by iteration, beside those of PyMGRIT.

    python benchmarks/equations.py [--quick]

Dahlquist's and the heat equation as in PyMGRIT's examples (implicit Euler), and the Lorenz system (Runge-Kutta), on
hierarchies of 2 and 3 levels, by V- and F-cycles with FCF-relaxation. Both begin with the states of the coarsest level;
on 3 levels with a V-cycle on the middle one. PyMGRIT counts the residual at the last time as well, which is none here,
where this state is the end of the last interval: its norms are shown without, and its own factors beside them. Last
line: for each problem and hierarchy the factor of the second iteration and, where it is installed (`pip install
pymgrit`), the largest relative distance of a norm from PyMGRIT's. Norms below 1e-10 of the first are left out. With
--quick fewer points and iterations.
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

import common
import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import spsolve

from xbraid_py import MGRIT, TimeStepper, solve

HIERARCHIES = {
    "V, 2 levels, c=2": ("V", 2, 2),
    "V, 2 levels, c=4": ("V", 4, 2),
    "V, 3 levels, c=4": ("V", 4, 3),
    "F, 3 levels, c=4": ("F", 4, 3),
}
ROUNDING = 1e-10


@dataclass(frozen=True)
class Problem:
    """An equation, its first state and its times."""

    step: Callable[[np.ndarray, float, float], np.ndarray]
    u0: np.ndarray
    t: np.ndarray


def dahlquist(steps: int = 112) -> Problem:
    """u' = -u on [0, 5], steps / 112 of it."""
    t = np.arange(steps + 1) * 0.05
    return Problem(lambda u, t0, t1: u / (1 + t1 - t0), np.ones(1), t)


def heat(points: int = 101) -> Problem:
    """u_t = u_xx + b with the solution sin(pi x) cos(t) on [0, 2]."""
    x = np.linspace(0, 1, points)[1:-1]
    shape = (len(x), len(x))
    second = sp.diags_array([1.0, -2.0, 1.0], offsets=[-1, 0, 1], shape=shape) / x[0] ** 2
    one = sp.eye_array(len(x))

    def step(u, t0, t1):
        b = -np.sin(np.pi * x) * (np.sin(t1) - np.pi**2 * np.cos(t1))
        return spsolve((one - (t1 - t0) * second).tocsc(), u + (t1 - t0) * b)

    return Problem(step, np.sin(np.pi * x), np.linspace(0, 2, 65))


def lorenz(steps: int = 128) -> Problem:
    """The Lorenz system on [0, 1], by the classical Runge-Kutta method."""

    def field(u):
        return np.array([10 * (u[1] - u[0]), u[0] * (28 - u[2]) - u[1], u[0] * u[1] - 8 / 3 * u[2]])

    def step(u, t0, t1):
        h, a = t1 - t0, field(u)
        b = field(u + h / 2 * a)
        c = field(u + h / 2 * b)
        return u + h / 6 * (a + 2 * b + 2 * c + field(u + h * c))

    return Problem(step, np.array([1.0, 1.0, 20.0]), np.linspace(0, 1, steps + 1))


def ours(problem: Problem, cycle: str, cfactor: int, levels: int, iterations: int) -> np.ndarray:
    """Norms of the residuals before the first and after each iteration."""
    options = MGRIT(cycle=cycle, cfactor=cfactor, max_levels=levels, min_coarse=1, start="full", tol=0.0)
    options = replace(options, max_iter=iterations)
    return np.array(solve(TimeStepper(problem.step), problem.u0, problem.t, mgrit=options).norms)


def peers(problem: Problem, cycle: str, cfactor: int, levels: int, iterations: int) -> tuple[np.ndarray, np.ndarray]:
    """PyMGRIT's after each iteration: without the residual at the last time, and with it."""
    vars(np).setdefault("in1d", np.isin)  # numpy has none any more, and PyMGRIT calls it
    from pymgrit.core.application import Application
    from pymgrit.core.mgrit import Mgrit
    from pymgrit.dahlquist.dahlquist import VectorDahlquist

    class Vector(VectorDahlquist):
        def __add__(self, other):
            return Vector(self.value + other.value)

        def __sub__(self, other):
            return Vector(self.value - other.value)

        def __mul__(self, other):
            return Vector(self.value * other)

        def clone(self):
            return Vector(self.value.copy())

        def clone_zero(self):
            return Vector(0 * problem.u0)

    class Equation(Application):
        def __init__(self, **times):
            super().__init__(**times)
            self.vector_template, self.vector_t_start = Vector(0 * problem.u0), Vector(problem.u0)

        def step(self, u_start, t_start, t_stop):
            return Vector(problem.step(u_start.value, t_start, t_stop))

    class Counting(Mgrit):
        def convergence_criterion(self, iteration):
            super().convergence_criterion(iteration)
            t, u = self.t[0], self.u[0]
            residuals = [
                self.step[0](u_start=u[i - 1], t_start=t[i - 1], t_stop=t[i]) - u[i]
                for i in self.index_local_c[0][1:-1]
            ]
            shorter.append(float(np.linalg.norm([each.norm() for each in residuals])))

    shorter: list[float] = []
    grids = [problem.t[:: cfactor**level] for level in range(levels)]
    equations = [Equation(t_interval=t) for t in grids]
    options = {"cycle_type": cycle, "tol": 0.0, "max_iter": iterations, "logging_lvl": logging.WARNING}
    solver = Counting(equations, **options)
    solver.solve()
    return np.array(shorter), solver.conv[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer points and iterations")
    parser.add_argument("--iterations", type=int, default=6)
    args = parser.parse_args()
    problems = {"dahlquist": dahlquist(), "heat": heat(33 if args.quick else 101), "lorenz": lorenz()}
    iterations, beside = 3 if args.quick else args.iterations, importlib.util.find_spec("pymgrit") is not None
    figures: dict[str, float] = {}
    for name, problem in problems.items():
        for words, hierarchy in HIERARCHIES.items():
            norms = ours(problem, *hierarchy, iterations)
            print(f"\n{name}, {len(problem.t) - 1} steps, {words}")
            print("it  residual     factor" + "   PyMGRIT      factor  its own" * beside)
            theirs, with_end = peers(problem, *hierarchy, iterations) if beside else (None, None)
            key, seen = f"{name}_{'_'.join(map(str, hierarchy))}", []
            for i, norm in enumerate(norms):
                if norm < ROUNDING * norms[0]:
                    break
                line = f"{i:2d}  {norm:.5e}"
                if i:
                    line += f"  {norm / norms[i - 1]:.4f}"
                    if beside:
                        line += f"   {theirs[i - 1]:.5e}"
                        seen.append(abs(norm / theirs[i - 1] - 1))
                if i > 1:
                    figures.setdefault(f"{key}_factor", norm / norms[i - 1])
                    if beside:
                        line += f"  {theirs[i - 1] / theirs[i - 2]:.4f}  {with_end[i - 1] / with_end[i - 2]:.4f}"
                print(line)
            if beside:
                figures[f"{key}_distance"] = max(seen)
    common.finish("equations", figures)


if __name__ == "__main__":
    main()
