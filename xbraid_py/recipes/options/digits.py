"""Options of the jobs on handwritten digits, as images and as sequences; torch is not loaded for them."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from xbraid_py.layer_parallel.accuracy import GradientControl
from xbraid_py.mgrit import MGRIT
from xbraid_py.recipes.options.minibatch import MinibatchOptions
from xbraid_py.run.run_options import free

if TYPE_CHECKING:
    from xbraid_py.planner import Layer


@dataclass(frozen=True, kw_only=True)
class DigitOptions(MinibatchOptions):
    """What all jobs on digits are told.

    Parameters
    ----------
    epochs
        Passes over the training images.
    schedule
        Of the learning rate: falling to zero along a cosine, or constant.
    max_updates
        End after so many updates, whatever the epochs.
    num_train
        Use only the first so many training images; all if not given.
    num_test
        The same for the test images, for the validation.
    data_dir
        Folder of the four files; by default mnist in the folder that XBRAID_DATA names.
    """

    epochs: int = 1
    schedule: Literal["cosine", "constant"] = "cosine"
    max_updates: int | None = None
    num_train: int | None = None
    num_test: int | None = None
    data_dir: Path | None = free(None)
    record_every: int = free(10)

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, epochs=1, max_updates=1, num_train=1, num_test=1)


@dataclass(frozen=True, kw_only=True)
class MnistOptions(DigitOptions):
    """The MNIST job.

    Parameters
    ----------
    variant
        Kind of the layers: convolutional or dense.
    num_layers
        Residual layers.
    T
        Final time; a step is T / num_layers.
    width
        Channels of the convolutional states (7 x 7 pixels), or numbers of a dense state.
    accuracy
        What is asked of the gradients.
    """

    variant: Literal["conv", "dense"] = "conv"
    num_layers: int = 32
    T: float = 2.0
    width: int = 16
    out: Path = free(Path("runs/mnist"))
    accuracy: GradientControl = GradientControl()

    @property
    def depth(self) -> int:
        return self.num_layers

    @property
    def layer(self) -> Layer:
        from xbraid_py.planner import CONVOLUTION, Constants

        return CONVOLUTION if self.variant == "conv" else Constants().dense(self.width, 4)

    def __post_init__(self):
        super().__post_init__()
        self.require_least(10, width=1)


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
        from xbraid_py.planner import Constants

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
