"""A run of multilevel training in width with its data and its validation.

Shape letters: `B` samples, `D` numbers of a target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.pde_dataset import PdeDataset, Standardization
from xbraid_py.multilevel.cycle.stochastic import Minibatches
from xbraid_py.multilevel.width.training import WidthRecord, WidthTraining, errors
from xbraid_py.multilevel.width.training_options import WidthTrainingOptions
from xbraid_py.recipes.width_networks import WidthNetwork

Samples = tuple[Tensor, Tensor]
# L2 is the mean square of all numbers, Linf the largest absolute one; aux: the first auxiliary network.
ERRORS = tuple(
    f"{network}{samples}_{norm}" for network in ("", "aux_") for samples in ("train", "val") for norm in ("l2", "linf")
)


@dataclass(frozen=True)
class Job:
    """A configuration, ready to run.

    Attributes
    ----------
    training : WidthTraining
    seen : Samples
        Training samples, as many as there are for the validation, or all if these are fewer.
    unseen : Samples
        Those of the validation.
    scale : float
        What errors are multiplied by: the targets' deviation where they are standardized.
    """

    training: WidthTraining
    seen: Samples
    unseen: Samples
    scale: float = 1.0

    @classmethod
    def of(
        cls,
        train: PdeDataset,
        validation: PdeDataset,
        network: WidthNetwork,
        options: WidthTrainingOptions,
        *,
        batch_size: int = 200,
        seed: int = 0,
        standardize: bool = False,
        grid: ProcessGrid | None = None,
    ) -> Job:
        """The run on these samples.

        Parameters
        ----------
        train, validation : PdeDataset
        network : WidthNetwork
            Made by `of`.
        options : WidthTrainingOptions
        batch_size : int
        seed : int
            Of initial weights and of the order of the minibatches, whatever the method.
        standardize : bool
            Inputs and targets of mean 0 and deviation 1; otherwise as they are, since the paper says nothing. Errors
            are in the units of the problem in any case.
        grid : ProcessGrid, optional
            Replicas that share the minibatches.

        Raises
        ------
        ValueError
            If the network does not fit the samples, or there are too few of them.
        """
        scale = 1.0
        if standardize:
            statistics = Standardization.of(train)
            train, validation = statistics.apply(train), statistics.apply(validation)
            scale = float(statistics.target_scale)
        inputs, targets = train.inputs, train.targets.flatten(1)
        module = network.module(tuple(inputs.shape[1:]), targets.shape[1], seed, inputs.dtype)
        minibatches = Minibatches(inputs, targets, batch_size, seed)
        training = WidthTraining(module, nn.functional.mse_loss, minibatches, options, grid)
        few = min(len(inputs), validation.num_samples)
        unseen = (validation.inputs, validation.targets.flatten(1))
        return cls(training, (inputs[:few], targets[:few]), unseen, scale)

    def errors(self) -> dict[str, float | None]:
        """The `ERRORS` of the network as it is, and of the first auxiliary one, if there is one."""
        found: dict[str, float | None] = dict.fromkeys(ERRORS)
        for level, prefix in enumerate(("", "aux_")):
            if level > len(self.training.transfers):
                break
            layout, x = self.training.auxiliary(level)
            module = layout.module(x)
            for name, samples in (("train", self.seen), ("val", self.unseen)):
                square, largest = errors(module, *samples)
                found[f"{prefix}{name}_l2"] = self.scale**2 * square
                found[f"{prefix}{name}_linf"] = self.scale * largest
        return found

    def mean_error(self) -> float:
        """Mean square validation error of the mean training target, point by point, whatever the input."""
        mean = self.training.minibatches.targets.mean(0)
        return self.scale**2 * float((self.unseen[1] - mean).double().square().mean())

    def predict(self, sample: int) -> tuple[Tensor, Tensor]:
        """Target and prediction (D,) of one validation sample, as they were trained."""
        layout, x = self.training.auxiliary(0)
        inputs, targets = self.unseen
        with torch.no_grad():
            return targets[sample], layout.module(x)(inputs[sample : sample + 1])[0]

    def run(
        self, max_cycles: int, validate_every: float, done: WidthRecord | None = None
    ) -> Iterator[tuple[WidthRecord, dict[str, float | None] | None, bool]]:
        """Make so many cycles in all.

        Yields
        ------
        WidthRecord
        dict or None
            The `ERRORS`, at the last cycle before each multiple of `validate_every` work units, and at the end.
        bool
            Whether this is the end.

        Raises
        ------
        RunError
            If the loss is not finite.
        """
        unit = self.training.options.work()[0]
        for record in self.training.run(max_cycles, done):
            over = record.cycle == max_cycles
            due = over or (record.work + unit) // validate_every > record.work // validate_every
            yield record, self.errors() if due else None, over


def cycles_of(options: WidthTrainingOptions, max_work: float, count_tau: bool = True) -> int:
    """Cycles within so many work units, at least 1."""
    return max(1, int(max_work / options.work()[0 if count_tau else 1] + 1e-9))
