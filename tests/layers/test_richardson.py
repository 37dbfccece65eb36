"""Richardson's estimates of the discretization error in depth: against fine solutions, for weights smooth in depth."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import reference as ref
import torch
from torch import nn

from xbraid_py.layers.dense import DenseLayer, ResidualSteps
from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.module_steps import ModuleSteps, Tape
from xbraid_py.layers.steps import error_norms, local_errors, output_error
from xbraid_py.multilevel.depth.transfer import prolong_rows

WIDTH, BATCH, T = 3, 4, 2.0
BLOCK = DenseLayer(WIDTH, WIDTH, "tanh")
U0 = ref.random(WIDTH, BATCH, seed=2)
ORDERS = {"euler": 1, "midpoint": 2}


class Tanh(nn.Module):
    """The same layer as a module."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, u):
        return torch.tanh(self.linear(u.T).T)


def weights(t: torch.Tensor) -> torch.Tensor:
    """Rows (n, p), smooth functions of depth."""
    a, b = ref.random(2, BLOCK.num_parameters, seed=1)
    return 0.6 * (a * torch.cos(1.3 * t[:, None]) + b * torch.sin(2.0 * t[:, None] + 0.3))


def steps_of(number: int, scheme: str, kind: str = "dense"):
    """So many equal steps over [0, T], weights taken where each begins, or in its middle (midpoint rule)."""
    h = T / number
    theta = weights(h * (torch.arange(number, dtype=torch.float64) + (0.5 if scheme == "midpoint" else 0.0)))
    if kind == "dense":
        return ResidualSteps(BLOCK, theta, h, scheme)
    block = ModuleBlock(Tanh())
    names = [column.name for column in block.columns]
    assert names == ["linear.weight", "linear.bias"]  # as the dense layer has them
    return ModuleSteps(block, theta, h, tuple(range(number)), scheme=scheme, vmap=kind == "vmap")


@cache
def states(number: int, scheme: str) -> torch.Tensor:
    """All states (N + 1, C, B), one step after the other."""
    h, found = T / number, [U0]
    for row in steps_of(number, scheme).theta:
        found.append(ref.step(row, found[-1], h, "tanh", scheme))
    return torch.stack(found)


def exact(start: torch.Tensor, first: float, size: float, frozen: torch.Tensor | None = None, parts: int = 64):
    """The equation over [first, first + size] in many steps of the classical Runge-Kutta method."""
    h, u = size / parts, start

    def slope(t, u):
        row = weights(torch.tensor([t]).double())[0] if frozen is None else frozen
        return ref.dense(row, u, WIDTH, "tanh")

    for k in range(parts):
        t = first + k * h
        a = slope(t, u)
        b = slope(t + h / 2, u + h / 2 * a)
        c = slope(t + h / 2, u + h / 2 * b)
        d = slope(t + h, u + h * c)
        u = u + h / 6 * (a + 2 * b + 2 * c + d)
    return u


def apart(estimate: torch.Tensor, true: torch.Tensor) -> float:
    return float((estimate - true).norm() / true.norm())


def layer_at(number: int) -> int:
    """The layer that begins at T/4."""
    return number // 4


@pytest.mark.parametrize("kind", ["dense", "module", "vmap"])
def test_the_local_error_of_euler_with_interpolated_weights(kind):
    """Estimate over true error tends to 1, and the error itself falls with h^2."""
    distances, norms = [], []
    for number in (16, 32, 64, 128):
        steps, inputs = steps_of(number, "euler", kind), states(number, "euler")
        halves = prolong_rows(steps.theta, "linear")
        estimate, n, h = local_errors(steps, inputs[:-1].clone(), halves), layer_at(number), T / number
        true = exact(inputs[n], n * h, h) - inputs[n + 1]
        distances.append(apart(estimate[n], true))
        norms.append(float(error_norms(estimate)[n]))
    assert distances[-1] < 0.03
    assert all(1.6 < a / b < 2.5 for a, b in zip(distances, distances[1:], strict=False))
    assert all(3.4 < a / b < 4.6 for a, b in zip(norms, norms[1:], strict=False))


@pytest.mark.parametrize("scheme", ["euler", "midpoint"])
def test_the_local_error_with_weights_that_are_constant_over_a_step(scheme):
    distances, norms = [], []
    for number in (16, 32, 64, 128):
        steps, inputs = steps_of(number, scheme), states(number, scheme)
        estimate, n = local_errors(steps, inputs[:-1].clone()), layer_at(number)
        true = exact(inputs[n], 0.0, T / number, frozen=steps.theta[n]) - inputs[n + 1]
        distances.append(apart(estimate[n], true))
        norms.append(float(error_norms(estimate)[n]))
    power = 2.0 ** (ORDERS[scheme] + 1)
    assert distances[-1] < 0.02
    assert all(1.6 < a / b < 2.6 for a, b in zip(distances, distances[1:], strict=False))
    assert all(0.85 * power < a / b < 1.15 * power for a, b in zip(norms, norms[1:], strict=False))


