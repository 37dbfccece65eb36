"""Sequences: digits read row by row, or pixel by pixel, by a gated recurrent network parallel over its time steps.

    h_{n+1} = h_n + (1 - z_n)(candidate_n - h_n),  n = 0 .. L-1,   logits = head(h_L),

the gate z and the candidate those of a GRU; with `--kind implicit` the step is diagonally implicit. Adam. Try

    mpirun -n 2 python drivers/sequences.py
    mpirun -n 2 python drivers/sequences.py --order pixels --windows 4
    mpirun -n 2 python drivers/sequences.py --length 1024 --resume auto
    python drivers/sequences.py --network torch
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from xbraid_py import MGRIT, ParallelGRU
from xbraid_py.comm import Communicator
from xbraid_py.data import mnist
from xbraid_py.data.mnist_sequences import ORDERS, sequences
from xbraid_py.recipes.digits import DigitOptions, prepare
from xbraid_py.run.launch import launch


@dataclass(frozen=True, kw_only=True)
class Options(DigitOptions):
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
    """

    order: Literal["rows", "columns", "pixels"] = "rows"
    length: int | None = None
    network: Literal["parallel", "torch"] = "parallel"
    hidden_size: int = 64
    num_layers: int = 1
    kind: Literal["plain", "implicit"] = "plain"
    dt: float = 1.0
    coarse: Literal["compose", "euler"] = "compose"
    windows: int = 1
    epochs: int = 3
    batch_size: int = 100
    learning_rate: float = 3e-3
    clip: float | None = 1.0
    out: Path = Path("runs/sequences")
    mgrit: MGRIT = MGRIT(tol=0.1)

    def __post_init__(self):
        super().__post_init__()
        if self.length is not None and self.length < 2:
            raise ValueError(f"length={self.length} must be at least 2; use 128")
        if self.network == "torch" and (self.kind, self.dt) != ("plain", 1.0):
            raise ValueError(f"network='torch' has kind=plain and dt=1.0 only, not {self.kind} and {self.dt}")


@dataclass(frozen=True, kw_only=True)
class SmokeOptions(Options):
    """The job on sequences in seconds."""

    __doc__ = Options.__doc__
    hidden_size: int = 12
    batch_size: int = 20
    max_updates: int | None = 8
    num_train: int | None = 200
    num_test: int | None = 100
    record_every: int = 1
    checkpoint_every: int = 4


class Classifier(nn.Module):
    """Logits (B, 10) of sequences (B, L, F), from the last state of the uppermost layer."""

    def __init__(self, options: Options, comm: Communicator | None):
        super().__init__()
        torch.manual_seed(options.seed)
        sizes = (ORDERS[options.order], options.hidden_size, options.num_layers)
        if options.network == "torch":
            self.recurrent: nn.Module = nn.GRU(*sizes, batch_first=True)
        else:
            self.recurrent = ParallelGRU(
                *sizes,
                batch_first=True,
                comm=comm,
                **options.solvers,
                kind=options.kind,
                dt=options.dt,
                coarse=options.coarse,
                windows=options.windows,
                output="last",
                seed=options.seed,
            )
        # Both networks begin alike, whatever they have drawn.
        torch.manual_seed(options.seed + 1)
        self.head = nn.Linear(options.hidden_size, mnist.NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.recurrent(x)[1][-1])

    def solves(self) -> dict[str, float]:
        """What the last update's solves did: relaxations of the finest level, and residuals."""
        record = getattr(self.recurrent, "record", None)
        if record is None or not record.adjoint_sweeps:
            return {}
        return {
            "sweeps": max(record.forward_sweeps),
            "adjoint_sweeps": max(record.adjoint_sweeps),
            "residual": max(record.forward_residuals),
            "adjoint_residual": max(record.adjoint_residuals),
        }


def setup(options: Options, comm: Communicator) -> Callable[[], None]:
    """Read and check everything, without a message; returns the run."""

    def made(layers: Communicator | None) -> nn.Module:
        return Classifier(options, layers)

    def read(images: Tensor) -> Tensor:
        return sequences(images, options.order, options.length)

    return prepare(options, comm, made, read, free=("windows",), also=Classifier.solves)


if __name__ == "__main__":
    smoke = any(word.split("=")[0] == "--smoke" for word in sys.argv[1:])
    launch(SmokeOptions if smoke else Options, setup, description=__doc__.splitlines()[0])
