"""Checkpoints: HDF5 files of global arrays, written by all ranks or by one for all, and read by each for itself.

No rank appears in a file, so any number of ranks reads what any other number wrote. Every array carries
checksums, and a file appears under its name only when it is complete. Nothing in it is ever unpickled. Of the files of
a run the newest few good ones are kept, and the best of all.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.comm.base import as_bytes
from xbraid_py.run.record import library_versions, publish
from xbraid_py.run.store.hdf5_writer import HDF5Writer, ParallelWriter, new_file, writes_together
from xbraid_py.run.store.read import (
    BEST,
    DTYPES,
    META,
    META_BYTES,
    CheckpointError,
    file_name,
    fingerprint,
    load,
    newest_good,
    numbered,
    pieces,
    verify,
)


@dataclass(frozen=True)
class Shard:
    """The rows of a global array that one rank owns.

    Parameters
    ----------
    rows : torch.Tensor
        Local rows, leading axis first; float64, float32, int64, uint8 or bool. May be empty.
    first : int
        Number of the first of them in the global array (any number if `rows` is empty).
    total : int
        Rows of the global array.

    Raises
    ------
    TypeError
        If the dtype is none of the five.
    ValueError
        If the rows do not fit into the global array.
    """

    rows: torch.Tensor
    first: int
    total: int

    def __post_init__(self):
        if self.rows.dtype not in DTYPES:
            raise TypeError(f"rows.dtype={self.rows.dtype} cannot be stored; use torch.float64")
        if self.rows.dim() == 0:
            raise ValueError("rows has no axis, but the leading axis counts rows; use rows.reshape(1)")
        if len(self.rows) and not 0 <= self.first <= self.total - len(self.rows):
            raise ValueError(
                f"first={self.first} with {len(self.rows)} rows does not fit into total={self.total}; "
                f"use a first row from 0 to total - {len(self.rows)}"
            )


@dataclass(frozen=True)
class _Array:
    """A global array as the writing rank sees it: `spans` holds (first row, rows, rank), by first row."""

    total: int
    trailing: tuple[int, ...]
    dtype: torch.dtype
    spans: tuple[tuple[int, int, int], ...]
    fingerprint: int


def save(path: str | os.PathLike, comm: Communicator, shards: Mapping[str, Shard], meta: Mapping) -> None:
    """Write global arrays and `meta` to `path`; collective. The folder is made if there is none.

    Parameters
    ----------
    path : path-like
        Where the complete file appears; a file of that name is replaced, durably and at once.
    comm : Communicator
        All its ranks call. Where h5py is built for parallel HDF5 each writes its own rows, all together. Otherwise
        slabs travel to rank 0 in pieces of at most 8 MiB (or one row, if that is more), and it holds two at a time.
    shards : mapping of str to Shard
        Under names such as "weights/layers.weight". Every row of an array belongs to exactly one rank; a rank
        without rows of an array passes an empty shard or leaves the name out.
    meta : mapping
        JSON-able: configuration, iteration, level. That of rank 0 is written; read back as JSON gives it (lists for
        tuples; floats exactly, infinity and NaN included).

    Raises
    ------
    ValueError, TypeError
        On all ranks, before anything is written: rows owned twice or not at all, shards that disagree, names that
        are taken, `meta` not JSON-able.
    OSError
        On all ranks: the disk is full, the folder read-only, and so on. The previous file is intact, and no
        temporary file is left.
    """
    path = Path(path)
    described = comm.gather({name: _describe(shard) for name, shard in shards.items()})
    arrays, text, problem = {}, "", None
    if comm.rank == 0:
        try:
            assert described is not None
            arrays = _plan(described)
            about = {
                name: ((array.total, *array.trailing), DTYPES[array.dtype].name, array.fingerprint)
                for name, array in arrays.items()
            }
            text = json.dumps({"meta": dict(meta), "versions": library_versions(), "arrays": about})
            if len(text) > META_BYTES:
                raise ValueError(f"meta has {len(text)} letters, of which {META_BYTES} fit; put arrays into shards")
        except (ValueError, TypeError) as error:
            problem = error
    _raise_on_all(comm, problem)
    if writes_together(comm):
        arrays, text = comm.bcast((arrays, text))
        problem = _write_together(path, comm, shards, arrays, text)
    elif comm.rank == 0:
        problem = _write(path, comm, shards, arrays, text)
    else:
        _send(comm, shards)
    _raise_on_all(comm, problem)


def _describe(shard: Shard) -> tuple:
    rows = shard.rows
    return shard.first, len(rows), shard.total, tuple(rows.shape[1:]), rows.dtype, fingerprint(rows, shard.first)


def _raise_on_all(comm: Communicator, problem: Exception | None) -> None:
    # Type and arguments instead of the exception: each rank raises its own, and every one of them can be sent.
    found = comm.bcast(None if problem is None else (type(problem), problem.args))
    if found is not None:
        raise found[0](*found[1])


def _plan(described: list[dict[str, tuple]]) -> dict[str, _Array]:
    """Arrays by name from the descriptions of all ranks; `ValueError` unless every row has one owner."""
    arrays: dict[str, _Array] = {}
    for name in sorted(set().union(*described)):
        entries: list[Any] = [(rank, *shards[name]) for rank, shards in enumerate(described) if name in shards]
        kinds = {entry[3:6] for entry in entries}
        if len(kinds) > 1:
            raise ValueError(
                f"shards[{name!r}]: the ranks differ in total, row shape or dtype: {sorted(map(str, kinds))}"
            )
        total, trailing, dtype = kinds.pop()
        spans = tuple(sorted((first, count, rank) for rank, first, count, *_ in entries if count))
        number = sum(entry[6] for entry in entries) % 2**64
        row = 0
        for first, count, rank in (*spans, (total, 0, None)):
            if first > row:
                raise ValueError(f"shards[{name!r}]: rows {row} to {first - 1} belong to no rank; each needs one owner")
            if first < row:
                raise ValueError(f"shards[{name!r}]: row {first} of rank {rank} has another owner; each needs one only")
            row = first + count
        arrays[name] = _Array(total, trailing, dtype, spans, number)
    for name in arrays:
        parents = {name[:end] for end, letter in enumerate(name) if letter == "/"}
        clash = next((parent for parent in parents if parent in arrays), None)
        if clash or name.split("/")[0] in ("", META) or "" in name.split("/") or "." in name.split("/"):
            why = f"it lies in {clash!r}, an array" if clash else f"empty parts, '.' and {META!r} are taken"
            raise ValueError(f"shards[{name!r}] is no usable name ({why}); use a name such as 'weights/layers.weight'")
    return arrays


def _row_bytes(trailing: tuple[int, ...], dtype: torch.dtype) -> int:
    return math.prod(trailing) * dtype.itemsize


def _send(comm: Communicator, shards: Mapping[str, Shard]) -> None:
    for name in sorted(shards):
        rows = shards[name].rows.detach().cpu().contiguous()
        for part in pieces(len(rows), _row_bytes(tuple(rows.shape[1:]), rows.dtype)):
            # As bytes, because MPI knows fewer types than torch.
            comm.isend(as_bytes(rows[part]), 0)()


def _blocks(comm: Communicator, shards, arrays) -> Iterator[tuple[str, int, torch.Tensor]]:
    """Name, first row and rows of every piece of every rank, own ones included, in the order they are sent.

    While one piece is with the caller the next one is on its way, into the other of two buffers.
    """
    tasks = list(_tasks(arrays))
    largest = max((task.count * _row_bytes(task.array.trailing, task.array.dtype) for task in tasks), default=0)
    buffers = [torch.empty(largest if comm.size > 1 else 0, dtype=torch.uint8) for _ in range(2)]
    own: dict[str, torch.Tensor] = {}

    def begin(index: int):
        task = tasks[index]
        if task.rank == comm.rank:
            if task.name not in own:
                own.clear()
                own[task.name] = shards[task.name].rows.detach().cpu().contiguous()
            start = task.first - shards[task.name].first
            rows = own[task.name][start : start + task.count]
            return lambda: rows
        size = task.count * _row_bytes(task.array.trailing, task.array.dtype)
        received = comm.irecv(buffers[index % 2][:size], task.rank)
        return lambda: received().view(task.array.dtype).reshape(-1, *task.array.trailing)

    ready = begin(0) if tasks else None
    for index, task in enumerate(tasks):
        assert ready is not None
        block = ready()
        ready = begin(index + 1) if index + 1 < len(tasks) else None
        yield task.name, task.first, block


@dataclass(frozen=True)
class _Task:
    """A piece of a global array: `count` rows from `first` on, which `rank` owns."""

    name: str
    array: _Array
    first: int
    count: int
    rank: int


def _tasks(arrays: dict[str, _Array]) -> Iterator[_Task]:
    for name, array in arrays.items():
        for first, count, rank in array.spans:
            for part in pieces(count, _row_bytes(array.trailing, array.dtype)):
                yield _Task(name, array, first + part.start, part.stop - part.start, rank)


def _write(path: Path, comm: Communicator, shards, arrays: dict[str, _Array], text: str) -> OSError | None:
    """Rank 0's part of `save`; the error that stopped it, if one did."""
    writer = HDF5Writer(path)
    try:
        writer.open(text)
        for name, array in arrays.items():
            writer.add(name, (array.total, *array.trailing), DTYPES[array.dtype])
        # All slabs are received even if nothing can be written any more: their senders wait.
        for name, first, block in _blocks(comm, shards, arrays):
            writer.put(name, first, block.numpy())
        writer.finish()
    finally:
        writer.discard()
    return writer.failure and _explained(path, writer.failure)


