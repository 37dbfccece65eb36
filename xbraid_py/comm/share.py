"""What one rank knows, such as a batch, handed to the others."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from xbraid_py.comm.mpi import as_communicator


def broadcast_batch(value: Any, comm: Any, root: int = 0, device: Any = "cpu") -> Any:
    """What only rank `root` knows, such as a batch, on every rank of `comm`.

    Parameters
    ----------
    value : Any
        On `root`: a tensor, or a nested tuple, list or dict of tensors and of other things that can be pickled. What
        the other ranks pass is not looked at; None will do.
    comm : Communicator or mpi4py.MPI.Comm or None
        The ranks; all of them take part. None for a serial run.
    root : int
        The rank that knows.
    device : torch.device or str
        Where the tensors are to be, on every rank, whatever their device on `root`.

    Returns
    -------
    The same structure on every rank, its tensors contiguous and without history. On `root` they may be those of
    `value`, or share their memory.

    Raises
    ------
    TypeError
        On all ranks, if something in `value` cannot be sent.
    """
    comm = as_communicator(comm)
    tensors: list[torch.Tensor] = []
    packed = problem = None
    if comm.rank == root:
        try:
            packed = pickle.dumps(map_nested(value, lambda leaf: _describe(leaf, tensors)))
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            problem = f"value on rank {root} cannot be sent: {error}; use tensors, numbers, and tuples or dicts of them"
    packed, problem = comm.bcast((packed, problem), root)
    if problem is not None:
        raise TypeError(problem)
    own = iter(tensors)

    def place(leaf: Any) -> Any:
        if not isinstance(leaf, _Described):
            return leaf
        here = next(own, None)
        if here is None:
            here = torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
        # Contiguous on the root too: the layout in memory decides the order of later sums.
        return comm.broadcast(here.detach().contiguous(), root).to(device)

    return map_nested(pickle.loads(packed), place)


@dataclass(frozen=True)
class _Described:
    """A tensor that comes in a message of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _describe(leaf: Any, tensors: list[torch.Tensor]) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    if leaf.layout != torch.strided:
        raise TypeError(f"a tensor of layout {leaf.layout}")
    tensors.append(leaf)
    return _Described(tuple(leaf.shape), leaf.dtype)


def map_nested(node: Any, of_leaf: Callable[[Any], Any]) -> Any:
    """The same structure of tuples, lists and dicts, with `of_leaf` of everything else, in a fixed order."""
    if isinstance(node, dict):
        made = copy.copy(node)  # keeps what else the dict knows, such as a default
        made.update((key, map_nested(item, of_leaf)) for key, item in node.items())
        return made
    if isinstance(node, tuple) and hasattr(node, "_fields"):
        return type(node)(*(map_nested(item, of_leaf) for item in node))
    if isinstance(node, tuple | list) and not isinstance(node, torch.Size):
        return type(node)(map_nested(item, of_leaf) for item in node)
    return of_leaf(node)
