"""Messages between ranks: serial, or MPI.

The only file that imports mpi4py. A serial run is a run on one rank in which no message is sent.
Tensors that are sent or received are contiguous and on the CPU.
"""

from __future__ import annotations

import os
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch

from xbraid_py.grid import Partition

# What launchers tell the processes they start: (number of processes, own number).
_LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
)


# A rank that waits asks so many times in a row, and then sleeps so many seconds between two questions.
_PATIENCE = 20
_NAP = 1e-4


class LaunchError(RuntimeError):
    """The launcher started several processes that do not know of each other."""


class Communicator(ABC):
    """What the library asks of a group of ranks.

    Sends never wait for the receiver (`isend` returns a function that waits until the buffer is free
    again), and `begin_shift` waits for nobody; everything else is blocking. Messages between two ranks arrive in
    the order of sending.
    """

    rank: int
    size: int

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
    def allgather(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Rows of all ranks, joined in the order of the ranks; `counts[r]` come from rank r."""

    @abstractmethod
    def gather(self, value: Any, root: int = 0) -> list[Any] | None:
        """Objects of all ranks in a list on `root`, None elsewhere."""

    @abstractmethod
    def abort(self, status: int) -> None:
        """End the whole job at once with exit status `status`."""

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.bcast(self.gather(None))

    def ordered_sum(self, rows: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
        """Sum over the rows of all ranks, in the order of the rows.

        Bitwise the same on any number of ranks: the summands are those of the rows, not of the ranks.
        """
        return self.allgather(rows, counts).sum(0)

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
        ahead = partition.neighbour(self.rank, direction)
        behind = partition.neighbour(self.rank, -direction)
        received = self.irecv(edge.new_empty(edge.shape), behind) if behind is not None else lambda: None
        sent = self.isend(edge.contiguous(), ahead) if ahead is not None else lambda: None

        def finish() -> torch.Tensor | None:
            found = received()
            sent()
            return found

        return finish

    def first_error(self, message: str | None) -> tuple[int, str] | None:
        """Lowest rank that passes a message, with it, on every rank; None if no rank does."""
        found = self.gather(message)
        if found is not None:
            found = next(((rank, text) for rank, text in enumerate(found) if text is not None), None)
        return self.bcast(found)


class SerialCommunicator(Communicator):
    """One rank, no messages."""

    rank = 0
    size = 1

    def isend(self, tensor, dest):
        raise ValueError(f"dest={dest}: a serial run has no other rank to send to")

    def recv(self, out, source):
        raise ValueError(f"source={source}: a serial run has no other rank to receive from")

    def bcast(self, value, root=0):
        return value

    def allgather(self, rows, counts):
        return rows.contiguous()  # as after a message: the layout in memory decides the order of later sums

    def gather(self, value, root=0):
        return [value]

    def abort(self, status):
        os._exit(status)


class MPICommunicator(Communicator):
    """The ranks of an `mpi4py.MPI.Comm`; tensors travel without packing or pickling.

    Where more ranks than cores share a machine, a rank that waits sleeps, and leaves its core to the others.
    """

    def __init__(self, comm):
        from mpi4py import MPI

        self.mpi = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        neighbours = comm.Split_type(MPI.COMM_TYPE_SHARED)
        # Ranks may be bound to cores of their own: all that are at hand is what counts.
        cores = set().union(*neighbours.allgather(_own_cores()))
        self.oversubscribed = neighbours.Get_size() > len(cores)
        neighbours.Free()

    def isend(self, tensor, dest):
        request = self.mpi.Isend(tensor.detach(), dest)
        return lambda: self._wait(request)

    def recv(self, out, source):
        return self.irecv(out, source)()

    def irecv(self, out, source):
        request = self.mpi.Irecv(out, source)

        def finish():
            self._wait(request)
            return out

        return finish

    def bcast(self, value, root=0):
        self._meet()
        return self.mpi.bcast(value, root)

    def allgather(self, rows, counts):
        width = rows[:1].numel() if len(rows) else _row_size(rows)
        out = rows.new_empty((sum(counts), *rows.shape[1:]))
        self._wait(self.mpi.Iallgatherv(rows.contiguous(), [out, [count * width for count in counts]]))
        return out

    def gather(self, value, root=0):
        self._meet()
        return self.mpi.gather(value, root)

    def barrier(self):
        self._wait(self.mpi.Ibarrier())

    def abort(self, status):
        self.mpi.Abort(status)

    def _wait(self, request) -> None:
        if not self.oversubscribed:
            request.Wait()
            return
        tests = 0
        while not request.Test():
            tests += 1
            if tests < _PATIENCE:
                os.sched_yield()
            else:
                time.sleep(_NAP)

    def _meet(self) -> None:
        # Messages of objects cannot be waited for asleep: they are only begun when all ranks are there.
        if self.oversubscribed:
            self.barrier()


def _own_cores() -> set[int]:
    """Cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


def _row_size(rows: torch.Tensor) -> int:
    size = 1
    for extent in rows.shape[1:]:
        size *= extent
    return size


def check_launcher(size: int, environ=os.environ) -> None:
    """Raise `LaunchError` if the launcher started more processes than the communicator holds.

    An `mpirun` of another MPI than the library's, or `srun` without the right plugin, starts N
    independent runs of size 1 that would overwrite each other's files.
    """
    for size_name, _ in _LAUNCHERS:
        if size_name in environ:
            if environ[size_name] != str(size):
                raise LaunchError(
                    f"{size_name}={environ[size_name]} but MPI sees {size} process(es): the launcher does not "
                    f"belong to the MPI library of mpi4py. Start with the mpirun of that library "
                    f"(the one beside this python), or with `srun --mpi=pmi2` (MPICH) or `srun --mpi=pmix` "
                    f"(Open MPI); for a single process in a SLURM allocation use `srun -n 1`."
                )
            return


def launcher_rank(environ=os.environ) -> int:
    """This process's number according to its launcher; 0 without one. Needs no MPI."""
    for size_name, rank_name in _LAUNCHERS:
        if size_name in environ:
            return int(environ.get(rank_name, 0))
    return 0


def world() -> Communicator:
    """The communicator of all ranks of this job; serial where the job has one process.

    Raises
    ------
    LaunchError
        If the launcher started several processes that MPI does not join.
    """
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    check_launcher(comm.Get_size())
    return wrap(comm)


def wrap(comm=None) -> Communicator:
    """`comm` as a `Communicator`: a Communicator, an `mpi4py.MPI.Comm`, or None for a serial run."""
    if isinstance(comm, Communicator):
        return comm
    if comm is None or comm.Get_size() == 1:
        return SerialCommunicator()
    return MPICommunicator(comm)
