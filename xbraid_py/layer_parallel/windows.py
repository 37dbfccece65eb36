"""Stacks too deep for the memory of the ranks: window by window, with the states of one window at a time.

Shape letters: `N` layers, `W` windows, `S` shape of a state.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import lcm, prod
from typing import Any, Literal

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import together
from xbraid_py.comm.partition import Partition, require_multiple
from xbraid_py.layer_parallel.accuracy import GradientControl, SolveRecord
from xbraid_py.layer_parallel.solves import for_adjoint
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.layer_parallel.window import Window
from xbraid_py.layers.pixels import SpatialCoarsening
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.grid import LayerGrid


class LayerWindows(nn.Module):
    """One stack of N layers as W stacks one behind the other, its windows; made by `in_windows`.

    `state_dict()` is that of the stack without windows, so either loads the other's, with any numbers of windows and
    of ranks. Parameters and solves are those of the windows.

    Attributes
    ----------
    windows : nn.ModuleList of LayerParallel
    """

    def __init__(self, stacks: Sequence[LayerParallel]):
        super().__init__()
        self.windows = nn.ModuleList(stacks)
        self.register_state_dict_post_hook(_join)
        self.register_load_state_dict_pre_hook(_cut)

    def forward(self, u: Tensor) -> Tensor:
        """Output of the last layer for the input u (*S) of the first one; collective, as of `LayerParallel`."""
        first, *others = self.windows
        u = first(u)
        for stack in others:
            if stack._vmap is None:  # what the first one has measured
                stack._vmap = first._vmap
            u = stack(u)
        return u

    @property
    def comm(self) -> Communicator:
        """That of all windows."""
        return self.windows[0].comm

    @property
    def num_layers(self) -> int:
        """N."""
        return sum(stack.grid.num_layers for stack in self.windows)

    @property
    def first_rank(self) -> int:
        """Owner of the first layer."""
        return self.windows[0].first_rank

    @property
    def last_rank(self) -> int:
        """Owner of the last layer."""
        return self.windows[-1].last_rank

    @property
    def records(self) -> list[SolveRecord | None]:
        """What the last solves of the windows did."""
        return [stack.record for stack in self.windows]

    def solver_state(self) -> dict:
        """What a checkpoint keeps beside `state_dict()`; a stack without windows takes it too."""
        states = [stack.solver_state() for stack in self.windows]
        return {**states[0], "windows": states}

    def load_solver_state(self, state: dict) -> None:
        """The opposite of `solver_state`, also of a stack without windows.

        Of another number of windows each takes what that of the first one was.
        """
        states = state.get("windows", [])
        for stack, own in zip(
            self.windows, states if len(states) == len(self.windows) else [state] * len(self.windows), strict=True
        ):
            stack.load_solver_state(own)


def in_windows(
    block: Callable[[], nn.Module],
    num_layers: int | LayerGrid,
    T: float = 1.0,
    comm: Any = None,
    *,
    windows: int,
    mgrit: MGRIT | None = None,
    adjoint: MGRIT | None = None,
    accuracy: GradientControl | None = None,
    output: Literal["all", "last"] = "all",
    seed: int = 0,
    vmap: bool | None = None,
    recompute: bool = False,
    spatial: SpatialCoarsening | None = None,
) -> LayerWindows:
    """A stack as `LayerParallel(block, num_layers, T, comm)`, propagated window by window.

    The layers of each window are shared among all ranks. The forward pass keeps the input of each window, the ranks in
    turns, and nothing else; the backward pass solves for the states of a window again, and then for its adjoints. So
    states and graphs of N / W layers are in memory at a time, for one forward solve more. Results are those of the
    stack without windows: the same bits with exact propagation, otherwise up to the errors of the solves.

    Parameters
    ----------
    block, num_layers, T, comm, mgrit, adjoint, output, seed, vmap, spatial
        As of `LayerParallel`.
    windows : int
        W. Where it does not divide the number of layers, the first windows have one layer more, or one interval more
        where a coarsening factor is given.
    accuracy : GradientControl, optional
        What is asked of the gradient of the weights of each window.
    recompute : bool
        In a window, too, keep no graphs of the layers, but evaluate them again.

    Returns
    -------
    LayerWindows

    Raises
    ------
    ValueError
        If there are more windows than layers or intervals, if a coarsening factor does not divide the number of
        layers, or for what `LayerParallel` raises it.
    TypeError
        If `block` is no callable, or a module; if `windows` is no integer.
    """
    comm = as_communicator(comm)
    with together(comm):
        grid = num_layers if isinstance(num_layers, LayerGrid) else LayerGrid(num_layers, T)
        counts = _counts(grid.num_layers, windows, mgrit or MGRIT(), for_adjoint(adjoint, mgrit or MGRIT()))
    comm.same((windows, recompute), "windows, recompute")
    stacks = []
    for number, count in enumerate(counts):
        first = sum(counts[:number])
        sizes = grid.sizes(first, count)
        lengths = None if grid.is_uniform else grid.lengths[first : first + count]
        window = Window(
            first_layer=first,
            h=grid.h if grid.is_uniform else None,
            keeper=number % comm.size,
            is_first=number == 0,
            is_last=number == len(counts) - 1,
        )
        stacks.append(
            LayerParallel(
                block,
                LayerGrid(count, sum(sizes), lengths),
                comm=comm,
                mgrit=mgrit,
                adjoint=adjoint,
                accuracy=accuracy,
                output=output,
                seed=seed,
                vmap=vmap,
                recompute="all" if recompute else "states",
                window=window,
                spatial=spatial,
            )
        )
    return LayerWindows(stacks)


def _counts(num_layers: int, windows: int, *options: MGRIT) -> tuple[int, ...]:
    """Layers of each window: whole intervals where their length is given."""
    if not isinstance(windows, int):
        raise TypeError(f"windows={windows!r} must be an integer; use 4")
    unit = lcm(*(_length(each, num_layers) for each in options))
    require_multiple("num_layers", num_layers, unit, "cfactor")
    if not 1 <= windows <= num_layers // unit:
        what = f"intervals of {unit} layers" if unit > 1 else "layers"
        most = num_layers // unit
        raise ValueError(
            f"windows={windows} must be at least 1, and at most the {most} {what} of num_layers={num_layers}; "
            f"use {min(max(windows, 1), most)}"
        )
    return Partition.balanced(num_layers // unit, windows).refine(unit).counts


def _length(options: MGRIT, num_layers: int) -> int:
    """Layers that a window has to have a multiple of."""
    if options.cfactor is None and options.cycle == "lagged":
        return 1  # which makes intervals of what there is
    given = len(options.cfactor) if isinstance(options.cfactor, tuple) else 1
    return prod(options.cfactor_of(level, num_layers) or 1 for level in range(given))


def _join(windows: LayerWindows, state: dict, prefix: str, local_metadata) -> None:
    first = f"{prefix}windows.0.layers."
    for name in [key.removeprefix(first) for key in state if key.startswith(first)]:
        parts = [state.pop(f"{prefix}windows.{w}.layers.{name}") for w in range(len(windows.windows))]
        state[f"{prefix}layers.{name}"] = torch.cat(parts)


def _cut(windows: LayerWindows, state, prefix, local_metadata, strict, missing, unexpected, errors) -> None:
    counts = [stack.grid.num_layers for stack in windows.windows]
    for name in [column.name for column in windows.windows[0].layers.block.columns]:
        tensor = state.pop(f"{prefix}layers.{name}", None)
        if tensor is None:
            continue
        if len(tensor) != sum(counts):
            errors.append(f"{prefix}layers.{name} has {len(tensor)} layers, the windows have {sum(counts)}")
            continue
        for w, part in enumerate(tensor.split(counts)):
            state[f"{prefix}windows.{w}.layers.{name}"] = part
