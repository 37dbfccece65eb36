"""The networks of paper 000: a linear opening without bias, and its initial weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from xbraid_py.layers.dense import LinearMap
from xbraid_py.problem.network import DenseResNet, InitialScales
from xbraid_py.problem.problem import Problem


@dataclass(frozen=True, kw_only=True)
class PerceptronProblem(Problem):
    """A problem whose opening is y_0 = Q x with a Q that is learnt (paper 000, section 2.1.1); see `Problem`."""

    def network(self, num_layers: int) -> DenseResNet:
        """The network with so many residual layers."""
        return replace(super().network(num_layers), opening=LinearMap(self.features.shape[0], self.architecture.width))


def perceptron_weights(network: DenseResNet, seed: int, scale: float = 1.0) -> Tensor:
    """Random initial weights: of residual layers normal, of opening and classification Glorot-uniform; biases 0.

    Parameters
    ----------
    network : DenseResNet
    seed : int
    scale : float
        Standard deviation of the weights of the residual layers.

    Returns
    -------
    Tensor
        Flat vector; a weight does not depend on the number of ranks.
    """
    flat = network.initial(InitialScales(opening=0.0, layers=scale, classification=0.0), seed)
    named = network.layout.named(flat)
    for number, name in enumerate(("opening.weight", "classification.weight")):
        weight = named[name]  # (1, O, I) where it is owned, else (0, O, I)
        bound = sqrt(6.0 / (weight.shape[1] + weight.shape[2]))
        rng = np.random.default_rng([seed, 3, number])
        drawn = torch.from_numpy(rng.uniform(-bound, bound, tuple(weight.shape[1:])))
        weight.copy_(drawn.to(weight.dtype).expand_as(weight))
    return flat
