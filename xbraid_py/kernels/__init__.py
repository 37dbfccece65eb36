"""Dense residual layers and their adjoints, whole intervals at once, a loss, flat vectors: native code, or torch.

`XBRAID_KERNELS` in the environment chooses: native (the default where they are built), torch, or one of the
instruction sets of this processor (avx512, avx2, baseline). `BACKEND` says what is in use, `implementation` is its
module. The signatures stand here alone: `checks` and both implementations take all arguments in one order.

Shape letters: `m` intervals or layers, `c` steps of an interval, `I` inputs, `O` outputs, `B` samples, `p` parameters
of a layer. All functions take rows of weights theta (m, p) and states (m, I, B); a layer has `inputs`, `outputs`,
`activation` and `bias`, as `layers.dense.DenseLayer` has. All arrays have the type of theta. One that is written may
be one that is read where it says so, and must not overlap any in another way. What does not fit is refused before
anything is written.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from xbraid_py.kernels import checks, fallback

__all__ = [
    "BACKEND",
    "adjoint",
    "combine",
    "cross_entropy",
    "distances",
    "move",
    "prepared",
    "products",
    "relax",
    "relax_adjoint",
    "step",
]


def choose(wish: str):
    """The module with the kernels that a wish, as in `XBRAID_KERNELS`, asks for, and its name for people."""
    if wish == "torch":
        return fallback, "torch"
    try:
        from xbraid_py.kernels import native
    except checks.OutdatedKernels:
        raise  # slow kernels instead of the fast ones would go unnoticed
    except ImportError as error:
        if wish:
            raise ImportError(
                f"XBRAID_KERNELS={wish}: this installation has no native kernels ({error}); install it where a C++ "
                f"compiler is, or use XBRAID_KERNELS=torch"
            ) from error
        return fallback, "torch (no native kernels in this installation)"
    if wish not in ("", "native"):
        try:
            native.use(wish)
        except ValueError as error:
            choices = ", ".join(["native", "torch", *native.instruction_sets()])
            raise ImportError(f"XBRAID_KERNELS={wish} is not to be had here; use one of {choices}") from error
    return native, f"native ({native.active()})"


implementation, BACKEND = choose(os.environ.get("XBRAID_KERNELS", ""))


def step(
    layer,
    theta: Tensor,
    u: Tensor,
    *,
    h: float | Tensor = 1.0,
    scheme: str = "euler",
    residual: bool = True,
    add: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """[u +] h sigma(W u + b) [+ add] of m layers at once.

    Parameters
    ----------
    layer
        Shape of the layers.
    theta : (m, p) tensor
    u : (m, I, B) tensor
    h : float or (m,) tensor
        Step size: of all layers, or of each of them; 0 makes one the identity.
    scheme : {"euler", "midpoint"}
        One step, or u + h F(u + h/2 F(u)) with F(u) = sigma(W u + b).
    residual : bool
        Whether u is added.
    add : (m, O, B) tensor, optional
    out : (m, O, B) tensor, optional
        Where to write; may be u or add.

    Returns
    -------
    (m, O, B) tensor
        `out`, or a new tensor.

    Raises
    ------
    ValueError
        If an array has not the shape or the type that fits; it is named.
    """
    given = layer, theta, u, h, scheme, residual, add, out
    checks.step(*given)
    return implementation.step(*given)


def adjoint(
    layer,
    theta: Tensor,
    u: Tensor,
    v: Tensor,
    *,
    h: float | Tensor = 1.0,
    scheme: str = "euler",
    residual: bool = True,
    add: Tensor | None = None,
    out: Tensor | None = None,
    gradient: Tensor | None = None,
    back: bool = True,
) -> Tensor | None:
    """Transposed Jacobians of `step` at u (m, I, B), applied to v (m, O, B): [v +] h W^T (sigma'(W u + b) v) [+ add].

    Parameters
    ----------
    h : float or (m,) tensor
        As in `step`.
    gradient : (m, p) tensor, optional
        Written: the derivative of <v, step> with respect to the weights.
    back : bool
        Whether the product with respect to u is asked for.
    out : (m, I, B) tensor, optional
        Where to write it; may be u, v or add.

    Returns
    -------
    (m, I, B) tensor or None
        `out`, or a new tensor.

    Raises
    ------
    ValueError
        If an array has not the shape or the type that fits; it is named.
    """
    given = layer, theta, u, v, h, scheme, residual, add, out, gradient, back
    checks.adjoint(*given)
    return implementation.adjoint(*given)


def relax(
    layer,
    theta: Tensor,
    points: Tensor,
    cfactor: int,
    *,
    h: float | Tensor,
    scheme: str = "euler",
    parts: int = 1,
    tau: Tensor | None = None,
    inputs: Tensor | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """c residual steps from the beginning of each of m intervals: u <- step(u) + tau.

    Parameters
    ----------
    theta : (m c parts, p) tensor
    points : (m, C, B) tensor
        Where the intervals begin.
    cfactor : int
        Steps c of an interval.
    h : float or (m c parts,) tensor
        Step size: of all layers, or of each row of theta.
    parts : int
        A step is that many smaller ones, each with a row of weights of its own.
    tau : (m c, C, B) tensor, optional
        Added to each step.
    inputs : (m c, C, B) tensor, optional
        Written: the input of each step. Every c-th of them may be `points`.
    ends : (m, C, B) tensor, optional
        Where to write the result; may be `points`.

    Returns
    -------
    (m, C, B) tensor
        The ends of the intervals.

    Raises
    ------
    ValueError
        If an array has not the shape or the type that fits; it is named.
    """
    given = layer, theta, points, cfactor, h, scheme, parts, tau, inputs, ends
    checks.relax(*given)
    return implementation.relax(*given)


def relax_adjoint(
    layer,
    theta: Tensor,
    states: Tensor,
    points: Tensor,
    cfactor: int,
    *,
    h: float | Tensor,
    scheme: str = "euler",
    parts: int = 1,
    tau: Tensor | None = None,
    inputs: Tensor | None = None,
    ends: Tensor | None = None,
    gradient: Tensor | None = None,
) -> Tensor:
    """The adjoint of `relax` at the given states: v <- adjoint(v) + tau, backwards through the intervals.

    Parameters
    ----------
    states : (m c parts, C, B) tensor
        Inputs of the steps and of all their parts.
    points : (m, C, B) tensor
        Adjoints behind the last step of each interval.
    h, parts, tau, inputs, ends
        As in `relax`, backwards: `inputs` gets the adjoint behind each step.
    gradient : (m c parts, p) tensor, optional
        Written: the gradients of the weights.

    Returns
    -------
    (m, C, B) tensor
        Adjoints before the first step of each interval.

    Raises
    ------
    ValueError
        If an array has not the shape or the type that fits; it is named.
    """
    given = layer, theta, points, cfactor, h, scheme, parts, tau, inputs, ends, states, gradient
    checks.relax(*given)
    return implementation.relax_adjoint(*given)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Squared 2-norms of a - b and of a, for each of m rows.

    Parameters
    ----------
    a, b : (m, *S) tensor

    Returns
    -------
    (m, 2) tensor

    Raises
    ------
    ValueError
        If an array has not the shape or the type that fits; it is named.
    """
    checks.distances(a, b)
    return implementation.distances(a, b)


def move(a: Tensor, b: Tensor, c: Tensor | None = None, *, difference: Tensor | None = None) -> Tensor:
    """a += b, or a += b - c, in one pass: squared 2-norms of what is added and of what a becomes, for each of m rows.

    Parameters
    ----------
    a : (m, *S) tensor
        Written.
    b : (m, *S) tensor
    c : (m, *S) tensor, optional
    difference : (m, *S) tensor, optional
        Where to write b - c; may be b or c.

    Returns
    -------
    (m, 2) tensor

    Raises
    ------
    ValueError
        If an array has not the shape or the type that fits; it is named.
    """
    checks.move(a, b, c, difference)
    return implementation.move(a, b, c, difference)


def cross_entropy(layer, theta: Tensor, u: Tensor, labels: Tensor, *, slope: Tensor | None = None) -> tuple[float, int]:
    """Cross entropy of softmax(W u + b), summed over the samples, and how many of them are classified rightly.

    d loss / d u and d loss / d theta are `adjoint(layer, theta, u, slope[None], residual=False, gradient=...)`, with
    h=1/B of the mean over the samples. Nothing here is recorded for autograd.

    Parameters
    ----------
    layer
        Of classification, K classes wide: its activation is the identity.
    theta : (1, p) tensor
    u : (1, I, B) tensor
    labels : (B,) int64 tensor
        Classes 0 .. K - 1.
    slope : (K, B) tensor, optional
        Written: the derivative of the sum with respect to W u + b, which is softmax less one-hot.

    Returns
    -------
    float
        Sum of -log softmax(W u + b)[label].
    int
        Samples whose label is the first of their largest outputs, where NaN is larger than all.

    Raises
    ------
    ValueError
        If an array has not the shape or the type that fits, if a label is not a class, or if there is an activation.
    """
    checks.cross_entropy(layer, theta, u, labels, slope)
    return implementation.cross_entropy(layer, theta, u, labels, slope)


def products(a: Sequence[Tensor], b: Sequence[Tensor], bounds: Sequence[int]) -> Tensor:
    """Dot products of flat vectors with others, in parts.

    The vectors are read once, and each product is summed in the same order, however many there are.

    Parameters
    ----------
    a, b : sequences of n1 and n2 (n,) tensors
        Of one type. Some of b may be some of a.
    bounds : sequence of int
        Part i goes from bounds[i] to bounds[i + 1], and may be empty.

    Returns
    -------
    (n1, n2, len(bounds) - 1) tensor

    Raises
    ------
    ValueError
        If a vector has not the length or the type of the first of a, or a bound lies outside or before the last one.
    """
    checks.products(a, b, bounds)
    return implementation.products(a, b, bounds)


def combine(coefficients: Sequence[float], vectors: Sequence[Tensor], out: Tensor | None = None) -> Tensor:
    """The sum of coefficients[k] vectors[k], added in this order.

    Parameters
    ----------
    coefficients : sequence of float
    vectors : sequence of (n,) tensor
        At least one.
    out : (n,) tensor, optional
        Where to write; may be one of the vectors.

    Returns
    -------
    (n,) tensor
        `out`, or a new tensor.

    Raises
    ------
    ValueError
        If a vector has not the length or the type of the first, or if there is not one for each coefficient.
    """
    checks.combine(coefficients, vectors, out)
    return implementation.combine(coefficients, vectors, out)


def prepared(kernel: Callable[..., Any], *arrays: Any, **options: Any) -> Callable[[], Any]:
    """The call of `step`, `adjoint`, `relax`, `relax_adjoint` or `cross_entropy` with these arguments, made once.

    On small layers it takes as long to make a call as to do what it asks for. The arrays stay where they are, what they
    hold may change. All that is written has to be given.

    Returns
    -------
    callable
        Takes nothing; what it returns is that of `cross_entropy`, and of no meaning for the others.

    Raises
    ------
    ValueError
        As the kernel does.
    """
    bound = inspect.signature(kernel).bind(*arrays, **options)
    bound.apply_defaults()
    given, name = bound.arguments, kernel.__name__
    if name == "relax_adjoint":
        given["states"], given["gradient"] = given.pop("states"), given.pop("gradient")
    values = tuple(given.values())
    (checks.relax if name == "relax_adjoint" else getattr(checks, name))(*values)
    call = None if implementation is fallback else implementation.prepared(name, values)
    call = call or partial(getattr(fallback, name), *values)
    vars(call)["arrays"] = values  # kept with the call: native code knows their addresses only
    return call
