"""The native kernels, called as those of `fallback` are: they take addresses and strides; torch does the rest.

Shapes and types are checked by then. Little happens here: on coarse grids this file can take longer than the kernels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from xbraid_py.kernels import _native, checks, fallback  # pyright: ignore[reportAttributeAccessIssue]  # compiled
from xbraid_py.kernels.activation import ACTIVATIONS

_NUMBERS = {name: number for number, name in enumerate(("smooth_relu", "relu", "tanh", "identity"))}
assert _NUMBERS.keys() == ACTIVATIONS.keys(), "dense.hpp has the activations of activation.py"

INTERFACE = 4  # of the functions in module.cpp; those of an older build would take an address for another
if getattr(_native, "INTERFACE", 1) != INTERFACE:
    raise checks.OutdatedKernels(
        f"{_native.__file__} was built from other sources than those beside it (interface "
        f"{getattr(_native, 'INTERFACE', 1)}, not {INTERFACE}); install xbraid_py again, or use XBRAID_KERNELS=torch"
    )

_STEP, _ADJOINT, _RELAX, _RELAX_ADJOINT, _DISTANCES, _MOVE, _CROSS_ENTROPY, _PRODUCTS, _COMBINE = (
    {torch.float64: getattr(_native, f"{name}_float64"), torch.float32: getattr(_native, f"{name}_float32")}
    for name in (
        "step",
        "adjoint",
        "relax",
        "relax_adjoint",
        "distances",
        "move",
        "cross_entropy",
        "products",
        "combine",
    )
)
_layers: dict[tuple, _native.Layer] = {}
_widest = _native.max_width()


def instruction_sets() -> list[str]:
    """Those that this build has and this processor can run, the fastest first."""
    return _native.instruction_sets()


def use(name: str) -> None:
    """Choose one of `instruction_sets()`."""
    global _widest
    if not _native.use(name):
        raise ValueError(f"kernels {name!r} are not to be had here; use one of {', '.join(instruction_sets())}")
    _widest = _native.max_width()


def active() -> str:
    """The instruction set in use."""
    return _native.active()


def max_width() -> int:
    """The width of the layers up to which it is faster than torch."""
    return _widest


# A native function, its arguments, and what the kernel returns.
Call = tuple[Callable[..., Any], tuple, Any]


def _kernel(call: Callable[..., Call | None]) -> Callable[..., Any]:
    """The kernel that makes a call, or that of `fallback` where there is none to make."""

    def kernel(*given):
        made = call(*given)
        if made is None:
            return getattr(fallback, call.__name__)(*given)
        function, arguments, found = made
        function(*arguments)
        return found

    vars(kernel)["call"] = call
    return kernel


def prepared(name: str, given: tuple) -> Callable[[], Any] | None:
    """The call of a kernel, made once; None where it has to be that of `fallback`."""
    if name == "cross_entropy":
        return _loss(*given)
    made = globals()[name].call(*given)
    return None if made is None else partial(made[0], *made[1])


@_kernel
def step(*given) -> Call | None:
    """See `xbraid_py.kernels.step`."""
    layer, theta, u, h, scheme, residual, add, out = given
    m, _, batch = u.shape
    found = u.new_empty((m, layer.outputs, batch)) if out is None else out
    numbers = _numbers(layer, batch, h, (theta,), (u, add, found))
    return (
        None if numbers is None else (_STEP[theta.dtype], (_layer(layer, scheme, residual), m, batch, *numbers), found)
    )


@_kernel
def adjoint(*given) -> Call | None:
    """See `xbraid_py.kernels.adjoint`."""
    layer, theta, u, v, h, scheme, residual, add, out, gradient, back = given
    m, _, batch = u.shape
    found = None
    if back:
        found = u.new_empty((m, layer.inputs, batch)) if out is None else out
    numbers = _numbers(layer, batch, h, (theta, gradient), (u, v, add, found))
    return (
        None
        if numbers is None
        else (_ADJOINT[theta.dtype], (_layer(layer, scheme, residual), m, batch, *numbers), found)
    )


@_kernel
def relax(*given) -> Call | None:
    """See `xbraid_py.kernels.relax`."""
    layer, theta, points, cfactor, h, scheme, parts, tau, inputs, ends = given
    m, _, batch = points.shape
    found = points.new_empty((m, layer.inputs, batch)) if ends is None else ends
    numbers = _numbers(layer, batch, h, (theta,), (points, tau, inputs, found))
    sizes = m, cfactor, parts, batch
    return None if numbers is None else (_RELAX[theta.dtype], (_layer(layer, scheme, True), *sizes, *numbers), found)


@_kernel
def relax_adjoint(*given) -> Call | None:
    """See `xbraid_py.kernels.relax_adjoint`."""
    layer, theta, points, cfactor, h, scheme, parts, tau, inputs, ends, states, gradient = given
    m, _, batch = points.shape
    found = points.new_empty((m, layer.inputs, batch)) if ends is None else ends
    numbers = _numbers(layer, batch, h, (theta, gradient), (states, points, tau, inputs, found))
    sizes = m, cfactor, parts, batch
    return (
        None
        if numbers is None
        else (_RELAX_ADJOINT[theta.dtype], (_layer(layer, scheme, True), *sizes, *numbers), found)
    )


def distances(a: Tensor, b: Tensor) -> Tensor:
    """See `xbraid_py.kernels.distances`."""
    return _of_rows(_DISTANCES, a, b) if _together(a, b) else fallback.distances(a, b)


def move(a, b, c, difference) -> Tensor:
    """See `xbraid_py.kernels.move`."""
    if not _together(a, b, c, difference):
        return fallback.move(a, b, c, difference)
    return _of_rows(_MOVE, a, b, c, difference)


def _together(*tensors: Tensor | None) -> bool:
    """Whether rows, at any distance, have their numbers one after the other, and are for native code."""
    for tensor in tensors:
        if tensor is None:
            continue
        together = len(tensor) > 0 and (tensor.is_contiguous() or tensor[0].is_contiguous())
        if not together or not _plain(tensor) or tensor.dtype not in _DISTANCES:
            return False
    return True


def _of_rows(functions: dict, *tensors: Tensor | None) -> Tensor:
    """Two sums (m, 2) of each row of tensors."""
    first, numbers = tensors[0], []
    for tensor in tensors:
        numbers += (0, 0) if tensor is None else (tensor.data_ptr(), tensor.stride(0))
    assert first is not None
    m = first.shape[0]
    assert first is not None
    sums = first.new_empty((m, 2))
    assert first is not None
    functions[first.dtype](m, first.numel() // m, *numbers, sums.data_ptr())
    return sums


def cross_entropy(*given) -> tuple[float, int]:
    """See `xbraid_py.kernels.cross_entropy`."""
    call = _loss(*given)
    return fallback.cross_entropy(*given) if call is None else call()


def _loss(layer, theta, u, labels, slope) -> Callable[[], tuple[float, int]] | None:
    """The call of `cross_entropy`; None where it has to be that of `fallback`."""
    numbers = _numbers(layer, len(labels), 0.0, (theta,), (u,))
    stride, unit = (0, 1) if slope is None else slope.stride()
    if numbers is None or unit != 1 or labels.stride(0) != 1 or not labels.is_cpu:
        return None
    places = numbers[3], numbers[5], labels.data_ptr(), 0 if slope is None else slope.data_ptr()
    function, native = _CROSS_ENTROPY[theta.dtype], _layer(layer, "euler", False)
    batch = len(labels)

    def call() -> tuple[float, int]:
        loss, right = function(native, batch, *places, stride)
        if right < 0:
            checks.classes(layer, labels)
        return loss, right

    return call


def products(a, b, bounds) -> Tensor:
    """See `xbraid_py.kernels.products`."""
    left, right = _addresses(a), _addresses(b)
    if left is None or right is None:
        return fallback.products(a, b, bounds)
    found = a[0].new_empty((len(left), len(right), len(bounds) - 1))
    _PRODUCTS[found.dtype](left, right, bounds, found.data_ptr())
    return found


def combine(coefficients, vectors, out) -> Tensor:
    """See `xbraid_py.kernels.combine`."""
    found = torch.empty_like(vectors[0]) if out is None else out
    places = _addresses((*vectors, found))
    if places is None:
        return fallback.combine(coefficients, vectors, out)
    _COMBINE[found.dtype](len(found), coefficients, places[:-1], places[-1])
    return found


def _addresses(vectors) -> list[int] | None:
    """Where flat vectors begin; None if one of them is not for native code."""
    for x in vectors:
        if x.stride(0) != 1 or not _plain(x) or x.dtype not in _PRODUCTS:
            return None
    return [x.data_ptr() for x in vectors]


def _numbers(
    layer, batch: int, h: float | Tensor, rows: tuple[Tensor | None, ...], states: tuple[Tensor | None, ...]
) -> list[float] | None:
    """The step size, and addresses and distances of all arrays; None if one of them is not for native code."""
    assert rows[0] is not None
    if rows[0].dtype not in _STEP or layer.inputs > _widest or layer.outputs > _widest:
        return None
    if type(h) is float or not isinstance(h, Tensor):
        numbers = [h, 0, 0]
    elif _plain(h):
        numbers = [0.0, h.data_ptr(), h.stride(0)]
    else:
        return None
    for tensor in rows:
        if tensor is None:
            numbers += (0, 0)
            continue
        row, number = tensor.stride()
        if number != 1 or not tensor.is_cpu or (tensor.requires_grad and torch.is_grad_enabled()):
            return None
        numbers += (tensor.data_ptr(), row)
    for tensor in states:
        if tensor is None:
            numbers += (0, 0)
            continue
        # The samples of a feature one after the other, the features, if there are several, one after the other.
        row, feature, sample = tensor.stride()
        if sample != 1 or (feature != batch and tensor.shape[1] > 1) or not tensor.is_cpu:
            return None
        if tensor.requires_grad and torch.is_grad_enabled():
            return None
        numbers += (tensor.data_ptr(), row)
    return numbers


def _plain(tensor: Tensor) -> bool:
    return tensor.is_cpu and not (tensor.requires_grad and torch.is_grad_enabled())


def _layer(layer, scheme: str, residual: bool) -> _native.Layer:
    # By its attributes: to hash a dataclass takes longer than a small kernel.
    key = (layer.inputs, layer.outputs, layer.activation, layer.bias, scheme, residual)
    found = _layers.get(key)
    if found is None:
        number = _NUMBERS[layer.activation]
        found = _layers[key] = _native.Layer(
            layer.inputs, layer.outputs, number, layer.bias == "scalar", residual, scheme == "midpoint"
        )
    return found
