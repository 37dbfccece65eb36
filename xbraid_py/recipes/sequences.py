"""Digits as sequences: options, network and training of the job that reads them step after step.

Shape letters: `B` images, `L` steps of a sequence, `F` numbers of a step.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.data import mnist
from xbraid_py.data.mnist import ORDERS, sequences
from xbraid_py.layer_parallel.accuracy import GradientControl
from xbraid_py.layer_parallel.sequence.gru import ParallelGRU
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.mgrit import MGRIT
from xbraid_py.planner import Constants, Layer
from xbraid_py.recipes.digits import DigitOptions, DigitTraining
from xbraid_py.recipes.minibatch import network_of
from xbraid_py.run.engine import Row
from xbraid_py.run.run_options import free
from xbraid_py.run.store.read import Checkpoint


@dataclass(frozen=True, kw_only=True)
class SequenceOptions(DigitOptions):
    """The job on sequences.

    Parameters
    ----------
    order
        What a step sees of an image: a row, a column or a pixel.
    length
        Steps of a sequence, to which it is resampled; 28 of rows and columns and 784 of pixels if not given.
    network
        Parallel over the sequence, or the GRU of torch, the same on every rank.
    hidden_size
        Numbers of a hidden state.
    num_layers
        Recurrent layers on top of each other.
    kind
        Plain steps, those of a GRU, or implicit ones.
    dt
        Step size; 1 is that of a GRU.
    coarse
        Coarse steps: composed of fine ones with the same gates, or single long ones.
    windows
        Stretches that are solved one after the other: less memory, one more forward solve.
    accuracy
        What is asked of the gradients; by default nothing is measured.
    """

    order: Literal["rows", "columns", "pixels"] = "rows"
    length: int | None = None
    network: Literal["parallel", "torch"] = "parallel"
    hidden_size: int = 64
    num_layers: int = 1
    kind: Literal["plain", "implicit"] = "plain"
    dt: float = 1.0
    coarse: Literal["compose", "euler"] = "compose"
    windows: int = free(1)
    accuracy: GradientControl = GradientControl(gradient_error=1.0, check=0, adapt=False)
    epochs: int = 3
    batch_size: int = 100
    learning_rate: float = 3e-3
    clip: float | None = 1.0
    out: Path = free(Path("runs/sequences"))
    mgrit: MGRIT | None = field(default=None, metadata={"members": MGRIT(tol=0.1)})

    @property
    def depth(self) -> int:
        return self.length or {"rows": 28, "columns": 28, "pixels": 784}[self.order]

    @property
    def layer(self) -> Layer:
        # Three gates, each with the matrix of a dense layer.
        dense = Constants().dense(self.hidden_size, 4)
        return replace(dense, state=3 * dense.state, adjoint=3 * dense.adjoint, is_module=True, sweeps=3)

    def __post_init__(self):
        super().__post_init__()
        self.require_least(128, length=2)
        self.require_least(1, num_layers=1, hidden_size=1)
        self.require_most(1, num_layers=1000)  # modules made one by one
        if self.network == "torch" and (self.kind, self.dt) != ("plain", 1.0):
            raise ValueError(f"network='torch' has kind=plain and dt=1.0 only, not {self.kind} and {self.dt}")


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
