"""One run of the study of MG/OPT in depth as plain numbers and words, for other processes and for records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from studies.mgopt.rows import CURVE
from xbraid_py.comm import as_communicator
from xbraid_py.data import circles, peaks
from xbraid_py.multilevel.depth.mgopt import LevelOptions, MGOpt, MGOptOptions
from xbraid_py.problem.perceptron import perceptron_weights
from xbraid_py.problem.problem import DenseResNetOptions
from xbraid_py.recipes.mgopt import Job, MnistSamples, perceptron_problem

PROBLEMS = ("circles", "mnist", "peaks")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One run of the study, as plain numbers and words; by default the paper's 8-level method on circles.

    Parameters
    ----------
    problem
        Circles, mnist or peaks.
    sampling
        Of the circles.
    width
        Of the network on peaks; 0 for 8.
    narrow, scaling
        Coarse levels that are narrower too, see `MGOptOptions`.
    num_layers, levels, schedule, restriction, interpolation, metric, fine_moves, coarse_moves
        See `MGOptOptions`.
    correction_search
        Line search on the coarse correction.
    method, learning_rate, keep
        See `LevelOptions`; lbfgs has a line search.
    carry
        Momentum between levels, see `MGOptOptions`.
    beta
        Tikhonov regularization.
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
    width: int = 0
    narrow: int = 0
    scaling: str = "mean"
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
    carry: float = 0.0
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

    @classmethod
    def mnist(cls, num_layers: int, samples: int, max_work: float, data_dir: str) -> Case:
        """The 8-level method on MNIST, with half as many validation images as training ones; 0 takes all."""
        return cls(
            problem="mnist",
            num_layers=num_layers,
            num_train=samples,
            num_val=samples // 2,
            learning_rate=0.01,
            beta=1e-5,
            max_work=max_work,
            data_dir=data_dir,
        )

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
            carry_momentum=self.carry,
            narrow=self.narrow,
            scaling=self.scaling,
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
            network = DenseResNetOptions(width=10, T=1.0, activation="relu")
            return samples.job(self.num_layers, self.options, network, self.beta, as_communicator(None))
        if self.problem == "circles":
            train, validation = circles.generate(self.num_train, self.num_val, self.seed, self.sampling)
            samples, unseen = (train.features, train.labels), (validation.features, validation.labels)
            network, scale = DenseResNetOptions(width=3, T=1.0, activation="relu"), 1.0
        else:
            # One draw for both, so that the classes are as frequent in the one as in the other.
            train = peaks.generate(self.num_train + self.num_val, 1, self.seed)[0]
            samples = train.features[:, : self.num_train].contiguous(), train.labels[: self.num_train]
            unseen = train.features[:, self.num_train :].contiguous(), train.labels[self.num_train :]
            # A ReLU network with weights N(0, 1) and T=5 multiplies its input by hundreds: they are smaller here.
            network, scale = DenseResNetOptions(width=self.width or 8, T=5.0, activation="relu"), 0.1
        problem = perceptron_problem(samples, train.num_classes, network, self.beta, as_communicator(None))
        training = MGOpt(problem, self.num_layers, self.options)
        training.x = perceptron_weights(training.network, self.seed, scale)
        return Job(training, unseen)


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
    job = case.job()
    unit = case.options.steps().work(costs=job.training.costs)
    every = max(1, round(5.0 / unit)) if case.problem == "mnist" else 1
    curve, accuracy = [], 0.0
    for record, found, _ in job.run(case.goal, max(1, int(case.max_work / unit)), every):
        if found is not None:
            accuracy, evaluation = found, record.evaluation
            numbers = (record.work, record.counted, record.seconds, evaluation.loss, evaluation.accuracy, found)
            curve.append([record.cycle, *(round(number, 5) for number in numbers)])
    return {"reached": accuracy >= case.goal, **dict(zip(CURVE, curve[-1], strict=True)), "curve": curve}
