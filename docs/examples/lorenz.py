"""The Lorenz system by Runge-Kutta steps, and slopes by start and constants: mpirun -n 2 python lorenz.py."""

import torch

import xbraid_py

constants = torch.tensor([10.0, 28.0, 8 / 3], dtype=torch.float64, requires_grad=True)
u0 = torch.tensor([1.0, 1.0, 20.0], dtype=torch.float64, requires_grad=True)


def step(u, t0, t1):
    def field(u):
        (x, y, z), (sigma, rho, beta) = u, constants
        return torch.stack([sigma * (y - x), x * (rho - z) - y, x * y - beta * z])

    h, a = t1 - t0, field(u)
    c = field(u + h / 2 * (b := field(u + h / 2 * a)))
    return u + h / 6 * (a + 2 * b + 2 * c + field(u + h * c))


comm, t = xbraid_py.world(), torch.linspace(0, 1, 129, dtype=torch.float64)
found = xbraid_py.solve(xbraid_py.TimeStepper(step, parameters=[constants]), u0, t, comm)
found.end[0].backward()
if comm.rank == 0:
    print(found.norms, found.end.tolist(), u0.grad.tolist(), constants.grad.tolist())
