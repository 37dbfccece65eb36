"""What an optimizer and a loss scale have to know of a stack: groups, rates by depth, and overflows on other ranks.

Shape letters: `N` layers, `n` of them owned here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from xbraid_py.comm import as_communicator
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layer_parallel.weights import StackedWeights


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for an optimizer such as AdamW: matrices with weight decay; biases and what norms have without.

    Decided by what a parameter is in its layer: `p.ndim >= 2` says nothing of stacked ones, (N, size) for a bias.
    Without decay is what has less than two axes there, whose name has "bias" in it, or whose module is called a norm.

    Parameters
    ----------
    model : nn.Module
        With `LayerParallel`, `PipelineParallel` and `ParallelGRU` in it, or none.
    weight_decay : float
        Of the first group; at least 0.

    Returns
    -------
    list of dict
        Two groups on every rank, in the order of `model.parameters()`; one may be empty.

    Examples
    --------
    >>> stack = LayerParallel(lambda: nn.Linear(4, 4), 8)
    >>> optimizer = torch.optim.AdamW(param_groups(stack, weight_decay=0.1), lr=1e-3)
    >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
    [(1, 0.1), (1, 0.0)]
    """
    if not 0.0 <= weight_decay < float("inf"):
        raise ValueError(f"weight_decay={weight_decay} must be at least 0 and finite; use 0.01")
    parts = dict(model.named_modules())
    of_stacks = {
        id(p): (name, part.block.module)
        for part in parts.values()
        if isinstance(part, StackedWeights)
        for name, p in part.named_parameters()
    }
    found: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in model.named_parameters():
        in_layer, block = of_stacks.get(id(p), (name, model))
        path, _, last = in_layer.rpartition(".")
        kind = type(block.get_submodule(path)).__name__.lower()
        axes = p.dim() - (id(p) in of_stacks)
        found[axes > 1 and "bias" not in last and "norm" not in kind].append(p)
    return [{"params": found[True], "weight_decay": weight_decay}, {"params": found[False], "weight_decay": 0.0}]


def layer_views(model: nn.Module) -> list[nn.Parameter]:
    """The parameters of a model, those of stacks layer by layer: for optimizers that look at whole parameters.

    Each is a leaf that shares its memory, and that of its gradient, with a row of the stacked one: what an optimizer
    does to it is done to the stack, and `clip_grad_norm_(model)` does to it what it does to the stack's. Of the layers
    of other ranks there are none. The optimizer's `zero_grad` is for the stack's gradients too.

    Parameters
    ----------
    model : nn.Module
        With `LayerParallel` in it.

    Returns
    -------
    list of nn.Parameter
        In the order of `model.parameters()`.

    Raises
    ------
    ValueError
        If a stack has splines, whose coefficients belong to no layer.

    Examples
    --------
    >>> stack = LayerParallel(lambda: nn.Linear(4, 4, bias=False), 8)
    >>> optimizer = torch.optim.Muon(layer_views(stack), lr=1e-3)
    >>> [tuple(p.shape) for p in optimizer.param_groups[0]["params"]][:2]
    [(4, 4), (4, 4)]
    """
    stacks = [part for part in model.modules() if isinstance(part, StackedWeights)]
    if any(stack.splines is not None for stack in stacks):
        raise ValueError("layer_views: coefficients of splines belong to no layer; leave splines out")
    stacked = {id(p) for stack in stacks for p in stack.parameters()}
    found: list[nn.Parameter] = []
    for p in model.parameters():
        found += _views(p) if id(p) in stacked else [p]
    return found


def _views(p: nn.Parameter) -> list[nn.Parameter]:
    views = [nn.Parameter(row, requires_grad=p.requires_grad) for row in p.detach()]

    def begin(gradient: Tensor) -> None:
        # An optimizer that has set the gradients of the views to None means the whole.
        if all(view.grad is None for view in views):
            p.grad = None

    def share(_: nn.Parameter) -> None:
        assert p.grad is not None  # it has been accumulated just now
        for view, row in zip(views, p.grad, strict=True):
            view.grad = row

    if p.requires_grad:
        p.register_hook(begin)
        p.register_post_accumulate_grad_hook(share)
    return views


