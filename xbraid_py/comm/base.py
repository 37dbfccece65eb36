"""What the library asks of a group of ranks, and the group of one rank."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from xbraid_py.comm.partition import Partition
from xbraid_py.comm.watchdog import Line

if TYPE_CHECKING:
    import torch


Value = TypeVar("Value")


def present(value: Value | None) -> Value:
    """A value that is None on other ranks, or in other calls, and never here: what an owner of rows has, a neighbor."""
    assert value is not None
    return value


class Communicator(ABC):
    """What the library asks of a group of ranks.

    Sends never wait for the receiver (`isend` returns a function that waits until the buffer is free
    again), and `begin_shift` waits for nobody; everything else is blocking. Messages between two ranks arrive in
    the order of sending. Tensors may be on any device; both ends have the same shape and type.
    """

    rank: int
    size: int
    # What the ranks talk by, whether they are known to run the same program (`agreement.same_installation`), and what
    # they say of their data (`agreement.hold`).
    library = "none"
    is_alike = False
    held: Mapping[str, str] = {}

    @abstractmethod
    def isend(self, tensor: torch.Tensor, dest: int) -> Callable[[], None]:
        """Start sending; the returned function waits until `tensor` may be overwritten."""

    @abstractmethod
    def recv(self, out: torch.Tensor, source: int) -> torch.Tensor:
        """Receive into `out` and return it."""

    def irecv(self, out: torch.Tensor, source: int) -> Callable[[], torch.Tensor]:
        """Start receiving into `out`; the returned function waits until it is there, and returns it."""
        return lambda: self.recv(out, source)

    @abstractmethod
    def bcast(self, value: Any, root: int = 0) -> Any:
        """`value` of rank `root` (any picklable object), on every rank."""

    @abstractmethod
    def broadcast(self, tensor: torch.Tensor, root: int = 0) -> torch.Tensor:
        """`tensor` of rank `root`, unchanged there; on the other ranks `tensor` is written and returned.

        Shape and type are known to all ranks, so nothing is pickled.
        """

    @abstractmethod
    def allgather(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Rows of all ranks, joined in the order of the ranks; `counts[r]` come from rank r."""

    @abstractmethod
    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        """Objects of all ranks in a list on `root`, None elsewhere."""

    @abstractmethod
    def abort(self, status: int) -> None:
        """End the whole job at once with exit status `status`."""

    def split(self, color: int, key: int = 0) -> Communicator:
        """The group of all ranks that pass the same `color`, ordered by `key`, then by rank. All ranks take part.

        The messages of different groups do not mix. A rank of a group that aborts ends the whole job.

        Raises
        ------
        ValueError
            On all ranks, if `color` is no integer from 0 on (and below 2**31) on any rank.
        """
        fits = isinstance(color, int) and 0 <= color < 2**31
        wrong = self.first_error(
            None if fits else f"color={color!r} on rank {self.rank} is not an integer from 0 on; use 0"
        )
        if wrong:
            raise ValueError(wrong[1])
        return self._split(color, key)

    @abstractmethod
    def _split(self, color: int, key: int) -> Communicator:
        """`split` with a color that is valid on all ranks."""

    def same(self, value: Any, what: str) -> None:
        """Raise the same `ValueError` on all ranks unless `value` is equal (==) on all of them.

        Parameters
        ----------
        value : Any
            What is to agree; picklable.
        what : str
            Its name in the message.
        """
        values = self.bcast(self.gather(value))
        if any(other != values[0] for other in values[1:]):
            raise ValueError(f"{what}={who_says_what(values)}: every rank must pass the same")

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.bcast(self.gather(None))

    def ordered_sum(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Sum over the rows of all ranks, in the order of the rows.

        Bitwise the same on any number of ranks: the summands are those of the rows, not of the ranks.
        """
        # Not `sum`: how that adds up a column depends on how many columns stand beside it.
        found = self.allgather(rows, counts)
        return found.cumsum(0)[-1] if len(found) else found.sum(0)

    def redistribute(self, rows: torch.Tensor, source: Partition, target: Partition) -> torch.Tensor:
        """Rows owned as in `source`, handed to their owners in `target`; no message if these agree."""
        if source == target:
            return rows
        out = rows.new_empty((target.count(self.rank), *rows.shape[1:]))
        waits = []
        for peer, part in source.overlaps(self.rank, target):
            if peer == self.rank:
                shift = source.first(self.rank) - target.first(self.rank)
                out[part.start + shift : part.stop + shift] = rows[part]
            else:
                waits.append(self.isend(rows[part].contiguous(), peer))
        for peer, part in target.overlaps(self.rank, source):
            if peer != self.rank:
                self.recv(out[part], peer)
        for wait in waits:
            wait()
        return out

    def shift(self, edge: torch.Tensor, partition: Partition, direction: int) -> torch.Tensor | None:
        """Pass `edge` on to the owner of the next rows in `direction`; the one from the other side.

        Returns None on ranks without rows and at the end that nothing comes from.
        """
        return self.begin_shift(edge, partition, direction)()

    def begin_shift(
        self, edge: torch.Tensor, partition: Partition, direction: int
    ) -> Callable[[], torch.Tensor | None]:
        """The same, but returns at once, with a function that waits for the edge from the other side."""
        if not partition.count(self.rank):
            return lambda: None
        ahead = partition.neighbor(self.rank, direction)
        behind = partition.neighbor(self.rank, -direction)
        received = self.irecv(edge.new_empty(edge.shape), behind) if behind is not None else lambda: None
        sent = self.isend(edge.contiguous(), ahead) if ahead is not None else lambda: None

        def finish() -> torch.Tensor | None:
            found = received()
            sent()
            return found

        return finish

    def __deepcopy__(self, memo):
        # A copy of what is shared by ranks is for the same ranks.
        return self

    def __reduce__(self):
        if self.size > 1:
            raise TypeError(
                f"a communicator of {self.size} ranks cannot be pickled, nor can a module that is shared by them: a "
                f"file of one rank would have only the layers of that rank; save model.state_dict(), which every rank "
                f"calls, or to_sequential(model), a plain module"
            )
        return SerialCommunicator, ()

    def line(self) -> Line | None:
        """A line beside the work for `Watchdog`; None where nobody can be missing. Collective."""
        return None

    def refuse_replicas(self) -> None:
        """Raise `ValueError` on all ranks within a forward pass of torch's that takes them for replicas of a model."""
        return

    def common_ranks(self, ranks: Iterable[int]) -> list[int]:
        """Which of these ranks of `torch.distributed` are here, sorted; none where ranks are of another kind."""
        return []

    def misses_a_rank(self, error: BaseException) -> bool:
        """Whether an error of a message says that the process at the other end is gone."""
        return False

    def first_error(self, message: str | None) -> tuple[int, str] | None:
        """Lowest rank that passes a message, with it, on every rank; None if no rank does."""
        found = self.gather(message)
        if found is not None:
            found = next(((rank, text) for rank, text in enumerate(found) if text is not None), None)
        return self.bcast(found)


def who_says_what(values: Sequence[Any]) -> str:
    """`64 on rank 0 but 32 on ranks 1-3, 5`: the values of all ranks, each once."""
    found: list[tuple[Any, list[int]]] = []
    for rank, value in enumerate(values):
        for known, ranks in found:
            if known == value:
                ranks.append(rank)
                break
        else:
            found.append((value, [rank]))
    return " but ".join(f"{value!r} on {_ranks(ranks)}" for value, ranks in found)


def _ranks(ranks: Sequence[int]) -> str:
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    return f"rank{'s' * (len(ranks) > 1)} " + ", ".join("-".join(map(str, run)) for run in runs)


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor: messages of bytes are messages of all types."""
    import torch

    # A tensor of one number is contiguous whatever its strides.
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


class SerialCommunicator(Communicator):
    """One rank, no messages.

    Parameters
    ----------
    end : callable
        Ends the job with an exit status; where the job has other ranks (this one is a group of its own), those too.
    """

    rank = 0
    size = 1

    def __init__(self, end: Callable[[int], Any] = os._exit):
        self._end = end

    def isend(self, tensor, dest):
        raise ValueError(f"dest={dest}: a serial run has no other rank to send to")

    def recv(self, out, source):
        raise ValueError(f"source={source}: a serial run has no other rank to receive from")

    def bcast(self, value, root=0):
        return value

    def broadcast(self, tensor, root=0):
        return tensor

    def _split(self, color, key):
        return self

    def allgather(self, rows, counts):
        return rows.contiguous()  # as after a message: the layout in memory decides the order of later sums

    def gather(self, value, root=0):
        return [value]

    def abort(self, status):
        self._end(status)
