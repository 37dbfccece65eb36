"""A classification job: options, nested iteration on a data set, and its pictures.

What `drivers/peaks.py` and `drivers/indian_pines.py` have in common. A driver makes a subclass of the options, says how
its data are read, and what it does with the trained network.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.data.dataset import Dataset
from xbraid_py.kernels import BACKEND
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.nested import NestedIteration, NestedOptions, Record, check_ranks
from xbraid_py.optim import OneShotOptions
from xbraid_py.planner import Workload
from xbraid_py.problem.network import InitialScales
from xbraid_py.problem.problem import DenseResNetOptions, Problem
from xbraid_py.problem.regularization import Regularization
from xbraid_py.recipes.planned import by_plan, train_by_plan
from xbraid_py.run.engine import Row, State, Training
from xbraid_py.run.folder import METRICS
from xbraid_py.run.record import read
from xbraid_py.run.run_options import RunOptions, free
from xbraid_py.run.store.read import Checkpoint

# Draws the pictures of a trained network into a folder, on the rank that has rows; what it returns there is recorded.
Finish = Callable[["NestedTraining", list[Row], Path], Row | None]


@dataclass(frozen=True, kw_only=True)
class ClassificationOptions(RunOptions):
    """A classification job.

    Parameters
    ----------
    num_layers
        Residual layers of the finest network.
    seed
        Of the data and of the initial weights.
    dtype
        Of weights and states.
    convert_dtype
        Go on from a checkpoint of the other dtype as well.
    validate_every
        Updates between two validations.
    compare
        Train the deep network alone as well, with as much work: a run of its own in the folder non-nested of the out
        folder, with pictures of both.
    network
        The network.
    initial
        Standard deviations of its initial weights.
    regularization
        Terms of the objective besides the loss.
    nested
        Schedule of the refinements.
    optim
        The one-shot optimizer.
    mgrit
        Solver of the states; that of the plan if nothing of it is given.
    adjoint_iter
        Iterations of the adjoint solves; as mgrit.max_iter if not given.
    adjoint_tol
        Tolerance of the adjoint solves; as mgrit.tol, or the cycle's, if not given.
    replicas
        Copies of the network that share the samples, each on as many ranks; those of the plan if not given.
    plan
        Choose the solver and the replicas by rule, from the sizes of the problem and the number of ranks, so that the
        same command gives the same numbers on any machine; or measure this machine first (measured).
    """

    num_layers: int = 64
    seed: int = 0
    dtype: Literal["float64", "float32"] = field(default="float64", metadata={"instead": "--convert_dtype"})
    convert_dtype: bool = free(False)
    validate_every: int = free(5)
    compare: bool = free(False)
    network: DenseResNetOptions = DenseResNetOptions()
    initial: InitialScales = InitialScales()
    regularization: Regularization = Regularization()
    nested: NestedOptions = NestedOptions()
    optim: OneShotOptions = OneShotOptions()
    mgrit: MGRIT | None = None
    adjoint_iter: int | None = None
    adjoint_tol: float | None = None
    replicas: int | None = free(None)
    plan: Literal["rule", "measured"] = free("rule")

    def __post_init__(self):
        super().__post_init__()
        self.require_least(5, validate_every=1)
        self.require_least(1, replicas=1)
        for name, good in (("adjoint_iter", "1"), ("adjoint_tol", "1e-6, or 0 for a fixed number of iterations")):
            if getattr(self, name) is not None and not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name}={getattr(self, name)} must be at least 0; use {good}")
        self.nested.depths(self.num_layers)
        self.nested.splines(self.network.splines)

    @property
    def free(self) -> set[str]:
        """See `RunOptions`; the dtype is free if numbers of the other one are converted."""
        return super().free | ({"dtype"} if self.convert_dtype else set())

    @property
    def solver(self) -> MGRIT:
        """Options of the state solves; the lagged cycle where there is neither an option nor a plan."""
        return self.mgrit or MGRIT()

    @property
    def adjoint(self) -> MGRIT:
        """Options of the adjoint solves; `ValueError` if the cycle needs more iterations than asked for."""
        if self.adjoint_iter == 0 and self.solver.cycle == "lagged":
            raise ValueError("adjoint_iter=0 must be at least 1 in a lagged cycle; use 1")
        return self.solver.for_adjoint(self.adjoint_iter, self.adjoint_tol)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return getattr(torch, self.dtype)

    def problem(self, train: Dataset, comm: Communicator) -> Problem:
        """The problem of training this network on these data."""
        return Problem(
            features=train.features,
            labels=train.labels,
            num_classes=train.num_classes,
            architecture=self.network,
            regularization=self.regularization,
            forward=self.solver,
            adjoint=self.adjoint,
            comm=comm,
            dtype=self.torch_dtype,
            replicas=self.replicas or 1,
        )

    def run_of(self, problem: Problem, nested: NestedOptions) -> NestedIteration:
        """Nested iteration on a problem by a schedule."""
        return NestedIteration(
            problem, self.num_layers, options=nested, one_shot=self.optim, scales=self.initial, seed=self.seed
        )


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
