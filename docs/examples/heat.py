"""u_t = u_xx + b(x, t) on (0, 1), u = 0 at both ends, by implicit Euler: mpirun -n 2 python heat.py."""

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import spsolve

import xbraid_py

x = np.linspace(0, 1, 101)[1:-1]
second = sp.diags_array([1.0, -2.0, 1.0], offsets=[-1, 0, 1], shape=(99, 99)) / x[0] ** 2


def step(u, t0, t1):  # with this b the solution is sin(pi x) cos(t)
    b = -np.sin(np.pi * x) * (np.sin(t1) - np.pi**2 * np.cos(t1))
    return spsolve((sp.eye_array(99) - (t1 - t0) * second).tocsc(), u + (t1 - t0) * b)


comm = xbraid_py.world()
mgrit = xbraid_py.MGRIT(cycle="V", cfactor=2, max_levels=2, tol=1e-10)
found = xbraid_py.solve(xbraid_py.TimeStepper(step), np.sin(np.pi * x), np.linspace(0, 2, 65), comm, mgrit=mgrit)
if comm.rank == 0:
    for norm, factor in zip(found.norms[1:], found.factors, strict=True):
        print(f"residual {norm:.2e}, times {factor:.3f}")
    print(f"error at t = 2: {abs(found.end - np.sin(np.pi * x) * np.cos(2)).max():.1e}")
