"""A block with the inputs that it has beside its state, and with states of several tensors packed into one.

Shape letters: `m` layers evaluated at once, `B` batch, `S` shape of a state, the batch included.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from xbraid_py.layers.module_block import Column, ModuleBlock
from xbraid_py.layers.norm_dropout import NormInputs


@dataclass(frozen=True)
class Structure:
    """What `flatten` takes away from a tree: containers, and dataclasses among its leaves."""

    spec: pytree.TreeSpec
    inside: tuple[tuple[type, Structure] | None, ...]

    def build(self, leaves: Sequence[Any]) -> Any:
        """The tree with these leaves."""
        return self._taken(iter(leaves))

    def _taken(self, leaves: Iterator[Any]) -> Any:
        found = []
        for each in self.inside:
            if each is None:
                found.append(next(leaves))
                continue
            kind, structure = each
            made = object.__new__(kind)
            for name, value in structure._taken(leaves).items():
                object.__setattr__(made, name, value)
            found.append(made)
        return pytree.tree_unflatten(found, self.spec)

    def __str__(self) -> str:
        inside = [f"{each[0].__qualname__}: {each[1]}" for each in self.inside if each is not None]
        return f"{self.spec}{inside or ''}"


def flatten(tree: Any) -> tuple[list[Any], Structure]:
    """The leaves of a tree (of lists, tuples, dicts, dataclasses, and what torch knows besides), and its structure."""
    leaves, inside = [], []
    tops, spec = pytree.tree_flatten(tree)
    for top in tops:
        if dataclasses.is_dataclass(top) and not isinstance(top, type):
            own, structure = flatten({field.name: getattr(top, field.name) for field in dataclasses.fields(top)})
            leaves += own
            inside.append((type(top), structure))
        else:
            leaves.append(top)
            inside.append(None)
    return leaves, Structure(spec, tuple(inside))


@dataclass(frozen=True)
class Packing:
    """States of several tensors (B, ...), of one type, as one tensor (B, numbers).

    Attributes
    ----------
    structure : Structure
    shapes : tuple of torch.Size
        Of the tensors of one sample.
    """

    structure: Structure
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, state: Any) -> tuple[Tensor, Packing]:
        """A state as one tensor, and how it was packed.

        Raises
        ------
        ValueError
            If it has no tensors, or ones of several types, or not the samples on the first axis of all.
        """
        leaves, structure = flatten(state)
        if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() for leaf in leaves):
            raise ValueError(
                f"u={type(state).__name__} must be a tensor whose first axis is the samples, or a tree of such tensors "
                f"and of nothing else"
            )
        for what in ("dtype", "device"):
            kinds = sorted({str(getattr(leaf, what)) for leaf in leaves})
            if len(kinds) > 1:
                raise ValueError(f"u has tensors of {' and '.join(kinds)}; a state must have one {what}: use .to(...)")
        counts = sorted({len(leaf) for leaf in leaves})
        if len(counts) > 1:
            raise ValueError(f"u has tensors of {' and '.join(map(str, counts))} samples on their first axes; use one")
        packing = cls(structure, tuple(leaf.shape[1:] for leaf in leaves))
        return packing._joined(leaves), packing

    def pack(self, state: Any, name: str) -> Tensor:
        """What a block gives, as one tensor; it must have the structure of its state."""
        leaves, structure = flatten(state)
        if str(structure) != str(self.structure) or not all(isinstance(leaf, Tensor) for leaf in leaves):
            raise ValueError(
                f"block={name} makes {structure} of a state {self.structure}; it must keep the structure, and returns "
                f"says which entry is the state if there are several things"
            )
        shapes = tuple(leaf.shape[1:] for leaf in leaves)
        if shapes != self.shapes:
            raise ValueError(
                f"block={name} makes tensors {[tuple(each) for each in shapes]} for each sample of a state "
                f"{[tuple(each) for each in self.shapes]}; it must keep shapes"
            )
        return self._joined(leaves)

    def unpack(self, u: Tensor) -> Any:
        """The state of a tensor (B, numbers)."""
        parts = u.split([shape.numel() for shape in self.shapes], dim=1)
        pairs = zip(parts, self.shapes, strict=True)
        return self.structure.build([part.reshape(len(u), *shape).contiguous() for part, shape in pairs])

    def _joined(self, leaves: Sequence[Tensor]) -> Tensor:
        return torch.cat([leaf.reshape(len(leaf), -1) for leaf in leaves], 1)


class Bound(ModuleBlock):
    """A block with further inputs; those that need gradients are columns of its weights, the same in each layer.

    Parameters
    ----------
    block : ModuleBlock
    tensors : sequence of Tensor
        The further inputs that need gradients.
    arguments : callable
        Positional and keyword arguments of the module behind its state, from such tensors.
    packing : Packing, optional
        Of states.
    """

    def __init__(
        self,
        block: ModuleBlock,
        tensors: Sequence[Tensor],
        arguments: Callable[[Sequence[Tensor]], tuple[tuple, dict]],
        packing: Packing | None = None,
    ):
        vars(self).update(vars(block))
        self.further = [tensor.detach() for tensor in tensors]
        self.arguments, self.packing = arguments, packing
        self.own = len(block.columns)
        self.columns = (*block.columns, *(Column(f"inputs.{n}", t.shape, True) for n, t in enumerate(self.further)))
        self.row_size = sum(column.size for column in self.columns)

    @property
    def is_plain(self) -> bool:
        return False

    def rows(self, theta: Tensor) -> Tensor:
        """Rows (n, p) of weights with the further inputs behind them."""
        if not self.further:
            return theta
        return torch.cat([theta, *(tensor.reshape(1, -1).expand(len(theta), -1) for tensor in self.further)], 1)

    def tensors_of(self, module) -> list[Tensor]:
        have = dict(module.named_parameters()) | dict(module.named_buffers())
        return [have[column.name].detach() for column in self.columns[: self.own]] + self.further

    def __call__(
        self,
        tensors: Sequence[Tensor],
        u: Tensor,
        draw: int = 0,
        layer: int = 0,
        norm_inputs: NormInputs | None = None,
    ) -> Tensor:
        """What the module gives for a state (*S), with these columns: those of its weights, and further inputs."""
        inputs, named = self.arguments(tensors[self.own :])
        state = u if self.packing is None else self.packing.unpack(u)
        end = super().__call__(tensors[: self.own], state, draw, layer, norm_inputs, inputs, named)
        return end if self.packing is None else self.packing.pack(end, type(self.module).__name__)

    def functional(self, tensors: Sequence[Tensor], u: Tensor) -> Tensor:
        inputs, named = self.arguments(tensors[self.own :])
        state = u if self.packing is None else self.packing.unpack(u)
        end = super().functional(tensors[: self.own], state, inputs, named)
        return end if self.packing is None else self.packing.pack(end, type(self.module).__name__)

    def _put(self, tensors: Sequence[Tensor]) -> None:
        super()._put(tensors[: self.own])
