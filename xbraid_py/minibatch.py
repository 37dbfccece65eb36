"""Training on minibatches: updates, evaluation, the record of a run and its picture.

Everything here is collective: all ranks call it with the same arguments and the same batches.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.errors import RunError
from xbraid_py.io.metrics import MetricsWriter, read
from xbraid_py.io.progress import Progress
from xbraid_py.io.signals import stop_agreed
from xbraid_py.io.training import prepare
from xbraid_py.layer_parallel import SolveRecord, clip_grad_norm_
from xbraid_py.process_grid import ProcessGrid

# A batch: what goes into the model, and what should come out; the first axis of both is the samples.
Batch = tuple[Tensor, Tensor]
# A mean over samples, of the model's output and what should come out.
Measure = Callable[[Tensor, Tensor], Tensor]


def train(
    model: nn.Module,
    batches: Iterable[Batch],
    loss: Measure,
    optimiser: torch.optim.Optimizer,
    *,
    scheduler: Any = None,
    clip: float | None = None,
    grid: ProcessGrid | None = None,
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
    optimiser : torch.optim.Optimizer
        Of `model.parameters()`.
    scheduler : torch.optim.lr_scheduler.LRScheduler, optional
        Steps once after every update.
    clip : float, optional
        2-norm of the gradient of the whole model above which it is scaled down to this.
    grid : ProcessGrid, optional
        Each replica takes its share of every batch, and the gradients are averaged; the stacks are on `grid.layers`.

    Yields
    ------
    dict
        "kind": "update", "update" (from 1), "loss" (of the whole batch, before the update), "learning_rate",
        "seconds" spent in updates so far, "grad_norm" (before clipping, None without), and "stacks": for every
        layer-parallel stack what its solves did (`SolveRecord.as_dict()`), in the order of the model.

    Raises
    ------
    RunError
        On all ranks, if the loss is not finite; the weights are those of the update before.
    """
    model.train()
    seconds = 0.0
    for number, batch in enumerate(batches, start=1):
        start = time.perf_counter()
        inputs, targets = grid.shard(batch) if grid else batch
        optimiser.zero_grad()
        value = loss(model(inputs), targets)
        mean = _mean_over_replicas(float(value.detach()), len(inputs), grid)
        if not math.isfinite(mean):
            raise RunError(f"update {number}: the loss is {mean}; use a smaller learning rate, or clip the gradients")
        value.backward()
        if grid:
            grid.average_gradients(model, samples=len(inputs))
        norm = clip_grad_norm_(model, clip) if clip is not None else None
        rate = optimiser.param_groups[0]["lr"]
        optimiser.step()
        if scheduler is not None:
            scheduler.step()
        seconds += time.perf_counter() - start
        yield {
            "kind": "update",
            "update": number,
            "loss": mean,
            "learning_rate": float(rate),
            "seconds": seconds,
            "grad_norm": norm,
            "stacks": [record.as_dict() for record in solve_records(model)],
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
    found = (getattr(part, "record", None) for part in model.modules())
    return [record for record in found if isinstance(record, SolveRecord)]


def _mean_over_replicas(value: float, samples: int, grid: ProcessGrid | None) -> float:
    if grid is None:
        return value
    weighted = torch.tensor([[value * samples, samples]], dtype=torch.float64)
    summed, count = grid.data.ordered_sum(weighted, [1] * grid.replicas).tolist()
    return summed / count


def follow(
    rows: Iterator[dict],
    test: Callable[[], Mapping[str, float]],
    *,
    out: Path,
    comm: Communicator,
    configuration: Mapping[str, Any],
    num_updates: int,
    record_every: int,
    test_every: int,
) -> dict:
    """Make the updates of `train`, and leave `config.yaml`, `metrics.jsonl` and `figures/training.png` in a folder.

    Parameters
    ----------
    rows : iterator of dict
        What `train` returns.
    test : callable
        Measures the model as it is, such as {"test_accuracy": 0.98}; called on all ranks.
    out : Path
        The folder; an earlier record there is set aside.
    comm : Communicator
        All ranks of the job.
    configuration : mapping
        The options, JSON-able (`xbraid_py.io.options.to_dict`).
    num_updates : int
        Updates in all, for the screen.
    record_every : int
        Updates between two rows of the record; the first, the last, and those after which a solver was changed or whose
        gradient error was measured are there in any case.
    test_every : int
        Updates between two tests; there is one after the last update as well.

    Returns
    -------
    dict
        The last test, as it is in the record: "kind": "test", "update", "seconds" spent in updates, and what
        `test` has given.

    Raises
    ------
    ValueError
        If there is no update.
    RunError
        If a signal asks for an end (SIGTERM or SIGUSR1, to any rank); after the update under way.
    """
    prepare(out, comm, (), {})
    tested: dict = {}
    with MetricsWriter(out / "metrics.jsonl", comm, configuration) as record, Progress(comm, num_updates) as screen:
        if comm.rank == 0:
            (out / "config.yaml").write_text(yaml.safe_dump(dict(configuration), sort_keys=False))
        for row in rows:
            number = row["update"]
            is_last = number == num_updates
            telling = any(stack["event"] or stack["measured"] for stack in row["stacks"])
            if telling or is_last or number == 1 or number % record_every == 0:
                record.write(row)
            due = is_last or number % test_every == 0
            if due:
                tested = {"kind": "test", "update": number, "seconds": row["seconds"], **test()}
                record.write(tested)
            screen.update(_shown(row, tested if due else {}))
            if stop_agreed(comm, None) and not is_last:
                raise RunError(f"stopped by a signal after update {number}; a run on minibatches keeps no checkpoint")
    if not tested:
        raise ValueError("rows is empty; use at least one batch")
    if comm.rank == 0:
        picture(read(out / "metrics.jsonl"), out / "figures" / "training.png")
    return tested


def _shown(row: Mapping[str, Any], tested: Mapping[str, Any]) -> dict:
    """A row in the words of the screen."""
    shown = {"update": row["update"], "seconds": row["seconds"], "objective": row["loss"]}
    shown |= {"step_size": row["learning_rate"], "grad_norm": row["grad_norm"]}
    shown["val_accuracy"] = tested.get("test_accuracy")
    for key, name in (("state_residual", "residual"), ("adjoint_residual", "adjoint_residual")):
        shown[key] = max((stack[name] for stack in row["stacks"]), default=None)
    return shown


def picture(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss and tests over the updates, and below them the estimated error of the gradients, as a PNG.

    Parameters
    ----------
    rows : sequence of mapping
        A record, as `xbraid_py.io.metrics.read` gives it.
    path : Path
        The file; its folder is made if there is none.
    """
    from matplotlib.figure import Figure  # takes its time to load: on one rank only

    updates = [row for row in rows if row["kind"] == "update"]
    tests = [row for row in rows if row["kind"] == "test"]
    at = [row["update"] for row in updates]
    figure = Figure(figsize=(7.0, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    upper.plot(at, [row["loss"] for row in updates], color="#0072b2", linewidth=0.9, label="loss of a minibatch")
    upper.set(ylabel="loss", yscale="log")
    names = [name for name in tests[-1] if name not in ("kind", "update", "seconds")] if tests else []
    for name, colour in zip(names, ("#c1272d", "#009e73", "#cc79a7"), strict=False):
        # Losses share the axis of the loss; everything else has its own on the right.
        axes = upper if name.endswith("loss") else upper.twinx()
        points = [(row["update"], row[name]) for row in tests]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, label=name.replace("_", " "))
        if axes is not upper:
            axes.set_ylabel(name.replace("_", " "), color=colour)
        if name.endswith("accuracy"):
            axes.set_ylim(top=1.0)
    upper.legend(loc="upper right", frameon=False)
    solved = [(row["update"], stack) for row in updates for stack in row["stacks"]]
    for measured, marker, label in ((False, ".", "estimated"), (True, "o", "measured")):
        points = [(n, s["gradient_error"]) for n, s in solved if s["measured"] is measured and s["gradient_error"]]
        if points:
            lower.plot(*zip(*points, strict=True), marker, color="#e69f00" if measured else "0.5", label=label)
            lower.set_yscale("log")
    if lower.lines:
        lower.legend(loc="upper right", frameon=False)
    lower.set(xlabel="update", ylabel="gradient error")
    for axes in (upper, lower):
        axes.grid(color="0.9", linewidth=0.7)
        axes.spines["top"].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150, format="png")