def _write_together(path: Path, comm: Communicator, shards, arrays: dict[str, _Array], text: str) -> OSError | None:
    """Every rank's part of `save` with parallel HDF5; on rank 0 the error that stopped them, if one did."""
    writer = ParallelWriter(path, comm)
    try:
        writer.open(text, sum(array.total * _row_bytes(array.trailing, array.dtype) for array in arrays.values()))
        for name, array in arrays.items():
            shard = shards.get(name)
            rows = torch.empty(0, *array.trailing, dtype=array.dtype) if shard is None else shard.rows.detach().cpu()
            writer.put(name, array.total, 0 if shard is None else shard.first, rows.contiguous().numpy())
        writer.finish()
    finally:
        writer.discard()
    return writer.failure and _explained(path, writer.failure)


def _explained(path: Path, failure: OSError) -> OSError:
    number = failure.errno
    reason = os.strerror(number) if number else str(failure)
    message = f"checkpoint {path} not written: {reason}; earlier ones are intact; free the disk or use another folder"
    return OSError(number, message) if number else OSError(message)


log = logging.getLogger(__name__)

SCORE = "score"  # where the meta data of a file say how good it is


@dataclass(frozen=True, kw_only=True)
class Score:
    """How good a run was at a checkpoint.

    The larger the accuracy on the validation data, the better; it counts more than the objective, of which the smaller
    is the better, and which is compared where neither was validated.
    """

    accuracy: float | None = None
    objective: float | None = None

    def beats(self, other: Score) -> bool:
        """Whether this is better than another; of two equal ones neither beats the other."""
        for name, sign in (("accuracy", 1.0), ("objective", -1.0)):
            ours, theirs = getattr(self, name), getattr(other, name)
            if ours is not None and (theirs is None or ours != theirs):
                return theirs is None or sign * ours > sign * theirs
            if theirs is not None and ours is None:
                return False
        return False


