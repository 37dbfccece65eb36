"""What the ranks of a stack do together: agree on the next call, and pass portions of a batch through all layers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.grid import Partition

_PORTIONS = 4  # of a batch; the more, the fewer ranks wait, and the smaller the matrices


@contextmanager
def together(comm: Communicator) -> Iterator[None]:
    """What raises `ValueError` or `TypeError` on one rank within raises on all: the others must not wait for it.

    Nothing within may send a message.
    """
    problem = None
    try:
        yield
    except (ValueError, TypeError) as error:
        problem = error
    failed = comm.first_error(None if problem is None else f"{problem}")
    if problem is not None:
        raise problem
    if failed is not None:
        raise ValueError(failed[1])


def agree(comm: Communicator, key: Any, what: str) -> None:
    """Raise the same `ValueError` on all ranks unless they pass the same key: else they would wait for each other.

    A message of one number, since it comes before every call of a stack.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()  # the same in all processes
    number = torch.tensor([int.from_bytes(digest, "little") >> 1], dtype=torch.int64)
    if len(set(comm.allgather(number, (1,) * comm.size).tolist())) > 1:
        comm.same(key, what)


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
    ahead, behind = (partition.neighbour(rank, direction) for direction in (+1, -1))

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
