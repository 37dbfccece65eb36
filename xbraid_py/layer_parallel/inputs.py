"""What a stack is called with: a state of one tensor or of several, and inputs that every layer gets beside it.

Shape letters: `N` layers, `n` of them owned here, `B` batch, `q` numbers of the further inputs that need gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.comm.tree import TreeSum, nodes_between
from xbraid_py.layer_parallel.pipeline import Portions
from xbraid_py.layers.bound import Bound
from xbraid_py.layers.dense import DenseBlock
from xbraid_py.layers.module_block import ModuleBlock
from xbraid_py.layers.trees import Packing, flatten

# Positional and keyword arguments, from the tensors among them that need gradients.
Arguments = Callable[[Sequence[Tensor]], tuple[tuple, dict]]
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Further:
    """What each layer, or module, gets beside its state in one call.

    Where a batch is cut into portions, so are tensors that have as many rows on their first axis as there are samples;
    all others go to each portion whole.

    Parameters
    ----------
    inputs, named
        Trees of tensors and of anything else.
    samples : int
        B.

    Attributes
    ----------
    leaves : list
        All that the trees consist of.
    tensors : list of Tensor
        Those that need gradients.
    key : tuple
        What all ranks must pass alike.
    form : tuple
        What of it decides whether a block can be evaluated.
    """

    def __init__(self, inputs: Sequence[Any], named: Mapping[str, Any], samples: int):
        self.samples = samples
        self.leaves, self._structure = flatten((tuple(inputs), dict(named)))
        with_grad = torch.is_grad_enabled()
        self._wanted = [
            n for n, leaf in enumerate(self.leaves) if with_grad and isinstance(leaf, Tensor) and leaf.requires_grad
        ]
        self.tensors: list[Tensor] = [self.leaves[n] for n in self._wanted]
        shapes = tuple(
            (tuple(leaf.shape), leaf.dtype, n in self._wanted) if isinstance(leaf, Tensor) else None
            for n, leaf in enumerate(self.leaves)
        )
        self.form: tuple = (str(self._structure), shapes)
        self.key = (*self.form, tuple(_said(leaf) for leaf in self.leaves if not isinstance(leaf, Tensor)))

    @property
    def cut(self) -> tuple[bool, ...]:
        """Which of the leaves are cut into portions."""
        return tuple(map(self._is_cut, self.leaves))

    def of_portion(self, portions: Portions | None = None, number: int = 0) -> tuple[list[Tensor], Arguments]:
        """The tensors that need gradients, detached, of a portion or the batch; and what makes arguments of such."""
        leaves = [leaf.detach() if isinstance(leaf, Tensor) else leaf for leaf in self.leaves]
        if portions is not None and len(portions) > 1:
            leaves = [self._part(leaf, portions, number) for leaf in leaves]

        def arguments(tensors: Sequence[Tensor]) -> tuple[tuple, dict]:
            own = list(leaves)
            for n, tensor in zip(self._wanted, tensors, strict=True):
                own[n] = tensor
            return self._structure.build(own)

        return [leaves[n] for n in self._wanted], arguments

    def sums(
        self,
        rows: Mapping[int, Sequence[Tensor]],
        portions: Portions,
        partition: Partition,
        comm: Communicator,
        dtype: torch.dtype | None = None,
    ) -> list[Tensor]:
        """Gradients of `tensors`, the same on every rank and of the same bits on any number of them; collective.

        Parameters
        ----------
        rows : mapping of int to sequence of (n, q) tensor
            For each portion the gradients of its tensors that the layers owned here give, a row for each.
        portions : Portions
        partition : Partition
            Of the layers.
        comm : Communicator
        dtype : torch.dtype, optional
            Of the rows, where it is not that of the tensors.
        """
        found = []
        for k, tensor in enumerate(self.tensors):
            parts = [rows[number][k] for number in sorted(rows)]
            if not parts:
                here = tensor.new_empty((0, tensor.numel()), dtype=dtype)
            elif len(portions) > 1 and self._is_cut(tensor):
                here = torch.cat(parts, 1)
            else:
                here = _tree_sum(parts)
            found.append(sum_over_layers(here.contiguous(), partition, comm).view(tensor.shape))
        return found

    def _is_cut(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == self.samples

    def _part(self, leaf: Any, portions: Portions, number: int) -> Any:
        if not self._is_cut(leaf):
            return leaf
        # Samples lie on the first axis of what the user gives, wherever a state has them.
        share = Portions.of(len(leaf), len(portions))
        return share.part(leaf, number)


class Inputs(Further):
    """The inputs of one call of a stack.

    Parameters
    ----------
    u : tensor or tree of tensors
    inputs, named
        As of `Further`.

    Attributes
    ----------
    state : (B, ...) tensor
        u, packed into one tensor if it is several.

    Raises
    ------
    ValueError
        If u is no state, or a further input that needs a gradient has another type than the state.
    """

    def __init__(self, u: Any, inputs: Sequence[Any], named: Mapping[str, Any]):
        self.packing: Packing | None = None
        self.state: Tensor = u
        if not isinstance(u, Tensor):
            self.state, self.packing = Packing.of(u)
        super().__init__(inputs, named, len(self.state) if self.state.dim() else 0)
        for tensor in self.tensors:
            if (tensor.dtype, tensor.device) != (self.state.dtype, self.state.device):
                raise ValueError(
                    f"a further input with a gradient is {tensor.dtype} on {tensor.device}, the state "
                    f"{self.state.dtype} on {self.state.device}; use .to(...)"
                )
        packed = None if self.packing is None else (str(self.packing.structure), self.packing.shapes)
        self.form, self.key = (packed, *self.form), (packed, *self.key)

    def user_state(self, state: Tensor) -> Any:
        """The output in the form of u."""
        return state if self.packing is None else self.packing.unpack(state)

    def bound(self, block: ModuleBlock, portions: Portions | None = None, number: int = 0) -> Bound:
        """A block with these inputs, or with those of one portion."""
        return Bound(block, *self.of_portion(portions, number), self.packing)

    def gradients(
        self, further: Mapping[int, Tensor], portions: Portions, partition: Partition, comm: Communicator, dtype
    ) -> list[Tensor]:
        """The same as `sums`, of rows (n, q) with the gradients of all tensors one behind the other, all of a type."""
        rows = {}
        for number, row in further.items():
            whole, _ = self.of_portion(portions, number)
            rows[number] = row.split([tensor.numel() for tensor in whole], 1)
        return self.sums(rows, portions, partition, comm, dtype)

    def check(self, block: ModuleBlock, spatial: Any, noise: float) -> None:
        """Raise `ValueError` if layers of that block cannot have such inputs, with these options of their stack."""
        if type(block.module) is DenseBlock:
            raise ValueError("a DenseBlock takes a state of one tensor and nothing else; leave further inputs out")
        if self.packing is not None and spatial is not None:
            raise ValueError(f"spatial={spatial} is for states of one tensor; leave it out")
        if noise and any(self.cut):
            raise ValueError(
                "accuracy: noise is estimated from a part of the samples, and further inputs have a row for each; use "
                "GradientControl(noise=0)"
            )


def part_error(what: str, use: str, error: Exception | None = None) -> ValueError:
    """The error for a block or module that makes something else of some of the samples than of all, or has an error.

    `use` is the option with which samples are not cut into portions.
    """
    if error is not None:
        return ValueError(
            f"{what} cannot be evaluated for some of the samples ({error}): a tensor with a row for each of them, such "
            f"as a mask, must be a further input, stack(u, mask), to be cut with them; one that only happens to have "
            f"as many rows needs another axis, table[None]; or use {use}"
        )
    return ValueError(
        f"{what} makes something else of some of the samples than of all: they must be on the first axis, and not be "
        f"mixed, nor may further inputs that are the same for all have as many rows (use table[None]); use {use}"
    )


def sum_over_layers(rows: Tensor, partition: Partition, comm: Communicator) -> Tensor:
    """The sum (q,) of rows (n, q) of the layers of all ranks, in one fixed tree; collective."""
    total = partition.num_rows
    spans = [(partition.first(r), partition.first(r) + partition.count(r)) for r in range(comm.size)]
    places = [nodes_between(total, *span) for span in spans]
    own = TreeSum(total)
    for n, row in enumerate(rows):
        own.add(spans[comm.rank][0] + n, row)
    values = [value for _, _, value in own.nodes()]
    here = torch.stack(values) if values else rows.new_empty((0, rows.shape[1]))
    every = comm.allgather(here, [len(each) for each in places])
    whole = TreeSum(total)
    for (level, index), value in zip((place for each in places for place in each), every, strict=True):
        whole.add(index, value, level)
    return whole.result()


def _tree_sum(parts: Sequence[Tensor]) -> Tensor:
    sums = TreeSum(len(parts))
    for number, part in enumerate(parts):
        sums.add(number, part)
    return sums.result()


def _said(leaf: Any) -> str:
    """What an input is, alike in all processes."""
    return repr(leaf) if isinstance(leaf, _PLAIN) else type(leaf).__qualname__
