"""Multilevel training in width as a job: options, samples, networks and training of paper 002, which learns a PDE.

Shape letters: `B` samples, `D` numbers of a target.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import inf, nan, prod
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from xbraid_py.comm import Communicator
from xbraid_py.comm.agreement import hold
from xbraid_py.comm.replicas import ProcessGrid
from xbraid_py.data.darcy import Darcy
from xbraid_py.data.elliptic import Poisson
from xbraid_py.data.pde_dataset import PdeDataset, Standardization
from xbraid_py.data.pde_samples import PdeSource
from xbraid_py.layers.module_block import own_random_numbers
from xbraid_py.multilevel.stochastic import Minibatches
from xbraid_py.multilevel.width.training import WidthRecord, WidthTraining, WidthTrainingOptions, errors
from xbraid_py.multilevel.width.transfer import WidthLayout
from xbraid_py.recipes.device import DeviceOptions
from xbraid_py.run import memory
from xbraid_py.run.engine import Row, State, Training, state_of, train
from xbraid_py.run.options import from_dict
from xbraid_py.run.run_options import RunOptions, free
from xbraid_py.run.store.read import Checkpoint, check_total, restoring
from xbraid_py.run.store.write import Score

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
        if self.kind == "convolutional" and not len(found.channels) == len(found.kernels) == len(found.strides):
            raise ValueError(
                f"channels={list(found.channels)}, kernels={list(found.kernels)} and strides={list(found.strides)} "
                "must be as many; use one of each for every convolution"
            )
        return found

    def features(self, inputs: tuple[int, int, int]) -> int:
        """Inputs of the first dense layer, for samples (C, H, W); `ValueError` if a kernel is wider than what it is
        for.
        """
        channels, height, width = inputs
        if self.kind == "convolutional":
            for out, kernel, stride in zip(self.channels, self.kernels, self.strides, strict=True):
                if kernel > min(height, width):
                    raise ValueError(
                        f"kernels={list(self.kernels)}: {kernel} does not fit into {height} x {width} points; use "
                        f"{[1] * len(self.kernels)} or smaller strides"
                    )
                channels, height, width = out, (height - kernel) // stride + 1, (width - kernel) // stride + 1
        return channels * height * width

    def module(
        self, inputs: tuple[int, int, int], outputs: int, seed: int, dtype: torch.dtype = torch.float32
    ) -> nn.Sequential:
        """The network for samples (C, H, W) with PyTorch's usual initial weights of a seed; made by `of`.

        The random numbers of the process stay as they are. Raises `ValueError` if a kernel is wider than what it is
        for.
        """
        parts: list[nn.Module] = []
        size = self.features(inputs)
        with own_random_numbers(seed):
            if self.kind == "convolutional":
                channels = (inputs[0], *self.channels)
                for n, (kernel, stride) in enumerate(zip(self.kernels, self.strides, strict=True)):
                    parts += [nn.Conv2d(channels[n], channels[n + 1], kernel, stride), nn.ReLU()]
            parts.append(nn.Flatten())
            assert self.widths is not None
            for neurons in self.widths:
                parts += [nn.Linear(size, neurons), nn.ReLU()]
                size = neurons
            parts.append(nn.Linear(size, outputs))
        # Drawn in single precision in any case, so that both precisions begin at the same weights.
        return nn.Sequential(*parts).to(dtype)


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


# L2 is the mean square of all numbers, Linf the largest absolute one; aux: the first auxiliary network.
ERRORS = tuple(
    f"{network}{samples}_{norm}" for network in ("", "aux_") for samples in ("train", "val") for norm in ("l2", "linf")
)


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
        names = ("num_train", "num_val", "seed", "data_dir")
        return PdeSource(problem=Poisson(mesh=self.mesh), **{name: getattr(self, name) for name in names})


def check_inputs(inputs: Sequence[str]) -> None:
    """Raise `ValueError` unless these are different channels of Darcy's problem."""
    if not inputs or len(set(inputs)) < len(inputs) or set(inputs) - {*Darcy.channels}:
        raise ValueError(f"inputs={list(inputs)} must be different ones of {', '.join(Darcy.channels)}; use [log_k]")


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
        names = ("mesh", "correlation_length", "variance", "smoothness")
        problem = Darcy(**{name: getattr(self, name) for name in names})
        names = ("num_train", "num_val", "seed", "target", "data_dir")
        return PdeSource(
            problem=None if self.source == "public" else problem,
            channels=self.inputs,
            **{name: getattr(self, name) for name in names},
        )


