"""A stack as one node of autograd's graph: a solve for the states forwards, one for the adjoints backwards."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xbraid_py.layer_parallel.solves import hollow

if TYPE_CHECKING:
    from xbraid_py.layer_parallel.stack import LayerParallel


class Propagate(torch.autograd.Function):
    """`apply(stack, u, *tensors)` with the input of a stack and the columns of its weights."""

    @staticmethod
    def forward(ctx, stack: LayerParallel, u: Tensor, *tensors: Tensor) -> Tensor:
        """The output of the last layer."""
        keep = any(ctx.needs_input_grad)
        run = stack._propagation(u, tensors, keep)
        if keep:
            ctx.stack, ctx.run, ctx.u = stack, run, hollow(u)
        return stack._spread(run.take_end(), u, stack.last_rank, stack._window.is_last)

    @staticmethod
    def backward(ctx, slope: Tensor):
        """Gradients of the input and of the weights owned here."""
        stack, run = ctx.stack, ctx.run
        if torch.is_grad_enabled():
            raise RuntimeError(
                "create_graph=True: a LayerParallel has no second derivatives; use to_sequential(model), a plain module"
            )
        if run is None:
            raise RuntimeError(
                "backward through a LayerParallel a second time: what its forward pass kept has been freed; use "
                "backward(retain_graph=True) the first time"
            )
        own = stack.comm.rank == stack.last_rank
        keep = graph_is_kept()
        gradient, back, stack.record = run.backward(stack._state(slope) if own else None, keep)
        first = stack._window.is_first
        of_u = stack._spread(back, ctx.u, stack.first_rank, first) if ctx.needs_input_grad[1] else None
        if not keep:
            # A loss that is still around would otherwise hold all states during the next forward pass.
            ctx.run = None
        columns = stack._block.split(gradient)
        wanted = ctx.needs_input_grad[2:]
        return None, of_u, *(column if want else None for column, want in zip(columns, wanted, strict=True))


def graph_is_kept() -> bool:
    """Whether the backward pass under way was asked to keep the graph; if torch does not tell, it may have been."""
    tell = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return tell is None or tell()
