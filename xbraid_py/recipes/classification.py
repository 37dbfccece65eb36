"""A classification job: options, nested iteration on a data set, and its pictures.

What `drivers/peaks.py` and `drivers/indian_pines.py` have in common. A driver makes a subclass of the options, says how
its data are read, and what it does with the trained network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.data.dataset import Dataset
from xbraid_py.kernels import BACKEND
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.multilevel.depth.nested import Record, check_ranks
from xbraid_py.multilevel.depth.options import NestedOptions
from xbraid_py.planner import Workload
from xbraid_py.problem.problem import Problem
from xbraid_py.recipes.options.classification import ClassificationOptions
from xbraid_py.recipes.planned import by_plan, train_by_plan
from xbraid_py.run.engine import Row, State, Training
from xbraid_py.run.folder import METRICS
from xbraid_py.run.record import read
from xbraid_py.run.store.read import Checkpoint

# Draws the pictures of a trained network into a folder, on the rank that has rows; what it returns there is recorded.
Finish = Callable[["NestedTraining", list[Row], Path], Row | None]


class NestedTraining(Training):
    """A nested iteration on a problem with its validation, perhaps by another schedule than that of the options.

    What is given as `finish` draws the pictures of the trained network.
    """

    def __init__(
        self,
        options: ClassificationOptions,
        problem: Problem,
        validation: Dataset,
        finish: Finish | None = None,
        nested: NestedOptions | None = None,
        plan: str = "",
    ):
        self.options, self.validation, self.finish, self.plan = options, validation, finish, plan
        self.method = options.run_of(problem, nested or options.nested)
        self.total = sum(self.method.options.updates)

    def steps(self) -> Iterator[Row]:
        for record in self.method.run():
            yield row_of(record)

    def is_due(self, row: Row) -> bool:
        return row["update"] % self.options.validate_every == 0

    def validate(self) -> Row:
        return {"val_accuracy": self.accuracy(self.validation)}

    def accuracy(self, points: Dataset) -> float:
        """Share of some points that the network classifies rightly at present; collective."""
        predicted = self.method.network.predict(self.method.weights, points.features)
        return float((predicted == points.labels).double().mean())

    def state(self) -> State:
        return self.method.state()

    def load(self, checkpoint: Checkpoint) -> None:
        self.method.load(checkpoint, self.options.convert_dtype)

    def describe(self) -> str:
        solver = self.method.objective.forward
        table = solver.hierarchy.table(solver.options)
        plan, self.plan = self.plan, ""  # once, not on every level
        return "\n".join(filter(None, [plan, f"{self.method.depth} layers, kernels: {BACKEND}", table]))

    def draw(self, rows: list[Row], figures: Path) -> Row | None:
        return self.finish(self, rows, figures) if self.finish else None

    def say(self, row: Row) -> str:
        return f"final validation accuracy: {100 * row['val_accuracy']:.2f} %"


def prepare_job(
    options: ClassificationOptions,
    comm: Communicator,
    load: Callable[[], tuple[Dataset, Dataset]],
    finish: Finish,
    recipe: str = "",
) -> Callable[[], Row]:
    """Read and check everything, without a message; returns the run.

    Parameters
    ----------
    options : ClassificationOptions
    comm : Communicator
    load : callable
        Reads the training and the validation samples, features in the dtype of the options; sends no message.
    finish : callable
        Is called on all ranks with the trained network: draws pictures.
    recipe : str
        See `train`.

    Raises
    ------
    ValueError, OSError
        Whatever is wrong with options, data or folder; on every rank, or on rank 0 alone.
    """
    samples, validation = load()
    for name, each in (("training samples", samples), ("validation samples", validation)):
        hold(comm, name, each.features, each.labels)

    def prepared(options: ClassificationOptions, plan: str = "", **claimed) -> Callable[[], Row]:
        def train_by(options: ClassificationOptions, kind: str, finish: Finish, nested: NestedOptions | None = None):
            def training(comm: Communicator, options: ClassificationOptions) -> NestedTraining:
                return NestedTraining(options, options.problem(samples, comm), validation, finish, nested, plan)

            def check() -> None:
                check_ranks(options.problem(samples, comm), options.num_layers, options.nested)

            return train_by_plan(kind, training, options, comm, check=check, recipe=recipe, **claimed)

        nested = train_by(options, "nested", finish)
        if not options.compare:
            return nested
        claimed.clear()
        alone = replace(options, out=options.out / "non-nested", resume=options.resume and "auto")
        non_nested = train_by(alone, "non-nested", _beside(options.out), options.nested.non_nested())

        def both() -> Row:
            row = nested()
            non_nested()
            return row

        return both

    workload = Workload(
        num_layers=options.num_layers,
        batch=samples.num_samples,
        architecture=options.network,
        dtype=options.torch_dtype,
        num_features=samples.num_features,
        num_classes=samples.num_classes,
        optim=options.optim,
    )
    return by_plan(options, workload, comm, prepared, most=1 if options.nested.adaptive else None)


def _beside(out: Path) -> Finish:
    """The pictures of a run of comparison: curves of both runs."""

    def finish(training: NestedTraining, rows: list[Row], figures: Path) -> None:
        if rows:
            curves([*read(out / METRICS), *rows], figures)

    return finish


def curves(rows: list[Row], figures: Path) -> None:
    """Accuracy over work, and convergence, of the runs that rows of records are of."""
    from xbraid_py.recipes.pictures.curves import accuracy_over_work, convergence  # slow to load: on one rank only

    accuracy_over_work(rows, figures / "accuracy.png")
    convergence(rows, figures / "convergence.png")


def network(checkpoint: Checkpoint) -> nn.Module:
    """The trained network of a checkpoint as a plain module, from features (B, F) to logits (B, classes)."""
    return to_sequential(checkpoint.path)


def row_of(record: Record) -> Row:
    """A record of a nested iteration in the words of the engine."""
    evaluation = record.evaluation
    grid = {} if record.cut is None else {"cut": list(record.cut), "lengths": list(record.lengths or ())}
    return {
        "level": record.level,
        "num_layers": record.num_layers,
        "update": record.update,
        "work": record.work,
        "seconds": record.seconds,
        "objective": evaluation.value,
        "loss": evaluation.loss,
        "grad_norm": record.grad_norm,
        "train_accuracy": evaluation.accuracy,
        "state_residual": evaluation.residual,
        "adjoint_residual": record.adjoint_residual,
        "step_size": record.step,
        "backtracks": record.backtracks,
        "evaluations": record.evaluations,
        "note": record.note,
        "final": record.final,
        **grid,
    }


@dataclass(frozen=True, eq=False)
class Scores:
    """Of predicted classes against true ones.

    `confusion` (K, K), int64, counts samples of each true class (row) that were taken for each class (column).
    """

    confusion: Tensor

    @classmethod
    def of(cls, predicted: Tensor, labels: Tensor, num_classes: int) -> Scores:
        """Scores of predictions (B,) against labels (B,), int64, both in 0 .. num_classes - 1.

        Raises `ValueError` if the shapes differ, there is no sample, or a class is out of range, and `TypeError` if one
        of them is not int64.
        """
        if predicted.shape != labels.shape or labels.ndim != 1 or not len(labels):
            raise ValueError(
                f"predicted.shape={tuple(predicted.shape)} and labels.shape={tuple(labels.shape)} must be the same "
                f"(B,), B at least 1; use (100,)"
            )
        for name, classes in (("predicted", predicted), ("labels", labels)):
            if classes.dtype != torch.int64:
                raise TypeError(f"{name} is {classes.dtype}, must be int64; use {name}.long()")
            low, high = int(classes.min()), int(classes.max())
            if low < 0 or high >= num_classes:
                raise ValueError(f"{name} holds {low} .. {high}, must lie in 0 .. num_classes - 1 = {num_classes - 1}")
        pairs = labels * num_classes + predicted
        return cls(torch.bincount(pairs, minlength=num_classes**2).reshape(num_classes, num_classes))

    @property
    def overall(self) -> float:
        """Share of all samples that are classified rightly."""
        return int(self.confusion.diagonal().sum()) / int(self.confusion.sum())

    @property
    def per_class(self) -> list[float | None]:
        """Share of the samples of each class that are; None for a class without samples."""
        totals, right = self.confusion.sum(1).tolist(), self.confusion.diagonal().tolist()
        return [r / n if n else None for r, n in zip(right, totals, strict=True)]

    @property
    def average(self) -> float:
        """Mean of these over the classes that have samples."""
        shares = [share for share in self.per_class if share is not None]
        return sum(shares) / len(shares)

    @property
    def kappa(self) -> float:
        """Cohen's kappa: (p_o - p_e) / (1 - p_e), with the agreement p_e that is to be expected by chance."""
        total = float(self.confusion.sum())
        expected = float((self.confusion.sum(0).double() @ self.confusion.sum(1).double()) / total**2)
        # All samples of one class, and taken for it: agreement is certain, and full.
        return 1.0 if expected == 1.0 else (self.overall - expected) / (1.0 - expected)

    def as_dict(self) -> dict:
        """All figures, JSON-able."""
        return {
            "overall_accuracy": self.overall,
            "average_accuracy": self.average,
            "kappa": self.kappa,
            "class_accuracy": self.per_class,
        }
