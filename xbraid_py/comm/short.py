"""Messages between two ranks in a shorter type than what they carry."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from xbraid_py.comm.base import Communicator
from xbraid_py.comm.partition import Partition


class ShortMessages(Communicator):
    """The same ranks, whose messages to each other (`isend`, `recv`, `irecv`, shifts) are rounded to a shorter type.

    What goes to all ranks, rows that find new owners, and tensors of other kinds or of shorter types are as they are.

    Parameters
    ----------
    comm : Communicator
    dtype : torch.dtype
        Such as bfloat16, which halves messages of float32 and keeps 8 bits of each number.
    """

    def __init__(self, comm: Communicator, dtype: torch.dtype):
        self.whole, self.dtype = comm, dtype
        self.rank, self.size, self.library = comm.rank, comm.size, comm.library

    def _is_longer(self, tensor: Tensor) -> bool:
        return tensor.is_floating_point() and tensor.element_size() > self.dtype.itemsize

    def isend(self, tensor: Tensor, dest: int) -> Callable[[], None]:
        return self.whole.isend(tensor.to(self.dtype) if self._is_longer(tensor) else tensor, dest)

    def recv(self, out: Tensor, source: int) -> Tensor:
        return self.irecv(out, source)()

    def irecv(self, out: Tensor, source: int) -> Callable[[], Tensor]:
        if not self._is_longer(out):
            return self.whole.irecv(out, source)
        arriving = self.whole.irecv(out.new_empty(out.shape, dtype=self.dtype), source)
        return lambda: out.copy_(arriving())

    def bcast(self, value: Any, root: int = 0) -> Any:
        return self.whole.bcast(value, root)

    def broadcast(self, tensor: Tensor, root: int = 0) -> Tensor:
        return self.whole.broadcast(tensor, root)

    def allgather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        return self.whole.allgather(rows, counts)

    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        return self.whole.gather(value, root)

    def redistribute(self, rows: Tensor, source: Partition, target: Partition) -> Tensor:
        return self.whole.redistribute(rows, source, target)

    def abort(self, status: int) -> None:
        self.whole.abort(status)

    def _split(self, color: int, key: int) -> Communicator:
        return ShortMessages(self.whole.split(color, key), self.dtype)
