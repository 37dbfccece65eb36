"""How a stack is cut: into windows that are propagated one after the other, or into an inner part and serial ends."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm, prod
from typing import Literal

import torch

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition, require_multiple
from xbraid_py.layer_parallel.accuracy import GradientControl
from xbraid_py.layer_parallel.solves import Solvers
from xbraid_py.layers.pixels import SpatialCoarsening
from xbraid_py.mgrit import MGRIT
from xbraid_py.mgrit.grid import LayerGrid


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a window is in its stack.

    Parameters
    ----------
    first_layer : int
        Its first layer in the stack, whose numbers initial weights and masks of dropout depend on.
    h : float, optional
        Step size, where T / N of the window would be another number in the last bit.
    keeper : int, optional
        The rank that keeps the input between forward and backward pass, if nothing else is kept; by default the owner
        of the first layer.
    has_all_input, has_all_output : bool
        Whether the gradient of the input, and the output, are on all ranks; else where its first and last layer are.
    is_last : bool
        Whether its output is that of the stack.
    """

    first_layer: int = 0
    h: float | None = None
    keeper: int | None = None
    has_all_input: bool = True
    has_all_output: bool = True
    is_last: bool = True


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What all windows of a stack do alike; as of `LayerParallel`."""

    accuracy: GradientControl
    output: str
    seed: int
    vmap: bool | None
    recompute: bool | str
    form: Literal["increment", "map"] | None = None
    returns: int | str | None = None
    compile: bool | str = False
    torch_random: bool = False


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What a stack is cut by.

    Parameters
    ----------
    windows, serial_ends, spatial, messages
        As of `LayerParallel`.
    options, adjoint : MGRIT
        Of states and adjoints.
    output : {"all", "last"}
    """

    windows: int
    serial_ends: tuple[int, int]
    options: MGRIT
    adjoint: MGRIT
    output: str
    spatial: SpatialCoarsening | None
    messages: torch.dtype | None

    @property
    def main(self) -> int:
        """Number of the window that stands for all: the inner part, or the first one."""
        return int(self.serial_ends[0] > 0)

    def pieces(self, grid: LayerGrid, comm: Communicator) -> list[tuple[Solvers, Place]]:
        """The solvers of the windows, and where these are.

        Raises
        ------
        ValueError
            If a coarsening factor does not divide the layers it is for, or there are more windows or layers in the ends
            than there can be.
        """
        if any(self.serial_ends):
            return self._with_ends(grid, comm)
        counts = self._counts(grid.num_layers)
        if len(counts) == 1:
            gives = self.output == "all"
            return [(self._solvers(grid, comm), Place(has_all_input=gives, has_all_output=gives))]
        found = []
        for number, (first, count) in enumerate(zip(_firsts(counts), counts, strict=True)):
            place = Place(
                first_layer=first,
                h=grid.h if grid.is_uniform else None,
                keeper=number % comm.size,
                has_all_input=number > 0 or self.output == "all",
                has_all_output=number < len(counts) - 1 or self.output == "all",
                is_last=number == len(counts) - 1,
            )
            found.append((self._solvers(_part(grid, first, count), comm), place))
        return found

    def _with_ends(self, grid: LayerGrid, comm: Communicator) -> list[tuple[Solvers, Place]]:
        before, behind = self.serial_ends
        inner = grid.num_layers - before - behind
        if inner < 1:
            raise ValueError(
                f"serial_ends={self.serial_ends} of num_layers={grid.num_layers} leave nothing for the solver; "
                f"use (1, 1)"
            )
        if self.options.cycle == "pipeline":
            raise ValueError(
                f"serial_ends={self.serial_ends} with cycle='pipeline', which is exact in all layers; leave it out"
            )
        if self.windows != 1:
            raise ValueError(f"serial_ends={self.serial_ends} need windows=1, not windows={self.windows}")
        middle = self._solvers(_part(grid, before, inner), comm)
        # The ends lie where the inner part begins and ends, so that no state has to go anywhere.
        parts = (
            (0, before, middle.partition.first_owner),
            (before, inner, None),
            (before + inner, behind, middle.partition.last_owner),
        )
        parts = [part for part in parts if part[1]]
        found = []
        for number, (first, count, owner) in enumerate(parts):
            place = Place(
                first_layer=first,
                h=grid.h if grid.is_uniform else None,
                has_all_input=number == 0 and self.output == "all",
                has_all_output=number == len(parts) - 1 and self.output == "all",
                is_last=number == len(parts) - 1,
            )
            solvers = middle
            if owner is not None:
                solvers = self._solvers(_part(grid, first, count), comm, owner)
            found.append((solvers, place))
        return found

    def _solvers(self, grid: LayerGrid, comm: Communicator, owner: int | None = None) -> Solvers:
        spatial = self.spatial if owner is None else None
        return Solvers(self.options, self.adjoint, grid, comm, spatial, owner, self.messages)

    def _counts(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each window: whole intervals where their length is given."""
        if self.windows == 1:
            return (num_layers,)
        unit = lcm(*(_length(each, num_layers) for each in (self.options, self.adjoint)))
        require_multiple("num_layers", num_layers, unit, "cfactor")
        most = num_layers // unit
        if not 1 <= self.windows <= most:
            what = f"intervals of {unit} layers" if unit > 1 else "layers"
            raise ValueError(
                f"windows={self.windows} must be at least 1, and at most the {most} {what} of num_layers={num_layers}; "
                f"use {min(max(self.windows, 1), most)}"
            )
        return Partition.balanced(most, self.windows).refine(unit).counts


def _length(options: MGRIT, num_layers: int) -> int:
    """Layers that a window has to have a multiple of."""
    if options.cfactor is None and options.cycle == "lagged":
        return 1  # which makes intervals of what there is
    given = len(options.cfactor) if isinstance(options.cfactor, tuple) else 1
    return prod(options.cfactor_of(level, num_layers) or 1 for level in range(given))


def _firsts(counts: tuple[int, ...]) -> list[int]:
    """The first layer of each window."""
    return [sum(counts[:number]) for number in range(len(counts))]


def _part(grid: LayerGrid, first: int, count: int) -> LayerGrid:
    """The grid of some of the layers."""
    lengths = None if grid.lengths is None or grid.is_uniform else grid.lengths[first : first + count]
    return LayerGrid(count, sum(grid.sizes(first, count)), lengths)
