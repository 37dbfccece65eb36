"""u' = -u, u(0) = 1, by implicit Euler, all steps at once: mpirun -n 2 python dahlquist.py."""

import numpy as np

import xbraid_py


def step(u, t0, t1):
    return u / (1 + t1 - t0)


comm = xbraid_py.world()
mgrit = xbraid_py.MGRIT(cycle="V", cfactor=2, max_levels=2, tol=1e-10)
found = xbraid_py.solve(xbraid_py.TimeStepper(step), 1.0, np.linspace(0, 5, 101), comm, mgrit=mgrit)
if comm.rank == 0:
    for norm, factor in zip(found.norms[1:], found.factors, strict=True):
        print(f"residual {norm:.2e}, times {factor:.3f}")
    print(f"u(5) = {found.end:.6f}, of the equation {np.exp(-5):.6f}")
