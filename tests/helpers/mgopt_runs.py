"""Small runs of MG/OPT in depth that several tests make: circles, a thin network, and its objective by autograd."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from xbraid_py.comm import Communicator, SerialCommunicator
from xbraid_py.data import circles
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.mgopt import MGOpt
from xbraid_py.multilevel.depth.options import MGOptOptions
from xbraid_py.problem.options import DenseResNetOptions
from xbraid_py.problem.problem import PerceptronProblem, perceptron_weights
from xbraid_py.problem.regularization import Regularization

EXACT = MGRIT(max_levels=1)


@cache
def points():
    """Sixty points of the circles."""
    return circles.generate(60, 40, seed=1)[0]


def problem(comm: Communicator | None = None, mgrit=EXACT, activation="tanh", tikhonov=2e-2, width=3, measure="sum"):
    """A thin network on the circles; smooth, so that derivatives of all orders exist, unless told otherwise."""
    train = points()
    return PerceptronProblem(
        features=train.features,
        labels=train.labels,
        num_classes=2,
        architecture=DenseResNetOptions(width=width, T=1.0, activation=activation),
        regularization=Regularization(tikhonov, 0.0, tikhonov, measure),
        forward=mgrit,
        adjoint=mgrit.for_adjoint(),
        comm=comm or SerialCommunicator(),
    )


def mgopt(comm=None, num_layers=16, mgrit=EXACT, levels=3, others=None, **options) -> MGOpt:
    """A run at its start."""
    run = MGOpt(problem(comm, mgrit, **(others or {})), num_layers, MGOptOptions(levels=levels, **options))
    run.x = perceptron_weights(run.network, seed=2)
    return run


def last(run: MGOpt, cycles: int):
    """The record after so many cycles."""
    return list(run.run(cycles))[-1]


def by_autograd(x: Tensor, num_layers: int, activation, tikhonov: float, width: int = 3) -> tuple[float, Tensor]:
    """Value and gradient of the objective of `problem` with plain torch; the weights as they lie in one rank's vector.

    beta |.|^2 with 2 beta = tikhonov times the factor by which 16 layers are coarsened.
    """
    train = points()
    x = x.clone().requires_grad_()
    size = width * width + width
    Q, theta, head = x.split([2 * width, num_layers * size, 2 * width + 2])
    y = Q.view(width, 2) @ train.features
    for row in theta.view(num_layers, size):
        W, b = row[: width * width].view(width, width), row[width * width :]
        y = y + activation(W @ y + b[:, None]) / num_layers
    logits = head[: 2 * width].view(2, width) @ y + head[2 * width :, None]
    value = (
        torch.nn.functional.cross_entropy(logits.T, train.labels) + tikhonov / 2 * 16 / num_layers * x.square().sum()
    )
    (gradient,) = torch.autograd.grad(value, x)
    return float(value.detach()), gradient


def split(x):
    """Opening, layers (N, 12) and head of one rank's vector, width 3."""
    return x[:6], x[6:-8].view(-1, 12), x[-8:]


def pairwise(x, function):
    """A vector whose layers are a function of those of x."""
    opening, theta, head = split(x)
    return torch.cat([opening, function(theta).flatten(), head])
