"""What the tests of the kernels share: the implementations, arrays in odd places, and a literal reference by autograd.

Shape letters: `m` layers or intervals, `c` steps of an interval, `I` inputs, `O` outputs, `B` samples, `p` parameters.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass

import hypothesis.strategies as st
import pytest
import reference as ref
import torch
from torch import Tensor

from xbraid_py import kernels
from xbraid_py.kernels import fallback
from xbraid_py.layers.dense import DenseLayer

try:
    from xbraid_py.kernels import native
except ImportError:
    native = None

SETS = native.instruction_sets() if native else []
NAMES = ["torch", *SETS]
needs_native = pytest.mark.skipif(native is None, reason="no native kernels in this installation")
GUARD = -12345.0
DTYPES = (torch.float64, torch.float32)
ACTIVATIONS = ("smooth_relu", "relu", "tanh", "identity")
SCHEMES = ("euler", "midpoint")
LAYOUTS = ("plain", "rows", "shifted", "columns", "spread")


@contextmanager
def kernels_of(name: str):
    """The module of that implementation: torch, or native code with an instruction set, for a while."""
    if name == "torch":
        yield fallback
        return
    before = native.active()
    native.use(name)
    try:
        yield native
    finally:
        native.use(before)


@contextmanager
def public_on(name: str):
    """The public functions on that implementation, for a while."""
    before = kernels.implementation
    with kernels_of(name) as kernels.implementation:
        try:
            yield kernels
        finally:
            kernels.implementation = before


class NoFallback:
    """Stands in for `fallback` where native code has to do it all."""

    def __getattr__(self, name):
        raise AssertionError(f"{name} went to torch")


class Recorder:
    """Stands in for `fallback`, and notes what it is asked for."""

    def __init__(self, asked: list[str]):
        self._asked = asked

    def __getattr__(self, name):
        self._asked.append(name)
        return getattr(fallback, name)


def normal(*shape: int, seed: int, dtype=torch.float64) -> Tensor:
    return ref.random(*shape, seed=seed, dtype=dtype)


def weights(layer: DenseLayer, rows: int, seed: int, dtype=torch.float64) -> Tensor:
    """Rows of weights (rows, p) of spectral norm around 1."""
    return normal(rows, layer.num_parameters, seed=seed, dtype=dtype) * (0.5 / layer.inputs**0.5)


def placed(tensor: Tensor, layout: str) -> Tensor:
    """A copy in a larger array, with other numbers around it; all of that array is `tensor._base` or itself."""
    m, *rest = tensor.shape
    if layout == "plain":
        return tensor.clone()
    if layout == "rows":  # every third row
        view = tensor.new_full((3 * m + 2, *rest), GUARD)[1 : 3 * m + 1 : 3]
    elif layout == "shifted":  # one number behind where an array begins
        view = tensor.new_full((tensor.numel() + 2,), GUARD)[1:-1].view(tensor.shape)
    elif layout == "spread":  # every second number
        view = tensor.new_full((*tensor.shape, 2), GUARD)[..., 0]
    else:  # not the whole of each feature, or row of weights
        view = tensor.new_full((m, *rest[:-1], rest[-1] + 3), GUARD)[..., 1:-2]
    return view.copy_(tensor)


def around(tensor: Tensor) -> int:
    """How many numbers around a placed array are as they were, less how many there are: 0 if nothing was overrun."""
    if tensor._base is None:
        return 0
    base = tensor._base
    outside = torch.ones_like(base, dtype=torch.bool)
    outside.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())[:] = False
    return int((base[outside] == GUARD).sum() - outside.sum())


def problem(width: int, batch: int, m: int = 2, c: int = 3, dtype=torch.float64, activation: str = "tanh"):
    """A layer, weights (m c, p), states (m c, C, B), and others of the same shape."""
    layer = DenseLayer(width, width, activation)
    states = (normal(m * c, width, batch, seed=seed, dtype=dtype) for seed in (1, 2, 3))
    return layer, weights(layer, m * c, 4, dtype), *states


def equal(a, b) -> bool:
    """The same bits, where not-a-number is like any other."""
    return (
        a.shape == b.shape and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.5), b.nan_to_num(7.5))
    )


# ---- The literal reference: one layer at a time, in double precision.


def literal_step(layer, row: Tensor, u: Tensor, h: float, scheme: str, residual: bool = True) -> Tensor:
    """One layer: row (p,), u (I, B) to (O, B)."""
    middle = u
    if scheme == "midpoint":
        middle = u + h / 2 * ref.dense(row, u, layer.outputs, layer.activation)
    found = h * ref.dense(row, middle, layer.outputs, layer.activation)
    return found + u if residual else found


def literal_vjp(layer, row, u, v, h, scheme, residual=True) -> tuple[Tensor, Tensor]:
    """The transposed Jacobian of `literal_step` applied to v (O, B): (I, B) and (p,)."""
    row, u = row.clone().requires_grad_(), u.clone().requires_grad_()
    back, gradient = torch.autograd.grad(literal_step(layer, row, u, h, scheme, residual), (u, row), v)
    return back, gradient


def literal_relax(case: Case, cfactor: int, parts: int, theta, points, tau) -> tuple[Tensor, Tensor, Tensor]:
    """Ends of the intervals, the input of each step, and the input of each part of each step."""
    ends, inputs, states = torch.empty_like(points), torch.empty_like(tau), points.new_empty(len(theta), *case.state)
    h = case.sizes(len(theta)).double()
    for k, x in enumerate(points):
        for step in range(k * cfactor, (k + 1) * cfactor):
            inputs[step] = x
            for part in range(step * parts, (step + 1) * parts):
                states[part] = x
                x = literal_step(case.layer, theta[part], x, h[part], case.scheme)
            x = x + tau[step]
        ends[k] = x
    return ends, inputs, states


def literal_relax_adjoint(case: Case, cfactor, parts, theta, states, points, tau) -> tuple[Tensor, Tensor, Tensor]:
    """Adjoints before the intervals, the adjoint behind each step, and the gradients."""
    ends, inputs, gradient = torch.empty_like(points), torch.empty_like(tau), torch.empty_like(theta)
    h = case.sizes(len(theta)).double()
    for k, v in enumerate(points):
        for step in reversed(range(k * cfactor, (k + 1) * cfactor)):
            inputs[step] = v
            for part in reversed(range(step * parts, (step + 1) * parts)):
                v, gradient[part] = literal_vjp(case.layer, theta[part], states[part], v, h[part], case.scheme)
            v = v + tau[step]
        ends[k] = v
    return ends, inputs, gradient


# ---- Random cases.


@dataclass(frozen=True)
class Case:
    """A layer, a method, and sizes; `seed` is what its numbers are drawn from; `varied`: an h for each row."""

    layer: DenseLayer
    m: int
    batch: int
    dtype: torch.dtype
    scheme: str
    residual: bool
    h: float
    varied: bool
    seed: int

    @property
    def state(self) -> tuple[int, int]:
        return self.layer.inputs, self.batch

    def states(self, rows: int, seed: int, width: int | None = None) -> Tensor:
        return normal(rows, width or self.layer.inputs, self.batch, seed=self.seed + seed, dtype=self.dtype)

    def sizes(self, rows: int) -> Tensor:
        """Step sizes (rows,), about one in eight of them zero."""
        if not self.varied:
            return torch.full((rows,), self.h, dtype=self.dtype)
        drawn = normal(rows, seed=self.seed + 9, dtype=self.dtype).abs().clamp_max(2.0)
        return self.h * torch.where(drawn < 0.15, 0.0, drawn)

    def given_h(self, rows: int, layout: str) -> float | Tensor:
        """What the kernels are given for them."""
        return placed(self.sizes(rows), "rows" if layout == "columns" else layout) if self.varied else self.h

    def weights(self, rows: int) -> Tensor:
        return weights(self.layer, rows, self.seed, self.dtype)

    def close(self, found: Tensor, expected: Tensor, terms: int, *scales: Tensor) -> None:
        """Assert equality up to the rounding of sums of so many terms, relative to the largest number in sight."""
        assert found.shape == expected.shape and found.dtype == self.dtype
        scale = max([1.0, *(float(each.abs().max()) for each in (expected, *scales) if each.numel())])
        bound = 8 * torch.finfo(self.dtype).eps * (terms + 4) * scale
        error = float((found.double() - expected).abs().max()) if found.numel() else 0.0
        assert error <= bound, f"error {error:.2e} is above {bound:.2e}"


WIDTHS = st.one_of(st.sampled_from([1, 2, 4, 8, 16, 17, 64, 65]), st.integers(1, 70))
BATCHES = st.sampled_from([0, 1, 2, 7, 8, 9, 127, 128, 129, 130, 300])


@st.composite
def cases(draw, square: bool = False) -> Case:
    """Layers of all kinds; `square` those whose inputs can be added to their outputs."""
    inputs = draw(WIDTHS)
    square = square or draw(st.booleans())
    outputs = inputs if square else draw(WIDTHS)
    layer = DenseLayer(inputs, outputs, draw(st.sampled_from(ACTIVATIONS)), draw(st.sampled_from(["vector", "scalar"])))
    scheme = draw(st.sampled_from(["euler", "midpoint"])) if square else "euler"
    residual = square and draw(st.booleans())
    sizes = draw(st.integers(0, 4)), draw(BATCHES)
    return Case(
        layer,
        *sizes,
        draw(st.sampled_from(DTYPES)),
        scheme,
        residual,
        0.25,
        draw(st.booleans()),
        draw(st.integers(0, 10**6)),
    )


def near_corner(case: Case, theta: Tensor, states: Tensor) -> bool:
    """Whether rounding could decide on which side of the corner of relu a state lies, where its slope jumps."""
    if case.layer.activation != "relu" or not states.numel():
        return False
    low = torch.finfo(case.dtype).eps * 8 * (case.layer.inputs + 4)
    for row, u, h in zip(theta.double(), states.double(), case.sizes(len(theta)).double(), strict=True):
        weight, bias = (part[0] for part in case.layer.unpack(row[None]))
        z = weight @ u + bias
        if case.scheme == "midpoint":
            z = torch.cat([z, weight @ (u + h / 2 * z.relu()) + bias])
        if z.abs().min() < low:
            return True
    return False