def layer_lr(
    optimizer: torch.optim.Optimizer, model: nn.Module, decay: float
) -> tuple[RemovableHandle, RemovableHandle]:
    """Rates by depth: layer n of N learns with decay^(N - 1 - n) times the rate of its parameters' group.

    Layers share a parameter, so groups of an optimizer cannot tell them apart. What a step changes is scaled instead:
    for SGD, Adam, AdamW and all whose steps are proportional to their rate that is what a group for each layer does,
    weight decay included. To scale gradients would do nothing with Adam. It costs a copy of the weights in each step.

    Parameters
    ----------
    optimizer : torch.optim.Optimizer
    model : nn.Module
        A `LayerParallel`, or a module that holds some.
    decay : float
        Above 0, at most 1.

    Returns
    -------
    tuple of RemovableHandle
        Their `remove()` ends it.

    Raises
    ------
    ValueError
        If the model holds no stack, or one of splines, whose coefficients belong to no layer; if the optimizer does
        not have the weights of a stack.
    """
    if not 0.0 < decay <= 1.0:
        raise ValueError(f"decay={decay} must be above 0 and at most 1; use 0.8")
    stacks = [part for part in model.modules() if isinstance(part, LayerParallel)]
    if not stacks:
        raise ValueError(f"model={type(model).__name__} holds no LayerParallel; use a group for each of its layers")
    have = {id(p) for group in optimizer.param_groups for p in group["params"]}
    factors: dict[nn.Parameter, Tensor] = {}
    for stack in stacks:
        for window in stack.windows:
            if window.layers.splines is not None:
                raise ValueError("layer_lr: coefficients of splines belong to no layer; leave splines out")
            numbers = [window.place.first_layer + layer for layer in window.own_layers]
            own = torch.tensor([decay ** (stack.grid.num_layers - 1 - n) for n in numbers], dtype=torch.float64)
            for name, p in window.layers.named_parameters():
                if id(p) not in have:
                    raise ValueError(f"optimizer does not have {name} of the stack; use model.parameters() for it")
                factors[p] = own.to(p).view(-1, *(1,) * (p.dim() - 1))
    before: dict[nn.Parameter, Tensor] = {}

    @torch.no_grad()
    def keep(*_: Any) -> None:
        before.update({p: p.detach().clone() for p in factors})

    @torch.no_grad()
    def scale(*_: Any) -> None:
        for p, factor in factors.items():
            old = before.pop(p)
            p.copy_(old + factor * (p - old))

    return optimizer.register_step_pre_hook(keep), optimizer.register_step_post_hook(scale)


class GradScaler(torch.amp.GradScaler):
    """`torch.amp.GradScaler` for weights on several ranks: where one finds an overflow, all leave the step out.

    Each rank looks at the gradients of its own layers. Without a word from the others some would make a step that the
    rest leaves out, and scales would go apart.

    Parameters
    ----------
    comm : Communicator, mpi4py.MPI.Comm or ProcessGroup, optional
        That of the stack.
    device : str
    **options
        As of `torch.amp.GradScaler`.
    """

    def __init__(self, comm: Any = None, device: str = "cpu", **options: Any):
        super().__init__(device, **options)
        self.comm = as_communicator(comm)

    def _unscale_grads_(self, *arguments: Any, **named: Any) -> dict[torch.device, Tensor]:
        found = super()._unscale_grads_(*arguments, **named)
        own = torch.tensor([float(any(bool(flag) for flag in found.values()))])
        anywhere = float(self.comm.allgather(own, (1,) * self.comm.size).max())
        for flag in found.values():
            flag.fill_(anywhere)
        return found
