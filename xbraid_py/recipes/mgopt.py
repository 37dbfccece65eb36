"""MG/OPT in depth as a job: options, problems and training of the very deep and very thin networks of paper 000.

Shape letters: `F` features, `B` samples.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.data import circles, mnist, peaks
from xbraid_py.data.dataset import Batches, Dataset
from xbraid_py.data.mnist import SCALINGS, columns
from xbraid_py.layer_parallel.export import to_sequential
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.mgopt import CycleRecord, LevelOptions, MGOpt, MGOptOptions
from xbraid_py.planner import Workload
from xbraid_py.problem.portions import Samples
from xbraid_py.problem.problem import DenseResNetOptions, PerceptronProblem, perceptron_weights
from xbraid_py.problem.regularization import Regularization
from xbraid_py.recipes.planned import by_plan, train_by_plan
from xbraid_py.run.engine import Row, State, Training
from xbraid_py.run.run_options import RunOptions, free
from xbraid_py.run.store.read import Checkpoint

MAP_SIZE = 200


@dataclass(frozen=True, kw_only=True)
class MGOptRunOptions(RunOptions):
    """A job of MG/OPT in depth.

    Parameters
    ----------
    num_layers
        Residual layers of the finest network.
    seed
        Of samples, their order and initial weights.
    dtype
        Of weights and states.
    beta
        Tikhonov regularization of the finest network.
    goal
        Validation accuracy at which the run ends.
    max_cycles
        End after so many cycles, whatever the accuracy.
    max_work
        End after as many cycles as so many work units suffice for, if these are fewer.
    validate_every
        Cycles between two validations.
    checkpoint_every
        Cycles between two checkpoints.
    data_dir
        Folder of the files of a data set.
    network
        The network.
    mgopt
        Levels, transfers and optimizers.
    mgrit
        Solver of the states; that of the plan if nothing of it is given.
    replicas
        Copies of the network that share the samples, each on as many ranks; those of the plan if not given.
    plan
        Choose solver and replicas by rule, or measure this machine first (measured).
    """

    num_layers: int = 2048
    seed: int = 0
    dtype: Literal["float64", "float32"] = "float64"
    beta: float = 1e-4
    goal: float = free(1.0)
    max_cycles: int = free(300)
    max_work: float | None = free(None)
    validate_every: int = free(1)
    data_dir: Path | None = free(None)
    network: DenseResNetOptions = DenseResNetOptions(width=3, T=1.0, activation="relu")
    mgopt: MGOptOptions = MGOptOptions()
    mgrit: MGRIT | None = None
    replicas: int | None = free(None)
    plan: Literal["rule", "measured"] = free("rule")

    def __post_init__(self):
        super().__post_init__()
        self.require_least(100, max_cycles=1, validate_every=1)
        if self.max_work is not None and not 0.0 < self.max_work < float("inf"):
            raise ValueError(f"max_work={self.max_work} must be positive and finite; use 400")
        if not 0.0 < self.goal <= 1.0:
            raise ValueError(f"goal={self.goal} must be above 0 and at most 1; use 0.93")
        if not 0.0 <= self.beta < float("inf"):
            raise ValueError(f"beta={self.beta} must be at least 0 and finite; use 1e-4")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return getattr(torch, self.dtype)

    @abstractmethod
    def training(self, comm: Communicator) -> DepthTraining:
        """The training, at its beginning; reads files, sends no message."""

    def problem(self, samples: Samples, num_classes: int, comm: Communicator) -> PerceptronProblem:
        """A problem as in paper 000: Tikhonov beta |.|^2 on all weights, in the type of the features."""
        features, labels = samples
        return PerceptronProblem(
            features=features,
            labels=labels,
            num_classes=num_classes,
            architecture=self.network,
            # beta |.|^2 is gamma/2 |.|^2 with gamma = 2 beta.
            regularization=Regularization(2 * self.beta, 0.0, 2 * self.beta, "sum"),
            forward=self.solver,
            adjoint=self.solver.for_adjoint(),
            comm=comm,
            dtype=features.dtype,
            replicas=self.replicas or 1,
        )

    @property
    def solver(self) -> MGRIT:
        """Options of the solves; layer after layer where there is neither an option nor a plan."""
        return self.mgrit or MGRIT(max_levels=1)

    @property
    @abstractmethod
    def batch(self) -> int:
        """Samples that are propagated together."""

    @abstractmethod
    def hold(self, comm: Communicator) -> None:
        """Read the data and note what they are (`comm.agreement.hold`); sends no message."""


@dataclass(frozen=True, kw_only=True)
class CirclesOptions(MGOptRunOptions):
    """The circles job.

    Parameters
    ----------
    num_train
        Training points.
    num_val
        Validation points.
    sampling
        Of the points: balanced classes with a gap between them, or uniform in the square.
    """

    num_train: int = 2000
    num_val: int = 1000
    sampling: Literal["balanced", "square"] = "balanced"
    out: Path = free(Path("runs/circles"))

    @property
    def batch(self) -> int:
        """See `MGOptRunOptions`."""
        return self.num_train

    def hold(self, comm: Communicator) -> None:
        """See `MGOptRunOptions`."""
        for name, points in zip(("training points", "validation points"), self._points(), strict=True):
            hold(comm, name, points.features, points.labels)

    def _points(self) -> tuple[Dataset, Dataset]:
        return circles.generate(self.num_train, self.num_val, self.seed, self.sampling, self.torch_dtype)

    def training(self, comm: Communicator) -> DepthTraining:
        """The training, at its beginning; sends no message."""
        train, validation = self._points()
        problem = self.problem((train.features, train.labels), train.num_classes, comm)
        method = MGOpt(problem, self.num_layers, self.mgopt)
        return DepthTraining(self, method, (validation.features, validation.labels), plane=circles.class_of)


@dataclass(frozen=True, kw_only=True)
class MnistColumnsOptions(MGOptRunOptions):
    """The job of MNIST by MG/OPT.

    Parameters
    ----------
    batch_size
        Images of a minibatch, one for each cycle; 0 takes all images in every cycle.
    portion
        With batch_size=0, images that are propagated together.
    scaling
        Of the pixels: in [0, 1] less the mean of each (centered), in [0, 1] (unit), or of mean 0 and standard
        deviation 1 (standard).
    num_train
        Take only the first so many training images.
    num_test
        Take only the first so many test images, for the validation.
    """

    batch_size: int = 1000
    portion: int = 2000
    scaling: Literal["centered", "unit", "standard"] = "centered"
    num_train: int | None = None
    num_test: int | None = None
    dtype: Literal["float64", "float32"] = "float32"
    beta: float = 1e-5
    goal: float = free(0.93)
    max_cycles: int = free(2000)
    validate_every: int = free(5)
    checkpoint_every: int = free(100)
    out: Path = free(Path("runs/mgopt_mnist"))
    network: DenseResNetOptions = DenseResNetOptions(width=10, T=1.0, activation="relu")
    mgopt: MGOptOptions = MGOptOptions(optim=LevelOptions(learning_rate=(0.01,)))

    @property
    def batch(self) -> int:
        """See `MGOptRunOptions`."""
        return self.batch_size or self.portion

    def __post_init__(self):
        super().__post_init__()
        self.require_least(2000, portion=1)
        if self.batch_size < 0:
            raise ValueError(f"batch_size={self.batch_size} must be at least 0; use 1000, or 0 for all images")
        if self.scaling not in SCALINGS:
            raise ValueError(f"scaling={self.scaling!r} must be {' or '.join(SCALINGS)}; use centered")

    def hold(self, comm: Communicator) -> None:
        """See `MGOptRunOptions`."""
        data = _mnist(self.data_dir)
        hold(comm, "training images", data.train_images, data.train_labels)
        hold(comm, "test images", data.test_images, data.test_labels)

    def training(self, comm: Communicator) -> DepthTraining:
        """The training, at its beginning; reads the files, sends no message."""
        data = _mnist(self.data_dir)
        train, test = columns(data, self.scaling, self.torch_dtype, self.num_train, self.num_test)
        portions = None
        batches: Callable[[int], Samples] | None = None
        if self.batch_size:
            order = Batches(len(train), self.batch_size, self.seed)
            epoch = lru_cache(1)(order.epoch)

            def drawn(cycle: int) -> Samples:
                return train.samples(epoch(cycle // len(order))[cycle % len(order)])

            batches, first = drawn, drawn(0)
        else:
            portions = train.portions(self.portion)
            first = portions[0]
        method = MGOpt(self.problem(first, mnist.NUM_CLASSES, comm), self.num_layers, self.mgopt, portions)
        return DepthTraining(self, method, test.samples(), batches)


_mnist = lru_cache(1)(mnist.load)  # a process of a study makes many runs


class DepthTraining(Training):
    """A run of MG/OPT in depth: cycles until a validation reaches the goal, or so many.

    `batches(k)`, if given, are the samples of cycle k; without it all are taken in every cycle. `plane(x, y)`, if
    given, is the class of points in the plane: then a map of the classes is drawn as well. `scale` is the standard
    deviation of the initial weights of the layers.
    """

    plan = ""

    def __init__(
        self,
        options: MGOptRunOptions,
        method: MGOpt,
        validation: Samples,
        batches: Callable[[int], Samples] | None = None,
        plane: Callable | None = None,
        scale: float = 1.0,
    ):
        self.options, self.method, self.validation, self.batches = options, method, validation, batches
        self.plane = plane
        self.unit = method.schedule.work(options.mgopt.cycle, method.costs)  # work units of a cycle
        cycles = options.max_cycles if options.max_work is None else int(options.max_work / self.unit)
        self.total = max(1, min(options.max_cycles, cycles))
        method.x = perceptron_weights(method.network, options.seed, scale)

    def steps(self) -> Iterator[Row]:
        for record in self.method.run(self.total, self.batches):
            yield self._row(record)

    def _row(self, record: CycleRecord) -> Row:
        evaluation = record.evaluation
        return {
            "level": 0,
            "num_layers": self.method.network.grid.num_layers,
            "update": record.cycle,
            "cycle": record.cycle,
            "work": record.work,
            "counted_work": record.counted,
            "gradients": record.gradients,
            "seconds": record.seconds,
            "objective": evaluation.value,
            "loss": evaluation.loss,
            "train_accuracy": evaluation.accuracy,
            "state_residual": evaluation.residual,
            "final": record.cycle == self.total,
        }

    def is_due(self, row: Row) -> bool:
        return row["update"] % self.options.validate_every == 0

    def validate(self) -> Row:
        accuracy = self.accuracy()
        return {"val_accuracy": accuracy} | ({"final": True} if accuracy >= self.options.goal else {})

    def accuracy(self) -> float:
        """Share of the validation samples that are classified rightly at present; collective."""
        features, labels = self.validation
        return float((self.method.network.predict(self.method.x, features) == labels).double().mean())

    def state(self) -> State:
        return self.method.state()

    def load(self, checkpoint: Checkpoint) -> None:
        self.method.load(checkpoint)

    def is_over(self, row: Row) -> bool:
        return row["update"] >= self.total or self.has_reached(row)

    def has_reached(self, row: Row) -> bool:
        """Whether a row says that the goal is reached."""
        return row.get("val_accuracy") is not None and row["val_accuracy"] >= self.options.goal

    def describe(self) -> str:
        return "\n".join(filter(None, [self.plan, f"{self.method.schedule}, {self.unit:.2f} work units a cycle"]))

    def draw(self, rows: list[Row], figures: Path) -> None:
        classes = mesh = None
        if self.plane is not None:
            mesh = peaks.mesh(MAP_SIZE, self.method.network.dtype)
            classes = self.method.network.predict(self.method.x, mesh).reshape(MAP_SIZE, MAP_SIZE)
        if not rows:
            return
        from xbraid_py.recipes.pictures.curves import over_cycles  # matplotlib takes its time: on one rank only
        from xbraid_py.recipes.pictures.style import class_map

        validated = [row for row in rows if row.get("val_accuracy") is not None]
        over_cycles({str(self.method.schedule): validated}, figures / "cycles.png")
        if classes is not None:
            assert mesh is not None and self.plane is not None
            true = self.plane(*mesh.double().numpy()).reshape(classes.shape)
            class_map(classes, true, ["elsewhere", "ring"], figures / "classes.png")

    def say(self, row: Row) -> str:
        accuracy, missed = row.get("val_accuracy"), "" if self.has_reached(row) else ", not the goal,"
        found = "no validation" if accuracy is None else f"validation accuracy {100 * accuracy:.2f} %"
        return (
            f"{found}{missed} after {row['update']} cycles, {row['work']:.1f} work units "
            f"(counted: {row['counted_work']:.1f}), {row['seconds']:.2f} seconds"
        )


def network(checkpoint: Checkpoint) -> nn.Module:
    """The trained network of a checkpoint as a plain module, from features (B, F) to logits (B, classes)."""
    return to_sequential(checkpoint.path)


def prepare(options: MGOptRunOptions, comm: Communicator, recipe: str) -> Callable[[], Row]:
    """Read and check everything, without a message; returns the run.

    Parameters
    ----------
    options : MGOptRunOptions
    comm : Communicator
    recipe : str
        See `run.engine.train`.
    """

    def prepared(options: MGOptRunOptions, plan: str = "", **claimed) -> Callable[[], Row]:
        def training(comm: Communicator, options: MGOptRunOptions) -> DepthTraining:
            made = options.training(comm)
            made.plan = plan
            return made

        return train_by_plan("mgopt", training, options, comm, recipe=recipe, **claimed)

    options.hold(comm)
    shape = {"architecture": options.network, "dtype": options.torch_dtype}
    workload = Workload(num_layers=options.num_layers, batch=options.batch, **shape)
    return by_plan(options, workload, comm, prepared)
