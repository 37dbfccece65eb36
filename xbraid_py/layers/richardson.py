"""Richardson's estimate of the discretization error: in depth, of each layer and of the whole network.

Shape letters: `n` rows (layers) owned here, `S` shape of a state, `p` parameters of a layer.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from xbraid_py import kernels

ORDERS = {"euler": 1, "midpoint": 2}


@runtime_checkable
class Halvable(Protocol):
    """Steps that can be cut in two, as `ResidualSteps` and `ModuleSteps`."""

    scheme: str
    """One of `ORDERS`."""

    def relax(self, points, cfactor, tau, inputs, record=False) -> Tensor: ...

    def halved(self, halves: Tensor | None = None) -> Halvable:
        """Each row cut in two, half as long, with the weights of the whole or those given, (2 n parts, p).

        Raises `ValueError` if these have another shape.
        """


def local_errors(steps: Halvable, states: Tensor, halves: Tensor | None = None) -> Tensor:
    """What each step adds to the discretization error: from it, and two steps half as long.

    With d the difference of the two, and p the order of the scheme, the single step is wrong by d / (1 - 2^-p) up to
    terms of higher order. That is O(h^(p+1)) for weights that are smooth in depth.

    Parameters
    ----------
    steps : Halvable
        The layers owned here.
    states : (n, *S) tensor
        Inputs of the steps.
    halves : (2 n parts, p) tensor, optional
        Weights of the halves of the steps, such as `multilevel.transfer.prolong_rows` gives: then the change of the
        weights in depth counts as well. Without them the weights are taken to be constant over each step.

    Returns
    -------
    (n, *S) tensor
        Exact step less the step that is made.

    Raises
    ------
    ValueError
        If `halves` has another shape.
    """
    whole = steps.relax(states, 1, None, None)
    both = steps.halved(halves).relax(states, 2, None, None)
    return both.sub_(whole).div_(1.0 - 0.5 ** ORDERS[steps.scheme])


def error_norms(errors: Tensor) -> Tensor:
    """Root mean squares (n,) of errors (n, *S): one number for each layer, whatever the number of samples."""
    count = max(1, errors[:1].numel())
    return kernels.distances(errors, errors)[:, 1].div(count).sqrt()


def output_error(coarse: Tensor, fine: Tensor, order: int) -> Tensor:
    """Discretization error of a solution, from it and one with steps twice as long.

    Parameters
    ----------
    coarse, fine : (*S) tensor
        The same output by steps of size 2h and h, of weights that are the same functions of depth.
    order : int
        p, at least 1: 1 for forward Euler, 2 for the midpoint rule.

    Returns
    -------
    (*S) tensor
        Exact solution less the fine one, up to terms of higher order than h^p: (u_h - u_2h) / (2^p - 1). Added to the
        fine solution it makes one of order p + 1.

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
