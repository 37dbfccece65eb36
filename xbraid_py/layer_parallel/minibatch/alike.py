"""Whether the ranks of a job hold one model: a forgotten seed makes them train different ones without a word."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from xbraid_py.comm import Communicator
from xbraid_py.layer_parallel.minibatch.state import tensors_by_name, weights_by_name


def check_alike(model: nn.Module, comm: Communicator) -> None:
    """Refuse a model whose weights are not the same wherever several ranks hold them. Collective.

    Around the stacks those are all ranks; within a stack the ranks of the replicas that own the same layers.

    Parameters
    ----------
    model : Module
    comm : Communicator
        All ranks of the job.

    Raises
    ------
    ValueError
        On all ranks, with the name of a parameter or buffer that differs.
    """
    owners = weights_by_name(model)
    held: dict[tuple[str, int], tuple] = {}
    for name, tensor in tensors_by_name(model):
        owner = owners.get(name)
        if owner is not None and not len(tensor):
            continue
        first = 0 if owner is None else owner.partition.first(owner.comm.rank)
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
        held[name, first] = (tuple(tensor.shape), tensor.dtype, hashlib.blake2b(content).digest())
    found = comm.gather(held)
    problem = comm.bcast(None if found is None else _difference(found))
    if problem:
        raise ValueError(problem)


def _difference(found: list[dict[tuple[str, int], tuple]]) -> str:
    """What is wrong with the weights of all ranks, or nothing."""
    known: dict[tuple[str, int], tuple[int, tuple]] = {}
    for rank, held in enumerate(found):
        for key, value in held.items():
            holder, expected = known.setdefault(key, (rank, value))
            if value != expected:
                return (
                    f"{key[0]} is not the same on ranks {holder} and {rank}; draw it from one seed on all ranks, as "
                    f"with torch.manual_seed(0) before the model is built"
                )
    return ""
