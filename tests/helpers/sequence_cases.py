"""Sequences for tests: a loop over time in place of a recurrent network, its gradients, and networks that converge."""

from __future__ import annotations

import numpy as np
import torch

from xbraid_py import MGRIT, ParallelGRU

L, B, F, H, D = 29, 3, 4, 5, 2
EXACT = 1e-10
CONVERGED = {
    "lagged": MGRIT(tol=1e-13, max_iter=20),
    "V": MGRIT(cycle="V", tol=1e-13, max_iter=20, cfactor=3),
    "F": MGRIT(cycle="F", tol=1e-13, max_iter=20, cfactor=2, min_coarse=2, start="full"),
    "one-shot, three levels": MGRIT(tol=1e-13, max_iter=30, cfactor=2, max_levels=3, min_coarse=2),
}


def drawn(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape))


def slow_gru(weights, x, h_0, kind="plain", dt=1.0):
    """Outputs (L, B, H) and last states (D, B, H) by a loop over time, layer after layer."""
    ends = []
    for layer, h in enumerate(h_0):
        weight_ih, weight_hh, bias_ih, bias_hh = weights[4 * layer : 4 * layer + 4]
        made = []
        for x_t in x:
            a_r, a_z, a_n = (x_t @ weight_ih.T + bias_ih).chunk(3, -1)
            g_r, g_z, g_n = (h @ weight_hh.T + bias_hh).chunk(3, -1)
            r, move = torch.sigmoid(a_r + g_r), dt * (1 - torch.sigmoid(a_z + g_z))
            n = torch.tanh(a_n + r * g_n)
            h = h + move * (n - h) if kind == "plain" else (h + move * n) / (1 + move)
            made.append(h)
        x = torch.stack(made)
        ends.append(h)
    return x, torch.stack(ends)


def slopes_of(function, weights, length, with_end=True):
    """Output, last states, and gradients of a loss of both by input, first states and weights."""
    x, h_0 = drawn(length, B, F, seed=1).requires_grad_(), drawn(D, B, H, seed=2).requires_grad_()
    output, end = function(x, h_0)
    loss = (output * drawn(length, B, H, seed=3)).sum()
    if with_end:
        loss = loss + (end * drawn(D, B, H, seed=4)).sum()
    return [output.detach(), end.detach(), *torch.autograd.grad(loss, (x, h_0, *weights))]


def wanted_of(state, length, kind="plain", dt=1.0):
    weights = [t.detach().clone().requires_grad_() for t in state.values()]
    return slopes_of(lambda x, h: slow_gru(weights, x, h, kind, dt), weights, length)


def distance(found, wanted):
    pairs = zip(found, wanted, strict=True)
    return max(float((a - b).detach().abs().max() / (1 + b.detach().abs().max())) for a, b in pairs)


def made(comm=None, **options):
    return ParallelGRU(F, H, D, comm=comm, **{"dtype": torch.float64, "mgrit": CONVERGED["lagged"], **options})
