"""What steps of all kinds share: weights and sizes of coarse and of halved ones, the way through them, their errors.

Shape letters: `n` rows (layers) owned here, `m` of them stepped at once, `S` shape of a state,
`p` parameters of a layer. Row i of a propagator is its layer i.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from xbraid_py import kernels


def rows_of(h: float | Tensor, rows: slice) -> float | Tensor:
    """Sizes of some steps: the one that all of them have, or theirs."""
    return h[rows] if isinstance(h, Tensor) else h


def sweep(x: Tensor, steps: range, parts: int, advance, place, tau: Tensor | None, inputs: Tensor | None) -> Tensor:
    """States x (m, *S) through the parts of some steps, forwards or (a falling range) backwards.

    `advance(x, part)` makes a part of a step, tau is added behind each step, and what goes into it is written to
    `inputs`, both (m c, *S) and indexed by `place(step)`.
    """
    for step in steps:
        if inputs is not None:
            inputs[place(step)] = x.detach()
        for part in range(step * parts, (step + 1) * parts)[:: steps.step]:
            x = advance(x, part)
        if tau is not None:
            x = x + tau[place(step)]
    return x


def sums(rows: Tensor, length: int) -> Tensor:
    """Sums (n / length, ...) of every `length` of rows (n, ...).

    One slice after the other: the order of summation must not depend on the number of rows.
    """
    found = rows[::length].clone()
    for j in range(1, length):
        found += rows[j::length]
    return found


def coarse_rows(theta: Tensor, h: float | Tensor, length: int, weights: str) -> tuple[Tensor, float | Tensor]:
    """Weights (n / length, ...) and sizes of steps that stand for `length` rows each.

    `weights` is "inject", those of the first row, or "average", the mean over the time of the rows. Sizes `h` are one
    number, (n,), or (n, B) where those of samples differ.
    """
    if not isinstance(h, Tensor):
        return theta[::length] if weights == "inject" else sums(theta, length).div_(length), length * h
    size = sums(h, length)
    if weights == "inject":
        return theta[::length], size
    # Steps that pad a sequence have size 0, and so may all of a coarse one.
    whole = size.clamp_min(torch.finfo(size.dtype).tiny)
    # Sizes are those of all samples, or there is one for each.
    shape = (*h.shape[1:], *(1,) * (theta.dim() - h.dim()))
    shares = [(h[j::length] / whole).view(len(size), *shape) for j in range(length)]
    coarse = theta[::length] * shares[0]
    for j in range(1, length):
        coarse.addcmul_(theta[j::length], shares[j])
    return coarse, size


def halved_rows(theta: Tensor, h: float | Tensor, halves: Tensor | None = None) -> tuple[Tensor, float | Tensor]:
    """Weights (2 n, p) and sizes of steps half as long, two for each row.

    They are `halves`, or both those of the whole if nothing is given. Raises `ValueError` if these have another shape.
    """
    rows, size = theta.shape
    if halves is None:
        halves = theta.repeat_interleave(2, 0)
    elif halves.shape != (2 * rows, size):
        shape = tuple(halves.shape)
        raise ValueError(f"halves.shape={shape} must be {(2 * rows, size)}, two rows for each of the steps")
    return halves, h.repeat_interleave(2) / 2 if isinstance(h, Tensor) else h / 2


ORDERS = {"euler": 1, "midpoint": 2}


@runtime_checkable
class Halvable(Protocol):
    """Steps that can be cut in two, as `ResidualSteps` and `ModuleSteps`."""

    @property
    def scheme(self) -> str:
        """One of `ORDERS`."""
        ...

    def relax(self, points, cfactor, tau, inputs, record=False) -> Tensor: ...

    def halved(self, halves: Tensor | None = None) -> Halvable:
        """Each row cut in two, half as long, with the weights of the whole or those given, (2 n parts, p).

        Raises `ValueError` if these have another shape.
        """
        ...


def local_errors(steps: Halvable, states: Tensor, halves: Tensor | None = None) -> Tensor:
    """What each step adds to the discretization error, exact step less the step that is made: from it, and two steps
    half as long.

    With d the difference of the two, and p the order of the scheme, the single step is wrong by d / (1 - 2^-p) up to
    terms of higher order. That is O(h^(p+1)) for weights that are smooth in depth.

    Parameters
    ----------
    steps : Halvable
        The layers owned here.
    states : (n, *S) tensor
        Inputs of the steps.
    halves : (2 n parts, p) tensor, optional
        Weights of the halves of the steps, such as `prolong_rows` gives: then the change of the weights in depth counts
        as well. Without them the weights are taken to be constant over each step.

    Returns
    -------
    (n, *S) tensor

    Raises
    ------
    ValueError
        If `halves` has another shape.
    """
    whole = steps.relax(states, 1, None, None)
    both = steps.halved(halves).relax(states, 2, None, None)
    return both.sub_(whole).div_(1.0 - 0.5 ** ORDERS[steps.scheme])


def error_norms(errors: Tensor) -> Tensor:
    """Root mean squares (n,) of errors (n, *S): one number for each layer, whatever the number of samples.

    Parameters
    ----------
    errors : (n, *S) tensor
        Of n layers.

    Returns
    -------
    (n,) tensor
        A norm for each layer.
    """
    count = max(1, errors[:1].numel())
    return kernels.distances(errors, errors)[:, 1].div(count).sqrt()


def output_error(coarse: Tensor, fine: Tensor, order: int) -> Tensor:
    """Exact output (*S) less the fine one, from it and one with steps twice as long, up to terms of higher order than
    h^p.

    That is (u_h - u_2h) / (2^p - 1), p = `order` being 1 for forward Euler and 2 for the midpoint rule, for weights
    that are the same functions of depth; added to the fine solution it makes one of order p + 1.

    Parameters
    ----------
    coarse, fine : (*S) tensor
        Outputs with steps of 2 h and of h.
    order : int
        The order p of the scheme.

    Returns
    -------
    (*S) tensor
        The estimate.

    Raises
    ------
    ValueError
        If the order is below 1, or the two have different shapes.
    """
    if order < 1:
        raise ValueError(f"order={order} must be at least 1; use 1 for forward Euler, 2 for the midpoint rule")
    if coarse.shape != fine.shape:
        raise ValueError(f"coarse.shape={tuple(coarse.shape)} must be that of fine, {tuple(fine.shape)}")
    return torch.sub(fine, coarse).div_(2.0**order - 1.0)
