"""What the ranks of a stack do together: agree on the next call, and pass portions of a batch through all layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.comm.partition import Partition

_PORTIONS = 4  # of a batch; the more, the fewer ranks wait, and the smaller the matrices


def pipeline(
    comm: Communicator,
    partition: Partition,
    batch: Tensor,
    through: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor],
) -> list[tuple[Tensor, Tensor]]:
    """Portions of a batch (B, ...) through the layers of all ranks, one behind the other.

    `through(portion, receive)` makes the state of a portion behind the layers owned here; `receive(state)` is the
    state before them: what comes from the rank before, or on the first rank `state` itself.

    Returns
    -------
    list of pair of Tensor
        Each portion and its state behind the last layer, on the owner of that; empty elsewhere.
    """
    rank = comm.rank
    if not partition.count(rank):
        return []
    ahead, behind = (partition.neighbor(rank, direction) for direction in (+1, -1))

    def receive(state: Tensor) -> Tensor:
        return state if behind is None else comm.recv(torch.empty_like(state), behind)

    found, waits = [], []
    for portion in batch.chunk(_PORTIONS):
        state = through(portion, receive)
        if ahead is None:
            found.append((portion, state))
        else:
            waits.append(comm.isend(state, ahead))
    for wait in waits:
        wait()
    return found
