"""The native kernels behind the signatures of `fallback`: they take addresses and strides; torch does the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from xbraid_py.kernels import _native, fallback
from xbraid_py.kernels.activation import ACTIVATIONS

_NUMBERS = {name: number for number, name in enumerate(("smooth_relu", "relu", "tanh", "identity"))}
assert _NUMBERS.keys() == ACTIVATIONS.keys(), "dense.hpp has the activations of activation.py"

_NAMES = ("step", "adjoint", "relax", "relax_adjoint", "distances")
_FUNCTIONS = {
    dtype: {name: getattr(_native, f"{name}_{suffix}") for name in _NAMES}
    for dtype, suffix in ((torch.float64, "float64"), (torch.float32, "float32"))
}
_layers: dict[tuple, _native.Layer] = {}


def instruction_sets() -> list[str]:
    """Those that this build has and this processor can run, the fastest first."""
    return _native.instruction_sets()


def use(name: str) -> None:
    """Choose one of `instruction_sets()`."""
    if not _native.use(name):
        raise ValueError(f"kernels {name!r} are not to be had here; use one of {', '.join(instruction_sets())}")


def active() -> str:
    """The instruction set in use."""
    return _native.active()


def step(layer, theta, u, *, h=1.0, scheme="euler", residual=True, add=None, out=None) -> Tensor:
    """See `xbraid_py.kernels.step`."""
    function = _function("step", layer, theta, u, add, out)
    if function is None:
        return fallback.step(layer, theta, u, h=h, scheme=scheme, residual=residual, add=add, out=out)
    m, _, batch = u.shape
    out = u.new_empty((m, layer.outputs, batch)) if out is None else out
    shape = _layer(layer, scheme, residual)
    function(shape, m, batch, h, *_place(theta), *_place(u), *_place(add), *_place(out))
    return out


def adjoint(
    layer, theta, u, v, *, h=1.0, scheme="euler", residual=True, add=None, out=None, gradient=None, back=True
) -> Tensor | None:
    """See `xbraid_py.kernels.adjoint`."""
    function = _function("adjoint", layer, theta, u, v, add, out, rows=(gradient,))
    if function is None:
        options = {"h": h, "scheme": scheme, "residual": residual, "add": add}
        return fallback.adjoint(layer, theta, u, v, **options, out=out, gradient=gradient, back=back)
    m, _, batch = u.shape
    if back and out is None:
        out = torch.empty_like(u)
    out = out if back else None
    shape = _layer(layer, scheme, residual)
    places = (theta, u, v, add, out, gradient)
    function(shape, m, batch, h, *(number for tensor in places for number in _place(tensor)))
    return out


def relax(layer, theta, points, cfactor, *, h, scheme="euler", parts=1, tau=None, inputs=None, ends=None) -> Tensor:
    """See `xbraid_py.kernels.relax`."""
    function = _function("relax", layer, theta, points, tau, inputs, ends)
    if function is None:
        options = {"h": h, "scheme": scheme, "parts": parts, "tau": tau, "inputs": inputs, "ends": ends}
        return fallback.relax(layer, theta, points, cfactor, **options)
    m, _, batch = points.shape
    ends = torch.empty(points.shape, dtype=points.dtype) if ends is None else ends
    places = (theta, points, tau, inputs, ends)
    shape = _layer(layer, scheme, True)
    function(shape, m, cfactor, parts, batch, h, *(number for tensor in places for number in _place(tensor)))
    return ends


def relax_adjoint(
    layer,
    theta,
    states,
    points,
    cfactor,
    *,
    h,
    scheme="euler",
    parts=1,
    tau=None,
    inputs=None,
    ends=None,
    gradient=None,
) -> Tensor:
    """See `xbraid_py.kernels.relax_adjoint`."""
    function = _function("relax_adjoint", layer, theta, states, points, tau, inputs, ends, rows=(gradient,))
    if function is None:
        options = {"h": h, "scheme": scheme, "parts": parts, "tau": tau, "inputs": inputs}
        options |= {"ends": ends, "gradient": gradient}
        return fallback.relax_adjoint(layer, theta, states, points, cfactor, **options)
    m, _, batch = points.shape
    ends = torch.empty(points.shape, dtype=points.dtype) if ends is None else ends
    places = (theta, states, points, tau, inputs, ends, gradient)
    shape = _layer(layer, scheme, True)
    function(shape, m, cfactor, parts, batch, h, *(number for tensor in places for number in _place(tensor)))
    return ends


def distances(a: Tensor, b: Tensor) -> Tensor:
    """See `xbraid_py.kernels.distances`."""
    functions = _FUNCTIONS.get(a.dtype)
    if functions is None or not all(_fits(each, a) and each[0].is_contiguous() for each in (a, b) if len(each)):
        return fallback.distances(a, b)
    sums = a.new_empty((len(a), 2))
    functions["distances"](len(a), a[:1].numel(), *_place(a), *_place(b), sums.data_ptr())
    return sums


def _function(name: str, layer, theta: Tensor, *states: Tensor | None, rows: tuple[Tensor | None, ...] = ()):
    """The native function for these arguments; None if one of them is not for it."""
    functions = _FUNCTIONS.get(theta.dtype)
    if functions is None or max(layer.inputs, layer.outputs) > _native.MAX_WIDTH:
        return None
    for tensor in (theta, *rows):
        if tensor is not None and (tensor.stride(1) != 1 or not _fits(tensor, theta)):
            return None
    for tensor in states:
        # The samples of a feature one after the other, the features one after the other.
        if tensor is not None and (tensor.stride()[1:] != (tensor.shape[2], 1) or not _fits(tensor, theta)):
            return None
    return functions[name]


def _fits(tensor: Tensor, theta: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == theta.dtype and not tensor.requires_grad


def _layer(layer, scheme: str, residual: bool) -> _native.Layer:
    key = (layer, scheme, residual)
    if key not in _layers:
        number = _NUMBERS[layer.activation]
        _layers[key] = _native.Layer(
            layer.inputs, layer.outputs, number, layer.bias == "scalar", residual, scheme == "midpoint"
        )
    return _layers[key]


def _place(tensor: Tensor | None) -> tuple[int, int]:
    """Address, and distance of the rows in numbers."""
    return (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
