"""The ranks of MPI, and how tensors of a device get to them; the only file that imports mpi4py."""

from __future__ import annotations

import ctypes
import math
import os
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from xbraid_py.comm import watchdog
from xbraid_py.comm.agreement import check_launcher
from xbraid_py.comm.base import Communicator, SerialCommunicator

# A rank that waits asks so many times in a row, and then sleeps so many seconds between two questions.
PATIENCE = 20
NAP = 1e-4


class MPICommunicator(Communicator):
    """The ranks of an `mpi4py.MPI.Comm`; tensors travel without packing or pickling.

    Where more ranks than cores share a machine, a rank that waits sleeps, and leaves its core to the others.
    Tensors on a device go through pinned host memory, or directly where MPI is CUDA-aware (`XBRAID_CUDA_AWARE`
    set to 0 or 1 overrides what MPI says of itself).

    Parameters
    ----------
    comm : mpi4py.MPI.Comm
        The ranks.
    whole : MPICommunicator, optional
        What `comm` was split from, if it was.
    """

    def __init__(self, comm, whole: MPICommunicator | None = None):
        self.mpi = comm
        self.rank = comm.Get_rank()
        self.size = comm.Get_size()
        self.staging = whole.staging if whole else Staging(cuda_aware(_mpi_reads_devices))
        self.library = whole.library if whole else _library()
        self.is_alike = bool(whole and whole.is_alike)
        # The ranks of the job, for whoever asks whom this one waits for.
        self._ranks = _ranks_of_the_job(comm)
        # The ranks of other groups are on the same cores, so a group cannot count for itself.
        self.oversubscribed = whole.oversubscribed if whole else _oversubscribed(comm)

    def isend(self, tensor, dest):
        request = self.mpi.Isend(self.staging.outgoing(tensor), dest)
        return lambda: self.wait(request, dest)

    def recv(self, out, source):
        return self.irecv(out, source)()

    def irecv(self, out, source):
        buffer, filled = self.staging.incoming(out)
        request = self.mpi.Irecv(buffer, source)

        def finish():
            self.wait(request, source)
            return filled()

        return finish

    def bcast(self, value, root=0):
        return self._together(lambda: self.mpi.bcast(value, root))

    def broadcast(self, tensor, root=0):
        if self.rank == root:
            self.wait(self.mpi.Ibcast(self.staging.outgoing(tensor), root))
            return tensor
        buffer, filled = self.staging.incoming(tensor)
        self.wait(self.mpi.Ibcast(buffer, root))
        return filled()

    def allgather(self, rows, counts):
        width = math.prod(rows.shape[1:])
        buffer, filled = self.staging.incoming(rows.new_empty((sum(counts), *rows.shape[1:])))
        sizes = [count * width for count in counts]
        self.wait(self.mpi.Iallgatherv(self.staging.outgoing(rows), [buffer, sizes]))
        return filled()

    def gather(self, value, root=0):
        return self._together(lambda: self.mpi.gather(value, root))

    def barrier(self):
        self.wait(self.mpi.Ibarrier())

    def abort(self, status):
        _end_job(status)

    def _split(self, color, key):
        group = self.mpi.Split(color, key)
        if group.Get_size() > 1:
            return MPICommunicator(group, self)
        group.Free()
        return SerialCommunicator(end=_end_job)

    def misses_a_rank(self, error):
        return is_of_lost_rank(error)

    def line(self):
        from mpi4py import MPI

        # The watchdog has a thread of its own.
        return _SideLine(self.mpi.Dup()) if MPI.Query_thread() == MPI.THREAD_MULTIPLE else None

    def wait(self, request, peer: int | None = None) -> None:
        """Wait for a request to or from a rank, or of all ranks."""
        watchdog.begin(self._ranks if peer is None else self._ranks[peer : peer + 1])
        try:
            if not self.oversubscribed:
                request.Wait()
                return
            tests = 0
            while not request.Test():
                tests += 1
                if tests < PATIENCE:
                    os.sched_yield()
                else:
                    time.sleep(NAP)
        finally:
            watchdog.end()

    def _together(self, call: Callable[[], Any]) -> Any:
        # Messages of objects cannot be waited for asleep: they are only begun when all ranks are there.
        if self.oversubscribed:
            self.barrier()
        watchdog.begin(self._ranks)
        try:
            return call()
        finally:
            watchdog.end()


