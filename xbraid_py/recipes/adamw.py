"""Transformers trained by AdamW as jobs: the options, the optimizer, and what goes with it, that all of them share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.accuracy import GradientControl
from xbraid_py.layer_parallel.minibatch.state import MinibatchState
from xbraid_py.layer_parallel.rates import param_groups
from xbraid_py.mgrit import MGRIT
from xbraid_py.planner import TRANSFORMER, Layer
from xbraid_py.recipes.minibatch import MinibatchOptions, MinibatchTraining
from xbraid_py.run.run_options import free

_CASTS = {"bfloat16": torch.bfloat16}


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
    accumulate
        Micro-batches of an update, of batch_size samples each; the mean of their gradients counts.
    autocast
        Type of numbers that blocks and what lies around them are evaluated in while training (bfloat16), states and
        weights staying float32; not another one if not given.
    ema
        Factor of an exponential moving average of the weights, which validations and the trained model are of then:
        0.99 looks back on about 100 updates. Less at first, (1 + n) / (10 + n) after n updates.
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
    accumulate: int = 1
    autocast: str | None = None
    ema: float | None = None
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
        self.require_least(4, accumulate=1)
        if not 0 <= self.weight_decay < float("inf"):
            raise ValueError(f"weight_decay={self.weight_decay} must be at least 0 and finite; use 0.01")
        if self.autocast not in (None, *_CASTS):
            raise ValueError(f"autocast={self.autocast!r} must be bfloat16, the type that CPUs have; use bfloat16")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise ValueError(f"ema={self.ema} must be above 0 and below 1; use 0.99")

    @property
    def samples(self) -> int:
        """Of an update."""
        return self.batch_size * self.accumulate

    def require_heads(self) -> None:
        """Raise `ValueError` unless there can be such a network of blocks of another library."""
        self.require_least(4, num_layers=2, width=1, heads=1)
        self.require_most(1000, num_layers=10_000, width=10_000, heads=10_000)
        if self.width % self.heads:
            raise ValueError(f"heads={self.heads} must divide width={self.width}; use 1")


AdamWOptionsT = TypeVar("AdamWOptionsT", bound=AdamWOptions)


class AdamWTraining(MinibatchTraining[AdamWOptionsT]):
    """A model that learns by AdamW; biases and norms without weight decay, unless there are `parameters` to take."""

    def __init__(
        self,
        options: AdamWOptionsT,
        model: nn.Module,
        grid: ProcessGrid,
        comm: Communicator,
        parameters: Iterable[nn.Parameter] | None = None,
    ):
        decay = options.weight_decay
        groups = param_groups(model, decay) if parameters is None else parameters
        optimizer = torch.optim.AdamW(groups, options.learning_rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: rate(options, update))
        average = None if options.ema is None else AveragedModel(model, multi_avg_fn=partial(_move, options.ema))
        trained = MinibatchState(
            model=model, optimizer=optimizer, comm=comm, scheduler=schedule, average=average, grid=grid
        )
        super().__init__(options, trained, options.updates)

    @property
    def how(self) -> dict[str, Any]:
        return {"accumulate": self.options.accumulate, "autocast": _CASTS.get(self.options.autocast or "")}


def _move(ema: float, averaged: Any, current: Any, number: Tensor | int) -> None:
    get_ema_multi_avg_fn(min(ema, (1 + int(number)) / (10 + int(number))))(averaged, current, number)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits (B, S, V), which may be halves, and tokens (B, S), in nats."""
    return nn.functional.cross_entropy(
        logits.flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten()
    )


def rate(options: AdamWOptions, update: int) -> float:
    """Share of the learning rate: rising linearly, then falling to a tenth along a cosine."""
    done = (update - options.warmup) / max(options.updates - options.warmup, 1)
    return min((update + 1) / (options.warmup + 1), 0.55 + 0.45 * math.cos(math.pi * min(max(done, 0.0), 1.0)))
