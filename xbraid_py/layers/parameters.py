"""How one flat vector holds the weights that a rank owns, row by row.

A network is three stacks of equal layers: one opening layer, N residual layers, one classification layer.
A stack is a matrix with a row of weights for every layer; a rank owns consecutive rows of it, perhaps none.
Joined in the order of the ranks, the rows are those of the whole network on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import prod

import torch
from torch import Tensor

from xbraid_py import kernels


@dataclass(frozen=True)
class Stack:
    """The rows `first .. first + count` of a stack of layers, of `total` in the whole network, that a rank owns.

    The name is "opening", "layers" or "classification"; `shapes` are the parameters of one layer, in the order of the
    row.
    """

    name: str
    shapes: Mapping[str, tuple[int, ...]]
    total: int
    first: int
    count: int

    @cached_property
    def row_size(self) -> int:
        """Parameters of one layer."""
        return sum(prod(shape) for shape in self.shapes.values())

    def unpack(self, rows: Tensor) -> dict[str, Tensor]:
        """Views (count, *shape) of the parameters in rows (count, row_size), by their names."""
        parts = rows.split([prod(shape) for shape in self.shapes.values()], dim=1)
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


@dataclass(frozen=True)
class Layout:
    """The stacks of a network, in the order opening, layers, classification, in one flat vector.

    Parameters
    ----------
    stacks : tuple of Stack
        What this rank owns of each.
    dtype : torch.dtype
        Of the weights.
    dealt : bool
        Whether the rows of the layers are dealt out to the summands of `dots`. If not they all belong to one rank, the
        first one, and to its first summand.
    """

    stacks: tuple[Stack, ...]
    dtype: torch.dtype = torch.float64
    dealt: bool = True

    @cached_property
    def _sizes(self) -> list[int]:
        return [stack.count * stack.row_size for stack in self.stacks]

    @property
    def size(self) -> int:
        """Length of the flat vector on this rank."""
        return sum(self._sizes)

    @property
    def num_parameters(self) -> int:
        """Parameters of the whole network."""
        return sum(stack.total * stack.row_size for stack in self.stacks)

    def zeros(self) -> Tensor:
        """A flat vector of zeros."""
        return torch.zeros(self.size, dtype=self.dtype)

    def rows(self, flat: Tensor) -> dict[str, Tensor]:
        """Views (count, row_size) of the stacks in a flat vector, by name."""
        parts = flat.split(self._sizes)
        return {
            stack.name: part.view(stack.count, stack.row_size) for stack, part in zip(self.stacks, parts, strict=True)
        }

    def named(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of all parameters in a flat vector: "layers.weight" (count, O, I) and so on."""
        rows = self.rows(flat)
        return {
            f"{stack.name}.{name}": view
            for stack in self.stacks
            for name, view in stack.unpack(rows[stack.name]).items()
        }

    def dots(self, a: Sequence[Tensor], b: Sequence[Tensor], parts: int) -> Tensor:
        """Dot products of flat vectors a with flat vectors b, in `parts` summands each: (len(a), len(b), parts).

        A summand is an equal share of the layers; opening and classification layers belong to the first and the last
        share. Without layers here there are none. However many vectors there are, each product is summed in the same
        order.
        """
        opening, layers, classification = self._sizes
        if not parts:
            return a[0].new_empty((len(a), len(b), 0))
        return kernels.products(a, b, _bounds(opening, layers, classification, parts, self.dealt))


@lru_cache
def _bounds(opening: int, layers: int, classification: int, parts: int, dealt: bool) -> list[int]:
    """Where the summands of `Layout.dots` begin, and where the last one ends."""
    ends = [opening + layers * (part + 1 if dealt else parts) // parts for part in range(parts)]
    return [0, *ends[:-1], opening + layers + classification]
