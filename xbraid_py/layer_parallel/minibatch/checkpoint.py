"""Checkpoints for training loops of one's own: written on any number of ranks, and gone on from on any other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xbraid_py.comm import Communicator, as_communicator
from xbraid_py.comm.agreement import launcher_size, together
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.minibatch.state import MinibatchState
from xbraid_py.layer_parallel.modules import PipelineParallel
from xbraid_py.layer_parallel.sequence.recurrent import ParallelRecurrent
from xbraid_py.layer_parallel.stack import LayerParallel
from xbraid_py.run.store.plain import from_plain, to_plain
from xbraid_py.run.store.read import CheckpointError, load, no_state, restoring, verify
from xbraid_py.run.store.write import save


def save_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    scaler: Any = None,
    extra: Any = None,
    comm: Any = None,
    grid: ProcessGrid | None = None,
) -> None:
    """Write all that a training depends on to one file, from which any number of ranks goes on; collective.

    The file is HDF5, of global arrays with checksums: weights and buffers, what the optimizer keeps of each weight, the
    states of the solvers and of torch's random numbers of rank 0. It appears under its name when it is complete, and
    replaces one that is there. Nothing in it is ever unpickled. Numbers in bfloat16 and float16 are held as float32.

    On as many ranks as before, training goes on bitwise as without an interruption, and on others as exactly as its
    losses agree there at all; `torch.save(optimizer.state_dict())` has the layers of one rank alone.

    Parameters
    ----------
    path : path-like
    model : Module
        With `LayerParallel`, `PipelineParallel`, `ParallelGRU` and `ParallelLSTM` in it, or none. For several models,
        averaged ones (`torch.optim.swa_utils.AveragedModel`) among them, an `nn.ModuleDict`.
    optimizer : torch.optim.Optimizer, optional
        Of parameters of the model. What it keeps of each must be numbers and tensors of its shape: SGD, Adam, AdamW,
        RMSprop, Adagrad, Adadelta, Adamax, NAdam, RAdam, Rprop and the like, and Muon, of `layer_views(model)` too; not
        LBFGS and Adafactor.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
    scaler : torch.amp.GradScaler, optional
        That of `xbraid_py` too.
    extra : Any
        What `load_checkpoint` gives back: None, numbers, words, small tensors, and lists, tuples and dicts of them.
    comm : Communicator, mpi4py.MPI.Comm or ProcessGroup, optional
        All ranks; by default those that share the layers of the model.
    grid : ProcessGrid, optional
        Of models in replicas; `comm` must be given then.

    Raises
    ------
    RunError
        On all ranks, if a weight is not finite.
    ValueError, TypeError
        On all ranks, if the optimizer keeps something else, or a value is none of those.
    OSError
        On all ranks, if the file cannot be written; one that was there is intact.
    """
    trained = _state(model, optimizer, scheduler, scaler, comm, grid)
    arrays, numbers = trained.state()
    with together(trained.comm):
        said = to_plain(extra, "extra")
    save(path, trained.comm, arrays, {"state": numbers, "extra": said})


def load_checkpoint(
    path: str | os.PathLike,
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    *,
    scheduler: Any = None,
    scaler: Any = None,
    comm: Any = None,
    grid: ProcessGrid | None = None,
) -> Any:
    """Take over what `save_checkpoint` has written, each rank its part, whatever the number of ranks; collective.

    Parameters
    ----------
    path : path-like
    model, optimizer, scheduler, scaler, comm, grid
        Made as those that were saved, with the same seeds. What is not given is left out: a model alone is ready for
        evaluation.

    Returns
    -------
    Any
        `extra` of `save_checkpoint`.

    Raises
    ------
    CheckpointError
        On all ranks, if the file is missing or damaged, or holds another model, or none of what is asked for.

    Examples
    --------
    >>> model = nn.Linear(2, 1)
    >>> optimizer = torch.optim.Adam(model.parameters())
    >>> save_checkpoint("runs/one.h5", model, optimizer, extra={"epoch": 3})
    >>> load_checkpoint("runs/one.h5", model, optimizer)
    {'epoch': 3}
    """
    path, trained = Path(path), _state(model, optimizer, scheduler, scaler, comm, grid)
    problem = extra = None
    try:
        if trained.comm.rank == 0:
            verify(path)  # whole; the ranks read their parts
        with load(path) as checkpoint, restoring(path):
            if not isinstance(checkpoint.meta.get("state"), dict):
                raise no_state(path)
            trained.load_parts(checkpoint)
            extra = from_plain(checkpoint.meta.get("extra"))
    except CheckpointError as error:
        problem = str(error)
    failed = trained.comm.first_error(problem)
    if failed is not None:
        raise CheckpointError(failed[1])
    return extra


def _state(model: nn.Module, optimizer, scheduler, scaler, comm: Any, grid: ProcessGrid | None) -> MinibatchState:
    kinds = LayerParallel | PipelineParallel | ParallelRecurrent
    own: Any = next((part.comm for part in model.modules() if isinstance(part, kinds)), None)
    if comm is None and grid is not None:
        raise ValueError("comm is not given, but grid is, whose replicas write one file; use comm=MPI.COMM_WORLD")
    if comm is None and own is None and launcher_size() > 1:
        raise ValueError(
            f"comm is not given, and model={type(model).__name__} has no layers on several ranks, of which there are "
            f"{launcher_size()}; use comm=MPI.COMM_WORLD"
        )
    ranks: Communicator = own if comm is None and own is not None else as_communicator(comm)
    with together(ranks):
        return MinibatchState(
            model=model, optimizer=optimizer, comm=ranks, scheduler=scheduler, scaler=scaler, grid=grid
        )
