"""What all ranks have to do or say alike, or fail together, and the error with which they do."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from xbraid_py.comm.base import Communicator


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


class RunError(RuntimeError):
    """A run cannot go on, for a reason that is the same on every rank.

    NaN in the loss, an exhausted line search, a checkpoint that cannot be written. All ranks raise it
    together, so that `xbraid_py.run.launch` can end the job in order, with one message and exit status 1.
    """
