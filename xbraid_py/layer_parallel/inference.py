"""The output of a stack by exact propagation, without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xbraid_py.layer_parallel.ranks import pipeline

if TYPE_CHECKING:
    from xbraid_py.layer_parallel.stack import LayerParallel


def exact_output(stack: LayerParallel, u: Tensor) -> Tensor:
    """The output for the input u (*S), layer after layer, the samples in portions; collective."""
    theta = stack._block.join([tensor.detach() for tensor in stack.layers.tensors()])
    steps = stack._steps(theta, False, stack._draws)

    def through(portion: Tensor, receive: Callable[[Tensor], Tensor]) -> Tensor:
        return steps.relax(receive(stack._state(portion))[None], len(theta), None, None)[0]

    found = pipeline(stack.comm, stack._solvers.partition, u.detach(), through)
    own = stack.comm.rank == stack.last_rank
    end = torch.cat([stack._user_state(state, portion) for portion, state in found]) if own else None
    if stack.output == "all" or not stack._window.is_last:
        return stack.comm.broadcast(end if own else u.new_empty(u.shape), stack.last_rank)
    return end if own else torch.zeros_like(u)
