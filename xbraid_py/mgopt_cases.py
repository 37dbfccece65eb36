"""The problems that MG/OPT in depth is tried on, from plain settings: circles, MNIST, peaks.

Shape letters: `F` features, `B` samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from xbraid_py.comm import Communicator, wrap
from xbraid_py.data import circles, mnist, peaks
from xbraid_py.data.mnist_columns import columns
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel import CycleRecord, LevelOptions, MGOpt, MGOptOptions
from xbraid_py.multilevel.perceptron import PerceptronProblem, perceptron_weights
from xbraid_py.objective import Regularization
from xbraid_py.problem import Architecture

Samples = tuple[Tensor, Tensor]  # features (F, B) and labels (B,)
SERIAL = MGRIT(max_levels=1)
PROBLEMS = ("circles", "mnist", "peaks")


@dataclass(frozen=True)
class Job:
    """A configuration of MG/OPT, ready to run.

    Attributes
    ----------
    training : MGOpt
    validation : Samples
    batches : callable or None
        `batches(k)` are the samples of cycle k; None takes all in every cycle.
    """

    training: MGOpt
    validation: Samples
    batches: Callable[[int], Samples] | None = None

    def accuracy(self) -> float:
        """Share of the validation samples that are classified rightly at present; collective."""
        features, labels = self.validation
        return float((self.training.network.predict(self.training.x, features) == labels).double().mean())

    def run(
        self, goal: float, max_cycles: int, validate_every: int = 1, done: CycleRecord | None = None
    ) -> Iterator[tuple[CycleRecord, float | None, bool]]:
        """Train until a validation reaches the goal, or for so many cycles in all.

        Yields
        ------
        CycleRecord
        float or None
            Validation accuracy, where it was evaluated; at the end in any case.
        bool
            Whether this is the end.
        """
        for record in self.training.run(max_cycles, self.batches, done):
            over = record.cycle == max_cycles
            accuracy = self.accuracy() if over or record.cycle % validate_every == 0 else None
            over = over or (accuracy is not None and accuracy >= goal)
            yield record, accuracy, over
            if over:
                return


def perceptron_problem(
    samples: Samples,
    num_classes: int,
    architecture: Architecture,
    beta: float,
    comm: Communicator,
    mgrit: MGRIT = SERIAL,
) -> PerceptronProblem:
    """A problem as in paper 000: Tikhonov beta |.|^2 on all weights, in the type of the features."""
    features, labels = samples
    return PerceptronProblem(
        features=features,
        labels=labels,
        num_classes=num_classes,
        architecture=architecture,
        # beta |.|^2 is gamma/2 |.|^2 with gamma = 2 beta.
        regularization=Regularization(2 * beta, 0.0, 2 * beta, "sum"),
        forward=mgrit,
        adjoint=mgrit.for_adjoint(),
        comm=comm,
        dtype=features.dtype,
    )


@dataclass(frozen=True, kw_only=True)
class MnistSamples:
    """Which images of MNIST, and how many of them at a time.

    Parameters
    ----------
    batch_size
        Images of a minibatch, one for each cycle; 0 takes all images in every cycle.
    portion
        With batch_size=0, images that are propagated together.
    scaling
        See `columns`.
    num_train, num_test
        Take only the first so many.
    seed
        Of the order of the minibatches.
    dtype
    data_dir
        Folder of the four files.
    """

    batch_size: int = 1000
    portion: int = 2000
    scaling: str = "centred"
    num_train: int | None = None
    num_test: int | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    data_dir: str | os.PathLike | None = None

    def job(
        self, num_layers: int, options: MGOptOptions, architecture: Architecture, beta: float, comm, mgrit=SERIAL
    ) -> Job:
        """MG/OPT on these images; reads the files, sends no message."""
        data = _mnist(self.data_dir)
        train, test = columns(data, self.scaling, self.dtype, self.num_train, self.num_test)
        portions = batches = None
        if self.batch_size:
            order = mnist.Batches(len(train), self.batch_size, self.seed)
            epoch = lru_cache(1)(order.epoch)

            def batches(cycle: int) -> Samples:
                return train.samples(epoch(cycle // len(order))[cycle % len(order)])

            first = batches(0)
        else:
            portions = train.portions(self.portion)
            first = portions[0]
        problem = perceptron_problem(first, mnist.NUM_CLASSES, architecture, beta, comm, mgrit)
        training = MGOpt(problem, num_layers, options, portions)
        training.x = perceptron_weights(training.network, self.seed)
        return Job(training, test.samples(), batches)


_mnist = lru_cache(1)(mnist.load)  # a process of a study makes many runs


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the study, as plain numbers and words; by default the paper's 8-level method on circles.

    Parameters
    ----------
    problem
        Circles, mnist or peaks.
    sampling
        Of the circles.
    num_layers, levels, schedule, restriction, interpolation, metric, fine_moves, coarse_moves
        See `MGOptOptions`.
    correction_search
        Line search on the coarse correction.
    method, learning_rate, keep
        See `LevelOptions`; lbfgs has a line search.
    beta
        Tikhonov regularisation.
    goal
        Validation accuracy at which the run ends.
    max_work
        Work units after which it ends.
    num_train, num_val
        Samples; of MNIST all if 0.
    data_dir
        Folder of MNIST's files; empty for the usual place.
    seed
        Of samples and initial weights.
    """

    problem: str = "circles"
    sampling: str = "balanced"
    num_layers: int = 2048
    levels: int = 8
    schedule: str = ""
    restriction: str = "inject"
    interpolation: str = "constant"
    metric: str = "euclidean"
    fine_moves: str = "all"
    coarse_moves: str = "all"
    correction_search: bool = False
    method: str = "gd"
    learning_rate: float = 0.1
    keep: bool = True
    beta: float = 1e-4
    goal: float = 1.0
    max_work: float = 400.0
    num_train: int = 2000
    num_val: int = 1000
    data_dir: str = ""
    seed: int = 0

    def __post_init__(self):
        if self.problem not in PROBLEMS:
            raise ValueError(f"problem={self.problem!r} must be one of {', '.join(PROBLEMS)}; use circles")

    @property
    def options(self) -> MGOptOptions:
        """The options of MG/OPT."""
        searches = self.method == "lbfgs"
        return MGOptOptions(
            levels=self.levels,
            schedule=self.schedule or None,
            interpolation=self.interpolation,
            restriction=self.restriction,
            line_search=self.correction_search,
            metric=self.metric,
            fine_moves=self.fine_moves,
            coarse_moves=self.coarse_moves,
            optim=LevelOptions(
                method=(self.method,), learning_rate=(self.learning_rate,), line_search=searches, keep=self.keep
            ),
        )

    def job(self) -> Job:
        """The run on one rank, ready to go."""
        if self.problem == "mnist":
            limits = self.num_train or None, self.num_val or None
            samples = MnistSamples(
                num_train=limits[0], num_test=limits[1], seed=self.seed, data_dir=self.data_dir or None
            )
            network = Architecture(width=10, T=1.0, activation="relu")
            return samples.job(self.num_layers, self.options, network, self.beta, wrap(None))
        if self.problem == "circles":
            points = circles.generate(self.num_train, self.num_val, self.seed, self.sampling)
            network, scale = Architecture(width=3, T=1.0, activation="relu"), 1.0
        else:
            points = peaks.generate(self.num_train, self.num_val, self.seed)
            # A ReLU network with weights N(0, 1) and T=5 multiplies its input by hundreds: they are smaller here.
            network, scale = Architecture(width=8, T=5.0, activation="relu"), 0.1
        train, validation = points
        problem = perceptron_problem((train.features, train.labels), train.num_classes, network, self.beta, wrap(None))
        training = MGOpt(problem, self.num_layers, self.options)
        training.x = perceptron_weights(training.network, self.seed, scale)
        return Job(training, (validation.features, validation.labels))


def train(settings: Mapping[str, Any]) -> dict:
    """Run a `Case`, given as a mapping.

    Returns
    -------
    dict
        "reached", the last "cycle", "work", "counted", "seconds", "loss", "train_accuracy" and "val_accuracy", and a
        "curve" of lists of them for each validation: after every cycle, or where cycles cost less than 5 units and a
        validation more than a cycle (MNIST), every fifth unit.

    Raises
    ------
    RunError
        If the objective is not finite.
    """
    case = Case(**settings)
    job, unit = case.job(), case.options.steps().work()
    every = max(1, round(5.0 / unit)) if case.problem == "mnist" else 1
    curve, accuracy = [], 0.0
    for record, found, _ in job.run(case.goal, max(1, int(case.max_work / unit)), every):
        if found is not None:
            accuracy, evaluation = found, record.evaluation
            numbers = (record.work, record.counted, record.seconds, evaluation.loss, evaluation.accuracy, found)
            curve.append([record.cycle, *(round(number, 5) for number in numbers)])
    return {"reached": accuracy >= case.goal, **dict(zip(CURVE, curve[-1], strict=True)), "curve": curve}


CURVE = ("cycle", "work", "counted", "seconds", "loss", "train_accuracy", "val_accuracy")
