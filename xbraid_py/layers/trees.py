"""Trees of tensors: taken apart, of one type packed into one tensor, and of any types as one message.

Shape letters: `B` batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class Structure:
    """What `flatten` takes away from a tree: containers, and dataclasses among its leaves."""

    spec: pytree.TreeSpec
    inside: tuple[tuple[type, Structure] | None, ...]

    @property
    def is_leaf(self) -> bool:
        """Whether there are no containers at all."""
        return self.spec.is_leaf() and self.inside == (None,)

    @property
    def count(self) -> int:
        """Leaves of the tree."""
        return sum(1 if each is None else each[1].count for each in self.inside)

    def __reduce__(self):
        # A tree is what other versions of torch can read, too.
        return _structure_of, (self.build([None] * self.count),)

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


def has_slopes(dtype: torch.dtype) -> bool:
    """Whether numbers of a type have gradients."""
    return dtype.is_floating_point or dtype.is_complex


def _structure_of(tree: Any) -> Structure:
    return flatten(tree)[1]


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


@dataclass(frozen=True)
class Form:
    """What is to be known of a tree of tensors beside their numbers: a message is one tensor, without that.

    Attributes
    ----------
    structure : Structure
    shapes : tuple of tuple of int
    dtypes : tuple of torch.dtype
    """

    structure: Structure
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, leaves: Sequence[Tensor], structure: Structure) -> Form:
        """That of the tree with these leaves."""
        return cls(structure, tuple(tuple(leaf.shape) for leaf in leaves), tuple(leaf.dtype for leaf in leaves))

    @cached_property
    def slopes(self) -> Form:
        """That of the gradients: of the tensors that have any, as a list."""
        kept = [n for n, dtype in enumerate(self.dtypes) if has_slopes(dtype)]
        _, structure = flatten([None] * len(kept))
        return Form(structure, tuple(self.shapes[n] for n in kept), tuple(self.dtypes[n] for n in kept))

    def template(self, like: Tensor) -> Tensor:
        """A tensor to receive a message into, on the device of another one."""
        if len(self.shapes) == 1:
            return like.new_empty(self.shapes[0], dtype=self.dtypes[0])
        return like.new_empty(sum(self._sizes()), dtype=self._kind)

    def pack(self, leaves: Sequence[Tensor], like: Tensor) -> Tensor:
        """These leaves as a message; a single one as it is."""
        if len(leaves) == 1:
            return leaves[0].contiguous()
        flat = [leaf.contiguous().flatten() for leaf in leaves]
        return torch.cat([each.view(self._kind) for each in flat]) if flat else self.template(like)

    def unpack(self, message: Tensor) -> list[Tensor]:
        """The leaves of a message."""
        if len(self.shapes) == 1:
            return [message]
        parts = message.split(self._sizes())
        # Numbers of a type lie where memory allows for it, as those of a copy do.
        parts = [part if part.dtype == dtype else part.clone() for part, dtype in zip(parts, self.dtypes, strict=True)]
        return [p.view(dtype).view(shape) for p, dtype, shape in zip(parts, self.dtypes, self.shapes, strict=True)]

    @property
    def _kind(self) -> torch.dtype:
        """The type of a message: theirs, or bytes."""
        return self.dtypes[0] if len(set(self.dtypes)) == 1 else torch.uint8

    def _sizes(self) -> list[int]:
        kind = self._kind.itemsize
        return [prod(shape) * dtype.itemsize // kind for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]

    def __str__(self) -> str:
        tensors = ", ".join(f"{shape} {dtype}" for shape, dtype in zip(self.shapes, self.dtypes, strict=True))
        return tensors if self.structure.is_leaf else f"{self.structure} of {tensors}"
