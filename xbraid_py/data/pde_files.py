"""Samples of a problem on a mesh in a file, generated once and stored with what they were made from; where a run's lie.

A file is one of global arrays with checksums, as checkpoints are: any number of ranks writes and reads it, links and
foreign filters are refused, and it appears under its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.data import darcy_public
from xbraid_py.data.dataset import whole_number
from xbraid_py.data.pde_dataset import PdeDataset, split
from xbraid_py.data.pde_samples import PROBLEMS, PdeProblem, PdeSamples, generate, generate_rows
from xbraid_py.run.store.read import Checkpoint, CheckpointError
from xbraid_py.run.store.read import load as open_file
from xbraid_py.run.store.write import Shard, save

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

    Parameters
    ----------
    problem : PdeProblem
        Such as `Poisson(mesh=32)`.
    num_samples, seed : int
        As in `generate`.
    folder : path-like
        Made if there is none; all ranks see the same one.
    comm : Communicator
    show_progress : bool
        While the samples are generated, on rank 0, on a terminal.

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
        with open_file(path) as file:
            return _read(file)
    except CheckpointError as error:
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


def _read(file: Checkpoint) -> PdeSamples:
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
    data_dir : path-like, optional
        Folder where the samples of a problem are stored, and read if they are there; by default they stay in memory.
        For the public set the folder of its files, by default the usual one.
    """

    problem: PdeProblem | None
    num_train: int
    num_val: int
    seed: int = 0
    target: str | None = None
    data_dir: str | os.PathLike | None = None

    def __post_init__(self):
        for name, use in (("num_train", 2000), ("num_val", 500)):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1; use {use}")

    def samples(self, comm: Communicator) -> PdeSamples:
        """Samples of the problem, on all ranks; collective."""
        total = self.num_train + self.num_val
        if self.data_dir is None:
            return generate(self.problem, total, self.seed, comm)
        return obtain(self.problem, total, self.seed, self.data_dir, comm)

    @property
    def shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of the inputs; of the public set its files say so."""
        mesh = None if self.problem is None else self.problem.mesh
        return None if mesh is None else (len(self.problem.default_channels), mesh, mesh)

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
            public = darcy_public.load(self.data_dir, dtype)
            return public.train.rows(slice(self.num_train)), public.test.rows(slice(self.num_val))
        return split(self.samples(comm).dataset(target=self.target, dtype=dtype), self.num_val, self.seed)
