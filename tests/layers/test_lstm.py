"""The cell of a long short-term memory and its steps along sequences of unlike length, against loops and autograd."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from gated_cells import COUNTS, SIZE, B, H, M, check_cell, drawn

from xbraid_py.layers.gated import KINDS, GatedSteps, Sizes
from xbraid_py.layers.lstm import LstmCell


def slow_step(kind, state, a, weight, bias, size, count=1):
    """One step of all samples, as the equations stand there; `count` of them with the gates of the first."""
    h, c = state.chunk(2, -1)
    i, f, n, o = (a + h @ weight.T + (0 if bias is None else bias)).chunk(4, -1)
    i, f, n, o = torch.sigmoid(i), torch.sigmoid(f), torch.tanh(n), torch.sigmoid(o)
    for _ in range(count):
        if kind == "plain":
            c = c + size / count * (i * n - (1 - f) * c)
        else:
            c = (c + size / count * i * n) / (1 + size / count * (1 - f))
    return torch.cat([o * torch.tanh(c), c], -1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("counts", [None, COUNTS])
@pytest.mark.parametrize("with_bias", [True, False])
def test_a_step_and_its_jacobian_are_those_of_autograd(kind, counts, with_bias):
    local, gradient = check_cell(LstmCell(H, kind), partial(slow_step, kind), 2, 4, counts, with_bias)
    assert torch.equal(local.of_gates(gradient), gradient)


def test_plain_steps_of_size_one_are_those_of_torch():
    made = torch.nn.LSTMCell(4, H, dtype=torch.float64)
    x, h, c = drawn(B, 4), drawn(B, H), drawn(B, H)
    with torch.no_grad():
        a = torch.addmm(made.bias_ih, x, made.weight_ih.T)[None]
        sizes = Sizes(torch.ones(1, dtype=torch.float64))
        found = LstmCell(H).step(torch.cat([h, c], -1)[None], a, made.weight_hh, made.bias_hh, sizes)[0]
        assert torch.allclose(found, torch.cat(made(x, (h, c)), -1), rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("composed", [False, True])
def test_a_step_of_size_zero_changes_nothing_and_samples_have_sizes_of_their_own(kind, composed):
    cell, state, a, weight = LstmCell(H, kind), drawn(M, B, 2 * H), drawn(M, B, 4 * H), drawn(4 * H, H)
    still = torch.zeros(M, B, dtype=torch.float64)
    still[:, 1] = SIZE  # the second sample alone is moved
    sizes = Sizes(still, (still > 0) * 2.0 if composed else None)
    every = Sizes(SIZE, torch.full((M,), 2.0, dtype=torch.float64) if composed else None)
    found, moved = cell.step(state, a, weight, None, sizes), cell.step(state, a, weight, None, every)
    assert torch.equal(found[:, ::2], state[:, ::2]) and torch.equal(found[:, 1], moved[:, 1])
    v = drawn(M, B, 2 * H)
    back, slopes = cell.linearize(state, a, weight, None, sizes).back(v, weight, slice(None))
    wanted, wanted_slopes = cell.linearize(state, a, weight, None, every).back(v, weight, slice(None))
    assert torch.equal(back[:, ::2], v[:, ::2]) and not slopes[:, ::2].any()
    assert torch.allclose(back[:, 1], wanted[:, 1], atol=1e-15) and torch.equal(slopes[:, 1], wanted_slopes[:, 1])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_gate_that_forgets_nothing_adds_up(kind, dtype):
    """Also where 1 - f is below the precision of f: eight steps add the candidate eight times."""
    a = torch.zeros(1, 1, 4 * H, dtype=dtype)
    a[..., H : 2 * H] = torch.linspace(2.0, 200.0, H)
    a[..., 2 * H : 3 * H] = 1.0
    state, weight = torch.zeros(1, 1, 2 * H, dtype=dtype), torch.zeros(4 * H, H, dtype=dtype)
    sizes = Sizes(torch.full((1,), 8.0, dtype=dtype), torch.full((1,), 8.0, dtype=dtype))
    found = LstmCell(H, kind).step(state, a, weight, None, sizes)
    wanted = slow_step(kind, state[0].double(), a[0].double(), weight.double(), None, 8.0, 8)
    assert torch.allclose(found[0].double(), wanted, rtol=1e-6 if dtype == torch.float32 else 1e-13, atol=0)
    local = LstmCell(H, kind).linearize(state, a, weight, None, sizes)
    assert all(getattr(local, name).isfinite().all() for name in ("decay", "cell", "through", "output"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("coarse", ["compose", "euler"])
def test_sweeps_and_their_adjoints_are_loops_where_samples_end_early(kind, coarse):
    """24 fine steps and 6 coarse ones of 4, in two intervals; the samples have 24, 13 and 5 steps."""
    ends = torch.tensor([24, 13, 5])
    h = 0.7 * (torch.arange(24)[:, None] < ends).double()
    weight, bias = drawn(4 * H, H), drawn(4 * H)
    fine = GatedSteps(LstmCell(H, kind), drawn(24, B, 4 * H), weight, bias, h, coarse)
    steps = fine.coarsen(4, "average", "euler")
    assert torch.allclose(steps.h, h.unflatten(0, (6, 4)).sum(1))
    points, v = drawn(2, B, 2 * H), drawn(2, B, 2 * H)
    states = torch.empty(6, B, 2 * H, dtype=torch.float64)
    found = steps.relax(points, 3, None, states)
    leaves = [t.clone().requires_grad_() for t in (points, steps.theta, weight, bias)]
    rows = []
    for k in range(2):
        for b in range(B):
            x = leaves[0][k, b : b + 1]
            for i in range(3 * k, 3 * k + 3):
                count = int((h[4 * i : 4 * i + 4, b] > 0).sum())
                if count:
                    a = fine.theta[4 * i : 4 * i + count, b].mean(0)
                    assert torch.allclose(steps.theta[i, b], a)
                    many = count if coarse == "compose" else 1
                    x = slow_step(kind, x, leaves[1][i, b : b + 1], leaves[2], leaves[3], 0.7 * count, many)
            rows.append(x)
    wanted = torch.cat(rows).view(2, B, 2 * H)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    gradient = torch.empty_like(steps.theta)
    back = steps.relax_adjoint(states, v, 3, None, None, gradient)
    of_points, of_theta, of_weight, of_bias = torch.autograd.grad(wanted, leaves, v)
    assert torch.allclose(back, of_points, rtol=0, atol=1e-11)
    assert torch.allclose(gradient, of_theta, rtol=0, atol=1e-11)
    slopes = steps.weight_slopes(states, gradient)
    assert torch.allclose(torch.einsum("ibg,ibh->gh", slopes, states[..., :H]), of_weight, rtol=0, atol=1e-11)
    assert torch.allclose(slopes.sum((0, 1)), of_bias, rtol=0, atol=1e-11)
