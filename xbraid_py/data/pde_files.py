"""Samples of a problem on a mesh in a file: generated once, stored with what they were made from, and loaded again.

A file is one of global arrays with checksums, as checkpoints are: any number of ranks writes and reads it, links and
foreign filters are refused, and it appears under its name only when it is complete.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import torch

from xbraid_py.comm import Communicator
from xbraid_py.data.files import whole_number
from xbraid_py.data.pde_samples import PROBLEMS, Problem, Samples, generate_rows
from xbraid_py.run.store.write import Checkpoint, CheckpointError, Shard, save
from xbraid_py.run.store.write import load as open_file

KIND = "samples of a problem on a mesh"
_HELP = "delete it to have the samples generated anew, or name another folder or file"


def file_name(problem: Problem, num_samples: int, seed: int) -> str:
    """Name that says what is in the file, such as poisson-mesh32-seed0-samples10000-v1.h5."""
    settings = dataclasses.asdict(problem)
    words = [f"{key}{value}" for key, value in settings.items()]
    return "-".join([problem.name, *words, f"seed{seed}", f"samples{num_samples}", f"v{problem.version}"]) + ".h5"


def obtain(
    problem: Problem,
    num_samples: int,
    seed: int,
    folder: str | os.PathLike,
    comm: Communicator,
    show_progress: bool = True,
) -> Samples:
    """The samples from their file in `folder`, generated and stored there first if there is none; collective.

    Parameters
    ----------
    problem : Problem
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


def load(path: str | os.PathLike) -> Samples:
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


def _meta(problem: Problem, num_samples: int, seed: int) -> dict[str, Any]:
    return {
        "kind": KIND,
        "problem": problem.name,
        "version": problem.version,
        "settings": dataclasses.asdict(problem),
        "num_samples": num_samples,
        "seed": seed,
    }


def _read(file: Checkpoint) -> Samples:
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
    return Samples(problem, seed, arrays)


def _agree(path: Path, samples: Samples, problem: Problem, num_samples: int, seed: int) -> None:
    """Raise `ValueError` unless the file holds what was asked for."""
    there = _meta(samples.problem, len(next(iter(samples.arrays.values()))), samples.seed)
    asked = _meta(problem, num_samples, seed)
    if there != asked:
        key = next(key for key in asked if there[key] != asked[key])
        raise _wrong(path, f"holds samples of {key}={there[key]}, not of {key}={asked[key]} as its name says")


def _wrong(path: Path, what: str) -> ValueError:
    return ValueError(f"{path}: {what}; {_HELP}")
