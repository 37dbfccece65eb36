"""Transformers trained by AdamW as jobs: the options, the learning rate and the optimizer that all of them share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.accuracy import GradientControl
from xbraid_py.layer_parallel.minibatch.state import MinibatchState
from xbraid_py.mgrit import MGRIT
from xbraid_py.planner import TRANSFORMER, Layer
from xbraid_py.recipes.minibatch import MinibatchOptions, MinibatchTraining
from xbraid_py.run.engine import free


@dataclass(frozen=True, kw_only=True)
class AdamWOptions(MinibatchOptions):
    """What all jobs of transformers are told.

    Parameters
    ----------
    num_layers
        Blocks.
    width
        Features of a token's state.
    heads
        Of the attention; divides width.
    updates
        Weight updates.
    learning_rate
        Of AdamW, after the warm-up; from there it falls to a tenth along a cosine.
    warmup
        Updates over which the learning rate rises.
    weight_decay
        Of AdamW.
    validation_batches
        Of 64 samples, in a validation.
    accuracy
        What is asked of the gradients.
    """

    num_layers: int = 16
    width: int = 64
    heads: int = 4
    updates: int = 400
    batch_size: int = 16
    warmup: int = 20
    weight_decay: float = 0.01
    clip: float | None = 1.0
    validate_every: int = free(50)
    validation_batches: int = free(8)
    checkpoint_every: int = free(50)
    mgrit: MGRIT | None = field(default=None, metadata={"members": MGRIT(coarse_parts=1)})
    accuracy: GradientControl = GradientControl()

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def layer(self) -> Layer:
        return TRANSFORMER

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, updates=1, warmup=0, validation_batches=1)
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; use 0.01")

    def require_heads(self) -> None:
        """Raise `ValueError` unless there can be such a network of blocks of another library."""
        self.require_least(4, num_layers=2, width=1, heads=1)
        self.require_most(1000, num_layers=10_000, width=10_000, heads=10_000)
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}; use 1")


class AdamWTraining(MinibatchTraining):
    """A model that learns by AdamW; `parameters` as of `torch.optim.AdamW`, in groups perhaps."""

    def __init__(
        self, options: AdamWOptions, model: nn.Module, parameters: Iterable[Any], grid: ProcessGrid, comm: Communicator
    ):
        optimizer = torch.optim.AdamW(parameters, options.learning_rate, weight_decay=options.weight_decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: rate(options, update))
        trained = MinibatchState(model=model, optimizer=optimizer, comm=comm, scheduler=schedule, grid=grid)
        super().__init__(options, trained, options.updates)


def rate(options: AdamWOptions, update: int) -> float:
    """Share of the learning rate: rising linearly, then falling to a tenth along a cosine."""
    done = (update - options.warmup) / max(options.updates - options.warmup, 1)
    return min((update + 1) / (options.warmup + 1), 0.55 + 0.45 * math.cos(math.pi * min(max(done, 0.0), 1.0)))
