"""Small runs on minibatches in folders of their own, for tests: two classes of points, a stack of dense layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from blocks import linear
from processes import run_on_one_core
from torch import nn

from xbraid_py import MGRIT, GradientControl, LayerParallel
from xbraid_py.comm import Communicator, SerialCommunicator
from xbraid_py.layer_parallel.minibatch.state import MinibatchState
from xbraid_py.layer_parallel.minibatch.updates import evaluate
from xbraid_py.nn import Dropout
from xbraid_py.recipes.minibatch import MinibatchTraining, prepare
from xbraid_py.recipes.options.minibatch import MinibatchOptions
from xbraid_py.run.record import read
from xbraid_py.run.run_options import free

UPDATES = 8


@dataclass(frozen=True, kw_only=True)
class SmallOptions(MinibatchOptions):
    """A run of `UPDATES` updates with a checkpoint of each."""

    converged: bool = False
    dropout: float = 0.2
    learning_rate: float = 0.05
    clip: float | None = 1.0
    validate_every: int = free(4)
    checkpoint_every: int = free(1)
    keep: int = free(100)


class SmallTraining(MinibatchTraining):
    """Points in two classes; calls `at(number)` in the middle of an update."""

    at: Callable[[int], object]

    def batches(self, done):
        return (batch(number) for number in range(done, UPDATES))

    def loss(self, outputs, targets):
        if self.trained.model.training:
            self.at(self.trained.update + 1)
        return nn.functional.cross_entropy(outputs, targets)

    def validate(self):
        return {"val_accuracy": evaluate(self.trained.model, [batch(-1, 50)], accuracy_of, self.trained.grid)}

    def draw(self, rows, figures):
        pass  # it would take longer than all the rest of these runs


def batch(number: int, samples: int = 12):
    """Inputs (samples, 3) and classes 0 .. 1."""
    random = torch.Generator().manual_seed(100 + number)
    inputs = torch.randn(samples, 3, generator=random, dtype=torch.float64)
    return inputs, (inputs.sum(1) > 0).long()


def accuracy_of(logits, labels):
    """Share of right ones."""
    return (logits.argmax(1) == labels).double().mean()


def build(comm: Communicator | None, converged: bool = False, dropout: float = 0.2) -> nn.Sequential:
    """Batch statistics in front, masks in the layers; coarse solves that are tightened under way, or exact ones."""
    mgrit = MGRIT(cycle="V", cfactor=2, max_iter=9 if converged else 1, min_coarse=2)
    stack = LayerParallel(
        lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), Dropout(dropout)),
        8,
        2.0,
        comm,
        mgrit=mgrit,
        accuracy=GradientControl(gradient_error=3e-3, check=4, max_level=3),
        seed=5,
        vmap=False,
    )
    norm = nn.LayerNorm(4) if converged else nn.BatchNorm1d(4)  # replicas have statistics of their own
    return nn.Sequential(linear(3, 4, 2), norm, stack, linear(4, 2, 3)).double()


def adam(parameters):
    return torch.optim.Adam(parameters, lr=0.05)


def cosine(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, UPDATES)


def run(
    comm: Communicator,
    out: Path,
    resume: str | Path | None = None,
    *,
    at: Callable[[int], object] = lambda number: None,
    optimizer: Callable = adam,
    schedule: Callable = cosine,
    model: Callable[..., nn.Module] = build,
    **changes: Any,
) -> tuple[dict, dict[str, torch.Tensor]]:
    """A run to its end: its last row, and its weights."""
    options = SmallOptions(out=out, resume=None if resume is None else str(resume), **changes)
    made: list[nn.Module] = []

    def make(model, grid):
        rule = optimizer(model.parameters())
        trained = MinibatchState(model=model, optimizer=rule, comm=comm, scheduler=schedule(rule), grid=grid)
        training = SmallTraining(options, trained, UPDATES)
        training.at = at
        made.append(model)
        return training

    def built(layers):
        return model(layers, options.converged, options.dropout)

    row = prepare("small", "", options, comm, built, make)()
    return row, {name: value for name, value in made[0].state_dict().items() if isinstance(value, torch.Tensor)}


def on_ranks(size, body):
    return run_on_one_core(size, body) if size > 1 else [body(SerialCommunicator())]


def rows_of(out, after=0):
    """Updates of the record without the clock."""
    rows = [row for row in read(out / "metrics.jsonl") if row["kind"] == "update"]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["update"] > after]


def same(found, expected, tolerance=0.0):
    """Whether rows agree: bitwise, or their losses and gradients to a tolerance."""
    if not tolerance:
        assert found == expected
        return
    assert [row["update"] for row in found] == [row["update"] for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.get("val_accuracy") == other.get("val_accuracy")
        for name in ("loss", "grad_norm", "learning_rate"):
            assert row[name] == pytest.approx(other[name], rel=tolerance), (row["update"], name)


def undisturbed_runs(folders):
    """`written(size)`: folder of an undisturbed run with a checkpoint of every update, and what the run returned.

    `folders` is pytest's factory of folders; each size is run once.
    """
    known = {}

    def written(size):
        if size not in known:
            out = folders.mktemp(f"ranks{size}")
            known[size] = (out, *on_ranks(size, lambda comm: run(comm, out))[0])
        return known[size]

    return written
