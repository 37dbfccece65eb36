"""Which kind of ranks: MPI's or torch's, by what is handed in, and by what has started the job."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Any

from xbraid_py.comm import mpi, process_group
from xbraid_py.comm.agreement import LaunchError, launcher_size, started_by_torch
from xbraid_py.comm.base import Communicator, SerialCommunicator
from xbraid_py.comm.guard import guarded


def world() -> Communicator:
    """The communicator of all ranks of this job, started by `mpirun` or by `torchrun`; serial for one process.

    The ranks are those of `torch.distributed` if its process group is there, or if `torchrun` has started this process:
    then it is made here, with gloo for tensors of the processor, and NCCL for those of GPUs if there is one for each
    rank. Otherwise they are MPI's. Collective. In a worker that such a process has spawned, as of a `DataLoader`, which
    runs the top of the program again, it is serial.

    Raises
    ------
    LaunchError
        If the launcher started several processes that MPI does not join, or that find no MPI.
    """
    if process_group.is_there():
        return process_group.world()
    if _is_worker():
        return SerialCommunicator()
    if started_by_torch():
        return process_group.world()
    missing = mpi.what_is_missing()
    if missing is None:
        return mpi.world()
    if launcher_size() > 1:
        raise LaunchError(
            f"a launcher of MPI has started {launcher_size()} processes, but {missing}; install it, or start with "
            f"`torchrun --nproc-per-node {launcher_size()}`, which needs no MPI"
        )
    return SerialCommunicator()


def _is_worker() -> bool:
    """Whether a process of the job has spawned this one to work for it."""
    # It has the variables of the launcher, but not its line to it: MPI_Init would end it, and torch wait for ever.
    # multiprocessing runs the program in it by a name that elsewhere means `__main__`. Ranks that are made by
    # `torch.multiprocessing.spawn` are no workers: they set torch's variables themselves.
    spawned = getattr(sys.modules.get("__mp_main__"), "__name__", None) == "__mp_main__"
    return spawned and ("TORCHELASTIC_RUN_ID" in os.environ or not started_by_torch())


def as_communicator(comm: Any = None) -> Communicator:
    """What a caller has as a `Communicator`; from then on its ranks are looked after, see `guard.guarded`.

    Parameters
    ----------
    comm : Communicator, mpi4py.MPI.Comm, torch.distributed.ProcessGroup or None
        The ranks; None for a serial run. Collective for what is met for the first time.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if isinstance(comm, Communicator):
        return guarded(comm)
    if comm is None:
        if started_by_torch() and launcher_size() > 1:
            size = os.environ["WORLD_SIZE"]
            warnings.warn(
                f"comm=None with WORLD_SIZE={size}: each process works alone, on all layers; use "
                f"comm=xbraid_py.world() to share the layers out, or "
                f"comm=xbraid_py.ProcessGrid(xbraid_py.world(), replicas={size}).layers for replicas",
                stacklevel=3,
            )
        return SerialCommunicator()
    if process_group.is_one(comm):
        return guarded(process_group.communicator_of(comm))
    if hasattr(comm, "Get_size"):
        return guarded(mpi.communicator_of(comm))
    raise TypeError(
        f"comm={comm!r} is no group of ranks that this process belongs to; use xbraid_py.world(), a communicator of "
        f"mpi4py, a process group of torch.distributed (mesh.get_group(...) of a device mesh), or None for one rank"
    )
