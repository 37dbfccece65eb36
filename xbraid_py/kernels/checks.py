"""Checks of the arguments of the kernels, before anything is read or written at an address.

Shape letters as in `xbraid_py.kernels`. All raise `ValueError` with the argument, what it is and what would fit.
"""

from __future__ import annotations

import torch
from torch import Tensor


class OutdatedKernels(ImportError):
    """The native kernels were built from other sources than the Python files beside them."""


_OPTIONAL = {"add", "out", "gradient", "tau", "inputs", "ends", "slope"}


def step(layer, theta, u, h, scheme, residual, add, out) -> None:
    """Arguments of `kernels.step`."""
    m, batch, p = _sizes(layer, "u", u, scheme, residual)
    after = (m, layer.outputs, batch)
    arrays = (("theta", theta, (m, p)), ("u", u, (m, layer.inputs, batch)))
    _arrays(theta.dtype, *arrays, ("add", add, after), ("out", out, after))
    if type(h) is not float:
        _sizes_of_steps(h, theta)


def adjoint(layer, theta, u, v, h, scheme, residual, add, out, gradient, back) -> None:
    """Arguments of `kernels.adjoint`."""
    m, batch, p = _sizes(layer, "u", u, scheme, residual)
    weights, before = (m, p), (m, layer.inputs, batch)
    arrays = (("theta", theta, weights), ("u", u, before), ("v", v, (m, layer.outputs, batch)))
    _arrays(theta.dtype, *arrays, ("add", add, before), ("out", out, before), ("gradient", gradient, weights))
    if type(h) is not float:
        _sizes_of_steps(h, theta)


def relax(layer, theta, points, cfactor, h, scheme, parts, tau, inputs, ends, *more) -> None:
    """Arguments of `kernels.relax`, and with two more, states and gradient, of `kernels.relax_adjoint`."""
    m, batch, p = _sizes(layer, "points", points, scheme, True)
    if cfactor < 1 or parts < 1:
        name, value = ("cfactor", cfactor) if cfactor < 1 else ("parts", parts)
        raise ValueError(f"{name}={value} must be at least 1; use 1")
    steps, layers = m * cfactor, m * cfactor * parts
    weights, point, each = (layers, p), (m, layer.inputs, batch), (steps, layer.inputs, batch)
    arrays = (("theta", theta, weights), ("points", points, point), ("ends", ends, point))
    if more:
        states, gradient = more
        arrays += (("states", states, (layers, layer.inputs, batch)), ("gradient", gradient, weights))
    _arrays(theta.dtype, *arrays, ("tau", tau, each), ("inputs", inputs, each))
    if type(h) is not float:
        _sizes_of_steps(h, theta)


def distances(a, b) -> None:
    """Arguments of `kernels.distances`."""
    if b.shape != a.shape or b.dtype is not a.dtype:
        use = f"b of shape {tuple(a.shape)} and type {a.dtype}"
        raise ValueError(f"b.shape={tuple(b.shape)} and b.dtype={b.dtype} are not those of a; use {use}")


def move(a, b, c, difference) -> None:
    """Arguments of `kernels.move`."""
    for name, tensor in (("b", b), ("c", c), ("difference", difference)):
        if tensor is not None and (tensor.shape != a.shape or tensor.dtype is not a.dtype):
            said = f"{name}.shape={tuple(tensor.shape)} and {name}.dtype={tensor.dtype}"
            raise ValueError(f"{said} are not those of a; use {name} of shape {tuple(a.shape)} and type {a.dtype}")


def cross_entropy(layer, theta, u, labels, slope) -> None:
    """Arguments of `kernels.cross_entropy`, but for the values of the labels."""
    m, batch, p = _sizes(layer, "u", u, "euler", False)
    if m != 1 or layer.activation != "identity":
        name = f"u.shape={tuple(u.shape)}" if m != 1 else f"layer.activation={layer.activation!r}"
        raise ValueError(f"{name} is not of one linear layer; use u of shape (1, {layer.inputs}, {batch}), identity")
    arrays = (("theta", theta, (1, p)), ("u", u, (1, layer.inputs, batch)), ("slope", slope, (layer.outputs, batch)))
    _arrays(theta.dtype, *arrays)
    if labels.shape != (batch,) or labels.dtype is not torch.int64:
        said = f"labels.shape={tuple(labels.shape)} and labels.dtype={labels.dtype}"
        raise ValueError(f"{said} are not a class for each sample; use ({batch},) and torch.int64")