class _SideLine:
    """A line for the watchdog, over a communicator of its own."""

    def __init__(self, comm):
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._sent: list[Any] = []

    def send(self, word, dest):
        self._sent = [request for request in self._sent if not request.Test()]
        self._sent.append(self._comm.isend(word, dest))

    def poll(self):
        from mpi4py import MPI

        found, status = [], MPI.Status()
        while self._comm.iprobe(status=status):
            found.append((status.Get_source(), self._comm.recv(source=status.Get_source())))
        return found

    def meet(self, seconds):
        request, until = self._comm.Ibarrier(), time.monotonic() + seconds
        while not request.Test():
            if time.monotonic() > until:
                return False
            time.sleep(10 * NAP)
        return True


def _library() -> str:
    """The MPI library and its version, in a line."""
    from mpi4py import MPI

    return " ".join(MPI.Get_library_version().split("\n")[0].split())


def _ranks_of_the_job(comm) -> tuple[int, ...]:
    """Numbers of the ranks of `comm` among all of the job."""
    from mpi4py import MPI

    group, everybody = comm.Get_group(), MPI.COMM_WORLD.Get_group()
    return tuple(group.Translate_ranks(range(group.Get_size()), everybody))


def _oversubscribed(comm) -> bool:
    """Whether more ranks of `comm` than there are cores share this machine."""
    from mpi4py import MPI

    neighbors = comm.Split_type(MPI.COMM_TYPE_SHARED)
    # Ranks may be bound to cores of their own: all that are at hand is what counts.
    cores = set().union(*neighbors.allgather(_own_cores()))
    crowded = neighbors.Get_size() > len(cores)
    neighbors.Free()
    return crowded


def _own_cores() -> set[int]:
    """Cores that this process may use."""
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))


@cache
def _mpi_reads_devices() -> bool:
    """What the MPI library says of buffers on CUDA devices; MPICH and Open MPI know the question."""
    from mpi4py import MPI

    try:
        # Looks in the libraries that the extension is linked with, MPI among them.
        return ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support() == 1
    except (AttributeError, OSError):
        return False


def _end_job(status: int) -> None:
    """End all processes of this job, those in no group of ours included."""
    from mpi4py import MPI

    # Abort of a smaller communicator need not end the others. Alone, there is nobody to end, and MPI would print.
    if MPI.COMM_WORLD.Get_size() == 1:
        os._exit(status)
    MPI.COMM_WORLD.Abort(status)


def is_of_lost_rank(error: BaseException) -> bool:
    """Whether MPI says by an error that a process at the other end is gone."""
    from mpi4py import MPI

    names = ("ERR_OTHER", "ERR_INTERN", "ERR_PROC_FAILED", "ERR_PROC_ABORTED")  # not every mpi4py has the last ones
    lost = [getattr(MPI, name) for name in names if hasattr(MPI, name)]
    return isinstance(error, MPI.Exception) and error.Get_error_class() in lost


def what_is_missing() -> str | None:
    """What a process needs to have MPI; None if it has all."""
    try:
        from mpi4py import MPI  # noqa: F401
    except ModuleNotFoundError:
        return "mpi4py is not installed"
    except (ImportError, RuntimeError) as error:
        return f"mpi4py finds no MPI library ({str(error).splitlines()[0]})"
    return None


def world() -> Communicator:
    """All ranks of this job of MPI; see `kinds.world`."""
    from mpi4py import MPI

    comm = MPI.COMM_WORLD
    check_launcher(comm.Get_size())
    return communicator_of(comm)


def communicator_of(comm) -> Communicator:
    """The one `Communicator` of an `mpi4py.MPI.Comm`; see `kinds.as_communicator`."""
    if comm.Get_size() == 1:
        return SerialCommunicator(end=_end_job)
    # Kept with the MPI communicator, as long as it lives: it is handed over with every batch, and counts its neighbors.
    found = comm.Get_attr(_keyval())
    if found is None:
        found = MPICommunicator(comm)
        comm.Set_attr(_keyval(), found)
    return found


@cache
def _keyval() -> int:
    """The key of an attribute of MPI communicators; their duplicates do not have it."""
    from mpi4py import MPI

    return MPI.Comm.Create_keyval()


