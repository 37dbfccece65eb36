"""A run of MG/OPT in depth with its validation and its minibatches; the problems of paper 000.

Shape letters: `F` features, `B` samples.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from xbraid_py.comm import Communicator
from xbraid_py.data import mnist
from xbraid_py.data.mnist_columns import columns
from xbraid_py.mgrit import MGRIT
from xbraid_py.multilevel.depth.mgopt import CycleRecord, MGOpt
from xbraid_py.multilevel.depth.mgopt_options import MGOptOptions
from xbraid_py.problem.perceptron import PerceptronProblem, perceptron_weights
from xbraid_py.problem.problem import DenseResNetOptions
from xbraid_py.problem.regularization import Regularization

Samples = tuple[Tensor, Tensor]  # features (F, B) and labels (B,)
SERIAL = MGRIT(max_levels=1)


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
    architecture: DenseResNetOptions,
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
    scaling: str = "centered"
    num_train: int | None = None
    num_test: int | None = None
    seed: int = 0
    dtype: torch.dtype = torch.float32
    data_dir: str | os.PathLike | None = None

    def job(
        self, num_layers: int, options: MGOptOptions, architecture: DenseResNetOptions, beta: float, comm, mgrit=SERIAL
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