def classes(layer, labels: Tensor) -> None:
    """Labels are classes of a layer."""
    wrong = (labels < 0) | (labels >= layer.outputs)
    if wrong.any():
        place = int(wrong.nonzero()[0])
        raise ValueError(f"labels[{place}]={int(labels[place])} is not a class; use 0 to {layer.outputs - 1}")


def products(a, b, bounds) -> None:
    """Arguments of `kernels.products`."""
    if not a or not b or not bounds:
        name = "a" if not a else "b" if not b else "bounds"
        raise ValueError(f"{name} is empty; use at least one")
    _flat("a", a, a[0])
    _flat("b", b, a[0])
    last, length = 0, a[0].shape[0]
    for i, bound in enumerate(bounds):
        if not last <= bound <= length:
            raise ValueError(f"bounds[{i}]={bound} is not between {last} and the length; use {last} to {length}")
        last = bound


def combine(coefficients, vectors, out) -> None:
    """Arguments of `kernels.combine`."""
    if not vectors or len(coefficients) != len(vectors):
        use = f"{max(1, len(vectors))} of both"
        raise ValueError(f"there are {len(coefficients)} coefficients and {len(vectors)} vectors; use {use}")
    _flat("vectors", vectors, vectors[0])
    if out is not None:
        _flat("out", (out,), vectors[0])


def _flat(name: str, vectors, first: Tensor) -> None:
    """All are flat, and as long and of the same type as the first one."""
    shape, dtype = first.shape, first.dtype
    for i, x in enumerate(vectors):
        if len(shape) != 1 or x.shape != shape or x.dtype is not dtype:
            said = f"{name}[{i}].shape={tuple(x.shape)} and {name}[{i}].dtype={x.dtype}"
            raise ValueError(f"{said} are not those of one kind of flat vectors; use ({first.numel()},) and {dtype}")


def _sizes(layer, name: str, states: Tensor, scheme: str, residual: bool) -> tuple[int, int, int]:
    """Numbers of layers, of samples, and of parameters of a layer."""
    shape, inputs, outputs = states.shape, layer.inputs, layer.outputs
    if len(shape) != 3:
        raise ValueError(f"{name}.shape={tuple(shape)} is not (layers, features, samples); use (1, {inputs}, 1)")
    if scheme != "euler" and scheme != "midpoint":
        raise ValueError(f"scheme={scheme!r} must be euler or midpoint; use euler")
    if inputs != outputs and (residual or scheme == "midpoint"):
        raise ValueError(
            f"layer.outputs={outputs} is not layer.inputs={inputs}, but its inputs are added to its outputs; "
            f"use outputs={inputs}, or scheme='euler' with residual=False"
        )
    return shape[0], shape[2], outputs * inputs + (1 if layer.bias == "scalar" else outputs)


def _sizes_of_steps(h, theta: Tensor) -> None:
    """Another number than a float, or one for each row of weights."""
    if isinstance(h, Tensor):
        _arrays(theta.dtype, ("h", h, (len(theta),)))


def _arrays(dtype, *arrays: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Each array, by name, has the type and the shape it is to have; some may be None."""
    for name, tensor, shape in arrays:
        if tensor is None:
            if name not in _OPTIONAL:
                raise ValueError(f"{name}=None must be a tensor; use one of shape {tuple(shape)}")
        elif tensor.shape != shape:
            raise ValueError(f"{name}.shape={tuple(tensor.shape)} does not fit the other arrays; use {tuple(shape)}")
        elif tensor.dtype is not dtype:
            raise ValueError(f"{name}.dtype={tensor.dtype} is not that of theta; use {dtype}")
