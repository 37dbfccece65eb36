"""Kernels with a step size for each row: to the last bit what calls with one size for all of them give.

Shape letters: `m` intervals, `c` steps of each.
"""

from __future__ import annotations

import pytest
import torch
from kernel_cases import ACTIVATIONS, DTYPES, NAMES, SCHEMES, SETS, equal, needs_native, placed, problem, public_on


@pytest.fixture(params=NAMES)
def kernels(request):
    """The public functions on each implementation."""
    with public_on(request.param) as public:
        yield public


@pytest.fixture(params=[pytest.param(name, marks=needs_native) for name in SETS or ["native"]])
def native(request):
    """The public functions on native code with each instruction set."""
    with public_on(request.param) as public:
        yield public


def all_four(kernels, arrays, c: int, h, scheme: str, parts: int = 1) -> list[torch.Tensor]:
    """What step, adjoint, relax and relax_adjoint find, gradients and inputs included."""
    layer, theta, u, v, tau = arrays
    slopes, more, record, behind = (torch.empty_like(each) for each in (theta, theta, tau[::parts], tau[::parts]))
    how = {"h": h, "scheme": scheme}
    found = [kernels.step(layer, theta, u, **how), kernels.adjoint(layer, theta, u, v, gradient=slopes, **how)]
    how |= {"parts": parts, "tau": tau[::parts]}
    found.append(kernels.relax(layer, theta, u[:: c * parts], c, inputs=record, **how))
    points = v[:: c * parts]
    found.append(kernels.relax_adjoint(layer, theta, u, points, c, inputs=behind, gradient=more, **how))
    return [*found, slopes, more, record, behind]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [1, 8, 12, 64, 65])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_step_size_or_the_same_for_each_row(kernels, dtype, width, scheme):
    """A number and a tensor full of it: the same bits, wherever the tensor lies."""
    arrays = problem(width, 300, 2, 6, dtype)
    one = all_four(kernels, arrays, 3, 0.3, scheme, parts=2)
    same = torch.full((12,), 0.3, dtype=dtype)
    for each in (same, placed(same, "spread"), placed(same, "shifted"), same[:1].expand(12)):
        assert all(map(equal, all_four(kernels, arrays, 3, each, scheme, parts=2), one))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_sizes_of_rows_alone(native, dtype, scheme):
    """Each row takes the step of its own size: that of a call for this row and this size, to the last bit."""
    layer, theta, u, v, tau = arrays = problem(8, 300, 2, 2, dtype)
    sizes = torch.tensor([0.7, 0.0, -0.2, 0.01], dtype=dtype)
    after, before, ends, starts, slopes, more, *_ = all_four(native, arrays, 2, sizes, scheme)
    rows = [(slice(i, i + 1), h) for i, h in enumerate(sizes.tolist())]
    for one, h in rows:
        how, found = {"h": h, "scheme": scheme}, torch.empty_like(theta[:1])
        assert equal(native.step(layer, theta[one], u[one], **how), after[one])
        assert equal(native.adjoint(layer, theta[one], u[one], v[one], gradient=found, **how), before[one])
        assert equal(found, slopes[one])
    for k in range(2):
        x, y = u[2 * k : 2 * k + 1], v[2 * k : 2 * k + 1]
        for row, h in rows[2 * k : 2 * k + 2]:
            x = native.step(layer, theta[row], x, h=h, scheme=scheme, add=tau[row])
        for row, h in reversed(rows[2 * k : 2 * k + 2]):
            found = torch.empty_like(theta[:1])
            y = native.adjoint(layer, theta[row], u[row], y, h=h, scheme=scheme, add=tau[row], gradient=found)
            assert equal(found, more[row])
        assert equal(x[0], ends[k]) and equal(y[0], starts[k])


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_step_of_size_zero_is_the_identity(kernels, activation, scheme):
    arrays = problem(12, 133, 2, 3, activation=activation)
    u, v = arrays[2:4]
    arrays = (*arrays[:4], torch.zeros_like(u))
    for h in (0.0, torch.zeros(6, dtype=torch.float64)):
        after, before, ends, starts, slopes, more, record, behind = all_four(kernels, arrays, 3, h, scheme)
        assert torch.equal(after, u) and torch.equal(before, v)
        for found, points in ((ends, u[::3]), (starts, v[::3])):
            assert torch.equal(found, points)
        for found, points in ((record, u[::3]), (behind, v[::3])):
            assert torch.equal(found, points.repeat_interleave(3, 0))
        assert not slopes.any() and not more.any()