class CheckpointStore:
    """Writes the checkpoints of one run, and removes old ones once a new one is safely there; nobody else writes there.

    `update_000040.h5` and the like are the newest `keep` good files, at least 1; damaged ones do not count. `best.h5`
    is the one with the best score, a second name of its file or, where the file system has no such thing, a copy.
    """

    def __init__(self, folder: str | os.PathLike, keep: int = 3):
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1; use 3")
        self.folder, self.keep = Path(folder), keep
        self._good: dict[str, tuple[int, int]] = {}
        self._best: tuple[tuple[int, int], Score] | None = None

    def save(
        self,
        comm: Communicator,
        update: int,
        shards: Mapping[str, Shard],
        meta: Mapping,
        score: Score | None = None,
    ) -> Path:
        """Write a checkpoint of update number `update`, see the function `save`, and how good the run is; collective.

        The name "score" of the meta data is taken. Without a score the file is never the best.

        Raises
        ------
        RunError
            On all ranks, if the file cannot be written; the earlier ones are all there.
        """
        path = self.folder / file_name(update)
        score = score or Score()
        try:
            save(path, comm, shards, {**meta, SCORE: asdict(score)})
        except OSError as error:
            raise RunError(
                f"the checkpoint {path} could not be written: {error}; make room, or give another --out"
            ) from error
        if comm.rank == 0:
            # The new one is there: what goes wrong from here on loses nothing, so it is only said.
            with _only_said("not all old checkpoints in %s are removed", self.folder):
                self._good[path.name] = _identity(path)
                if score.beats(self.best_score()):
                    self._make_best(path)
                    self._best = _identity(self.best), score
                self._prune()
        return path

    def newest_good(self) -> Path | None:
        """The newest good checkpoint, see the function of that name."""
        return newest_good(self.folder)

    @property
    def best(self) -> Path:
        """Where the best one is, if there is one."""
        return self.folder / BEST

    def best_score(self) -> Score:
        """Score of the best checkpoint; an empty one if there is no good one."""
        if not self.best.exists():
            return Score()
        found = _identity(self.best)
        if self._best is None or self._best[0] != found:
            try:
                verify(self.best)
                self._best = found, score_of(self.best)
            except CheckpointError as error:
                log.warning("the best checkpoint is damaged: %s", error.reason)
                return Score()
        return self._best[1]

    def _make_best(self, path: Path) -> None:
        temporary = self.best.with_name(f"{BEST}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            try:
                os.link(path, temporary)
            except OSError:
                with open(path, "rb") as source, new_file(temporary) as target:
                    shutil.copyfileobj(source, target)
            publish(temporary, self.best)
        finally:
            temporary.unlink(missing_ok=True)

    def _prune(self) -> None:
        good = 0
        for _, path in numbered(self.folder):
            if good == self.keep:
                path.unlink(missing_ok=True)
                self._good.pop(path.name, None)
            else:
                good += self._is_good(path)

    def _is_good(self, path: Path) -> bool:
        # What this has written itself, or read once, is read again only if it has changed since.
        with contextlib.suppress(FileNotFoundError):
            if self._good.get(path.name) == _identity(path):
                return True
            try:
                verify(path)
            except CheckpointError:
                return False
            self._good[path.name] = _identity(path)
            return True
        return False


def score_of(path: str | os.PathLike) -> Score:
    """How good the run was at a checkpoint, as far as the file says; `CheckpointError` if it is damaged."""
    with load(path) as checkpoint:
        said = checkpoint.meta.get(SCORE)
    said = said if isinstance(said, dict) else {}
    numbers = {name: said.get(name) for name in ("accuracy", "objective")}
    return Score(**{name: value for name, value in numbers.items() if isinstance(value, float | int)})


def clear_rest(folder: Path) -> None:
    """Remove what a writer that was killed has left half written, or a link of such a name; one rank, before a run."""
    with _only_said("what a killed job has left in %s is not removed", folder):
        for path in folder.glob("*.h5.tmp") if folder.is_dir() else ():
            path.unlink(missing_ok=True)


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size


@contextlib.contextmanager
def _only_said(text: str, folder: Path):
    try:
        yield
    except OSError as error:
        log.warning(f"{text}: %s", folder, error)
