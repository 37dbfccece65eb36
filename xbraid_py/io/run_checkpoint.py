"""Checkpoints of training runs: a snapshot of nested iteration as global arrays, and back on any number of ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import torch

from xbraid_py.io.checkpoint import CheckpointError, Shard, load, newest_good
from xbraid_py.io.checkpoint_store import CheckpointStore, Score
from xbraid_py.io.same_configuration import check_configuration
from xbraid_py.io.snapshot_checks import check_numbers, check_total, no_state, restoring
from xbraid_py.multilevel import NestedIteration, Snapshot
from xbraid_py.networks.parameters import Layout, Stack

# Groups of the file that hold the vectors of a snapshot, an array for each parameter of the network. Of the pairs
# of the optimiser there are several: their arrays have one axis more, behind the rows.
_GROUPS = {"weights": "weights", "gradient": "gradient", "s": "optimizer/s", "y": "optimizer/y"}
_SEVERAL = ("s", "y")


def save_run(
    store: CheckpointStore | Path,
    run: NestedIteration,
    update: int,
    name: str,
    configuration: Mapping,
    score: Score | None = None,
) -> Path:
    """Write the present state of a run; collective.

    Parameters
    ----------
    store : CheckpointStore or Path
        A folder alone keeps every file.
    run : NestedIteration
        At one of its records.
    update : int
        Number in the file's name.
    name : str
        "nested" or "non-nested".
    configuration : mapping
        JSON-able; compared when the run is resumed.
    score : Score, optional
        How good the run is now.

    Raises
    ------
    RunError
        On all ranks, if the file cannot be written; the previous one is intact.
    """
    snapshot, comm, layout = run.snapshot(), run.problem.comm, run.network.layout
    shards = {}
    for key, vectors in snapshot.vectors.items():
        for parameter, stack in _parameters(layout).items() if vectors else ():
            views = [layout.named(flat)[parameter] for flat in vectors]
            rows = torch.stack(views, 1) if key in _SEVERAL else views[0]
            shards[f"{_GROUPS[key]}/{parameter}"] = Shard(rows, stack.first, stack.total)
    for (key, levels), hierarchy in zip(snapshot.warm.items(), run.problem.hierarchies(run.grid), strict=True):
        for index, rows in enumerate(levels):
            intervals = hierarchy.intervals_of(index)
            shards[f"warm/{key}_{index}"] = Shard(rows, intervals.first(comm.rank), intervals.num_rows)
    random = torch.get_rng_state()
    shards["random_state"] = Shard(random if comm.rank == 0 else random[:0], 0, len(random))
    meta = {"run": name, "update": update, "snapshot": snapshot.numbers, "configuration": dict(configuration)}
    if not isinstance(store, CheckpointStore):
        store = CheckpointStore(store, keep=sys.maxsize)
    return store.save(comm, update, shards, meta, score)


def checkpoint_folder(out: Path, name: str) -> Path:
    """Where the checkpoints of a run of a job are: `checkpoints`, and folders in it for runs of comparison."""
    return out / "checkpoints" if name == "nested" else out / "checkpoints" / name


def read_resumed(
    resume: str | None,
    out: Path,
    runs: Mapping[str, NestedIteration],
    configuration: Mapping,
    free: tuple[str, ...],
    convert_dtype: bool = False,
) -> dict[str, Snapshot]:
    """What the option `--resume` asks for; sends no message.

    Parameters
    ----------
    resume : str or None
        A file, or "auto": the newest good one of the out folder, if there is any.
    out : Path
    runs : mapping of str to NestedIteration
        The runs of the job, in their order.
    configuration : mapping
        Of this job, JSON-able.
    free : tuple of str
        Names of options that may differ from those of the checkpoint.
    convert_dtype : bool
        Go on from a checkpoint of the other floating-point type, whose numbers are converted.

    Returns
    -------
    dict of str to Snapshot
        Where to go on, by the name of the run: the ends of runs that are over, and then perhaps a run under way.

    Raises
    ------
    CheckpointError
        If a file is damaged, no checkpoint of such a run, or one of another configuration.
    """
    snapshots: dict[str, Snapshot] = {}
    free = (*free, "dtype") if convert_dtype else free
    if resume is None:
        return snapshots
    given = None
    if resume != "auto":
        given = _read_meta(Path(resume), configuration, free)["run"]
        if given not in runs:
            raise CheckpointError(f"{resume} belongs to the {given} run, which this job has not; give --compare")
    for name, run in runs.items():
        path = Path(resume) if name == given else newest_good(checkpoint_folder(out, name))
        if path is not None:
            if name != given:
                _read_meta(path, configuration, free)
            snapshots[name] = _read_snapshot(path, run, convert_dtype)
        if name == given or name not in snapshots or not snapshots[name].is_final:
            break
    if given is not None and given not in snapshots:
        raise CheckpointError(f"{resume} follows a run whose end is not in {out}; give the --out folder of both")
    return snapshots


def resumed_configuration(resume: str | None, out: Path) -> dict | None:
    """The configuration of the job that `--resume` goes on with; None if there is nothing to go on from."""
    path = newest_good(checkpoint_folder(out, "nested")) if resume in ("auto", None) else Path(resume)
    if resume is None or path is None:
        return None
    with load(path) as checkpoint:
        found = checkpoint.meta.get("configuration")
    if not isinstance(found, dict | None):
        raise no_state(path)
    return found


def _read_meta(path: Path, configuration: Mapping, free: tuple[str, ...]) -> dict:
    """Meta data of a checkpoint, once its configuration is known to be that of this job."""
    with load(path) as checkpoint:
        meta = checkpoint.meta
    if not {"run", "update", "snapshot", "configuration"} <= meta.keys():
        raise no_state(path)
    if not (isinstance(meta["run"], str) and isinstance(meta["configuration"], dict)):
        raise no_state(path)
    also = {"dtype": "--convert_dtype"}
    check_configuration(path, meta["configuration"], configuration, free, also)
    return meta


def _read_snapshot(path: Path, run: NestedIteration, convert_dtype: bool) -> Snapshot:
    """A rank's part of a snapshot, on any number of ranks. Random state is taken over as well."""
    dtype = run.problem.dtype

    def rows_of(*which) -> torch.Tensor:
        rows = checkpoint.rows(*which)
        if rows.dtype != dtype and not convert_dtype:
            raise CheckpointError(f"{path} holds {rows.dtype}, but this run has {dtype}; give --convert_dtype")
        return rows.to(dtype)

    with load(path) as checkpoint, restoring(path):
        numbers = checkpoint.meta["snapshot"]
        check_numbers(path, numbers, run)
        grid = run.grid_of(numbers)
        layout = run.network_of(numbers).layout
        hierarchies = dict(zip(("state", "adjoint"), run.problem.hierarchies(grid), strict=True))
        parameters = _parameters(layout)
        vectors: dict[str, list[torch.Tensor]] = {key: [] for key in _GROUPS}
        missing = {key: set(parameters) for key in _GROUPS}
        warm: dict[str, tuple[torch.Tensor, ...]] = {}
        for name in sorted(checkpoint.names(), key=lambda name: (len(name), name)):
            group, _, parameter = name.rpartition("/")
            key = next((key for key in _GROUPS if _GROUPS[key] == group), None)
            if key is not None:
                stack = parameters[parameter]
                check_total(path, checkpoint.total(name), stack.total)
                rows = rows_of(name, stack.first if stack.count else 0, stack.count)
                views = rows.unbind(1) if key in _SEVERAL else (rows,)
                vectors[key] = vectors[key] or [layout.zeros() for _ in views]
                for flat, view in zip(vectors[key], views, strict=True):
                    own = layout.named(flat)[parameter]
                    own.copy_(view.reshape(own.shape))
                missing[key].discard(parameter)
            elif group == "warm":
                solve, _, index = parameter.partition("_")
                intervals, rank = hierarchies[solve].intervals_of(int(index)), run.problem.comm.rank
                check_total(path, checkpoint.total(name), intervals.num_rows)
                rows = rows_of(name, intervals.first(rank), intervals.count(rank))
                warm[solve] = (*warm.get(solve, ()), rows)  # the names come in their order
                check_total(path, int(index) + 1, len(warm[solve]))
        if any(missing[key] for key in _GROUPS if vectors[key]) or not vectors["weights"]:
            raise no_state(path, "a part of the weights or of the optimiser is missing")
        check_total(path, len(vectors["s"]), len(vectors["y"]))
        torch.set_rng_state(checkpoint.rows("random_state"))
    return Snapshot(numbers, vectors, warm)


def _parameters(layout: Layout) -> dict[str, Stack]:
    """Names of all parameters, as in `Layout.named`, with their stacks."""
    return {f"{stack.name}.{name}": stack for stack in layout.stacks for name in stack.shapes}