# Numbers that numpy or MPI does not know travel as integers of the same size: only their bits matter.
_BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16}

# What users tell their MPI about device memory: Cray's MPICH; MPICH; Open MPI 4.
_SETTINGS = ("MPICH_GPU_SUPPORT_ENABLED", "MPIR_CVAR_ENABLE_GPU", "OMPI_MCA_opal_cuda_support")
_NO = ("0", "false", "no", "off")


def cuda_aware(query: Callable[[], bool], environ=os.environ) -> bool:
    """Whether MPI takes buffers on a CUDA device.

    `XBRAID_CUDA_AWARE=1` or `0` decides, where it is set. Otherwise MPI is asked, unless one of the variables
    by which users switch its support off does so: `MPICH_GPU_SUPPORT_ENABLED` (Cray's MPICH, where 1 also switches
    it on), `MPIR_CVAR_ENABLE_GPU` (MPICH), `OMPI_MCA_opal_cuda_support` (Open MPI 4).

    Parameters
    ----------
    query : callable
        What the MPI library says of itself.

    Raises
    ------
    ValueError
        If `XBRAID_CUDA_AWARE` is neither 0 nor 1.
    """
    ours = environ.get("XBRAID_CUDA_AWARE", "")
    if ours not in ("", "0", "1"):
        raise ValueError(f"XBRAID_CUDA_AWARE={ours} is neither 0 nor 1; use 0 to send through host memory")
    if ours:
        return ours == "1"
    if any(environ.get(name, "").lower() in _NO for name in _SETTINGS):
        return False
    return environ.get("MPICH_GPU_SUPPORT_ENABLED") == "1" or query()


class Staging:
    """How a tensor becomes a buffer that MPI reads or writes.

    Pinned memory comes from torch's allocator of host memory, which keeps blocks for reuse, and holds a
    block back until the events of the asynchronous copies from it have passed: a buffer may be let go
    while its copy to the device is still under way.

    Parameters
    ----------
    direct : bool
        Whether MPI reads and writes the memory of CUDA devices itself.
    """

    def __init__(self, direct: bool = False):
        self.direct = direct

    def is_remote(self, tensor: torch.Tensor) -> bool:
        """Whether the processor cannot read the tensor's memory."""
        return not tensor.is_cpu

    def outgoing(self, tensor: torch.Tensor) -> Any:
        """A buffer with the values of `tensor`, complete; for tensors on the CPU their own memory if contiguous."""
        tensor = tensor.detach()
        if not self.is_remote(tensor):
            return _host_buffer(tensor.contiguous())
        if self.direct and tensor.is_cuda:
            return _DeviceBuffer(tensor.contiguous())
        # This copy waits for what the stream computes, and for itself.
        return _host_buffer(self._host(tensor).copy_(tensor))

    def incoming(self, out: torch.Tensor) -> tuple[Any, Callable[[], torch.Tensor]]:
        """A buffer to receive into, and a function for afterwards that fills `out` and returns it.

        On a device `out` is filled in the order of its current stream, without waiting.
        """
        target = out.detach()
        if self.is_remote(target) and not (self.direct and target.is_cuda):
            landing = self._host(target)
        elif target.is_contiguous():
            landing = target
        else:
            landing = torch.empty_like(target, memory_format=torch.contiguous_format)
        buffer = _DeviceBuffer(landing) if landing.is_cuda else _host_buffer(landing)

        def finish() -> torch.Tensor:
            if landing is not target:
                target.copy_(landing, non_blocking=True)
            return out

        return buffer, finish

    def _host(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def _host_buffer(tensor: torch.Tensor):
    # As an array of numpy: what mpi4py does with a tensor itself takes several times as long.
    return _bits(tensor).numpy()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(_BITS[tensor.dtype]) if tensor.dtype in _BITS else tensor


class _DeviceBuffer:
    """Memory of a CUDA device for MPI, all work on it done; it need not be torch's current device."""

    def __init__(self, tensor: torch.Tensor):
        torch.cuda.current_stream(tensor.device).synchronize()
        self.tensor = tensor  # keeps the memory alive as long as the message
        self.__cuda_array_interface__ = _bits(tensor).__cuda_array_interface__
