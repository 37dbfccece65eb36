"""How the sequences of a call come, as of any recurrent module of torch, and how its results go back.

Shape letters: `L` steps, `B` batch, `F` inputs of a step, `H` hidden size, `D` layers times directions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence


@dataclass(frozen=True)
class Sequences:
    """Sequences as they are handed in, once they are known to be such.

    Packed ones are solved for in the order of their lengths, as they are packed.

    Parameters
    ----------
    x : (L, B, F), (B, L, F) or (L, F) tensor, or PackedSequence
    batch_first : bool
        Which of the first two.
    """

    x: Tensor | PackedSequence
    batch_first: bool

    @property
    def is_packed(self) -> bool:
        return isinstance(self.x, PackedSequence)

    @property
    def numbers(self) -> Tensor:
        """The tensor that the sequences are in."""
        return self.x.data if isinstance(self.x, PackedSequence) else self.x

    @property
    def is_batch(self) -> bool:
        """Whether there is an axis for the samples."""
        return isinstance(self.x, PackedSequence) or self.x.dim() == 3

    @property
    def size(self) -> tuple[int, int]:
        """L and B."""
        if isinstance(self.x, PackedSequence):
            return len(self.x.batch_sizes), int(self.x.batch_sizes[0])
        if not self.is_batch:
            return len(self.x), 1
        return self.x.shape[self.batch_first], self.x.shape[1 - self.batch_first]

    @property
    def lengths(self) -> Tensor | None:
        """Steps (B,) of each sample; None where all have as many."""
        return _lengths(self.x) if isinstance(self.x, PackedSequence) else None

    @property
    def key(self) -> tuple:
        """What must be alike on all ranks beside the numbers."""
        if not isinstance(self.x, PackedSequence):
            return (tuple(self.x.shape),)
        order = self.x.sorted_indices
        return tuple(self.x.batch_sizes.tolist()), None if order is None else tuple(order.tolist())

    def padded(self) -> Tensor:
        """All sequences (L, B, F)."""
        if isinstance(self.x, PackedSequence):
            return pad_packed_sequence(PackedSequence(self.x.data, self.x.batch_sizes))[0]
        if not self.is_batch:
            return self.x[:, None]
        return self.x.transpose(0, 1) if self.batch_first else self.x

    def states(self, given: Tensor) -> Tensor:
        """States (D, B, H) before the sequences, from those handed in."""
        if not self.is_batch:
            return given[:, None]
        return _ordered(given, self.x.sorted_indices) if isinstance(self.x, PackedSequence) else given

    def handed_back(self, output: Tensor | None, ends: tuple[Tensor, ...]) -> tuple:
        """Output (L, B, ...), if there is one, and states behind the sequences (D, B, H) as of such sequences."""
        if isinstance(self.x, PackedSequence):
            packed = None
            if output is not None:
                # Behind the end of a sample there is nothing.
                rows = pack_padded_sequence(output, _lengths(self.x)).data
                packed = PackedSequence(rows, *self.x[1:])
            return packed, tuple(_ordered(end, self.x.unsorted_indices) for end in ends)
        if not self.is_batch:
            return None if output is None else output[:, 0], tuple(end[:, 0] for end in ends)
        return output.transpose(0, 1) if self.batch_first and output is not None else output, ends


def _lengths(x: PackedSequence) -> Tensor:
    """Steps (B,) of each sample."""
    return (x.batch_sizes[:, None] > torch.arange(int(x.batch_sizes[0]))).sum(0)


def _ordered(states: Tensor, order: Tensor | None) -> Tensor:
    return states if order is None else states.index_select(1, order)


def problem_of(
    x: object, batch_first: bool, states: Mapping[str, object], weight: Tensor, input_size: int, sizes: tuple[int, int]
) -> str | None:
    """What is wrong with the arguments of a call, in one sentence; None if nothing is.

    Parameters
    ----------
    x
        The sequences.
    batch_first : bool
    states : mapping of str to object
        Those before the sequences, by name.
    weight : Tensor
        Any of the module's.
    input_size : int
        F.
    sizes : (D, H)
        Of the states.
    """
    axes = "(B, L, F)" if batch_first else "(L, B, F)"
    if not isinstance(x, Tensor | PackedSequence):
        what = f"x={type(x).__name__} must be a tensor {axes} or (L, F), or a PackedSequence"
        return f"{what}; use torch.nn.utils.rnn.pack_sequence(x, enforce_sorted=False) for sequences of unlike length"
    given = Sequences(x, batch_first)
    rows, wanted = given.numbers, (2,) if given.is_packed else (2, 3)
    if rows.dim() not in wanted or rows.shape[-1] != input_size or not rows.numel():
        shape = f"x has shape {tuple(rows.shape)}"
        if given.is_packed:
            return f"{shape} as packed; it must be (sum of the lengths, F) with F=input_size={input_size}"
        return f"{shape}; it must be {axes}, or (L, F), with F=input_size={input_size}, and not empty"
    shape = (sizes[0], given.size[1], sizes[1]) if given.is_batch else sizes
    names = "(D, B, H)" if given.is_batch else "(D, H)"
    for name, tensor in (("x", rows), *states.items()):
        if not isinstance(tensor, Tensor):
            return f"{name}={type(tensor).__name__} must be a tensor with the shape {names}={shape}"
        if (tensor.dtype, tensor.device) != (weight.dtype, weight.device):
            what = f"{name} is {tensor.dtype} on {tensor.device}, the weights are {weight.dtype} on {weight.device}"
            return f"{what}; use {name}.to(...)"
        if tensor is not rows and tensor.shape != shape:
            return f"{name}={tuple(tensor.shape)} must be a tensor with the shape {names}={shape}"
    return None
