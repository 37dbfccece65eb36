"""Nested iteration for any stack: the layers cut into shorter ones in the middle of a training, optimizer and all.

Shape letters: `N` layers, `n` of them owned here.
"""

from __future__ import annotations

import copy
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn

from xbraid_py.comm.partition import Partition
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layer_parallel.weights import StackedWeights
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.grid import LayerGrid

# What optimizers keep of a parameter: by how many factors of a gradient it changes with it.
_POWERS = {
    **dict.fromkeys(("exp_avg", "momentum_buffer", "grad_avg", "exp_inf", "prev"), 1),
    **dict.fromkeys(("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum"), 2),
}
Model = TypeVar("Model", bound=nn.Module)


@overload
def refine_depth(
    model: LayerParallel, optimizer: torch.optim.Optimizer | None = None, factor: int = 2
) -> LayerParallel: ...
@overload
def refine_depth(model: Model, optimizer: torch.optim.Optimizer | None = None, factor: int = 2) -> Model: ...
def refine_depth(model: nn.Module, optimizer: torch.optim.Optimizer | None = None, factor: int = 2) -> nn.Module:
    """Each layer of the model's stacks cut into `factor` shorter ones with its weights; collective.

    The network is a time-stepping scheme on a finer grid then, with the same final time, and its function nearly the
    same: nested iteration ("Multilevel Initialization for Layer-Parallel Deep Neural Network Training", E. C. Cyr,
    S. Günther, J. B. Schroder, 2019) trains few layers first, and more of them where that is cheap no longer.

    What an optimizer keeps is carried along. A layer's gradient is the sum of those of the layers it is cut into, so
    averages of gradients are divided by `factor`, those of squares by its square.

    Parameters
    ----------
    model : nn.Module
        A `LayerParallel`, or a module that holds some, in which they are replaced; on any number of ranks.
    optimizer : torch.optim.Optimizer, optional
        That has the weights; afterwards it has the new ones, in the same groups.
    factor : int
        At least 2.

    Returns
    -------
    nn.Module
        The model, or the new stack if it is a stack itself.

    Raises
    ------
    ValueError
        If there is no stack; if blocks give the next state (form="map"), which has no step size to be cut; if an
        optimizer keeps something that nobody has told of here.

    Examples
    --------
    >>> stack = LayerParallel(lambda: nn.Linear(4, 4), 8, T=1.0)
    >>> optimizer = torch.optim.Adam(stack.parameters())
    >>> refine_depth(stack, optimizer).grid
    LayerGrid(num_layers=16, T=1.0, lengths=None)
    """
    if not isinstance(factor, int) or factor < 2:
        raise ValueError(f"factor={factor!r} must be a whole number from 2 on; use 2")
    stacks = {name: part for name, part in model.named_modules() if isinstance(part, LayerParallel)}
    if not stacks:
        raise ValueError(f"model={type(model).__name__} holds no LayerParallel; there are no layers to cut")
    for stack in stacks.values():
        if stack.form == "map":
            raise ValueError(
                "form='map': a block that gives the next state has no step size to be cut; use form='increment', and a "
                "block without its sum"
            )
    if optimizer is not None:
        _check_state(optimizer, stacks)
    for name, stack in stacks.items():
        before, behind = stack.cut.serial_ends
        ends = (before * factor, behind * factor)
        fine = on_grid(stack, stack.grid.refine(factor), ends)
        check_places(stack, stack, fine, factor)
        for coarse, window in zip(stack.windows, fine.windows, strict=True):
            _carry_over(coarse.layers, window.layers, factor, optimizer)
        fine.load_solver_state(_started_anew(stack.solver_state()))
        fine.train(stack.training)
        if not name:
            return fine
        above, _, last = name.rpartition(".")
        setattr(model.get_submodule(above), last, fine)
    return model


