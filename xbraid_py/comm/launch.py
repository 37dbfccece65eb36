"""What the launcher says of this process, and whether MPI agrees."""

from __future__ import annotations

import os

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
