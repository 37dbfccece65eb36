"""Flat vectors of weights as the global arrays of a checkpoint, and back on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from xbraid_py.layers.parameters import Layout, Stack
from xbraid_py.run.store.read import Checkpoint, check_total, no_state
from xbraid_py.run.store.write import Shard


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
