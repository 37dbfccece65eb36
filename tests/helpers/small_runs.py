"""Small training runs that several tests make: problem, schedule, and all that a run leaves, without the clock."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.data import peaks
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.nested import NestedIteration, Record
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.optim import OneShotOptions
from xbraid_py.problem.options import DenseResNetOptions, InitialScales
from xbraid_py.problem.problem import Problem
from xbraid_py.problem.regularization import Regularization
from xbraid_py.run.store.read import load, restoring
from xbraid_py.run.store.write import CheckpointStore

# With 8 layers two intervals of the second level, which 3 or 5 ranks do not own as they own those of the first.
MIXED = MGRIT(cycle="V", cfactor=(4, 2), max_levels=3, min_coarse=1)
ONE_SHOT = MGRIT(cfactor=(4, 2), max_levels=3, min_coarse=1)
SEQUENTIAL = MGRIT(max_levels=1)


@cache
def points():
    """A hundred points of peaks, for training."""
    return peaks.generate(100, 5)[0]


def problem(comm: Communicator, mgrit: MGRIT = MIXED, width: int = 3, regularization=None, **others) -> Problem:
    """Few points of peaks and a narrow network; regularized in depth, so that neighbors must talk."""
    train = points()
    return Problem(
        features=train.features,
        labels=train.labels,
        num_classes=train.num_classes,
        architecture=DenseResNetOptions(width=width, T=2.0),
        regularization=regularization or Regularization(tikhonov=1e-4, ddt=1e-5),
        forward=mgrit,
        adjoint=others.pop("adjoint", mgrit),
        comm=comm,
        **others,
    )


def nested(comm, updates, mgrit=MIXED, num_layers=32, one_shot=None, interpolation="constant", **others):
    """A nested iteration over as many levels as there are numbers of updates."""
    options = NestedOptions(refinements=len(updates) - 1, updates=tuple(updates), interpolation=interpolation)
    one_shot = one_shot or OneShotOptions(boost_updates=2, boost_iter=4)
    scales = InitialScales(layers=0.3)
    return NestedIteration(
        problem(comm, mgrit, **others), num_layers, options=options, one_shot=one_shot, scales=scales, seed=1
    )


def save_state(folder: Path, run: NestedIteration, number: int, /, **meta: Any) -> Path:
    """A checkpoint of a run as the engine writes it, but for what only the engine knows."""
    arrays, numbers = run.state()
    return CheckpointStore(folder, keep=99).save(run.problem.comm, number, arrays, {"state": numbers, **meta})


def load_state(path: Path, run: NestedIteration, convert_dtype: bool = False) -> NestedIteration:
    """The run, which goes on from a checkpoint."""
    with load(path) as checkpoint, restoring(path):
        run.load(checkpoint, convert_dtype)
    return run


def timeless(record: Record) -> Record:
    """A record without the time it took."""
    return replace(record, seconds=0.0)


def gathered(network, flat: Tensor) -> dict[str, Tensor]:
    """All rows of the three stacks of weights, on every rank; collective."""
    comm, found = network.comm, {}
    ends = {"opening": network.partition.owner(0), "classification": network.last_rank}
    for name, rows in network.layout.rows(flat).items():
        counts = list(network.partition.counts)
        if name in ends:
            counts = [int(rank == ends[name]) for rank in range(comm.size)]
        found[name] = comm.allgather(rows, counts)
    return found


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
