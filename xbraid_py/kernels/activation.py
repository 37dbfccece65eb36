"""Activation functions with their derivatives, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_ETA = 0.1  # half the width of the smoothed corner


@dataclass(frozen=True)
class Activation:
    """A function applied to every entry, and its derivative.

    Attributes
    ----------
    name : str
        The word an option uses for it.
    value, slope : callable
        Tensor to tensor of the same shape; NaN stays NaN.
    """

    name: str
    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _smooth_relu_slope(z: Tensor) -> Tensor:
    return z.mul(0.5 / _ETA).add_(0.5).clamp_(0.0, 1.0)


def _smooth_relu(z: Tensor) -> Tensor:
    # x^2/(4 eta) + x/2 + eta/4 = eta p^2 with p the slope; p is 0 or 1 outside of the corner, so that
    # eta p^2 + relu(x - eta) is the function on all three pieces without a branch. Not relu_, whose slope autograd
    # takes from the result, which is added to in place.
    p = _smooth_relu_slope(z)
    return torch.sub(z, _ETA).clamp_min_(0.0).addcmul_(p, p, value=_ETA)


def _relu_slope(z: Tensor) -> Tensor:
    # The product keeps NaN; a plain comparison would turn it into 0.
    return torch.where(torch.isnan(z), z, (z > 0).to(z.dtype))


def _tanh_slope(z: Tensor) -> Tensor:
    t = torch.tanh(z)
    return torch.addcmul(torch.ones_like(t), t, t, value=-1.0)


ACTIVATIONS = {
    function.name: function
    for function in (
        Activation("smooth_relu", _smooth_relu, _smooth_relu_slope),
        Activation("relu", torch.relu, _relu_slope),
        Activation("tanh", torch.tanh, _tanh_slope),
        Activation("identity", lambda z: z, torch.ones_like),
    )
}


def activation(name: str) -> Activation:
    """The activation of that name; `ValueError` names those there are."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation={name!r} must be one of {', '.join(ACTIVATIONS)}; use smooth_relu")
    return ACTIVATIONS[name]
