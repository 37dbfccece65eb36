"""What all ranks do or say alike, or fail together: errors, keys of calls, and whether the launcher agrees with MPI."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xbraid_py.comm import watchdog
from xbraid_py.comm.base import Communicator, who_says_what

if TYPE_CHECKING:
    import torch


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


END = "the end of the program"  # as a call
_HINT = (
    "every rank makes the same calls in the same order, with as many batches; one for all ranks, as state_dict() or an "
    "evaluation, cannot stand behind `if rank == 0:`, only what follows it can, as torch.save(state, file)"
)
_met: dict[int, weakref.ref[Communicator]] = {}  # by `agree`


def met() -> list[Communicator]:
    """The communicators whose ranks have agreed on a call, in the order of the first ones."""
    found = (reference() for reference in _met.values())
    return [comm for comm in found if comm is not None and comm.size > 1]


class CallError(RuntimeError):
    """Ranks that meet are in different calls."""


def agree(comm: Communicator, key: Any, what: str, call: str) -> None:
    """Raise the same error on all ranks unless they make the same call, with the same key: they would wait for ever.

    A message of one number, since it comes before every call that all ranks take part in.

    Parameters
    ----------
    comm : Communicator
    key : Any
        What `repr` says all of.
    what : str
        Name of the key, for the message.
    call : str
        As the user knows it.

    Raises
    ------
    CallError
        If the ranks are in different calls.
    ValueError
        If their keys differ, or see `Communicator.refuse_replicas`.
    """
    _met.setdefault(id(comm), weakref.ref(comm))
    watchdog.enter(call)
    comm.refuse_replicas()
    if not _differ(comm, (call, key)):
        return
    calls = comm.bcast(comm.gather(call))
    if len(set(calls)) > 1:
        where = who_says_what([_Said(each) for each in calls])
        raise CallError(f"ranks are in different calls: {where}; {_HINT}")
    try:
        comm.same(key, what)
    except ValueError as error:
        raise ValueError(f"{error}; {_HINT}") from None


def agree_on_all(comm: Communicator, named: Mapping[str, Any], what: str) -> None:
    """Raise the same `ValueError` on all ranks, with each name whose values differ and these, unless none does.

    Parameters
    ----------
    named : mapping of str to Any
        Values of which `repr` says all; the same names on all ranks or not.
    what : str
        What has these names, for the message.
    """
    if not _differ(comm, sorted(named.items())):
        return
    found = comm.gather({name: repr(value) for name, value in named.items()})
    text = None
    if found is not None:
        names = [
            n for n in dict.fromkeys(n for each in found for n in each) if len({each.get(n) for each in found}) > 1
        ]
        said = [f"{name}={who_says_what([_Said(each.get(name, 'nothing')) for each in found])}" for name in names[:5]]
        more = f", and {len(names) - 5} more" if len(names) > 5 else ""
        text = f"{what}: {'; '.join(said)}{more}; every rank must have the same"
    raise ValueError(comm.bcast(text))


class _Said(str):
    """A `repr` that was made elsewhere."""

    __repr__ = str.__str__


def _differ(comm: Communicator, key: Any) -> bool:
    """Whether not all ranks pass the same key, by a message of one number."""
    if comm.size == 1:
        return False
    import torch

    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()  # the same in all processes
    number = torch.tensor([int.from_bytes(digest, "little") >> 1], dtype=torch.int64)
    return len(set(comm.allgather(number, (1,) * comm.size).tolist())) > 1


def same_installation(comm: Communicator, **more: str) -> None:
    """Raise the same `ValueError` on all ranks unless they run the same code, by the same libraries.

    Collective, and looked at once for a communicator.

    Parameters
    ----------
    **more : str
        Further versions, by name.
    """
    if comm.size > 1 and not comm.is_alike:
        import torch

        versions = {"python": platform.python_version(), "torch": torch.__version__, "MPI": comm.library}
        agree_on_all(comm, versions | more, "versions")
        agree_on_all(comm, code(), "files of the program, by their digests")
        comm.is_alike = True


def same_arguments(comm: Communicator, arguments: Mapping[str, Any], **more: str) -> None:
    """`same_installation`, and the same for the arguments of a call, by name; of dataclasses each field. Collective."""
    same_installation(comm, **more)
    named: dict[str, Any] = {}
    for name, value in arguments.items():
        if dataclasses.is_dataclass(value):
            named |= {f"{name}.{each.name}": getattr(value, each.name) for each in dataclasses.fields(value)}
        else:
            named[name] = value
    agree_on_all(comm, named, "arguments")


def hold(comm: Communicator, name: str, *tensors: torch.Tensor) -> None:
    """Note what this rank has of the data, which all ranks hold alike, for `same_data` to compare. No message."""
    if comm.size > 1:
        import torch

        digest = hashlib.blake2b(digest_size=6)
        for tensor in tensors:
            digest.update(f"{tuple(tensor.shape)} {tensor.dtype} ".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        comm.held = {**comm.held, name: f"{'x'.join(map(str, tensors[0].shape))} by digest {digest.hexdigest()}"}


def same_data(comm: Communicator) -> None:
    """Raise the same `ValueError` on all ranks unless they hold the same data. Collective."""
    if comm.size > 1:
        agree_on_all(comm, comm.held, "data")


@cache
def code() -> dict[str, str]:
    """Digests of the files of this package and of the program, with what it has loaded, or may, from beside it."""
    package = Path(__file__).resolve().parents[1]
    found = {str(path.relative_to(package.parent)): path for path in package.rglob("*.py")}
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program is not None:
        folder = Path(program).resolve().parent
        loaded = {Path(name).resolve() for m in [*sys.modules.values()] if (name := getattr(m, "__file__", None))}
        for each in loaded:
            if _is_beside(each, folder, package):
                # Of a package the rest may be loaded later.
                files = each.parent.rglob("*.py") if each.name == "__init__.py" else [each]
                found |= {str(file.relative_to(folder)): file for file in files if _is_beside(file, folder, package)}
    return {name: hashlib.blake2b(path.read_bytes(), digest_size=6).hexdigest() for name, path in sorted(found.items())}


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
_TORCH = ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT")


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
    return _launched(environ)[1]


def launcher_size(environ=os.environ) -> int:
    """Number of processes according to the launcher; 1 without one. Needs no MPI."""
    return _launched(environ)[0]


def started_by_torch(environ=os.environ) -> bool:
    """Whether this process is one of `torchrun`, or of what sets the same variables, and not of a launcher of MPI."""
    if not all(name in environ for name in _TORCH):
        return False
    # A launcher of MPI may have started torchrun, one on each node.
    return "TORCHELASTIC_RUN_ID" in environ or not any(name in environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE"))


def _launched(environ) -> tuple[int, int]:
    if started_by_torch(environ):
        return int(environ["WORLD_SIZE"]), int(environ["RANK"])
    for size_name, rank_name in _LAUNCHERS:
        if size_name in environ:
            return int(environ[size_name]), int(environ.get(rank_name, 0))
    return 1, 0


def _is_beside(path: Path, folder: Path, package: Path) -> bool:
    """Whether a file belongs to the program in a folder, and not to a library that is installed below it."""
    if path.suffix != ".py" or not path.is_relative_to(folder) or path.is_relative_to(package):
        return False
    return "site-packages" not in path.parts and path.is_file()
