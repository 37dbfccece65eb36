"""Options of the jobs of multilevel training in width (paper 002); torch is not loaded for them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from xbraid_py.multilevel.width.options import WidthTrainingOptions
from xbraid_py.recipes.options.device import DeviceOptions
from xbraid_py.run.run_options import RunOptions, free

if TYPE_CHECKING:
    import torch
    from torch import nn

    from xbraid_py.data.pde_samples import PdeSource

# L2 is the mean square of all numbers, Linf the largest absolute one; aux: the first auxiliary network.
ERRORS = tuple(
    f"{network}{samples}_{norm}" for network in ("", "aux_") for samples in ("train", "val") for norm in ("l2", "linf")
)
INPUTS = ("k", "log_k", "x", "y")  # those of `data.darcy.Darcy`
KINDS = ("dense", "convolutional")


@dataclass(frozen=True, kw_only=True)
class WidthNetwork:
    """A network of dense layers with ReLU, behind convolutions with ReLU or not.

    Parameters
    ----------
    kind
        Dense, or convolutional: convolutions first.
    widths
        Neurons of the hidden dense layers; by default those of the paper for the problem.
    channels
        Of the convolutions; by default those of the paper.
    kernels
        Widths of their kernels; by default those of the paper.
    strides
        Their strides; by default those of the paper. There is no padding.
    """

    kind: Literal["dense", "convolutional"] = "dense"
    widths: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    kernels: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"kind={self.kind!r} must be dense or convolutional; use dense")
        for name, use in (("widths", "400,400"), ("channels", "20,20"), ("kernels", "7,7"), ("strides", "2,2")):
            values = getattr(self, name)
            if values is not None and (not values or min(values) < 1):
                raise ValueError(f"{name}={list(values)} must be numbers of at least 1; use {use}")

    def of(self, problem: str) -> WidthNetwork:
        """The same with the sizes of the paper where none are given."""
        theirs = _PAPER[problem.partition("_")[0], self.kind]
        names = ("widths", "channels", "kernels", "strides")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        found = replace(theirs, **given)
        channels, kernels, strides = ([*(each or ())] for each in (found.channels, found.kernels, found.strides))
        if self.kind == "convolutional" and not len(channels) == len(kernels) == len(strides):
            raise ValueError(
                f"channels={channels}, kernels={kernels} and strides={strides} must be as many; use one of each for "
                f"every convolution"
            )
        return found

    @property
    def convolutions(self) -> list[tuple[int, int, int]]:
        """Channels, width of the kernel and stride of each convolution; of what `of` has made."""
        if self.kind != "convolutional":
            return []
        assert self.channels is not None and self.kernels is not None and self.strides is not None
        return list(zip(self.channels, self.kernels, self.strides, strict=True))

    def features(self, inputs: tuple[int, int, int]) -> int:
        """Inputs of the first dense layer, for samples (C, H, W); `ValueError` if a kernel is wider than what it is
        for.
        """
        channels, height, width = inputs
        for out, kernel, stride in self.convolutions:
            if kernel > min(height, width):
                kernels = [kernel for _, kernel, _ in self.convolutions]
                raise ValueError(
                    f"kernels={kernels}: {kernel} does not fit into {height} x {width} points; use "
                    f"{[1] * len(kernels)} or smaller strides"
                )
            channels, height, width = out, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        return channels * height * width

    def module(
        self, inputs: tuple[int, int, int], outputs: int, seed: int, dtype: torch.dtype | None = None
    ) -> nn.Sequential:
        """The network for samples (C, H, W) with PyTorch's usual initial weights of a seed; made by `of`.

        The random numbers of the process stay as they are. Raises `ValueError` if a kernel is wider than what it is
        for.
        """
        from torch import nn

        from xbraid_py.layers.module_block import own_random_numbers

        parts: list[nn.Module] = []
        size = self.features(inputs)
        with own_random_numbers(seed):
            channels = inputs[0]
            for out, kernel, stride in self.convolutions:
                parts += [nn.Conv2d(channels, out, kernel, stride), nn.ReLU()]
                channels = out
            parts.append(nn.Flatten())
            assert self.widths is not None
            for neurons in self.widths:
                parts += [nn.Linear(size, neurons), nn.ReLU()]
                size = neurons
            parts.append(nn.Linear(size, outputs))
        # Drawn in single precision in any case, so that both precisions begin at the same weights.
        return nn.Sequential(*parts).to(dtype=dtype)


_PAPER = {
    ("poisson", "dense"): WidthNetwork(widths=(400, 400)),
    ("poisson", "convolutional"): WidthNetwork(
        kind="convolutional", widths=(400, 400), channels=(200, 200), kernels=(7, 7), strides=(2, 2)
    ),
    ("darcy", "dense"): WidthNetwork(widths=(1024, 1024, 1024)),
    ("darcy", "convolutional"): WidthNetwork(
        kind="convolutional", widths=(2048, 2048), channels=(100, 200, 400), kernels=(11, 7, 3), strides=(2, 1, 1)
    ),
}


@dataclass(frozen=True, kw_only=True)
class WidthRunOptions(DeviceOptions, RunOptions):
    """A job of multilevel training in width.

    Parameters
    ----------
    num_train
        Training samples.
    num_val
        Samples for validation.
    seed
        Of samples, initial weights and minibatches: all methods of one seed begin alike.
    dtype
        Of weights and samples.
    standardize
        Inputs and targets of mean 0 and deviation 1; otherwise as they are, since the paper says nothing. Errors are in
        the units of the problem in any case.
    batch_size
        Samples of a minibatch, shared by the ranks.
    max_work
        End before more work units than this.
    count_tau
        Whether those of tau are among them.
    validate_every
        Work units between two validations, those of tau included.
    checkpoint_every
        Cycles between two checkpoints.
    data_dir
        Folder where samples are stored, and read if they are there; by default they stay in memory.
    network
        Kind and sizes of the network.
    training
        Levels, optimizer, damping, matching.
    """

    name: ClassVar[str]  # of the problem

    num_train: int = 9000
    num_val: int = 1000
    seed: int = 0
    dtype: Literal["float64", "float32"] = "float32"
    standardize: bool = False
    batch_size: int = 200
    max_work: float = free(10_000.0)
    count_tau: bool = free(True)
    validate_every: float = free(50.0)
    checkpoint_every: int = free(50)
    data_dir: Path | None = free(None)
    network: WidthNetwork = WidthNetwork()
    training: WidthTrainingOptions = WidthTrainingOptions()

    def __post_init__(self):
        DeviceOptions.__post_init__(self)
        RunOptions.__post_init__(self)
        for name in ("max_work", "validate_every"):
            if not 0.0 < getattr(self, name) < inf:
                raise ValueError(f"{name}={getattr(self, name)} must be positive and finite; use 50")
        if not 1 <= self.batch_size <= self.num_train:
            raise ValueError(f"batch_size={self.batch_size} must lie in 1 .. num_train={self.num_train}; use 200")

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        import torch

        return getattr(torch, self.dtype)

    @property
    def layers(self) -> WidthNetwork:
        """The network, with the sizes of the paper where none are given."""
        return self.network.of(self.name)

    @property
    def cycles(self) -> int:
        """Cycles of the run: those within `max_work`, at least 1."""
        unit, unit_without_tau = self.training.work()
        return max(1, int(self.max_work / (unit if self.count_tau else unit_without_tau) + 1e-9))

    @property
    @abstractmethod
    def samples(self) -> PdeSource:
        """Where the samples come from."""


@dataclass(frozen=True, kw_only=True)
class PoissonOptions(WidthRunOptions):
    """The Poisson job.

    Parameters
    ----------
    mesh
        Points in each direction.
    """

    name: ClassVar[str] = "poisson"

    mesh: int = 32
    out: Path = free(Path("runs/poisson"))

    @property
    def samples(self) -> PdeSource:
        from xbraid_py.data.elliptic import Poisson
        from xbraid_py.data.pde_samples import PdeSource

        names = ("num_train", "num_val", "seed", "data_dir")
        return PdeSource(problem=Poisson(mesh=self.mesh), **{name: getattr(self, name) for name in names})


def check_inputs(inputs: Sequence[str]) -> None:
    """Raise `ValueError` unless these are different channels of Darcy's problem."""
    if not inputs or len(set(inputs)) < len(inputs) or set(inputs) - {*INPUTS}:
        raise ValueError(f"inputs={list(inputs)} must be different ones of {', '.join(INPUTS)}; use [log_k]")


