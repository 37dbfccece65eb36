"""What all ranks do or say alike, or fail together: errors, keys of calls, and whether the launcher agrees with MPI."""

from __future__ import annotations

import hashlib
import os
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


# What launchers tell the processes they start: (number of processes, own number).
_LAUNCHERS = (
    ("PMI_SIZE", "PMI_RANK"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("SLURM_NTASKS", "SLURM_PROCID"),
)


class LaunchError(RuntimeError):
    """The launcher started several processes that do not know of each other."""


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