def on_grid(
    stack: LayerParallel, grid: LayerGrid, serial_ends: tuple[int, int], mgrit: MGRIT | None = None
) -> LayerParallel:
    """A stack like this one on another grid, with another solver if one is given; its weights are yet to come."""
    cut, window = stack.cut, stack.windows[0]
    settings, splines = vars(window.settings), window.layers.splines
    block = window.block.module
    return LayerParallel(
        lambda: copy.deepcopy(block),
        grid,
        comm=stack.comm,
        windows=cut.windows,
        serial_ends=serial_ends,
        mgrit=mgrit or cut.options,
        adjoint=None if mgrit else cut.adjoint,
        spatial=cut.spatial,
        messages=cut.messages,
        splines=None if splines is None else splines.splines,
        **{**settings, "form": "increment"},
    )


def check_places(given: LayerParallel, coarse: LayerParallel, fine: LayerParallel, factor: int) -> None:
    """Raise `ValueError` unless windows and ends of both hold the same layers, of which the given stack is one."""
    counts = [[window.layers.partition.num_rows for window in stack.windows] for stack in (coarse, fine)]
    if [factor * count for count in counts[0]] != counts[1]:
        raise ValueError(
            f"windows={given.cut.windows}, serial_ends={given.cut.serial_ends} of num_layers={given.grid.num_layers} "
            f"would cut {coarse.grid.num_layers} and {fine.grid.num_layers} layers at other places; use windows of "
            f"equal numbers of layers, and even ends"
        )


def _check_state(optimizer: torch.optim.Optimizer, stacks: dict[str, LayerParallel]) -> None:
    """Raise `ValueError` if an optimizer keeps what is not known here."""
    for stack in stacks.values():
        for p in stack.parameters():
            for key, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and value.shape == p.shape and key not in _POWERS:
                    raise ValueError(
                        f"optimizer={type(optimizer).__name__} keeps {key!r}, of which nobody knows how it changes "
                        f"where layers are cut; use SGD, Adam, AdamW, RMSprop, Adagrad, NAdam or RAdam"
                    )


@torch.no_grad()
def _carry_over(
    coarse: StackedWeights, fine: StackedWeights, factor: int, optimizer: torch.optim.Optimizer | None
) -> None:
    """Weights, statistics and what the optimizer keeps of them, from the layers to those they are cut into."""
    have = dict(coarse.named_parameters()) | dict(coarse.named_buffers())
    for name, target in [*fine.named_parameters(), *fine.named_buffers()]:
        source = have[name]
        is_divided = name in coarse.divided
        target.copy_(_cut(source, coarse.partition, fine, factor) if is_divided else source)
        if not isinstance(target, nn.Parameter):
            continue
        target.requires_grad_(source.requires_grad)
        if optimizer is None:
            continue
        for group in optimizer.param_groups:
            group["params"] = [target if p is source else p for p in group["params"]]
        state = optimizer.state.pop(source, None)
        if state is not None:
            # Coefficients of splines are weights of the same functions as before.
            kept = {key: _kept(key, value, source, coarse, fine, factor) for key, value in state.items()}
            optimizer.state[target] = kept if is_divided else state


def _kept(key: str, value: Any, source: Tensor, coarse: StackedWeights, fine: StackedWeights, factor: int) -> Any:
    if not isinstance(value, Tensor) or value.shape != source.shape:
        return value
    return _cut(value, coarse.partition, fine, factor) / factor ** _POWERS[key]


def _cut(rows: Tensor, source: Partition, fine: StackedWeights, factor: int) -> Tensor:
    """Rows (n, *shape) of the layers, one for each of the layers they are cut into, where these are owned."""
    repeated = rows.detach().repeat_interleave(factor, 0)
    return fine.comm.redistribute(repeated.contiguous(), source.refine(factor), fine.partition)


def _started_anew(state: dict) -> dict:
    """The number of updates, on which masks depend; how exactly to solve is found out anew."""
    kept = copy.deepcopy({key: value for key, value in state.items() if key != "windows"})
    kept["accuracy"] |= {"ratios": [], "ratio": 1.0, "due": True}
    return kept
