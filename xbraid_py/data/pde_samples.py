"""Samples of a problem on a mesh, drawn and solved in parallel: each rank makes its rows, and all ranks get all.

They may be stored in a file with what they were made from. That is one of global arrays with checksums, as checkpoints
are: any number of ranks writes and reads it, links and foreign filters are refused, and it appears under its name only
when it is complete. Shape letters: `B` samples, `C` channels, `n` points in each direction.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.partition import Partition
from xbraid_py.data.darcy import Darcy, load_public
from xbraid_py.data.dataset import check_dtype, whole_number
from xbraid_py.data.elliptic import Poisson
from xbraid_py.data.pde_dataset import PdeDataset, split
from xbraid_py.run.store import read
from xbraid_py.run.store.write import Shard, save

# By name, as stored files know them.
PROBLEMS = {"poisson": Poisson, "darcy": Darcy}
_SHOWN_EVERY = 20  # samples, each a millisecond or two


class PdeProblem(Protocol):
    """What is asked of a problem: a frozen dataclass of its settings, such as `Poisson` or `Darcy`.

    Attributes
    ----------
    name : str
    version : int
        Changes whenever a seed gives other samples.
    channels, default_channels : tuple of str
        What inputs may hold, and what they hold if nothing is said.
    targets : tuple of str
        Arrays that may be learned; the first one if nothing is said.
    shapes : dict of str to tuple of int
        Arrays of one sample.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]  # a problem is a dataclass of its settings

    name: ClassVar[str]
    version: ClassVar[int]
    channels: ClassVar[tuple[str, ...]]
    default_channels: ClassVar[tuple[str, ...]]
    targets: ClassVar[tuple[str, ...]]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]: ...

    @property
    def mesh(self) -> int: ...

    def sample(self, seed: int, number: int) -> dict[str, np.ndarray]:
        """Arrays of sample `number`, float64; they depend on nothing else."""
        ...

    def channel(self, name: str, arrays: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """A channel, of a shape that broadcasts to (B, n, n)."""
        ...


@dataclass(frozen=True, eq=False)
class PdeSamples:
    """Samples 0 .. B - 1 of the sequence that a seed gives.

    Attributes
    ----------
    problem : PdeProblem
    seed : int
    arrays : dict of str to torch.Tensor
        float64, (B, ...) each, as `problem.shapes` says.
    """

    problem: PdeProblem
    seed: int
    arrays: dict[str, torch.Tensor]

    def dataset(
        self,
        channels: Sequence[str] | None = None,
        target: str | None = None,
        dtype: torch.dtype = torch.float64,
    ) -> PdeDataset:
        """Inputs (B, C, n, n) and targets (B, n, n), or (B, 1) for a number, for a network.

        Parameters
        ----------
        channels : sequence of str, optional
            Of `problem.channels`, in the order of the inputs; by default `problem.default_channels`.
        target : str, optional
            One of `problem.targets`; by default the first.
        dtype : torch.dtype

        Raises
        ------
        ValueError
            If a name is none of the problem's, or is given twice.
        TypeError
            If `dtype` is no floating-point type.
        """
        known = self.problem.channels
        channels = self.problem.default_channels if channels is None else channels
        if isinstance(channels, str) or not channels or len(set(channels)) < len(channels) or set(channels) - {*known}:
            raise ValueError(
                f"channels={channels!r} must be different names of {', '.join(known)}; use "
                f"{list(self.problem.default_channels)}"
            )
        target = self.problem.targets[0] if target is None else target
        if target not in self.problem.targets:
            raise ValueError(
                f"target={target!r} must be {' or '.join(self.problem.targets)}; use {self.problem.targets[0]}"
            )
        check_dtype(dtype)
        targets = self.arrays[target].to(dtype)
        shape = (len(targets), self.problem.mesh, self.problem.mesh)
        inputs = [self.problem.channel(name, self.arrays).to(dtype).expand(shape) for name in channels]
        parameters = self.arrays.get("parameters")
        return PdeDataset(
            torch.stack(inputs, dim=1),
            targets,
            tuple(channels),
            None if parameters is None else parameters.to(dtype),
        )


def generate(
    problem: PdeProblem, num_samples: int, seed: int, comm: Communicator, show_progress: bool = True
) -> PdeSamples:
    """Draw and solve samples 0 .. B - 1, each rank its share; collective. All ranks get all of them.

    Sample i depends on the problem, the seed and i alone: neither on the number of ranks nor on `num_samples`. Rank 0
    shows a bar, if its standard error is a terminal.

    Raises
    ------
    TypeError, ValueError
        On all ranks: a number is no integer or too small, the ranks disagree, or a sample cannot be solved.
    """
    block, partition = generate_rows(problem, num_samples, seed, comm, show_progress)
    arrays = {name: comm.allgather(rows, partition.counts) for name, rows in sorted(block.items())}
    return PdeSamples(problem, seed, arrays)


def generate_rows(
    problem: PdeProblem, num_samples: int, seed: int, comm: Communicator, show_progress: bool = True
) -> tuple[dict[str, torch.Tensor], Partition]:
    """As `generate`, but each rank gets its own rows only, and who has which."""
    num_samples, seed = whole_number("num_samples", num_samples, 1, 10_000), whole_number("seed", seed, 0, 0)
    comm.same((problem, num_samples, seed), "(problem, num_samples, seed)")
    partition = Partition.balanced(num_samples, comm.size)
    first, count = partition.first(comm.rank), partition.count(comm.rank)
    block = {name: np.empty((count, *shape)) for name, shape in problem.shapes.items()}
    console = Console(stderr=True)
    shown = show_progress and comm.rank == 0 and console.is_terminal
    message = None
    with Progress(console=console, transient=True, auto_refresh=False, disable=not shown) as bar:
        task = bar.add_task(f"{problem.name} samples", total=count)
        for row in range(count):
            try:
                found = problem.sample(seed, first + row)
            except ValueError as error:
                message = f"sample {first + row} of {problem} with seed={seed}: {error}"
                break
            for name, values in found.items():
                block[name][row] = values
            if (row + 1) % _SHOWN_EVERY == 0:
                bar.update(task, completed=row + 1, refresh=True)
    # A rank that fails alone would leave the others waiting.
    wrong = comm.first_error(message)
    if wrong:
        raise ValueError(wrong[1])
    return {name: torch.from_numpy(rows) for name, rows in block.items()}, partition


KIND = "samples of a problem on a mesh"
_HELP = "delete it to have the samples generated anew, or name another folder or file"


def file_name(problem: PdeProblem, num_samples: int, seed: int) -> str:
    """Name that says what is in the file, such as poisson-mesh32-seed0-samples10000-v1.h5."""
    settings = dataclasses.asdict(problem)
    words = [f"{key}{value}" for key, value in settings.items()]
    return "-".join([problem.name, *words, f"seed{seed}", f"samples{num_samples}", f"v{problem.version}"]) + ".h5"


def obtain(
    problem: PdeProblem,
    num_samples: int,
    seed: int,
    folder: str | os.PathLike,
    comm: Communicator,
    show_progress: bool = True,
) -> PdeSamples:
    """The samples from their file in `folder`, generated and stored there first if there is none; collective.

    Arguments are those of `generate`; the folder is made if there is none, and all ranks see the same one.

    Raises
    ------
    ValueError
        On all ranks: the file is damaged, foreign, or holds other samples than its name says; or a sample cannot be
        solved.
    TypeError
        If a number is no integer, or the problem is not one of `PROBLEMS`.
    OSError
        If the file cannot be written; none is left then.
    """
    if type(problem) not in PROBLEMS.values():
        raise TypeError(f"problem={problem!r} must be a Poisson or a Darcy; use Poisson(mesh=32)")
    num_samples, seed = whole_number("num_samples", num_samples, 1, 10_000), whole_number("seed", seed, 0, 0)
    path = Path(folder).expanduser() / file_name(problem, num_samples, seed)
    comm.same(str(path), "folder and name of the samples")
    if not comm.bcast(path.exists()):
        block, partition = generate_rows(problem, num_samples, seed, comm, show_progress)
        first = partition.first(comm.rank)
        shards = {name: Shard(rows, first, num_samples) for name, rows in block.items()}
        save(path, comm, shards, _meta(problem, num_samples, seed))
    samples, message = None, None
    try:
        samples = load(path)
        _agree(path, samples, problem, num_samples, seed)
    except ValueError as error:
        message = str(error)
    wrong = comm.first_error(message)
    if wrong:
        raise ValueError(wrong[1])
    assert samples is not None
    return samples


def load(path: str | os.PathLike) -> PdeSamples:
    """The samples of a file that `obtain` has written, on each rank for itself, without a message.

    Raises
    ------
    ValueError
        If the file is missing, truncated, damaged or of another kind, names a problem, version or setting that is not
        known here, or its arrays are not those of the problem.
    """
    path = Path(path)
    try:
        with read.load(path) as file:
            return _read(file)
    except read.CheckpointError as error:
        raise ValueError(f"{error.reason.removeprefix('checkpoint ')}; {_HELP}") from error


def _meta(problem: PdeProblem, num_samples: int, seed: int) -> dict[str, Any]:
    return {
        "kind": KIND,
        "problem": problem.name,
        "version": problem.version,
        "settings": dataclasses.asdict(problem),
        "num_samples": num_samples,
        "seed": seed,
    }


def _read(file: read.Checkpoint) -> PdeSamples:
    meta = file.meta
    if meta.get("kind") != KIND or set(meta) != set(_meta(PROBLEMS["poisson"](), 1, 0)):
        raise _wrong(file.path, f"holds no {KIND}, but {str(meta)[:80]}")
    known = PROBLEMS.get(meta["problem"]) if isinstance(meta["problem"], str) else None
    if known is None or meta["version"] != known.version:
        raise _wrong(
            file.path,
            f"holds samples of {meta['problem']!r}, version {meta['version']}; known here are "
            + ", ".join(f"{name!r}, version {problem.version}" for name, problem in PROBLEMS.items()),
        )
    try:
        problem = known(**meta["settings"])
        if dataclasses.asdict(problem) != meta["settings"]:
            raise ValueError(f"settings={meta['settings']}, which are not all of {problem}")
        num_samples = whole_number("num_samples", meta["num_samples"], 1, 10_000)
        seed = whole_number("seed", meta["seed"], 0, 0)
    except (TypeError, ValueError) as error:
        raise _wrong(file.path, f"was made with wrong settings ({error})") from error
    shapes = {name: (num_samples, *shape) for name, shape in problem.shapes.items()}
    found = {name: tuple(file.shape(name)) for name in file.names()}
    if found != shapes:
        raise _wrong(file.path, f"holds arrays {found}, but those of {problem} are {shapes}")
    arrays = {name: file.rows(name) for name in shapes}
    for name, values in arrays.items():
        if values.dtype != torch.float64 or not torch.isfinite(values).all():
            raise _wrong(file.path, f"{name!r} in it holds {values.dtype} or values that are not finite")
    return PdeSamples(problem, seed, arrays)


def _agree(path: Path, samples: PdeSamples, problem: PdeProblem, num_samples: int, seed: int) -> None:
    """Raise `ValueError` unless the file holds what was asked for."""
    there = _meta(samples.problem, len(next(iter(samples.arrays.values()))), samples.seed)
    asked = _meta(problem, num_samples, seed)
    if there != asked:
        key = next(key for key in asked if there[key] != asked[key])
        raise _wrong(path, f"holds samples of {key}={there[key]}, not of {key}={asked[key]} as its name says")


def _wrong(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what}; {_HELP}")


@dataclass(frozen=True, kw_only=True)
class PdeSource:
    """Where samples for training and validation come from: made here, read from our file, or the public Darcy set.

    Parameters
    ----------
    problem : PdeProblem or None
        Such as `Poisson(mesh=32)`; None for the public Darcy set.
    num_train, num_val : int
        Of the public set the first ones, at most as many as there are.
    seed : int
        Of the samples, and of which of them are for validation.
    target : str, optional
        What is to be learned; by default the solution.
    channels : tuple of str, optional
        What the inputs hold; by default what the problem says.
    data_dir : path-like, optional
        Folder where the samples of a problem are stored, and read if they are there; by default they stay in memory.
        For the public set the folder of its files, by default the usual one.
    """

    problem: PdeProblem | None
    num_train: int
    num_val: int
    seed: int = 0
    target: str | None = None
    channels: tuple[str, ...] | None = None
    data_dir: str | os.PathLike | None = None

    def __post_init__(self):
        for name, use in (("num_train", 2000), ("num_val", 500)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use {use}")

    def samples(self, comm: Communicator) -> PdeSamples:
        """Samples of the problem, on all ranks; collective."""
        total = self.num_train + self.num_val
        assert self.problem is not None
        if self.data_dir is None:
            return generate(self.problem, total, self.seed, comm)
        return obtain(self.problem, total, self.seed, self.data_dir, comm)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the inputs; of the public set its files say so."""
        if self.problem is None:
            return None
        return len(self.channels or self.problem.default_channels), self.problem.mesh, self.problem.mesh

    def load(
        self, comm: Communicator | None = None, dtype: torch.dtype = torch.float32
    ) -> tuple[PdeDataset, PdeDataset]:
        """Samples for training and for validation, the same on all ranks; collective.

        Raises
        ------
        ValueError, OSError
            On all ranks: files are missing or damaged, or there are too few samples.
        """
        comm = as_communicator(None) if comm is None else comm
        if self.problem is None:
            public = load_public(self.data_dir, dtype)
            return public.train.rows(slice(self.num_train)), public.test.rows(slice(self.num_val))
        return split(self.samples(comm).dataset(self.channels, self.target, dtype), self.num_val, self.seed)
