"""Updates on minibatches by ranks that hold one model, and the mean of a measure over a data set."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import RunError
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.accuracy import SolveRecord
from xbraid_py.layer_parallel.ends import clip_grad_norm_
from xbraid_py.layer_parallel.minibatch.state import tensors_by_name, weights_by_name
from xbraid_py.layer_parallel.stack import LayerParallel

# A batch: what goes into the model, and what should come out; the first axis of both is the samples.
Batch = tuple[Tensor, Tensor]
# A mean over samples, of the model's output and what should come out.
Measure = Callable[[Tensor, Tensor], Tensor]


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Measure,
    optimizer: torch.optim.Optimizer,
    *,
    scheduler: Any = None,
    clip: float | None = None,
    grid: ProcessGrid | None = None,
    accumulate: int = 1,
    autocast: torch.dtype | None = None,
    average: AveragedModel | None = None,
    done: int = 0,
    seconds: float = 0.0,
) -> Iterator[dict]:
    """Update the weights once for every batch; each update is made when its row is asked for.

    Parameters
    ----------
    model : Module
        With layer-parallel stacks in it or none.
    batches : iterable of pair of (B, ...) tensor
        Inputs and targets, the same on all ranks, of the whole batch whatever the number of replicas.
    loss : callable
        `loss(model(inputs), targets)`, a scalar: the mean over the samples.
    optimizer : torch.optim.Optimizer
        Of `model.parameters()`.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
        Steps once after every update.
    clip : float, optional
        2-norm of the gradient of the whole model above which it is scaled down to this.
    grid : ProcessGrid, optional
        Each replica takes its share of every batch, and the gradients are averaged; the stacks are on `grid.layers`.
    accumulate : int
        Micro-batches that a batch is cut into, one after the other; their gradients are averaged.
    autocast : dtype, optional
        What the model is called in by `torch.autocast`; the loss is not.
    average : AveragedModel, optional
        Of the model; goes along after every update.
    done : int
        Updates made before; `batches` begin behind them.
    seconds : float
        Spent in them.

    Yields
    ------
    dict
        "update" (from `done` + 1), "loss" (of the whole batch, before the update), "learning_rate", "seconds" spent in
        updates so far, "grad_norm" (before clipping, None without), "state_residual" and "adjoint_residual" (the
        largest of the stacks, None without any), "stacks": for every layer-parallel stack what its solves did
        (`SolveRecord.as_dict()`), in the order of the model; and "telling", whether a solver was changed after
        this update, or the error of a gradient was measured.

    Raises
    ------
    RunError
        On all ranks, if the loss is not finite; the weights are those of the update before.
    """
    model.train()
    for number, batch in enumerate(batches, start=done + 1):
        start = time.perf_counter()
        inputs, targets = grid.shard(batch) if grid else batch
        optimizer.zero_grad()
        samples, mean = len(inputs), 0.0
        for part, wanted in zip(inputs.tensor_split(accumulate), targets.tensor_split(accumulate), strict=True):
            with nullcontext() if autocast is None else torch.autocast(part.device.type, autocast):
                outputs = model(part)
            value = loss(outputs, wanted)
            found, count = _mean_over_replicas(float(value.detach()), len(part), grid)
            mean += found * (count / len(batch[0]))
            if not math.isfinite(mean):
                raise RunError(
                    f"update {number}: the loss is {mean}; use a smaller learning rate, or clip the gradients"
                )
            (value * (len(part) / samples)).backward()
        if grid:
            grid.average_gradients(model, samples=samples)
        norm = clip_grad_norm_(model, clip) if clip is not None else None
        rate = optimizer.param_groups[0]["lr"]
        optimizer.step()
        if average is not None:
            average.update_parameters(model)
        if scheduler is not None:
            scheduler.step()
        seconds += time.perf_counter() - start
        records = solve_records(model)
        yield {
            "update": number,
            "loss": mean,
            "learning_rate": float(rate),
            "seconds": seconds,
            "grad_norm": norm,
            "state_residual": max((record.residual for record in records), default=None),
            "adjoint_residual": max((record.adjoint_residual for record in records), default=None),
            "stacks": [record.as_dict() for record in records],
            "telling": any(record.event or record.measured for record in records),
        }


def evaluate(model: nn.Module, batches: Iterable[Batch], measure: Measure, grid: ProcessGrid | None = None) -> float:
    """Mean of a measure over all samples, in evaluation mode and without gradients, so by exact propagation.

    Parameters
    ----------
    model : Module
        Is left in the mode that it was in.
    batches : iterable of pair of (B, ...) tensor
        Inputs and targets, the same on all ranks.
    measure : callable
        `measure(model(inputs), targets)`, a scalar: the mean over the samples.
    grid : ProcessGrid, optional
        The replicas take the batches in turn.

    Raises
    ------
    ValueError
        If there is no batch.
    """
    replica, replicas = (grid.replica, grid.replicas) if grid else (0, 1)
    was_training = model.training
    model.eval()
    total = torch.zeros(1, 2, dtype=torch.float64)
    with torch.no_grad():
        for inputs, targets in islice(batches, replica, None, replicas):
            value = float(measure(model(inputs), targets))
            total += torch.tensor([[value * len(inputs), len(inputs)]], dtype=torch.float64)
    model.train(was_training)
    summed, samples = (grid.data.ordered_sum(total, [1] * replicas) if grid else total[0]).tolist()
    if samples == 0:
        raise ValueError("batches is empty; use at least one batch")
    return summed / samples


def solve_records(model: nn.Module) -> list[SolveRecord]:
    """What the last solves of the layer-parallel stacks in a model did, in the order of the model."""
    found = (record for part in model.modules() if isinstance(part, LayerParallel) for record in part.records)
    return [record for record in found if record is not None]


def _mean_over_replicas(value: float, samples: int, grid: ProcessGrid | None) -> tuple[float, float]:
    """The mean over the samples of all replicas, and their number."""
    if grid is None:
        return value, samples
    weighted = torch.tensor([[value * samples, samples]], dtype=torch.float64)
    summed, count = grid.data.ordered_sum(weighted, [1] * grid.replicas).tolist()
    return summed / count, count


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
        held[name, first] = (tuple(tensor.shape), tensor.dtype, hashlib.blake2b(content.data).digest())
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
