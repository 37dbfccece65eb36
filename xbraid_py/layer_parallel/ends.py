"""Around a stack: a loss that one rank knows, the norm of gradients that many hold, and weights that all have alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import agree
from xbraid_py.layer_parallel.alike import compare
from xbraid_py.layer_parallel.modules import PipelineParallel
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layer_parallel.weights import StackedWeights


class _BroadcastLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss: Tensor, comm: Communicator, root: int) -> Tensor:
        ctx.own = comm.rank == root
        return comm.broadcast(loss.detach().clone(), root)

    @staticmethod
    def backward(ctx, *gradients: Tensor):
        (gradient,) = gradients
        return gradient if ctx.own else torch.zeros_like(gradient), None, None


def broadcast_loss(loss: Tensor, comm: Any, root: int) -> Tensor:
    """The loss of rank `root` on every rank; backwards, only what that rank computed counts.

    For stacks with `output="last"`: elsewhere the output is zero, and what the head makes of it means nothing.
    Every rank calls it, and `backward` on its result, so that all take part in the adjoint solve.

    Parameters
    ----------
    loss : scalar tensor
        Computed from the output of the stack on every rank.
    comm : Communicator, mpi4py.MPI.Comm, ProcessGroup or None
        None for a serial run.
    root : int
        `LayerParallel.last_rank`.
    """
    comm = as_communicator(comm)
    agree(comm, None, "", "broadcast_loss()")
    return _BroadcastLoss.apply(loss, comm, root)


def clip_grad_norm_(model: nn.Module, max_norm: float) -> float:
    """`torch.nn.utils.clip_grad_norm_` for a model with layer-parallel stacks: the 2-norm is that of the whole model.

    Gradients of layers are counted on all ranks, all others once (they are the same on every rank). Collective; the
    same bits on any number of ranks.

    Parameters
    ----------
    model : nn.Module
        With stacks in it, anywhere.
    max_norm : float
        The gradients are scaled down to this norm where theirs is larger.

    Returns
    -------
    float
        The norm before clipping.

    Raises
    ------
    ValueError
        If a stack has output="last": then the gradients around it differ from rank to rank.
    """
    square = 0.0
    inside: set[int] = set()
    parts = list(model.modules())
    if any(isinstance(part, LayerParallel | PipelineParallel) and part.output == "last" for part in parts):
        raise ValueError('output="last" leaves the gradients around a stack on some ranks alone; use output="all"')
    for part in parts:
        if isinstance(part, LayerParallel | PipelineParallel):
            agree(part.comm, None, "", "clip_grad_norm_()")
    for weights in (part for part in parts if isinstance(part, StackedWeights)):
        if weights.splines is not None:
            continue  # coefficients are the same on every rank
        gradients = [p.grad for p in weights.parameters() if p.grad is not None]
        inside.update(id(p) for p in weights.parameters())
        if gradients:
            # A summand for each layer, whoever owns it.
            rows = torch.stack([g[:, None].flatten(1).square().sum(1) for g in gradients], 1).sum(1, keepdim=True)
            square += float(weights.comm.ordered_sum(rows, weights.partition.counts))
    for pipeline in (part for part in parts if isinstance(part, PipelineParallel)):
        inside.update(id(p) for p in pipeline.parameters())
        # A summand for each module, whoever owns it.
        rows = [
            [sum(float(p.grad.square().sum()) for p in module.parameters() if p.grad is not None)]
            for module in pipeline.layers.values()
        ]
        rows = torch.tensor(rows, dtype=torch.float64).reshape(-1, 1)
        square += float(pipeline.comm.ordered_sum(rows, pipeline.partition.counts))
    others = [p.grad for p in model.parameters() if p.grad is not None and id(p) not in inside]
    square += sum(float(gradient.square().sum()) for gradient in others)
    norm = square**0.5
    if norm > max_norm:
        for p in model.parameters():
            if p.grad is not None:
                p.grad.mul_(max_norm / norm)
    return norm


def check_replicas(model: nn.Module) -> None:
    """Raise the same `ValueError` on all ranks if what they should have alike of a model is not alike; collective.

    That is all but the layers of `LayerParallel` and the modules of `PipelineParallel`, which are shared out: what lies
    around stacks, coefficients of splines, weights of `ParallelGRU` and `ParallelLSTM`. Stacks look at their inputs,
    and at gradients of their outputs, by themselves, in their first calls and then in one of 100; XBRAID_CHECK_INPUTS=1
    in the environment of all ranks makes them compare all inputs bit by bit, and 0 none.

    Parameters
    ----------
    model : nn.Module
        With stacks in it; without any there is nothing to compare.
    """
    parts = list(model.modules())
    held = (getattr(part, "comm", None) for part in parts)
    comms = {id(comm): comm for comm in held if isinstance(comm, Communicator)}
    shared_out: set[int] = set()
    for part in parts:
        if isinstance(part, StackedWeights):
            have = dict(part.named_parameters()) | dict(part.named_buffers())
            shared_out |= {id(have[name]) for name in part.divided}
        elif isinstance(part, PipelineParallel):
            shared_out |= {id(tensor) for tensor in (*part.parameters(), *part.buffers())}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    named = {name: tensor for name, tensor in tensors.items() if id(tensor) not in shared_out}
    for comm in comms.values():
        agree(comm, sorted(named), "names of weights around stacks", "check_replicas()")
        compare(comm, named)
