"""Gradients of the weights that all steps share: sums over the intervals of all ranks, in the order of the intervals.

Shape letters: `K` intervals owned here, `c` steps of each, `B` batch, `H` hidden size, `F` inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition

_AT_ONCE = 1 << 22  # numbers of the summands of all intervals that are held at once


def chained_sum(rows: Tensor, partition: Partition, comm: Communicator) -> Tensor:
    """Sum over the rows (K, ...) of all ranks, one after the other, on every rank.

    Bitwise the same on any number of ranks, as with `Communicator.ordered_sum`; here only the sum so far travels, from
    each rank to the next, and not the summands: they are as large as the weights.
    """
    total = rows.new_zeros(rows.shape[1:])
    if len(rows):
        behind, ahead = (partition.neighbor(comm.rank, direction) for direction in (-1, +1))
        if behind is not None:
            comm.recv(total, behind)
        for row in rows:
            total += row
        if ahead is not None:
            comm.isend(total, ahead)()
    return comm.broadcast(total, partition.owner(partition.num_rows - 1))


def weight_gradient(slopes: Tensor, values: Tensor, partition: Partition, comm: Communicator) -> tuple[Tensor, Tensor]:
    """The gradients of W (3 H, F) and b (3 H,) from those of W x + b at all steps.

    Parameters
    ----------
    slopes : (K c, B, 3 H) tensor
        Gradients of W x + b.
    values : (K c, B, F) tensor
        x.
    partition : Partition
        Of the intervals.
    comm : Communicator
    """
    count, width = partition.count(comm.rank), values.shape[-1] + 1
    # The ones make b a column of W.
    values = torch.cat([values, values.new_ones(*values.shape[:-1], 1)], -1)
    length = len(values) // max(count, 1) * values.shape[1]
    values, slopes = values.reshape(count, length, width), slopes.reshape(count, length, slopes.shape[-1])
    # The same pieces on any number of ranks.
    at_once = max(1, _AT_ONCE // (partition.num_rows * width))
    found = []
    for first in range(0, slopes.shape[-1], at_once):
        rows = torch.bmm(slopes[..., first : first + at_once].transpose(1, 2), values)
        found.append(chained_sum(rows, partition, comm))
    both = torch.cat(found)
    return both[:, :-1].contiguous(), both[:, -1].contiguous()
