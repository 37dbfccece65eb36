"""Weights, and the state of a nested iteration, as global arrays and plain numbers, and back on any ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xbraid_py.layers.parameters import Layout, Stack
from xbraid_py.mgrit.hierarchy import Hierarchy
from xbraid_py.optim.objective import Evaluation
from xbraid_py.run.store.read import Checkpoint, CheckpointError, check_total, no_state
from xbraid_py.run.store.write import Shard

# Groups of arrays that hold the vectors of a snapshot; of the pairs of the optimizer there are several.
_GROUPS = {"weights": "weights", "gradient": "gradient", "s": "optimizer/s", "y": "optimizer/y"}
_SEVERAL = ("s", "y")
# What a snapshot counts, and of which type; integers will do for floats.
_NUMBERS = {
    **dict.fromkeys(("index", "num_layers", "number", "backtracks", "evaluations"), int),
    **{"step": float, "scale": float, "work": float, "adjoint_residual": float | None, "is_final": bool},
}
_BEFORE = {"records": int, "work": float, "evaluations": int, "seconds": float}


@dataclass(frozen=True)
class Snapshot:
    """All that the rest of a run depends on, at one of its records.

    Attributes
    ----------
    numbers : dict
        Level, updates, counters and the last evaluation, JSON-able.
    vectors : dict of str to list of Tensor
        Flat vectors of the level's network: "weights", "gradient", "s" and "y".
    warm : dict of str to tuple of Tensor
        `Solution.warm` of the last "state" and "adjoint" solves, the l-th with rows over the intervals of level l.
    """

    numbers: dict
    vectors: dict[str, list[Tensor]]
    warm: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)


def arrays_of(
    snapshot: Snapshot, layout: Layout, hierarchies: Sequence[Hierarchy], rank: int, replicas: int = 1
) -> dict[str, Shard]:
    """The vectors of a snapshot, what solves start from, and the state of torch's random numbers.

    Parameters
    ----------
    snapshot : Snapshot
    layout : Layout
        Of the present network.
    hierarchies : sequence of Hierarchy
        Of the state and the adjoint solves.
    rank : int
    replicas : int
        Ranks that follow each other have the same layers, and the same start of their solves: the first writes it.
    """
    found: dict[str, Shard] = {}
    for key, vectors in snapshot.vectors.items():
        found |= shards(layout, _GROUPS[key], vectors, key in _SEVERAL)
    found |= warm_shards("warm", snapshot.warm, hierarchies, rank, replicas)
    random = torch.get_rng_state()
    found["random_state"] = Shard(random if rank == 0 else random[:0], 0, len(random))
    return found


def read_snapshot(
    checkpoint: Checkpoint,
    numbers: dict[str, Any],
    layout: Layout,
    hierarchies: Sequence[Hierarchy],
    stage: int,
    convert_dtype: bool = False,
) -> Snapshot:
    """A rank's part of a snapshot. The state of torch's random numbers is taken over as well.

    Parameters
    ----------
    checkpoint : Checkpoint
    numbers : dict
        Of the snapshot, checked.
    layout, hierarchies
        Of the run that is to go on, as in `arrays_of`.
    stage : int
        Number of this rank among those of its replica.
    convert_dtype : bool
        Take over numbers of the other floating-point type, converted.

    Raises
    ------
    CheckpointError
        If something is missing, or of another network or type.
    """
    path = checkpoint.path

    def convert(rows: Tensor) -> Tensor:
        if rows.dtype != layout.dtype and not convert_dtype:
            raise CheckpointError(f"{path} holds {rows.dtype}, but this run has {layout.dtype}; give --convert_dtype")
        return rows.to(layout.dtype)

    vectors = {key: vectors_of(checkpoint, layout, _GROUPS[key], key in _SEVERAL, convert) for key in _GROUPS}
    if not vectors["weights"]:
        raise no_state(path, "the weights are missing")
    check_total(path, len(vectors["s"]), len(vectors["y"]))
    warm = warm_of(checkpoint, "warm", hierarchies, stage, convert)
    torch.set_rng_state(checkpoint.rows("random_state"))
    return Snapshot(numbers, vectors, warm)


def check_numbers(path: Path, numbers: Mapping[str, Any], depths: Sequence[int], is_adaptive: bool) -> None:
    """Raise a `CheckpointError` unless these are the numbers of a snapshot of a run through such depths."""
    for place, kinds in ((numbers, _NUMBERS), (numbers["before"], _BEFORE)):
        for name, kind in kinds.items():
            if not _is_a(place[name], kind):
                raise no_state(path, f"{name}={place[name]!r}")
    evaluation = Evaluation(**numbers["evaluation"])
    if not all(_is_a(getattr(evaluation, each.name), float | None) for each in fields(evaluation)):
        raise no_state(path, f"evaluation={numbers['evaluation']!r}")
    index = numbers["index"]
    if not 0 <= index < len(depths) or not _is_depth(numbers, depths, index, is_adaptive):
        raise no_state(path, f"level {index} with {numbers['num_layers']} layers, where this run has {depths}")


def _is_depth(numbers: Mapping[str, Any], depths: Sequence[int], index: int, is_adaptive: bool) -> bool:
    """Whether a level may have that many layers, and these lengths, if it has any."""
    depth, lengths = numbers["num_layers"], numbers.get("lengths")
    if not is_adaptive:
        return depth == depths[index] and lengths is None
    listed = lengths is None or (all(_is_a(each, int) and each > 0 for each in lengths) and len(lengths) == depth)
    return listed and depths[0] <= depth <= depths[index]


def _is_a(value: object, kind) -> bool:
    if isinstance(value, bool):
        return kind is bool
    return isinstance(value, kind) or (isinstance(value, int) and isinstance(0.0, kind))


def parameters(layout: Layout) -> dict[str, Stack]:
    """Names of all parameters, as in `Layout.named`, with their stacks."""
    return {f"{stack.name}.{name}": stack for stack in layout.stacks for name in stack.shapes}


def shards(layout: Layout, group: str, vectors: Sequence[Tensor], several: bool = False) -> dict[str, Shard]:
    """An array GROUP/PARAMETER for each parameter of the network; none without a vector.

    Parameters
    ----------
    layout : Layout
    group : str
    vectors : sequence of Tensor
        Flat; one, or with `several` any number of them, for which the arrays have one axis more, behind the rows.
    several : bool
    """
    found = {}
    for name, stack in parameters(layout).items() if vectors else ():
        views = [layout.named(flat)[name] for flat in vectors]
        found[f"{group}/{name}"] = Shard(torch.stack(views, 1) if several else views[0], stack.first, stack.total)
    return found


def vectors_of(
    checkpoint: Checkpoint,
    layout: Layout,
    group: str,
    several: bool = False,
    convert: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> list[Tensor]:
    """What `shards` has made the arrays of: this rank's flat vectors; none where the file has no such group.

    Parameters
    ----------
    checkpoint : Checkpoint
    layout : Layout
        On any number of ranks.
    group, several
        As in `shards`.
    convert : callable
        Makes the rows of an array those of this run, or refuses them.

    Raises
    ------
    CheckpointError
        If only a part of the network is there, or arrays of another one.
    """
    stacks = parameters(layout)
    held = {name.rpartition("/")[2] for name in checkpoint.names() if name.rpartition("/")[0] == group}
    if not held:
        return []
    if held != stacks.keys():
        raise no_state(checkpoint.path, f"of {group} a part is missing or of another network")
    vectors: list[Tensor] = []
    for name, stack in stacks.items():
        key = f"{group}/{name}"
        check_total(checkpoint.path, checkpoint.total(key), stack.total)
        rows = convert(checkpoint.rows(key, stack.first if stack.count else 0, stack.count))
        views = rows.unbind(1) if several else (rows,)
        vectors = vectors or [layout.zeros() for _ in views]
        for flat, view in zip(vectors, views, strict=True):
            own = layout.named(flat)[name]
            own.copy_(view.reshape(own.shape))
    return vectors


def warm_shards(
    group: str, warm: Mapping[str, Sequence[Tensor]], hierarchies: Sequence[Hierarchy], rank: int, replicas: int = 1
) -> dict[str, Shard]:
    """An array GROUP/KEY_LEVEL for each level that the "state" and the "adjoint" solves start from.

    Parameters
    ----------
    group : str
    warm : dict of str to sequence of Tensor
        As in `Snapshot`.
    hierarchies, rank, replicas
        As in `arrays_of`.
    """
    stage, replica = divmod(rank, replicas)
    found = {}
    for (key, levels), hierarchy in zip(warm.items(), hierarchies, strict=True):
        for index, rows in enumerate(levels):
            intervals = hierarchy.intervals_of(index)
            own = rows if replica == 0 else rows[:0]
            found[f"{group}/{key}_{index}"] = Shard(own, intervals.first(stage), intervals.num_rows)
    return found


def warm_of(
    checkpoint: Checkpoint,
    group: str,
    hierarchies: Sequence[Hierarchy],
    stage: int,
    convert: Callable[[Tensor], Tensor] = lambda rows: rows,
) -> dict[str, tuple[Tensor, ...]]:
    """What `warm_shards` has made the arrays of: this rank's rows; nothing of solves that the file has no start of.

    Parameters
    ----------
    checkpoint : Checkpoint
    group : str
    hierarchies, stage
        As in `read_snapshot`.
    convert : callable
        As for `vectors_of`.

    Raises
    ------
    CheckpointError
        If they are of another hierarchy.
    """
    found: dict[str, tuple[Tensor, ...]] = {}
    for key, hierarchy in zip(("state", "adjoint"), hierarchies, strict=True):
        count = sum(name.startswith(f"{group}/{key}_") for name in checkpoint.names())
        for index in range(count):
            name, intervals = f"{group}/{key}_{index}", hierarchy.intervals_of(index)
            check_total(checkpoint.path, checkpoint.total(name), intervals.num_rows)
            rows = convert(checkpoint.rows(name, intervals.first(stage), intervals.count(stage)))
            found[key] = (*found.get(key, ()), rows)
    return found
