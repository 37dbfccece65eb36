"""The kernels in torch: for machines without the native ones, other devices, and wide layers. Arguments by position.

Shape letters: `m` intervals, `c` steps of each, `n` layers, `I` inputs, `O` outputs, `B` samples, `p` parameters of
a layer.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from xbraid_py.kernels import checks
from xbraid_py.kernels.activation import activation

# States of at most this many bytes are relaxed in one call: more would leave the second-level cache.
CHUNK_BYTES = 1 << 19
# Numbers of the products that are summed next: 1 MB in double precision.
PRODUCTS = 1 << 17


def step(layer, theta, u, h, scheme, residual, add, out) -> Tensor:
    """See `xbraid_py.kernels.step`."""
    middle = u
    if scheme == "midpoint":
        middle = _scaled(_value(layer, theta, u), h / 2).add_(u)
    found = _scaled(_value(layer, theta, middle), h)
    if residual:
        found += u
    if add is not None:
        found += add
    return found if out is None else out.copy_(found)


def adjoint(layer, theta, u, v, h, scheme, residual, add, out, gradient, back) -> Tensor | None:
    """See `xbraid_py.kernels.adjoint`."""
    if scheme == "midpoint":
        middle = _scaled(_value(layer, theta, u), h / 2).add_(u)
        inner, first = _vjp(layer, theta, middle, v, h, gradient is not None, True)
        found, second = _vjp(layer, theta, u, inner, h / 2, gradient is not None, back)
        if back:
            assert found is not None and inner is not None
            found += inner
        if gradient is not None:
            assert first is not None and second is not None
            torch.add(first, second, out=gradient)
    else:
        found, second = _vjp(layer, theta, u, v, h, gradient is not None, back)
        if gradient is not None:
            gradient.copy_(second)
    if not back:
        return None
    if residual:
        found += v
    if add is not None:
        found += add
    return found if out is None else out.copy_(found)


def relax(layer, theta, points, cfactor, h, scheme, parts, tau, inputs, ends) -> Tensor:
    """See `xbraid_py.kernels.relax`."""
    ends = torch.empty_like(points) if ends is None else ends
    for first, x in _chunks(points):
        for row, part in _steps(cfactor, parts):
            rows = _rows(first, len(x), cfactor, row)
            if inputs is not None and part == 0 and inputs[rows].data_ptr() != x.data_ptr():
                inputs[rows] = x  # unless they are the points themselves
            add = tau[rows] if tau is not None and part == parts - 1 else None
            own = _rows(first, len(x), cfactor * parts, row * parts + part)
            x = step(layer, theta[own], x, _of(h, own), scheme, True, add, None)
        ends[first : first + len(x)] = x
    return ends


def relax_adjoint(layer, theta, points, cfactor, h, scheme, parts, tau, inputs, ends, states, gradient) -> Tensor:
    """See `xbraid_py.kernels.relax_adjoint`."""
    ends = torch.empty_like(points) if ends is None else ends
    for first, v in _chunks(points):
        for row, part in reversed(_steps(cfactor, parts)):
            rows = _rows(first, len(v), cfactor, row)
            if inputs is not None and part == parts - 1:
                inputs[rows] = v
            add = tau[rows] if tau is not None and part == 0 else None
            own = _rows(first, len(v), cfactor * parts, row * parts + part)
            kept = None if gradient is None else gradient[own]
            taken = adjoint(layer, theta[own], states[own], v, _of(h, own), scheme, True, add, None, kept, True)
            assert taken is not None
            v = taken
        ends[first : first + len(v)] = v
    return ends


def _steps(cfactor: int, parts: int) -> list[tuple[int, int]]:
    """All parts of the steps of an interval, in their order."""
    return [(row, part) for row in range(cfactor) for part in range(parts)]


def _rows(first: int, count: int, length: int, row: int) -> slice:
    """Row `row` of each of `count` intervals of `length` rows from the interval `first` on."""
    return slice(first * length + row, (first + count) * length, length)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """See `xbraid_py.kernels.distances`."""
    return _squares(a - b, a)


def move(a: Tensor, b: Tensor, c: Tensor | None, difference: Tensor | None) -> Tensor:
    """See `xbraid_py.kernels.move`."""
    change = b if c is None else b - c
    a.add_(change)
    if difference is not None:
        difference.copy_(change)
    return _squares(change, a)


def _squares(*rows: Tensor) -> Tensor:
    return torch.stack([each.square().unsqueeze(-1).flatten(1).sum(1) for each in rows], 1)


def cross_entropy(layer, theta, u, labels, slope) -> tuple[float, int]:
    """See `xbraid_py.kernels.cross_entropy`."""
    checks.classes(layer, labels)
    logits = _affine(layer, theta, u)[0]
    loss = -torch.log_softmax(logits, 0).gather(0, labels[None]).sum(dtype=torch.float64)
    if slope is not None:
        slope.copy_(torch.softmax(logits, 0))
        slope[labels, torch.arange(len(labels), device=slope.device)] -= 1.0
    return float(loss), int((logits.max(0).indices == labels).sum())


def products(a, b, bounds) -> Tensor:
    """See `xbraid_py.kernels.products`."""
    found = a[0].new_zeros((len(a), len(b), len(bounds) - 1))
    for part, (first, end) in enumerate(pairwise(bounds)):
        for at in range(first, end, PRODUCTS):
            here = slice(at, min(at + PRODUCTS, end))
            left = torch.stack([x[here] for x in a])
            for k, y in enumerate(b):
                found[:, k, part] += (left * y[here]).sum(1)
    return found


def combine(coefficients, vectors, out) -> Tensor:
    """See `xbraid_py.kernels.combine`."""
    found = vectors[0] * coefficients[0]
    for coefficient, x in zip(coefficients[1:], vectors[1:], strict=True):
        found.add_(x, alpha=float(coefficient))
    return found if out is None else out.copy_(found)


def _chunks(points: Tensor):
    """Some intervals at a time: the number of the first, and their points."""
    # On a GPU all of them at once: what counts there is the number of kernels in a row.
    size = max(1, CHUNK_BYTES // max(1, points[:1].nbytes) if points.is_cpu else len(points))
    for first in range(0, len(points), size):
        yield first, points[first : first + size]


def unpack(layer, theta: Tensor) -> tuple[Tensor, Tensor]:
    """Views of rows of weights (n, p): W (n, O, I) and b (n, O or 1, 1)."""
    split = layer.outputs * layer.inputs
    return theta[:, :split].unflatten(1, (layer.outputs, layer.inputs)), theta[:, split:].unsqueeze(2)


def _affine(layer, theta: Tensor, u: Tensor) -> Tensor:
    weight, bias = unpack(layer, theta)
    return torch.baddbmm(bias, weight, u)


def _value(layer, theta: Tensor, u: Tensor) -> Tensor:
    return activation(layer.activation).value(_affine(layer, theta, u))


def _of(h: float | Tensor, rows: slice) -> float | Tensor:
    """The step size of some rows."""
    return h[rows] if isinstance(h, Tensor) else h


def _factor(h: float | Tensor) -> float | Tensor:
    """What states (m, C, B) are multiplied by."""
    return h[:, None, None] if isinstance(h, Tensor) else h


def _scaled(value: Tensor, h: float | Tensor) -> Tensor:
    # In place, unless autograd needs the value as it is.
    factor = _factor(h)
    slope = value.requires_grad or (isinstance(h, Tensor) and h.requires_grad)
    return value * factor if slope else value.mul_(factor)


def _vjp(layer, theta, u, v, h, with_gradient, back) -> tuple[Tensor | None, Tensor | None]:
    """h times the transposed Jacobians of sigma(W u + b), applied to v, with respect to u and to the weights."""
    weight, _ = unpack(layer, theta)
    d = activation(layer.activation).slope(_affine(layer, theta, u)).mul_(v).mul_(_factor(h))
    found = torch.bmm(weight.transpose(1, 2), d) if back else None
    if not with_gradient:
        return found, None
    gradient = torch.empty(theta.shape, dtype=theta.dtype, device=theta.device)
    split = layer.outputs * layer.inputs
    gradient[:, :split] = torch.bmm(d, u.transpose(1, 2)).flatten(1)
    sums = d.sum(2)
    gradient[:, split:] = sums if layer.bias == "vector" else sums.sum(1, keepdim=True)
    return found, gradient
