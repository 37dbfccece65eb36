"""
MGRIT on an equation of your own
================================

All time steps of an equation at once: the Dahlquist and the heat equation by one function each, the levels of the
solver, the history of its convergence, and what `check_propagator` says of a step that is wrong.
"""

import matplotlib.pyplot as plt
import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import splu

import xbraid_py

comm = xbraid_py.world()  # one rank here; `mpirun -n 4 python t02_mgrit.py` has the same numbers on four

# %%
# The Dahlquist equation
# ----------------------
#
# :math:`u' = -u`, :math:`u(0) = 1`, by implicit Euler steps: one function says what a step is. Two levels, every second
# point on the coarse one.


def dahlquist(u, t0, t1):
    return u / (1 + t1 - t0)


t = np.linspace(0, 5, 101)
two = xbraid_py.MGRIT(cycle="V", cfactor=2, max_levels=2, tol=1e-10)
found = xbraid_py.solve(xbraid_py.TimeStepper(dahlquist), 1.0, t, comm, mgrit=two)
print(f"u(5) = {found.end:.6f}, of the equation {np.exp(-5):.6f}; {found.iterations} iterations")

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
axes.plot(found.t, found.states, label="found")
axes.plot(t, np.exp(-t), "--", label="of the equation")
axes.set(xlabel="t", ylabel="u")
axes.legend()

# %%
# The heat equation
# -----------------
#
# :math:`u_t = u_{xx} + b(x, t)` with a right-hand side whose solution is :math:`\sin(\pi x) \cos t`, by implicit Euler
# with sparse matrices of scipy. A step factorizes its matrix; coarse levels call the same function for their longer
# steps.

x = np.linspace(0, 1, 65)[1:-1]
second = sp.diags_array([1.0, -2.0, 1.0], offsets=[-1, 0, 1], shape=(63, 63)) / x[0] ** 2
solvers = {}


def heat(u, t0, t1):
    h = t1 - t0
    if round(h, 9) not in solvers:
        solvers[round(h, 9)] = splu((sp.eye_array(63) - h * second).tocsc())
    b = -np.sin(np.pi * x) * (np.sin(t1) - np.pi**2 * np.cos(t1))
    return solvers[round(h, 9)].solve(u + h * b)


t = np.linspace(0, 2, 257)
start = np.sin(np.pi * x)
histories = {}
for name, options in {
    "V, 2 levels": {"cycle": "V", "max_levels": 2},
    "V, 4 levels": {"cycle": "V", "max_levels": 4},
    "F, 4 levels": {"cycle": "F", "max_levels": 4},
    "V, 4 levels, F-relaxation": {"cycle": "V", "max_levels": 4, "nrelax": 0},
}.items():
    mgrit = xbraid_py.MGRIT(cfactor=4, tol=1e-10, max_iter=20, **options)
    found = xbraid_py.solve(xbraid_py.TimeStepper(heat), start, t, comm, mgrit=mgrit)
    histories[name] = found.norms
    print(f"{name:28} {found.iterations:2} iterations, {found.work:.0f} steps where time stepping has 256")

error = abs(found.end - np.sin(np.pi * x) * np.cos(2)).max()
print(f"error at t = 2: {error:.1e}")

figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
for name, norms in histories.items():
    axes.semilogy(norms, "o-", label=name)
axes.set(xlabel="iteration", ylabel="norm of the residual")
axes.legend()

# %%
# F-cycles visit coarse levels more often, and FCF-relaxation (the default) makes each of them better than F-relaxation
# does. What the levels are, and which ranks have which points of them, the hierarchy says:

options = xbraid_py.MGRIT(cycle="V", cfactor=4, max_levels=4)
hierarchy = xbraid_py.Hierarchy.plan(options, xbraid_py.LayerGrid(256, T=2.0), 4)
print(hierarchy.table(options))

# %%
# Is my step right?
# -----------------
#
# `check_propagator` tries what the solver counts on, and says in words what fails. Here a step changes its argument:


def careless(u, t0, t1):
    u.mul_(1 / (1 + t1 - t0))
    return u


states, times = torch.randn(8, 3, dtype=torch.float64), torch.linspace(0, 1, 9)
print(xbraid_py.check_propagator(xbraid_py.TimeStepper(careless), states=states, t=times))
