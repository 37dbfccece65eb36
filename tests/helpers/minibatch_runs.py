"""Small runs on minibatches in folders of their own, for tests: two classes of points, a stack of dense layers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from blocks import linear
from processes import run_on_one_core
from torch import nn

from xbraid_py import MGRIT, GradientControl, LayerParallel
from xbraid_py.comm import Communicator, SerialCommunicator
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.layer_parallel.minibatch.state import Trained
from xbraid_py.layer_parallel.minibatch.updates import evaluate
from xbraid_py.nn import Dropout
from xbraid_py.recipes.digits_resume import read_resumed
from xbraid_py.recipes.digits_run import follow
from xbraid_py.run.folder import claim
from xbraid_py.run.record import read

UPDATES = 8
CONFIGURATION = {"num_layers": 8, "replicas": 1, "out": "here", "mgrit": {"cfactor": 2}}
FREE = ("out", "replicas")


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


def run(comm: Communicator, out: Path, resume: str | Path | None = None, **changes):
    """A run to its end: its last test, and its weights. Calls `changes["at"](number)` in the middle of an update."""
    replicas = changes.pop("replicas", 1)
    network = {name: changes.pop(name) for name in ("converged", "dropout") if name in changes}
    at = changes.pop("at", lambda number: None)
    make = changes.pop("optimizer", lambda parameters: torch.optim.Adam(parameters, lr=0.05))
    schedule = changes.pop("schedule", lambda opt: torch.optim.lr_scheduler.CosineAnnealingLR(opt, UPDATES))
    grid = ProcessGrid(comm, replicas)
    folder = claim(out, comm)
    configuration = CONFIGURATION | {"replicas": replicas}
    resume = None if resume is None else str(resume)
    start = read_resumed(resume, out, configuration, FREE, build(None, **network))
    model = build(grid.layers, **network)
    optimizer = make(model.parameters())
    seen = [start.update]

    def loss(logits, labels):
        seen[0] += 1
        at(seen[0])
        return nn.functional.cross_entropy(logits, labels)

    tested = follow(
        Trained(model=model, optimizer=optimizer, scheduler=schedule(optimizer), grid=grid),
        lambda done: (batch(number) for number in range(done, UPDATES)),
        loss,
        lambda: {"test_accuracy": evaluate(model, [batch(-1, 50)], accuracy_of, grid)},
        **{
            "folder": folder,
            "configuration": configuration,
            "num_updates": UPDATES,
            "record_every": 1,
            "test_every": 4,
            "checkpoint_every": 1,
            "keep": 100,
            "clip": 1.0,
            "start": start,
            **changes,
        },
    )
    return tested, {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


def on_ranks(size, body):
    return run_on_one_core(size, body) if size > 1 else [body(SerialCommunicator())]


def rows_of(out, after=0):
    """Rows of the record without the clock."""
    rows = [row for row in read(out / "metrics.jsonl") if row["kind"] in ("update", "test")]
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows if row["update"] > after]


def same(found, expected, tolerance=0.0):
    """Whether rows agree: bitwise, or numbers to a tolerance and solver's residuals to a digit."""
    if not tolerance:
        assert found == expected
        return
    assert [(row["kind"], row["update"]) for row in found] == [(row["kind"], row["update"]) for row in expected]
    for row, other in zip(found, expected, strict=True):
        assert row.get("test_accuracy") == other.get("test_accuracy")
        for name in ("loss", "grad_norm", "learning_rate") if row["kind"] == "update" else ():
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