PROBLEMS: dict[str, type[WidthRunOptions]] = {each.name: each for each in (PoissonOptions, DarcyOptions)}


class WidthRun(Training):
    """A run of multilevel training in width, with its samples and its validation, up to so many work units.

    Parameters
    ----------
    options : WidthRunOptions
    train, validation : PdeDataset
        As they are, see `WidthRunOptions.samples`.
    grid : ProcessGrid, optional
        Replicas that share the minibatches.

    Attributes
    ----------
    method : WidthTraining
    seen, unseen : pair of Tensor
        Inputs (B, ...) and targets (B, D) of training samples, as many as there are for the validation, or all if these
        are fewer; and those of the validation.
    scale : float
        What errors are multiplied by: the targets' deviation where they are standardized.
    best : dict of str to float
        The least validation errors so far.

    Raises
    ------
    ValueError
        If the network does not fit the samples, or there are too few of them.
    """

    def __init__(
        self, options: WidthRunOptions, train: PdeDataset, validation: PdeDataset, grid: ProcessGrid | None = None
    ):
        self.options, self.total, self.scale = options, options.cycles, 1.0
        device = options.device_of(grid.data.rank if grid else 0)
        if options.standardize:
            statistics = Standardization.of(train)
            train, validation = statistics.apply(train), statistics.apply(validation)
            self.scale = float(statistics.target_scale)
        inputs, targets = train.inputs.to(device), train.targets.flatten(1).to(device)
        module = options.layers.module(tuple(inputs.shape[1:]), targets.shape[1], options.seed, inputs.dtype).to(device)
        minibatches = Minibatches(inputs, targets, options.batch_size, options.seed)
        self.method = WidthTraining(module, nn.functional.mse_loss, minibatches, options.training, grid)
        few = min(len(inputs), validation.num_samples)
        self.seen = inputs[:few], targets[:few]
        self.unseen = validation.inputs.to(device), validation.targets.flatten(1).to(device)
        self.best = {"val_l2": inf, "val_linf": inf}

    def steps(self) -> Iterator[Row]:
        for record in self.method.run(self.total):
            yield self._row(record)

    def _row(self, record: WidthRecord) -> Row:
        return {
            "level": 0,
            "update": record.cycle,
            "cycle": record.cycle,
            "work": record.work,
            "work_without_tau": record.work_without_tau,
            "counted_work": record.counted,
            "seconds": record.seconds,
            "matching_seconds": record.matching_seconds,
            "objective": record.loss,
            "loss": record.loss,
            "widths": record.widths,
            "final": record.cycle == self.total,
        }

    def is_due(self, row: Row) -> bool:
        """At the last cycle before each multiple of `validate_every` work units."""
        unit, every = self.options.training.work()[0], self.options.validate_every
        return (row["work"] + unit) // every > row["work"] // every

    def validate(self) -> Row:
        found = self.errors()
        self.best = {name: min(least, found[name]) for name, least in self.best.items()}
        return found

    def errors(self) -> dict[str, float | None]:
        """The `ERRORS` of the network as it is, and of the first auxiliary one, if there is one."""
        found: dict[str, float | None] = dict.fromkeys(ERRORS)
        for level, prefix in enumerate(("", "aux_")):
            if level > len(self.method.transfers):
                break
            layout, x = self.method.auxiliary(level)
            module = layout.module(x)
            for name, samples in (("train", self.seen), ("val", self.unseen)):
                square, largest = errors(module, *samples)
                found[f"{prefix}{name}_l2"] = self.scale**2 * square
                found[f"{prefix}{name}_linf"] = self.scale * largest
        return found

    def mean_error(self) -> float:
        """Mean square validation error of the mean training target, point by point, whatever the input."""
        mean = self.method.minibatches.targets.mean(0)
        return self.scale**2 * float((self.unseen[1] - mean).double().square().mean())

    def predict(self, sample: int) -> tuple[Tensor, Tensor]:
        """Target and prediction (D,) of one validation sample, as they were trained."""
        layout, x = self.method.auxiliary(0)
        inputs, targets = self.unseen
        with torch.no_grad():
            return targets[sample].cpu(), layout.module(x)(inputs[sample : sample + 1])[0].cpu()

    def score(self, row: Row) -> Score:
        return Score(objective=row.get("val_l2"))

    def state(self) -> State:
        arrays, numbers = self.method.state()
        return arrays, {**numbers, "best": self.best}

    def load(self, checkpoint: Checkpoint) -> None:
        self.method.load(checkpoint)
        self.best = {name: float(checkpoint.meta["state"]["best"][name]) for name in self.best}

    def is_over(self, row: Row) -> bool:
        return row["update"] >= self.total

    def describe(self) -> str:
        return "{:g} work units a cycle, {:g} without those of tau".format(*self.options.training.work())

    def draw(self, rows: list[Row], figures: Path) -> None:
        """Errors over work units, and the first validation sample if it is a field."""
        if not rows:
            return
        from xbraid_py.recipes.pictures.curves import fields, over_work  # takes its time to load: on one rank only

        validated = [row for row in rows if row.get("val_l2") is not None]
        over_work({"": validated}, figures / "errors.png")
        exact, learned = self.predict(0)
        size = self.unseen[0].shape[-1]
        if exact.numel() == size * size:
            fields(exact.view(size, size), learned.view(size, size), figures / "sample.png")

    def say(self, row: Row) -> str:
        return (
            f"validation L2 {row.get('val_l2', nan):.3e} (best {self.best['val_l2']:.3e}), "
            f"Linf {row.get('val_linf', nan):.3f} (best {self.best['val_linf']:.3f}) after {row['cycle']} cycles, "
            f"{row['work']:g} work units (without tau {row['work_without_tau']:g}, counted {row['counted_work']:.1f}), "
            f"{row['seconds']:.2f} seconds"
        )