@dataclass(frozen=True, kw_only=True)
class DarcyOptions(WidthRunOptions):
    """The Darcy job.

    Parameters
    ----------
    source
        Of the samples: generated, or the public set, of which data_dir is then the folder.
    target
        What is to be learned of generated samples: the mean outflow (flux), as in section 8.2, or the pressure.
    inputs
        What the inputs of generated samples hold, of k, log_k, x and y.
    mesh
        Cells in each direction.
    correlation_length
        Of the logarithm of the permeability, in units of the square's side.
    variance
        Of the logarithm.
    smoothness
        Of its covariance: 0.5 for the exponential one, larger for smoother fields.
    """

    name: ClassVar[str] = "darcy"

    source: Literal["generated", "public"] = "generated"
    target: Literal["flux", "pressure"] = "flux"
    inputs: tuple[str, ...] = ("log_k",)
    mesh: int = 32
    correlation_length: float = 0.2
    variance: float = 1.0
    smoothness: float = 1.0
    out: Path = free(Path("runs/darcy"))
    training: WidthTrainingOptions = WidthTrainingOptions(steps=2, weight_decay=1e-6, rematch_every=10)

    def __post_init__(self):
        super().__post_init__()
        check_inputs(self.inputs)

    @property
    def samples(self) -> PdeSource:
        from xbraid_py.data.darcy import Darcy
        from xbraid_py.data.pde_samples import PdeSource

        names = ("mesh", "correlation_length", "variance", "smoothness")
        problem = Darcy(**{name: getattr(self, name) for name in names})
        names = ("num_train", "num_val", "seed", "target", "data_dir")
        return PdeSource(
            problem=None if self.source == "public" else problem,
            channels=self.inputs,
            **{name: getattr(self, name) for name in names},
        )


PROBLEMS: dict[str, type[WidthRunOptions]] = {each.name: each for each in (PoissonOptions, DarcyOptions)}
