"""Cells of gated units beside autograd through their equations, as a test has them."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xbraid_py.layers.gated import Sizes

M, B, H = 6, 3, 5
SIZE = torch.tensor([1.0, 0.3, 0.9, 0.01, 2.5, 1.2], dtype=torch.float64)
COUNTS = (1, 2, 3, 4, 1, 7)
_DRAW = np.random.default_rng(3)


def drawn(*shape) -> Tensor:
    """Random numbers, others in each call."""
    return torch.from_numpy(_DRAW.standard_normal(shape))


def check_cell(cell, slow_step, numbers: int, gates: int, counts, with_bias: bool) -> tuple:
    """Assert that M steps of a cell, whose states have `numbers` H numbers, and their Jacobians are autograd's.

    `slow_step(state, a, weight, bias, size, count)` is one of them, as the equations stand there. Gives the Jacobians,
    and the gradient of what the input gives to the gates.
    """
    state, a, weight = drawn(M, B, numbers * H), drawn(M, B, gates * H), drawn(gates * H, H)
    bias, v = drawn(gates * H) if with_bias else None, drawn(M, B, numbers * H)
    sizes = Sizes(SIZE, None if counts is None else torch.tensor(counts, dtype=torch.float64))
    leaves = [t.clone().requires_grad_() for t in (state, a)]
    of_rows = zip(*leaves, SIZE, counts or (1,) * M, strict=True)
    wanted = torch.stack([slow_step(x, a_x, weight, bias, size, count) for x, a_x, size, count in of_rows])
    of_state, of_a = torch.autograd.grad(wanted, leaves, v)
    assert torch.allclose(cell.step(state, a, weight, bias, sizes), wanted, rtol=0, atol=1e-13)
    local = cell.linearize(state, a, weight, bias, sizes)
    back, slopes = local.back(v, weight, slice(None))
    gradient = torch.empty_like(a)
    local.of_input(v, slopes, slice(None), gradient)
    assert torch.allclose(back, of_state, rtol=0, atol=1e-12)
    assert torch.allclose(gradient, of_a, rtol=0, atol=1e-12)
    return local, gradient