def set_up(options: WidthRunOptions, comm: Communicator) -> Callable[[], Row]:
    """Read and check everything, without a message; returns the run, in which ranks share every minibatch.

    Raises `ValueError` or `OSError` for whatever is wrong with options, files or folder; on every rank, or on rank 0
    alone.
    """
    if options.batch_size < comm.size:
        raise ValueError(f"batch_size={options.batch_size} is less than one for each of {comm.size} ranks; use 200")
    options.device_of(0)
    source, dtype = options.samples, options.torch_dtype
    # Files that are there are read now; what has to be made, by all ranks together, in the run.
    found, problem = None, source.problem
    if problem is None:
        found = source.load(dtype=dtype)
        for name, each in zip(("training samples", "validation samples"), found, strict=True):
            hold(comm, name, each.inputs, each.targets)
        shape, outputs = tuple(found[0].inputs.shape[1:]), found[0].targets[0].numel()
    else:
        shape, outputs = source.shape, prod(problem.shapes[source.target or problem.targets[0]])
    with torch.device("meta"):  # no memory: only what it takes, and whether the kernels fit
        weights = options.layers.module(shape, outputs, options.seed).parameters()
        memory.require(torch.finfo(dtype).bits // 8 * sum(each.numel() for each in weights))
    if problem is not None:
        memory.require(8 * (options.num_train + options.num_val) * sum(map(prod, problem.shapes.values())))

    def make() -> WidthRun:
        training = WidthRun(options, *(found or source.load(comm, dtype)), ProcessGrid(comm, comm.size))
        training.method.match()  # whether there can be so many levels
        return training

    assert shape is not None
    sizes = {"channels": shape[0], "mesh": shape[1], "outputs": outputs}
    return train("width", make, options, comm, sizes=sizes, recipe=options.name)


def network(checkpoint: Checkpoint) -> nn.Sequential:
    """The trained network of a checkpoint, from inputs (B, C, n, n) to targets (B, D), both as they were trained.

    Raises `CheckpointError` if it holds another network.
    """
    meta = state_of(checkpoint)
    with restoring(checkpoint.path):
        options, sizes = from_dict(PROBLEMS[meta["recipe"]], meta["configuration"]), meta["sizes"]
        shape = (sizes["channels"], sizes["mesh"], sizes["mesh"])
        with torch.device("meta"):  # first without memory: the file may name any sizes
            plan = options.layers.module(shape, sizes["outputs"], options.seed, options.torch_dtype)
        check_total(checkpoint.path, checkpoint.total("weights"), sum(each.numel() for each in plan.parameters()))
        module = options.layers.module(shape, sizes["outputs"], options.seed, options.torch_dtype)
        return WidthLayout.of(module).module(checkpoint.rows("weights"))
