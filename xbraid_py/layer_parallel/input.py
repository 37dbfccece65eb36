"""The input of a stack: all ranks agree on it, and the block can be evaluated for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xbraid_py.comm.agreement import agree
from xbraid_py.layer_parallel.batching import batched_pays

if TYPE_CHECKING:
    from xbraid_py.layer_parallel.stack import LayerParallel


def agree_on_input(stack: LayerParallel, u: Tensor) -> None:
    """Raise the same error on all ranks unless they all go on with such a state, and the block can.

    Collective.

    Raises
    ------
    ValueError
        If `u` is no state for these weights, or the ranks pass different ones or are in different modes; if the block
        cannot be evaluated for it, with all its pixels or with those of a coarse level.
    """
    dtype, device = stack.layers.dtype, stack.layers.device
    message = call = None
    if not isinstance(u, Tensor) or u.dim() == 0:
        message = f"u={type(u).__name__} must be a tensor whose first axis is the samples"
    elif u.dtype != dtype or u.device != device:
        message = f"u is {u.dtype} on {u.device}, the weights are {dtype} on {device}; use u.to(...)"
    else:
        # All ranks take part in the adjoint solve, and where the output is spread in that of the input's gradient.
        differentiable = u.requires_grad or (
            stack.output == "last" and any(tensor.requires_grad for tensor in stack.layers.parameters())
        )
        call = (tuple(u.shape), torch.is_grad_enabled(), stack.training, differentiable)
    key = (message, call)
    agree(stack.comm, key, "shape and mode of the input")
    if message:
        raise ValueError(message)
    if key in stack._checked:
        return
    block, solvers = stack._block, stack._solvers
    block.check_mode()
    block.check_state(u.shape, u)
    for transfer in solvers.transfers(u.shape):
        if transfer is not None:
            if stack._is_dense:
                raise ValueError(f"spatial={solvers.spatial} is for blocks of convolutions; a DenseBlock has no pixels")
            coarse = torch.Size((*u.shape[: -len(transfer.pixels)], *transfer.coarse_pixels))
            try:
                block.check_state(coarse, u)
            except RuntimeError as error:
                raise ValueError(
                    f"spatial: the block cannot be evaluated for states {tuple(coarse)} of a coarse level ({error}); "
                    f"use blocks that take any number of pixels, and dims for their axes"
                ) from error
    if stack._vmap is None and not stack._is_dense:
        measures = stack.comm.rank == 0
        stack._vmap = stack.comm.bcast(batched_pays(block, u, solvers.hierarchy) if measures else None)
    stack._checked.add(key)
