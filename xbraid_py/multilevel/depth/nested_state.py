"""Whether what a sound checkpoint holds is a state of the run that is to go on from it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import torch

from xbraid_py.layers.parameters import Layout, Stack
from xbraid_py.multilevel.depth.nested import NestedIteration
from xbraid_py.multilevel.depth.record import Snapshot
from xbraid_py.optim.objective import Evaluation
from xbraid_py.run.store.keep import CheckpointStore, Score
from xbraid_py.run.store.read import CheckpointError, check_total, no_state, restoring
from xbraid_py.run.store.write import Shard, load

# What a snapshot counts, and of which type; integers will do for floats.
_NUMBERS = {
    **dict.fromkeys(("index", "num_layers", "number", "backtracks", "evaluations"), int),
    **{"step": float, "scale": float, "work": float, "adjoint_residual": float | None, "is_final": bool},
}
_BEFORE = {"records": int, "work": float, "evaluations": int, "seconds": float}


def check_numbers(path: Path, numbers: dict, run: NestedIteration) -> None:
    """Raise an error unless these are the numbers of a snapshot of such a run."""
    for place, kinds in ((numbers, _NUMBERS), (numbers["before"], _BEFORE)):
        for name, kind in kinds.items():
            if not _is_a(place[name], kind):
                raise no_state(path, f"{name}={place[name]!r}")
    evaluation = Evaluation(**numbers["evaluation"])
    if not all(_is_a(getattr(evaluation, each.name), float | None) for each in fields(evaluation)):
        raise no_state(path, f"evaluation={numbers['evaluation']!r}")
    index = numbers["index"]
    if not 0 <= index < len(run.depths) or not _is_depth(numbers, run.depths, index, run.options.adaptive is not None):
        raise no_state(path, f"level {index} with {numbers['num_layers']} layers, where this run has {run.depths}")


def _is_depth(numbers: dict, depths: list[int], index: int, adaptive: bool) -> bool:
    """Whether a level may have that many layers, and these lengths, if it has any."""
    depth, lengths = numbers["num_layers"], numbers.get("lengths")
    if not adaptive:
        return depth == depths[index] and lengths is None
    listed = lengths is None or (all(_is_a(each, int) and each > 0 for each in lengths) and len(lengths) == depth)
    return listed and depths[0] <= depth <= depths[index]


def _is_a(value: object, kind) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


# Groups of the file that hold the vectors of a snapshot, an array for each parameter of the network. Of the pairs
# of the optimizer there are several: their arrays have one axis more, behind the rows.
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
            raise no_state(path, "a part of the weights or of the optimizer is missing")
        check_total(path, len(vectors["s"]), len(vectors["y"]))
        torch.set_rng_state(checkpoint.rows("random_state"))
    return Snapshot(numbers, vectors, warm)


def _parameters(layout: Layout) -> dict[str, Stack]:
    """Names of all parameters, as in `Layout.named`, with their stacks."""
    return {f"{stack.name}.{name}": stack for stack in layout.stacks for name in stack.shapes}
