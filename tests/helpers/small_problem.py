"""A small classification problem with all its terms, and the literal reference of its objective."""

from __future__ import annotations

from dataclasses import asdict
from functools import cache

import pytest
import reference as ref
import torch

from xbraid_py.comm import SerialCommunicator
from xbraid_py.mgrit import MGRIT
from xbraid_py.problem.options import DenseResNetOptions, InitialScales
from xbraid_py.problem.problem import Problem
from xbraid_py.problem.regularization import Regularization

ALL_RANKS = pytest.mark.ranks(1, 2, 3, 5, 8)
N, T, FEATURES, WIDTH, CLASSES, BATCH = 16, 2.0, 2, 4, 3, 23
CONVERGED = MGRIT(cycle="V", cfactor=4, max_levels=3, min_coarse=1, max_iter=12, tol=1e-15)
TERMS = {
    "none": Regularization(tikhonov=0.0, ddt=0.0, classification=0.0),
    "tikhonov": Regularization(tikhonov=0.3, ddt=0.0, classification=0.0),
    "classification": Regularization(tikhonov=0.0, ddt=0.0, classification=0.7),
    "ddt": Regularization(tikhonov=0.0, ddt=0.02, classification=0.0),
    "all, sum": Regularization(tikhonov=0.3, ddt=0.02, classification=0.7, measure="sum"),
    "all, integral": Regularization(tikhonov=0.3, ddt=0.02, classification=0.7, measure="integral"),
}


def data(batch: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    features = ref.random(FEATURES, batch, seed=1)
    return features, torch.arange(batch) % CLASSES


def problem(comm, regularization=TERMS["all, sum"], forward=CONVERGED, adjoint=None, **options) -> Problem:
    features, labels = data(options.pop("batch", BATCH))
    shape = {key: options.pop(key) for key in ("bias", "activation", "splines") if key in options}
    return Problem(
        features=features,
        labels=labels,
        num_classes=CLASSES,
        architecture=DenseResNetOptions(width=WIDTH, T=T, **{"activation": "tanh", **shape}),
        regularization=regularization,
        forward=forward,
        adjoint=adjoint or forward,
        comm=comm,
        **options,
    )


def weights(net, shift: float = 0.0) -> torch.Tensor:
    """Random weights, biases too, moved along a second random direction; all classes are predicted with them."""
    x = net.initial(InitialScales(1.5, 0.5, 1.5), 8) + shift * net.initial(InitialScales(1.0, 1.0, 1.0), 4)
    for stack in net.layout.stacks:
        scale = 0.3 if stack.name == "classification" else 0.6
        for i, row in enumerate(net.layout.named(x)[f"{stack.name}.bias"]):
            row.copy_(scale * ref.random(row.numel(), seed=800 + stack.first + i + len(f"{stack.name}.bias")))
    return x


@cache
def exact(term: str, activation: str, bias: str = "vector", num_layers: int = N, batch: int = BATCH):
    """The reference at `weights`, and the reference's gradient as one flat vector in the order of the layers."""
    net = problem(SerialCommunicator(), forward=MGRIT(max_levels=1), bias=bias).network(num_layers)
    named = net.layout.named(weights(net))
    *values, states, gradients = ref.objective(named, *data(batch), T / num_layers, activation, asdict(TERMS[term]))
    flat = net.layout.zeros()
    for name, view in net.layout.named(flat).items():
        view.copy_(gradients[name])
    return *values, states, flat
