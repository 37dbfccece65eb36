"""What type checkers know of public calls; `make lint` checks this file, and nothing runs it."""

from __future__ import annotations

from pathlib import Path
from typing import assert_type

import numpy as np
import torch
from torch import Tensor, nn

import xbraid_py as xb
from xbraid_py.layer_parallel import StageParallelResNet
from xbraid_py.layer_parallel.equation import Trajectory
from xbraid_py.multilevel.depth.nested import Record


class Model(nn.Module):
    """A model of the user's."""

    def generate(self) -> str:
        return ""


def models_keep_their_classes(model: Model, optimizer: torch.optim.Optimizer) -> None:
    assert_type(xb.parallelize(model, mgrit=xb.MGRIT()), Model)
    assert_type(xb.parallelize(model).generate(), str)
    assert_type(xb.refine_depth(model, optimizer), Model)
    assert_type(xb.to_sequential(model), Model)


def stacks(blocks: nn.ModuleList, path: Path) -> None:
    stack = xb.LayerParallel(lambda: nn.Linear(4, 4), 8, T=1.0, form="increment")
    assert_type(xb.refine_depth(stack), xb.LayerParallel)
    assert_type(xb.to_sequential(stack), nn.Sequential)
    assert_type(xb.to_sequential(path), nn.Sequential)
    assert_type(stack.record, xb.SolveRecord | None)
    assert_type(stack.sizes, list[float])
    assert_type(stack.cut.serial_ends, tuple[int, int])
    assert_type(xb.LayerParallel.from_blocks(blocks), xb.LayerParallel | xb.PipelineParallel)
    assert_type(xb.to_sequential(xb.PipelineParallel(list(blocks))), nn.Sequential)
    assert_type(xb.layer_views(stack), list[nn.Parameter])
    assert_type(xb.parallel_stages(xb.ImageResNet()), StageParallelResNet)
    assert_type(xb.ParallelGRU(2, 3).record, xb.SequenceRecord | None)


def equations(step: xb.TimeStepper, u0: Tensor, array: np.ndarray, t: list[float]) -> None:
    assert_type(xb.solve(step, u0, t), Trajectory[Tensor])
    assert_type(xb.solve(step, u0, t).end, Tensor)
    assert_type(xb.solve(step, array, t).states, np.ndarray)
    assert_type(xb.solve(step, 1.0, t).end, np.ndarray)


def around_a_stack(loss: Tensor, model: Model, comm: xb.Communicator) -> None:
    assert_type(xb.broadcast_loss(loss, comm, 0), Tensor)
    assert_type(xb.clip_grad_norm_(model, 1.0), float)
    assert_type(xb.world(), xb.Communicator)
    assert_type(xb.broadcast_batch((loss, loss) if comm.rank == 0 else None, comm), tuple[Tensor, Tensor])


def trainings(nested: xb.NestedIteration, optimizer: torch.optim.Optimizer) -> None:
    for record in nested.run():
        assert_type(record, Record)
        assert_type(record.evaluation, xb.Evaluation)
    cycle = xb.DepthCycle(Model(), levels=2)
    assert_type(cycle.step(optimizer, lambda network: network(torch.ones(1)).sum()), float)
