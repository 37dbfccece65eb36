"""Global arrays of every type for checkpoints: the shards of ranks, and whether a file holds them."""

from __future__ import annotations

import math

import torch

from xbraid_py.comm.partition import Partition
from xbraid_py.run.store.read import load
from xbraid_py.run.store.write import Shard

META = {"update": 40, "level": 2, "best": 0.1 + 0.2, "worst": math.inf, "name": "peaks ε", "options": {"width": [8]}}


def make_arrays() -> dict[str, torch.Tensor]:
    """Global arrays of every dtype and odd shapes, the same on every rank."""
    source = torch.Generator().manual_seed(7)
    weight = torch.randn(17, 3, 3, generator=source, dtype=torch.float64)
    weight[4, 1] = torch.tensor([math.nan, -0.0, -math.inf])
    return {
        "weights/layers.weight": weight,
        "weights/layers.bias": torch.randn(17, 3, generator=source, dtype=torch.float32),
        "optimizer/s/layers.weight": torch.randn(2, 4000, 5, generator=source, dtype=torch.float64),
        "optimizer/count": torch.tensor([2**62 + 1]),
        "random/state": torch.arange(1000).to(torch.uint8),
        "mask": torch.arange(6).reshape(3, 2) % 2 == 0,
        "no_rows": torch.zeros(0, 3),
        "no_columns": torch.zeros(4, 0),
    }


def shards_of(comm, arrays: dict[str, torch.Tensor]) -> dict[str, Shard]:
    """The shards of one rank; some ranks own no row."""
    found = {}
    for name, rows in arrays.items():
        part = Partition.balanced(len(rows), comm.size)
        first = part.first(comm.rank)
        found[name] = Shard(rows[first : first + part.count(comm.rank)], first, len(rows))
    return found


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()


def agrees(path, arrays) -> bool:
    """Whether a file holds exactly these arrays and META."""
    with load(path) as file:
        names = file.names() == tuple(sorted(arrays))
        return names and file.meta == META and all(same_bits(file.rows(name), rows) for name, rows in arrays.items())


def error_of(action, *args) -> Exception | None:
    try:
        action(*args)
    except (OSError, ValueError, TypeError) as error:
        return error
    return None
