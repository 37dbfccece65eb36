"""Options of a dense residual network; torch is not loaded for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xbraid_py.layers.splines import Splines
from xbraid_py.mgrit.grid import LayerGrid

ACTIVATIONS = ("smooth_relu", "relu", "tanh", "identity")  # those of `kernels.activation`


@dataclass(frozen=True, kw_only=True)
class DenseResNetOptions:
    """A dense residual network, but for its depth.

    Parameters
    ----------
    width
        Channels C of the residual layers.
    T
        Final time; a layer is a step of size T / num_layers.
    activation
        Of opening and residual layers: smooth_relu, relu or tanh.
    bias
        One bias for each channel (vector), or one number for a layer (scalar).
    splines
        The weights of the residual layers are such functions of the depth: splines.num functions of splines.degree 0 to
        3, splines.knots uniform, centered or a list from 0 to 1. Each layer has weights of its own if not given.
    """

    width: int = 8
    T: float = 5.0
    activation: str = "smooth_relu"
    bias: str = "vector"
    splines: Splines | None = None

    def __post_init__(self):
        if self.width < 1:
            raise ValueError(f"width={self.width} must be at least 1; use 8")
        LayerGrid(1, self.T)
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation={self.activation!r} must be one of {', '.join(ACTIVATIONS)}; use smooth_relu")
        if self.bias not in ("vector", "scalar"):
            raise ValueError(f"bias={self.bias!r} must be vector or scalar; use vector")


@dataclass(frozen=True)
class InitialScales:
    """Size of the initial weights.

    Parameters
    ----------
    opening, layers, classification
        Of the three stacks; 0 starts a stack at zero.
    distribution
        Normal: matrices with this standard deviation, biases zero. Uniform and positive: matrices and biases uniform
        between minus and plus this, or between 0 and this.
    """

    opening: float = 1.0
    layers: float = 1e-1
    classification: float = 5e-2
    distribution: Literal["normal", "uniform", "positive"] = "normal"

    def __post_init__(self):
        if self.distribution not in ("normal", "uniform", "positive"):
            raise ValueError(f"distribution={self.distribution!r} must be normal, uniform or positive; use normal")
        for name in ("opening", "layers", "classification"):
            value = getattr(self, name)
            if not 0.0 <= value < float("inf"):
                raise ValueError(f"{name}={value} must be at least 0 and finite; use {getattr(InitialScales, name)}")
