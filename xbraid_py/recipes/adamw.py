"""Transformers trained by AdamW as jobs: the options, the optimizer, and what goes with it, that all of them share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from xbraid_py.comm import Communicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.minibatch.state import MinibatchState
from xbraid_py.layer_parallel.rates import param_groups
from xbraid_py.recipes.minibatch import MinibatchTraining
from xbraid_py.recipes.options.transformers import AdamWOptions

_CASTS = {"bfloat16": torch.bfloat16}


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
