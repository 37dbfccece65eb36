"""The statistics of moving batch normalizations in a stack: where they start, and how they move.

Shape letters: `n` layers owned here, `C` channels.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xbraid_py.layer_parallel.weights import StackedWeights
from xbraid_py.layers.batch_norm import Moments
from xbraid_py.mgrit.equations import Forward

if TYPE_CHECKING:
    from xbraid_py.layer_parallel.stack import LayerParallel


def statistics_of(weights: StackedWeights, norm: str) -> tuple[Tensor, Tensor, Tensor]:
    """Running means and variances (n, C) of a norm of the block, and the batches (n,) they have met; not copies."""
    prefix = f"{norm}." if norm else ""
    mean, variance, count = (
        weights.get_buffer(prefix + key) for key in ("running_mean", "running_var", "num_batches_tracked")
    )
    return mean, variance, count


def move_statistics(weights: StackedWeights, moments: Moments) -> None:
    """Move the running statistics of the layers owned here, once, by what a solve has met."""
    for name, norm in weights.block.moving.items():
        norm.move(*statistics_of(weights, name), moments.found[norm.number])


@torch.no_grad()
def start_statistics(stack: LayerParallel, u: Tensor) -> None:
    """Give statistics to all norms that have met no batch yet, by a pass with u layer after layer. Collective."""
    weights, comm = stack.layers, stack.comm
    every = {name: statistics_of(weights, name) for name in weights.block.moving}
    fresh = torch.tensor([int(any((count == 0).any() for _, _, count in every.values()))])
    if not comm.allgather(fresh, (1,) * comm.size).any():
        return
    theta = weights.block.join([tensor.detach() for tensor in weights.tensors()])
    moments = weights.block.moments(len(theta), start=True)
    # One row after the other: the norms write into the rows of theta.
    steps = replace(stack._steps(theta, False, stack._draws, moments), vmap=False)
    state = stack._state(u)
    stack._solvers.sequential.solve(Forward(steps, None, state), state)
    found = dict(zip((column.name for column in weights.block.columns), weights.block.split(theta), strict=True))
    for name, (mean, variance, _) in every.items():
        prefix = f"{name}." if name else ""
        mean.copy_(found[f"{prefix}running_mean"])
        variance.copy_(found[f"{prefix}running_var"])