@pytest.mark.parametrize("scheme", ["euler", "midpoint"])
def test_the_error_of_the_output(scheme):
    """From a solution and one with steps twice as long: of order p, and better known the smaller h is."""
    true_end, distances, norms = exact(U0, 0.0, T, parts=512), [], []
    for number in (16, 32, 64, 128):
        coarse, fine = states(number // 2, scheme)[-1], states(number, scheme)[-1]
        estimate = output_error(coarse, fine, ORDERS[scheme])
        distances.append(apart(estimate, true_end - fine))
        norms.append(float((true_end - fine).norm()))
    power = 2.0 ** ORDERS[scheme]
    assert distances[-1] < 0.05
    assert all(1.6 < a / b for a, b in zip(distances, distances[1:], strict=False)), distances
    assert all(0.85 * power < a / b < 1.15 * power for a, b in zip(norms, norms[1:], strict=False))
    # Added to the fine solution it makes one of a higher order.
    assert float((fine + estimate - true_end).norm()) < 0.05 * norms[-1]


def test_local_errors_add_up_to_the_error_of_the_output():
    """Each times the adjoint behind its layer: the effect on a linear function of the output."""
    number, v = 128, ref.random(WIDTH, BATCH, seed=5)
    steps, inputs = steps_of(number, "euler"), states(number, "euler")
    errors = local_errors(steps, inputs[:-1].clone(), prolong_rows(steps.theta, "linear"))
    adjoints = torch.empty_like(errors)
    steps.relax_adjoint(inputs[:-1].clone(), v[None], number, None, adjoints, None)
    effect = float((adjoints * errors).sum())
    assert effect == pytest.approx(float((v * (exact(U0, 0.0, T, parts=512) - inputs[-1])).sum()), rel=0.03)


@pytest.mark.parametrize("kind", ["dense", "module", "vmap"])
def test_steps_of_different_sizes_and_parts(kind):
    """Row by row what a step of that size alone gives; parts are cut each for itself."""
    number = 6
    steps, inputs = steps_of(number, "euler", kind), states(number, "euler")[:-1].clone()
    h = torch.tensor([0.1, 0.2, 0.4, 0.4, 0.2, 0.1], dtype=torch.float64)
    found = local_errors(replace(steps, h=h), inputs)
    for n in range(number):
        row, u = steps.theta[n], inputs[n]
        whole, half = ref.step(row, u, float(h[n]), "tanh"), ref.step(row, u, float(h[n]) / 2, "tanh")
        expected = 2 * (ref.step(row, half, float(h[n]) / 2, "tanh") - whole)
        assert torch.allclose(found[n], expected, rtol=1e-10, atol=1e-15)
    pairs = replace(steps, h=h, parts=2)
    fine = pairs.halved()
    assert fine.theta.tolist() == steps.theta.repeat_interleave(2, 0).tolist() and fine.parts == 2
    assert fine.h.tolist() == [each / 2 for each in h.tolist() for _ in range(2)]
    ends, expected = local_errors(pairs, inputs[::2].clone()), []
    for k in range(3):
        coarse = fine_end = inputs[2 * k]
        for n in (2 * k, 2 * k + 1):
            coarse = ref.step(steps.theta[n], coarse, float(h[n]), "tanh")
            for _ in range(2):
                fine_end = ref.step(steps.theta[n], fine_end, float(h[n]) / 2, "tanh")
        expected.append(2 * (fine_end - coarse))
    assert torch.allclose(ends, torch.stack(expected), rtol=1e-10, atol=1e-15)


def test_modules_keep_their_masks_and_lose_their_tape():
    steps = replace(steps_of(3, "euler", "module"), tape=Tape())
    fine = steps.halved()
    assert fine.layers == (0, 0, 1, 1, 2, 2) and fine.tape is None and fine.h == steps.h / 2


def test_norms_do_not_depend_on_the_number_of_samples_or_layers():
    errors = ref.random(4, WIDTH, BATCH, seed=6)
    norms = error_norms(errors)
    assert norms.tolist() == pytest.approx([float(each.square().mean().sqrt()) for each in errors], rel=1e-14)
    assert error_norms(torch.cat([errors, errors], 2)).tolist() == pytest.approx(norms.tolist(), rel=1e-14)
    assert torch.equal(error_norms(errors[1:2]), norms[1:2])
    assert error_norms(errors[:0]).shape == (0,)


def test_bad_input_is_named():
    steps = steps_of(3, "euler")
    with pytest.raises(ValueError, match=r"^halves.shape=\(3, 12\) must be \(6, 12\), two rows for each of the steps$"):
        local_errors(steps, states(3, "euler")[:-1].clone(), steps.theta)
    with pytest.raises(
        ValueError, match="^order=0 must be at least 1; use 1 for forward Euler, 2 for the midpoint rule"
    ):
        output_error(U0, U0, 0)
    with pytest.raises(ValueError, match=r"^coarse.shape=\(2, 4\) must be that of fine, \(3, 4\)$"):
        output_error(U0[:2], U0, 1)
