"""Digits as sequences: options, network and training of the job that reads them step after step.

Shape letters: `B` images, `L` steps of a sequence, `F` numbers of a step.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.data import mnist
from xbraid_py.data.mnist import ORDERS, sequences
from xbraid_py.layer_parallel.sequence.gru import ParallelGRU
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.recipes.digits import DigitTraining
from xbraid_py.recipes.minibatch import network_of
from xbraid_py.recipes.options.digits import SequenceOptions
from xbraid_py.run.engine import Row
from xbraid_py.run.store.read import Checkpoint


class Classifier(nn.Module):
    """Logits (B, 10) of sequences (B, L, F), from the last state of the uppermost layer."""

    def __init__(self, options: SequenceOptions, comm: Communicator | None):
        super().__init__()
        sizes = (ORDERS[options.order], options.hidden_size, options.num_layers)
        if options.network == "torch":
            with own_random_numbers(options.seed):
                self.recurrent: nn.Module = nn.GRU(*sizes, batch_first=True)
        else:
            self.recurrent = ParallelGRU(
                *sizes,
                batch_first=True,
                comm=comm,
                **options.solvers,
                accuracy=options.accuracy,
                kind=options.kind,
                dt=options.dt,
                coarse=options.coarse,
                windows=options.windows,
                output="last",
                seed=options.seed,
            )
        with own_random_numbers(options.seed + 1):
            self.head = nn.Linear(options.hidden_size, mnist.NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[1][-1])

    def solves(self) -> Row:
        """What the last update's solves did: relaxations of the finest level, and residuals."""
        record = self.recurrent.record if isinstance(self.recurrent, ParallelGRU) else None
        if record is None or not record.adjoint_sweeps:
            return {}
        return {
            "sweeps": max(record.forward_sweeps),
            "adjoint_sweeps": max(record.adjoint_sweeps),
            "state_residual": max(record.forward_residuals),
            "adjoint_residual": max(record.adjoint_residuals),
            "gradient_error": record.gradient_error,
        }


def build(options: SequenceOptions, comm: Communicator | None) -> Classifier:
    """The network; what lies around the recurrent layers is the same on every rank."""
    return Classifier(options, comm)


def network(checkpoint: Checkpoint) -> nn.Module:
    """The trained network of a checkpoint as a plain module, from sequences (B, L, F) to logits (B, 10).

    Raises `ValueError` if its steps are not those of torch's GRU.
    """
    return network_of(checkpoint, SequenceOptions, _plain)


def _plain(options: SequenceOptions, comm: None) -> Classifier:
    if (options.kind, options.dt) != ("plain", 1.0):
        raise ValueError(f"kind={options.kind} with dt={options.dt} is not in torch; only kind=plain with dt=1.0 is")
    return build(replace(options, network="torch"), comm)


class SequenceTraining(DigitTraining[SequenceOptions]):
    """A `Classifier` that learns digits as sequences."""

    def read(self, images: Tensor) -> Tensor:
        return sequences(images, self.options.order, self.options.length)

    def validate(self) -> Row:
        model: Any = self.trained.model
        solves = model.solves()  # of the update: before other samples go through
        return solves | super().validate()
