"""Checks of the arguments of the kernels, before anything is read or written at an address.

Shape letters as in `xbraid_py.kernels`. All raise `ValueError` with the argument, what it is and what would fit.
"""

from __future__ import annotations

from torch import Tensor

# Every call goes through here: a microsecond and a half for the largest of them.


def step(layer, theta, u, scheme, residual, add, out) -> None:
    """Arguments of `kernels.step`."""
    m, batch = _extent(layer, "u", u)
    _method(layer, scheme, residual)
    after = (m, layer.outputs, batch)
    arrays = (("theta", theta, (m, _parameters(layer))), ("u", u, (m, layer.inputs, batch)))
    _arrays(theta.dtype, *arrays, ("add", add, after), ("out", out, after))


def adjoint(layer, theta, u, v, scheme, residual, add, out, gradient) -> None:
    """Arguments of `kernels.adjoint`."""
    m, batch = _extent(layer, "u", u)
    _method(layer, scheme, residual)
    weights, before = (m, _parameters(layer)), (m, layer.inputs, batch)
    arrays = (("theta", theta, weights), ("u", u, before), ("v", v, (m, layer.outputs, batch)))
    _arrays(theta.dtype, *arrays, ("add", add, before), ("out", out, before), ("gradient", gradient, weights))


def relax(layer, theta, points, cfactor, scheme, parts, tau, inputs, ends, states=None, gradient=None) -> None:
    """Arguments of `kernels.relax` and `kernels.relax_adjoint`."""
    m, batch = _extent(layer, "points", points)
    _method(layer, scheme, True)
    if cfactor < 1 or parts < 1:
        name, value = ("cfactor", cfactor) if cfactor < 1 else ("parts", parts)
        raise ValueError(f"{name}={value} must be at least 1; use 1")
    steps, layers = m * cfactor, m * cfactor * parts
    weights, point, step = (layers, _parameters(layer)), (m, layer.inputs, batch), (steps, layer.inputs, batch)
    arrays = (("theta", theta, weights), ("points", points, point), ("ends", ends, point))
    _arrays(theta.dtype, *arrays, ("tau", tau, step), ("inputs", inputs, step))
    if states is not None:
        _arrays(theta.dtype, ("states", states, (layers, layer.inputs, batch)), ("gradient", gradient, weights))


def distances(a, b) -> None:
    """Arguments of `kernels.distances`."""
    _arrays(a.dtype, ("b", b, a.shape))


def _parameters(layer) -> int:
    """Length p of a row of weights."""
    return layer.outputs * layer.inputs + (layer.outputs if layer.bias == "vector" else 1)


def _extent(layer, name: str, states: Tensor) -> tuple[int, int]:
    """Numbers of layers and of samples."""
    shape = states.shape
    if len(shape) != 3:
        raise ValueError(f"{name}.shape={tuple(shape)} is not (layers, features, samples); use (1, {layer.inputs}, 1)")
    return shape[0], shape[2]


def _method(layer, scheme: str, residual: bool) -> None:
    if scheme != "euler" and scheme != "midpoint":
        raise ValueError(f"scheme={scheme!r} must be euler or midpoint; use euler")
    if layer.inputs != layer.outputs and (residual or scheme == "midpoint"):
        raise ValueError(
            f"layer.outputs={layer.outputs} is not layer.inputs={layer.inputs}, but its inputs are added to its "
            f"outputs; use outputs={layer.inputs}, or scheme='euler' with residual=False"
        )


def _arrays(dtype, *arrays: tuple[str, Tensor | None, tuple[int, ...]]) -> None:
    """Each array, by name, has the type and the shape it is to have, or is None."""
    for name, tensor, shape in arrays:
        if tensor is not None and (tensor.shape != shape or tensor.dtype is not dtype):
            if tensor.dtype is not dtype:
                raise ValueError(f"{name}.dtype={tensor.dtype} is not that of the other arrays; use {dtype}")
            raise ValueError(f"{name}.shape={tuple(tensor.shape)} does not fit the other arrays; use {tuple(shape)}")
